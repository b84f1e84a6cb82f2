"""Query blocks of all heads and items as one list of rows: where each lies, what it sees, and which go together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem


class Rows:
    """The R = B * H * Nq query blocks of an index.

    Attributes:
        starts, ends: (R,) int32, where the entries of a row begin and end in ``col``.
        col: (nnz,) int32 key blocks, ascending in each row.
        number: (R,) 0 to R - 1. item: (R,) the batch item. first: (R,) the first query of the block.
    """

    def __init__(self, blocks: Csr, problem: Problem) -> None:
        batch, self.heads, pointers = blocks.row_ptr.shape
        self.count, self.problem, self.col = pointers - 1, problem, blocks.col
        self.starts = blocks.row_ptr[..., :-1].reshape(-1).contiguous()
        self.ends = blocks.row_ptr[..., 1:].reshape(-1).contiguous()
        self.number = torch.arange(batch * self.heads * self.count, device=self.col.device)
        self.item = self.number // (self.heads * self.count)
        self.first = self.number % self.count * problem.block_q

    @cached_property
    def position(self) -> Tensor:
        """(R,) where the first query of the block stands among the keys of its item."""
        return self.first + self.problem.offsets[self.item]

    def of_entries(self) -> Tensor:
        """(nnz,) int64: the row of each entry of ``col``."""
        return torch.repeat_interleave((self.ends - self.starts).long())

    def key_heads(self, kv_heads: int) -> Tensor:
        """(R,) the key head that a row attends to, counted over the batch."""
        head = self.number // self.count % self.heads
        return self.item * kv_heads + head // (self.heads // kv_heads)

    def last_keys(self, rows: Tensor) -> Tensor:
        """(n, block_q): the last key that each query of n of the rows sees, as if no query were padding."""
        block_q = self.problem.block_q
        last = (self.problem.key_lengths[self.item[rows]] - 1)[:, None].expand(-1, block_q)
        if not self.problem.causal:
            return last
        return torch.minimum(last, self.position[rows, None] + torch.arange(block_q, device=rows.device))

    def full_until(self, *, mask_padding: bool = False) -> Tensor:
        """(R,) int32: the offset in ``col`` up to which the blocks of a row need no mask.

        Columns ascend, so that the blocks at the diagonal and at the end, which need one, are a row's last. A block
        is full where even the row's first query sees the block's last key.

        Args:
            mask_padding: whether all blocks of a row with padded queries need a mask too.
        """
        bound = self.problem.key_lengths[self.item]
        if self.problem.causal:
            bound = torch.minimum(bound, self.position + 1)
        if mask_padding:
            valid = self.first + self.problem.block_q <= self.problem.query_lengths[self.item]
            bound = torch.where(valid, bound, 0)
        row = self.of_entries()
        full = (self.col.long() + 1) * self.problem.block_k <= bound[row]
        return self.starts + torch.zeros_like(self.starts).index_add_(0, row, full.to(self.starts.dtype))


def equal_counts(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(n, the rows that have n entries) by ascending n, rows without any left out: each can be computed as a batch."""
    order = torch.argsort(counts, stable=True)
    numbers, sizes = torch.unique_consecutive(counts[order], return_counts=True)
    for n, rows in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
        if n:
            yield n, rows


def to_blocks(x: Tensor, block: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, L, D) as whole blocks, (B * H * N, block, D); rows beyond the lengths are zero so that NaN there cannot
    leak."""
    batch, heads, length, head_dim = x.shape
    count = -(-length // block)
    if count * block == length and x.dtype == dtype and bool((lengths == length).all()):
        return x.contiguous().view(batch * heads * count, block, head_dim)
    out = torch.zeros(batch, heads, count * block, head_dim, dtype=dtype, device=x.device)
    for item, n in enumerate(lengths.tolist()):
        out[item, :, :n] = x[item, :, :n]
    return out.view(batch * heads * count, block, head_dim)


def from_blocks(x: Tensor, like: Tensor) -> Tensor:
    """Blocks, (B * H * N, block, ...), as rows, (B, H, L, ...), of a tensor's batch, heads and length."""
    return x.view(*like.shape[:2], -1, *x.shape[2:])[:, :, :like.shape[2]]
