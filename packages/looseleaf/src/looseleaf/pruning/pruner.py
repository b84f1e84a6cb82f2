"""The interface of a method that decides what is removed."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from looseleaf.pruning.masks import Masks
    from looseleaf.pruning.selection import Selection


@dataclasses.dataclass
class Pruner(Plugin):
    """Decides what is removed: :meth:`score` -> :meth:`selection` -> :class:`looseleaf.Masks`.

    A score says how much an entry matters; the selection rule keeps the entries with high scores. What the entries are
    is said by :attr:`removes`:

    ============ ======================================== ==================================== =======================
    ``removes``  names of scores and masks                ``model``                            ``data``
    ============ ======================================== ==================================== =======================
    ``weights``  prunable parameters of the model         the model                            batches, a training
                                                                                               function, or nothing
    ``updates``  any parameters of the model              the model after the step or training its ``state_dict`` before
    ``tokens``   tensors of the batch, as ``input_ids``   the model that is to read them       a batch
    ============ ======================================== ==================================== =======================

    Methods of several rounds override :meth:`prune`.

    Attributes:
        removes: what the masks are put on.
    """

    kind: ClassVar[str] = "pruners"
    removes: ClassVar[Literal["weights", "updates", "tokens"]] = "weights"

    @abstractmethod
    def score(self, model: torch.nn.Module, data: Any = None) -> dict[str, Tensor]:
        """Scores by name, each of the shape of what it scores; only what may be removed appears."""

    @abstractmethod
    def selection(self) -> Selection:
        """The rule that turns scores into masks."""

    def prune(self, model: torch.nn.Module, data: Any = None) -> Masks:
        """The masks (True = keep). The model itself is not changed; masks of weights go on it by
        ``masks.apply(model)``."""
        return self.selection().select(self.score(model, data))
