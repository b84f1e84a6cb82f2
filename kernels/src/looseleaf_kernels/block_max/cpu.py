"""Largest scores of blocks in plain torch, on any device: a few query blocks at a time, head after head."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import Problem, statistics_dtype, without_padding

CHUNK_SCORES = 1 << 19
"""Scores at a time: 2 MiB of fp32, about one core's cache."""


def block_score_max(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """As the reference; memory beyond inputs and output grows with L."""
    block_q, block_k = problem.block_q, problem.block_k
    batch, heads, lq, _ = query.shape
    group, dtype, lk = heads // key.shape[1], statistics_dtype(query), key.shape[2]
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    out = torch.zeros(batch, nq, nk, dtype=dtype, device=query.device)
    q, k = without_padding(query, problem.query_lengths), without_padding(key, problem.key_lengths)
    offsets = problem.offsets.tolist()
    size = max(1, CHUNK_SCORES // (block_q * max(lk, 1))) * block_q
    for b in range(batch):
        keys = k[b].to(dtype).transpose(1, 2)
        for start in range(0, lq, size):
            stop = min(lq, start + size)
            seen = min(lk, max(0, stop + offsets[b])) if problem.causal else lk
            if not seen:
                continue
            total = out.new_zeros(stop - start, seen)
            for h in range(heads):
                total += (q[b, h, start:stop].to(dtype) @ keys[h // group, :, :seen]).clamp_(min=0)
            if problem.causal:
                last = torch.arange(start, stop, device=out.device) + offsets[b]
                total.masked_fill_(torch.arange(seen, device=out.device) > last[:, None], 0.0)
            rows, columns = -(-(stop - start) // block_q), -(-seen // block_k)
            total = torch.nn.functional.pad(total, (0, columns * block_k - seen, 0, rows * block_q - stop + start))
            at = start // block_q
            out[b, at:at + rows, :columns] = total.view(rows, block_q, columns, block_k).amax((1, 3))
    return out * problem.scale
