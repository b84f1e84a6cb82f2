"""How good an order of the tokens is for one head: sparsity, incoherence and their score (paper, token reordering).

The attention map is never held whole: a few rows of blocks at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 1 << 22
"""Scores held at a time, unless one row of blocks of all heads has more."""


def block_statistics(query: Tensor, key: Tensor, scale: float, block: int) -> tuple[Tensor, Tensor]:
    """What the attention map of one sample holds in each block.

    Args:
        query, key: (H, L, D), in the order that is to be judged; one token or more.
        scale: factor of the scores.
        block: tokens of a block; the last may be ragged.

    Returns:
        mass, (H, N, N) fp32: the share of the attention of a block's queries that falls on its keys, so that each row
        of blocks sums to 1 (the block's sum divided by its number of queries). Incoherence, (H, N, N) fp32: the
        largest probability of a block over their mean, 1 for a uniform or empty block.
    """
    heads, length, _ = query.shape
    count = -(-length // block)
    sizes = torch.full((count,), float(block), device=query.device)
    sizes[-1] = length - (count - 1) * block
    rows = max(1, ELEMENTS // (heads * length * block)) * block
    keys = key.float().transpose(1, 2)
    sums, tops = [], []
    for start in range(0, length, rows):
        p = torch.softmax((query[:, start:start + rows].float() @ keys) * scale, -1)
        n = -(-p.shape[1] // block)
        p = torch.nn.functional.pad(p, (0, count * block - length, 0, n * block - p.shape[1]))
        p = p.view(heads, n, block, count, block)
        sums.append(p.sum((2, 4)))
        tops.append(p.amax((2, 4)))
    total, top = torch.cat(sums, 1), torch.cat(tops, 1)
    elements = sizes[:, None] * sizes
    incoherence = torch.where(total > 0, top * elements / total, 1.0)
    return total / sizes[:, None], incoherence


def sparsity(mass: Tensor, eps: float) -> Tensor:
    """M_s, (...,): the share of the blocks (..., N, N) that hold less than ``eps`` of their rows' attention."""
    return (mass < eps).float().mean((-2, -1))


def scores(sparse: Tensor, incoherent: Tensor, alpha: float) -> Tensor:
    """The score of each permutation, the higher the better, (P, H).

    Each metric is divided by its sum over the permutations, so that what counts is by how large a part they differ.

    Args:
        sparse: M_s, (P, H), the higher the better.
        incoherent: M_q, the mean incoherence over the blocks, (P, H), the lower the better.
        alpha: weight of the second metric, 0 to 1.
    """
    share = sparse / sparse.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return (1 - alpha) * share - alpha * incoherent / incoherent.sum(0)
