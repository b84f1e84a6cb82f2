"""Block importance on a few CPU cores: exact softmax of a few query rows of all heads at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import Problem, statistics_dtype

CHUNK_SCORES = 1 << 19
"""Scores at a time: 2 MiB of fp32, about one core's cache."""


def block_importance(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """As the reference; a chunk is whole query blocks, and ends at the last key that one of them sees."""
    scale, causal, block_q, block_k, *_ = problem
    batch, heads, lq, head_dim = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    group, dtype = heads // kv_heads, statistics_dtype(query)
    out = torch.zeros(batch, heads, -(-lq // block_q), -(-lk // block_k), dtype=dtype, device=query.device)
    for b, (n, m) in enumerate(zip(problem.query_lengths.tolist(), problem.key_lengths.tolist(), strict=True)):
        if not m:
            continue
        keys = key[b, :, :m].to(dtype).transpose(1, 2)
        # One allocation for all chunks: fresh pages cost more than the sums.
        buffers = out.new_empty(2, max(CHUNK_SCORES, heads * min(block_q, n) * m))
        # With more queries than keys the first rows see nothing; start at the block of the first that does.
        start = max(0, n - m) // block_q * block_q if causal else 0
        size = max(1, CHUNK_SCORES // (heads * block_q * m)) * block_q
        while start < n:
            stop = min(n, start + size)
            seen = min(m, stop + m - n) if causal else m
            rows = stop - start
            count = heads * rows * seen
            q = query[b, :, start:stop].to(dtype).mul(scale).reshape(kv_heads, group * rows, head_dim)
            scores = torch.bmm(q, keys[:, :, :seen], out=buffers[0, :count].view(kv_heads, group * rows, seen))
            scores = scores.view(heads, rows, seen)
            if causal:
                position = torch.arange(start, stop, device=out.device) + (m - n)
                first = max(0, start + m - n)  # keys before this one are seen by every row of the chunk
                later = torch.arange(first, seen, device=out.device) > position[:, None]
                scores[:, :, first:].masked_fill_(later, -torch.inf)
            p = torch.softmax(scores, -1, out=buffers[1, :count].view(heads, rows, seen))
            if causal and start + m - n < 0:
                p[:, :n - m - start] = 0.0  # rows that see no key
            sums = _sums(_sums(p, 1, block_q), 2, block_k)
            at = start // block_q
            out[b, :, at:at + sums.shape[1], :sums.shape[2]] = sums
            start = stop
    return out


def _sums(x: Tensor, dim: int, block: int) -> Tensor:
    """Sums over blocks along a dimension; the last may be ragged."""
    whole = x.shape[dim] // block * block
    parts = [x.narrow(dim, 0, whole).unflatten(dim, (-1, block)).sum(dim + 1)] if whole else []
    if whole < x.shape[dim]:
        parts.append(x.narrow(dim, whole, x.shape[dim] - whole).sum(dim, keepdim=True))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
