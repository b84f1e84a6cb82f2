"""Which parameters of a model may be pruned, what they are called, and what was counted."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from looseleaf.errors import UnsupportedModelError, did_you_mean
from looseleaf.names import matches, near
from looseleaf.unwrap import unwrapped

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights of ``nn.MultiheadAttention``."""
_HEADS = ("lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "cls", "head",
          "predictions")
"""Names that output heads carry when they are direct children of the model (transformers, timm)."""
_BELOW_ADAPTERS = ("base_model", "model", "base_layer", "original_module")
"""Children of PEFT's modules that are, or lead to, the model's own layers; all others are adapters."""


def prunable_parameters(model: nn.Module, targets: str | Iterable[str] | None = None,
                        exclude: str | Iterable[str] | None = None) -> dict[str, Parameter]:
    """The weights that a pruner may touch, by their names in ``model.named_parameters()`` and in its order.

    By default these are the floating-point weights of every Linear and convolution (also transformers' ``Conv1D`` and
    the projections of ``nn.MultiheadAttention``) of the body: no biases, norms, embeddings, adapters (PEFT's, and what
    is named ``lora_...``), nor the output head (what ``get_output_embeddings`` gives, or a direct child called
    ``lm_head``, ``classifier``, ``score``, ``head`` and the like). A weight tied to an embedding counts as one; a
    shared weight appears once, under its first name. Under :class:`looseleaf.Masks` removed weights are 0.

    Args:
        model: any torch module, also one that PEFT, ``torch.compile`` or ``DataParallel`` has wrapped.
        targets: name patterns, as :mod:`looseleaf.names` has them. A pattern names a parameter (``"q_proj.weight"``), a
            layer (``"q_proj"``) or everything below a module (``"layers.*.mlp"``). With targets the output head can be
            chosen as well; an embedding or an adapter only by its exact name; another matrix, such as the stacked
            weights of experts, only by a pattern that spells out its last name (``"experts.down_proj"``).
        exclude: patterns of what to leave out; they win over ``targets``.

    Raises:
        ValueError: a pattern matches nothing (the message names near names), or nothing is left.
        UnsupportedModelError: the model has no Linear or convolution with floating-point weights in its body.

    Warns:
        UserWarning: without targets, when most of the model is neither (stacked experts) and so left out.
    """
    held = list(_held(model))
    names = [place.name for place in held]
    linear = {id(place.parameter) for place in held if _is_weight(place)}
    embeddings = {id(place.parameter) for place in held if isinstance(place.module, nn.Embedding)}
    layers: dict[str, Parameter] = {}
    apart: dict[str, Parameter] = {}  # embeddings and adapters
    others: dict[str, Parameter] = {}
    for found in _by_parameter(held):
        name, _, _, parameter, adapter = found[0]
        if not parameter.is_floating_point():
            continue
        if id(parameter) in embeddings or adapter:
            apart[name] = parameter
        elif id(parameter) in linear:
            layers[name] = parameter
        elif parameter.ndim > 1:
            others[name] = parameter

    def expected(field: str, pattern: str) -> ValueError:
        if odd := named_by(pattern, names):
            return ValueError(f"{field}={pattern!r}: expected a weight of a Linear or convolution, got "
                              f"{', '.join(odd[:3])}: biases and norms are never pruned, an embedding or an adapter "
                              "only by its exact name")
        known = [plain_name(name) for name in layers]
        known += dict.fromkeys(path for name in known for path in _paths(name))
        return ValueError(f"{field}={pattern!r} matches no parameter of {type(unwrapped(model)).__name__}. Near names "
                          f"are {', '.join(near(pattern, known))}")

    if targets is None:
        heads = _head_parameters(model)
        chosen = {name for name, parameter in layers.items() if id(parameter) not in heads}
        if not chosen:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no Linear or convolution with floating-point weights in its body: there "
                "is nothing to prune. Name the layers with targets=..., or give a model that is not quantised.")
        aside = sum(p.numel() for p in others.values())
        if aside > sum(layers[name].numel() for name in chosen):
            largest = max(others, key=lambda name: others[name].numel())
            warnings.warn(f"most weights of {type(model).__name__} are no Linear or convolution ({aside:,} in "
                          f"{len(others)} parameters such as {largest!r}) and are left out: name them with targets=("
                          f"'{'.'.join(largest.split('.')[-2:])}', ...) to prune them", stacklevel=2)
    else:
        chosen = set()
        for pattern in _patterns(targets, "targets"):
            hits = named_by(pattern, layers)
            hits += [name for name in apart if pattern in (name, name.rpartition(".")[0])]
            hits += [name for name in others
                     if matches(name, pattern) and pattern.rpartition(".")[2] == name.rpartition(".")[2]]
            if not hits:
                raise expected("targets", pattern)
            chosen.update(hits)
    for pattern in _patterns(exclude, "exclude"):
        # it may name what is left out anyway (such as lm_head), but not what does not exist
        hits = named_by(pattern, names)
        if not hits:
            raise expected("exclude", pattern)
        chosen.difference_update(hits)
    if not chosen:
        raise ValueError(f"exclude={exclude!r} leaves nothing to prune: give fewer or narrower patterns")
    everything = {**layers, **apart, **others}
    return {name: everything[name] for name in names if name in chosen}


def named_by(pattern: str, names: Iterable[str]) -> list[str]:
    """The parameter names that ``pattern`` names, or that lie below a module which it names; see
    :mod:`looseleaf.names`. Parts of a name that PEFT, ``torch.compile`` and ``DataParallel`` put in need not be
    spelled."""
    both = {name: {name, plain_name(name)} for name in names}
    exact = [name for name, forms in both.items() if any(f"{form}.".startswith(f"{pattern}.") for form in forms)]
    return exact or [name for name, forms in both.items()
                     if any(matches(path, pattern) for form in forms for path in _paths(form))]


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without wrappers: PEFT's, ``torch.compile``'s, ``DataParallel``'s."""
    name = re.sub(r"^((module|_orig_mod)\.)*(base_model\.model\.)?", "", name)
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer", "original_module"))


def input_dims(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The dimension of each named weight along which its inputs lie.

    1 for Linear (out, in) and convolutions (out, in, ...); 0 for transformers' ``Conv1D`` (in, out), transposed
    convolutions (in, out, ...) and embeddings. ValueError for a name that is no weight of ``model``.
    """
    parameters, known = {}, {}
    for found in _by_parameter(_held(model)):
        layer = next((place.module for place in found if _is_weight(place)), None)
        for place in found:
            parameters[place.name] = place.parameter
            if layer is not None:
                known[place.name] = int(not (_is_conv1d(layer) or isinstance(layer, (*_TRANSPOSED, nn.Embedding))))
    for name in names:
        if name not in known and name in parameters:
            raise ValueError(f"which dimension of {name!r} (shape {tuple(parameters[name].shape)}) holds the inputs is "
                             "not known: leave it out with exclude=, or give the rule its dims=")
        if name not in known:
            raise ValueError(f"expected a prunable weight of this {type(model).__name__}, got {name!r}."
                             f"{did_you_mean(name, known)}")
    return {name: known[name] for name in names}


def model_facts(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Which model masks belong to, and what was counted.

    ``model`` (class name), ``model_type`` (from its configuration, or None), ``parameters`` (all, tied ones once),
    ``prunable`` (elements of the named weights), ``prunable_share``, ``tensors`` (number of weights), ``left_out``
    (elements of the other matrices: embeddings, output head, and what is no Linear or convolution).
    """
    parameters = {name: parameter for name, _, _, parameter, _ in _held(model)}
    chosen = [parameters[name] for name in names]
    once = {id(p): p for p in parameters.values()}.values()
    total, prunable = sum(p.numel() for p in once), sum(p.numel() for p in chosen)
    return {"model": type(unwrapped(model)).__name__,
            "model_type": getattr(getattr(model, "config", None), "model_type", None),
            "parameters": total, "prunable": prunable, "prunable_share": prunable / (total or 1),
            "tensors": len(chosen), "left_out": sum(p.numel() for p in once if p.ndim > 1) - prunable}


def holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Canonical parameter name -> every (module, attribute) that holds the parameter; several where it is tied."""
    return {found[0].name: [(place.module, place.attribute) for place in found]
            for found in _by_parameter(_held(model))}


def stored_parameter(module: nn.Module, attribute: str) -> Parameter:
    """The parameter an optimiser sees: the one behind a parametrization where there is one."""
    return _own_parameters(module)[attribute]


def computed(module: nn.Module, attribute: str) -> bool:
    """Whether a weight is computed from its parameter each time: by a parametrization, or by learned masks."""
    return isinstance(getattr(type(module), attribute, None), property)


class Beside(nn.Module):
    """Base of modules that Looseleaf puts into a model: what they hold is not of the model."""


def check_finite(name: str, tensor: torch.Tensor, what: str, allow_infinite: bool = False) -> None:
    """Raise ValueError naming the parameter when ``tensor`` has NaN (or, unless allowed, infinite) entries."""
    if tensor.is_meta:
        raise ValueError(f"the {what} of {name!r} is on the meta device and has no values: load the model first")
    # a sum is NaN or infinite whenever an entry is, and needs no temporary of the tensor's size
    if torch.isfinite(tensor.sum(dtype=torch.float64)):
        return
    nans, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    if nans or (infinite and not allow_infinite):
        raise ValueError(f"the {what} of {name!r} has {nans} NaN and {infinite} infinite of {tensor.numel()} entries: "
                         f"expected {'numbers' if allow_infinite else 'finite numbers'}. Repair the model, or leave "
                         "this layer out with exclude=")


class _Place(NamedTuple):
    """Where a parameter is held; a tied one has several."""

    name: str
    module: nn.Module
    attribute: str
    parameter: Parameter
    adapter: bool


def _held(module: nn.Module, prefix: str = "", adapter: bool = False, seen: set[int] | None = None) -> Iterator[_Place]:
    """All parameters in the order of the model, under the names that they have without parametrizations."""
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, (parametrize.ParametrizationList, Beside)):
        return
    seen.add(id(module))
    peft = type(module).__module__.split(".")[0] == "peft"
    for name, parameter in _own_parameters(module).items():
        yield _Place(prefix + name, module, name, parameter, adapter or peft or name.startswith("lora_"))
    for name, child in module.named_children():
        below = adapter or name.startswith("lora_") or (peft and name not in _BELOW_ADAPTERS)
        yield from _held(child, f"{prefix}{name}.", below, seen)


def _by_parameter(held: Iterable[_Place]) -> Iterable[list[_Place]]:
    groups: dict[int, list[_Place]] = {}
    for place in held:
        groups.setdefault(id(place.parameter), []).append(place)
    return groups.values()


def _own_parameters(module: nn.Module) -> dict[str, Parameter]:
    """The module's own parameters by their plain names, parametrized ones included."""
    out = {k: p for k, p in module._parameters.items() if p is not None}
    if parametrize.is_parametrized(module):
        originals = {k: getattr(chain, "original", None)
                     for k, chain in module.parametrizations.items()}  # type: ignore[union-attr, operator]
        out.update((k, p) for k, p in originals.items() if isinstance(p, Parameter))
    return out


def _is_weight(place: _Place) -> bool:
    """Whether it is the weight of a Linear, convolution, attention projection or embedding."""
    if isinstance(place.module, nn.MultiheadAttention):
        return place.attribute in _PROJECTIONS
    layer = isinstance(place.module, (*_LAYERS, nn.Embedding)) or _is_conv1d(place.module)
    return layer and place.attribute == "weight"


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (a Linear with transposed weight), without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _head_parameters(model: nn.Module) -> set[int]:
    model = unwrapped(model)
    heads: list[Any] = [child for name, child in model.named_children() if name in _HEADS]
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):  # models without a head raise here
        heads.append(model.get_output_embeddings())  # type: ignore[operator]
    return {id(place.parameter) for head in heads if isinstance(head, nn.Module) for place in _held(head)}


def _patterns(given: str | Iterable[str] | None, field: str) -> tuple[str, ...]:
    patterns = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns) or (field == "targets" and not patterns):
        raise ValueError(f"{field}: expected None or name patterns such as 'layers.*.mlp', got {given!r}")
    return patterns


def _paths(name: str) -> list[str]:
    """A name and those of the modules above it."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
