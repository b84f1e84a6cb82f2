"""What is removed from a model: targets, selection rules, masks, and tickets of iterative pruning.

Names are loaded when first used: this package imports no torch by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Pruner": "pruner", "Masks": "masks", "Selection": "selection", "Unstructured": "selection", "NM": "selection",
    "Structured": "selection", "prunable_parameters": "targets", "IterativePruner": "iterative",
    "find_tickets": "iterative", "Grouped": "iterative", "Ticket": "tickets", "TrainingRun": "training",
    "train_ticket": "training",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from looseleaf.pruning.iterative import Grouped, IterativePruner, find_tickets
    from looseleaf.pruning.masks import Masks
    from looseleaf.pruning.pruner import Pruner
    from looseleaf.pruning.selection import NM, Selection, Structured, Unstructured
    from looseleaf.pruning.targets import prunable_parameters
    from looseleaf.pruning.tickets import Ticket
    from looseleaf.pruning.training import TrainingRun, train_ticket


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'looseleaf.pruning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"looseleaf.pruning.{_HOME[name]}"), name)
    globals()[name] = value
    return value
