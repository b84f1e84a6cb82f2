"""Quantised block-sparse attention on a few CPU cores, and in plain torch on any device.

The integers are those of the reference; they are multiplied as fp32 numbers, which is exact as long as no sum reaches
2^24. Query blocks with equally many key blocks are computed together. All blocks of such a row are computed at once:
the running maximum that the reference updates from block to block is a cumulative maximum over the blocks.
Memory beyond fp32 copies of the inputs does not grow with L.

This shows what quantisation does to the output and is slower than fp32 attention. torch's own int8 product is no
remedy: it takes two matrices and no batch, and is fast and exact only where the CPU has VNNI instructions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.quantized.quantizers import LARGEST, Quantized, finish, put_back, quantize_p
from looseleaf_kernels.rows import Rows, equal_counts, from_blocks, to_blocks

CHUNK_SCORES = 1 << 17
"""Scores computed at a time: 512 KiB of fp32, so that they, their products and K and V fit a second-level cache."""


def quantized_block_sparse_attention(x: Quantized, blocks: Csr, problem: Problem,
                                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference. P may differ from it in the last bit of exp2, which torch rounds differently at a tensor's
    end, and then, at a rounding edge, in one integer."""
    rows = Rows(blocks, problem)
    state, middle = _State(x, rows, problem), rows.full_until(mask_padding=True)
    state.run(rows.starts, middle, masked=False)
    state.run(middle, rows.ends, masked=True)
    out, lse = (from_blocks(t, x.q) for t in finish(state.acc, state.top, state.total))
    return out.to(dtype).contiguous(), put_back(lse, x.taken)


class _State:
    """The online softmax of each query block, and what it is computed from.

    Attributes:
        base: (rows,) where the key blocks of a row's batch item and head begin in ``k``.
        last_key: (rows, block_q) the last key that each query sees; -1 in the padding, whose zeros must not count for
            the scale of P.
        top, total: (rows, block_q) running maximum and sum. acc: (rows, block_q, D).
    """

    def __init__(self, x: Quantized, rows: Rows, problem: Problem) -> None:
        block_q, block_k, head_dim = problem.block_q, problem.block_k, x.q.shape[3]
        self.base = rows.key_heads(x.k.shape[1]) * x.k_scale.shape[2]
        query = rows.first[:, None] + torch.arange(block_q, device=x.q.device)
        valid = query < problem.query_lengths[rows.item][:, None]
        self.last_key = torch.where(valid, rows.last_keys(rows.number), -1)
        self.col, self.block_k, self.p_largest = rows.col.long(), block_k, x.p_largest
        self.q = to_blocks(x.q, block_q, problem.query_lengths, _exact(head_dim, LARGEST[8]))
        self.k = to_blocks(x.k, block_k, problem.key_lengths, self.q.dtype)
        self.v = to_blocks(x.v, block_k, problem.key_lengths, _exact(block_k, x.p_largest))
        self.v_dtype = x.v.dtype
        self.q_factor, self.k_scale = x.q_factor.flatten(), x.k_scale.flatten()
        self.v_scale = None if x.v_scale is None else x.v_scale.reshape(-1, 1, head_dim)
        self.acc = torch.zeros(*self.q.shape, device=x.q.device)
        self.total = self.acc.new_zeros(self.q.shape[:2])
        self.top = torch.full_like(self.total, -torch.inf)

    def run(self, starts: Tensor, ends: Tensor, masked: bool) -> None:
        """Attend to ``col[starts:ends]`` of each row."""
        most = max(1, CHUNK_SCORES // (self.q.shape[1] * self.block_k))
        longest = int((ends - starts).max()) if len(starts) else 0
        for begin in range(0, longest, most):
            left = starts + begin
            for n, rows_of_n in equal_counts((ends - left).clamp(0, most)):
                for rows in rows_of_n.split(max(1, most // n)):
                    self._attend(rows, self.col[left[rows, None] + torch.arange(n, device=rows.device)], masked)

    def _attend(self, rows: Tensor, columns: Tensor, masked: bool) -> None:
        count, n = columns.shape
        block_q, head_dim = self.q.shape[1:]
        blocks = (self.base[rows, None] + columns).flatten()
        # Keys first: (rows, n, block_k, block_q), in which each block is contiguous.
        k = self.k.index_select(0, blocks).view(count, n * self.block_k, head_dim)
        s = torch.bmm(k, self.q.index_select(0, rows).transpose(1, 2)).float().view(count, n, self.block_k, block_q)
        s.mul_((self.q_factor[rows, None] * self.k_scale[blocks].view(count, n))[..., None, None])
        if masked:
            keys = columns[:, :, None] * self.block_k + torch.arange(self.block_k, device=rows.device)
            s.masked_fill_(keys[..., None] > self.last_key[rows, None, None], -torch.inf)

        former = self.top.index_select(0, rows)[:, None]
        tops = torch.cat([former, s.amax(2)], 1).cummax(1).values
        # A query that has seen no key yet has a maximum of -inf: subtract 0 there, or -inf - -inf is NaN.
        safe = torch.where(torch.isneginf(tops), 0.0, tops)
        shrink = torch.exp2(tops - safe[:, -1:])
        p = s.sub_(safe[:, 1:, None]).exp2_()
        total = self.total.index_select(0, rows) * shrink[:, 0] + (p.sum(2) * shrink[:, 1:]).sum(1)
        acc = self.acc.index_select(0, rows).mul_(shrink[:, 0, :, None])
        self.acc.index_copy_(0, rows, acc.add_(self._weigh(p, blocks, shrink[:, 1:])))
        self.total.index_copy_(0, rows, total)
        self.top.index_copy_(0, rows, tops[:, -1])

    def _weigh(self, p: Tensor, blocks: Tensor, shrink: Tensor) -> Tensor:
        """Sum over the blocks of shrink * P V: (rows, block_q, D). p: (rows, n, block_k, block_q)."""
        count, n, block_k, block_q = p.shape
        v = self.v.index_select(0, blocks)
        if self.v_scale is None:
            p = p.to(self.v_dtype).float().mul_(shrink[:, :, None])
            return torch.bmm(p.view(count, n * block_k, block_q).transpose(1, 2), v.view(count, n * block_k, -1))
        integers, scale = quantize_p(p, self.p_largest)
        product = torch.bmm(integers.to(v.dtype).view(-1, block_k, block_q).transpose(1, 2), v).float()
        product.mul_(self.v_scale.index_select(0, blocks))
        return product.view(count, n, block_q, -1).mul_((scale[..., 0] * shrink)[..., None]).sum(1)


def _exact(terms: int, largest: int) -> torch.dtype:
    """The float dtype in which a sum of ``terms`` products of integers up to ``largest`` and 127 is exact."""
    return torch.float32 if terms * largest * LARGEST[8] <= 1 << 24 else torch.float64
