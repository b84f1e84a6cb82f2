"""A mask that is on a weight of a model.

The zeros are in the parameter itself, and the dense values are kept aside: whoever reads or writes the weight, in
whatever way, meets the weight that the model computes with. So a merged adapter, an average or a quantiser work on it,
a compiled model needs no compiling again, and a state dict is that of the pruned model.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from looseleaf.pruning.targets import stored_parameter

Place = tuple[nn.Module, str]


class AppliedMask:
    """What keeps the removed weights of one parameter at zero.

    A hook on the parameter zeroes gradients, one on all optimisers undoes what momentum from before the mask does, and
    loading a state dict loads the dense weights. The modules hold this object, so that their copies carry it.
    """

    def __init__(self, parameter: Parameter, packed: Tensor, shape: torch.Size) -> None:
        self.parameter, self.packed, self.shape = parameter, packed, shape
        self.aside: Tensor | None = None
        self._start()

    def _start(self) -> None:
        self.keep: Tensor | None = None  # the mask as a tensor, once gradients need it
        _APPLIED[id(self.parameter)] = self
        if self.parameter.is_floating_point():
            weak = weakref.ref(self)  # the parameter must not keep what keeps it
            trained = self.parameter.requires_grad
            self.parameter.requires_grad_(True)  # or torch takes no hook, and somebody may train the weight later
            self.handle = self.parameter.register_hook(lambda g: a.zeroed(g) if (a := weak()) is not None else None)
            self.parameter.requires_grad_(trained)

    def stop(self) -> None:
        """Leave the parameter alone from now on."""
        if self.parameter.is_floating_point():
            self.handle.remove()
        _APPLIED.pop(id(self.parameter), None)

    def zeroed(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros; not by a product: 0 * inf is NaN."""
        if self.keep is None or self.keep.device != gradient.device:
            self.keep = unpack(self.packed, self.shape).to(gradient.device)
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        return torch.where(self.keep, dense, torch.zeros((), dtype=dense.dtype, device=dense.device))

    def removed(self) -> Tensor:
        """True where the mask removes, on the device of the parameter."""
        keep = self.keep if self.keep is not None else unpack(self.packed, self.shape)
        return ~keep.to(self.parameter.device)

    @torch.no_grad()
    def written(self) -> bool:
        """Whether something else than zeros is where the mask removes."""
        return self.aside is not None and bool((self.parameter != 0).logical_and_(self.removed()).any())

    @torch.no_grad()
    def zero(self) -> None:
        """Put zeros where the mask removes."""
        self.parameter.masked_fill_(self.removed(), 0.0)

    @torch.no_grad()
    def press(self) -> None:
        """Keep the removed weights aside and put zeros into their places."""
        if self.aside is None:
            self.aside = torch.masked_select(self.parameter, self.removed())
            self.zero()

    @torch.no_grad()
    def lift(self) -> None:
        """Put the removed weights back into their places."""
        if self.aside is not None:
            self.parameter.masked_scatter_(self.removed(), self.aside.to(self.parameter))
            self.aside = None

    def before_load(self, *_: Any) -> None:
        """Hook of a module whose state is about to be loaded: what is not in the state stays the dense weight."""
        self.lift()

    def after_load(self, module: nn.Module, _: Any) -> None:
        """Hook of a module whose state was loaded, perhaps by giving it other parameters."""
        attribute = next((a for a, (mask, *_) in _masks_on(module).items() if mask is self), None)
        now = module._parameters.get(attribute) if attribute is not None else None
        if now is not None and now is not self.parameter and now.shape == self.shape:
            self.stop()
            self.parameter, self.aside = now, None
            self._start()
        self.press()

    def __getstate__(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("parameter", "packed", "shape", "aside")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedMask:
        new = type(self).__new__(type(self))
        new.__setstate__({**self.__getstate__(), "parameter": copy.deepcopy(self.parameter, memo),
                          "aside": None if self.aside is None else self.aside.clone()})
        return new


_APPLIED: weakref.WeakValueDictionary[int, AppliedMask] = weakref.WeakValueDictionary()
"""By the id of the parameter."""


def applied(module: nn.Module, attribute: str) -> AppliedMask | None:
    """The mask on a weight, or None."""
    parameter = stored_parameter(module, attribute)
    mask = _APPLIED.get(id(parameter))
    return mask if mask is not None and mask.parameter is parameter else None


def put_on(packed: Tensor, shape: torch.Size, places: list[Place]) -> None:
    """Put a mask on a parameter that is held in ``places``."""
    _watch_optimisers()
    parameter = stored_parameter(*places[0])
    mask = AppliedMask(parameter, packed.to(parameter.device), shape)
    for module, attribute in places:
        _forget(module, attribute)  # the mask of a parameter that was replaced
        _masks_on(module)[attribute] = (mask, module.register_load_state_dict_pre_hook(mask.before_load),
                                        module.register_load_state_dict_post_hook(mask.after_load))
    mask.press()


def take_off(places: list[Place], restore: bool) -> None:
    """Take the mask off a parameter, if one is on it; ``restore``: give the removed weights back."""
    mask = applied(*places[0])
    if mask is not None:
        if restore:
            mask.lift()
        mask.stop()
    for module, attribute in places:
        _forget(module, attribute)


def _masks_on(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """The masks on a module's own parameters, each with the handles of its hooks, by attribute."""
    found: dict[str, tuple[Any, ...]] = module.__dict__.setdefault("_looseleaf_masks", {})
    return found


def _forget(module: nn.Module, attribute: str) -> None:
    _, *handles = _masks_on(module).pop(attribute, (None,))
    for handle in handles:
        handle.remove()
    if not _masks_on(module):
        del module.__dict__["_looseleaf_masks"]


@functools.cache
def _watch_optimisers() -> None:
    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                mask = _APPLIED.get(id(parameter))
                if mask is not None and mask.parameter is parameter:
                    mask.zero()

    register_optimizer_step_post_hook(after_step)


# ---------------------------------------------------------------------- bits
def pack(mask: Tensor) -> Tensor:
    """8 entries a byte, the first in the highest bit, as numpy.packbits; on the device of the mask."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        import numpy

        return torch.from_numpy(numpy.packbits(flat.numpy()))
    padded = nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(7, -1, -1, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask of which :func:`pack` made ``packed``."""
    count = shape.numel()
    if packed.device.type == "cpu":
        import numpy

        return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count)).view(torch.bool).view(shape)
    bits = (packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(-1)[:count].view(torch.bool).view(shape)
