"""Symmetric quantisation of queries, keys and values in blocks of rows, and the smoothing of keys.

Plain torch code, which the implementations of the quantised attention share but for the Triton one: that has the same
arithmetic in kernels of its own (``quantizers_triton``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from looseleaf_kernels.problem import Problem, lengths_of
from looseleaf_kernels.shapes import BlockVectors, Lengths, RowBlocks, VectorIntegers, Vectors

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LARGEST = {8: 127, 4: 7}
"""Largest magnitude of a signed integer of so many bits; -128 and -8 are not used, so that the range is symmetric."""
LARGEST_P = {8: 127, 4: 15}
"""Largest integer of P, which is never negative: 8 bits stop at 127 because int8 products want signed numbers, 4 bits
are unsigned and lie in int8."""
P_FLOOR = 2.0 ** -64
"""A block of P with no entry above this adds nothing to the output (its own scale would come near fp32's smallest)."""


class Bits(NamedTuple):
    """How Q, K and V become integers.

    Attributes:
        qk: bits of Q and K.
        pv: bits of P and V; 16: V stays as it is.
        smooth_key: whether the mean of the keys is taken from them first.
    """

    qk: int
    pv: int
    smooth_key: bool


class Quantized(NamedTuple):
    """What the implementations multiply.

    Attributes:
        q: (B, Hq, Lq, D) int8. q_factor: (B, Hq, Nq) fp32, the blocks' scales times softmax scale times log2(e).
        k: (B, Hkv, Lk, D) int8. k_scale: (B, Hkv, Nk) fp32.
        v: (B, Hkv, Lk, D) int8 with v_scale (B, Hkv, Nk, D) fp32; or floats, zero in the padding, and None.
        p_largest: the integer that stands for the largest P of a block; 0: P V in v's floats.
        taken: (B, Hq, Lq) fp32, what smoothing the keys took from the scaled scores of each row.
    """

    q: Tensor
    q_factor: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None
    p_largest: int
    taken: Tensor


def smooth_keys(key: Vectors, lengths: Lengths | None = None) -> Vectors:
    """Keys less their mean over the valid tokens, per head and channel (SageAttention, arXiv 2410.02367, section 4.2).

    Softmax attention does not change: every score of a query falls by the same amount. An offset that all keys share
    no longer fills the range of the integers.

    Args:
        key: (B, H, L, D).
        lengths: (B,) valid tokens of each item; None: all.

    Returns:
        (B, H, L, D), fp32; 0 beyond the lengths.
    """
    valid = _valid(key, lengths)
    return torch.where(valid, key.float() - key_mean(key, lengths), 0.0)


def key_mean(key: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, H, 1, D), fp32: the mean over the valid tokens, 0 for an item without any."""
    valid = _valid(key, lengths)
    return torch.where(valid, key.float(), 0.0).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)


def quantize_blocks(x: Vectors, block: int, bits: int,
                    lengths: Lengths | None = None) -> tuple[VectorIntegers, RowBlocks]:
    """Symmetric integers with one scale for each block of rows.

    Args:
        x: (B, H, L, D), floats.
        block: rows of a block, at least 1; the last may be ragged.
        bits: 8 (integers to 127) or 4 (to 7).
        lengths: (B,) valid rows; what lies beyond may be NaN, becomes 0 and does not count. None: all.

    Returns:
        Integers, (B, H, L, D) int8, and scales, (B, H, ceil(L / block)) fp32: x is about integer * scale, with scale =
        max |x| / largest integer. A block of zeros has scale 0. NaN or infinity among the valid rows makes the scale
        of its block NaN or infinite.

    Raises:
        ValueError: another number of bits, or a block below 1.
    """
    integers, scale = _quantize(x, block, bits, lengths, (3, 4))
    return integers, scale[:, :, :, 0, 0]


def quantize_values(value: Vectors, block: int, bits: int,
                    lengths: Lengths | None = None) -> tuple[VectorIntegers, BlockVectors]:
    """As :func:`quantize_blocks` with one scale for each block of rows and channel.

    Returns:
        Integers, (B, H, L, D) int8, and scales, (B, H, ceil(L / block), D) fp32.
    """
    integers, scale = _quantize(value, block, bits, lengths, (3,))
    return integers, scale[:, :, :, 0]


def quantize(query: Tensor, key: Tensor, value: Tensor, problem: Problem, bits: Bits) -> Quantized:
    """All that an implementation multiplies."""
    lengths = problem.key_lengths
    mean = key_mean(key, lengths) if bits.smooth_key else torch.zeros_like(key[:, :, :1], dtype=torch.float32)
    q, q_scale = quantize_blocks(query, problem.block_q, bits.qk, problem.query_lengths)
    k, k_scale = quantize_blocks(key.float() - mean, problem.block_k, bits.qk, lengths)
    taken = (query.float() @ mean.repeat_interleave(query.shape[1] // key.shape[1], 1).mT)[..., 0] * problem.scale
    if bits.pv == 16:
        v, v_scale = torch.where(_valid(value, lengths), value, 0), None
    else:
        v, v_scale = quantize_values(value, problem.block_k, bits.pv, lengths)
    return Quantized(q, q_scale * (problem.scale * LOG2_E), k, k_scale, v, v_scale, LARGEST_P.get(bits.pv, 0), taken)


def finish(acc: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of rows (..., D) with a running maximum and sum, (...); 0 and -inf without any key."""
    some = total != 0  # NaN stays NaN
    total = torch.where(some, total, 1.0)
    out = torch.where(some[..., None], acc / total[..., None], 0.0)
    return out, torch.where(some, (top + torch.log2(total)) * LN_2, -torch.inf)


def put_back(lse: Tensor, taken: Tensor) -> Tensor:
    """The log-sum-exp of the scores before smoothing. Rows without any key, padding with NaN among them, stay -inf."""
    return torch.where(torch.isneginf(lse), lse, lse + taken)


def quantize_p(p: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Blocks of P as integers from 0 to ``largest``, with one scale for each block.

    Args:
        p: (..., rows, columns) fp32, not negative; the rows and columns of a block, in either order.
        largest: see ``LARGEST_P``.

    Returns:
        Integers, as p and in fp32, and scales, (..., 1, 1) fp32.
    """
    most = p.amax((-2, -1), keepdim=True)
    inverse = torch.where(most > P_FLOOR, largest / most, 0.0)
    # floor(x + 1/2) and not round: on every device the same, and P is not negative.
    return (p * inverse).add_(0.5).floor_(), most / largest


def _quantize(x: Tensor, block: int, bits: int, lengths: Tensor | None,
              over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if bits not in LARGEST:
        raise ValueError(f"bits: expected {' or '.join(map(str, LARGEST))}, got {bits!r}")
    if block < 1:
        raise ValueError(f"block: expected an integer >= 1, got {block}")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floats of shape (B, H, L, D), got {x.dtype} of shape {tuple(x.shape)}")
    batch, heads, length, head_dim = x.shape
    count = -(-length // block)
    rows = torch.where(_valid(x, lengths), x.float(), 0.0)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, count * block - length)).view(batch, heads, count, block, head_dim)
    scale = rows.abs().amax(over, keepdim=True) / LARGEST[bits] if rows.numel() else rows.sum(over, keepdim=True)
    # Divided by the scale and not multiplied by an inverse, which is infinite for the smallest numbers of fp32.
    integers = torch.round(rows / torch.where(scale == 0, 1.0, scale)).clamp(-LARGEST[bits], LARGEST[bits])
    return integers.to(torch.int8).view(batch, heads, count * block, head_dim)[:, :, :length].contiguous(), scale


def _valid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, 1, L, 1) bool."""
    rows = torch.arange(x.shape[2], device=x.device)
    return (rows < lengths_of(x, lengths, "lengths")[:, None])[:, None, :, None]
