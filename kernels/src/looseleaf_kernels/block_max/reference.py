"""Largest scores of blocks with the whole attention map, obviously right. Memory is of size L x L: for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import Problem, statistics_dtype, visible, without_padding


def block_score_max(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """(B, Nq, Nk): the largest sum over heads of the positive scores of a pair in each block; 0 without a pair."""
    group, dtype = query.shape[1] // key.shape[1], statistics_dtype(query)
    lq, lk = query.shape[2], key.shape[2]
    q = without_padding(query, problem.query_lengths).to(dtype)
    k = without_padding(key, problem.key_lengths).repeat_interleave(group, 1).to(dtype)
    scores = (q @ k.transpose(-1, -2) * problem.scale).clamp(min=0).sum(1)
    scores = torch.where(visible(lq, lk, problem), scores, 0.0)
    nq, nk = -(-lq // problem.block_q), -(-lk // problem.block_k)
    scores = torch.nn.functional.pad(scores, (0, nk * problem.block_k - lk, 0, nq * problem.block_q - lq))
    return scores.view(len(scores), nq, problem.block_q, nk, problem.block_k).amax((2, 4))
