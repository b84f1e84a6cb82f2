"""A mask that is on a weight of a model.

The zeros are in the parameter itself, and the dense values are kept aside: whoever reads or writes the weight, in
whatever way, meets the weight that the model computes with. So a merged adapter, an average or a quantiser work on it,
a compiled model needs no compiling again, and a state dict is that of the pruned model.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from looseleaf.pruning.targets import stored_parameter

Place = tuple[nn.Module, str]

WRITTEN = ("was written to where it is masked (an adapter was merged into it, or values copied): expected zeros there. "
           "Take the masks off with remove(model, restore=False), which leaves the weights as they are now")
_ON_MODULE = "_looseleaf_masks"


class AppliedMask:
    """What keeps the removed weights of one parameter at zero: a hook on its gradient, and one on all optimisers, which
    undoes what momentum from before the mask does. The modules hold this object, so that their copies carry it."""

    def __init__(self, parameter: Parameter, packed: Tensor, shape: torch.Size) -> None:
        self.packed, self.shape = packed, shape
        self.aside: Tensor | None = None
        self.guard(parameter)

    def guard(self, parameter: Parameter) -> None:
        """Look after this parameter from now on."""
        self.parameter = parameter
        self.cached: Tensor | None = None  # where the mask removes, once gradients need it
        _APPLIED[id(parameter)] = self
        if parameter.is_floating_point():
            weak = weakref.ref(self)  # the parameter must not keep what keeps it
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # or torch takes no hook, and somebody may train the weight later
            self.handle = parameter.register_hook(lambda g: mask.zeroed(g) if (mask := weak()) is not None else None)
            parameter.requires_grad_(trained)

    def stop(self) -> None:
        """Leave the parameter alone from now on."""
        if self.parameter.is_floating_point():
            self.handle.remove()
        _APPLIED.pop(id(self.parameter), None)

    def zeroed(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros; not by a product: 0 * inf is NaN."""
        if gradient.shape != self.shape:  # the weight was resized, and is another one now
            return gradient
        self.cached = self.removed()
        return (gradient.to_dense() if gradient.is_sparse else gradient).masked_fill(self.cached, 0.0)

    def removed(self) -> Tensor:
        """True where the mask removes, on the device of the parameter."""
        removed = unpack(self.packed, self.shape).logical_not_() if self.cached is None else self.cached
        return removed.to(self.parameter.device)

    def written(self) -> bool:
        """Whether something else than zeros is where the mask removes."""
        return self.aside is not None and bool((self.parameter != 0).logical_and_(self.removed()).any())

    @torch.no_grad()
    def zero(self) -> None:
        """Put zeros where the mask removes."""
        self.parameter.masked_fill_(self.removed(), 0.0)

    def press(self) -> None:
        """Keep the removed weights aside and put zeros into their places."""
        if self.aside is None:
            self.aside = torch.masked_select(self.parameter.detach(), self.removed())
            self.zero()

    @torch.no_grad()
    def lift(self) -> None:
        """Put the removed weights back into their places."""
        if self.aside is not None:
            self.parameter.masked_scatter_(self.removed(), self.aside.to(self.parameter))
            self.aside = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("parameter", "packed", "shape", "aside")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.guard(self.parameter)


class _OnModule(dict[str, AppliedMask]):
    """The masks on a module's own parameters by attribute. A state that is loaded becomes the dense weights."""

    def __init__(self, module: nn.Module) -> None:
        vars(module)[_ON_MODULE] = self
        self.handles = (module.register_load_state_dict_pre_hook(self.before_load),
                        module.register_load_state_dict_post_hook(self.after_load))

    def before_load(self, module: nn.Module, *_: Any) -> None:
        self.loading = {name: mask for name, mask in self.items() if applied(module, name) is mask}
        for mask in self.loading.values():
            mask.lift()

    def after_load(self, module: nn.Module, _: Any) -> None:
        for attribute, mask in self.loading.items():
            parameter = stored_parameter(module, attribute)
            if parameter is not mask.parameter and parameter.shape == mask.shape:  # loaded with assign=True
                mask.stop()
                mask.guard(parameter)
                mask.aside = None
            mask.press()


_APPLIED: weakref.WeakValueDictionary[int, AppliedMask] = weakref.WeakValueDictionary()
"""By the id of the parameter."""


def applied(module: nn.Module, attribute: str) -> AppliedMask | None:
    """The mask on a weight, or None; also where the weight was replaced or resized since."""
    return _mask_on(stored_parameter(module, attribute))


def _mask_on(parameter: Tensor) -> AppliedMask | None:
    mask = _APPLIED.get(id(parameter))
    return mask if mask is not None and mask.parameter is parameter and parameter.shape == mask.shape else None


def put_on(packed: Tensor, shape: torch.Size, places: list[Place]) -> None:
    """Put a mask on a parameter that is held in ``places``."""
    _watch_optimisers()
    parameter = stored_parameter(*places[0])
    mask = AppliedMask(parameter, packed.to(parameter.device), shape)
    for module, attribute in places:
        masks = vars(module).get(_ON_MODULE) or _OnModule(module)
        masks[attribute] = mask
    mask.press()


def take_off(places: list[Place], restore: bool) -> None:
    """Take the mask off a parameter, if one is on it; ``restore``: give the removed weights back."""
    if (mask := applied(*places[0])) is not None:
        if restore:
            mask.lift()
        mask.stop()
    for module, attribute in places:
        masks = vars(module).get(_ON_MODULE, {})
        if masks.pop(attribute, None) is not None and not masks:
            for handle in vars(module).pop(_ON_MODULE).handles:
                handle.remove()


@functools.cache
def _watch_optimisers() -> None:
    def masks_of(optimizer: Optimizer) -> list[AppliedMask]:
        changed = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        return [mask for parameter in changed if (mask := _mask_on(parameter)) is not None]

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        for mask in masks_of(optimizer):
            if mask.written():
                raise ValueError(f"a weight of shape {tuple(mask.shape)} that is trained {WRITTEN}")

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        for mask in masks_of(optimizer):
            mask.zero()

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)


def pack(mask: Tensor) -> Tensor:
    """8 entries a byte, the first in the highest bit, as numpy.packbits (which is 20 times faster than torch on a CPU);
    on the device of the mask."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(numpy.packbits(flat.numpy()))
    padded = nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << _bits(flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask of which :func:`pack` made ``packed``."""
    if packed.device.type == "cpu":
        flat = torch.from_numpy(numpy.unpackbits(packed.numpy(), count=shape.numel()))
    else:
        flat = ((packed[:, None] >> _bits(packed.device)) & 1).view(-1)[:shape.numel()]
    return flat.view(torch.bool).view(shape)


def _bits(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
