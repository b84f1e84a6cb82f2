"""Attention over blocks and single columns in plain torch, obviously right. Memory is of size L x L: for tests."""

from __future__ import annotations

from torch import Tensor

from looseleaf_kernels.reference import dense_mask, masked_attention


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor,
                             column_ptr: Tensor, column: Tensor, scale: float, block_q: int, block_k: int,
                             query_lengths: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of both; a single column is a block of one key."""
    lq, lk = query.shape[2], key.shape[2]
    mask = dense_mask(row_ptr, col, lq, lk, True, block_q, block_k, query_lengths, key_lengths)
    mask = mask | dense_mask(column_ptr, column, lq, lk, True, block_q, 1, query_lengths, key_lengths)
    return masked_attention(query, key, value, mask, scale, query_lengths, key_lengths)
