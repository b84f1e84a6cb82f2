"""Updates: parameters with their values before, found in a model or an optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.errors import did_you_mean
from looseleaf.pruning.selection import removed
from looseleaf.pruning.targets import holders, stored_parameter
from looseleaf_outlandish.largest import keep_smallest


@dataclass
class Update:
    """What a step, or a whole training, did to one parameter.

    Attributes:
        name: of the parameter.
        after: its values now; written to by :meth:`keep`.
        before: its values before, of the same shape.
    """

    name: str
    after: Tensor
    before: Tensor

    def magnitude(self) -> Tensor:
        """``|after - before|``, float32 at least: in half precision many differences would come out equal."""
        wide = torch.promote_types(self.after.dtype, torch.float32)
        return (self.after.detach().to(wide) - self.before.to(wide)).abs_()

    def keep(self, mask: Tensor) -> None:
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
        raise ValueError(f"the state before is {type(before).__name__}: allowed is a dictionary of parameter name to "
                         "tensor, {name: p.detach().clone() for name, p in model.named_parameters()} made before the "
                         "training. This method prunes updates: a model alone has none")
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    found = []
    for name, places in holders(model).items():
        parameter = stored_parameter(*places[0])
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue
        known = next((n for n in (name, *aliases.get(id(parameter), ())) if n in before), None)
        if known is None:
            raise ValueError(f"the state before has no {name!r}: allowed is a state with every parameter of this "
                             f"{type(model).__name__} that requires a gradient.{did_you_mean(name, map(str, before))}")
        old = before[known]
        if not isinstance(old, Tensor) or old.shape != parameter.shape:
            what = tuple(old.shape) if isinstance(old, Tensor) else type(old).__name__
            raise ValueError(f"{known!r} was {what} before and has shape {tuple(parameter.shape)} now: the state "
                             "before must be of the same model")
        if old.data_ptr() == parameter.data_ptr() and parameter.numel():
            raise ValueError(f"the state before shares the memory of {known!r}, so that training changed it too: copy "
                             "it, {name: p.detach().clone() for name, p in model.named_parameters()}")
        found.append(Update(name, parameter, old.detach().to(parameter.device)))
    if not found:
        raise ValueError(f"no parameter of this {type(model).__name__} requires a gradient: there is no update")
    return found


def drop_largest(updates: Sequence[Update], k: float, scope: str) -> tuple[dict[str, Tensor], int]:
    """Put back the ``round(k n)`` largest entries of each update (``"tensor"``), or of all together (``"global"``).

    Returns:
        Masks (True = kept) by name, and how many entries were put back.
    """
    masks: dict[str, Tensor] = {}
    dropped = 0
    for group in [[u] for u in updates] if scope == "tensor" else [list(updates)]:
        count = removed(k, sum(u.after.numel() for u in group))
        kept = keep_smallest([u.magnitude() for u in group], count)
        dropped += count
        for update, mask in zip(group, kept, strict=True):
            if count:
                update.keep(mask)
            masks[update.name] = mask
    return masks, dropped


def check_finite(named: Iterable[tuple[str, Tensor]], what: str, so: str) -> None:
    """Raise ValueError naming the first tensor with NaN or infinite entries; ``so`` says what was done about it."""
    for name, tensor in named:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        # A sum is NaN or infinite whenever an entry is, and costs a tenth of looking at each; it may overflow as well.
        if bool(torch.isfinite(values.sum())):
            continue
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise ValueError(f"the {what} of {name!r} has {bad} NaN or infinite of {values.numel()} entries: allowed "
                             f"are numbers. {so} Lower the learning rate, clip gradients, or train with a GradScaler")


def optimised(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The parameters of an optimiser by name, each once.

    Names are those of ``model``, or those the optimiser was given (``named_parameters``), or places.

    Raises:
        ValueError: the optimiser has a parameter that is cut in pieces over processes.
    """
    names = {} if model is None else {id(stored_parameter(*places[0])): name for name, places in holders(model).items()}
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
        for parameter, name in zip(group["params"], given, strict=True):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = names.get(id(parameter), name)
            if hasattr(parameter, "to_local") or hasattr(parameter, "ds_id"):
                raise ValueError(f"{name!r} is cut in pieces over processes ({type(parameter).__name__}): the largest "
                                 "entries of a piece are not those of the whole. Gather the weights before and after "
                                 "the training and use IgnoreTopK.merge(before, after)")
            found[name] = parameter
    return found
