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

from looseleaf_kernels.cpu import _blocks
from looseleaf_kernels.quantizers import LARGEST, Quantized, put_back, quantize_p

LN_2 = 0.6931471805599453
CHUNK_SCORES = 1 << 17
"""Scores computed at a time: 512 KiB of fp32, so that they, their products and K and V fit a second-level cache."""


def quantized_block_sparse_attention(x: Quantized, row_ptr: Tensor, col: Tensor, causal: bool, block_q: int,
                                     block_k: int, query_lengths: Tensor, key_lengths: Tensor,
                                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference. P may differ from it in the last bit of exp2, which torch rounds differently at a tensor's
    end, and then, at a rounding edge, in one integer."""
    batch, heads, lq, width = x.q.shape
    kv_heads, nq = x.k.shape[1], row_ptr.shape[-1] - 1
    rows = _Rows(x, col.long(), block_q, block_k, query_lengths, key_lengths)
    row = torch.arange(batch * heads * nq, device=col.device)
    item = row // (heads * nq)
    rows.base = (item * kv_heads + row // nq % heads // (heads // kv_heads)) * x.k_scale.shape[2]
    # The last key that each query sees; -1 in the padding, whose zeros must not count for the scale of P.
    at = (row % nq)[:, None] * block_q + torch.arange(block_q, device=col.device)
    rows.last_key = (key_lengths[item] - 1)[:, None].expand(-1, block_q)
    if causal:
        rows.last_key = torch.minimum(rows.last_key, at + (key_lengths - query_lengths)[item][:, None])
    rows.last_key = torch.where(at < query_lengths[item][:, None], rows.last_key, -1)

    starts, ends = row_ptr[..., :-1].reshape(-1).long(), row_ptr[..., 1:].reshape(-1).long()
    middle = full_until(row_ptr, col, causal, block_q, block_k, query_lengths, key_lengths)
    rows.run(starts, middle, masked=False)
    rows.run(middle, ends, masked=True)
    out, lse = rows.finish()
    out = out.view(batch, heads, nq * block_q, width)[:, :, :lq]
    return out.to(dtype).contiguous(), put_back(lse.view(batch, heads, nq * block_q)[:, :, :lq], x.taken)


def full_until(row_ptr: Tensor, col: Tensor, causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
               key_lengths: Tensor) -> Tensor:
    """(B * H * Nq,) int64: the offset in ``col`` up to which a row's blocks need no mask.

    Columns ascend, so that the blocks at the diagonal and at the end, which need one, are a row's last. In a row with
    padded queries all do.
    """
    batch, heads, nq = row_ptr.shape[0], row_ptr.shape[1], row_ptr.shape[2] - 1
    starts, ends = row_ptr[..., :-1].reshape(-1).long(), row_ptr[..., 1:].reshape(-1).long()
    item = torch.arange(batch, device=col.device).repeat_interleave(heads * nq)
    first = torch.arange(nq, device=col.device).repeat(batch * heads) * block_q
    bound = key_lengths[item]
    if causal:
        bound = torch.minimum(bound, first + (key_lengths - query_lengths)[item] + 1)
    bound = torch.where(first + block_q <= query_lengths[item], bound, 0)
    row_of_entry = torch.repeat_interleave(ends - starts)
    full = (col.long() + 1) * block_k <= bound[row_of_entry]
    return starts + torch.zeros_like(starts).index_add_(0, row_of_entry, full.long())


class _Rows:
    """The state of the online softmax of each query block, and what it is computed from.

    Attributes:
        base: (rows,) where the key blocks of a row's batch item and head begin in ``k``.
        last_key: (rows, block_q) the last key that each query sees.
        top, total: (rows, block_q) running maximum and sum. acc: (rows, block_q, D).
    """

    base: Tensor
    last_key: Tensor

    def __init__(self, x: Quantized, col: Tensor, block_q: int, block_k: int, query_lengths: Tensor,
                 key_lengths: Tensor) -> None:
        nq, nk, width = x.q_factor.shape[2], x.k_scale.shape[2], x.q.shape[3]
        self.col, self.block_k, self.p_largest = col, block_k, x.p_largest
        self.q = _blocks(x.q, nq, block_q, query_lengths, _exact(width, LARGEST[8]))
        self.k = _blocks(x.k, nk, block_k, key_lengths, self.q.dtype)
        self.v = _blocks(x.v, nk, block_k, key_lengths, _exact(block_k, x.p_largest))
        self.v_dtype = x.v.dtype
        self.q_factor, self.k_scale = x.q_factor.flatten(), x.k_scale.flatten()
        self.v_scale = None if x.v_scale is None else x.v_scale.reshape(-1, 1, width)
        self.acc = torch.zeros(*self.q.shape, device=col.device)
        self.total = self.acc.new_zeros(self.q.shape[:2])
        self.top = torch.full_like(self.total, -torch.inf)

    def run(self, starts: Tensor, ends: Tensor, masked: bool) -> None:
        """Attend to ``col[starts:ends]`` of each row."""
        most = max(1, CHUNK_SCORES // (self.q.shape[1] * self.block_k))
        longest = int((ends - starts).max()) if len(starts) else 0
        for begin in range(0, longest, most):
            left = starts + begin
            counts = (ends - left).clamp(0, most)
            order = torch.argsort(counts, stable=True)
            numbers, sizes = torch.unique_consecutive(counts[order], return_counts=True)
            for n, rows_of_n in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
                for rows in rows_of_n.split(max(1, most // max(1, n))) if n else ():
                    self._attend(rows, self.col[left[rows, None] + torch.arange(n, device=rows.device)], masked)

    def _attend(self, rows: Tensor, columns: Tensor, masked: bool) -> None:
        count, n = columns.shape
        block_q, width = self.q.shape[1:]
        blocks = (self.base[rows, None] + columns).flatten()
        # Keys first: (rows, n, block_k, block_q), in which each block is contiguous.
        k = self.k.index_select(0, blocks).view(count, n * self.block_k, width)
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

    def finish(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp; 0 and -inf where nothing was attended to."""
        some = self.total != 0
        total = torch.where(some, self.total, 1.0)
        lse = torch.where(some, (self.top + torch.log2(total)) * LN_2, -torch.inf)
        return torch.where(some[..., None], self.acc / total[..., None], 0.0), lse


def _exact(terms: int, largest: int) -> torch.dtype:
    """The float dtype in which a sum of ``terms`` products of integers up to ``largest`` and 127 is exact."""
    return torch.float32 if terms * largest * LARGEST[8] <= 1 << 24 else torch.float64
