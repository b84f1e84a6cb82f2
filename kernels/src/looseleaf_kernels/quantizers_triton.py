# mypy: disable-error-code="no-untyped-def"
"""Quantisation in Triton: each input is read once in its own dtype. Imported only where Triton is wanted.

The arithmetic is that of ``quantizers``, in fp32 with IEEE division, so that integers and scales are the same bit for
bit. Only the mean of the keys may differ, in fp32's last bits: it is summed in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import config
from looseleaf_kernels.quantizers import LARGEST, LARGEST_P, LOG2_E, Quantized
from looseleaf_kernels.triton_kernels import _arch, block_mean

MEAN_BLOCK = 128
"""Keys that one program of the mean's first step sums."""


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """Largest \\|x\\| along an axis. As integers, because the maximum of floats on a GPU passes over NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def round_to_int8(x, scale, largest):
    """x / scale, rounded half to even, within +-largest. Where the scale is NaN: 0, as plain torch has it."""
    x = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    # fp32 has no fraction from 2^23 on: adding 1.5 * 2^23 rounds what is smaller than 2^22, and half to even.
    x = (x + 12582912.0) - 12582912.0
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -largest), largest).to(tl.int8)


@triton.jit
def quantize_rows(X, INTEGERS, SCALE, MEAN, TAKEN, LENGTHS, largest, factor, softmax_scale, heads, group, length,
                  count, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """One block of one head with one scale. The mean of the keys: taken from keys; times queries, what that took from
    the scores of each row."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (at < length)[:, None] & (d < D)[None, :]
    valid = (at < tl.load(LENGTHS + head // heads))[:, None] & inside
    offsets = head.to(tl.int64) * length * D + at[:, None] * D + d[None, :]
    x = tl.load(X + offsets, mask=valid, other=0.0).to(tl.float32)
    mean = tl.load(MEAN + (head // group) * D + d, mask=d < D, other=0.0)
    if KEYS:
        x = tl.where(valid, x - mean[None, :], 0.0)
    else:
        taken = tl.sum(x * mean[None, :], 1) * softmax_scale
        tl.store(TAKEN + head.to(tl.int64) * length + at, taken, mask=at < length)
    most = tl.max(largest_magnitude(x, 1), 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, largest)
    tl.store(INTEGERS + offsets, round_to_int8(x, scale, largest), mask=inside)
    tl.store(SCALE + head * count + block, scale * factor)


@triton.jit
def quantize_columns(X, INTEGERS, SCALE, LENGTHS, largest, heads, length, count,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one head with one scale for each channel, written transposed: (D, BLOCK)."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    d = tl.arange(0, BLOCK_D)
    d_ok = d < D
    valid = ((at < tl.load(LENGTHS + head // heads)) & (at < length))[:, None] & d_ok[None, :]
    x = tl.load(X + head.to(tl.int64) * length * D + at[:, None] * D + d[None, :], mask=valid, other=0.0)
    x = x.to(tl.float32)
    scale = tl.div_rn(largest_magnitude(x, 0).to(tl.float32, bitcast=True), largest)
    row = head.to(tl.int64) * count + block
    tl.store(INTEGERS + row * (D * BLOCK) + d[None, :] * BLOCK + lane[:, None],
             round_to_int8(x, scale[None, :], largest), mask=d_ok[None, :])
    tl.store(SCALE + row * D + d, scale, mask=d_ok)


def key_mean(key: Tensor, lengths: Tensor) -> Tensor:
    """(B, H, 1, D), fp32: as :func:`looseleaf_kernels.quantizers.key_mean`, to rounding."""
    means = block_mean(key, MEAN_BLOCK, lengths)
    first = torch.arange(means.shape[2], device=key.device) * MEAN_BLOCK
    valid = (lengths[:, None] - first).clamp(0, MEAN_BLOCK)
    weight = valid / lengths[:, None].clamp(min=1)
    return (means * weight[:, None, :, None]).sum(2, keepdim=True)


def quantize_all(query: Tensor, key: Tensor, value: Tensor, scale: float, block_q: int, block_k: int,
                 query_lengths: Tensor, key_lengths: Tensor, qk_bits: int, pv_bits: int, smooth: bool) -> Quantized:
    """As :func:`looseleaf_kernels.quantizers.quantize_all`, with V laid out as the Triton kernel reads it.

    Quantised V is transposed in its blocks, (B, Hkv, Nk, D, block_k). V in floats is the input, padding included.
    """
    batch, kv_heads, lk, width = key.shape
    nk, device = -(-lk // block_k), key.device
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    q_len, k_len = query_lengths.to(torch.int32), key_lengths.to(torch.int32)
    mean = key_mean(key, key_lengths) if smooth else torch.zeros(batch, kv_heads, 1, width, device=device)
    taken = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    group, largest = query.shape[1] // kv_heads, float(LARGEST[qk_bits])
    q, q_factor = _rows(query, mean, taken, q_len, largest, scale * LOG2_E, scale, group, block_q, False)
    k, k_scale = _rows(key, mean, taken, k_len, largest, 1.0, scale, 1, block_k, True)
    if pv_bits == 16:
        return Quantized(q, q_factor, k, k_scale, value, None, 0, taken)
    v = torch.empty(batch, kv_heads, nk, width, block_k, dtype=torch.int8, device=device)
    v_scale = torch.empty(batch, kv_heads, nk, width, dtype=torch.float32, device=device)
    launch = config.quantizer(_arch(device), block_k, width)
    quantize_columns[(nk, batch * kv_heads)](
        value, v, v_scale, k_len, float(LARGEST[pv_bits]), kv_heads, lk, nk, D=width,
        BLOCK_D=triton.next_power_of_2(width), BLOCK=block_k, num_warps=launch.num_warps, num_stages=launch.num_stages)
    return Quantized(q, q_factor, k, k_scale, v, v_scale, LARGEST_P[pv_bits], taken)


def _rows(x: Tensor, mean: Tensor, taken: Tensor, lengths: Tensor, largest: float, factor: float, softmax_scale: float,
          group: int, block: int, keys: bool) -> tuple[Tensor, Tensor]:
    """Integers and the blocks' scales times ``factor``; for queries also fills ``taken``."""
    batch, heads, length, width = x.shape
    count = -(-length // block)
    integers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, count, dtype=torch.float32, device=x.device)
    launch = config.quantizer(_arch(x.device), block, width)
    quantize_rows[(count, batch * heads)](
        x, integers, scale, mean, taken, lengths, largest, factor, softmax_scale, heads, group, length, count, D=width,
        BLOCK_D=triton.next_power_of_2(width), BLOCK=block, KEYS=keys, num_warps=launch.num_warps,
        num_stages=launch.num_stages)
    return integers, scale


def compile_jobs(head_dims: tuple[int, ...] = (64, 128), blocks_q: tuple[int, ...] = (64, 128),
                 blocks_k: tuple[int, ...] = (64,)) -> list[dict[str, Any]]:
    """What is compiled ahead of time: as :func:`looseleaf_kernels.triton_kernels.compile_jobs`."""
    jobs: list[dict[str, Any]] = []
    sizes = {n: "i32" for n in ("heads", "length", "count")}
    for dtype in ("fp16", "bf16"):
        outputs = {"X": f"*{dtype}", "INTEGERS": "*i8", "SCALE": "*fp32", "LENGTHS": "*i32", "largest": "fp32"}
        more = {"MEAN": "*fp32", "TAKEN": "*fp32", "factor": "fp32", "softmax_scale": "fp32", "group": "i32"}
        for dim in head_dims:
            kinds: list[tuple[str, Any, dict[str, str], int, dict[str, Any]]] = [
                ("quantize_rows q", quantize_rows, outputs | more, block, {"KEYS": False}) for block in blocks_q]
            kinds += [("quantize_rows k", quantize_rows, outputs | more, block, {"KEYS": True}) for block in blocks_k]
            kinds += [("quantize_columns v", quantize_columns, outputs, block, {}) for block in blocks_k]
            jobs += [{"name": f"{name} {dtype} D{dim} block{block}", "kernel": kernel, "signature": signature | sizes,
                      "launch": (config.quantizer, block, dim),
                      "constants": {"D": dim, "BLOCK_D": dim, "BLOCK": block, **constants}}
                     for name, kernel, signature, block, constants in kinds]
    return jobs
