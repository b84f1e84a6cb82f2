# mypy: disable-error-code="no-untyped-def"
"""Block importance in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.tiles import LOG2_E, common_jobs, lengths, load_queries, online_softmax, options


@triton.jit
def scores(q, K, keys, last, k_len, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of one block, times log2(e); -inf for keys behind a row's last."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(K + keys[None, :] * D + d[:, None], mask=(d < D)[:, None] & (keys < k_len)[None, :], other=0.0)
    s = tl.dot(q, k, input_precision=PRECISION) * scale_log2
    return tl.where(keys[None, :] <= last[:, None], s, float("-inf"))


@triton.jit
def importance_forward(Q, K, OUT, Q_LEN, K_LEN, scale_log2, heads, group, nq, nk, lq, lk,
                       D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                       CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """One query block of one head: first the log-sum-exp of each row, then the sum of each block. All sums are fp32."""
    block = nq - 1 - tl.program_id(0)  # long rows first: an even tail
    head = tl.program_id(1) % heads
    item = tl.program_id(1) // heads
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    lane = tl.arange(0, BLOCK_K)
    k_base = (item * (heads // group) + head // group).to(tl.int64) * lk * D
    out_base = ((item * heads + head).to(tl.int64) * nq + block) * nk
    row_ok = at < q_len
    q = load_queries(Q, item * heads + head, at, row_ok, lq, D, BLOCK_D)
    last = tl.where(row_ok, k_len - 1, -1)
    if CAUSAL:
        last = tl.minimum(last, at + k_len - q_len)
    blocks = (tl.max(last, 0) + BLOCK_K) // BLOCK_K  # those with a key that some row sees
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    for n in range(0, blocks):
        s = scores(q, K + k_base, n * BLOCK_K + lane, last, k_len, scale_log2, D, BLOCK_D, PRECISION)
        top, total, _, _ = online_softmax(s, top, total, True)

    lse = tl.where(total > 0, top + tl.math.log2(tl.where(total > 0, total, 1.0)), 0.0)
    for n in range(0, nk):
        importance = 0.0
        if n < blocks:
            s = scores(q, K + k_base, n * BLOCK_K + lane, last, k_len, scale_log2, D, BLOCK_D, PRECISION)
            importance = tl.sum(tl.sum(tl.math.exp2(s - lse[:, None]), 1), 0)
        tl.store(OUT + out_base + n, importance)


def block_importance(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """As the reference; products in the dtype of the inputs, everything else in fp32."""
    batch, heads, lq, _ = query.shape
    kv_heads, lk = key.shape[1:3]
    nq, nk = -(-lq // problem.block_q), -(-lk // problem.block_k)
    out = torch.zeros(batch, heads, nq, nk, dtype=torch.float32, device=query.device)
    if out.numel():
        importance_forward[(nq, batch * heads)](
            query.contiguous(), key.contiguous(), out, *lengths(problem), problem.scale * LOG2_E, heads,
            heads // kv_heads, nq, nk, lq, lk, CAUSAL=problem.causal,
            **options(query, problem.block_q, problem.block_k))
    return out


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    types = launch.types(p_fp32="OUT", p_i32="Q_LEN K_LEN", fp32="scale_log2", i32="heads group nq nk lq lk")
    return [job for causal in (True, False) for job in common_jobs(
        importance_forward, " causal" if causal else " full", types, "Q K", CAUSAL=causal)]
