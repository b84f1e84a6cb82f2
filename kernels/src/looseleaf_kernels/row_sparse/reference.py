"""Attention of every query to keys of its own, by a mask over all keys: obviously right. For tests."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.block_sparse.reference import masked_attention
from looseleaf_kernels.problem import Problem, visible


def row_sparse_attention(query: Tensor, key: Tensor, value: Tensor, index: Tensor,
                         problem: Problem) -> tuple[Tensor, Tensor]:
    """Softmax attention over the named keys; rows without any give 0 and a log-sum-exp of -inf."""
    lq, lk = query.shape[2], key.shape[2]
    mask = torch.zeros(*query.shape[:3], lk + 1, dtype=torch.bool, device=query.device)
    mask.scatter_(3, torch.where(index < 0, lk, index).long(), torch.ones_like(index, dtype=torch.bool))
    return masked_attention(query, key, value, mask[..., :lk] & visible(lq, lk, problem)[:, None], problem)
