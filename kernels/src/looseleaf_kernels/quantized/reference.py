"""Quantised block-sparse attention, one row of blocks after another, with exact integers: for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.quantized.quantizers import Quantized, finish, put_back, quantize_p


def quantized_block_sparse_attention(x: Quantized, blocks: Csr, problem: Problem,
                                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output, (B, Hq, Lq, D), in ``dtype`` and log-sum-exp of the quantised scores, (B, Hq, Lq), fp32."""
    batch, heads, lq, head_dim = x.q.shape
    group, block_q = heads // x.k.shape[1], problem.block_q
    out = torch.zeros(batch, heads, lq, head_dim, device=x.q.device)
    lse = torch.full((batch, heads, lq), -torch.inf, device=x.q.device)
    for b in range(batch):
        q_len, k_len = int(problem.query_lengths[b]), int(problem.key_lengths[b])
        for h in range(heads):
            offsets = blocks.row_ptr[b, h].tolist()
            for n in range(len(offsets) - 1):
                rows = slice(n * block_q, min((n + 1) * block_q, q_len))
                if rows.start >= rows.stop:
                    continue
                position = torch.arange(rows.start, rows.stop, device=x.q.device)[:, None] + k_len - q_len
                columns = blocks.col[offsets[n]:offsets[n + 1]].tolist()
                out[b, h, rows], lse[b, h, rows] = _row(
                    x, b, h // group, x.q[b, h, rows], x.q_factor[b, h, n], columns, problem.block_k, k_len,
                    position if problem.causal else None)
    return out.to(dtype), put_back(lse, x.taken)


def _row(x: Quantized, b: int, h: int, q: Tensor, q_factor: Tensor, columns: list[int], block_k: int, k_len: int,
         position: Tensor | None) -> tuple[Tensor, Tensor]:
    """One query block over its key blocks, in their order: output and log-sum-exp."""
    top = torch.full((len(q),), -torch.inf, device=q.device)
    total = torch.zeros(len(q), device=q.device)
    acc = torch.zeros(len(q), q.shape[-1], device=q.device)
    for c in columns:
        keys = slice(c * block_k, min((c + 1) * block_k, k_len))
        if keys.start >= keys.stop:
            continue
        s = integer_product(q, x.k[b, h, keys].T).float() * (q_factor * x.k_scale[b, h, c])
        if position is not None:
            s = s.masked_fill(torch.arange(keys.start, keys.stop, device=q.device) > position, -torch.inf)
        new_top = torch.maximum(top, s.amax(-1))
        safe = torch.where(torch.isneginf(new_top), 0.0, new_top)
        p, shrink = torch.exp2(s - safe[:, None]), torch.exp2(top - safe)
        total = total * shrink + p.sum(-1)
        v_scale = None if x.v_scale is None else x.v_scale[b, h, c]
        acc = acc * shrink[:, None] + weigh(p, x.v[b, h, keys], v_scale, x.p_largest)
        top = new_top
    return finish(acc, top, total)


def weigh(p: Tensor, v: Tensor, v_scale: Tensor | None, p_largest: int) -> Tensor:
    """P V of one block, fp32. P is quantised with one scale, or cast to v's dtype where v is not quantised."""
    if v_scale is None:
        return p.to(v.dtype).float() @ v.float()
    integers, scale = quantize_p(p, p_largest)
    return integer_product(integers, v).float() * (scale * v_scale)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of small integers, int32: fp64 holds every partial sum, and is fast on every device."""
    return (a.double() @ b.double()).to(torch.int32)
