"""CInGS: fine-tuning a language model to answer from the text it is given (arXiv 2506.15480).

Names are loaded when first used: the trainer imports transformers and PEFT, which takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.lazy import lazy

_HOME = {
    "CInGS": "optimizer", "GroundedPrompt": "optimizer", "CInGSTrainer": "trainer", "response_loss": "trainer",
    "Collator": "features", "Rows": "features", "cings_features": "features", "packed": "features",
    "ContextAwareLogits": "decoding", "context_aware": "decoding", "Fact": "grounding", "grounding_report": "grounding",
}

__all__ = sorted(_HOME)
__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from looseleaf_cings.decoding import ContextAwareLogits, context_aware
    from looseleaf_cings.features import Collator, Rows, cings_features, packed
    from looseleaf_cings.grounding import Fact, grounding_report
    from looseleaf_cings.optimizer import CInGS, GroundedPrompt
    from looseleaf_cings.trainer import CInGSTrainer, response_loss
