"""Which parameters of a model may be pruned, what they are called, and what was counted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from looseleaf.errors import UnsupportedModelError, did_you_mean
from looseleaf.names import matches, near
from looseleaf.unwrap import unwrapped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_HEADS = frozenset({"lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "cls", "head",
                    "predictions"})
"""Names that output heads carry when they are direct children of the model (transformers, timm)."""
_BELOW_ADAPTERS = frozenset({"base_model", "model", "base_layer", "original_module"})
"""Children of PEFT's modules that are, or lead to, the model's own layers; all others are adapters."""


def prunable_parameters(model: nn.Module, targets: str | Iterable[str] | None = None,
                        exclude: str | Iterable[str] | None = None) -> dict[str, Parameter]:
    """The weights that a pruner may touch, in the order of the model.

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

    Returns:
        Parameter name, as in ``model.named_parameters()``, -> parameter.

    Raises:
        ValueError: a pattern matches nothing (the message names near names), or nothing is left.
        UnsupportedModelError: the model has no Linear or convolution with floating-point weights in its body.

    Warns:
        UserWarning: without targets, when most of the model is neither (stacked experts) and so left out.
    """
    wanted, unwanted = _patterns(targets, "targets"), _patterns(exclude, "exclude")
    heads = _head_parameters(model)
    linear = {id(parameter): module for _, module, parameter in _weights(model)}
    layers: dict[str, Parameter] = {}
    apart: dict[str, Parameter] = {}  # embeddings and adapters
    others: dict[str, Parameter] = {}
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in _own_parameters(m).values()}
    names: list[str] = []
    for name, parameter, adapter, first in _all_parameters(model):
        names.append(name)
        if not first or not parameter.is_floating_point():
            continue
        if id(parameter) in embeddings or adapter:
            apart[name] = parameter
        elif id(parameter) in linear:
            layers[name] = parameter
        elif parameter.ndim > 1:
            others[name] = parameter
    chosen = {name: p for name, p in layers.items() if id(p) not in heads}
    if wanted is None:
        if not chosen:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no Linear or convolution with floating-point weights in its body: there "
                "is nothing to prune. Name the layers with targets=..., or give a model that is not quantised.")
        aside = sum(p.numel() for p in others.values())
        if aside > sum(p.numel() for p in chosen.values()):
            largest = max(others, key=lambda name: others[name].numel())
            warnings.warn(f"most weights of {type(model).__name__} are no Linear or convolution ({aside:,} in "
                          f"{len(others)} parameters such as {largest!r}) and are left out: name them with targets=("
                          f"'{'.'.join(largest.split('.')[-2:])}', ...) to prune them", stacklevel=2)
    else:
        found: set[str] = set()
        for pattern in wanted:
            hits = named_by(pattern, layers)
            hits += [name for name in apart if pattern in (name, name.rpartition(".")[0])]
            hits += [name for name in others
                     if matches(name, pattern) and pattern.rpartition(".")[2] == name.rpartition(".")[2]]
            if not hits:
                raise ValueError(_unknown(model, "targets", pattern, layers, names))
            found.update(hits)
        everything = {**layers, **apart, **others}
        chosen = {name: everything[name] for name in names if name in found}
    for pattern in unwanted or ():
        # a pattern may name what is left out anyway (such as lm_head), but not what does not exist
        hits = named_by(pattern, names)
        if not hits:
            raise ValueError(_unknown(model, "exclude", pattern, layers, names))
        chosen = {name: p for name, p in chosen.items() if name not in hits}
    if not chosen:
        raise ValueError(f"exclude={list(unwanted or ())!r} leaves nothing to prune: give fewer or narrower patterns")
    return chosen


def named_by(pattern: str, names: Iterable[str]) -> list[str]:
    """The parameter names that ``pattern`` names, or that lie below a module which it names; see
    :mod:`looseleaf.names`. Parts of a name that PEFT, ``torch.compile`` and ``DataParallel`` put in need not be
    spelled."""
    plain = {name: plain_name(name) for name in names}
    exact = [n for n, p in plain.items() if any(f"{x}.".startswith(f"{pattern}.") for x in (n, p))]
    return exact or [n for n, p in plain.items() if any(
        matches(path, pattern) for x in {n, p} for path in _paths(x))]


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without wrappers: PEFT's, ``torch.compile``'s, ``DataParallel``'s."""
    name = re.sub(r"^((module|_orig_mod)\.)*(base_model\.model\.)?", "", name)
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer", "original_module"))


def input_dims(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The dimension of each named weight along which its inputs lie.

    1 for Linear (out, in) and convolutions (out, in, ...); 0 for transformers' ``Conv1D`` (in, out), transposed
    convolutions (in, out, ...) and embeddings. N:M patterns group along it.

    Raises:
        ValueError: a name that is no weight of ``model``.
    """
    modules = {id(parameter): module for _, module, parameter in reversed(list(_weights(model)))}
    parameters = {name: parameter for name, parameter, _, _ in _all_parameters(model)}
    known = {name: modules[id(p)] for name, p in parameters.items() if id(p) in modules}
    out = {}
    for name in names:
        if name not in known and name in parameters:
            raise ValueError(f"which dimension of {name!r} (shape {tuple(parameters[name].shape)}) holds the inputs is "
                             "not known: leave it out with exclude=, or give the rule its dims=")
        if name not in known:
            raise ValueError(f"expected a prunable weight of this {type(model).__name__}, got {name!r}."
                             f"{did_you_mean(name, known)}")
        module = known[name]
        out[name] = 0 if _is_conv1d(module) or isinstance(module, (*_TRANSPOSED, nn.Embedding)) else 1
    return out


def model_facts(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Facts that say which model masks belong to and what was counted.

    Returns:
        ``model`` (class name), ``model_type`` (from its configuration, or None), ``parameters`` (all, tied ones
        once), ``prunable`` (elements of the named weights), ``prunable_share``, ``tensors`` (number of weights),
        ``left_out`` (elements of the other matrices: embeddings, output head, and what is no Linear or convolution).
    """
    parameters = {name: parameter for name, parameter, _, _ in _all_parameters(model)}
    once = {id(p): p for p in parameters.values()}
    total = sum(p.numel() for p in once.values())
    names = list(names)
    prunable = sum(parameters[name].numel() for name in names)
    matrices = sum(p.numel() for p in once.values() if p.ndim > 1)
    return {"model": type(unwrapped(model)).__name__,
            "model_type": getattr(getattr(model, "config", None), "model_type", None),
            "parameters": total, "prunable": prunable, "prunable_share": prunable / total if total else 0.0,
            "tensors": len(names), "left_out": matrices - prunable}


def holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Canonical parameter name -> every (module, attribute) that holds the parameter; several where it is tied."""
    first: dict[int, str] = {}
    out: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module, _ in _modules(model):
        for attribute, parameter in _own_parameters(module).items():
            name = first.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
            out.setdefault(name, []).append((module, attribute))
    return out


def stored_parameter(module: nn.Module, attribute: str) -> Parameter:
    """The parameter an optimiser sees: the one behind a parametrization where there is one."""
    return _own_parameters(module)[attribute]


def _own_parameters(module: nn.Module) -> dict[str, Parameter]:
    """The module's own parameters by their plain names, parametrized ones included."""
    out = {k: p for k, p in module._parameters.items() if p is not None}
    if parametrize.is_parametrized(module):
        for attribute, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            original = getattr(chain, "original", None)
            if isinstance(original, Parameter):
                out[attribute] = original
    return out


def _modules(module: nn.Module, prefix: str = "", adapter: bool = False,
             seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether it is of an adapter), without the insides of parametrizations."""
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, parametrize.ParametrizationList):
        return
    seen.add(id(module))
    peft = type(module).__module__.split(".")[0] == "peft"
    yield prefix, module, adapter or peft
    for name, child in module.named_children():
        other = adapter or name.startswith("lora_") or (peft and name not in _BELOW_ADAPTERS)
        yield from _modules(child, f"{prefix}.{name}" if prefix else name, other, seen)


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, Parameter, bool, bool]]:
    """(name, parameter, whether it is of an adapter, whether it was not met before); tied ones have several names."""
    seen: set[int] = set()
    for prefix, module, adapter in _modules(model):
        for attribute, parameter in _own_parameters(module).items():
            yield (f"{prefix}.{attribute}" if prefix else attribute, parameter,
                   adapter or attribute.startswith("lora_"), id(parameter) not in seen)
            seen.add(id(parameter))


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Parameter]]:
    """(name, layer, weight) of every Linear, convolution, attention projection and embedding."""
    for prefix, module, _ in _modules(model):
        own = _own_parameters(module)
        attributes = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"] \
            if isinstance(module, nn.MultiheadAttention) else []
        if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED)) or _is_conv1d(module):
            attributes = ["weight"]
        for attribute in attributes:
            if attribute in own:
                yield (f"{prefix}.{attribute}" if prefix else attribute), module, own[attribute]


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (a Linear with transposed weight), without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _head_parameters(model: nn.Module) -> set[int]:
    model = unwrapped(model)
    modules: list[nn.Module] = [child for name, child in model.named_children() if name in _HEADS]
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        try:
            head = getter()
        except (AttributeError, NotImplementedError):  # models without a head raise here
            head = None
        if isinstance(head, nn.Module):
            modules.append(head)
    return {id(p) for module in modules for sub in module.modules() for p in _own_parameters(sub).values()}


def _patterns(given: str | Iterable[str] | None, field: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns) or (field == "targets" and not patterns):
        raise ValueError(f"{field}: expected None or name patterns such as 'layers.*.mlp', got {given!r}")
    return patterns or None


def _paths(name: str) -> list[str]:
    """A name and those of the modules above it."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _unknown(model: nn.Module, field: str, pattern: str, layers: Iterable[str], names: list[str]) -> str:
    others = named_by(pattern, names)
    if others:
        return (f"{field}={pattern!r}: expected a weight of a Linear or convolution, got {', '.join(others[:3])}: "
                "biases and norms are never pruned, an embedding or an adapter only by its exact name")
    plain = [plain_name(name) for name in layers]
    known = [*plain, *dict.fromkeys(path for name in plain for path in _paths(name))]
    return (f"{field}={pattern!r} matches no parameter of {type(unwrapped(model)).__name__}. Near names are "
            f"{', '.join(near(pattern, known))}")


def check_finite(name: str, tensor: torch.Tensor, what: str, allow_infinite: bool = False) -> None:
    """Raise ValueError naming the parameter when ``tensor`` has NaN (or, unless allowed, infinite) entries."""
    if tensor.is_meta:
        raise ValueError(f"the {what} of {name!r} is on the meta device and has no values: load the model first")
    # a sum is NaN or infinite whenever an entry is, and needs no temporary of the tensor's size
    if not tensor.numel() or bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        return
    nans = int(torch.isnan(tensor).sum())
    infinite = int(torch.isinf(tensor).sum())
    if nans or (infinite and not allow_infinite):
        raise ValueError(f"the {what} of {name!r} has {nans} NaN and {infinite} infinite of {tensor.numel()} entries: "
                         f"expected {'numbers' if allow_infinite else 'finite numbers'}. Repair the model, or leave "
                         "this layer out with exclude=")
