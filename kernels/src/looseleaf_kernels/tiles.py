# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels share: where a program stands, the online softmax, and what it stores. Imported only where
Triton is installed and wanted."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.rows import Rows

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(row, heads, group, nq):
    """Of a row, counted over query blocks, heads and items: the item, the head and the key head, counted over the
    batch, and the query block."""
    block = row % nq
    head = (row // nq) % heads
    item = row // (nq * heads)
    return item, item * heads + head, item * (heads // group) + head // group, block


@triton.jit
def load_queries(Q, head, at, valid, lq, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_Q, BLOCK_D), zero where a query is not valid and beyond D."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(Q + head.to(tl.int64) * lq * D + at[:, None] * D + d[None, :],
                   mask=valid[:, None] & (d < D)[None, :], other=0)


@triton.jit
def online_softmax(s, top, total, MASKED: tl.constexpr):
    """The running maximum and sum of each row with some scores more, P, and the factor of what was summed before.

    ``MASKED``: scores may be -inf.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = new_top
    if MASKED:
        # A row that has seen no key yet has a maximum of -inf: subtract 0 there, or -inf - -inf is NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.math.exp2(s - safe[:, None])
    shrink = tl.math.exp2(top - safe)
    return new_top, total * shrink + tl.sum(p, 1), p, shrink


@triton.jit
def store_rows(O, LSE, out, lse, head, at, lq, D: tl.constexpr, BLOCK_D: tl.constexpr):  # noqa: E741
    """Write output and log-sum-exp of a query block."""
    d = tl.arange(0, BLOCK_D)
    inside = at < lq
    tl.store(O + head.to(tl.int64) * lq * D + at[:, None] * D + d[None, :], out.to(O.dtype.element_ty),
             mask=inside[:, None] & (d < D)[None, :])
    tl.store(LSE + head.to(tl.int64) * lq + at, lse, mask=inside)


def options(query: Tensor, block_q: int, block_k: int) -> dict[str, Any]:
    """Constants and launch parameters of attention in the dtype of the query, (B, H, L, D)."""
    chosen = launch.attention(launch.architecture(query.device), block_q, block_k, query.shape[3], query.element_size())
    return {**constants(query.shape[3], block_q, block_k, query.dtype), **chosen.options()}


def constants(head_dim: int, block_q: int, block_k: int, dtype: torch.dtype, least: int = 16) -> dict[str, Any]:
    """The constants of an attention kernel; ``dtype`` is that of the product P V."""
    return {"D": head_dim, "BLOCK_D": max(least, triton.next_power_of_2(head_dim)), "BLOCK_Q": block_q,
            "BLOCK_K": block_k, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}


def row_arguments(rows: Rows, work: Tensor, *, mask_padding: bool = False) -> tuple[Tensor, ...]:
    """ROW_START, ROW_FULL, ROW_END, COL, ORDER, Q_LEN and K_LEN of a kernel with a program for each row.

    Args:
        rows: the query blocks.
        work: (R,) how much there is to do: rows with most of it start first, which makes the tail even.
        mask_padding: see :meth:`Rows.full_until`.
    """
    order = torch.argsort(work, descending=True, stable=True).to(torch.int32)
    return (rows.starts, rows.full_until(mask_padding=mask_padding), rows.ends, rows.col, order,
            *lengths(rows.problem))


def lengths(problem: Problem) -> tuple[Tensor, Tensor]:
    """Q_LEN and K_LEN of a kernel."""
    return problem.query_lengths.to(torch.int32), problem.key_lengths.to(torch.int32)


def common_jobs(kernel: Any, label: str, types: dict[str, str], inputs: str, **values: Any) -> list[launch.Job]:
    """A kernel in the dtypes, head sizes and blocks that are compiled ahead of time.

    Args:
        kernel: the function, whose name comes before ``label`` and the sizes.
        label: what to add to the name.
        types: of its arguments, see :func:`looseleaf_kernels.launch.types`.
        inputs: the pointers to the dtype.
        values: constants beyond those of :func:`constants`.
    """
    return [launch.Job(
        f"{kernel.__name__} {dtype} D{head_dim} block{block}{label}", kernel,
        {**types, **launch.types(**{f"p_{dtype}": inputs})},
        {**constants(head_dim, block, block, torch.float16), **values},
        partial(launch.attention, block_q=block, block_k=block, head_dim=head_dim, itemsize=2))
        for dtype, head_dim, block in product(("fp16", "bf16"), (64, 128), (64, 128))]
