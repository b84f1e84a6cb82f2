"""The interface of a method that decides what is removed."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from looseleaf.pruning.masks import Masks
    from looseleaf.pruning.selection import Selection


@dataclasses.dataclass
class Pruner(Plugin):
    """Decides what is removed: :meth:`score` -> :meth:`selection` -> :class:`looseleaf.Masks`.

    The score of a weight says how much it matters; the selection rule keeps the weights with high scores.
    Methods of several rounds override :meth:`prune`.
    """

    kind: ClassVar[str] = "pruners"

    @abstractmethod
    def score(self, model: torch.nn.Module, data: Any = None) -> dict[str, Tensor]:
        """Scores by parameter name, each of the shape of its parameter; only prunable parameters appear."""

    @abstractmethod
    def selection(self) -> Selection:
        """The rule that turns scores into masks."""

    def prune(self, model: torch.nn.Module, data: Any = None) -> Masks:
        """The masks for ``model``. The model itself is not changed: call ``masks.apply(model)``."""
        return self.selection().select(self.score(model, data))
