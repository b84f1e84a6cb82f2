"""Block-sparse attention in plain torch, obviously right and of any float dtype. Memory is of size L x L: for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem, statistics_dtype, visible, without_padding


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Csr,
                           problem: Problem) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of the index; empty rows give 0 and a log-sum-exp of -inf."""
    chosen = dense_mask(blocks, query.shape[2], key.shape[2], problem)
    return masked_attention(query, key, value, chosen, problem)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
                     problem: Problem) -> tuple[Tensor, Tensor]:
    """Softmax attention under a boolean mask (B, Hq, Lq, Lk); empty rows give 0 and a log-sum-exp of -inf."""
    group, dtype = query.shape[1] // key.shape[1], statistics_dtype(query)
    q = without_padding(query, problem.query_lengths).to(dtype)
    k, v = (without_padding(x, problem.key_lengths).repeat_interleave(group, 1).to(dtype) for x in (key, value))
    scores = (q @ k.transpose(-1, -2) * problem.scale).masked_fill(~mask, -torch.inf)
    some = mask.any(-1)
    scores = torch.where(some[..., None], scores, 0.0)
    lse = torch.where(some, torch.logsumexp(scores, -1), -torch.inf)
    out = torch.where(some[..., None], torch.softmax(scores, -1) @ v, 0.0)
    return out.to(query.dtype), lse


def dense_mask(blocks: Csr, lq: int, lk: int, problem: Problem) -> Tensor:
    """(B, H, Lq, Lk) bool: which pairs take part."""
    row_ptr, col = blocks
    batch, heads, _ = row_ptr.shape
    nq, nk = -(-lq // problem.block_q), -(-lk // problem.block_k)
    mask = torch.zeros(batch, heads, nq, nk, dtype=torch.bool, device=row_ptr.device)
    counts = (row_ptr[..., 1:] - row_ptr[..., :-1]).flatten().long()
    mask.view(-1)[torch.repeat_interleave(counts) * nk + col.long()] = True
    mask = mask.repeat_interleave(problem.block_q, 2).repeat_interleave(problem.block_k, 3)[:, :, :lq, :lk]
    return mask & visible(lq, lk, problem)[:, None]
