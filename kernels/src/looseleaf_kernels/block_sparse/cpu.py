"""Block-sparse attention on a few CPU cores.

The blocks of each query block are split into those that need no mask and the few at the diagonal or at the end that
do. Query blocks with equally many blocks are computed together: their keys and values are gathered a few megabytes at
a time, and torch's own fused attention gives output and log-sum-exp. The two parts of a row are put together by their
log-sum-exps. Memory beyond inputs and output does not grow with L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem, statistics_dtype
from looseleaf_kernels.rows import Rows, equal_counts, from_blocks, to_blocks

CHUNK_BYTES = 1 << 22
"""Keys and values gathered at a time: what two cores keep in their second-level caches."""


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Csr,
                           problem: Problem) -> tuple[Tensor, Tensor]:
    """As the reference; products in fp32 (fp64 for fp64)."""
    block_q, block_k = problem.block_q, problem.block_k
    q_lengths, k_lengths = problem.query_lengths, problem.key_lengths
    dtype, rows = statistics_dtype(query), Rows(blocks, problem)
    parts = _Parts(
        to_blocks(query, block_q, q_lengths, dtype), to_blocks(key, block_k, k_lengths, dtype),
        to_blocks(value, block_k, k_lengths, dtype), rows.key_heads(key.shape[1]) * -(-key.shape[2] // block_k),
        blocks.col.long(), problem.scale)
    starts, middle, ends = rows.starts.long(), rows.full_until().long(), rows.ends.long()

    # Most often the one block to mask is the square on the diagonal, which torch masks without a tensor.
    square = torch.zeros_like(starts, dtype=torch.bool)
    if problem.causal and block_q == block_k and parts.col.numel():
        only = parts.col[middle.clamp(max=parts.col.numel() - 1)]
        square = (ends - middle == 1) & (only * block_k == rows.position)
        square &= (only + 1) * block_k <= k_lengths[rows.item]
    parts.run(middle, torch.where(square, ends, middle), "diagonal")
    keys = torch.arange(block_k)

    def hidden(chosen: Tensor, columns: Tensor) -> Tensor:
        """(R, block_q, n * block_k): keys behind a query or behind the end."""
        return (columns[:, :, None] * block_k + keys).flatten(1)[:, None] > rows.last_keys(chosen)[:, :, None]

    parts.run(torch.where(square, ends, middle), ends, hidden)
    parts.run(starts, middle, None)
    out, lse = from_blocks(parts.out, query), from_blocks(parts.lse, query)
    beyond = (torch.arange(query.shape[2]) >= q_lengths[:, None])[:, None]
    if bool(beyond.any()):
        out.masked_fill_(beyond[..., None], 0.0)
        lse.masked_fill_(beyond, -torch.inf)
    return out.to(query.dtype).contiguous(), lse.contiguous()


Hidden = Callable[[Tensor, Tensor], Tensor]
"""Which keys n of the rows leave out, (n, block_q, keys), of the columns that are named for each."""


class _Parts:
    """Output and log-sum-exp of each query block: first the part with a mask, then the one without.

    Attributes:
        base: (rows,) where the key blocks of a row's batch item and head begin in ``k``.
        out: (rows, block_q, D). lse: (rows, block_q), -inf where nothing was attended to.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, base: Tensor, col: Tensor, scale: float) -> None:
        self.q, self.k, self.v, self.base, self.col, self.scale = q, k, v, base, col, scale
        self.out = torch.zeros_like(q)
        self.lse = q.new_full(q.shape[:2], -torch.inf)

    def run(self, starts: Tensor, ends: Tensor, masked: Hidden | Literal["diagonal"] | None) -> None:
        """Attend to ``col[starts:ends]`` of each row.

        ``masked``: a function (rows, columns) that says which keys to leave out; or ``"diagonal"``; or None.
        """
        block_bytes = 2 * self.k.shape[1] * self.k.shape[2] * self.k.element_size()
        for n, rows_of_n in equal_counts(ends - starts):
            for rows in rows_of_n.split(max(1, CHUNK_BYTES // (n * block_bytes))):
                self._attend(rows, self.col[starts[rows, None] + torch.arange(n)], masked)

    def _attend(self, rows: Tensor, columns: Tensor, masked: Hidden | Literal["diagonal"] | None) -> None:
        gather = (self.base[rows, None] + columns).flatten()
        shape = (len(rows), 1, columns.shape[1] * self.k.shape[1], self.k.shape[2])
        k, v = self.k.index_select(0, gather).view(shape), self.v.index_select(0, gather).view(shape)
        mask = empty = None
        if callable(masked):
            hidden = masked(rows, columns)[:, None]
            mask, empty = torch.zeros(hidden.shape, dtype=k.dtype).masked_fill_(hidden, -torch.inf), hidden.all(-1)
        out, lse = fused(self.q.index_select(0, rows)[:, None], k, v, self.scale, mask, empty, masked == "diagonal")
        out, lse = out[:, 0], lse[:, 0]
        if masked is None:
            former = self.out.index_select(0, rows), self.lse.index_select(0, rows)
            join(*former, out, lse)
            out, lse = former
        self.out.index_copy_(0, rows, out)
        self.lse.index_copy_(0, rows, lse)


def fused(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None,
          empty: Tensor | None = None, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of torch's fused attention on a CPU.

    Args:
        query: (B, H, Lq, D). key, value: (B, H, Lk, D).
        scale: factor of the scores.
        mask: (B, H, Lq, Lk), 0 or -inf. empty: (B, H, Lq) bool, the rows that it leaves nothing of: 0 and -inf.
        diagonal: whether query i sees keys up to i.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, diagonal, attn_mask=mask, scale=scale)
    lse = lse.to(query.dtype)
    if empty is not None:
        out, lse = out.masked_fill_(empty[..., None], 0.0), lse.masked_fill_(empty, -torch.inf)
    return out, lse


def join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Add attention to other keys, (..., D) and (...), to an output and log-sum-exp, in place."""
    fraction = torch.sigmoid(other_lse - lse)
    fraction = torch.where(torch.isneginf(other_lse), 0.0, fraction)  # -inf - -inf is NaN: neither has a key
    out.lerp_(other_out, fraction[..., None])
    lse.copy_(torch.logaddexp(lse, other_lse))
