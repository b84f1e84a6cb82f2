# mypy: disable-error-code="no-untyped-def"
"""Quantised block-sparse attention in Triton: int8 products with int32 sums. Imported only where Triton is wanted.

4-bit P and V lie in int8: GPUs after sm_80 have no 4-bit product. They show the error of 4 bits and are no faster than
8. Q, K and V come as integers from ``quantizers_triton``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import config, quantizers_triton
from looseleaf_kernels.quantized_cpu import full_until
from looseleaf_kernels.quantizers import P_FLOOR, Quantized
from looseleaf_kernels.triton_kernels import _arch


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
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = new_top
    if MASKED:
        # A row that has seen no key yet has a maximum of -inf: subtract 0 there, or -inf - -inf is NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.math.exp2(s - safe[:, None])
    shrink = tl.math.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
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
    return new_top, total, acc


@triton.jit
def quantized_forward(Q, K, V, O, LSE, TAKEN, Q_FACTOR, K_SCALE, V_SCALE, ROW_START, ROW_FULL,  # noqa: E741
                      ROW_END, COL, ORDER, Q_LEN, K_LEN, p_largest, p_floor, heads, group, nq, nk, lq, lk,
                      D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                      CAUSAL: tl.constexpr, QUANTIZED: tl.constexpr, PRECISION: tl.constexpr):
    """One query block of one head. Entries up to ROW_FULL need no mask; those up to ROW_END do."""
    row = tl.load(ORDER + tl.program_id(0))
    block = row % nq
    head = (row // nq) % heads
    item = row // (nq * heads)
    kv_head = item * (heads // group) + head // group
    q_len = tl.load(Q_LEN + item)
    k_len = tl.load(K_LEN + item)
    at = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    row_ok = at < q_len
    d_ok = d < D
    q_base = (item * heads + head).to(tl.int64) * lq * D
    q = tl.load(Q + q_base + at[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0)
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

    some = total != 0
    safe_total = tl.where(some, total, 1.0)
    out = tl.where(some[:, None], acc / safe_total[:, None], 0.0)
    inside = at < lq
    lse_at = (item * heads + head).to(tl.int64) * lq + at
    taken = tl.load(TAKEN + lse_at, mask=inside, other=0.0)
    lse = tl.where(some, (top + tl.math.log2(safe_total)) * 0.6931471805599453 + taken, float("-inf"))
    tl.store(O + q_base + at[:, None] * D + d[None, :], out.to(O.dtype.element_ty),
             mask=inside[:, None] & d_ok[None, :])
    tl.store(LSE + lse_at, lse, mask=inside)


def quantized_block_sparse_attention(x: Quantized, row_ptr: Tensor, col: Tensor, causal: bool, block_q: int,
                                     block_k: int, query_lengths: Tensor, key_lengths: Tensor,
                                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the reference; x is from ``quantizers_triton``, which says how V lies.

    P may differ from the reference in the last bits of exp2, and then, at a rounding edge, in one integer.
    """
    batch, heads, lq, width = x.q.shape
    kv_heads, lk = x.k.shape[1], x.k.shape[2]
    nq, nk = x.q_factor.shape[2], x.k_scale.shape[2]
    out = torch.empty(batch, heads, lq, width, dtype=dtype, device=x.q.device)
    lse = torch.empty(batch, heads, lq, dtype=torch.float32, device=x.q.device)
    quantized = x.v_scale is not None
    start = row_ptr[..., :-1].reshape(-1).contiguous()
    end = row_ptr[..., 1:].reshape(-1).contiguous()
    full = full_until(row_ptr, col, causal, block_q, block_k, query_lengths, key_lengths).to(torch.int32)
    order = torch.argsort(end - start, descending=True, stable=True).to(torch.int32)  # long rows first: an even tail
    launch = config.quantized_attention(_arch(x.q.device), block_q, block_k, width, x.v.element_size())
    quantized_forward[(batch * heads * nq,)](
        x.q, x.k, x.v, out, lse, x.taken, x.q_factor, x.k_scale, x.v_scale if x.v_scale is not None else x.k_scale,
        start, full, end, col, order,
        query_lengths.to(torch.int32), key_lengths.to(torch.int32), float(x.p_largest), P_FLOOR, heads,
        heads // kv_heads, nq, nk, lq, lk, D=width, BLOCK_D=max(32, triton.next_power_of_2(width)), BLOCK_Q=block_q,
        BLOCK_K=block_k, CAUSAL=causal, QUANTIZED=quantized,
        PRECISION="ieee" if x.v.dtype == torch.float32 else "tf32",
        num_warps=launch.num_warps, num_stages=launch.num_stages)
    return out, lse


def compile_jobs(head_dims: tuple[int, ...] = (64, 128),
                 blocks: tuple[tuple[int, int], ...] = ((64, 64), (128, 64))) -> list[dict[str, Any]]:
    """What is compiled ahead of time: as :func:`looseleaf_kernels.triton_kernels.compile_jobs`."""
    jobs = quantizers_triton.compile_jobs(head_dims, tuple(sorted({q for q, _ in blocks})),
                                          tuple(sorted({k for _, k in blocks})))
    for values, out in (("i8", "fp16"), ("i8", "bf16"), ("fp16", "fp16"), ("bf16", "bf16")):
        for dim in head_dims:
            for block_q, block_k in blocks:
                for causal in (True, False):
                    signature = {"Q": "*i8", "K": "*i8", "V": f"*{values}", "O": f"*{out}", "LSE": "*fp32"}
                    signature |= {n: "*fp32" for n in ("TAKEN", "Q_FACTOR", "K_SCALE", "V_SCALE")}
                    signature |= {n: "*i32" for n in ("ROW_START", "ROW_FULL", "ROW_END", "COL", "ORDER", "Q_LEN",
                                                      "K_LEN")}
                    signature |= {n: "fp32" for n in ("p_largest", "p_floor")}
                    signature |= {n: "i32" for n in ("heads", "group", "nq", "nk", "lq", "lk")}
                    jobs.append({
                        "name": f"quantized_forward {values} D{dim} {block_q}x{block_k} "
                                f"{'causal' if causal else 'full'}{f' to {out}' if values == 'i8' else ''}",
                        "kernel": quantized_forward, "signature": signature,
                        "launch": (config.quantized_attention, block_q, block_k, dim, 1 if values == "i8" else 2),
                        "constants": {"D": dim, "BLOCK_D": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k,
                                      "CAUSAL": causal, "QUANTIZED": values == "i8", "PRECISION": "tf32"}})
    return jobs
