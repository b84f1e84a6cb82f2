"""Block-sparse attention: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.gradient import blocks_gradient, register_gradient
from looseleaf_kernels.index import BlockIndex, Csr
from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import Problem, check_attention, like_results, nothing
from looseleaf_kernels.shapes import Keys, Lengths, Queries, RowStatistics

OPERATION = register(Operation(
    "block_sparse_attention", __package__, {"reference": ANYWHERE, "cpu": ("cpu",), "triton": ("cuda",)},
    differentiable=True, float64="reference",
    triton_blocks={"block_q": (16, float("inf")), "block_k": (16, float("inf"))}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float, causal: bool,
             block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor,
             impl: str) -> tuple[Tensor, Tensor]:
    problem = Problem(scale, causal, block_q, block_k, query_lengths, key_lengths)
    out, lse = OPERATION.module(impl).block_sparse_attention(query, key, value, Csr(row_ptr, col), problem)
    return out, lse


@_forward.register_fake
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_results(query)


@torch.library.custom_op(f"{OPERATION.operator}_backward", mutates_args=())
def _gradient(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, row_ptr: Tensor,
              col: Tensor, scale: float, causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
              key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(scale, causal, block_q, block_k, query_lengths, key_lengths)
    return blocks_gradient(grad_out, query, key, value, out, lse, Csr(row_ptr, col), problem)


register_gradient(_forward, _gradient)


def block_sparse_attention(query: Queries, key: Keys, value: Keys, index: BlockIndex, *,
                           scale: float | None = None, key_lengths: Lengths | None = None,
                           query_lengths: Lengths | None = None, impl: str | None = None
                           ) -> tuple[Queries, RowStatistics]:
    """Softmax attention over chosen blocks of keys, exact inside of them.

    Args:
        query: (B, Hq, Lq, D), fp32, fp16, bf16 or fp64; D from 16 to 256 on a GPU.
        key, value: (B, Hkv, Lk, D); Hkv divides Hq.
        index: the blocks; its sizes must be those of the tensors.
        scale: factor of the scores; None: 1 / sqrt(D).
        key_lengths, query_lengths: (B,) valid rows of each item; what lies beyond may be NaN. None: all. With
            ``index.causal``, query row i sees keys up to i + (key length - query length).
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`implementation_for`.

    Returns:
        The output, (B, Hq, Lq, D), in the query's dtype, and the natural log-sum-exp of the scaled scores,
        (B, Hq, Lq), fp32 (fp64 for fp64), not differentiable. Rows without any key: 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or block sizes that do not fit.
    """
    some = check_attention(query, key, value, index=index)
    problem = Problem.of(query, key, index, scale, query_lengths, key_lengths)
    chosen = OPERATION.choose(query, impl, block_q=index.block_q, block_k=index.block_k)
    if not some:
        return nothing(query)
    out, lse = _forward(query, key, value, *index.csr, *problem, chosen)
    return out, lse
