# mypy: disable-error-code="no-untyped-def"
"""Quantisation in Triton: each input is read once in its own dtype. Imported only where Triton is wanted.

The arithmetic is that of ``quantizers``, in fp32 with IEEE division, so that integers and scales are the same bit for
bit. Only the mean of the keys may differ, in fp32's last bits: it is summed in another order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.mean.triton import block_mean
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.quantized.quantizers import LARGEST, LARGEST_P, LOG2_E, Bits, Quantized

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
    """(B, H, 1, D), fp32: as :func:`looseleaf_kernels.quantized.quantizers.key_mean`, to rounding."""
    means = block_mean(key, MEAN_BLOCK, lengths)
    first = torch.arange(means.shape[2], device=key.device) * MEAN_BLOCK
    valid = (lengths[:, None] - first).clamp(0, MEAN_BLOCK)
    weight = valid / lengths[:, None].clamp(min=1)
    return (means * weight[:, None, :, None]).sum(2, keepdim=True)


def quantize(query: Tensor, key: Tensor, value: Tensor, problem: Problem, bits: Bits) -> Quantized:
    """As :func:`looseleaf_kernels.quantized.quantizers.quantize`, with V laid out as the Triton kernel reads it.

    Quantised V is transposed in its blocks, (B, Hkv, Nk, D, block_k). V in floats is the input, padding included.
    """
    batch, kv_heads, lk, head_dim = key.shape
    block, device = problem.block_k, key.device
    nk = -(-lk // block)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if bits.smooth_key:
        mean = key_mean(key, problem.key_lengths)
    else:
        mean = torch.zeros(batch, kv_heads, 1, head_dim, device=device)
    taken = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    q, q_factor = _rows(query, mean, taken, problem, bits, keys=False)
    k, k_scale = _rows(key, mean, taken, problem, bits, keys=True)
    if bits.pv == 16:
        return Quantized(q, q_factor, k, k_scale, value, None, 0, taken)
    v = torch.empty(batch, kv_heads, nk, head_dim, block, dtype=torch.int8, device=device)
    v_scale = torch.empty(batch, kv_heads, nk, head_dim, dtype=torch.float32, device=device)
    quantize_columns[(nk, batch * kv_heads)](
        value, v, v_scale, problem.key_lengths.to(torch.int32), float(LARGEST[bits.pv]), kv_heads, lk, nk,
        **_options(device, block, head_dim))
    return Quantized(q, q_factor, k, k_scale, v, v_scale, LARGEST_P[bits.pv], taken)


def _rows(x: Tensor, mean: Tensor, taken: Tensor, problem: Problem, bits: Bits, *, keys: bool) -> tuple[Tensor, Tensor]:
    """Integers and scales of keys; or of queries, whose scales get the factors of the softmax, filling ``taken``."""
    batch, heads, length, head_dim = x.shape
    block, lengths = (problem.block_k, problem.key_lengths) if keys else (problem.block_q, problem.query_lengths)
    count = -(-length // block)
    integers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, count, dtype=torch.float32, device=x.device)
    quantize_rows[(count, batch * heads)](
        x, integers, scale, mean, taken, lengths.to(torch.int32), float(LARGEST[bits.qk]),
        1.0 if keys else problem.scale * LOG2_E, problem.scale, heads, heads // mean.shape[1], length, count, KEYS=keys,
        **_options(x.device, block, head_dim))
    return integers, scale


def _options(device: torch.device, block: int, head_dim: int) -> dict[str, int]:
    """Constants and launch parameters of both kernels."""
    options = launch.quantizer(launch.architecture(device), block, head_dim).options()
    return {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK": block, **options}


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time: queries in blocks of 64 and 128, keys and values of 64."""
    tensors = {"p_i8": "INTEGERS", "p_i32": "LENGTHS", "fp32": "largest", "i32": "heads length count"}
    columns = {**tensors, "p_fp32": "SCALE"}
    rows = {**tensors, "p_fp32": "SCALE MEAN TAKEN", "fp32": "largest factor softmax_scale",
            "i32": "heads group length count"}
    kinds: list[tuple[str, Any, dict[str, str], int, dict[str, bool]]] = [
        ("quantize_rows q", quantize_rows, rows, 64, {"KEYS": False}),
        ("quantize_rows q", quantize_rows, rows, 128, {"KEYS": False}),
        ("quantize_rows k", quantize_rows, rows, 64, {"KEYS": True}),
        ("quantize_columns v", quantize_columns, columns, 64, {})]
    return [launch.Job(f"{name} {dtype} D{head_dim} block{block}", kernel,
                       launch.types(**names, **{f"p_{dtype}": "X"}),
                       {"D": head_dim, "BLOCK_D": head_dim, "BLOCK": block, **constants},
                       partial(launch.quantizer, block=block, head_dim=head_dim))
            for dtype in ("fp16", "bf16") for head_dim in (64, 128) for name, kernel, names, block, constants in kinds]
