"""Rules that turn scores into masks; shared by all pruners.

Two conventions hold for every rule. **Counts:** a rule of sparsity s removes exactly ``round(s * n)`` of n items
(Python's ``round``: halves to the even number). **Ties:** of items with equal scores the one that comes first (order
of the parameters, then row-major index) is removed first. Both make the masks a function of the scores alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from looseleaf.names import matches
from looseleaf.plugin import In, check_fields
from looseleaf.pruning.masks import Masks
from looseleaf.pruning.targets import check_finite, input_dims, plain_name

CHUNK = 1 << 22
"""Elements that are looked at together; bounds the extra memory."""


def removed(sparsity: float, count: int) -> int:
    """How many of ``count`` items a rule of this sparsity removes: ``round(sparsity * count)``."""
    return round(sparsity * count)


class Selection(ABC):
    """A rule: scores by parameter name -> masks of the same names and shapes (True = keep).

    A dataclass whose fields are checked as those of a :class:`looseleaf.Plugin`.
    """

    def __post_init__(self) -> None:
        check_fields(self)

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

    def for_model(self, model: nn.Module, names: Iterable[str]) -> Selection:
        """The rule for parameters of ``model``: one that counts along inputs knows where they are then."""
        return self

    def describe(self) -> dict[str, Any]:
        """The rule as plain data, for the metadata of masks."""
        return {"rule": type(self).__name__, **{k: v for k, v in vars(self).items() if k != "dims" and k[0] != "_"}}


@dataclass(frozen=True)
class Unstructured(Selection):
    """Remove single weights, wherever they are.

    Args:
        sparsity: fraction of the weights to remove, in [0, 1).
        scope: ``"global"`` compares the scores of all parameters together; ``"layer"`` removes the same fraction of
            every parameter.
    """

    sparsity: Annotated[float, In("[0, 1)")] = 0.5
    scope: Literal["global", "layer"] = "global"

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
            pairs = [(name, masks.removed(name), masks.total(name)) for name in masks]
        else:
            pairs = [("all parameters together", masks.removed(), masks.total())]
        return [f"{name}: {gone} of {n} removed, the rule asks for {removed(self.sparsity, n)}"
                for name, gone, n in pairs if gone != removed(self.sparsity, n)]


@dataclass(frozen=True)
class Threshold(Selection):
    """Keep what scores above a value; how much is removed is an outcome.

    Args:
        value: the highest score that is removed.
    """

    value: float

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`."""
        _check_scores(scores)
        return Masks({name: score.detach() > self.value for name, score in scores.items()}, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """Nothing: masks do not say what scores they are of."""
        return []


@dataclass(frozen=True)
class _InRows(Selection):
    """What rules have in common that keep the same number of entries in each of many rows; they have a field dims."""

    def for_model(self, model: nn.Module, names: Iterable[str]) -> Selection:
        """See :meth:`Selection.for_model`."""
        found: Any = {**input_dims(model, names), **vars(self)["dims"]}
        return replace(self, dims=found)  # type: ignore[call-arg]

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`. ValueError for sizes that do not suit the rule; nothing is truncated."""
        _check_scores(scores)
        rows = {name: self._rows(name, score) for name, score in scores.items()}  # all of them first: may raise
        kept = {}
        for name, (source, target, width, count) in rows.items():
            lined = scores[name].detach().movedim(source, target)
            keep = _keep_in_rows(lined.reshape(-1, width), count)
            kept[name] = keep.view(lined.shape).movedim(target, source).contiguous()
        return Masks(kept, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`Selection.violations`."""
        out = []
        for name, mask in masks.items():
            source, target, width, count = self._rows(name, mask)
            counts = mask.movedim(source, target).reshape(-1, width).sum(1)
            wrong = int((counts != count).sum())
            if wrong:
                out.append(f"{name}: {wrong} of {len(counts)} groups of {width} do not keep exactly {count}")
        return out

    @abstractmethod
    def _rows(self, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
        """A dimension, where to move it so that rows are consecutive, their length, and how many entries to keep."""


@dataclass(frozen=True)
class PerRow(_InRows):
    """Remove the same number of entries from each row: of each sample of (B, N) scores, or of each output's inputs.

    Args:
        sparsity: fraction of each row to remove, in [0, 1).
        keep: how many of each row to keep, in the place of ``sparsity``, for methods that round in another way; None:
            not used.
        dims: the dimension of the inputs by parameter name, where it is not 1; :meth:`for_model` sets it.
    """

    sparsity: Annotated[float, In("[0, 1)")] = 0.5
    keep: Annotated[int | None, In(">= 0")] = None
    dims: Mapping[str, int] = field(default_factory=dict)

    def _rows(self, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
        dim = 1 - self.dims.get(name, 1)
        width = tensor.numel() // max(1, tensor.shape[dim]) if tensor.ndim > 1 else tensor.numel()
        if self.keep is not None and self.keep > width:
            raise ValueError(f"PerRow.keep: expected at most {width}, the row length of {name!r}, got {self.keep}")
        count = width - removed(self.sparsity, width) if self.keep is None else self.keep
        return (dim, 0, width, count) if tensor.ndim > 1 else (0, 0, width, count)


@dataclass(frozen=True)
class NM(_InRows):
    """N:M sparsity: of every M consecutive inputs of an output keep the N with the highest scores.

    Args:
        n: how many are kept, 1 <= n < m.
        m: size of a group.
        dims: the dimension of the inputs by parameter name, for weights where it is not 1 (transformers' ``Conv1D``
            has (in, out): 0); :meth:`for_model` sets it.
    """

    n: Annotated[int, In(">= 1")] = 2
    m: int = 4
    dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n >= self.m:
            raise ValueError(f"NM: expected 1 <= n < m, such as 2:4, got n={self.n}, m={self.m}")

    @property
    def sparsity(self) -> float:
        """The fraction that is removed, 1 - n/m."""
        return 1.0 - self.n / self.m

    def _rows(self, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
        dim = self.dims.get(name, 1)
        if not 0 <= dim < tensor.ndim:
            raise ValueError(f"{self.n}:{self.m} needs dimension {dim} of {name!r}, which has shape "
                             f"{tuple(tensor.shape)}: leave it out with exclude=, or correct dims=")
        if tensor.shape[dim] % self.m:
            raise ValueError(f"{self.n}:{self.m} needs a multiple of {self.m} inputs, {name!r} has {tensor.shape[dim]} "
                             f"(shape {tuple(tensor.shape)}): leave it out with exclude=, or take another pattern")
        return dim, -1, self.m, self.n


@dataclass(frozen=True)
class Tied:
    """Slices of several parameters that are one unit and are removed together.

    ``Tied({"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}, within="layers.*.mlp")`` are the neurons
    of the MLPs of a Llama: these rows and those columns. Where a parameter has several slices for each unit, they are
    consecutive: the inputs of a flattened channel, or the rows of an attention head.

    Args:
        members: parameter name -> the dimension that has a slice for each unit; each must have scores.
        within: name pattern of the modules that ``members`` are relative to; None: the model.
        units: how many units there are, such as the number of key heads; None: as many as the smallest member has
            slices.
    """

    members: Mapping[str, int]
    within: str | None = None
    units: Annotated[int | None, In(">= 1")] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.members:
            raise ValueError("Tied.members: expected at least one parameter name and dimension, got none")


@dataclass(frozen=True)
class Structured(Selection):
    """Remove whole slices of every parameter: output neurons or channels (dim 0), or inputs (dim 1).

    A slice is scored by the sum of its entries' scores, a tied unit by the sum over its slices.

    Args:
        sparsity: fraction of the slices of each parameter (of the units of each :class:`Tied`) to remove, in [0, 1).
        dim: the dimension that is thinned out; not for parameters that are in ``tied``.
        tied: which slices belong together.
    """

    sparsity: Annotated[float, In("[0, 1)")] = 0.5
    dim: Annotated[int, In(">= 0")] = 0
    tied: tuple[Tied, ...] = ()

    def describe(self) -> dict[str, Any]:
        """See :meth:`Selection.describe`."""
        tied = [{"members": dict(t.members), "within": t.within, "units": t.units} for t in self.tied]
        return {"rule": "Structured", "sparsity": self.sparsity, "dim": self.dim, **({"tied": tied} if tied else {})}

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`. ValueError for a tied parameter without scores, or with other sizes."""
        _check_scores(scores)
        kept = {name: torch.ones(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()}
        for units, members in self._groups(scores):
            sums = [scores[n].detach().movedim(d, 0).reshape(units, -1).sum(1, dtype=torch.float64) for n, d in members]
            total = torch.stack([s.to(sums[0].device) for s in sums]).sum(0)
            keep = _keep_largest([total], removed(self.sparsity, units))[0]
            for name, dim in members:
                kept[name] &= _spread(keep, kept[name], dim)
        return Masks(kept, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`Selection.violations`."""
        out, tensors = [], dict(masks)
        expected = {name: torch.ones_like(mask) for name, mask in tensors.items()}
        for units, members in self._groups(tensors):
            first = members[0][0]
            alive = torch.zeros(units, dtype=torch.bool, device=tensors[first].device)
            for name, dim in members:
                alive |= tensors[name].movedim(dim, 0).reshape(units, -1).any(1).to(alive.device)
            for name, dim in members:
                expected[name] &= _spread(alive, tensors[name], dim)
            gone = units - int(alive.sum())
            if gone != removed(self.sparsity, units):
                out.append(f"{first}: {gone} of {units} slices removed, the rule asks for "
                           f"{removed(self.sparsity, units)}")
        return [f"{name}: slices are removed in part" for name in tensors
                if not torch.equal(expected[name], tensors[name])] + out

    def _groups(self, tensors: Mapping[str, Tensor]) -> list[tuple[int, list[tuple[str, int]]]]:
        """(number of units, [(parameter name, dimension)]) of all that is removed together."""
        plain = {plain_name(name): name for name in tensors}
        groups: list[tuple[int | None, list[tuple[str, int]]]] = []
        for tied in self.tied:
            for prefix in _within(tied, plain):
                full = [(f"{prefix}.{name}".strip("."), dim) for name, dim in tied.members.items()]
                groups.append((tied.units, [(plain.get(name, name), dim) for name, dim in full]))
        covered = {name for _, group in groups for name, _ in group}
        groups += [(None, [(name, self.dim)]) for name in tensors if name not in covered]
        out = []
        for units, group in groups:
            for name, dim in group:
                if name not in tensors:
                    raise ValueError(f"Structured.tied: expected scores of {name!r}, which is tied, got none")
                if not 0 <= dim < tensors[name].ndim:
                    raise ValueError(f"Structured: expected {name!r} to have dimension dim={dim}, got only "
                                     f"{tensors[name].ndim} dimensions (shape {tuple(tensors[name].shape)})")
            count = units or min(tensors[name].shape[dim] for name, dim in group)
            odd = [(name, dim) for name, dim in group if count == 0 or tensors[name].shape[dim] % count]
            if odd:
                raise ValueError(f"Structured.tied: expected a multiple of {count} slices, got {odd[0][0]!r} with "
                                 f"{tensors[odd[0][0]].shape[odd[0][1]]} along dimension {odd[0][1]}")
            out.append((count, group))
        return out


def _within(tied: Tied, names: Iterable[str]) -> list[str]:
    """The modules that the members of ``tied`` are relative to."""
    if tied.within is None:
        return [""]
    paths = dict.fromkeys(name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1))
    found = [path for path in paths if path == tied.within] or [path for path in paths if matches(path, tied.within)]
    if not found:
        raise ValueError(f"Tied.within: expected a name pattern of modules, such as {next(iter(paths), '')!r}, got "
                         f"{tied.within!r}, which matches none")
    return found


def _spread(keep: Tensor, like: Tensor, dim: int) -> Tensor:
    """What is kept of units, (U,), as a mask of the shape of ``like``, which has slices of them along ``dim``."""
    size = like.shape[dim]
    shape = [size if d == dim else 1 for d in range(like.ndim)]
    return keep.to(like.device).repeat_interleave(size // len(keep)).view(shape).expand(like.shape)


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not scores:
        raise ValueError("scores: expected at least one parameter, got no scores")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"the scores of {name!r}: expected a floating-point tensor, got {kind}")
        check_finite(name, score, "scores", allow_infinite=True)


def _keep_in_rows(rows: Tensor, count: int) -> Tensor:
    """Masks that keep exactly the ``count`` largest of each row of (R, M)."""
    keep = torch.ones(rows.shape, dtype=torch.bool, device=rows.device)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):
        lowest = rows[at:at + step].sort(dim=1, stable=True).indices[:, :rows.shape[1] - count]
        keep[at:at + step].scatter_(1, lowest, False)
    return keep


def _keep_largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks that remove exactly the ``count`` smallest of all scores together.

    The threshold is found by radix selection: the bits of a float, suitably flipped, order like the float, so
    counting their upper 16 bits finds the bucket of the k-th smallest, counting the next 16 bits inside the bucket
    refines it, and so on. Two passes (float32) over the data in chunks, no copy of all of it, no sorting; exact.
    """
    if count <= 0:
        return [torch.ones(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    double = any(s.dtype == torch.float64 for s in scores)
    bits = 64 if double else 32
    prefix, below = 0, 0  # the key's bits known so far, and how many keys are smaller than all that begin with them
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores:
            for chunk in score.detach().reshape(-1).split(CHUNK):
                keys = _keys(chunk, double)
                if shift != bits - 16:
                    keys = keys[(keys >> (shift + 16)) == prefix]
                digits = (keys >> shift) + (1 << 15) if shift == bits - 16 else (keys >> shift) & 0xFFFF
                counts += torch.bincount(digits, minlength=1 << 16).cpu()
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, count - below))
        below += int(cumulative[digit - 1]) if digit else 0
        prefix = digit - (1 << 15) if shift == bits - 16 else (prefix << 16) | digit
    threshold = _value(prefix, double)
    ties = count - below  # how many of those equal to the threshold must go
    masks = []
    for score in scores:
        flat = score.detach().reshape(-1)
        keep = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
        for at in range(0, len(flat), CHUNK):
            # widened as in _keys: a bfloat16 tensor would round the threshold found among float32 scores
            chunk = flat[at:at + CHUNK].to(torch.float64 if double else torch.float32)
            equal = (chunk == threshold).nonzero().squeeze(1)
            keep[at:at + CHUNK] = chunk > threshold
            keep[at + equal[ties:]] = True
            ties = max(0, ties - len(equal))
        masks.append(keep.view(score.shape))
    return masks


def _keys(chunk: Tensor, double: bool) -> Tensor:
    """Whole numbers that order like the floats of ``chunk`` (bfloat16 and float16 widen exactly)."""
    values = chunk.to(torch.float64 if double else torch.float32) + 0.0  # -0.0 becomes 0.0
    raw = values.view(torch.int64 if double else torch.int32)
    return raw ^ ((raw >> (63 if double else 31)) & (0x7FFFFFFFFFFFFFFF if double else 0x7FFFFFFF))


def _value(key: int, double: bool) -> float:
    """The inverse of :func:`_keys` for one key."""
    sign, mask, kind = (1 << 63, (1 << 63) - 1, torch.int64) if double else (1 << 31, (1 << 31) - 1, torch.int32)
    raw = key ^ mask if key < 0 else key
    assert -sign <= raw < sign
    value = float(torch.tensor([raw], dtype=kind).view(torch.float64 if double else torch.float32)[0])
    assert not math.isnan(value)
    return value
