"""Train, prune, rewind: iterative magnitude pruning and the tickets it finds.

Names are loaded when first used, so that importing the package costs milliseconds and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.lazy import lazy

__version__ = "0.3.0"

_HOME = {
    "IterativePruner": "iterative", "find_tickets": "iterative", "Grouped": "iterative", "magnitudes": "iterative",
    "Ticket": "tickets", "TrainingRun": "training", "train_ticket": "training",
}

__all__ = ["__version__", *sorted(_HOME)]
__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from looseleaf_tickets.iterative import Grouped, IterativePruner, find_tickets, magnitudes
    from looseleaf_tickets.tickets import Ticket
    from looseleaf_tickets.training import TrainingRun, train_ticket
