"""Block importance: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import Problem, check_heads, lengths_of, scale_of, statistics_dtype
from looseleaf_kernels.shapes import BlockScores, Keys, Lengths, Queries

OPERATION = register(Operation(
    "block_importance", __package__, {"reference": ANYWHERE, "cpu": ANYWHERE, "triton": ("cuda",)},
    triton_blocks={"block_q": (16, 128), "block_k": (16, 128)}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, causal: bool, mean: bool,
             query_lengths: Tensor, key_lengths: Tensor, impl: str) -> Tensor:
    problem = Problem(scale, causal, block_q, block_k, query_lengths, key_lengths)
    sums: Tensor = OPERATION.module(impl).block_importance(query, key, problem)
    return sums.div_(block_q * block_k) if mean else sums


@_forward.register_fake
def _fake(query: Tensor, key: Tensor, block_q: int, block_k: int, *_: Any) -> Tensor:
    b, h, lq = query.shape[:3]
    return query.new_empty(b, h, -(-lq // block_q), -(-key.shape[2] // block_k), dtype=statistics_dtype(query))


def block_importance(query: Queries, key: Keys, block_q: int, block_k: int, *, causal: bool,
                     scale: float | None = None, reduce: Literal["mean", "sum"] = "mean",
                     key_lengths: Lengths | None = None, query_lengths: Lengths | None = None,
                     impl: str | None = None) -> BlockScores:
    """Softmax probability of each block of the attention map, without making the map. Not differentiable.

    Args:
        query: (B, Hq, Lq, D). key: (B, Hkv, Lk, D), same dtype; Hkv divides Hq.
        block_q, block_k: queries and keys of a block, at least 1; the last block may be ragged.
        causal: query row i sees keys up to i + (key length - query length) of its item.
        scale: factor of the scores; None: 1 / sqrt(D).
        reduce: ``"sum"`` over the pairs of a block; or ``"mean"``, that sum divided by block_q * block_k, for ragged
            blocks and blocks with padding too, so that a block with fewer pairs counts less.
        key_lengths, query_lengths: (B,) valid rows of each item; what lies beyond may be NaN, takes part in no
            softmax and adds nothing. None: all.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        (B, Hq, Nq, Nk), fp32 (fp64 for fp64). The sums of a head add up to its valid queries that see a key. Memory
        beyond inputs and output grows with L, not with L x L, except in the reference.

    Raises:
        ValueError: shapes, dtypes, blocks, ``reduce`` or lengths that do not fit.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected 'mean' or 'sum', got {reduce!r}")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {block}")
    check_heads(query, key)
    if key.dtype != query.dtype:
        raise ValueError(f"key: expected the query's dtype, {query.dtype}, got {key.dtype}")
    chosen = OPERATION.choose(query, impl, block_q=block_q, block_k=block_k)
    importance: Tensor = _forward(
        query, key, block_q, block_k, scale_of(scale, query), causal, reduce == "mean",
        lengths_of(query, query_lengths, "query_lengths"), lengths_of(key, key_lengths, "key_lengths"), chosen)
    return importance
