"""Rules that turn scores into masks; shared by all pruners.

Two conventions hold for every rule. **Counts:** a rule of sparsity s removes exactly ``round(s * n)`` of n items
(Python's ``round``: halves to the even number). **Ties:** of items with equal scores the one that comes first (order
of the parameters, then row-major index) is removed first. Both make the masks a function of the scores alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
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

    A dataclass whose fields are checked as those of a :class:`looseleaf.Plugin`. Nothing is truncated: sizes that do
    not suit a rule are an error.
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

    def violations(self, masks: Masks) -> list[str]:
        """What in ``masks`` does not follow this rule, one sentence each; empty when all is well."""
        # masks that follow a rule, taken as scores, give themselves again
        expected = self.select({name: mask.float() for name, mask in masks.items()}) if masks else masks
        return [f"{name}: {masks.removed(name)} of {masks.total(name)} weights removed, the rule asks for "
                f"{expected.removed(name)} (where the numbers agree, in other places)"
                for name in masks if not torch.equal(masks[name], expected[name])]

    def for_model(self, model: nn.Module, names: Iterable[str]) -> Selection:
        """The rule for parameters of ``model``: one that counts along inputs knows where they are then."""
        return self

    def describe(self) -> dict[str, Any]:
        """The rule as plain data, for the metadata of masks."""
        fields = asdict(self)  # type: ignore[call-overload]
        return {"rule": type(self).__name__, **{k: v for k, v in fields.items() if k != "dims" and v != ()}}


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
        _check_scores(scores)
        groups = [dict(scores)] if self.scope == "global" else [{name: score} for name, score in scores.items()]
        kept: dict[str, Tensor] = {}
        for group in groups:
            count = removed(self.sparsity, sum(score.numel() for score in group.values()))
            kept.update(zip(group, _keep_largest([*group.values()], count), strict=True))
        return Masks(kept, self.describe())


@dataclass(frozen=True)
class Threshold(Selection):
    """Keep what scores above a value; how much is removed is an outcome.

    Args:
        value: the highest score that is removed.
    """

    value: float

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        _check_scores(scores)
        return Masks({name: score.detach() > self.value for name, score in scores.items()}, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """Nothing: masks do not say what scores they are of."""
        return []


@dataclass(frozen=True)
class _InRows(Selection):
    """Keeps the same number of entries in each of many rows; has a field dims."""

    def for_model(self, model: nn.Module, names: Iterable[str]) -> Selection:
        dims: Any = {**input_dims(model, names), **vars(self)["dims"]}
        return replace(self, dims=dims)  # type: ignore[call-arg]

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        _check_scores(scores)
        rows = {name: self._rows(name, score) for name, score in scores.items()}  # all of them first: may raise
        kept = {}
        for name, (source, target, length, count) in rows.items():
            lined = scores[name].detach().movedim(source, target)
            keep = torch.ones(lined.shape, dtype=torch.bool, device=lined.device)
            chunks = (t.reshape(-1, length).split(max(1, CHUNK // max(1, length))) for t in (lined, keep))
            for values, kept_here in zip(*chunks, strict=True):
                kept_here.scatter_(1, values.sort(dim=1, stable=True).indices[:, :length - count], False)
            kept[name] = keep.movedim(target, source)
        return Masks(kept, self.describe())

    @abstractmethod
    def _rows(self, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
        """A dimension, where to move it so that rows are consecutive, their length, and how many entries to keep."""


@dataclass(frozen=True)
class PerRow(_InRows):
    """Remove the same number of entries from each row: of each sample of (B, N) scores, or of each output's inputs.

    Args:
        sparsity: fraction of each row to remove, in [0, 1).
        keep: how many of each row to keep in the place of ``sparsity``, for methods that round otherwise.
        dims: the dimension of the inputs by parameter name, where it is not 1; :meth:`for_model` sets it.
    """

    sparsity: Annotated[float, In("[0, 1)")] = 0.5
    keep: Annotated[int | None, In(">= 0")] = None
    dims: Mapping[str, int] = field(default_factory=dict)

    def _rows(self, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
        dim = 1 - self.dims.get(name, 1) if tensor.ndim > 1 else 0
        length = tensor.numel() // max(1, tensor.shape[dim]) if tensor.ndim > 1 else tensor.numel()
        if self.keep is not None and self.keep > length:
            raise ValueError(f"PerRow.keep: expected at most {length}, the row length of {name!r}, got {self.keep}")
        return dim, 0, length, length - removed(self.sparsity, length) if self.keep is None else self.keep


@dataclass(frozen=True)
class NM(_InRows):
    """N:M sparsity: of every M consecutive inputs of an output keep the N with the highest scores.

    Args:
        n: how many are kept, 1 <= n < m.
        m: size of a group.
        dims: as in :class:`PerRow`; 0 for transformers' ``Conv1D``, which has (in, out).
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
        """1 - n/m."""
        return 1.0 - self.n / self.m

    def _rows(self, name: str, tensor: Tensor) -> tuple[int, int, int, int]:
        dim, shape = self.dims.get(name, 1), tuple(tensor.shape)
        if not 0 <= dim < tensor.ndim:
            raise ValueError(f"{self.n}:{self.m} needs dimension {dim} of {name!r}, which has shape {shape}: leave it "
                             "out with exclude=, or correct dims=")
        if shape[dim] % self.m:
            raise ValueError(f"{self.n}:{self.m} needs a multiple of {self.m} inputs, {name!r} has {shape[dim]} "
                             f"(shape {shape}): leave it out with exclude=, or take another pattern")
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

    def groups(self, names: Iterable[str]) -> list[dict[str, int]]:
        """The members in full, for each module that they are relative to; ValueError where there is none."""
        if self.within is None:
            return [dict(self.members)]
        paths = dict.fromkeys(name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1))
        found = [self.within] if self.within in paths else [path for path in paths if matches(path, self.within)]
        if not found:
            raise ValueError(f"Tied.within: expected a name pattern of modules, such as {next(iter(paths), '')!r}, got "
                             f"{self.within!r}, which matches none")
        return [{f"{path}.{name}": dim for name, dim in self.members.items()} for path in found]


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

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        _check_scores(scores)
        kept = {name: torch.ones(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()}
        for units, members in self._groups(scores):
            sums = [scores[n].detach().movedim(d, 0).reshape(units, -1).sum(1, dtype=torch.float64)
                    for n, d in members.items()]
            total = torch.stack([s.to(sums[0].device) for s in sums]).sum(0)
            keep = _keep_largest([total], removed(self.sparsity, units))[0]
            for name, dim in members.items():
                lined = kept[name].movedim(dim, -1)  # a view: what is removed here is removed there
                lined &= keep.to(lined.device).repeat_interleave(lined.shape[-1] // units)
        return Masks(kept, self.describe())

    def _groups(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, int]]]:
        """(number of units, parameter name -> dimension) of all that is removed together."""
        plain = {plain_name(name): name for name in tensors}
        groups = [(tied.units, {plain.get(name, name): dim for name, dim in members.items()})
                  for tied in self.tied for members in tied.groups(plain)]
        covered = {name for _, members in groups for name in members}
        for units, members in [*groups, *((None, {name: self.dim}) for name in tensors if name not in covered)]:
            for name, dim in members.items():
                if name not in tensors:
                    raise ValueError(f"Structured.tied: expected scores of {name!r}, which is tied, got none")
                if not 0 <= dim < tensors[name].ndim:
                    raise ValueError(f"Structured: expected {name!r} to have dimension dim={dim}, got only "
                                     f"{tensors[name].ndim} dimensions (shape {tuple(tensors[name].shape)})")
            slices = {name: tensors[name].shape[dim] for name, dim in members.items()}
            count = units or min(slices.values())
            for name, size in slices.items():
                if count == 0 or size % count:
                    raise ValueError(f"Structured.tied: expected a multiple of {count} slices, got {name!r} with "
                                     f"{size} along dimension {members[name]}")
            yield count, members


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not scores:
        raise ValueError("scores: expected at least one parameter, got no scores")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"the scores of {name!r}: expected a floating-point tensor, got {kind}")
        check_finite(name, score, "scores", allow_infinite=True)


def _keep_largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """Masks that remove exactly the ``count`` smallest of all scores together.

    The threshold is found by radix selection: the bits of a float, suitably flipped, order like the float, so
    counting their upper 16 bits finds the bucket of the k-th smallest, counting the next 16 bits inside the bucket
    refines it, and so on. Two passes (float32) over the data in chunks, no copy of all of it, no sorting; exact.
    """
    if count <= 0:
        return [torch.ones(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    double = any(s.dtype == torch.float64 for s in scores)
    floats, integers = (torch.float64, torch.int64) if double else (torch.float32, torch.int32)

    def chunks(score: Tensor) -> Iterator[Tensor]:
        for chunk in score.detach().reshape(-1).split(CHUNK):
            yield chunk.to(floats)  # bfloat16 and float16 widen exactly

    limits = torch.iinfo(integers)
    key, below = limits.min, 0  # the lowest key of the bucket, and how many keys are lower
    for shift in range(limits.bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in (chunk for score in scores for chunk in chunks(score)):
            digits = _flipped((chunk + 0.0).view(integers)) >> shift  # -0.0 becomes 0.0
            digits -= key >> shift
            if key != limits.min:
                digits = digits[digits >> 16 == 0]
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, count - below))
        below += int(cumulative[digit] - counts[digit])
        key += digit << shift
    threshold = _flipped(torch.tensor([key], dtype=integers)).view(floats).item()
    ties = count - below  # how many of those equal to the threshold must go
    masks = []
    for score in scores:
        parts = []
        for chunk in chunks(score):
            keep, equal = chunk > threshold, (chunk == threshold).nonzero().squeeze(1)
            keep[equal[ties:]] = True
            ties = max(0, ties - len(equal))
            parts.append(keep)
        masks.append(torch.cat(parts).view(score.shape))
    return masks


def _flipped(bits: Tensor) -> Tensor:
    """Integers that order like the floats of these bits, and the other way round."""
    limits = torch.iinfo(bits.dtype)
    return (bits >> (limits.bits - 1)).bitwise_and_(limits.max).bitwise_xor_(bits)
