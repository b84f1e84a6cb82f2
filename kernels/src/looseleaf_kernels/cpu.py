"""The operations on a few CPU cores.

Block-sparse attention splits the blocks of each query block into those that need no mask and the few at the diagonal
or at the end that do. Query blocks with equally many blocks are computed together: their keys and values are gathered
a few megabytes at a time, and torch's own fused attention gives output and log-sum-exp. The two parts of a row are put
together by their log-sum-exps. Memory beyond inputs and output does not grow with L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 22
"""Keys and values gathered at a time: what two cores keep in their second-level caches."""
SCORES = 1 << 27
"""Scores made at a time on a GPU, where one head after another would be a launch after another."""


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float,
                           causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
                           key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`looseleaf_kernels.reference.block_sparse_attention`; products in fp32 (fp64 for fp64)."""
    batch, heads, lq, _ = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    wide = torch.promote_types(query.dtype, torch.float32)
    parts = _Parts(
        _blocks(query, nq, block_q, query_lengths, wide), _blocks(key, nk, block_k, key_lengths, wide),
        _blocks(value, nk, block_k, key_lengths, wide), col.long(), scale)
    row = torch.arange(batch * heads * nq)
    item = row // (heads * nq)
    parts.base = (item * kv_heads + row // nq % heads // (heads // kv_heads)) * nk

    # A block needs a mask if its last key lies behind the row's first query, or behind the last valid key.
    first_query = row % nq * block_q + (key_lengths - query_lengths)[item]
    last_key = key_lengths[item] - 1
    bound = torch.minimum(last_key, first_query) if causal else last_key
    starts, ends = row_ptr[..., :-1].reshape(-1).long(), row_ptr[..., 1:].reshape(-1).long()
    owner = torch.repeat_interleave(row, ends - starts)
    clear = (parts.col + 1) * block_k - 1 <= bound[owner]
    middle = starts + torch.zeros_like(starts).index_add_(0, owner, clear.long())

    # Most often the one block to mask is the square on the diagonal, which torch masks without a tensor.
    square = torch.zeros_like(row, dtype=torch.bool)
    if causal and block_q == block_k and parts.col.numel():
        only = parts.col[middle.clamp(max=parts.col.numel() - 1)]
        square = (ends - middle == 1) & (only * block_k == first_query) & ((only + 1) * block_k - 1 <= last_key)
    parts.run(middle, torch.where(square, ends, middle), "diagonal")
    positions, keys = torch.arange(block_q), torch.arange(block_k)

    def hidden(rows: Tensor, columns: Tensor) -> Tensor:
        """(R, block_q, n * block_k): keys behind a query or behind the end."""
        last = last_key[rows, None].expand(-1, block_q)
        if causal:
            last = torch.minimum(last, first_query[rows, None] + positions)
        at = (columns[:, :, None] * block_k + keys).flatten(1)
        return at[:, None] > last[:, :, None]

    parts.run(torch.where(square, ends, middle), ends, hidden)
    parts.run(starts, middle, None)
    return _unblocked(parts.out, parts.lse, query, block_q, query_lengths)


def _unblocked(out: Tensor, lse: Tensor, query: Tensor, block_q: int, query_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of rows, (B * H * Nq, block_q, D) and (B * H * Nq, block_q), as (B, H, Lq, D) in the query's dtype and
    (B, H, Lq); 0 and -inf beyond the lengths."""
    batch, heads, lq, width = query.shape
    out = out.view(batch, heads, -1, width)[:, :, :lq]
    lse = lse.view(batch, heads, -1)[:, :, :lq]
    beyond = (torch.arange(lq) >= query_lengths[:, None])[:, None]
    if bool(beyond.any()):
        out.masked_fill_(beyond[..., None], 0.0)
        lse.masked_fill_(beyond, -torch.inf)
    return out.to(query.dtype).contiguous(), lse.contiguous()


Hidden = Callable[[Tensor, Tensor], Tensor]


class _Parts:
    """Output and log-sum-exp of each query block: first the part with a mask, then the one without.

    Attributes:
        base: (rows,) where the key blocks of a row's batch item and head begin in ``k``.
        out: (rows, block_q, D). lse: (rows, block_q), -inf where nothing was attended to.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, col: Tensor, scale: float) -> None:
        self.q, self.k, self.v, self.col, self.scale = q, k, v, col, scale
        self.base = torch.zeros(len(q), dtype=torch.long)
        self.out = torch.zeros_like(q)
        self.lse = q.new_full(q.shape[:2], -torch.inf)

    def run(self, starts: Tensor, ends: Tensor, masked: Hidden | Literal["diagonal"] | None) -> None:
        """Attend to ``col[starts:ends]`` of each row.

        ``masked``: a function (rows, columns) that says which keys to leave out; or ``"diagonal"``; or None.
        """
        counts = ends - starts
        order = torch.argsort(counts, stable=True)
        numbers, sizes = torch.unique_consecutive(counts[order], return_counts=True)
        block_bytes = 2 * self.k.shape[1] * self.k.shape[2] * self.k.element_size()
        begin = 0
        for n, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            rows_of_n = order[begin:begin + size]
            begin += size
            if n == 0:
                continue
            for rows in rows_of_n.split(max(1, CHUNK_BYTES // (n * block_bytes))):
                self._attend(rows, self.col[starts[rows, None] + torch.arange(n)], masked)

    def _attend(self, rows: Tensor, columns: Tensor, masked: Hidden | Literal["diagonal"] | None) -> None:
        gather = (self.base[rows, None] + columns).flatten()
        shape = (len(rows), 1, columns.shape[1] * self.k.shape[1], self.k.shape[2])
        k, v = self.k.index_select(0, gather).view(shape), self.v.index_select(0, gather).view(shape)
        mask = hidden = None
        if callable(masked):
            hidden = masked(rows, columns)
            mask = torch.zeros(hidden.shape, dtype=k.dtype).masked_fill_(hidden, -torch.inf)[:, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            self.q.index_select(0, rows)[:, None], k, v, 0.0, masked == "diagonal", attn_mask=mask, scale=self.scale)
        out, lse = out[:, 0], lse[:, 0].to(self.lse.dtype)
        if masked is None:
            former = self.lse.index_select(0, rows)
            out = torch.lerp(self.out.index_select(0, rows), out, torch.sigmoid(lse - former)[..., None])
            lse = torch.logaddexp(former, lse)
        elif hidden is not None:
            empty = hidden.all(-1)
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
        self.out.index_copy_(0, rows, out)
        self.lse.index_copy_(0, rows, lse)


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
    """As the reference; the (last_q x Lk) matrices of the heads of one key head at a time, on a GPU of more."""
    batch, heads, _, _ = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    group = heads // kv_heads
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
        first = max(0, nk - rows)
        many = 1 if query.device.type == "cpu" else max(1, SCORES // (group * rows * nk))
        for start in range(0, kv_heads, many):
            of_key, of_query = slice(start, start + many), slice(start * group, (start + many) * group)
            q = query[b, of_query, nq - rows:nq].to(wide).unflatten(0, (-1, group)).flatten(1, 2) * scale
            p = (q @ key[b, of_key, :nk].to(wide).transpose(1, 2)).view(-1, rows, nk)
            p[:, :, first:].masked_fill_(hidden[:, first:], -torch.inf)
            p = torch.softmax(p, -1) / rows
            vertical[b, of_query, :nk] = p.sum(1)
            slash[b, of_query, :nk] = _diagonal_sums(p)
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
