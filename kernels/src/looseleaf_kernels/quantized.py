"""Quantised block-sparse attention: checks, choice of implementation, registration with ``torch.library``.

Q and K become int8 with one scale for each block, their product is int32, the online softmax is fp32. P, relative to
the running maximum of its row, becomes integers with one scale for each (block_q x block_k) block, V with one for each
block and channel; P V is int32 and rescaled in fp32 (PAROAttention, arXiv 2506.16054; keys are smoothed as in
SageAttention, arXiv 2410.02367). The row sum adds the fp32 P, as SageAttention does, so that the log-sum-exp depends
on the scores alone.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.index import BlockIndex
from looseleaf_kernels.ops import _check_attention, _implementation, _lengths

NAME = "quantized_block_sparse_attention"
QK_BITS = (8,)
PV_BITS = (8, 4, 16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op(f"looseleaf::{NAME}", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float, causal: bool,
               block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor, qk_bits: int, pv_bits: int,
               smooth_key: bool, impl: str) -> tuple[Tensor, Tensor]:
    quantizers, module = (importlib.import_module(f"looseleaf_kernels.{name}") for name in (
        "quantizers_triton" if impl == "triton" else "quantizers", f"quantized_{impl}"))
    x = quantizers.quantize_all(query, key, value, scale, block_q, block_k, query_lengths, key_lengths, qk_bits,
                                pv_bits, smooth_key)
    out, lse = module.quantized_block_sparse_attention(
        x, row_ptr, col, causal, block_q, block_k, query_lengths, key_lengths, query.dtype)
    return out, lse


@_attention.register_fake
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float,
                    causal: bool, block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor,
                    qk_bits: int, pv_bits: int, smooth_key: bool, impl: str) -> tuple[Tensor, Tensor]:
    return (torch.empty_like(query, memory_format=torch.contiguous_format),
            query.new_empty(query.shape[:3], dtype=torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[None, ...]:
    raise NotImplementedError(f"{NAME} has no gradient, it is for inference: call it under torch.no_grad(), or train "
                              "with block_sparse_attention, which takes the same index")


_attention.register_autograd(_differentiate, setup_context=_save)


def quantized_block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, index: BlockIndex, *,
                                     scale: float | None = None, key_lengths: Tensor | None = None,
                                     query_lengths: Tensor | None = None, qk_bits: int = 8, pv_bits: int = 8,
                                     smooth_key: bool = True, impl: str | None = None) -> tuple[Tensor, Tensor]:
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
    if qk_bits not in QK_BITS:
        raise ValueError(f"qk_bits={qk_bits!r}: allowed is {_list(QK_BITS)}")
    if pv_bits not in PV_BITS:
        raise ValueError(f"pv_bits={pv_bits!r}: allowed is {_list(PV_BITS)}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query has dtype {query.dtype}: allowed is {_list(DTYPES)}")
    batch, _, lq, width = _check_attention(query, key, value, index=index)
    chosen = _implementation(NAME, query, index, impl, least=(16, 32))
    if not lq or not key.shape[2] or not batch:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    out, lse = _attention(
        query, key, value, index.row_ptr, index.col, width ** -0.5 if scale is None else float(scale), index.causal,
        index.block_q, index.block_k, _lengths(query_lengths, batch, lq, query.device, "query_lengths"),
        _lengths(key_lengths, batch, key.shape[2], query.device, "key_lengths"), qk_bits, pv_bits, smooth_key, chosen)
    return out, lse


def _list(allowed: tuple[Any, ...]) -> str:
    return ", ".join(map(str, allowed))
