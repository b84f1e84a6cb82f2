# mypy: disable-error-code="no-untyped-def"
"""Quantised block-sparse attention in Triton: int8 products with int32 sums. Imported only where Triton is wanted.

4-bit P and V lie in int8: GPUs after sm_80 have no 4-bit product. They show the error of 4 bits and are no faster than
8. Q, K and V come as integers from ``quantizers_triton``.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.quantized import quantizers_triton
from looseleaf_kernels.quantized.quantizers import P_FLOOR, Quantized
from looseleaf_kernels.rows import Rows
from looseleaf_kernels.tiles import LN_2, constants, load_queries, locate, online_softmax, row_arguments, store_rows


@triton.jit
def quantized_step(top, total, acc, q, q_factor, K, V, K_SCALE, V_SCALE, column, kv_head, k_len, position, row_ok, nk,
                   lk, p_largest, p_floor,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
                   CAUSAL: tl.constexpr, QUANTIZED: tl.constexpr, PRECISION: tl.constexpr):
    """One key block: the new running maximum, sum and accumulator."""
    keys = column * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    d_ok = d < D
    in_block = kv_head.to(tl.int64) * nk + column
    rows = kv_head.to(tl.int64) * lk + keys
    key_ok = keys < k_len
    k_mask = d_ok[:, None]
    if MASKED:
        k_mask = k_mask & key_ok[None, :]
    k = tl.load(K + rows[None, :] * D + d[:, None], mask=k_mask, other=0)
    s = tl.dot(q, k).to(tl.float32) * (q_factor * tl.load(K_SCALE + in_block))
    if MASKED:
        # Padded queries see nothing: what they hold must not count for the scale of P.
        seen = key_ok[None, :] & row_ok[:, None]
        if CAUSAL:
            seen = seen & (keys[None, :] <= position[:, None])
        s = tl.where(seen, s, float("-inf"))
    top, total, p, shrink = online_softmax(s, top, total, MASKED)
    acc = acc * shrink[:, None]
    if QUANTIZED:
        # V lies transposed in blocks, (D, BLOCK_K): int8 products on sm_90 want the summed dimension contiguous.
        at = in_block * (D * BLOCK_K) + d[None, :] * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        v = tl.load(V + at, mask=d_ok[None, :], other=0)
        v_scale = tl.load(V_SCALE + in_block * D + d, mask=d_ok, other=0.0)
        most = tl.max(tl.max(p, 1), 0)
        inverse = tl.where(most > p_floor, tl.div_rn(p_largest, tl.maximum(most, p_floor)), 0.0)
        integers = (p * inverse + 0.5).to(tl.int8)  # cut off, which is floor: P is not negative
        acc += tl.dot(integers, v).to(tl.float32) * (tl.div_rn(most, p_largest) * v_scale)[None, :]
    else:
        v_mask = d_ok[None, :]
        if MASKED:
            v_mask = v_mask & key_ok[:, None]
        v = tl.load(V + rows[:, None] * D + d[None, :], mask=v_mask, other=0.0)
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return top, total, acc


@triton.jit
def quantized_forward(Q, K, V, O, LSE, TAKEN, Q_FACTOR, K_SCALE, V_SCALE, ROW_START, ROW_FULL,  # noqa: E741
                      ROW_END, COL, ORDER, Q_LEN, K_LEN, p_largest, p_floor, heads, group, nq, nk, lq, lk,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                      CAUSAL: tl.constexpr, QUANTIZED: tl.constexpr, PRECISION: tl.constexpr):
    """One query block of one head. Entries up to ROW_FULL need no mask; those up to ROW_END do."""
    row = tl.load(ORDER + tl.program_id(0))
    item, head, kv_head, block = locate(row, heads, group, nq)
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok = at < q_len
    q = load_queries(Q, head, at, row_ok, lq, D, BLOCK_D)
    q_factor = tl.load(Q_FACTOR + row)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    position = at + k_len - q_len

    for entry in range(tl.load(ROW_START + row), tl.load(ROW_FULL + row)):
        top, total, acc = quantized_step(
            top, total, acc, q, q_factor, K, V, K_SCALE, V_SCALE, tl.load(COL + entry), kv_head, k_len, position,
            row_ok, nk, lk, p_largest, p_floor, D, BLOCK_D, BLOCK_K, False, CAUSAL, QUANTIZED, PRECISION)
    for entry in range(tl.load(ROW_FULL + row), tl.load(ROW_END + row)):
        top, total, acc = quantized_step(
            top, total, acc, q, q_factor, K, V, K_SCALE, V_SCALE, tl.load(COL + entry), kv_head, k_len, position,
            row_ok, nk, lk, p_largest, p_floor, D, BLOCK_D, BLOCK_K, True, CAUSAL, QUANTIZED, PRECISION)

    some = total != 0  # NaN stays NaN
    safe_total = tl.where(some, total, 1.0)
    out = tl.where(some[:, None], acc / safe_total[:, None], 0.0)
    taken = tl.load(TAKEN + head.to(tl.int64) * lq + at, mask=at < lq, other=0.0)
    lse = tl.where(some, (top + tl.math.log2(safe_total)) * LN_2 + taken, float("-inf"))
    store_rows(O, LSE, out, lse, head, at, lq, D, BLOCK_D)


def quantized_block_sparse_attention(x: Quantized, blocks: Csr, problem: Problem,
                                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference; x is from ``quantizers_triton``, which says how V lies.

    P may differ from the reference in the last bits of exp2, and then, at a rounding edge, in one integer.
    """
    batch, heads, lq, head_dim = x.q.shape
    kv_heads, lk = x.k.shape[1:3]
    out = torch.empty(batch, heads, lq, head_dim, dtype=dtype, device=x.q.device)
    lse = torch.empty(batch, heads, lq, dtype=torch.float32, device=x.q.device)
    rows, sizes = Rows(blocks, problem), (problem.block_q, problem.block_k)
    arch = launch.architecture(x.q.device)
    quantized_forward[(len(rows.item),)](
        x.q, x.k, x.v, out, lse, x.taken, x.q_factor, x.k_scale, x.v_scale if x.v_scale is not None else x.k_scale,
        *row_arguments(rows, rows.ends - rows.starts, mask_padding=True), float(x.p_largest), P_FLOOR, heads,
        heads // kv_heads, rows.count, x.k_scale.shape[2], lq, lk, CAUSAL=problem.causal,
        QUANTIZED=x.v_scale is not None, **constants(head_dim, *sizes, x.v.dtype, least=32),
        **launch.quantized_attention(arch, *sizes, head_dim, x.v.element_size()).options())
    return out, lse


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time, the quantisers with it."""
    jobs = quantizers_triton.compile_jobs()
    kinds = (("i8", "fp16"), ("i8", "bf16"), ("fp16", "fp16"), ("bf16", "bf16"))
    for (values, out), head_dim, block_q, causal in product(kinds, (64, 128), (64, 128), (True, False)):
        pointers = {"p_i8": "Q K", "p_i32": "ROW_START ROW_FULL ROW_END COL ORDER Q_LEN K_LEN",
                    "p_fp32": "LSE TAKEN Q_FACTOR K_SCALE V_SCALE"}
        jobs.append(launch.Job(
            f"quantized_forward {values} D{head_dim} {block_q}x64 {'causal' if causal else 'full'}"
            f"{f' to {out}' if values == 'i8' else ''}", quantized_forward,
            launch.types(**pointers, fp32="p_largest p_floor", i32="heads group nq nk lq lk")
            | {"V": f"*{values}", "O": f"*{out}"},
            {**constants(head_dim, block_q, 64, torch.float16), "CAUSAL": causal, "QUANTIZED": values == "i8"},
            partial(launch.quantized_attention, block_q=block_q, block_k=64, head_dim=head_dim,
                    value_itemsize=1 if values == "i8" else 2)))
    return jobs
