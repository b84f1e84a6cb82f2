"""The operations on a few CPU cores.

Block-sparse attention groups the query blocks by how many key blocks they attend to, gathers the key and value blocks
of many of them at once, and runs each group as two batched matrix products with a softmax in place between them. A
chunk holds few enough scores to stay in the cache, so that memory beyond inputs and output does not grow with L.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_SCORES = 1 << 19
"""Scores per chunk: 2 MiB of fp32, about one core's cache."""


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float,
                           causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
                           key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`looseleaf_kernels.reference.block_sparse_attention`; products in fp32 (fp64 for fp64)."""
    batch, heads, lq, width = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    wide = torch.promote_types(query.dtype, torch.float32)
    q_blocks = _blocks(query, nq, block_q, query_lengths, wide) * scale
    k_blocks = _blocks(key, nk, block_k, key_lengths, wide)
    v_blocks = _blocks(value, nk, block_k, key_lengths, wide)
    out = torch.zeros(batch * heads * nq, block_q, width, dtype=wide)
    lse = torch.full((batch * heads * nq, block_q), -torch.inf, dtype=wide)

    counts = (row_ptr[..., 1:] - row_ptr[..., :-1]).flatten().long()
    starts = row_ptr[..., :-1].reshape(-1).long()
    order = torch.argsort(counts)
    sorted_counts = counts[order]
    shape = _Shape(heads, heads // kv_heads, nq, nk, block_q, block_k, causal, lk)
    begin = int(torch.searchsorted(sorted_counts, torch.tensor(1)))
    total = order.numel()
    while begin < total:
        n = int(sorted_counts[begin])
        same = int(torch.searchsorted(sorted_counts, torch.tensor(n), right=True))
        size = max(1, CHUNK_SCORES // (n * block_q * block_k))
        end = min(same, begin + size)
        rows = order[begin:end]
        begin = end
        columns = col[starts[rows, None] + torch.arange(n)].long()
        _attend(rows, columns, q_blocks, k_blocks, v_blocks, out, lse, shape, query_lengths, key_lengths)

    out = out.view(batch, heads, nq * block_q, width)[:, :, :lq]
    lse = lse.view(batch, heads, nq * block_q)[:, :, :lq].contiguous()
    return out.to(query.dtype).contiguous(), lse.to(torch.float64 if wide == torch.float64 else torch.float32)


class _Shape:
    """Sizes that every chunk needs."""

    def __init__(self, heads: int, group: int, nq: int, nk: int, block_q: int, block_k: int, causal: bool,
                 lk: int) -> None:
        self.heads, self.group, self.nq, self.nk = heads, group, nq, nk
        self.block_q, self.block_k, self.causal, self.lk = block_q, block_k, causal, lk


def _blocks(x: Tensor, count: int, block: int, lengths: Tensor, wide: torch.dtype) -> Tensor:
    """(B * H * count, block, D): whole blocks; rows beyond the lengths are zero so that NaN there cannot leak."""
    batch, heads, length, width = x.shape
    full = count * block == length and bool((lengths == length).all())
    if full and x.dtype == wide:
        return x.contiguous().view(batch * heads * count, block, width)
    out = torch.zeros(batch, heads, count * block, width, dtype=wide, device=x.device)
    for b, n in enumerate(lengths.tolist()):
        out[b, :, :n] = x[b, :, :n]
    return out.view(batch * heads * count, block, width)


def _attend(rows: Tensor, columns: Tensor, q_blocks: Tensor, k_blocks: Tensor, v_blocks: Tensor, out: Tensor,
            lse: Tensor, s: _Shape, query_lengths: Tensor, key_lengths: Tensor) -> None:
    """One chunk: ``rows`` (R,) flat query blocks, ``columns`` (R, n) their key blocks."""
    item = rows // (s.heads * s.nq)
    kv_head = (rows // s.nq % s.heads) // s.group
    base = (item * (k_blocks.shape[0] // s.nk // (query_lengths.numel())) + kv_head) * s.nk
    n = columns.shape[1]
    gather = (base[:, None] + columns).flatten()
    width = k_blocks.shape[2]
    k = k_blocks.index_select(0, gather).view(len(rows), n * s.block_k, width)
    scores = torch.bmm(q_blocks.index_select(0, rows), k.transpose(1, 2))
    offset = (key_lengths - query_lengths)[item]
    first_query = (rows % s.nq) * s.block_q + offset
    last_key = (columns.max(1).values + 1) * s.block_k - 1
    ragged = last_key >= key_lengths[item]
    diagonal = last_key > first_query if s.causal else torch.zeros_like(ragged)
    masked = (ragged | diagonal).nonzero().flatten()
    empty: Tensor | None = None
    if masked.numel():
        # Only the last blocks of a row can be cut by causality or by the end: mask from there on.
        keys = (columns[masked, :, None] * s.block_k + torch.arange(s.block_k)).flatten(1)
        bound = (key_lengths[item[masked]] - 1)[:, None].expand(-1, s.block_q)
        if s.causal:
            bound = torch.minimum(bound, first_query[masked, None] + torch.arange(s.block_q))
        cut = int((keys > bound.min(1).values[:, None]).any(0).nonzero()[0])
        hidden = keys[:, None, cut:] > bound[:, :, None]
        part = scores[masked, :, cut:].masked_fill_(hidden, -torch.inf)
        scores[masked, :, cut:] = part
        if cut == 0:
            empty = torch.isneginf(scores.amax(-1))
    top = scores.amax(-1, keepdim=True)
    if empty is not None:
        top = top.masked_fill(empty[..., None], 0.0)
    scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)
    v = v_blocks.index_select(0, gather).view(len(rows), n * s.block_k, width)
    result = torch.bmm(scores, v).div_(total.clamp(min=torch.finfo(total.dtype).tiny))
    row_lse = (top + total.log()).squeeze(-1)
    beyond = (rows % s.nq)[:, None] * s.block_q + torch.arange(s.block_q) >= query_lengths[item][:, None]
    if bool(beyond.any()):
        result.masked_fill_(beyond[..., None], 0.0)
        row_lse.masked_fill_(beyond, -torch.inf)
    out[rows] = result
    lse[rows] = row_lse


def block_mean(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """As the reference, without a Python loop."""
    batch, heads, length, width = x.shape
    count = -(-length // block)
    wide = torch.promote_types(x.dtype, torch.float32)
    if bool((lengths == length).all()) and count * block == length:
        return x.view(batch, heads, count, block, width).mean(3, dtype=wide)
    valid = torch.arange(length, device=x.device) < lengths[:, None]
    x = torch.where(valid[:, None, :, None], x, 0).to(wide)
    x = torch.nn.functional.pad(x, (0, 0, 0, count * block - length))
    total = x.view(batch, heads, count, block, width).sum(3)
    starts = torch.arange(count, device=x.device) * block
    rows = (lengths[:, None] - starts).clamp(0, block)
    return total / rows.clamp(min=1)[:, None, :, None]


def last_query_scores(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor,
                      key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; one (last_q x Lk) matrix per head at a time."""
    batch, heads, _, _ = query.shape
    lk = key.shape[2]
    group = heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    vertical = torch.zeros(batch, heads, lk, dtype=wide, device=query.device)
    slash = torch.zeros_like(vertical)
    for b in range(batch):
        nq, nk = int(query_lengths[b]), int(key_lengths[b])
        rows = min(last_q, nq, nk)
        if rows == 0 or nk == 0:
            continue
        last = torch.arange(rows, device=query.device)[:, None] + (nk - rows)
        hidden = torch.arange(nk, device=query.device) > last
        for h in range(0, heads, group):
            q = query[b, h:h + group, nq - rows:nq].to(wide) * scale
            p = (q.reshape(-1, q.shape[-1]) @ key[b, h // group, :nk].to(wide).T).view(group, rows, nk)
            first = max(0, nk - rows)
            p[:, :, first:].masked_fill_(hidden[:, first:], -torch.inf)
            p = torch.softmax(p, -1) / rows
            vertical[b, h:h + group, :nk] = p.sum(1)
            slash[b, h:h + group, :nk] = _diagonal_sums(p)
    return vertical, slash


def _diagonal_sums(p: Tensor) -> Tensor:
    """(G, R, N) -> (G, N): sums by the distance of row r, which stands at position N - R + r, from the key."""
    group, rows, n = p.shape
    # With `rows` zeros in front and a stride of one more than a row, entries of equal distance share a column.
    padded = torch.nn.functional.pad(p, (rows, 0)).contiguous()
    lined_up = padded.as_strided((group, rows, n), (padded.stride(0), n + rows + 1, 1), padded.storage_offset() + 1)
    return lined_up.sum(1).flip(-1)


def top_mass(scores: Tensor, mass: Tensor) -> Tensor:
    """As the reference, by a stable sort and a running sum in fp32."""
    values, order = torch.sort(scores.float(), dim=-1, descending=True, stable=True)
    values = values.clamp(min=0)
    before = values.cumsum(-1, dtype=torch.float64) - values.double()
    wanted = mass.double().unsqueeze(-1) * values.sum(-1, keepdim=True, dtype=torch.float64)
    keep = (before < wanted) & (values > 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def block_importance(query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, causal: bool,
                     mean: bool) -> Tensor:
    """As the reference; one row of blocks at a time, so that memory is of size L x block."""
    from looseleaf_kernels import reference

    batch, heads, lq, _ = query.shape
    lk = key.shape[2]
    parts = []
    for start in range(0, lq, block_q):
        end = min(lq, start + block_q)
        seen = min(lk, max(0, end + lk - lq)) if causal else lk
        row = reference.block_importance(query[:, :, start:end], key[:, :, :max(seen, 1)], block_q, block_k, scale,
                                         causal, mean)
        parts.append(torch.nn.functional.pad(row, (0, -(-lk // block_k) - row.shape[-1])))
    return torch.cat(parts, 2) if parts else query.new_zeros(batch, heads, 0, -(-lk // block_k))
