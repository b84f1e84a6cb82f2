"""Block importance in plain torch, obviously right and of any float dtype. Memory is of size L x L: for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import Problem, statistics_dtype, visible, without_padding


def block_importance(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """Sums of the softmax probabilities of each block, (B, H, Nq, Nk)."""
    lq, lk = query.shape[2], key.shape[2]
    q, k = (without_padding(x, lengths).to(statistics_dtype(query))
            for x, lengths in ((query, problem.query_lengths), (key, problem.key_lengths)))
    seen = visible(lq, lk, problem)[:, None]
    k = k.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (q @ k.transpose(-1, -2) * problem.scale).masked_fill(~seen, -torch.inf)
    p = torch.where(seen.any(-1)[..., None], torch.softmax(scores, -1), 0.0)
    nq, nk = -(-lq // problem.block_q), -(-lk // problem.block_k)
    p = torch.nn.functional.pad(p, (0, nk * problem.block_k - lk, 0, nq * problem.block_q - lq))
    return p.view(*p.shape[:2], nq, problem.block_q, nk, problem.block_k).sum((3, 5))
