"""The interfaces of methods that decide what is removed: from weights, from a batch, from an update."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from looseleaf.plugin import Plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from looseleaf.pruning.masks import Masks
    from looseleaf.pruning.selection import Selection


@dataclasses.dataclass
class Pruner(Plugin):
    """Base of the three kinds of pruner: :class:`WeightPruner` removes weights of a model, :class:`TokenPruner` tokens
    (or patches, or frames) of a batch, :class:`UpdatePruner` entries of what training did to the weights."""

    kind: ClassVar[str] = "pruners"


@dataclasses.dataclass
class WeightPruner(Pruner):
    """Removes weights of a model: :meth:`score` -> :meth:`selection` -> :class:`looseleaf.Masks`.

    A score says how much a weight matters; the selection rule keeps the weights with high scores. Methods of several
    rounds override :meth:`prune`.
    """

    @abstractmethod
    def score(self, model: torch.nn.Module, data: Any = None) -> dict[str, Tensor]:
        """Scores of the weights that may be removed: parameter name -> tensor of the parameter's shape.

        Args:
            model: any torch module; not changed.
            data: batches, a training function, or whatever the method's docstring says; None: nothing.
        """

    @abstractmethod
    def selection(self) -> Selection:
        """The rule that turns scores into masks."""

    def prune(self, model: torch.nn.Module, data: Any = None) -> Masks:
        """The masks (True = keep) for ``model``, which is not changed; ``masks.apply(model)`` puts them on. ``data`` is
        that of :meth:`score`."""
        from looseleaf.pruning.targets import model_facts

        scores = self.score(model, data)
        masks = self.selection().for_model(model, scores).select(scores)
        masks.metadata.update(model_facts(model, masks))
        return masks


@dataclasses.dataclass
class TokenPruner(Pruner):
    """Removes tokens, patches or frames of each sample of a batch."""

    @abstractmethod
    def keep(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is kept of ``batch``: name of a tensor in it -> (B, N) bool, True = keep.

        Args:
            model: that is to read the batch; not changed.
            batch: tensors by name, such as ``input_ids`` (B, N) or ``pixel_values``; not changed.
        """


@dataclasses.dataclass
class UpdatePruner(Pruner):
    """Removes entries of an update, of one step or of a whole training."""

    @abstractmethod
    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Masks:
        """Which entries of ``after - before`` are kept (True); the others go back to their values before. Both are
        values by parameter name, as in ``state_dict``, of the same names and shapes; not changed."""
