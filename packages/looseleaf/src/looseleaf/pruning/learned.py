"""Masks that are learned: scores are parameters, and the gradient passes straight through the rule."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from looseleaf.pruning.applied import Place
from looseleaf.pruning.masks import Masks
from looseleaf.pruning.selection import Selection
from looseleaf.pruning.targets import (
    Beside,
    computed,
    holders,
    model_facts,
    plain_name,
    prunable_parameters,
    stored_parameter,
)


class LearnedMasks:
    """Scores of weights, put on a model to be trained; leaving a ``with`` block takes them off.

    The model computes with the weights that the rule keeps. ``dL/dscore = dL/d(weight * mask) * weight``, also where
    the mask is 0 [straight-through, as in Piggyback, arXiv 1801.06519, section 3]. Weights may be frozen or trained.
    A state dict has the pruned weights under their plain names, so that ``save_pretrained`` writes a model that any
    version of transformers loads, and beside them what :meth:`torch.nn.Module.load_state_dict` needs to go on. What
    would write to the pruned weights, such as an adapter that is merged into them, is refused: harden the scores first.

    Args:
        model: any torch module without masks.
        selection: the rule, such as ``Threshold(0.005)`` or ``Unstructured(0.5)``.
        weights: parameter names; None: those of ``init``, or ``prunable_parameters(model)``.
        init: the first score of every weight, or scores by name.

    Attributes:
        places: where each weight is held: name -> (module, attribute), several where it is tied.

    Raises:
        ValueError: a name that is no parameter, scores of another shape, a model with masks or a weight with a
            parametrization.
    """

    def __init__(self, model: nn.Module, selection: Selection, weights: Iterable[str] | None = None,
                 init: float | Mapping[str, Tensor] = 0.01) -> None:
        if weights is None:
            weights = init if isinstance(init, Mapping) else prunable_parameters(model)
        names, known = list(weights), holders(model)
        if Masks.of(model):
            raise ValueError("expected a model without masks, but it carries masks: take them off first")
        if not names or not known.keys() >= set(names):
            odd = next((name for name in names if name not in known), names)
            raise ValueError(f"weights: expected at least one parameter of this {type(model).__name__}, got {odd!r}")
        self._model = model
        self.places: dict[str, list[Place]] = {name: known[name] for name in names}
        self._facts = model_facts(model, names)
        self._scores: dict[str, Parameter] = {}
        for name, places in self.places.items():
            if any(computed(*place) for place in places):
                raise ValueError(f"{name!r} has a parametrization: remove it first")
            weight = stored_parameter(*places[0])
            score = init[name] if isinstance(init, Mapping) else torch.full(weight.shape, float(init))
            if score.shape != weight.shape:
                raise ValueError(f"init: expected scores of shape {tuple(weight.shape)} for {name!r}, got "
                                 f"{tuple(score.shape)}")
            self._scores[name] = Parameter(score.detach().to(weight.device, torch.float32, copy=True))
        self.selection = selection.for_model(model, names)
        self._masks: dict[str, Tensor] | None = None
        self._versions: list[int] = []
        for name, places in self.places.items():
            for module, attribute in places:
                module.add_module(_beside(attribute), _Scores(self, name, attribute))
                _set_class(module)

    def parameters(self) -> Iterator[Parameter]:
        """The scores, float32, for an optimiser."""
        return iter(self._scores.values())

    def harden(self) -> Masks:
        """The masks of the scores as they are now; ValueError where a weight was resized or tied since."""
        known = {plain_name(name): places for name, places in holders(self._model).items()}
        for name, places in self.places.items():
            if known.get(plain_name(name)) != places or stored_parameter(*places[0]).shape != self._scores[name].shape:
                raise ValueError(f"{name!r}: expected the weight that the scores were put on, got one that was resized "
                                 "or tied since: remove() the scores, and put them on the model as it is now")
        masks = self.selection.select({name: score.detach() for name, score in self._scores.items()})
        masks.metadata.update(self._facts)
        return masks

    def remove(self) -> None:
        """Take the scores off the model; its weights are as they were, or as training left them."""
        for places in self.places.values():
            for module, attribute in places:
                part = module._modules.get(_beside(attribute))
                if isinstance(part, _Scores) and part.owner is self:
                    del module._modules[_beside(attribute)]
                    _set_class(module)

    def __enter__(self) -> LearnedMasks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    @torch.compiler.disable
    def _mask(self, name: str) -> Tensor:
        """The mask of a weight; all are selected together, anew after each backward pass and each change of a score."""
        versions = [score._version for score in self._scores.values()]
        if self._masks is None or versions != self._versions:
            self._masks = dict(self.selection.select({n: score.detach() for n, score in self._scores.items()}))
            self._versions = versions
        return self._masks[name]


class _Scores(Beside):
    """The scores of a weight, in the module that holds it."""

    def __init__(self, owner: LearnedMasks, name: str, attribute: str) -> None:
        super().__init__()
        self.owner, self.name, self.attribute, self.scores = owner, name, attribute, owner._scores[name]

    def pruned(self, weight: Parameter) -> Tensor:
        out: Tensor = _StraightThrough.apply(weight, self.scores, self.owner._mask(self.name), self.owner)
        return out if torch.compiler.is_compiling() else out.as_subclass(_Pruned)


class _WithScores(nn.Module):
    """Mixed into the class of a module whose weights have scores; each weight is a property of the class."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part in _scores_in(self):
            name = prefix + part.attribute
            destination[f"{prefix}{_beside(part.attribute)}.dense"] = destination[name]
            destination[name] = getattr(self, part.attribute).detach().as_subclass(Tensor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        for part in _scores_in(self):
            dense = state_dict.pop(f"{prefix}{_beside(part.attribute)}.dense", None)
            if dense is not None:
                state_dict[prefix + part.attribute] = dense
        super()._load_from_state_dict(state_dict, prefix, *others)


def _beside(attribute: str) -> str:
    return f"{attribute}_scores"


def _scores_in(module: nn.Module) -> list[_Scores]:
    return [part for part in module.children() if isinstance(part, _Scores)]


def _set_class(module: nn.Module) -> None:
    """Give a module a class with a property for each weight with scores, or its own again without any."""
    cls: type[nn.Module] = getattr(type(module), "_looseleaf_plain", type(module))
    attributes = tuple(part.attribute for part in _scores_in(module))
    module.__class__ = _with_properties(cls, attributes) if attributes else cls  # type: ignore[arg-type]


@functools.cache
def _with_properties(cls: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    def pruned(attribute: str) -> property:
        return property(lambda module: module._modules[_beside(attribute)].pruned(module._parameters[attribute]))

    properties = {attribute: pruned(attribute) for attribute in attributes}
    return type(cls.__name__, (_WithScores, cls), {**properties, "_looseleaf_plain": cls, "__module__": cls.__module__})


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, owner: LearnedMasks) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.owner, ctx.dtype = owner, scores.dtype
        return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, mask) = gradients, ctx.saved_tensors
        ctx.owner._masks = None  # an optimiser may write to the scores without torch counting it
        own = gradient.masked_fill(~mask, 0.0) if ctx.needs_input_grad[0] else None
        return own, (gradient * weight).to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None


class _Pruned(Tensor):
    """A pruned weight as others see it. It is made anew each time, so that what is written to it would be lost."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
        if any(isinstance(leaf, cls) for leaf in tree_leaves((args[:1] if writes else (), kwargs.get("out")))):
            raise ValueError("expected learned masks to be hardened before a weight is written to (an adapter merged, "
                             "values copied), got a write to a weight that carries scores: take them off with "
                             "remove(), and put on the masks that harden() gives")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            pruned = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
            if type(out) is Tensor and out.layout is torch.strided and _memory(out) == _memory(pruned):
                return out.as_subclass(cls)  # w.data, a view: what is written there would be lost as well
        return out


_WRITERS = {"__set__", "__setitem__", *(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
