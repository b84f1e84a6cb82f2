"""Every operation in plain torch, obviously right and of any float dtype. Memory is of size L x L: for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float,
                           causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
                           key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of the index; empty rows give 0 and a log-sum-exp of -inf."""
    allowed = dense_mask(row_ptr, col, query.shape[2], key.shape[2], causal, block_q, block_k, query_lengths,
                         key_lengths)
    return masked_attention(query, key, value, allowed, scale, query_lengths, key_lengths)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float, query_lengths: Tensor,
                     key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention under a boolean mask (B, Hq, Lq, Lk); empty rows give 0 and a log-sum-exp of -inf."""
    _, heads, lq, _ = query.shape
    lk = key.shape[2]
    group = heads // key.shape[1]
    valid = torch.arange(lk, device=key.device) < key_lengths[:, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    # NaN in padding must not leak: 0 * NaN is NaN, so that padding is replaced and not only masked.
    key = torch.where(valid[:, None, :, None], key, 0).repeat_interleave(group, 1).to(wide)
    value = torch.where(valid[:, None, :, None], value, 0).repeat_interleave(group, 1).to(wide)
    rows_ok = (torch.arange(lq, device=query.device) < query_lengths[:, None])[:, None, :, None]
    q = torch.where(rows_ok, query, 0).to(wide)
    scores = (q @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    some = allowed.any(-1)
    scores = torch.where(some[..., None], scores, 0.0)
    lse = torch.where(some, torch.logsumexp(scores, -1), -torch.inf)
    out = torch.where(some[..., None], torch.softmax(scores, -1) @ value, 0.0)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out.to(query.dtype), lse.to(lse_dtype)


def dense_mask(row_ptr: Tensor, col: Tensor, lq: int, lk: int, causal: bool, block_q: int, block_k: int,
               query_lengths: Tensor, key_lengths: Tensor) -> Tensor:
    """(B, H, Lq, Lk) bool: which pairs take part."""
    batch, heads, _ = row_ptr.shape
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    blocks = torch.zeros(batch, heads, nq, nk, dtype=torch.bool, device=row_ptr.device)
    counts = (row_ptr[..., 1:] - row_ptr[..., :-1]).flatten().long()
    blocks.view(-1)[torch.repeat_interleave(counts) * nk + col.long()] = True
    mask = blocks.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :lq, :lk]
    q = torch.arange(lq, device=row_ptr.device)
    k = torch.arange(lk, device=row_ptr.device)
    mask = mask & (k < key_lengths[:, None])[:, None, None] & (q < query_lengths[:, None])[:, None, :, None]
    if causal:
        position = q + (key_lengths - query_lengths)[:, None]
        mask = mask & (k <= position[..., None])[:, None]
    return mask


def block_mean(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """Mean over the valid rows of each block, (B, H, N, D); 0 for a block without any."""
    batch, heads, length, width = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(batch, heads, -(-length // block), width, dtype=wide, device=x.device)
    for b in range(batch):
        for n in range(out.shape[2]):
            rows = x[b, :, n * block:min((n + 1) * block, int(lengths[b]))]
            if rows.shape[1]:
                out[b, :, n] = rows.to(wide).mean(1)
    return out


def last_query_scores(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor,
                      key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the last valid queries of the causal softmax, by key and by distance."""
    batch, heads, _, _ = query.shape
    lk = key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    vertical = torch.zeros(batch, heads, lk, dtype=wide, device=query.device)
    slash = torch.zeros_like(vertical)
    group = heads // key.shape[1]
    for b in range(batch):
        nq, nk = int(query_lengths[b]), int(key_lengths[b])
        rows = min(last_q, nq, nk)  # earlier rows see no key
        if not rows:
            continue
        for h in range(heads):
            scores = query[b, h, nq - rows:nq].to(wide) @ key[b, h // group, :nk].to(wide).T * scale
            position = torch.arange(nk - rows, nk, device=query.device)[:, None]
            distance = position - torch.arange(nk, device=query.device)
            p = torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1)
            vertical[b, h, :nk] = p.sum(0) / rows
            slash[b, h].index_add_(0, distance.clamp(min=0).flatten(), (p / rows).flatten())
    return vertical, slash


def top_mass(scores: Tensor, mass: Tensor) -> Tensor:
    """The smallest set of largest scores whose sum reaches ``mass`` of the total."""
    flat = scores.reshape(-1, scores.shape[-1])
    wanted = mass.expand(scores.shape[:-1]).reshape(-1)
    out = torch.zeros_like(flat, dtype=torch.bool)
    for row in range(flat.shape[0]):
        values = flat[row].to(torch.float64)
        total, reached = float(values.sum()), 0.0
        for n in torch.argsort(values, descending=True, stable=True).tolist():
            if reached >= float(wanted[row]) * total or float(values[n]) <= 0:
                break
            out[row, n] = True
            reached += float(values[n])
    return out.view_as(scores)
