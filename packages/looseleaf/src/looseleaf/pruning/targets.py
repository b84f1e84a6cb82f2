"""Which parameters of a model may be pruned, and what was counted."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from looseleaf.errors import UnsupportedModelError, did_you_mean

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_HEADS = frozenset({"lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "cls", "head",
                    "predictions"})
"""Names that output heads carry when they are direct children of the model (transformers, timm)."""


def prunable_parameters(model: nn.Module, targets: str | Iterable[str] | None = None,
                        exclude: str | Iterable[str] | None = None) -> dict[str, Parameter]:
    """The weights that a pruner may touch, in the order of the model.

    By default these are the floating-point weights of every Linear and convolution (also transformers' ``Conv1D`` and
    the projections of ``nn.MultiheadAttention``) of the body: no biases, norms, embeddings, nor the output head (what
    ``get_output_embeddings`` gives, or a direct child of the model called ``lm_head``, ``classifier``, ``score``,
    ``head`` and the like). A weight tied to an embedding counts as an embedding; a weight shared by several layers
    appears once, under its first name.
    A model that carries :class:`looseleaf.Masks` gives the same names, with the dense weights behind the masks.

    Args:
        model: any torch module.
        targets: shell-style patterns (``*`` also crosses dots). A pattern matches a parameter
            (``"*.q_proj.weight"``), a layer (``"*.q_proj"``) or everything below a module (``"model.layers.*.mlp"``).
            With targets the output head can be chosen as well; an embedding only by its exact name; another matrix,
            such as the stacked weights of experts, only by a pattern that spells out its last name
            (``"*.experts.down_proj"``).
        exclude: patterns of what to leave out; they win over ``targets``.

    Returns:
        Parameter name -> parameter.

    Raises:
        ValueError: a pattern matches nothing (the message names near names), or nothing is left.
        UnsupportedModelError: the model has no Linear or convolution with floating-point weights in its body.

    Warns:
        UserWarning: without targets, when most of the model is neither (stacked experts) and so left out.
    """
    wanted, unwanted = _patterns(targets, "targets"), _patterns(exclude, "exclude")
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding)
                  for p in _own_parameters(module).values()}
    heads = _head_parameters(model)
    linear = {id(parameter) for _, _, parameter in _weights(model)}
    layers: dict[str, Parameter] = {}
    lookup: dict[str, Parameter] = {}
    others: dict[str, Parameter] = {}
    seen: set[int] = set()
    for name, parameter in _all_parameters(model):
        if id(parameter) in seen or not parameter.is_floating_point():
            continue
        seen.add(id(parameter))
        if id(parameter) in embeddings:
            lookup[name] = parameter
        elif id(parameter) in linear:
            layers[name] = parameter
        elif parameter.ndim > 1:
            others[name] = parameter
    chosen: dict[str, Parameter] = {}
    if wanted is None:
        chosen = {name: p for name, p in layers.items() if id(p) not in heads}
        if not chosen:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no Linear or convolution with floating-point weights in its body: there "
                "is nothing to prune. Name the layers with targets=..., or give a model that is not quantised.")
        aside = sum(p.numel() for p in others.values())
        if aside > sum(p.numel() for p in chosen.values()):
            largest = max(others, key=lambda name: others[name].numel())
            warnings.warn(f"most weights of {_plain_class(model)} are no Linear or convolution ({aside:,} in "
                          f"{len(others)} parameters such as {largest!r}) and are left out: name them with targets=('*."
                          f"{'.'.join(largest.split('.')[-2:])}', ...) to prune them", stacklevel=2)
    else:
        found: set[str] = set()
        for pattern in wanted:
            hits = [name for name in layers if _matches(name, pattern)]
            hits += [name for name in lookup if pattern in (name, name.rpartition(".")[0])]
            hits += [name for name in others
                     if fnmatchcase(name, pattern) and pattern.rpartition(".")[2] == name.rpartition(".")[2]]
            if not hits:
                raise ValueError(_unknown(model, "targets", pattern, layers))
            found.update(hits)
        everything = {**layers, **lookup, **others}
        chosen = {name: everything[name] for name, _ in _all_parameters(model) if name in found}
    if unwanted is not None:
        # a pattern may name what is left out anyway (such as lm_head), but not what does not exist
        names = [name for name, _ in _all_parameters(model)]
        for pattern in unwanted:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(_unknown(model, "exclude", pattern, layers))
        chosen = {name: p for name, p in chosen.items() if not any(_matches(name, u) for u in unwanted)}
        if not chosen:
            raise ValueError(f"exclude={list(unwanted)!r} leaves nothing to prune: give fewer or narrower patterns")
    return chosen


def input_dims(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The dimension of each named weight along which its inputs lie.

    1 for Linear (out, in) and convolutions (out, in, ...); 0 for transformers' ``Conv1D`` (in, out), transposed
    convolutions (in, out, ...) and embeddings. N:M patterns group along it.

    Raises:
        ValueError: a name that is no weight of ``model``.
    """
    modules = {id(parameter): module for _, module, parameter in reversed(list(_weights(model)))}
    parameters = dict(_all_parameters(model))
    known = {name: modules[id(p)] for name, p in parameters.items() if id(p) in modules}
    out = {}
    for name in names:
        if name not in known and name in parameters:
            raise ValueError(f"which dimension of {name!r} (shape {tuple(parameters[name].shape)}) holds the inputs is "
                             "not known: leave it out with exclude=, or give NM its dims=")
        if name not in known:
            raise ValueError(f"{name!r} is no prunable weight of this {type(model).__name__}."
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
    parameters = dict(_all_parameters(model))
    once = {id(p): p for p in parameters.values()}
    total = sum(p.numel() for p in once.values())
    names = list(names)
    prunable = sum(parameters[name].numel() for name in names)
    matrices = sum(p.numel() for p in once.values() if p.ndim > 1)
    return {"model": _plain_class(model), "model_type": getattr(getattr(model, "config", None), "model_type", None),
            "parameters": total, "prunable": prunable, "prunable_share": prunable / total if total else 0.0,
            "tensors": len(names), "left_out": matrices - prunable}


def holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Canonical parameter name -> every (module, attribute) that holds the parameter; several where it is tied."""
    first: dict[int, str] = {}
    out: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
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


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Every parameter under every plain name, tied ones several times."""
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for attribute, parameter in _own_parameters(module).items():
            yield (f"{prefix}.{attribute}" if prefix else attribute), parameter


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Parameter]]:
    """(name, layer, weight) of every Linear, convolution, attention projection and embedding."""
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            own = _own_parameters(module)
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if attribute in own:
                    yield (f"{prefix}.{attribute}" if prefix else attribute), module, own[attribute]
        if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED)) or _is_conv1d(module):
            parameter = _own_parameters(module).get("weight")
            if parameter is not None:
                yield (f"{prefix}.weight" if prefix else "weight"), module, parameter


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (a Linear with transposed weight), without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _head_parameters(model: nn.Module) -> set[int]:
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
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{field}={given!r}: allowed are patterns such as 'model.layers.*.mlp'")
    if field == "targets" and not patterns:
        raise ValueError("targets=(): allowed is None (all of the body) or at least one pattern")
    return patterns or None


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _unknown(model: nn.Module, field: str, pattern: str, layers: dict[str, Parameter]) -> str:
    others = [name for name, _ in _all_parameters(model) if _matches(name, pattern)]
    if others:
        return (f"{field}={pattern!r} matches only what is no Linear or convolution weight ({', '.join(others[:3])}): "
                "biases and norms are never pruned, an embedding only by its exact name")
    paths = list(layers)
    paths += list(dict.fromkeys(".".join(name.split(".")[:n])
                                for name in layers for n in range(1, name.count(".") + 1)))
    hint = did_you_mean(pattern.strip("*."), paths)
    if not hint:  # the last words of the names are what people remember
        words = {word: name for name in layers for word in name.split(".")}
        asked = [word for word in pattern.replace("*", "").split(".") if word]
        close = [match for word in asked for match in difflib.get_close_matches(word, words, n=1, cutoff=0.5)]
        hint = f" Did you mean {' or '.join(repr('*.' + c) for c in dict.fromkeys(close))}?" if close else ""
    examples = ", ".join(list(layers)[:3])
    return f"{field}={pattern!r} matches no parameter of {_plain_class(model)} (it has {examples}, ...).{hint}"


def _plain_class(model: nn.Module) -> str:
    cls = type(model)
    return cls.__mro__[1].__name__ if cls.__name__.startswith("Parametrized") else cls.__name__


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
                         "allowed are numbers. Repair the model, or leave this layer out with exclude=")
