"""Attention over blocks and single columns in plain torch, obviously right. Memory is of size L x L: for tests."""

from __future__ import annotations

from torch import Tensor

from looseleaf_kernels.block_sparse.reference import dense_mask, masked_attention
from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Csr, columns: Csr,
                             problem: Problem) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of both; a single column is a block of one key."""
    sizes = query.shape[2], key.shape[2]
    mask = dense_mask(blocks, *sizes, problem) | dense_mask(columns, *sizes, problem._replace(block_k=1))
    return masked_attention(query, key, value, mask, problem)
