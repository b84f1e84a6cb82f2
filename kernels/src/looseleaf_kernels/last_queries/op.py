"""Scores of the last queries: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import check_heads, lengths_of, scale_of, statistics_dtype
from looseleaf_kernels.shapes import Keys, KeyScores, Lengths, Queries

OPERATION = register(Operation("last_query_scores", __package__, {"reference": ANYWHERE, "cpu": ANYWHERE}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor, key_lengths: Tensor,
             impl: str) -> tuple[Tensor, Tensor]:
    vertical, slash = OPERATION.module(impl).last_query_scores(query, key, last_q, scale, query_lengths, key_lengths)
    return vertical, slash


@_forward.register_fake
def _fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    scores = query.new_empty(*query.shape[:2], key.shape[2], dtype=statistics_dtype(query))
    return scores, torch.empty_like(scores)


def last_query_scores(query: Queries, key: Keys, last_q: int, *, scale: float | None = None,
                      key_lengths: Lengths | None = None, query_lengths: Lengths | None = None
                      ) -> tuple[KeyScores, KeyScores]:
    """Where the last valid queries look: causal softmax, averaged over them by key and by distance.

    Args:
        query: (B, Hq, Lq, D). key: (B, Hkv, Lk, D).
        last_q: how many of the last valid queries, at least 1; fewer are used where there are fewer.
        scale, key_lengths, query_lengths: as in :func:`block_sparse_attention`.

    Returns:
        vertical (B, Hq, Lk) by key, and slash (B, Hq, Lk) by distance query - key; fp32 (fp64 for fp64), each sums
        to 1.

    Raises:
        ValueError: ``last_q`` below 1, or shapes that do not fit.
    """
    if last_q < 1:
        raise ValueError(f"last_q: expected an integer >= 1, got {last_q}")
    check_heads(query, key)
    vertical, slash = _forward(
        query, key, last_q, scale_of(scale, query), lengths_of(query, query_lengths, "query_lengths"),
        lengths_of(key, key_lengths, "key_lengths"), OPERATION.choose(query))
    return vertical, slash
