"""Attaching to transformers models, through ``AttentionInterface`` and ``AttentionMaskInterface``.

The mask function registered here returns a description instead of an L x L tensor; the attention function reads from
it what a backend needs: causality and lengths, with padding moved to the end.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.attention.attach import Attached, leaf_modules
from looseleaf.attention.call import AttentionCall, Phase
from looseleaf.attention.mask import LazyMask
from looseleaf.errors import UnsupportedModelError

PREFIX = "looseleaf_attached_"
_numbers = itertools.count()

SCORE_CHANGES = ("softcap", "s_aux", "position_bias", "head_mask", "relative_position_bias")
"""Arguments of transformers attention functions that change the scores; a layer that gives one stays as it was."""


def attention_layers(model: Any) -> list[str] | None:
    """Names of the attention modules; None if this is no transformers model."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, nn.Module):
        return None
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    if not model._can_set_attn_implementation():
        return []
    return [name for name, _ in leaf_modules(model, "Attention")]


def install(model: Any, attached: Attached) -> None:
    """Register private functions and set them on this model only.

    Raises:
        UnsupportedModelError: the model, or one that shares its configuration, has a backend attached.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")
               and hasattr(m.config, "_attn_implementation_internal")}
    former = [(config, config._attn_implementation_internal) for config in configs.values()]
    if any(str(name).startswith(PREFIX) for _, name in former):
        raise UnsupportedModelError(f"{type(model).__name__} has a backend attached already: detach that one first "
                                    "(attached.detach(), or leave its with-block)")
    name = f"{PREFIX}{next(_numbers)}"
    original = str(model.config._attn_implementation or "sdpa")
    layer_of = {id(module): i for i, (_, module) in enumerate(leaf_modules(model, "Attention"))}
    function = _Function(attached, layer_of, original)
    AttentionInterface.register(name, function)
    attached._undo.append(lambda: AttentionInterface._global_mapping.pop(name, None))
    AttentionMaskInterface.register(name, describe)
    attached._undo.append(lambda: AttentionMaskInterface._global_mapping.pop(name, None))

    def restore() -> None:
        for config, implementation in former:
            config._attn_implementation_internal = implementation

    attached._undo.append(restore)
    model.set_attn_implementation(name)


class MaskDescription:
    """What transformers says about a mask, before anything of size L x L exists.

    Models hand it from the mask function to the attention function. A model that looks inside gets the tensor.
    """

    def __init__(self, **given: Any) -> None:
        self.given = given
        self._plans: dict[tuple[int, int, bool], _Plan] = {}

    def contiguous(self) -> MaskDescription:
        """Itself; `generate` with a static cache asks for it."""
        return self

    def tensor(self) -> Tensor:
        """The boolean mask, (B, 1, Lq, Lk)."""
        from transformers.masking_utils import sdpa_mask

        mask = sdpa_mask(**{**self.given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        return mask

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of :meth:`tensor`."""
        from transformers.masking_utils import sdpa_mask

        mask = sdpa_mask(**{**self.given, "q_offset": int(self.given["q_offset"]) + start, "q_length": stop - start,
                            "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        return mask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "given":
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def plan(self, lq: int, lk: int, queries_follow: bool) -> _Plan:
        """How to bring the tensors of a call to the layout that backends expect; made once for all layers."""
        key = (lq, lk, queries_follow)
        if key not in self._plans:
            self._plans[key] = _plan(self, lq, lk, queries_follow)
        return self._plans[key]


@torch.compiler.disable
def describe(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
             mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None,
             local_size: int | None = None, use_vmap: bool = False, device: Any = "cpu",
             **kwargs: Any) -> MaskDescription:
    """The mask function registered with transformers; arguments as in ``transformers.masking_utils.sdpa_mask``."""
    if isinstance(attention_mask, MaskDescription):
        return attention_mask  # `generate` with a static cache makes the masks before the model would
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in this very tensor before attention is computed
    return MaskDescription(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                           kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
                           local_size=local_size, use_vmap=use_vmap, device=device)


class _Plan:
    """Slices and shifts of one kind of call."""

    def __init__(self, is_causal: bool, keys: int, query_shift: list[int] | None = None,
                 key_shift: list[int] | None = None, query_lengths: Tensor | None = None,
                 key_lengths: Tensor | None = None, mask: LazyMask | None = None) -> None:
        self.is_causal, self.keys, self.mask = is_causal, keys, mask
        self.query_shift, self.key_shift = query_shift, key_shift
        self.query_lengths, self.key_lengths = query_lengths, key_lengths


def _plan(description: MaskDescription, lq: int, lk: int, queries_follow: bool) -> _Plan:
    from transformers import masking_utils

    given = description.given
    function, local = given["mask_function"], given["local_size"]
    causal = function is masking_utils.causal_mask_function
    padding = given["attention_mask"]
    offset = int(given["q_offset"]) - int(given["kv_offset"])
    plain = (causal or function is masking_utils.bidirectional_mask_function) and local is None \
        and (padding is None or padding.dim() == 2)
    general = _Plan(False, lk, mask=LazyMask(
        lambda start, stop: description.rows(start, stop)[..., :lk], lq,
        (lambda row: max(0, min(lk - 1, row + offset - local))) if local is not None and not _or(function) else None))
    if not plain or (local is None and int(given["kv_offset"]) != 0):
        return general
    # In a static cache there are keys beyond the last query that nobody wrote yet.
    keys = min(lk, offset + lq) if causal else lk
    if padding is None:
        return _Plan(causal, keys)
    valid = padding.bool()[:, :keys]
    if valid.shape[1] < keys:
        valid = torch.nn.functional.pad(valid, (0, keys - valid.shape[1]))
    if bool(valid.all()):
        return _Plan(causal, keys)
    count = valid.sum(1)
    first = valid.int().argmax(1)
    run = torch.arange(keys, device=valid.device)
    if not bool((valid == ((run >= first[:, None]) & (run < (first + count)[:, None]))).all()):
        return general  # holes in the middle: neither left nor right padding
    shift = first.tolist() if bool(first.any()) else None
    if not queries_follow:
        return _Plan(causal, keys, None, shift, None, count)
    queries = valid[:, keys - lq:] if causal else valid
    if queries.shape[1] != lq:
        return general
    first_query = queries.int().argmax(1)
    query_shift = first_query.tolist() if bool(first_query.any()) else None
    return _Plan(causal, keys, query_shift, shift, queries.sum(1), count)


def _or(function: Any) -> bool:
    """Whether a mask function adds to what a window shows, so that its window bounds nothing."""
    return "or_mask" in getattr(function, "__qualname__", "")


class _Function:
    """The attention function registered with transformers."""

    def __init__(self, attached: Attached, layer_of: dict[int, int], original: str) -> None:
        self.attached, self.layer_of, self.original = attached, layer_of, original

    @torch.compiler.disable
    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                 scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
                 **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D); gives (B, Lq, Hq, D) and no weights."""
        layer = self.layer_of.get(id(module), -1)
        attached = self.attached
        changes = [name for name in SCORE_CHANGES if kwargs.get(name) is not None]
        if changes or dropout:
            reason = f"scores changed by {', '.join(changes)}" if changes else "dropout in training"
            attached._calls.append(({"layer": layer, "phase": "prefill", "fallback": reason}, lambda: 0.0))
            return self._as_before(module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)
        call, plan = _call(module, query, key, value, attention_mask, scaling, is_causal)
        lq = query.shape[2]
        window = kwargs.get("sliding_window") is not None and isinstance(call.mask, LazyMask)
        if layer not in attached.chosen or window:
            out = call.dense()
        else:
            out = attached.compute(call, layer)
        if plan is not None and plan.query_shift is not None:
            out = _shifted(out, [-s for s in plan.query_shift])
        return out[:, :, :lq].transpose(1, 2).contiguous(), None

    def _as_before(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                   scaling: float | None, dropout: float, is_causal: bool | None,
                   kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, with the mask it would have had."""
        from transformers import AttentionInterface

        mask = attention_mask.tensor() if isinstance(attention_mask, MaskDescription) else attention_mask
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        changes = any(kwargs.get(name) is not None for name in SCORE_CHANGES)
        if eager is not None and (changes or self.original == "eager"):
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
            made: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, scaling=scaling,
                                                       dropout=dropout, **kwargs)
            return made
        function = AttentionInterface()["sdpa"]
        result: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, scaling=scaling,
                                                        dropout=dropout, is_causal=is_causal, **kwargs)
        return result


def _call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None,
          is_causal: bool | None) -> tuple[AttentionCall, _Plan | None]:
    """The call as backends see it, and how its rows were moved."""
    lq, lk = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    decoder = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if mask is None:
        causal = decoder and lq > 1
        return AttentionCall(query, key, value, scale, causal, phase=_phase(decoder, lq), module=module), None
    if not isinstance(mask, MaskDescription):
        return AttentionCall(query, key, value, scale, False, mask=mask, phase=_phase(decoder, lq), module=module), None
    plan = mask.plan(lq, lk, not _is_cross(module))
    if plan.keys < lk:
        key, value = key[:, :, :plan.keys], value[:, :, :plan.keys]
    if plan.query_shift is not None:
        query = _shifted(query, plan.query_shift)
    if plan.key_shift is not None:
        key, value = _shifted(key, plan.key_shift), _shifted(value, plan.key_shift)
    phase = _phase(plan.is_causal or (plan.mask is not None and decoder), lq)
    return AttentionCall(query, key, value, scale, plan.is_causal, plan.query_lengths, plan.key_lengths, plan.mask,
                         phase=phase, module=module), plan


def _phase(causal: bool, lq: int) -> Phase:
    return ("decode" if lq == 1 else "prefill") if causal else "bidirectional"


def _is_cross(module: nn.Module) -> bool:
    """Whether the keys of an attention module come from another sequence than its queries."""
    if getattr(module, "is_decoder", False) and getattr(module, "is_causal", None) is False:
        return True  # the encoder attention of BART-like decoders
    return bool(getattr(module, "is_cross_attention", False)) or "cross" in type(module).__name__.lower()


def _shifted(x: Tensor, shifts: list[int]) -> Tensor:
    """Each batch item's rows moved towards the beginning by its shift, around the end."""
    return torch.stack([item if s == 0 else item.roll(-s, 1) for item, s in zip(x, shifts, strict=True)])
