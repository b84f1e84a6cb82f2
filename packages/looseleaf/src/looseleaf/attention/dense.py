"""Exact attention for one call: what every fallback computes and what every backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf.attention.mask import LazyMask

if TYPE_CHECKING:
    from looseleaf.attention.call import AttentionCall

ROWS = 512
"""Query rows for which a mask is held at a time."""


def dense_attention(call: AttentionCall) -> Tensor:
    """Exact attention, (B, Hq, Lq, D), in the dtype of the query.

    Keys are not repeated for grouped-query attention and no L x L matrix is made. Rows beyond ``query_lengths`` and
    rows without any key are zero; what lies beyond the lengths, NaN too, does not reach any other row.
    """
    query, key, value, changes = call.query, call.key, call.value, dict(call.score_changes)
    if call.query_lengths is None and call.key_lengths is None:
        return _item(call, query, key, value, call.mask, changes)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    query_lengths, key_lengths = call.lengths()
    for b, (nq, nk) in enumerate(zip(query_lengths.tolist(), key_lengths.tolist(), strict=True)):
        if nq and nk:
            if changes.get("position_bias") is not None:
                changes["position_bias"] = _mask_of(call.score_changes["position_bias"], b, nq, nk)
            out[b:b + 1, :, :nq] = _item(call, query[b:b + 1, :, :nq], key[b:b + 1, :, :nk], value[b:b + 1, :, :nk],
                                         _mask_of(call.mask, b, nq, nk), changes)
    return out


def _mask_of(mask: Tensor | LazyMask | None, b: int, nq: int, nk: int) -> Tensor | LazyMask | None:
    """The mask of one batch item."""
    if mask is None:
        return None
    if isinstance(mask, LazyMask):
        whole = mask
        return LazyMask(lambda start, stop: _one(whole.rows(start, stop), b)[..., :nk], nq, whole.first_key)
    one = _one(mask if mask.dim() == 4 else mask.expand(*[1] * (4 - mask.dim()), *mask.shape), b)
    return one[..., : nq if one.shape[-2] > 1 else 1, : nk if one.shape[-1] > 1 else 1]


def _one(mask: Tensor, b: int) -> Tensor:
    return mask[b:b + 1] if mask.shape[0] > 1 else mask


def _item(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | LazyMask | None,
          changes: Mapping[str, Any]) -> Tensor:
    """Attention where all rows are valid."""
    lq, lk = query.shape[2], key.shape[2]
    if lq == 0 or lk == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    causal = call.is_causal and lq > 1
    if mask is None and not changes and (not causal or lq == lk):
        return _sdpa(query, key, value, None, causal, call.scale)
    offset = lk - lq
    parts = []
    for start in range(0, lq, ROWS):
        stop = min(lq, start + ROWS)
        first = mask.first_key(start) if isinstance(mask, LazyMask) else 0
        # Rows of this chunk see no key beyond this one; where a row sees none at all, one hidden key stands in.
        end = max(first + 1, min(lk, stop + offset)) if causal else lk
        part = _rows_of(mask, start, stop, first, end)
        if causal:
            seen = (torch.arange(first, end, device=query.device)
                    <= torch.arange(start, stop, device=query.device)[:, None] + offset)
            part = seen if part is None else _both(part, seen)
        if changes.get("position_bias") is not None:
            bias = _rows_of(changes["position_bias"], start, stop, first, end)
            assert bias is not None
            part = bias if part is None else _both(bias, part) if part.dtype == torch.bool else part + bias
        compute = _with_changes if {"softcap", "s_aux"} & set(changes) else _sdpa
        rows = compute(query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], part, False, call.scale,
                       changes)
        if part is not None:
            empty = ~part.any(-1, keepdim=True) if part.dtype == torch.bool else part.isneginf().all(-1, keepdim=True)
            if bool(empty.any()):
                rows = rows.masked_fill(empty, 0.0)
        parts.append(rows)
    return torch.cat(parts, 2)


def _both(mask: Tensor, seen: Tensor) -> Tensor:
    """A bool or additive mask, and a bool one beside it."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _rows_of(mask: Tensor | LazyMask | None, start: int, stop: int, first: int, end: int) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, LazyMask):
        return mask.rows(start, stop)[..., first:end]
    rows = mask[..., start:stop, :] if mask.dim() >= 2 and mask.shape[-2] > 1 else mask
    return rows[..., first:end] if rows.shape[-1] > 1 else rows


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
          changes: Mapping[str, Any] | None = None) -> Tensor:
    """``scaled_dot_product_attention`` that never repeats keys and values for grouped-query attention."""
    heads, kv_heads, dropout = query.shape[1], key.shape[1], (changes or {}).get("dropout", 0.0)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if heads == kv_heads:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale)
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=True)
    # The fused CPU kernel takes no grouped heads: one call for each member of the groups, keys as they are.
    group = heads // kv_heads
    grouped = query.unflatten(1, (kv_heads, group))
    masks = mask.expand(-1, heads, -1, -1).unflatten(1, (kv_heads, group)) \
        if mask is not None and mask.dim() == 4 and mask.shape[1] == heads else None
    parts = [F.scaled_dot_product_attention(grouped[:, :, g], key, value, mask if masks is None else masks[:, :, g],
                                            dropout, causal, scale=scale) for g in range(group)]
    return torch.stack(parts, 2).flatten(1, 2)


def _with_changes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
                  changes: Mapping[str, Any]) -> Tensor:
    """Attention whose scores are capped or have sinks beside them, in fp32."""
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key.float()[:, :, None].mT * scale).flatten(1, 2)
    if (cap := changes.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if (sinks := changes.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = F.dropout(scores.softmax(-1)[..., :key.shape[2]], changes.get("dropout", 0.0))
    return (weights.unflatten(1, (key.shape[1], -1)) @ value.float()[:, :, None]).flatten(1, 2).to(query.dtype)
