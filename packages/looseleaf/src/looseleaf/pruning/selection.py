"""Rules that turn scores into masks; shared by all pruners.

Two conventions hold for every rule. **Counts:** a rule of sparsity s removes exactly ``round(s * n)`` of n items
(Python's ``round``: halves to the even number). **Ties:** of items with equal scores the one that comes first (order
of the parameters, then row-major index) is removed first. Both make the masks a function of the scores alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from looseleaf.pruning.masks import Masks
from looseleaf.pruning.targets import check_finite

CHUNK = 1 << 22
"""Elements that are looked at together; bounds the extra memory."""


def removed(sparsity: float, count: int) -> int:
    """How many of ``count`` items a rule of this sparsity removes: ``round(sparsity * count)``."""
    return round(sparsity * count)


class Selection(ABC):
    """A rule: scores by parameter name -> masks of the same names and shapes (True = keep)."""

    @abstractmethod
    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """The masks; higher scores are kept.

        Args:
            scores: parameter name -> floating-point scores of any shape, dtype and device.

        Raises:
            ValueError: no scores at all, NaN scores (the parameter is named), or shapes that do not suit the rule.
        """

    @abstractmethod
    def violations(self, masks: Masks) -> list[str]:
        """What in ``masks`` does not follow this rule, one sentence each; empty when all is well."""

    def describe(self) -> dict[str, Any]:
        """The rule as plain data, for the metadata of masks."""
        return {"rule": type(self).__name__, **{k: v for k, v in vars(self).items() if not k.startswith("_")}}


@dataclass(frozen=True)
class Unstructured(Selection):
    """Remove single weights, wherever they are.

    Args:
        sparsity: share of the weights to remove, in [0, 1).
        scope: ``"global"`` compares the scores of all parameters together; ``"layer"`` removes the same share of
            every parameter.
    """

    sparsity: float = 0.5
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        _check_sparsity("Unstructured", self.sparsity)
        if self.scope not in ("global", "layer"):
            raise ValueError(f"Unstructured.scope={self.scope!r}: allowed is 'global' or 'layer'")

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`. Exact at any size: the threshold is found by counting, not by sorting."""
        _check_scores(scores)
        if self.scope == "layer":
            kept = {name: _keep_largest([s], removed(self.sparsity, s.numel()))[0] for name, s in scores.items()}
        else:
            total = sum(s.numel() for s in scores.values())
            kept = dict(zip(scores, _keep_largest(list(scores.values()), removed(self.sparsity, total)), strict=True))
        return Masks(kept, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`Selection.violations`."""
        if self.scope == "layer":
            pairs = [(name, masks.removed(name), m.numel()) for name, m in masks.items()]
        else:
            pairs = [("all parameters together", masks.removed(), masks.total())]
        return [f"{name}: {gone} of {n} removed, the rule asks for {removed(self.sparsity, n)}"
                for name, gone, n in pairs if gone != removed(self.sparsity, n)]


@dataclass(frozen=True)
class NM(Selection):
    """N:M sparsity: of every M consecutive inputs of an output keep the N with the highest scores.

    Args:
        n: how many are kept, 1 <= n < m.
        m: size of a group.
        dims: the dimension of the inputs by parameter name, for weights where it is not 1 (transformers' ``Conv1D``
            has (in, out): 0); :func:`looseleaf.pruning.targets.input_dims` gives it for a model.
    """

    n: int = 2
    m: int = 4
    dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.n, self.m))
        if not whole or not 1 <= self.n < self.m:
            raise ValueError(f"NM(n={self.n!r}, m={self.m!r}): allowed are whole numbers with 1 <= n < m, such as 2:4")

    @property
    def sparsity(self) -> float:
        """The share that is removed, 1 - n/m."""
        return 1.0 - self.n / self.m

    def describe(self) -> dict[str, Any]:
        """See :meth:`Selection.describe`; ``dims`` are left out, the model has them."""
        return {"rule": "NM", "n": self.n, "m": self.m}

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`. An input dimension that is no multiple of M is an error, never truncated."""
        _check_scores(scores)
        for name, score in scores.items():
            self._dimension(name, score)  # all of them first: an error after minutes of work helps nobody
        kept = {}
        for name, score in scores.items():
            lined = score.detach().movedim(self._dimension(name, score), -1)
            groups = lined.reshape(-1, self.m)
            keep = torch.ones(groups.shape, dtype=torch.bool, device=groups.device)
            step = max(1, CHUNK // self.m)
            for at in range(0, len(groups), step):
                order = groups[at:at + step].sort(dim=1, stable=True).indices[:, :self.m - self.n]
                keep[at:at + step].scatter_(1, order, False)
            kept[name] = keep.view(lined.shape).movedim(-1, self._dimension(name, score)).contiguous()
        return Masks(kept, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`Selection.violations`."""
        out = []
        for name, mask in masks.items():
            counts = mask.movedim(self._dimension(name, mask), -1).reshape(-1, self.m).sum(1)
            wrong = int((counts != self.n).sum())
            if wrong:
                out.append(f"{name}: {wrong} of {len(counts)} groups of {self.m} do not keep exactly {self.n}")
        return out

    def _dimension(self, name: str, tensor: Tensor) -> int:
        dim = self.dims.get(name, 1)
        if not 0 <= dim < tensor.ndim:
            raise ValueError(f"{self.n}:{self.m} needs dimension {dim} of {name!r}, which has shape "
                             f"{tuple(tensor.shape)}: leave it out with exclude=, or correct dims=")
        if tensor.shape[dim] % self.m:
            raise ValueError(f"{self.n}:{self.m} needs a multiple of {self.m} inputs, {name!r} has {tensor.shape[dim]} "
                             f"(shape {tuple(tensor.shape)}): leave it out with exclude=, or take another pattern")
        return dim


@dataclass(frozen=True)
class Structured(Selection):
    """Remove whole slices of every parameter: output neurons or channels (dim 0), or inputs (dim 1).

    A slice is scored by the sum of its entries' scores.

    Args:
        sparsity: share of the slices of each parameter to remove, in [0, 1).
        dim: the dimension that is thinned out.
    """

    sparsity: float = 0.5
    dim: int = 0

    def __post_init__(self) -> None:
        _check_sparsity("Structured", self.sparsity)
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 0:
            raise ValueError(f"Structured.dim={self.dim!r}: allowed is a whole number >= 0")

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`."""
        _check_scores(scores)
        kept = {}
        for name, score in scores.items():
            self._check_dim(name, score)
            slices = score.detach().movedim(self.dim, 0).reshape(score.shape[self.dim], -1).sum(1, dtype=torch.float64)
            keep = _keep_largest([slices], removed(self.sparsity, len(slices)))[0]
            shape = [len(slices) if d == self.dim else 1 for d in range(score.ndim)]
            kept[name] = keep.view(shape).expand(score.shape).contiguous()
        return Masks(kept, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`Selection.violations`."""
        out = []
        for name, mask in masks.items():
            self._check_dim(name, mask)
            slices = mask.movedim(self.dim, 0).reshape(mask.shape[self.dim], -1)
            if not torch.equal(slices.any(1), slices.all(1)):
                out.append(f"{name}: slices along dimension {self.dim} are removed in part")
            gone = int((~slices.any(1)).sum())
            if gone != removed(self.sparsity, len(slices)):
                out.append(f"{name}: {gone} of {len(slices)} slices removed, the rule asks for "
                           f"{removed(self.sparsity, len(slices))}")
        return out

    def _check_dim(self, name: str, tensor: Tensor) -> None:
        if self.dim >= tensor.ndim:
            raise ValueError(f"Structured.dim={self.dim}: {name!r} has only {tensor.ndim} dimensions "
                             f"(shape {tuple(tensor.shape)})")


def _check_sparsity(owner: str, sparsity: Any) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{owner}.sparsity={sparsity!r}: allowed is 0 <= sparsity < 1")


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not scores:
        raise ValueError("no scores: there is nothing to select from")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"the scores of {name!r} are {kind}: allowed is a floating-point tensor")
        check_finite(name, score, "scores", allow_infinite=True)


def _keep_largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks that remove exactly the ``count`` smallest of all scores together.

    The threshold is found by radix selection: the bits of a float, suitably flipped, order like the float, so
    counting their upper 16 bits finds the bucket of the k-th smallest, counting the next 16 bits inside the bucket
    refines it, and so on. Two passes (float32) over the data in chunks, no copy of all of it, no sorting; exact.
    """
    if count <= 0:
        return [torch.ones(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    wide = any(s.dtype == torch.float64 for s in scores)
    bits = 64 if wide else 32
    prefix, below = 0, 0  # the key's bits known so far, and how many keys are smaller than all that begin so
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores:
            for chunk in score.detach().reshape(-1).split(CHUNK):
                keys = _keys(chunk, wide)
                if shift != bits - 16:
                    keys = keys[(keys >> (shift + 16)) == prefix]
                digits = (keys >> shift) + (1 << 15) if shift == bits - 16 else (keys >> shift) & 0xFFFF
                counts += torch.bincount(digits, minlength=1 << 16).cpu()
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, count - below))
        below += int(cumulative[digit - 1]) if digit else 0
        prefix = digit - (1 << 15) if shift == bits - 16 else (prefix << 16) | digit
    threshold = _value(prefix, wide)
    ties = count - below  # how many of those equal to the threshold must go
    masks = []
    for score in scores:
        flat = score.detach().reshape(-1)
        keep = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
        for at in range(0, len(flat), CHUNK):
            # widened as in _keys: a bfloat16 tensor would round the threshold found among float32 scores
            chunk = flat[at:at + CHUNK].to(torch.float64 if wide else torch.float32)
            equal = (chunk == threshold).nonzero().squeeze(1)
            keep[at:at + CHUNK] = chunk > threshold
            keep[at + equal[ties:]] = True
            ties = max(0, ties - len(equal))
        masks.append(keep.view(score.shape))
    return masks


def _keys(chunk: Tensor, wide: bool) -> Tensor:
    """Whole numbers that order like the floats of ``chunk`` (bfloat16 and float16 widen exactly)."""
    values = chunk.to(torch.float64 if wide else torch.float32) + 0.0  # -0.0 becomes 0.0
    raw = values.view(torch.int64 if wide else torch.int32)
    return raw ^ ((raw >> (63 if wide else 31)) & (0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF))


def _value(key: int, wide: bool) -> float:
    """The inverse of :func:`_keys` for one key."""
    sign, mask, kind = (1 << 63, (1 << 63) - 1, torch.int64) if wide else (1 << 31, (1 << 31) - 1, torch.int32)
    raw = key ^ mask if key < 0 else key
    assert -sign <= raw < sign
    value = float(torch.tensor([raw], dtype=kind).view(torch.float64 if wide else torch.float32)[0])
    assert not math.isnan(value)
    return value
