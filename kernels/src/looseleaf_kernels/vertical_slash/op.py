"""Attention over blocks and single key columns: checks, choice of implementation, registration with ``torch.library``.

A vertical-slash head (MInference, arXiv 2407.02490, section 3.2 and its appendix on kernels) attends to the blocks that
its diagonals cross and to single keys, its vertical columns. One softmax takes both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.gradient import blocks_gradient, columns_gradient, register_gradient
from looseleaf_kernels.index import BlockIndex, Csr, row_pointers
from looseleaf_kernels.layout import Layout
from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import Problem, check_attention, like_results, nothing
from looseleaf_kernels.shapes import BlockMask, ColumnMask, Keys, Lengths, Queries, RowStatistics

OPERATION = register(Operation(
    "vertical_slash_attention", __package__, {"reference": ANYWHERE, "cpu": ("cpu",), "triton": ("cuda",)},
    differentiable=True, triton_blocks={"block_q": (16, float("inf")), "block_k": (16, float("inf"))}))


def column_index(blocks: BlockMask, columns: ColumnMask, layout: Layout) -> BlockIndex:
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
    return BlockIndex(row_pointers(needed.sum(-1)), keys.expand(-1, -1, layout.rows, -1)[needed], layout.block, 1,
                      layout.q_len, layout.k_len, True)


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, column_ptr: Tensor,
             column: Tensor, scale: float, block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor,
             impl: str) -> tuple[Tensor, Tensor]:
    problem = Problem(scale, True, block_q, block_k, query_lengths, key_lengths)
    out, lse = OPERATION.module(impl).vertical_slash_attention(
        query, key, value, Csr(row_ptr, col), Csr(column_ptr, column), problem)
    return out, lse


@_forward.register_fake
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_results(query)


@torch.library.custom_op(f"{OPERATION.operator}_backward", mutates_args=())
def _gradient(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, row_ptr: Tensor,
              col: Tensor, column_ptr: Tensor, column: Tensor, scale: float, block_q: int, block_k: int,
              query_lengths: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With the output and the log-sum-exp of the whole, blocks and columns have gradients that add up."""
    given = (grad_out, query, key, value, out, lse)
    problem = Problem(scale, True, block_q, block_k, query_lengths, key_lengths)
    of_blocks = blocks_gradient(*given, Csr(row_ptr, col), problem)
    of_columns = columns_gradient(*given, Csr(column_ptr, column), problem)
    dq, dk, dv = (a + b for a, b in zip(of_blocks, of_columns, strict=True))
    return dq, dk, dv


register_gradient(_forward, _gradient)


def vertical_slash_attention(query: Queries, key: Keys, value: Keys, index: BlockIndex, columns: BlockIndex, *,
                             scale: float | None = None, key_lengths: Lengths | None = None,
                             query_lengths: Lengths | None = None, impl: str | None = None
                             ) -> tuple[Queries, RowStatistics]:
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
    some = check_attention(query, key, value, index=index, columns=columns)
    for name, entries in (("index", index), ("columns", columns)):
        if not entries.causal:
            raise ValueError(f"{name}.causal: expected True, got False")
    if columns.block_k != 1 or columns.block_q != index.block_q:
        raise ValueError(f"columns: expected blocks of {index.block_q} x 1, for an index with query blocks of "
                         f"{index.block_q}, got {columns.block_q} x {columns.block_k}")
    problem = Problem.of(query, key, index, scale, query_lengths, key_lengths)
    chosen = OPERATION.choose(query, impl, block_q=index.block_q, block_k=index.block_k)
    if not some:
        return nothing(query)
    factor, _, *rest = problem
    out, lse = _forward(query, key, value, *index.csr, *columns.csr, factor, *rest, chosen)
    return out, lse
