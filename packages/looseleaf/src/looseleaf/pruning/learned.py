"""Masks that are learned: scores are parameters, and the gradient passes straight through the rule."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from looseleaf.files import load_tensors, save_tensors
from looseleaf.pruning.applied import Place
from looseleaf.pruning.masks import Masks
from looseleaf.pruning.selection import Selection
from looseleaf.pruning.targets import holders, model_facts, prunable_parameters, stored_parameter

FORMAT = "looseleaf.learned/1"


class LearnedMasks:
    """Scores of weights, put on a model to be trained; leaving a ``with`` block takes them off.

    The model computes with the weights that the rule keeps. ``dL/dscore = dL/d(weight * mask) * weight``, also where
    the mask is 0 [straight-through, as in Piggyback, arXiv 1801.06519, section 3]. Weights may be frozen or trained.
    A state dict has the pruned weights under their plain names, so that ``save_pretrained`` writes a model that any
    version of transformers loads, and beside them what :meth:`torch.nn.Module.load_state_dict` needs to go on. Do not
    merge adapters while the scores are on: harden them first.

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
        given = init if isinstance(init, Mapping) else None
        names = list(weights if weights is not None else given if given is not None else prunable_parameters(model))
        if Masks.of(model):
            raise ValueError("expected a model without masks, but it carries masks: take them off first")
        known = holders(model)
        if not names or any(name not in known for name in names):
            odd = next((name for name in names if name not in known), names)
            raise ValueError(f"weights: expected at least one parameter of this {type(model).__name__}, got {odd!r}")
        self.places: dict[str, list[Place]] = {name: known[name] for name in names}
        self._facts = model_facts(model, self.places)
        self._scores: dict[str, Parameter] = {}
        for name, places in self.places.items():
            if any(parametrize.is_parametrized(*place) for place in places):
                raise ValueError(f"{name!r} has a parametrization: remove it first")
            weight = stored_parameter(*places[0])
            score = torch.full(weight.shape, float(init)) if given is None else given[name]  # type: ignore[arg-type]
            if score.shape != weight.shape:
                raise ValueError(f"init: expected scores of shape {tuple(weight.shape)} for {name!r}, got "
                                 f"{tuple(score.shape)}")
            self._scores[name] = Parameter(score.detach().to(weight.device, torch.float32, copy=True))
        self.selection = selection.for_model(model, self.places)
        self._masks: dict[str, Tensor] | None = None
        self._versions: list[int] = []
        for name, places in self.places.items():
            part = _Scores(self, name)
            for module, attribute in places:
                # the order of parameters is to be given back; unsafe: torch's own check would run it all twice more
                part.orders.append(list(module._parameters))
                parametrize.register_parametrization(module, attribute, part, unsafe=True)
                part.handles.append((module.register_state_dict_post_hook(_plain_names(attribute)),
                                     module.register_load_state_dict_pre_hook(_behind(attribute))))

    def parameters(self) -> Iterator[Parameter]:
        """The scores, float32, for an optimiser."""
        return iter(self._scores.values())

    def harden(self) -> Masks:
        """The masks of the scores as they are now."""
        masks = self.selection.select({name: score.detach() for name, score in self._scores.items()})
        masks.metadata.update(self._facts)
        return masks

    def remove(self) -> None:
        """Take the scores off the model; its weights are as they were, or as training left them."""
        for places in self.places.values():
            for number, place in enumerate(places):
                if parametrize.is_parametrized(*place):
                    _take_off(*place, number)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to one safetensors file, atomically."""
        save_tensors(path, self._scores, {"selection": self.selection.describe()}, format=FORMAT)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read scores that :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another file, the scores of another model, or of another rule.
        """
        tensors, info = load_tensors(path, format=FORMAT)
        if info["selection"] != self.selection.describe():
            raise ValueError(f"{path}: expected scores of the rule {self.selection.describe()}, got those of "
                             f"{info['selection']}")
        odd = sorted({n for n, t in tensors.items() if n not in self._scores or t.shape != self._scores[n].shape}
                     | (set(self._scores) - set(tensors)))
        if odd:
            raise ValueError(f"{path}: these scores are for another model: {odd[0]!r} is not in both, or of "
                             "another shape")
        with torch.no_grad():
            for name, score in self._scores.items():
                score.copy_(tensors[name])

    def __enter__(self) -> LearnedMasks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    @torch.compiler.disable
    def _mask(self, name: str) -> Tensor:
        """The mask of a weight; all are selected together, anew after each backward pass and each change of a score."""
        versions = [score._version for score in self._scores.values()]
        if self._masks is None or versions != self._versions:
            masks = self.selection.select({n: score.detach() for n, score in self._scores.items()})
            self._masks, self._versions = dict(masks), versions
        return self._masks[name]


class _Scores(nn.Module):
    """The parametrization: the weight where the mask keeps it, and 0."""

    def __init__(self, owner: LearnedMasks, name: str) -> None:
        super().__init__()
        self.scores = owner._scores[name]
        self.owner, self.name = owner, name
        self.orders: list[list[str]] = []
        self.handles: list[tuple[Any, ...]] = []

    def forward(self, weight: Tensor) -> Tensor:
        out: Tensor = _StraightThrough.apply(weight, self.scores, self.owner._mask(self.name), self.owner)
        return out


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
        zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
        own = torch.where(mask, gradient, zero) if ctx.needs_input_grad[0] else None
        return own, (gradient * weight).to(ctx.dtype) if ctx.needs_input_grad[1] else None, None, None


def _plain_names(attribute: str) -> Any:
    def add(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[prefix + attribute] = getattr(module, attribute).detach()

    return add


def _behind(attribute: str) -> Any:
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        plain = state.pop(prefix + attribute, None)
        if plain is not None:
            state.setdefault(f"{prefix}parametrizations.{attribute}.original", plain)

    return rename


def _take_off(module: nn.Module, attribute: str, number: int) -> None:
    stored = stored_parameter(module, attribute)
    part: Any = module.parametrizations[attribute][0]  # type: ignore[index, union-attr]
    for handle in part.handles[number]:
        handle.remove()
    # torch keeps the parametrized attribute in a class made for the module, which a deepcopy shares and removal edits
    shared: Any = type(module)
    own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    # the same object, so that ties and optimisers hold, and in its former place: optimiser states depend on the order
    rest: dict[str, Parameter | None] = {**module._parameters, attribute: stored}
    module._parameters.clear()
    order = part.orders[number]
    for name in [*(n for n in order if n in rest), *(n for n in rest if n not in order)]:
        module._parameters[name] = rest[name]
