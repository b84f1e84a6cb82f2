# mypy: disable-error-code="no-untyped-def"
"""Attention over blocks, and over single columns beside them, in Triton. Imported only where Triton is wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.rows import Rows
from looseleaf_kernels.tiles import (
    LN_2,
    LOG2_E,
    common_jobs,
    load_queries,
    locate,
    online_softmax,
    options,
    row_arguments,
    store_rows,
)


@triton.jit
def absorb(q, K, V, keys, k_len, position, top, total, acc, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr,
           MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """Take some keys into the running maximum, sum and output. ``MASKED``: not every row sees every key."""
    d = tl.arange(0, BLOCK_D)
    k_mask = (d < D)[:, None]
    v_mask = (d < D)[None, :]
    if MASKED:
        # Padding is not read: NaN there must not leak.
        k_mask = k_mask & (keys < k_len)[None, :]
        v_mask = v_mask & (keys < k_len)[:, None]
    k = tl.load(K + keys[None, :] * D + d[:, None], mask=k_mask, other=0.0)
    v = tl.load(V + keys[:, None] * D + d[None, :], mask=v_mask, other=0.0)
    s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
    if MASKED:
        seen = (keys < k_len)[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= position[:, None])
        s = tl.where(seen, s, float("-inf"))
    top, total, p, shrink = online_softmax(s, top, total, MASKED)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return top, total, acc


@triton.jit
def attention_forward(Q, K, V, O, LSE, ROW_START, ROW_FULL, ROW_END, COL, ORDER, Q_LEN, K_LEN,  # noqa: E741
                      COLUMN_PTR, COLUMN, scale_log2, heads, group, nq, lq, lk,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                      CAUSAL: tl.constexpr, SINGLES: tl.constexpr, PRECISION: tl.constexpr):
    """One query block of one head: blocks without a mask up to ROW_FULL, with one up to ROW_END, and ``SINGLES``:
    single columns by gathered loads."""
    row = tl.load(ORDER + tl.program_id(0))
    item, head, kv_head, block = locate(row, heads, group, nq)
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    lane = tl.arange(0, BLOCK_K)
    row_ok = at < q_len
    k_base = kv_head.to(tl.int64) * lk * D
    q = load_queries(Q, head, at, row_ok, lq, D, BLOCK_D)
    position = at + k_len - q_len
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    for entry in range(tl.load(ROW_START + row), tl.load(ROW_FULL + row)):
        keys = tl.load(COL + entry) * BLOCK_K + lane
        top, total, acc = absorb(q, K + k_base, V + k_base, keys, k_len, position, top, total, acc, scale_log2, D,
                                 BLOCK_D, False, CAUSAL, PRECISION)
    for entry in range(tl.load(ROW_FULL + row), tl.load(ROW_END + row)):
        keys = tl.load(COL + entry) * BLOCK_K + lane
        top, total, acc = absorb(q, K + k_base, V + k_base, keys, k_len, position, top, total, acc, scale_log2, D,
                                 BLOCK_D, True, CAUSAL, PRECISION)
    if SINGLES:
        pointer = COLUMN_PTR + row + row // nq  # a head has nq + 1 pointers
        end = tl.load(pointer + 1)
        for entry in range(tl.load(pointer), end, BLOCK_K):
            keys = tl.load(COLUMN + entry + lane, mask=entry + lane < end, other=lk)  # beyond k_len
            top, total, acc = absorb(q, K + k_base, V + k_base, keys, k_len, position, top, total, acc, scale_log2, D,
                                     BLOCK_D, True, CAUSAL, PRECISION)

    some = total != 0  # NaN stays NaN
    safe = tl.where(some, total, 1.0)
    some = some & row_ok
    out = tl.where(some[:, None], acc / safe[:, None], 0.0)
    lse = tl.where(some, (top + tl.math.log2(safe)) * LN_2, float("-inf"))
    store_rows(O, LSE, out, lse, head, at, lq, D, BLOCK_D)


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Csr, problem: Problem,
                           columns: Csr | None = None) -> tuple[Tensor, Tensor]:
    """As the reference, and over single columns too where there are some; products in the dtype of the inputs, sums in
    fp32, P cast to V's dtype before P V."""
    batch, heads, lq, _ = query.shape
    kv_heads, lk = key.shape[1:3]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    lse = torch.empty(batch, heads, lq, dtype=torch.float32, device=query.device)
    rows = Rows(blocks, problem)
    work = rows.ends - rows.starts
    if columns is not None:
        work = work * problem.block_k + (columns.row_ptr[..., 1:] - columns.row_ptr[..., :-1]).reshape(-1)
    row_ptr, col = columns or blocks  # not read where there are no columns
    attention_forward[(len(rows.item),)](
        query, key, value, out, lse, *row_arguments(rows, work), row_ptr.contiguous(), col, problem.scale * LOG2_E,
        heads, heads // kv_heads, rows.count, lq, lk, CAUSAL=problem.causal, SINGLES=columns is not None,
        **options(query, problem.block_q, problem.block_k))
    return out, lse


def jobs(label: str, **constants: bool) -> list[launch.Job]:
    """The kernel with CAUSAL and SINGLES given, for ahead-of-time compilation."""
    types = launch.types(p_i32="ROW_START ROW_FULL ROW_END COL ORDER Q_LEN K_LEN COLUMN_PTR COLUMN", p_fp32="LSE",
                         fp32="scale_log2", i32="heads group nq lq lk")
    return common_jobs(attention_forward, label, types, "Q K V O", **constants)


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    return jobs(" causal", CAUSAL=True, SINGLES=False) + jobs(" full", CAUSAL=False, SINGLES=False)
