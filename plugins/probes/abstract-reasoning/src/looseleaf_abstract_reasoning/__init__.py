"""Abstract reasoning by symbol remapping: does a model apply the rule, or only know the symbols? (arXiv 2505.23833)"""

from looseleaf_abstract_reasoning.controls import Memoriser, Oracle
from looseleaf_abstract_reasoning.datasets import CATEGORIES, DATASETS, problems, suite
from looseleaf_abstract_reasoning.items import (
    Item,
    draw_remapping,
    export_harness,
    from_json_lines,
    render,
    to_json_lines,
)
from looseleaf_abstract_reasoning.probe import AbstractReasoningProbe

__all__ = ["CATEGORIES", "DATASETS", "AbstractReasoningProbe", "Item", "Memoriser", "Oracle", "draw_remapping",
           "export_harness", "from_json_lines", "problems", "render", "suite", "to_json_lines"]
