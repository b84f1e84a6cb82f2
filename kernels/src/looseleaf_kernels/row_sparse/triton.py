# mypy: disable-error-code="no-untyped-def"
"""Attention of every query to keys of its own in Triton, by gathered loads: no tensor cores. Imported only where
Triton is installed and wanted."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.tiles import LN_2, LOG2_E, lengths

TILE = 32
"""Keys that are gathered at once."""


@triton.jit
def row_sparse_forward(Q, K, V, INDEX, O, LSE, Q_LEN, K_LEN, scale_log2, heads, group, lq, lk, many,  # noqa: E741
                       D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr):
    """One query of one head."""
    at = tl.program_id(0)
    head = tl.program_id(1)
    item = head // heads
    q_len = tl.load(Q_LEN + item)
    bound = tl.load(K_LEN + item)
    if CAUSAL:
        bound = tl.minimum(bound, at + bound - q_len + 1)
    bound = tl.where(at < q_len, bound, 0)
    d = tl.arange(0, BLOCK_D)
    row = head.to(tl.int64) * lq + at
    base = (item * (heads // group) + head % heads // group).to(tl.int64) * lk * D
    q = tl.load(Q + row * D + d, mask=d < tl.where(at < q_len, D, 0), other=0.0).to(tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, many, TILE):
        lane = start + tl.arange(0, TILE)
        keys = tl.load(INDEX + row * many + lane, mask=lane < many, other=-1)
        seen = (keys >= 0) & (keys < bound)
        place = base + keys[:, None] * D + d[None, :]
        inside = seen[:, None] & (d < D)[None, :]
        k = tl.load(K + place, mask=inside, other=0.0).to(tl.float32)
        s = tl.where(seen, tl.sum(k * q[None, :], 1) * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(s - safe)
        shrink = tl.math.exp2(top - safe)
        v = tl.load(V + place, mask=inside, other=0.0).to(tl.float32)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        total = total * shrink + tl.sum(p, 0)
        top = new_top
    some = total != 0  # NaN stays NaN
    safe_total = tl.where(some, total, 1.0)
    tl.store(O + row * D + d, tl.where(some, acc / safe_total, 0.0).to(O.dtype.element_ty), mask=d < D)
    lse = tl.where(some, (top + tl.math.log2(safe_total)) * LN_2, float("-inf"))
    tl.store(LSE + row + tl.arange(0, 1), lse)


def row_sparse_attention(query: Tensor, key: Tensor, value: Tensor, index: Tensor,
                         problem: Problem) -> tuple[Tensor, Tensor]:
    """As the reference; everything in fp32."""
    batch, heads, lq, width = query.shape
    kv_heads, lk = key.shape[1:3]
    query = query.contiguous()
    out = torch.empty_like(query)
    lse = torch.empty(batch, heads, lq, dtype=torch.float32, device=query.device)
    row_sparse_forward[(lq, batch * heads)](
        query, key.contiguous(), value.contiguous(), index.to(torch.int32).contiguous(), out, lse, *lengths(problem),
        problem.scale * LOG2_E, heads, heads // kv_heads, lq, lk, index.shape[3], D=width,
        BLOCK_D=triton.next_power_of_2(width), TILE=TILE, CAUSAL=problem.causal,
        **launch.row_sparse("", width).options())
    return out, lse


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    types = launch.types(p_i32="INDEX Q_LEN K_LEN", p_fp32="LSE", fp32="scale_log2", i32="heads group lq lk many")
    return [launch.Job(
        f"row_sparse_forward {dtype} D{width} full", row_sparse_forward,
        {**types, **launch.types(**{f"p_{dtype}": "Q K V O"})},
        {"D": width, "BLOCK_D": width, "TILE": TILE, "CAUSAL": False}, partial(launch.row_sparse, head_dim=width))
        for dtype in ("fp16", "bf16") for width in (64, 128)]
