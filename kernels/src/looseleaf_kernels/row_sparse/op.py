"""Attention of every query to its own keys: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.gradient import register_gradient
from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import (
    Problem,
    check_attention,
    check_numbers,
    lengths_of,
    like_results,
    nothing,
    scale_of,
)
from looseleaf_kernels.row_sparse.cpu import gradient
from looseleaf_kernels.shapes import Keys, Lengths, Queries, RowKeys, RowStatistics

OPERATION = register(Operation(
    "row_sparse_attention", __package__, {"reference": ANYWHERE, "cpu": ANYWHERE, "triton": ("cuda",)},
    differentiable=True, float64="reference"))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float, causal: bool,
             query_lengths: Tensor, key_lengths: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    check_numbers("index", index, key.shape[2], "keys",
                  "each key at most once in a row, got key {} twice: it would count twice")
    problem = Problem(scale, causal, 1, 1, query_lengths, key_lengths)
    out, lse = OPERATION.module(impl).row_sparse_attention(query, key, value, index, problem)
    return out, lse


@_forward.register_fake
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_results(query)


@torch.library.custom_op(f"{OPERATION.operator}_backward", mutates_args=())
def _gradient(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, index: Tensor,
              scale: float, causal: bool, query_lengths: Tensor,
              key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(scale, causal, 1, 1, query_lengths, key_lengths)
    return gradient(grad_out, query, key, value, out, lse, index, problem)


register_gradient(_forward, _gradient)


def row_sparse_attention(query: Queries, key: Keys, value: Keys, index: RowKeys, *, causal: bool = False,
                         scale: float | None = None, query_lengths: Lengths | None = None,
                         key_lengths: Lengths | None = None,
                         impl: str | None = None) -> tuple[Queries, RowStatistics]:
    """Softmax attention of every query to a list of keys of its own.

    It equals :func:`looseleaf_kernels.block_sparse_attention` with blocks of 1 x 1. Every row gathers its keys, and no
    product is a product of matrices: it pays at densities of a few per cent (benchmarks/cpu_row_sparse.py); above that
    a dense call under a mask is faster.

    Args:
        query: (B, Hq, Lq, D), fp32, fp16, bf16 or fp64; D from 16 to 256 on a GPU.
        key, value: (B, Hkv, Lk, D); Hkv divides Hq.
        index: (B, Hq, Lq, K) int32, the keys of each query, each at most once; -1: none.
        causal: leave out keys behind i + (key length - query length).
        scale: factor of the scores; None: 1 / sqrt(D).
        query_lengths, key_lengths: (B,) valid rows of each item; what lies beyond may be NaN and takes no part, named
            or not. None: all.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        The output, (B, Hq, Lq, D), in the query's dtype, and the natural log-sum-exp of the scaled scores,
        (B, Hq, Lq), fp32 (fp64 for fp64), not differentiable. Rows without any key: 0 and -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit; on a CPU also keys that do not exist or come twice in a row.
    """
    some = check_attention(query, key, value)
    if index.dim() != 4 or index.shape[:3] != query.shape[:3] or index.dtype.is_floating_point:
        raise ValueError(f"index: expected integers of shape {(*query.shape[:3], 'K')}, got {index.dtype} "
                         f"{tuple(index.shape)}")
    if not some or not index.shape[3]:
        return nothing(query)
    out, lse = _forward(query, key, value, index, scale_of(scale, query), causal,
                        lengths_of(query, query_lengths, "query_lengths"), lengths_of(key, key_lengths, "key_lengths"),
                        OPERATION.choose(query, impl))
    return out, lse
