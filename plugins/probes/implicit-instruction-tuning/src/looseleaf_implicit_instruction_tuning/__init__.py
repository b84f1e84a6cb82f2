"""Instruction following without instruction tuning (arXiv 2409.14254).

Names are loaded when first used: transformers' generation takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.lazy import lazy

_HOME = {
    "ImplicitTuningProbe": "probe", "RuleAdapter": "adapter", "UNIFORM": "adapter", "product_of_experts": "adapter",
    "rule_scores": "adapter", "Pair": "pairs", "Response": "pairs", "Tags": "pairs", "as_pairs": "pairs",
    "features": "pairs", "respond": "pairs", "strip_instructions": "pairs", "tune": "tuning", "Item": "battery",
    "Judged": "battery", "items": "battery", "judge": "battery", "Adherence": "measures", "HeadToHead": "measures",
    "ResponseRanking": "measures", "World": "controls", "planted": "controls", "PAIRS": "data",
}

__all__ = sorted(_HOME)
__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from looseleaf_implicit_instruction_tuning.adapter import UNIFORM, RuleAdapter, product_of_experts, rule_scores
    from looseleaf_implicit_instruction_tuning.battery import Item, Judged, items, judge
    from looseleaf_implicit_instruction_tuning.controls import World, planted
    from looseleaf_implicit_instruction_tuning.data import PAIRS
    from looseleaf_implicit_instruction_tuning.measures import Adherence, HeadToHead, ResponseRanking
    from looseleaf_implicit_instruction_tuning.pairs import (
        Pair,
        Response,
        Tags,
        as_pairs,
        features,
        respond,
        strip_instructions,
    )
    from looseleaf_implicit_instruction_tuning.probe import ImplicitTuningProbe
    from looseleaf_implicit_instruction_tuning.tuning import tune
