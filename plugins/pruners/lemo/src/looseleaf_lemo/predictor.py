"""The predictor of a layer: which blocks are informative, from the attention's input alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.modes import with_gradients
from looseleaf_lemo.elimination import Rows

TARGET_DIVISOR = 64 * 16
"""What the largest scores are divided by to make targets. [official code]"""


class Predictor(nn.Module):
    """Two networks, of queries and of keys, that see a block of one head's part of the input at a time: b * d -> r ->
    b * d -> d with ReLU; heads share them. [section 4.1]

    Args:
        block: tokens b of a block.
        heads: parts of the input.
        dim: width d of a part; heads * dim is the width of the model.
        width: r.
    """

    def __init__(self, block: int, heads: int, dim: int, width: int = 128) -> None:
        super().__init__()
        self.block, self.heads, self.dim = block, heads, dim
        sizes = (block * dim, width, block * dim, dim)
        self.query, self.key = (nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
                                for _ in range(2))

    def forward(self, x: Tensor, see: Callable[[str, int, Tensor], None] | None = None) -> Tensor:
        """(B, n, n), the predicted scores of pairs of blocks of ``x`` (B, n * block, heads * dim).

        ``see`` is given network, number of the hidden layer and what goes into its ReLU (cases, units)."""
        parts = x.view(len(x), -1, self.block, self.heads, self.dim).permute(0, 3, 1, 2, 4).flatten(3)
        ends = []
        for name in ("query", "key"):
            out = parts
            first, second, last = getattr(self, name)
            for n, layer in enumerate((first, second)):
                out = layer(out)
                if see is not None:
                    see(name, n, out.detach().flatten(0, -2))
                out = out.relu()
            ends.append(last(out))
        return torch.einsum("bhid,bhjd->bij", *ends)

    def scores(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, n), the predicted informativeness of the blocks of ``x`` (B, L, H): columns summed, padding left out."""
        real = rows.real(x)
        pairs = self(rows.blanked(x)) * (real[:, :, None] & real[:, None, :])
        return pairs.sum(-2)

    def cut(self, name: str, n: int, units: Tensor) -> None:
        """Keep some of the hidden ``units`` (k,) of layer ``n`` of a network; the others are gone."""
        layers = getattr(self, name)
        for at, index in ((n, (units,)), (n + 1, (slice(None), units))):
            old = layers[at]
            weight = old.weight.detach()[index]
            new = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                new.weight.copy_(weight)
                new.bias.copy_(old.bias[units] if at == n else old.bias)
            layers[at] = new

    def sizes(self) -> dict[str, list[int]]:
        """Units of each hidden layer of both networks."""
        return {name: [layer.out_features for layer in getattr(self, name)[:2]] for name in ("query", "key")}

    @classmethod
    def of_sizes(cls, block: int, heads: int, dim: int, sizes: dict[str, list[int]]) -> Predictor:
        """An untrained one whose hidden layers have so many units."""
        made = cls(block, heads, dim, 1)
        for name, (first, second) in sizes.items():
            layers = [nn.Linear(block * dim, first), nn.Linear(first, second), nn.Linear(second, dim)]
            setattr(made, name, nn.ModuleList(layers))
        return made


def heads_for(width: int, heads: int) -> tuple[int, int]:
    """Parts of the input and their width: as many as the attention has heads where those divide it."""
    heads = math.gcd(width, heads)
    return heads, width // heads


class Fit:
    """The training of a layer's predictor: smooth L1 to the targets, Adam, and units that stay dead are cut.

    Args:
        predictor: trained in place.
        rate: learning rate of Adam (betas .9 and .95).
        every: steps after which dead units are cut; 0: never. Dead is what is not positive in 80 % of the cases since
            the last cut, then in 75 %, in 70 %, down to half. [official code; that it ends at half is ours]
    """

    def __init__(self, predictor: Predictor, rate: float, every: int) -> None:
        self.predictor, self.rate, self.every = predictor, rate, every
        self.steps, self.cuts = 0, 0
        self._begin()

    def _begin(self) -> None:
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), self.rate, betas=(0.9, 0.95))
        self.dead: dict[tuple[str, int], Tensor] = {}
        self.cases = 0

    def step(self, x: Tensor, target: Tensor, real: Tensor) -> float:
        """One step on ``x`` (B, n * block, H) and ``target`` (B, n, n), of which only ``real`` (B, n) blocks count."""
        pairs = real[:, :, None] & real[:, None, :]
        with with_gradients():
            predicted = self.predictor(x, self._see if self.every else None)
            loss = F.smooth_l1_loss(predicted[pairs], target[pairs])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.cases += predicted.shape[0] * predicted.shape[1] * self.predictor.heads
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self._cut()
        return float(loss.detach())

    def _see(self, name: str, n: int, before: Tensor) -> None:
        count = (before <= 0).sum(0)
        self.dead[name, n] = self.dead[name, n] + count if (name, n) in self.dead else count

    def _cut(self) -> None:
        limit = max(0.5, 0.8 - 0.05 * self.cuts)
        for (name, n), count in self.dead.items():
            alive = (count < limit * self.cases).nonzero().flatten()
            if 0 < len(alive) < len(count):
                self.predictor.cut(name, n, alive)
        self.cuts += 1
        self._begin()


def recall(predicted: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Mean fraction of the truly best blocks among those chosen; each item's (K,) numbers of blocks, -1: none."""
    hits = [len({int(v) for v in a if v >= 0} & {int(v) for v in b if v >= 0}) / max(1, int((b >= 0).sum()))
            for a, b in zip(predicted, true, strict=True)]
    return sum(hits) / len(hits)


__all__ = ["TARGET_DIVISOR", "Fit", "Predictor", "heads_for", "recall"]
