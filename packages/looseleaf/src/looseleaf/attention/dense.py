"""Exact attention for one call: what every fallback computes and what every backend is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from looseleaf.attention.call import AttentionCall

ROWS = 512
"""Query rows for which a mask is held at a time."""


class LazyMask:
    """What a boolean mask of shape (B, 1 or H, Lq, Lk) says, made only where it is asked for.

    Args:
        rows: ``rows(start, stop)`` gives the boolean mask of query rows ``start`` to ``stop``, (B, 1 or H, n, Lk);
            True: attend.
        length: Lq.
        first_key: ``first_key(row)`` is a key below which no query from ``row`` on attends to anything (0 if unknown),
            so that a sliding window costs what its window costs.
    """

    def __init__(self, rows: Callable[[int, int], Tensor], length: int,
                 first_key: Callable[[int], int] | None = None) -> None:
        self.rows, self.length, self.first_key = rows, length, first_key or (lambda row: 0)

    def dense(self) -> Tensor:
        """The whole mask; for small inputs and tests."""
        return self.rows(0, self.length)


def dense_attention(call: AttentionCall) -> Tensor:
    """Exact attention, (B, Hq, Lq, D), in the dtype of the query.

    Keys are not repeated for grouped-query attention and no L x L matrix is made. Rows beyond ``query_lengths`` and
    rows without any key are zero; what lies beyond the lengths, NaN too, does not reach any other row.
    """
    batch, _, _, lq, lk, _ = call.shape
    if call.query_lengths is None and call.key_lengths is None:
        return _items(call, slice(0, batch), lq, lk)
    out = call.query.new_zeros(*call.query.shape[:3], call.value.shape[-1])
    for b, (nq, nk) in enumerate(zip(*(lengths.tolist() for lengths in call.lengths()), strict=True)):
        out[b:b + 1, :, :nq] = _items(call, slice(b, b + 1), nq, nk)
    return out


def _items(call: AttentionCall, items: slice, lq: int, lk: int) -> Tensor:
    """Attention of batch items whose first rows are the valid ones."""
    query, key, value = call.query[items, :, :lq], call.key[items, :, :lk], call.value[items, :, :lk]
    mask, changes, bias = call.mask, call.score_changes, call.score_changes.get("position_bias")
    if lq == 0 or lk == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    causal, offset = call.is_causal and lq > 1, lk - lq
    if mask is None and not changes and (not causal or offset == 0):
        return _sdpa(query, key, value, None, call.scale, {}, causal)
    compute = _with_changes if {"softcap", "s_aux"} & set(changes) else _sdpa
    parts = []
    for start in range(0, lq, ROWS):
        stop = min(lq, start + ROWS)
        first = mask.first_key(start) if isinstance(mask, LazyMask) else 0
        # Keys that rows of this chunk may see; where a row sees none at all, one hidden key stands in.
        end = max(first + 1, min(lk, stop + offset)) if causal else lk
        part = _rows(call, mask, start, stop)[items, ..., first:end] if mask is not None else None
        if causal:
            seen = (torch.arange(first, end, device=query.device)
                    <= torch.arange(start, stop, device=query.device)[:, None] + offset)
            part = _both(seen, part)
        if bias is not None:
            part = _both(_rows(call, bias, start, stop)[items, ..., first:end], part)
        rows = compute(query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], part, call.scale, changes)
        if part is not None:
            empty = ~part.any(-1, keepdim=True) if part.dtype == torch.bool else part.isneginf().all(-1, keepdim=True)
            if bool(empty.any()):
                rows = rows.masked_fill(empty, 0.0)
        parts.append(rows)
    return torch.cat(parts, 2)


def _rows(call: AttentionCall, mask: Tensor | LazyMask, start: int, stop: int) -> Tensor:
    """Rows of a mask or of a bias for all batch items, (B, 1 or H, n, Lk)."""
    batch, _, _, lq, lk, _ = call.shape
    if isinstance(mask, LazyMask):
        return mask.rows(start, stop).expand(batch, -1, -1, -1)
    mask = mask[..., :lk]
    return mask.expand(torch.broadcast_shapes(mask.shape, (batch, 1, lq, lk)))[:, :, start:stop]


def _both(one: Tensor, two: Tensor | None) -> Tensor:
    """Two masks at once, each bool or additive."""
    if two is None:
        return one
    if one.dtype != torch.bool and two.dtype != torch.bool:
        return one + two
    if one.dtype == two.dtype:
        return one & two
    seen, added = (one, two) if one.dtype == torch.bool else (two, one)
    return added.masked_fill(~seen, -torch.inf)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, changes: Mapping[str, Any],
          causal: bool = False) -> Tensor:
    """``scaled_dot_product_attention`` that never repeats keys and values for grouped-query attention."""
    group, dropout = query.shape[1] // key.shape[1], changes.get("dropout", 0.0)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if group == 1 or query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale,
                                              enable_gqa=group > 1)
    # The fused CPU kernel takes no grouped heads: one call for each member of the groups, keys as they are.
    by_head = mask is not None and mask.dim() == 4 and mask.shape[1] > 1
    return torch.stack([F.scaled_dot_product_attention(
        query[:, g::group], key, value, mask[:, g::group] if mask is not None and by_head else mask, dropout, causal,
        scale=scale) for g in range(group)], 2).flatten(1, 2)


def _with_changes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float,
                  changes: Mapping[str, Any]) -> Tensor:
    """Attention whose scores are capped or have sinks beside them, in fp32."""
    scores = (query.float().unflatten(1, (key.shape[1], -1)) @ key.float()[:, :, None].mT * scale).flatten(1, 2)
    if (cap := changes.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = _both(scores, mask)
    if (sinks := changes.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = F.dropout(scores.softmax(-1)[..., :key.shape[2]], changes.get("dropout", 0.0))
    return (weights.unflatten(1, (key.shape[1], -1)) @ value.float()[:, :, None]).flatten(1, 2).to(query.dtype)
