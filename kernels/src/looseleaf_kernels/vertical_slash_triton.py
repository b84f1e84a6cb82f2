# mypy: disable-error-code="no-untyped-def"
"""Attention over blocks and single columns in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import config
from looseleaf_kernels.triton_kernels import LOG2_E, _arch, split_rows


@triton.jit
def absorb(q, K, V, keys, last, top, total, acc, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr,
           MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Take some keys into the running maximum, sum and output. ``MASKED``: each row sees keys up to its ``last``."""
    d = tl.arange(0, BLOCK_D)
    d_ok = d < D
    if MASKED:
        # Keys beyond what any row sees, padding among them, are not read: NaN there must not leak.
        read = keys <= tl.max(last, 0)
        k = tl.load(K + keys[None, :] * D + d[:, None], mask=d_ok[:, None] & read[None, :], other=0.0)
        v = tl.load(V + keys[:, None] * D + d[None, :], mask=d_ok[None, :] & read[:, None], other=0.0)
    else:
        k = tl.load(K + keys[None, :] * D + d[:, None], mask=d_ok[:, None], other=0.0)
        v = tl.load(V + keys[:, None] * D + d[None, :], mask=d_ok[None, :], other=0.0)
    s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
    if MASKED:
        s = tl.where(keys[None, :] <= last[:, None], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    # A row that has seen no key yet has a maximum of -inf: subtract 0 there, or -inf - -inf is NaN.
    safe = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.math.exp2(s - safe[:, None])
    shrink = tl.math.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def vertical_slash_forward(Q, K, V, O, LSE, ROW_START, ROW_FULL, ROW_END, COL, COLUMN_PTR, COLUMN,  # noqa: E741
                           ORDER, Q_LEN, K_LEN, scale_log2, heads, group, nq, lq, lk,
                           D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                           PRECISION: tl.constexpr):
    """One query block of one head: blocks without a mask, blocks with one, and single columns by gathered loads."""
    row = tl.load(ORDER + tl.program_id(0))
    block = row % nq
    head = (row // nq) % heads
    item = row // (nq * heads)
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_K)
    row_ok = at < q_len
    d_ok = d < D
    q_base = (item * heads + head).to(tl.int64) * lq * D
    k_base = (item * (heads // group) + head // group).to(tl.int64) * lk * D
    q = tl.load(Q + q_base + at[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    last = tl.where(row_ok, tl.minimum(at + k_len - q_len, k_len - 1), -1)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    for entry in range(tl.load(ROW_START + row), tl.load(ROW_FULL + row)):
        keys = tl.load(COL + entry) * BLOCK_K + lane
        top, total, acc = absorb(q, K + k_base, V + k_base, keys, last, top, total, acc, scale_log2, D, BLOCK_D,
                                 False, PRECISION)
    for entry in range(tl.load(ROW_FULL + row), tl.load(ROW_END + row)):
        keys = tl.load(COL + entry) * BLOCK_K + lane
        top, total, acc = absorb(q, K + k_base, V + k_base, keys, last, top, total, acc, scale_log2, D, BLOCK_D,
                                 True, PRECISION)
    pointer = COLUMN_PTR + row + row // nq  # a head has nq + 1 pointers
    end = tl.load(pointer + 1)
    for entry in range(tl.load(pointer), end, BLOCK_K):
        keys = tl.load(COLUMN + entry + lane, mask=entry + lane < end, other=lk)  # no row sees key lk
        top, total, acc = absorb(q, K + k_base, V + k_base, keys, last, top, total, acc, scale_log2, D, BLOCK_D,
                                 True, PRECISION)

    some = (total > 0) & row_ok
    out = tl.where(some[:, None], acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, (top + tl.math.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    inside = at < lq
    tl.store(O + q_base + at[:, None] * D + d[None, :], out.to(O.dtype.element_ty),
             mask=inside[:, None] & d_ok[None, :])
    tl.store(LSE + (item * heads + head).to(tl.int64) * lq + at, lse, mask=inside)


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor,
                             column_ptr: Tensor, column: Tensor, scale: float, block_q: int, block_k: int,
                             query_lengths: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; products in the dtype of the inputs, sums in fp32, P cast to V's dtype before P V."""
    batch, heads, lq, width = query.shape
    lk = key.shape[2]
    nq = -(-lq // block_q)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    lse = torch.empty(batch, heads, lq, dtype=torch.float32, device=query.device)
    if not batch * heads * nq:
        return out, lse
    start, full, end = split_rows(row_ptr, col, True, block_q, block_k, query_lengths, key_lengths)
    work = (end - start) * block_k + (column_ptr[..., 1:] - column_ptr[..., :-1]).reshape(-1)
    order = torch.argsort(work, descending=True, stable=True).to(torch.int32)  # long rows first: an even tail
    launch = config.attention(_arch(query.device), block_q, block_k, width, query.element_size())
    vertical_slash_forward[(batch * heads * nq,)](
        query, key, value, out, lse, start, full, end, col, column_ptr.contiguous(), column, order,
        query_lengths.to(torch.int32), key_lengths.to(torch.int32), scale * LOG2_E, heads, heads // key.shape[1], nq,
        lq, lk, D=width, BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_Q=block_q, BLOCK_K=block_k,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=launch.num_warps,
        num_stages=launch.num_stages)
    return out, lse


def compile_jobs() -> list[dict[str, Any]]:
    """What is compiled ahead of time: kernel, signature and constants."""
    jobs = []
    pointers = ("ROW_START", "ROW_FULL", "ROW_END", "COL", "COLUMN_PTR", "COLUMN", "ORDER", "Q_LEN", "K_LEN")
    for dtype in ("fp16", "bf16"):
        for dim in (64, 128):
            for block in (64, 128):
                signature = {n: f"*{dtype}" for n in ("Q", "K", "V", "O")} | {"LSE": "*fp32"}
                signature |= {n: "*i32" for n in pointers} | {"scale_log2": "fp32"}
                signature |= {n: "i32" for n in ("heads", "group", "nq", "lq", "lk")}
                jobs.append({
                    "name": f"vertical_slash_forward {dtype} D{dim} block{block}", "kernel": vertical_slash_forward,
                    "signature": signature, "head_dim": dim, "block": block,
                    "constants": {"D": dim, "BLOCK_D": dim, "BLOCK_Q": block, "BLOCK_K": block, "PRECISION": "tf32"}})
    return jobs
