"""Attention over blocks and single key columns: checks, choice of implementation, registration with ``torch.library``.

A vertical-slash head (MInference, arXiv 2407.02490, section 3.2 and its appendix on kernels) attends to the blocks that
its diagonals cross and to single keys, its vertical columns. One softmax takes both.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.backward import columns_backward
from looseleaf_kernels.index import BlockIndex
from looseleaf_kernels.layout import Layout
from looseleaf_kernels.ops import _attention_grad, _check_attention, _implementation, _lengths

NAME = "vertical_slash_attention"


def column_index(blocks: Tensor, columns: Tensor, layout: Layout) -> BlockIndex:
    """The single columns of each query block: those that none of its blocks has and that its last query may see.

    Args:
        blocks: (B, H, Nq, Nk) bool, the block mask.
        columns: (B, H, Lk) bool, key columns that all later queries of a head attend to.
        layout: where the blocks lie.

    Returns:
        A causal index with ``block_k`` 1, whose entries are keys, ascending in each row. Memory is that of the index:
        nothing of size Nq x Lk is made unless so many columns are chosen.
    """
    batch, heads, length = columns.shape
    count = columns.sum(-1)
    most = int(count.max()) if count.numel() else 0
    # The columns of each head, ascending, padded to the largest number of them with a key that no query sees.
    row = columns.flatten(0, 1).nonzero()
    place = columns.cumsum(-1, dtype=torch.int32)[columns].long() - 1
    keys = torch.full((batch * heads, most), length, dtype=torch.int32, device=columns.device)
    keys[row[:, 0], place] = row[:, 1].to(torch.int32)
    keys = keys.view(batch, heads, 1, most)
    at = (keys.clamp(max=max(0, length - 1)) // layout.block).long().expand(-1, -1, layout.rows, -1)
    first, last = layout.row_ends
    last = torch.minimum(torch.where(last >= first, last, -1), layout.key_lengths[:, None] - 1)
    needed = (keys <= last[:, None, :, None]) & ~blocks.gather(3, at)
    ends = needed.sum(-1).flatten().cumsum(0, dtype=torch.int32).view(batch, heads, layout.rows)
    starts = torch.nn.functional.pad(ends.flatten()[:-1], (1, 0)).view_as(ends) if ends.numel() else ends
    pointers = torch.cat([starts[..., :1], ends], -1) if layout.rows else ends.new_zeros(batch, heads, 1)
    return BlockIndex(pointers, keys.expand(-1, -1, layout.rows, -1)[needed], layout.block, 1, layout.q_len,
                      layout.k_len, True)


@torch.library.custom_op(f"looseleaf::{NAME}", mutates_args=())
def _vertical_slash(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, column_ptr: Tensor,
                    column: Tensor, scale: float, block_q: int, block_k: int, query_lengths: Tensor,
                    key_lengths: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    module = importlib.import_module(f"looseleaf_kernels.vertical_slash_{impl}")
    out, lse = module.vertical_slash_attention(
        query, key, value, row_ptr, col, column_ptr, column, scale, block_q, block_k, query_lengths, key_lengths)
    return out, lse


@_vertical_slash.register_fake
def _vertical_slash_fake(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, column_ptr: Tensor,
                         column: Tensor, scale: float, block_q: int, block_k: int, query_lengths: Tensor,
                         key_lengths: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op(f"looseleaf::{NAME}_columns_backward", mutates_args=())
def _columns_grad(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                  column_ptr: Tensor, column: Tensor, scale: float, block_q: int, query_lengths: Tensor,
                  key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return columns_backward(grad_out, query, key, value, out, lse, column_ptr, column, scale, block_q, query_lengths,
                            key_lengths)


@_columns_grad.register_fake
def _columns_grad_fake(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                       column_ptr: Tensor, column: Tensor, scale: float, block_q: int, query_lengths: Tensor,
                       key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty_like(query, memory_format=torch.contiguous_format),
            torch.empty_like(key, memory_format=torch.contiguous_format),
            torch.empty_like(value, memory_format=torch.contiguous_format))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (query, key, value, row_ptr, col, column_ptr, column, scale, block_q, block_k, query_lengths, key_lengths,
     _) = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, row_ptr, col, column_ptr, column, query_lengths, key_lengths)
    ctx.numbers = (scale, block_q, block_k)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """With the output and the log-sum-exp of the whole, blocks and columns have gradients that add up."""
    query, key, value, out, lse, row_ptr, col, column_ptr, column, query_lengths, key_lengths = ctx.saved_tensors
    scale, block_q, block_k = ctx.numbers
    of_blocks = _attention_grad(grad_out, query, key, value, out, lse, row_ptr, col, scale, True, block_q, block_k,
                                query_lengths, key_lengths)
    of_columns = _columns_grad(grad_out, query, key, value, out, lse, column_ptr, column, scale, block_q,
                               query_lengths, key_lengths)
    return (*(a + b for a, b in zip(of_blocks, of_columns, strict=True)),) + (None,) * 10


_vertical_slash.register_autograd(_differentiate, setup_context=_save)


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, index: BlockIndex, columns: BlockIndex, *,
                             scale: float | None = None, key_lengths: Tensor | None = None,
                             query_lengths: Tensor | None = None, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Causal softmax attention over chosen blocks of keys and single key columns, exact inside of them.

    Args:
        query: (B, Hq, Lq, D), fp32, fp16, bf16 or fp64; D from 16 to 256.
        key, value: (B, Hkv, Lk, D); Hkv divides Hq.
        index: the blocks, causal; its sizes must be those of the tensors.
        columns: single keys of each query block, see :func:`column_index`: ``block_k`` is 1, ``block_q`` that of
            ``index``. A key that is also in a block of the row would count twice; this is not checked.
        scale, key_lengths, query_lengths: as in :func:`looseleaf_kernels.block_sparse_attention`.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        The output, (B, Hq, Lq, D), in the query's dtype, and the natural log-sum-exp of the scaled scores,
        (B, Hq, Lq), fp32 (fp64 for fp64), not differentiable. Rows without any key: 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or block sizes that do not fit, or an index that is not causal.
    """
    batch, _, lq, width = _check_attention(query, key, value, index=index, columns=columns)
    for name, given in (("index", index), ("columns", columns)):
        if not given.causal:
            raise ValueError(f"{name}.causal=False: allowed is True")
    if columns.block_k != 1 or columns.block_q != index.block_q:
        raise ValueError(f"columns has blocks of {columns.block_q} x {columns.block_k}: allowed is "
                         f"{index.block_q} x 1, for an index with query blocks of {index.block_q}")
    chosen = _implementation(NAME, query, index, impl)
    if not lq or not key.shape[2] or not batch:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    out, lse = _vertical_slash(
        query, key, value, index.row_ptr, index.col, columns.row_ptr, columns.col,
        width ** -0.5 if scale is None else float(scale), index.block_q, index.block_k,
        _lengths(query_lengths, batch, lq, query.device, "query_lengths"),
        _lengths(key_lengths, batch, key.shape[2], query.device, "key_lengths"), chosen)
    return out, lse
