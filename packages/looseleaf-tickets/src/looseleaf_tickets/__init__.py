"""Train, prune, rewind: iterative magnitude pruning and the tickets it finds.

Names are loaded when first used, so that importing the package costs milliseconds and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "IterativePruner": "iterative", "find_tickets": "iterative", "Grouped": "iterative", "magnitudes": "iterative",
    "Ticket": "tickets", "TrainingRun": "training", "train_ticket": "training", "own_randomness": "training",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from looseleaf_tickets.iterative import Grouped, IterativePruner, find_tickets, magnitudes
    from looseleaf_tickets.tickets import Ticket
    from looseleaf_tickets.training import TrainingRun, own_randomness, train_ticket
