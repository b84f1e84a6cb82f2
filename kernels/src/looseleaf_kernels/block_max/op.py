"""Largest scores of blocks: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import Problem, check_heads, lengths_of, scale_of, statistics_dtype
from looseleaf_kernels.shapes import Keys, Lengths, PairScores, Queries

OPERATION = register(Operation(
    "block_score_max", __package__, {"reference": ANYWHERE, "cpu": ANYWHERE, "triton": ("cuda",)},
    triton_blocks={"block": (16, 128)}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, scale: float, causal: bool, block: int, query_lengths: Tensor,
             key_lengths: Tensor, impl: str) -> Tensor:
    problem = Problem(scale, causal, block, block, query_lengths, key_lengths)
    largest: Tensor = OPERATION.module(impl).block_score_max(query, key, problem)
    return largest


@_forward.register_fake
def _fake(query: Tensor, key: Tensor, scale: float, causal: bool, block: int, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], -(-query.shape[2] // block), -(-key.shape[2] // block),
                           dtype=statistics_dtype(query))


def block_score_max(query: Queries, key: Keys, block: int, *, causal: bool = True, scale: float | None = None,
                    query_lengths: Lengths | None = None, key_lengths: Lengths | None = None,
                    impl: str | None = None) -> PairScores:
    """The largest score in each block of the attention map, positive scores of all heads added up. Not differentiable.

    The score of a pair is sum over heads of max(0, scale q k); LeMo (arXiv 2501.09767) ranks blocks of tokens by it.

    Args:
        query: (B, Hq, Lq, D). key: (B, Hkv, Lk, D), same dtype; Hkv divides Hq.
        block: queries, and keys, of a block, at least 1; the last block may be ragged.
        causal: query row i sees keys up to i + (key length - query length) of its item.
        scale: factor of the scores, not negative; None: 1 / sqrt(D).
        query_lengths, key_lengths: (B,) valid rows of each item; what lies beyond may be NaN. None: all.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        (B, Nq, Nk), fp32 (fp64 for fp64); 0 for a block without a pair. Memory beyond inputs and output grows with L,
        not with L x L, except in the reference.

    Raises:
        ValueError: shapes, dtypes, block, scale or lengths that do not fit.
    """
    if block < 1:
        raise ValueError(f"block: expected an integer >= 1, got {block}")
    check_heads(query, key)
    if key.dtype != query.dtype:
        raise ValueError(f"key: expected the query's dtype, {query.dtype}, got {key.dtype}")
    factor = scale_of(scale, query)
    if factor < 0:
        raise ValueError(f"scale: expected a number >= 0, got {factor}")
    largest: Tensor = _forward(query, key, factor, causal, block, lengths_of(query, query_lengths, "query_lengths"),
                               lengths_of(key, key_lengths, "key_lengths"),
                               OPERATION.choose(query, impl, block=block))
    return largest
