"""Attaching to transformers models, through ``AttentionInterface`` and ``AttentionMaskInterface``.

The mask function registered here returns a description instead of an L x L tensor; the attention function reads from
it what a backend needs: causality and lengths, with padding moved to the end.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.attention.attached import Attached, moved_context, shifted
from looseleaf.attention.call import SCORE_CHANGES, AttentionCall, Phase
from looseleaf.attention.mask import LazyMask
from looseleaf.attention.watch import CROSS, PLACE, note_cross, watch
from looseleaf.errors import UnsupportedModelError

_numbers = itertools.count()
PLAIN = ("sdpa", "eager")
"""Implementations with masks that are tensors of all scores."""
UNKNOWN = ("sinks", "indices", "block_indices", "head_mask", "relative_position_bias", "cache")
"""Arguments of transformers attention functions that no backend is given: a layer that passes one stays as it was."""


class _Name(str):
    """The name of an attached backend in a model's configuration.

    A copy of the configuration, in memory or in a file, has the model's own implementation again, because the backend
    may be gone by then. Models that look at the name to see which kind of mask they have find what they had.
    """

    original: str
    tensors: bool

    def __new__(cls, name: str, original: str, tensors: bool) -> _Name:
        made = super().__new__(cls, name)
        made.original, made.tensors = original, tensors
        return made

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (other in PLAIN and other == self.original)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __deepcopy__(self, memo: Any) -> str:
        return self.original

    def __reduce__(self) -> Any:
        return str, (self.original,)


def attention_layers(model: Any) -> dict[str, nn.Module] | None:
    """The attention modules by name, in the model's order; None if this model does not use ``AttentionInterface``.

    Raises:
        UnsupportedModelError: a model that shares its configuration has a backend attached.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    if not model._can_set_attn_implementation():
        return None
    modules = dict(model.named_modules())
    found = {name: m for name, m in modules.items() if _uses_interface(m)}
    if not found:  # code of somebody's own, that calls the interface in a way we do not see
        found = {name: m for name, m in modules.items() if "Attention" in type(m).__name__ and not any(
            "Attention" in type(child).__name__ for child in list(m.modules())[1:])}
    if any(isinstance(config._attn_implementation, _Name) for config in _configs(model)):
        raise UnsupportedModelError(f"expected a model without a backend, got {type(model).__name__} with one attached "
                                    "already: detach that one first (attached.detach(), or leave its with-block)")
    return found or None


def _uses_interface(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in getattr(_forward(module), "__code__", _uses_interface.__code__).co_names


def _forward(module: nn.Module) -> Any:
    """The function that a module's class has for its forward, without decorators."""
    return inspect.unwrap(getattr(type(module), "_looseleaf_plain", type(module)).forward)


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
    former = [(config, config._attn_implementation_internal) for config in _configs(model)]
    name = f"looseleaf_attached_{next(_numbers)}"
    for layer, module in enumerate(modules.values()):
        watch(module, note_cross, (attached, layer), undo)
    register(name, Function(), undo)

    def restore() -> None:
        for config, implementation in former:
            config._attn_implementation_internal = implementation

    undo.callback(restore)
    model.set_attn_implementation(name)
    # Modules that add keys of their own extend a mask only if it is a tensor.
    tensors = any({"isinstance", "Tensor"} <= set(_forward(module).__code__.co_names) for module in modules.values())
    for config, implementation in former:
        if config._attn_implementation_internal == name:
            original = str(getattr(implementation, "original", implementation) or "sdpa")
            config._attn_implementation_internal = _Name(name, original, tensors)


def register(name: str, function: Any, undo: ExitStack) -> None:
    """Make an attention function known to transformers, with our mask function."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for interface, value in ((AttentionInterface, function), (AttentionMaskInterface, describe)):
        interface.register(name, value)
        undo.callback(interface._global_mapping.pop, name, None)


# ---------------------------------------------------------------------- masks
class MaskDescription:
    """What transformers says about a mask, before anything of size L x L exists.

    Models hand it from the mask function to the attention function. A model that looks inside, calculates with it or
    gives it to a function of torch gets the tensor that it would have had.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = {**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        self._plans: dict[tuple[int, int, bool], _Plan] = {}

    def contiguous(self) -> MaskDescription:
        """Itself; `generate` with a static cache asks for it."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The same on another device, as accelerate asks for it between layers; with a dtype, the tensor."""
        device = kwargs.get("device", args[0] if args else None)
        if not isinstance(device, (str, int, torch.device)) or kwargs.get("dtype") or len(args) > 1:
            return self.tensor().to(*args, **kwargs)
        if torch.device(device) == torch.device(self.given["device"]):
            return self
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.given.items()}
        return MaskDescription({**moved, "device": device})

    def tensor(self, kind: str | None = None) -> Tensor:
        """The mask as the model's own implementation has it, (B, 1, Lq, Lk): bool for sdpa, additive for eager."""
        from transformers import masking_utils

        make: Any = getattr(masking_utils, "eager_mask" if (kind or self.given["original"]) == "eager" else "sdpa_mask")
        return make(**self.given)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the boolean mask."""
        from transformers import masking_utils

        make: Any = masking_utils.sdpa_mask
        return make(**{**self.given, "q_offset": int(self.given["q_offset"]) + start, "q_length": stop - start})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "given":
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda x: x.tensor() if isinstance(x, MaskDescription) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def plan(self, lq: int, lk: int, queries_follow: bool) -> _Plan:
        """How to bring the tensors of a call to the layout that backends expect; made once for all layers."""
        key = (lq, lk, queries_follow)
        if key not in self._plans:
            self._plans[key] = _plan(self, lq, lk, queries_follow)
        return self._plans[key]


def _on_tensor(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    if swapped:
        return lambda self, other: function(other, self.tensor())
    return lambda self, *others: function(self.tensor(), *others)


for _name in ("add", "sub", "mul", "truediv", "and", "or", "xor"):
    _operation = getattr(operator, f"__{_name}__")
    setattr(MaskDescription, f"__{_name}__", _on_tensor(_operation))
    setattr(MaskDescription, f"__r{_name}__", _on_tensor(_operation, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "invert", "neg", "getitem"):
    setattr(MaskDescription, f"__{_name}__", _on_tensor(getattr(operator, f"__{_name}__")))
MaskDescription.__hash__ = object.__hash__  # type: ignore[method-assign]


@torch.compiler.disable
def describe(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
             mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None,
             local_size: int | None = None, use_vmap: bool = False, device: Any = "cpu", dtype: Any = torch.float32,
             config: Any = None, **kwargs: Any) -> MaskDescription | Tensor:
    """The mask function registered with transformers; arguments as in ``transformers.masking_utils.sdpa_mask``."""
    if isinstance(attention_mask, MaskDescription):
        return attention_mask  # `generate` with a static cache makes the masks before the model would
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in this very tensor before attention is computed
    name = getattr(config, "_attn_implementation", None)
    made = MaskDescription({
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask,
        "local_size": local_size, "use_vmap": use_vmap, "device": device, "dtype": dtype,
        "original": getattr(name, "original", "sdpa")})
    return made.tensor() if getattr(name, "tensors", False) else made


@dataclasses.dataclass
class _Plan:
    """Slices and shifts of one kind of call; ``offset``: keys before the first query."""

    is_causal: bool
    keys: int
    offset: int
    query_shift: list[int] | None = None
    key_shift: list[int] | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    mask: Any = None


def _plan(description: MaskDescription, lq: int, lk: int, queries_follow: bool) -> _Plan:
    from transformers import masking_utils

    given = description.given
    function, local = given["mask_function"], given["local_size"]
    causal = function is masking_utils.causal_mask_function
    padding = given["attention_mask"]
    offset = int(given["q_offset"]) - int(given["kv_offset"])
    plain = (causal or function is masking_utils.bidirectional_mask_function) and local is None \
        and (padding is None or padding.dim() == 2)
    general = _Plan(False, lk, offset, mask=LazyMask(
        lambda start, stop: description.rows(start, stop)[..., :lk], lq,
        (lambda row: max(0, min(lk - 1, row + offset - local))) if local is not None and not _or(function) else None))
    if not plain or (local is None and int(given["kv_offset"]) != 0):
        return general
    # In a static cache there are keys beyond the last query that nobody wrote yet.
    keys = min(lk, offset + lq) if causal else lk
    if padding is None:
        return _Plan(causal, keys, offset)
    valid = padding.bool()[:, :keys]
    if valid.shape[1] < keys:
        valid = torch.nn.functional.pad(valid, (0, keys - valid.shape[1]))
    if bool(valid.all()):
        return _Plan(causal, keys, offset)
    count = valid.sum(1)
    first = valid.int().argmax(1)
    run = torch.arange(keys, device=valid.device)
    if not bool((valid == ((run >= first[:, None]) & (run < (first + count)[:, None]))).all()):
        return general  # holes in the middle: neither left nor right padding
    shift = first.tolist() if bool(first.any()) else None
    if not queries_follow:
        return _Plan(causal, keys, offset, None, shift, None, count)
    queries = valid[:, keys - lq:] if causal else valid
    if queries.shape[1] != lq:
        return general
    first_query = queries.int().argmax(1)
    query_shift = first_query.tolist() if bool(first_query.any()) else None
    return _Plan(causal, keys, offset, query_shift, shift, queries.sum(1), count)


def _or(function: Any) -> bool:
    """Whether a mask function adds to what a window shows, so that its window bounds nothing."""
    return "or_mask" in getattr(function, "__qualname__", "")


# ---------------------------------------------------------------------- calls
class Function:
    """The attention function registered with transformers."""

    def place(self, module: nn.Module) -> tuple[Attached, int] | None:
        """Whose call a module's is, and which layer it is; None for modules of no attached model."""
        found: tuple[Attached, int] | None = module.__dict__.get(PLACE)
        return found

    @torch.compiler.disable
    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                 scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
                 **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D); gives (B, Lq, Hq, D) and no weights."""
        place = self.place(module)
        scores = {name: kwargs[name] for name in SCORE_CHANGES if kwargs.get(name) is not None}
        if dropout:
            scores["dropout"] = dropout
        unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
        if place is not None and place[1] in place[0].chosen:
            unknown += [name for name in scores if name not in place[0].backend.score_changes]
        elif scores:
            unknown += list(scores)
        if unknown:
            run = lambda: model_attention(module, query, key, value, attention_mask, scaling=scaling,  # noqa: E731
                                          dropout=dropout, is_causal=is_causal, **kwargs)
            if place is None or place[1] not in place[0].chosen:
                return run()
            reason = "dropout in training" if unknown == ["dropout"] else f"scores changed by {', '.join(unknown)}"
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            phase = _phase(causal, query.shape[2], key.shape[2] - query.shape[2], place[0].chunked_prefill)
            out: tuple[Tensor, Tensor | None] = place[0].exactly(place[1], phase, reason, query.device, run)
            return out
        made, plan = _call(module, query, key, value, attention_mask, scaling, is_causal,
                           bool(place and place[0].chunked_prefill))
        window = kwargs.get("sliding_window") is not None and isinstance(made.mask, LazyMask)
        made.score_changes = scores if plan is None else _bias_moved(scores, plan, len(query))
        if place is None or place[1] not in place[0].chosen or window:
            result = made.dense()
        else:
            shifts = (None, None) if plan is None else (plan.query_shift, plan.key_shift)
            made.context = moved_context(place[0].context, len(query), query.shape[2], made.key.shape[2], *shifts)
            result = place[0].compute(made, place[1])
        if plan is not None and plan.query_shift is not None:
            result = shifted(result, [-s for s in plan.query_shift], 1)
        return result.transpose(1, 2).contiguous(), None


def model_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float | None,
                    dropout: float, is_causal: bool | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, with the mask it would have had."""
    from transformers import AttentionInterface

    config: Any = getattr(module, "config", None)
    original = getattr(getattr(config, "_attn_implementation", None), "original", "sdpa")
    home = vars(sys.modules[type(module).__module__])
    eager = next((home[name] for name in _forward(module).__code__.co_names if "eager" in name and name in home), None)
    only_eager = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "sinks"))
    if eager is not None and (only_eager or original == "eager"):
        if isinstance(mask, MaskDescription):
            mask = mask.tensor("eager")
        elif mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        weights: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, scaling=scaling, dropout=dropout,
                                                      **kwargs)
        return weights
    function = home.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())["sdpa"]
    out: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, mask.tensor("sdpa") if isinstance(mask, MaskDescription) else mask,
        scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs)
    return out


def _call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None,
          is_causal: bool | None, chunked: bool) -> tuple[AttentionCall, _Plan | None]:
    """The call as backends see it, and how its rows were moved."""
    lq, lk = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    decoder = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    cross = bool(module.__dict__.get(CROSS, False))
    if key.shape[0] != query.shape[0]:  # one sequence of keys for all items, or one of queries, as torch allows it
        batch = max(key.shape[0], query.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if not isinstance(mask, MaskDescription):
        causal = mask is None and decoder and lq > 1
        return AttentionCall(query, key, value, scale, causal, mask=mask, is_cross=cross, module=module,
                             phase=_phase(decoder and not cross, lq, lk - lq, chunked)), None
    if lk > mask.given["kv_length"]:
        raise UnsupportedModelError(f"{type(module).__name__}: expected as many keys as its mask has, "
                                    f"{mask.given['kv_length']}, got {lk}: use looseleaf.attach instead of a name")
    plan = mask.plan(lq, lk, not cross)
    if plan.keys < lk:
        key, value = key[:, :, :plan.keys], value[:, :, :plan.keys]
    if plan.query_shift is not None:
        query = shifted(query, plan.query_shift, 1)
    if plan.key_shift is not None:
        key, value = shifted(key, plan.key_shift, 1), shifted(value, plan.key_shift, 1)
    phase = _phase(plan.is_causal or (plan.mask is not None and decoder and not cross), lq, plan.offset, chunked)
    return AttentionCall(query, key, value, scale, plan.is_causal, plan.query_lengths, plan.key_lengths, plan.mask,
                         phase=phase, is_cross=cross, module=module), plan


def _phase(causal: bool, lq: int, offset: int, chunked: bool) -> Phase:
    if not causal:
        return "bidirectional"
    return "decode" if lq == 1 or (offset > 0 and not chunked) else "prefill"


def _bias_moved(scores: dict[str, Any], plan: _Plan, batch: int) -> dict[str, Any]:
    """Score changes with the position bias in the layout of a call's queries and keys."""
    bias = scores.get("position_bias")
    if bias is None:
        return scores
    bias = bias[..., :plan.keys]
    for shift, dim in ((plan.query_shift, 1), (plan.key_shift, 2)):
        if shift is not None:
            bias = shifted(bias.expand(batch, -1, -1, -1), shift, dim)
    return {**scores, "position_bias": bias}
