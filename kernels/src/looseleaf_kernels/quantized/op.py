"""Quantised block-sparse attention: checks, choice of implementation, registration with ``torch.library``.

Q and K become int8 with one scale for each block, their product is int32, the online softmax is fp32. P, relative to
the running maximum of its row, becomes integers with one scale for each (block_q x block_k) block, V with one for each
block and channel; P V is int32 and rescaled in fp32 (PAROAttention, arXiv 2506.16054; keys are smoothed as in
SageAttention, arXiv 2410.02367). The row sum adds the fp32 P, as SageAttention does, so that the log-sum-exp depends
on the scores alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.index import BlockIndex, Csr
from looseleaf_kernels.operations import ANYWHERE, Operation, either, register
from looseleaf_kernels.problem import Problem, check_attention, like_results, nothing
from looseleaf_kernels.quantized.quantizers import Bits
from looseleaf_kernels.shapes import Keys, Lengths, Queries, RowStatistics

QK_BITS = (8,)
PV_BITS = (4, 8, 16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATION = register(Operation(
    "quantized_block_sparse_attention", __package__,
    {"reference": ANYWHERE, "cpu": ANYWHERE, "triton": ("cuda",)},
    triton_blocks={"block_q": (16, float("inf")), "block_k": (32, float("inf"))}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float, causal: bool,
             block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor, qk_bits: int, pv_bits: int,
             smooth_key: bool, impl: str) -> tuple[Tensor, Tensor]:
    problem = Problem(scale, causal, block_q, block_k, query_lengths, key_lengths)
    quantizers = OPERATION.module("quantizers_triton" if impl == "triton" else "quantizers")
    x = quantizers.quantize(query, key, value, problem, Bits(qk_bits, pv_bits, smooth_key))
    out, lse = OPERATION.module(impl).quantized_block_sparse_attention(x, Csr(row_ptr, col), problem, query.dtype)
    return out, lse


@_forward.register_fake
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_results(query)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[None, ...]:
    raise NotImplementedError(f"{OPERATION.name} has no gradient, it is for inference: call it under torch.no_grad(), "
                              "or train with block_sparse_attention, which takes the same index")


_forward.register_autograd(_backward, setup_context=_save)


def quantized_block_sparse_attention(query: Queries, key: Keys, value: Keys, index: BlockIndex, *,
                                     scale: float | None = None, key_lengths: Lengths | None = None,
                                     query_lengths: Lengths | None = None, qk_bits: int = 8, pv_bits: int = 8,
                                     smooth_key: bool = True, impl: str | None = None
                                     ) -> tuple[Queries, RowStatistics]:
    """Softmax attention over chosen blocks of keys, in integers. For inference: a backward pass raises.

    Args:
        query: (B, Hq, Lq, D), fp32, fp16 or bf16; D from 16 to 256.
        key, value: (B, Hkv, Lk, D), same dtype; Hkv divides Hq.
        index: the blocks, which are also the blocks of the scales; its sizes must be those of the tensors.
        scale, key_lengths, query_lengths: as in :func:`looseleaf_kernels.block_sparse_attention`.
        qk_bits: bits of Q and K: 8.
        pv_bits: bits of P and V: 8, 4, or 16, which leaves V in its float dtype and casts P to it.
        smooth_key: subtract the mean of the valid keys first, see :func:`looseleaf_kernels.smooth_keys`.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        The output, (B, Hq, Lq, D), in the query's dtype, and the natural log-sum-exp of the scaled scores as
        quantised, (B, Hq, Lq), fp32. What smoothing took from the scores of a row is added back, so that it compares
        with the log-sum-exp of ``block_sparse_attention``. Rows without any key: 0 and -inf.

    Raises:
        ValueError: bits, shapes, dtypes or block sizes that do not fit.
        NotImplementedError: in the backward pass.
    """
    for name, choice, known in (("qk_bits", qk_bits, QK_BITS), ("pv_bits", pv_bits, PV_BITS),
                                ("dtype of query", query.dtype, DTYPES)):
        if choice not in known:
            raise ValueError(f"{name}: expected {either(known)}, got {choice!r}")
    some = check_attention(query, key, value, index=index)
    problem = Problem.of(query, key, index, scale, query_lengths, key_lengths)
    chosen = OPERATION.choose(query, impl, block_q=index.block_q, block_k=index.block_k)
    if not some:
        return nothing(query)
    out, lse = _forward(query, key, value, *index.csr, *problem, qk_bits, pv_bits, smooth_key, chosen)
    return out, lse
