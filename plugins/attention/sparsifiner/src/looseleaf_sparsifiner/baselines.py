"""Other keys of equal number: the nearest, random ones, those with the largest true scores; and the guess itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionCall, Paper
from looseleaf.plugin import In
from looseleaf_sparsifiner.backend import RowKeys, Sparsifiner

THIS = Paper(title="Sparsifiner, baselines", authors=("The Looseleaf authors",), year=2026,
             summary="Attention of each row to as many keys, chosen in another way.")


@dataclasses.dataclass
class Nearest(RowKeys):
    """Each patch keeps the prefix and the patches nearest to it, a window.

    Args:
        keep_rate, prefix_tokens, compute_with: as :class:`RowKeys` takes them.
        grid: rows and columns of patches; None: a square where the patches fill one, else a line.
    """

    grid: tuple[int, int] | None = None
    paper: ClassVar[Paper] = THIS

    def importance(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """Minus the squared distance of the patches, (rows, N); the prefix comes first."""
        prefix, patches = self.prefix_tokens, call.shape[4] - self.prefix_tokens
        side = math.isqrt(patches)
        columns = self.grid[1] if self.grid else side if side * side == patches else patches
        number = torch.arange(patches, device=call.query.device)
        at = torch.stack([number // columns, number % columns], -1).float()
        distance = (at[start - prefix:stop - prefix, None] - at).square().sum(-1)
        return torch.cat([torch.ones(len(distance), prefix, device=at.device), -distance], 1)


@dataclasses.dataclass
class RandomKeys(RowKeys):
    """Each row keeps random keys, others in each layer and head, the same ones for all pictures.

    Args:
        keep_rate, prefix_tokens, compute_with: as :class:`RowKeys` takes them.
        seed: of the keys.
    """

    seed: Annotated[int, In(">= 0")] = 0
    paper: ClassVar[Paper] = THIS

    def importance(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """Random numbers, (H, rows, N)."""
        _, heads, _, queries, keys, _ = call.shape
        g = torch.Generator().manual_seed(self.seed * 1000 + call.layer)
        return torch.rand(heads, queries, keys, generator=g)[:, start:stop].to(call.query.device)


@dataclasses.dataclass
class TrueTop(RowKeys):
    """Each row keeps the keys with its largest true scores: no choice of as many keeps more attention, none saves less.

    Args:
        keep_rate, prefix_tokens, compute_with: as :class:`RowKeys` takes them.
    """

    paper: ClassVar[Paper] = THIS

    def importance(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """The scores, (B, H, rows, N)."""
        key = call.key.repeat_interleave(call.shape[1] // call.shape[2], 1)
        return (call.query[:, :, start:stop] @ key.mT).float() * call.scale


class LowRank(Sparsifiner):
    """The guess of a predictor in the place of attention, without softmax or mask (near Linformer, 2006.04768)."""

    def sparse(self, call: AttentionCall, alive: Tensor | None) -> Tensor:
        """The guessed map of the first stage times the values, (B, H, N, D); rows of the prefix exactly."""
        prefix, predictor = self.prefix_tokens, self.of_layer(call)
        coefficients = predictor.coefficients(call.query[:, :, prefix:], call.key, self.scale_for(call.shape[1]))
        value = call.value.repeat_interleave(call.shape[1] // call.shape[2], 1)
        first = dataclasses.replace(call, query=call.query[:, :, :prefix]).dense()
        return torch.cat([first, predictor.dense_map(coefficients).to(value.dtype) @ value], 2)


__all__ = ["LowRank", "Nearest", "RandomKeys", "TrueTop"]
