"""Attaching to transformers models, through ``AttentionInterface`` and ``AttentionMaskInterface``.

The mask function registered here returns a description instead of an L x L tensor; the attention function reads from
it what a backend needs: causality and lengths, with padding moved to the end.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.attention.attached import Attached, Place, moved_context, place_of, shifted
from looseleaf.attention.call import SCORE_CHANGES, AttentionCall, Phase
from looseleaf.attention.dense import LazyMask
from looseleaf.attention.watch import CROSS, note_cross, plain_class, watch

_numbers = itertools.count()
UNKNOWN = ("sinks", "indices", "block_indices", "head_mask", "relative_position_bias", "cache")
"""Arguments of transformers attention functions that no backend is given: a layer that passes one stays as it was."""


class _Name(str):
    """The name of an attached backend in a model's configuration; copies and files have the model's own again.

    Models that look at the name to see which kind of mask they have find what they had.
    """

    original = "sdpa"

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (other in ("sdpa", "eager") and other == self.original)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __reduce__(self) -> Any:
        return str, (self.original,)


def attention_layers(model: Any) -> dict[str, nn.Module] | None:
    """The attention modules by name, in the model's order; None if this model does not use ``AttentionInterface``."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) \
            or not model._can_set_attn_implementation():
        return None
    modules = dict(model.named_modules())
    found = {name: m for name, m in modules.items() if "ALL_ATTENTION_FUNCTIONS" in _names_in_forward(m)}
    if not found:  # code of somebody's own, that calls the interface in a way we do not see
        found = {name: m for name, m in modules.items() if "Attention" in type(m).__name__ and not any(
            "Attention" in type(child).__name__ for child in list(m.modules())[1:])}
    return found or None


def is_named(modules: Iterable[nn.Module]) -> bool:
    """Whether a backend is attached to some model with the configuration of these modules."""
    configs = (getattr(module, "config", None) for module in modules)
    return any(isinstance(getattr(config, "_attn_implementation", None), _Name) for config in configs)


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    """The names that the forward of a module's class looks up, inside its decorators."""
    code: Any = getattr(inspect.unwrap(plain_class(module).forward), "__code__", None)
    return code.co_names if code else ()


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and its parts."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            waiting.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return list(found.values())


def install(model: Any, modules: Mapping[str, nn.Module], attached: Attached, undo: ExitStack) -> None:
    """Register private functions and set them on this model only."""
    name = f"looseleaf_attached_{next(_numbers)}"
    for layer, module in enumerate(modules.values()):
        watch(module, note_cross, (attached, layer), undo)
    register(name, place_of, undo)
    former = [(config, config._attn_implementation_internal) for config in _configs(model)]
    for config, implementation in former:
        undo.callback(setattr, config, "_attn_implementation_internal", implementation)
    model.set_attn_implementation(name)
    for config, implementation in former:
        if config._attn_implementation_internal == name:
            config._attn_implementation_internal = ours = _Name(name)
            ours.original = str(getattr(implementation, "original", implementation) or "sdpa")


def register(name: str, find: Callable[[nn.Module], Place | None], undo: ExitStack) -> None:
    """Make attention under ``name`` known to transformers; ``find`` gives the place of a module."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    function = functools.partial(_attention, find)
    for interface, value in ((AttentionInterface, function), (AttentionMaskInterface, describe)):
        interface.register(name, value)
        undo.callback(interface._global_mapping.pop, name, None)


# ---------------------------------------------------------------------- masks
class MaskDescription(Tensor):
    """What transformers says about a mask; where a model calculates with it, it is the mask, of size L x L."""

    given: dict[str, Any]
    plan: Callable[[int, int, bool], _Plan]
    made: Any = None
    lent: bool = False
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, given: dict[str, Any]) -> MaskDescription:
        shape = (given["batch_size"], 1, given["q_length"], given["kv_length"])
        dtype = given["dtype"] if given["original"] == "eager" else torch.bool
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made = make(cls, shape, dtype=dtype, device=given["device"])
        made.given, made.plan = given, functools.cache(functools.partial(_plan, given))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        kwargs = kwargs or {}
        same = bool(args) and isinstance(args[0], cls) and not args[0].written()
        if same and func is torch.ops.aten.detach.default:  # by gradient checkpointing
            return cls(args[0].given)
        if same and func is torch.ops.aten._to_copy.default and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
            device = str(kwargs["device"])  # by accelerate, between layers
            given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in args[0].given.items()}
            return cls({**given, "device": device})
        for mask in (x for x in args if isinstance(x, cls)):  # what shares its memory may be written to
            mask.lent = mask.lent or any(result.alias_info for result in func._schema.returns)
        # Added to scores it is what the eager implementation adds, whatever the model is set to.
        kind = "eager" if func is torch.ops.aten.add.Tensor and isinstance(args[1], cls) and (
            args[0].is_floating_point() > args[1].is_floating_point()) else None
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda mask: mask.tensor(kind), (args, kwargs))
        return func(*args, **kwargs)

    def tensor(self, kind: str | None = None) -> Tensor:
        """The mask as the model's own implementation has it, (B, 1, Lq, Lk): bool for sdpa, additive for eager."""
        if self.made is None and kind is None:
            self.made = _mask(self.given, self.given["original"])
        return self.made if kind is None else _mask(self.given, kind)

    def written(self) -> bool:
        """Whether the model wrote to the mask, so that :attr:`made` alone is the mask."""
        return self.lent and not torch.equal(self.tensor(), self.tensor(self.given["original"]))


def _mask(given: Mapping[str, Any], kind: str) -> Any:
    from transformers import masking_utils

    make: Any = masking_utils.eager_mask if kind == "eager" else masking_utils.sdpa_mask
    return make(**given)


@torch.compiler.disable
def describe(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, *, config: Any = None,
             **given: Any) -> MaskDescription | None:
    """The mask function registered with transformers, called as ``sdpa_mask``; None where the model would have none."""
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in this very tensor before attention is computed
    original = getattr(getattr(config, "_attn_implementation", None), "original", None)
    given = {"kv_offset": 0, "attention_mask": None, "local_size": None, "device": "cpu", "dtype": torch.float32,
             **given, "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    # A small pattern tells. Without a mask is_causal decides, which is not always set in models that are eager alone.
    if original not in (None, "eager") and given["local_size"] is None and _mask(
            {**given, "mask_function": lambda batch, *_: batch >= 0, "use_vmap": False}, "sdpa") is None:
        return None
    return MaskDescription({**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False,
                            "original": original or "sdpa"})


@dataclasses.dataclass
class _Plan:
    """How the tensors of a call get the layout that backends expect; ``offset``: keys before the first query."""

    is_causal: bool
    keys: int
    offset: int
    query_shift: list[int] | None = None
    key_shift: list[int] | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    mask: Tensor | LazyMask | None = None


def _plan(given: Mapping[str, Any], lq: int, lk: int, queries_follow: bool) -> _Plan:
    """The plan for a mask that transformers describes; made once for all layers."""
    from transformers import masking_utils

    function, local, padding = given["mask_function"], given["local_size"], given["attention_mask"]
    causal = function is masking_utils.causal_mask_function
    offset = int(given["q_offset"]) - int(given["kv_offset"])
    # A function made by or_mask adds to what a window shows, so that the window bounds nothing.
    bounded = local is not None and "or_mask" not in getattr(function, "__qualname__", "")

    def rows(start: int, stop: int) -> Tensor:
        some = {**given, "q_offset": int(given["q_offset"]) + start, "q_length": stop - start}
        return _mask(some, "sdpa")[..., :lk]

    def first_key(row: int) -> int:
        return max(0, min(lk - 1, row + offset - local)) if bounded else 0

    general = _Plan(False, lk, offset, mask=LazyMask(rows, lq, first_key))
    if not (causal or function is masking_utils.bidirectional_mask_function) or local is not None \
            or int(given["kv_offset"]) or (padding is not None and padding.dim() != 2):
        return general
    # In a static cache there are keys beyond the last query that nobody wrote yet.
    keys = min(lk, offset + lq) if causal else lk
    plan = _Plan(causal, keys, offset)
    if padding is None:
        return plan
    valid = nn.functional.pad(padding.bool()[:, :keys], (0, max(0, keys - padding.shape[1])))
    if bool(valid.all()):
        return plan
    plan.key_shift, plan.key_lengths = _padding(valid)
    # Holes in the middle are neither left nor right padding.
    whole = torch.arange(keys, device=valid.device) < plan.key_lengths[:, None]
    if not torch.equal(shifted(valid, plan.key_shift, 0), whole):
        return general
    if queries_follow:
        queries = valid[:, keys - lq:] if causal else valid
        if queries.shape[1] != lq:
            return general
        plan.query_shift, plan.query_lengths = _padding(queries)
    return plan


def _padding(valid: Tensor) -> tuple[list[int] | None, Tensor]:
    """At which row each item begins, None where all begin at 0, and the number of its rows."""
    first = valid.int().argmax(1).tolist()
    return first if any(first) else None, valid.sum(1)


# ---------------------------------------------------------------------- calls
@torch.compiler.disable
def _attention(find: Callable[[nn.Module], Place | None], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Any, scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
               **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D) to (B, Lq, Hq, D), no weights."""
    attached, layer = find(module) or (None, 0)
    if attached is not None and layer not in attached.chosen:
        attached = None
    changes = {name: kwargs[name] for name in SCORE_CHANGES if kwargs.get(name) is not None}
    if dropout:
        changes["dropout"] = dropout
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    unknown += [name for name in changes if attached is None or name not in attached.backend.score_changes]
    if isinstance(attention_mask, MaskDescription) and attention_mask.written():
        attention_mask = attention_mask.made
    own = functools.partial(_model_attention, module, query, key, value, attention_mask, is_causal, scaling=scaling,
                            dropout=dropout, **kwargs)
    decoder = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    cross = bool(module.__dict__.get(CROSS, False))
    batch, lq, lk = max(query.shape[0], key.shape[0]), query.shape[2], key.shape[2]
    square = attention_mask is None and decoder and lq > 1  # what transformers does without a mask
    reasons = {"dropout in training": unknown == ["dropout"], f"scores changed by {', '.join(unknown)}": unknown,
               "keys that the mask does not know": isinstance(attention_mask, MaskDescription)
               and lk != attention_mask.given["kv_length"],
               "a causal mask of keys that are not the queries'": square and (cross or lk < lq),
               "attention weights are asked for": _weights_wanted(module, kwargs)}
    reason = next((name for name, holds in reasons.items() if holds), None)
    if not attached.was_there() if attached is not None else reason:
        return own()
    if attached is not None and reason:
        return attached.exactly(layer, _phase(decoder and not cross, lq, lk - lq, attached), reason, query.device, own)
    # One sequence of keys for all items, or one of queries, as torch allows it.
    query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if isinstance(attention_mask, MaskDescription):
        plan = attention_mask.plan(lq, lk, not cross)
        causal = plan.is_causal or (plan.mask is not None and decoder and not cross)
    else:
        plan = _Plan(True, lq, 0) if square else _Plan(False, lk, lk - lq, mask=attention_mask)
        causal = decoder and not cross
    if (bias := changes.get("position_bias")) is not None:
        changes["position_bias"] = shifted(shifted(bias[..., :plan.keys], plan.query_shift, 1), plan.key_shift, 2)
    key, value = (shifted(x[:, :, :plan.keys], plan.key_shift, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(
        shifted(query, plan.query_shift, 1), key, value, scale, plan.is_causal, plan.query_lengths, plan.key_lengths,
        plan.mask, phase=_phase(causal, lq, plan.offset, attached), is_cross=cross, module=module,
        score_changes=changes)
    if attached is None or (kwargs.get("sliding_window") is not None and isinstance(plan.mask, LazyMask)):
        result = call.dense()
    else:
        call.context = moved_context(attached.context, batch, lq, plan.keys, plan.query_shift, plan.key_shift)
        result = attached.compute(call, layer)
    back = None if plan.query_shift is None else [-shift for shift in plan.query_shift]
    return shifted(result, back, 1).transpose(1, 2).contiguous(), None


def _original(module: nn.Module) -> str:
    """The name of the attention that a module had before."""
    return getattr(getattr(getattr(module, "config", None), "_attn_implementation", None), "original", "sdpa")


def _model_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                     is_causal: bool | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, with the mask it would have had."""
    from transformers import AttentionInterface

    original = _original(module)
    home = vars(sys.modules[type(module).__module__])
    function: Any = next((home[name] for name in _names_in_forward(module) if "eager" in name and name in home), None)
    only_eager = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "sinks"))
    kind = "eager" if function is not None and (only_eager or original == "eager") else "sdpa"
    if kind == "sdpa":
        function = home.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())["sdpa"]
        kwargs["is_causal"] = is_causal
    if isinstance(mask, MaskDescription):
        mask = mask.tensor(kind)
    elif kind == "eager" and mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    return function(module, query, key, value, mask, **kwargs)


def _weights_wanted(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller wants attention weights and the model's own implementation would give them."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    names = {**(collector.get() or {}), **kwargs} if collector else kwargs
    return _original(module) == "eager" and any(
        "attentions" in name and names[name] not in (None, False) for name in names)


def _phase(causal: bool, lq: int, offset: int, attached: Attached | None) -> Phase:
    if not causal:
        return "bidirectional"
    drafts = offset > 0 and not (attached and attached.chunked_prefill)
    return "decode" if lq == 1 or drafts else "prefill"
