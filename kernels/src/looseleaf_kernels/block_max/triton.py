# mypy: disable-error-code="no-untyped-def"
"""Largest scores of blocks in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.tiles import common_jobs, lengths, load_queries, options


@triton.jit
def score_max_forward(Q, K, OUT, Q_LEN, K_LEN, scale, heads, group, nq, nk, lq, lk,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                      CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """One pair of blocks: the positive scores of all heads added up, and their largest."""
    row = tl.program_id(0) // nk
    column = tl.program_id(0) % nk
    item = tl.program_id(1)
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = column * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    seen = (at < q_len)[:, None] & (keys < k_len)[None, :]
    many = heads
    if CAUSAL:
        seen = seen & (keys[None, :] <= (at + k_len - q_len)[:, None])
        if column * BLOCK_K > row * BLOCK_Q + BLOCK_Q - 1 + k_len - q_len:
            many = 0  # no pair of this block is seen
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for head in range(0, many):
        q = load_queries(Q, item * heads + head, at, at < q_len, lq, D, BLOCK_D)
        base = (item * (heads // group) + head // group).to(tl.int64) * lk * D
        k = tl.load(K + base + keys[None, :] * D + d[:, None], mask=(d < D)[:, None] & (keys < k_len)[None, :],
                    other=0.0)
        total += tl.maximum(tl.dot(q, k, input_precision=PRECISION), 0.0)
    total = tl.where(seen, total, 0.0)
    tl.store(OUT + (item.to(tl.int64) * nq + row) * nk + column, tl.max(tl.max(total, 1), 0) * scale)


def block_score_max(query: Tensor, key: Tensor, problem: Problem) -> Tensor:
    """As the reference; products in the dtype of the inputs, everything else in fp32."""
    batch, heads, lq, _ = query.shape
    kv_heads, lk = key.shape[1:3]
    nq, nk = -(-lq // problem.block_q), -(-lk // problem.block_k)
    out = torch.empty(batch, nq, nk, dtype=torch.float32, device=query.device)
    if out.numel():
        score_max_forward[(nq * nk, batch)](
            query.contiguous(), key.contiguous(), out, *lengths(problem), problem.scale, heads, heads // kv_heads,
            nq, nk, lq, lk, CAUSAL=problem.causal, **options(query, problem.block_q, problem.block_k))
    return out


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    types = launch.types(p_fp32="OUT", p_i32="Q_LEN K_LEN", fp32="scale", i32="heads group nq nk lq lk")
    return [job for causal in (True, False) for job in common_jobs(
        score_max_forward, " causal" if causal else " full", types, "Q K", CAUSAL=causal)]
