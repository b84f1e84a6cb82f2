"""Really removing what masks remove: smaller matrices, missing layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import Masks, UnsupportedModelError, unwrapped
from looseleaf.pruning.targets import plain_name
from looseleaf_unified_sparsity.components import (
    NAMES,
    Attention,
    Components,
    Mlp,
    Part,
    Phase,
    at,
    first_tensor,
    has_attention,
    head_dim,
    linear,
    weight_names,
)


class Nothing(nn.Module):
    """Stands where an MLP or an attention was, and adds nothing.

    Args:
        values: how many values the former module gave; those behind the first are None.
    """

    def __init__(self, values: int = 1) -> None:
        super().__init__()
        self.values = values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of the first tensor."""
        state = first_tensor(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))
        assert state is not None
        zeros = torch.zeros_like(state)
        return zeros if self.values == 1 else (zeros, *[None] * (self.values - 1))


class SkippedFor(nn.Module):
    """An attention of pairs that is not there for one component: its tokens get nothing from it, and leave no keys.

    Args:
        attention: goes on working for the other component.
        component: whose projections are gone.
        values: see :class:`Nothing`; the second is the cache.
        phase: of the arguments of the attention, see :class:`Calibration`.
    """

    def __init__(self, attention: nn.Module, component: str, values: int, phase: Phase) -> None:
        super().__init__()
        self.attention, self.component, self.values, self.phase = attention, component, values, phase

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention gives, or zeros."""
        found = self.phase({**self._bound(args, kwargs), "task": "generation"})
        if not isinstance(found, str) or found not in NAMES:
            raise ValueError(f"this attention was dropped for {self.component}: expected a call for one component at a "
                             "time, told by mode='und' or 'gen' or by shrink(..., phase=...), got "
                             f"{'one that does not say' if isinstance(found, str) else 'tokens of both'}")
        if found != self.component:
            return self.attention(*args, **kwargs)
        state = first_tensor(args[0] if args else next(iter(kwargs.values()), None))
        assert state is not None
        zeros = torch.zeros_like(state)
        return zeros if self.values == 1 else (zeros, kwargs.get("past_key_values"), *[None] * (self.values - 2))

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = inspect.signature(self.attention.forward).parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}


class _Gone(nn.Module):
    """In the place of a projection that nothing calls any more."""


def _by_mode(inputs: Mapping[str, Any]) -> str:
    return {"und": "understanding", "gen": "generation"}.get(inputs.get("mode", ""), "unknown")


def shrink(model: Any, *masks: Masks, layers: str | None = None, phase: Phase | None = None,
           attention_values: int = 2) -> Any:
    """Take what the masks of :class:`UnifiedSparsity` remove out of ``model``, in place, and return it.

    Neurons: rows and columns go, biases too. Heads: rows of q, k and v and columns of the output; in a model of pairs
    the heads of both components meet in one attention, so that there they stay as zeros (with a warning). An attention
    or MLP without any output is replaced by :class:`Nothing`; a layer without both is taken out, and the numbers that
    caches know attentions by close the gap. In pairs a dropped attention leaves no keys and values either, as in the
    paper: its layer may then be called for one component at a time.

    The outputs are those under the masks, but for that last case. Weights that stay keep their values and
    ``requires_grad``; an optimiser must be made anew. To load a shrunken model, load the dense one and shrink it with
    the saved masks.

    Args:
        model: the dense model that the masks are for, or one that carries them; for a pipeline, its part.
        masks: of several prunings, such as width and depth; none: those that are on the model.
        layers: see :meth:`Components.of`; as it was for the masks.
        phase: of the arguments of an attention, see :class:`Calibration`; only for pairs.
        attention_values: how many values the attentions of a model of pairs give.

    Raises:
        ValueError: no masks, masks for another model or of single weights, or a model with adapters.
        UnsupportedModelError: the parts to remove are not known by name.
    """
    components = Components.of(model, layers)
    if components.kind == "pipeline":
        raise ValueError("shrink: expected the part of the pipeline that the masks are for, such as "
                         "pipeline.transformer, got the pipeline")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("shrink: expected a model without adapters, got one with: merge them first "
                         "(merge_and_unload), or add them afterwards")
    on_model = Masks.of(model)
    masks = masks or ((on_model,) if on_model else ())
    if not masks:
        raise ValueError("shrink: expected masks, or a model that carries some, got neither: give what prune() "
                         "returned")
    kept = _Kept(model, masks)
    work = {part: name for name in NAMES for part in components.parts[name]}
    # all that could be wrong is found before anything is changed
    alive = {path: columns for part in work for path in part.outputs() if (columns := kept.columns(path)) is not None}
    for part in work:
        _check(model, part, alive)
    if on_model:
        on_model.remove(model, restore=False)
    for part, name in work.items():
        _shrink_part(model, name, part, alive, phase or _by_mode, attention_values)
    _close_gaps(model, components)
    return model


class _Kept:
    """What all the masks together keep, by path of a layer."""

    def __init__(self, model: nn.Module, masks: tuple[Masks, ...]) -> None:
        self.model, self.known = model, weight_names(model)
        self.masks: dict[str, Tensor] = {}
        for each in masks:
            each.places(model)  # raises where they are for another model
            for name in each:
                plain = plain_name(name)
                self.masks[plain] = each[name].cpu() & self.masks.get(plain, torch.ones((), dtype=torch.bool))

    def columns(self, path: str) -> Tensor | None:
        """Which inputs of a layer stay; None where no mask is about it."""
        layer = linear(self.model, path)
        mask = self.masks.get(plain_name(self.known[id(layer.weight)]))
        if mask is None:
            return None
        alive = mask.any(0)
        if not torch.equal(mask, alive.expand_as(mask)):
            raise ValueError(f"shrink: expected masks of whole units, got single weights removed in {path!r}: give "
                             "what UnifiedSparsity.prune returned")
        if not alive.any() and layer.bias is not None:
            bias = self.masks.get(plain_name(self.known[id(layer.bias)]))
            if bias is None or bias.any():
                raise ValueError(f"shrink: {path!r} has no inputs left, but a bias that stays: expected masks of "
                                 "what='depth', which remove both")
        return alive


def _gone(paths: Sequence[str], alive: Mapping[str, Tensor]) -> bool:
    return all(path in alive and not alive[path].any() for path in paths)


def _check(model: nn.Module, part: Part, alive: Mapping[str, Tensor]) -> None:
    """Raise for what cannot be taken out of a layer."""
    for mlp in part.mlps:
        if not mlp.inner and mlp.down in alive and not alive[mlp.down].all():
            raise UnsupportedModelError(f"{mlp.down}: expected neurons whose rows belong to it alone, got a shared "
                                        "weight: leave the masks on the model")
    a = part.attention
    if a is None or a.out[0] not in alive or alive[a.out[0]].all() or a.paired:
        return
    if not _gone(a.out, alive):
        _heads_left(model, a, alive[a.out[0]])
    elif not _gone(part.outputs("mlp"), alive):
        steps = part.layer.split(".")
        configs = [getattr(at(model, ".".join(steps[:n])), "config", None) for n in range(len(steps))]
        if any(len(set(getattr(config, "layer_types", None) or ())) > 1 for config in configs):
            raise UnsupportedModelError(f"{a.path}: expected attentions of one kind in all layers, got several: the "
                                        "cache would take one for another. Drop blocks, or leave the masks on")


def _shrink_part(model: nn.Module, name: str, part: Part, alive: Mapping[str, Tensor], phase: Phase,
                 values: int) -> None:
    for mlp in part.mlps:
        columns = alive.get(mlp.down)
        if columns is not None and not columns.any():
            replace_module(model, mlp.path, Nothing())
        elif columns is not None and not columns.all():
            _narrow(model, mlp, columns)
    a = part.attention
    if a is None:
        return
    first = alive.get(a.out[0])
    if _gone(a.out, alive):
        if a.paired:
            inner: Any = at(model, a.path)
            while isinstance(inner, SkippedFor):  # it was dropped for the other component before
                inner = inner.attention
            for path in (a.q, a.k, a.v, *a.out):
                replace_module(inner, path.removeprefix(f"{a.path}."), _Gone())
            replace_module(model, a.path, SkippedFor(at(model, a.path), name, values, phase))
        else:
            replace_module(model, a.path, Nothing(2))
    elif first is not None and not first.all() and a.paired:
        warnings.warn(f"{a.path}: heads of one component stay as zeros, since those of the other meet them in the same "
                      "attention", stacklevel=3)
    elif first is not None and not first.all():
        _remove_heads(model, a, first)


def _narrow(model: nn.Module, mlp: Mlp, alive: Tensor) -> None:
    index = alive.nonzero()[:, 0]
    rows = torch.cat([index, index + len(alive)]) if mlp.packed else index
    for path in mlp.inner:
        _select(linear(model, path), 0, rows)
    _select(linear(model, mlp.down), 1, index)
    module: Any = at(model, mlp.path)
    if isinstance(getattr(module, "intermediate_size", None), int):
        module.intermediate_size = len(index)


def _heads_left(model: nn.Module, a: Attention, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Which heads, and which heads of keys, are left with these inputs of the output projection."""
    size = head_dim(model, a)
    heads, keys = alive.view(-1, size).any(1), linear(model, a.k).out_features // size
    per_key = heads.view(keys, -1)
    if not (torch.equal(alive, heads.repeat_interleave(size)) and torch.equal(per_key.all(1), per_key.any(1))):
        raise ValueError(f"shrink: expected whole groups of heads that share a key, got others removed in {a.path!r}")
    return heads, per_key[:, 0]


def _remove_heads(model: nn.Module, a: Attention, alive: Tensor) -> None:
    size, module = head_dim(model, a), at(model, a.path)
    heads, left = _heads_left(model, a, alive)
    for path, stays in ((a.q, heads), (a.k, left), (a.v, left)):
        _select(linear(model, path), 0, stays.repeat_interleave(size).nonzero()[:, 0])
    _select(linear(model, a.out[0]), 1, alive.nonzero()[:, 0])
    counts = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": left}
    for attribute, stays in counts.items():
        if isinstance(getattr(module, attribute, None), int):
            setattr(module, attribute, int(stays.sum()))
    for norm, stays in (("q_norm", heads), ("k_norm", left)):
        for parameter, tensor in list(getattr(module, norm, nn.Identity())._parameters.items()):
            if tensor is not None and tensor.dim() == 2 and len(tensor) == len(stays):  # one for each head
                getattr(module, norm)._parameters[parameter] = _sliced(tensor, 0, stays.nonzero()[:, 0])


def _select(layer: nn.Linear, dim: int, index: Tensor) -> None:
    layer.weight = _sliced(layer.weight, dim, index)
    if dim == 0 and layer.bias is not None:
        layer.bias = _sliced(layer.bias, 0, index)
    layer.out_features, layer.in_features = layer.weight.shape


def _sliced(parameter: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    data = parameter.detach().index_select(dim, index.to(parameter.device)).clone()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, in the mode of the one that was there."""
    above, _, name = path.rpartition(".")
    parent: Any = at(model, above)
    module.train(getattr(parent, name).training)
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)


def _close_gaps(model: nn.Module, components: Components) -> None:
    """Take out layers that add nothing, and number the attentions that are left from 0, so that a cache has no gaps:
    its length is asked of attention 0."""
    parts = [part for part in components.parts["understanding"] if part.layer]
    bare = unwrapped(model)
    lists: dict[str, list[Part]] = {}
    for part in parts:
        above = part.layer.rpartition(".")[0]
        lists.setdefault(above, []).append(part)
    for above, members in lists.items():
        parent: Any = at(bare, above)
        if not isinstance(parent, nn.ModuleList):
            continue
        whole = [part for part in members if components.kind == "shared" and part.outputs() and all(
            _is_nothing(bare, path) for path in ([part.attention.path] if part.attention else [])
            + [mlp.path for mlp in part.mlps])]
        for part in reversed(whole):
            del parent[int(part.layer.rpartition(".")[2])]
        number = 0
        for layer in parent if components.kind == "shared" else ():
            owners: list[Any] = [m for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)]
            for owner in owners:
                owner.layer_idx = number
            number += has_attention(layer)
        if whole:
            _count_layers(bare, above, len(members), [members.index(part) for part in whole])


def _is_nothing(model: nn.Module, path: str) -> bool:
    return isinstance(at(model, path), Nothing)


def _count_layers(model: nn.Module, above: str, former: int, removed: list[int]) -> None:
    """Tell the configurations of the decoder, and of what holds it, how many layers there are."""
    seen: set[int] = set()
    steps = above.split(".")
    for n in range(len(steps)):
        config: Any = getattr(at(model, ".".join(steps[:n])), "config", None)
        for each in (config, getattr(config, "text_config", None)):
            if each is None or id(each) in seen or getattr(each, "num_hidden_layers", None) != former:
                continue
            seen.add(id(each))
            each.num_hidden_layers = former - len(removed)
            kinds = getattr(each, "layer_types", None)
            if isinstance(kinds, (list, tuple)) and len(kinds) == former:
                each.layer_types = [kind for n, kind in enumerate(kinds) if n not in removed]


def count_parameters(model: nn.Module) -> Mapping[str, int]:
    """``total`` weights of a model, and ``active``: those used for a token, experts that are not chosen left out."""
    total = sum(p.numel() for p in model.parameters())
    return {"total": total, "active": total - sum(getattr(m, "idle_parameters", 0) for m in model.modules())}
