"""Updates, which are parameters with their values before, in a model, two states or an optimiser; and the largest of
their entries, found exactly without sorting them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import Unstructured
from looseleaf.errors import did_you_mean
from looseleaf.pruning.selection import removed
from looseleaf.pruning.targets import holders, stored_parameter

SAMPLED = 1 << 13
"""Numbers that are sorted to find out where the threshold lies, about."""


@dataclass
class Update:
    """What a step, or a whole training, did to one parameter.

    Attributes:
        name: of the parameter.
        after: its values now; written to by :meth:`put_back`.
        before: its values before, of the same shape.
    """

    name: str
    after: Tensor
    before: Tensor

    def magnitude(self) -> Tensor:
        """``|after - before|``, float32 at least: in half precision many differences would come out equal."""
        dtype = torch.promote_types(self.after.dtype, torch.float32)
        return (self.after.detach().to(dtype) - self.before.to(dtype)).abs_()

    def put_back(self, mask: Tensor) -> None:
        """Put the values before back where ``mask`` is False; the others keep every bit."""
        self.after.copy_(torch.where(mask, self.after, self.before))


def of_model(model: nn.Module, before: Any) -> list[Update]:
    """The updates of all parameters of ``model`` that require a gradient; a tied weight once, under its first name.

    Args:
        model: after training.
        before: copies of its values before, by the names of ``state_dict`` or ``named_parameters``.

    Raises:
        ValueError: ``before`` is no such mapping, lacks a parameter, is of another shape, or shares the model's memory.
    """
    if not isinstance(before, Mapping):
        raise ValueError("the state before: expected a dictionary of parameter name to tensor, {name: "
                         "p.detach().clone() for name, p in model.named_parameters()} made before the training, got "
                         f"{type(before).__name__}. This method prunes updates: a model alone has none")
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    updates = []
    for name, places in holders(model).items():
        parameter = stored_parameter(*places[0])
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue
        known = next((n for n in (name, *aliases.get(id(parameter), ())) if n in before), None)
        if known is None:
            raise ValueError(f"the state before has no {name!r}: expected each parameter of this "
                             f"{type(model).__name__} that requires a gradient.{did_you_mean(name, map(str, before))}")
        old = before[known]
        if not isinstance(old, Tensor) or old.shape != parameter.shape:
            what = tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__
            raise ValueError(f"{known!r} was {what} before and has shape {tuple(parameter.shape)} now: the state "
                             "before must be of the same model")
        if old.data_ptr() == parameter.data_ptr() and parameter.numel():
            raise ValueError(f"the state before shares the memory of {known!r}, so that training changed it too: copy "
                             "it, {name: p.detach().clone() for name, p in model.named_parameters()}")
        updates.append(Update(name, parameter, old.detach().to(parameter.device)))
    if not updates:
        raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient: there is no update")
    return updates


def of_states(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Update]:
    """The updates of all floating-point tensors of ``after`` by name; tensors that share memory there are one update.

    Raises:
        ValueError: names or shapes differ.
    """
    odd = sorted(set(before) ^ set(after))
    if odd:
        raise ValueError(f"the states have different names, such as {odd[0]!r}: both must be of one model")
    named: dict[str, Update] = {}
    places: dict[tuple[Any, ...], Update] = {}
    for name, value in after.items():
        if before[name].shape != value.shape:
            raise ValueError(f"{name!r} has shapes {tuple(before[name].shape)} and {tuple(value.shape)}: both states "
                             "must be of one model")
        if value.is_floating_point():
            place: tuple[Any, ...] = (value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,)
            named[name] = places.setdefault(place, Update(name, value.detach(), before[name].detach().to(value.device)))
    return named


def smallest(updates: Sequence[Update], k: float, scope: str) -> dict[str, Tensor]:
    """Masks by name, False for the ``round(k n)`` largest entries of each update (``"tensor"``), or of all together
    (``"global"``)."""
    masks: dict[str, Tensor] = {}
    for group in [[u] for u in updates] if scope == "tensor" else [list(updates)]:
        count = removed(k, sum(u.after.numel() for u in group))
        kept = keep_smallest([u.magnitude() for u in group], count)
        masks.update({update.name: mask for update, mask in zip(group, kept, strict=True)})
    return masks


def keep_smallest(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks (True = keep) that drop exactly the ``count`` largest of all magnitudes together.

    Of equal magnitudes at the threshold the one that comes first (order of the tensors, then row-major) is dropped
    first: the convention of :mod:`looseleaf.pruning.selection`, whose masks these are (see :func:`reference`). That
    looks at every bit of every number in turn; this one sorts a sample, counts what lies above, and goes on with the
    few numbers near the threshold. It is several times as fast, which matters as it runs at every training step.

    Args:
        magnitudes: non-negative numbers without NaN, any shapes.
        count: how many to drop, 0 to all.
    """
    total = sum(m.numel() for m in magnitudes)
    if count in (0, total):
        return [torch.full(m.shape, count == 0, dtype=torch.bool, device=m.device) for m in magnitudes]
    if len({(m.dtype, m.device) for m in magnitudes}) > 1:
        return reference(magnitudes, count)
    threshold, ties, equal = _threshold([m.reshape(-1) for m in magnitudes], count, total)
    masks = [m < threshold for m in magnitudes]
    if ties < equal:
        for mask, m in zip(masks, magnitudes, strict=True):
            places = (m == threshold).view(-1).nonzero()[:, 0]
            mask.view(-1)[places[ties:]] = True
            ties = max(0, ties - len(places))
    return masks


def reference(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """What :func:`keep_smallest` gives, by the core's selection rule."""
    total = sum(m.numel() for m in magnitudes)
    rule = Unstructured(count / total, "global")
    return list(rule.select({str(i): -m for i, m in enumerate(magnitudes)}).values())


def _threshold(pool: list[Tensor], count: int, total: int) -> tuple[Tensor, int, int]:
    """The ``count``-th largest number, how many equal to it must go, and how many there are."""
    while total > 4 * SAMPLED:
        sample = torch.cat([_some(m, SAMPLED * len(m) // total) for m in pool]).sort(descending=True).values
        place = count / total * len(sample)
        # four standard deviations of the rank of the threshold in a random sample, and some for small ones
        margin = 4 * math.sqrt(place * (1 - count / total)) + 8
        high, low = int(place - margin), int(place + margin)
        upper = sample[high] if high >= 0 else torch.full_like(sample[0], math.inf)
        lower = sample[low] if low < len(sample) else torch.full_like(sample[0], -1.0)
        above = sum(int(torch.count_nonzero(m > upper)) for m in pool)
        near = torch.cat([m[(m >= lower) & (m <= upper)] for m in pool])
        # The sample misled, as it may where numbers follow a pattern, or too many are alike.
        if not 0 < count - above <= len(near) <= total // 2:
            break
        pool, count, total = [near], count - above, len(near)
    rest = torch.cat(pool)
    threshold = rest.kthvalue(total - count + 1).values
    ties = count - int(torch.count_nonzero(rest > threshold))
    return threshold, ties, int(torch.count_nonzero(rest == threshold))


def _some(numbers: Tensor, count: int) -> Tensor:
    """``count`` of the numbers, spread evenly by the golden ratio: equal steps would fall into the same column."""
    places = torch.arange(count, dtype=torch.float64, device=numbers.device).mul_(0.6180339887498949).frac_()
    return numbers[places.mul_(len(numbers)).long()]


def check_finite(named: Iterable[tuple[str, Tensor]], what: str, so: str) -> None:
    """Raise ValueError naming the first tensor with NaN or infinite entries; ``so`` says what was done about it."""
    for name, tensor in named:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        # A sum is NaN or infinite whenever an entry is, and costs a tenth of looking at each; it may overflow as well.
        if bool(torch.isfinite(values.sum())):
            continue
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(f"the {what} of {name!r}: expected numbers, got {bad} NaN or infinite of {values.numel()} "
                             f"entries. {so} Lower the learning rate, clip gradients, or train with a GradScaler")


def optimised(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The parameters of an optimiser by name, each once.

    Names are those of ``model``, or those the optimiser was given (``named_parameters``), or places.

    Raises:
        ValueError: the optimiser has a parameter that is sharded across processes.
    """
    names = {} if model is None else {id(stored_parameter(*places[0])): name for name, places in holders(model).items()}
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for number, group in enumerate(optimizer.param_groups):
        labels = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
        for parameter, name in zip(group["params"], labels, strict=True):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = names.get(id(parameter), name)
            if hasattr(parameter, "to_local") or hasattr(parameter, "ds_id"):
                raise ValueError(f"{name!r} is sharded across processes ({type(parameter).__name__}): the largest "
                                 "entries of a piece are not those of the whole. Gather the weights before and after "
                                 "the training and use IgnoreTopK.merge(before, after)")
            parameters[name] = parameter
    return parameters
