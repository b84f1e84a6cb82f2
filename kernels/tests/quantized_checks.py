"""What the Triton kernels of quantised attention are held to: ``test_quantized_triton`` runs it in other processes.

Their quantiser must give the integers of the plain one bit for bit. Of the attention only exp2 is not exact on a GPU,
so that an integer of P whose value lies at a rounding edge may be its neighbour. ``bounds`` finds those integers and
says how far the output may be from that in fp64: the kernels are held to that bound and to no tolerance of our choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from test_quantized_attention import inputs
from torch import Tensor

from looseleaf_kernels import BlockIndex, quantize_blocks, quantized_block_sparse_attention
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.quantized import quantizers
from looseleaf_kernels.quantized.quantizers import Bits, Quantized

EXP2 = 2.0 ** -22
"""Relative error of exp2: PTX promises this for ex2.approx.ftz.f32."""
U = 2.0 ** -24
"""Relative error of one rounding to fp32."""
LN_2 = 0.6931471805599453
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Bounds(NamedTuple):
    """Output and log-sum-exp in fp64, how far from them a right kernel may be, and the fraction of P at an edge."""

    out: Tensor
    out_limit: Tensor
    lse: Tensor
    lse_limit: Tensor
    edges: float


def bounds(x: Quantized, index: BlockIndex, dtype: torch.dtype, last: float) -> Bounds:
    """What a kernel may make of the integers ``x``, for full lengths.

    P = exp2(s - top) has the relative error e of exp2 and of its argument: s is rounded once, top is an s, and the
    difference is rounded; 2^-24 of each becomes ln 2 times that in P. P then lies in [p (1 - e), p (1 + e)], the
    block's largest likewise, and the integer between the integers of these ends. They differ only at a rounding edge.
    Each that does adds its step times |v| to the limit, fp32's rounding a fraction r of the sum of |P V|, and the
    output's rounding the fraction ``last`` of the output.
    """
    bq, bk, nq, nk = index.block_q, index.block_k, index.rows, index.columns
    group = x.q.shape[1] // x.k.shape[1]

    def by_block(t: Tensor) -> Tensor:
        """(B, H, Lq, Lk) as (B, H, Nq, Nk, block_q, block_k)."""
        t = torch.nn.functional.pad(t, (0, nk * bk - t.shape[3], 0, nq * bq - t.shape[2]))
        return t.view(*t.shape[:2], nq, bq, nk, bk).transpose(3, 4)

    factor = x.q_factor[..., :, None] * x.k_scale.repeat_interleave(group, 1)[..., None, :]  # fp32, as in the kernel
    s = by_block(x.q.double() @ x.k.double().repeat_interleave(group, 1).mT) * factor.double()[..., None, None]
    seen = by_block(index.expand())
    top = s.masked_fill(~seen, -torch.inf).amax(-1).cummax(3).values
    safe = torch.where(torch.isneginf(top), 0.0, top)[..., None]
    p = torch.where(seen, torch.exp2(s - safe), 0.0)
    e = torch.where(seen, EXP2 + LN_2 * U * (s.abs() + safe.abs() + (s - safe).abs()), 0.0)
    low, high = p * (1 - e), p * (1 + e)

    values = x.v.double()
    if x.v_scale is None:
        n, low, high, step = (*(t.to(x.v.dtype).double() for t in (p, low, high)), torch.ones(()))
    else:
        values = values * x.v_scale.double().repeat_interleave(bk, 2)[:, :, :index.k_len]
        least, most, largest = (t.amax((4, 5), keepdim=True) for t in (low, p, high))
        step = most / x.p_largest

        def integer(t: Tensor, over: Tensor, rounding: float) -> Tensor:
            """Three roundings: of the inverse, the product and the sum."""
            t = ((t * x.p_largest / over + 0.5) * (1 + 3 * U * rounding)).floor().clamp(max=x.p_largest)
            return torch.where(over > quantizers.P_FLOOR, t, 0.0)

        n, low, high = integer(p, most, 0), integer(low, largest, -1), integer(high, least, 1)

    weight = torch.exp2(safe - safe[:, :, :, -1:])  # of a block, in its row: what later maxima leave of it
    total = (weight * p).sum((3, 5))[..., None]
    total = torch.where(total == 0, 1.0, total)
    values = torch.nn.functional.pad(values.repeat_interleave(group, 1), (0, 0, 0, nk * bk - index.k_len))
    values = values.view(*values.shape[:2], 1, nk, bk, -1)

    def weigh(t: Tensor, v: Tensor) -> Tensor:
        return ((weight * step * t) @ v).sum(3) / total

    out, size, edge = weigh(n, values), weigh(n, values.abs()), weigh(high - low, values.abs())
    # In each block the sum is shrunk by an exp2; then there are the scales, and the sum over a block's keys.
    r = (nk + 3) * (float(e.max()) + EXP2) + bk * 2 * U
    limit = (edge + r * size) * (1 + last) + last * out.abs()
    limit += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least step of fp16 is not so small

    def rows(t: Tensor) -> Tensor:
        return t.flatten(2, 3)[:, :, :index.q_len]

    lse = torch.where(rows(seen.any(-1).any(3)), (rows(safe[:, :, :, -1, :, 0] + torch.log2(total[..., 0]))) * LN_2,
                      -torch.inf)
    size = torch.where(torch.isneginf(lse), 0.0, lse.abs())
    lse_limit = r + 4 * U * (1 + rows(safe[:, :, :, -1, :, 0]).abs() + size + x.taken.abs())
    edges = float(((high - low) > 0)[seen].double().mean()) if x.v_scale is not None else 0.0
    return Bounds(rows(out), rows(limit), lse + x.taken, lse_limit, edges)


def plain_layout(x: Quantized, k_len: int) -> Quantized:
    """What the Triton quantiser made, on the CPU, with V as in the plain one."""
    x = Quantized(*(t.cpu() if isinstance(t, Tensor) else t for t in x))
    return x if x.v_scale is None else x._replace(v=x.v.transpose(3, 4).flatten(2, 3)[:, :, :k_len].contiguous())


def quantize(given: tuple[Tensor, Tensor, Tensor], index: BlockIndex, bits: int, device: str,
             lengths: tuple[Tensor, Tensor] | None = None, smooth: bool = True) -> Quantized:
    """By Triton; the result as ``plain_layout`` gives it."""
    from looseleaf_kernels.quantized import quantizers_triton

    q, k, v = (t.to(device) for t in given)
    problem = problem_of(index, q.shape[3] ** -0.5, *(t.to(device) for t in lengths or full(index)))
    return plain_layout(quantizers_triton.quantize(q, k, v, problem, Bits(8, bits, smooth)), index.k_len)


def problem_of(index: BlockIndex, scale: float, q_len: Tensor, k_len: Tensor) -> Problem:
    return Problem(scale, index.causal, index.block_q, index.block_k, q_len, k_len)


def full(index: BlockIndex) -> tuple[Tensor, Tensor]:
    return torch.full((index.batch,), index.q_len), torch.full((index.batch,), index.k_len)


def check_attention(case: tuple, dtype: torch.dtype, bits: int, device: str = "cpu", smooth: bool = True) -> None:
    """The kernel against its bounds, given its own integers of Q, K and V."""
    q, k, v, index = inputs(case, dtype)
    out, lse = quantized_block_sparse_attention(*(t.to(device) for t in (q, k, v)), index.to(device), pv_bits=bits,
                                                smooth_key=smooth, impl="triton")
    assert out.dtype == dtype and lse.dtype == torch.float32
    # Rounding to nearest costs half a step of the dtype; the interpreter cuts bf16 off, which costs a whole one.
    last = torch.finfo(dtype).eps / (1 if device == "cpu" and dtype == torch.bfloat16 else 2)
    may = bounds(quantize((q, k, v), index, bits, device, smooth=smooth), index, dtype, last)
    assert may.edges < 1e-3, f"{case} {dtype} {bits} bits: {may.edges:.2%} of P at an edge makes the bound too wide"
    for name, got, want, limit in (("output", out, may.out, may.out_limit), ("lse", lse, may.lse, may.lse_limit)):
        got = got.cpu().double()
        apart = torch.where(got == want, 0.0, (got - want).abs())
        wrong = ~(apart <= limit)
        if wrong.any():
            at = int((apart / limit).nan_to_num(torch.inf).argmax())
            raise AssertionError(
                f"{case} {dtype} {bits} bits: {name} {got.flatten()[at]:.6g} where fp64 has {want.flatten()[at]:.6g}: "
                f"error {apart.flatten()[at]:.3g}, permitted {limit.flatten()[at]:.3g}; beyond it are "
                f"{int(wrong.sum())} of {wrong.numel()} entries; {may.edges:.3%} of P at a rounding edge")


def check_quantiser(case: tuple, dtype: torch.dtype, bits: int, device: str = "cpu", smooth: bool = True) -> None:
    """Integers and scales bit for bit those of the plain quantiser, with NaN in the padding; the mean to rounding."""
    from looseleaf_kernels.quantized import quantizers_triton

    q, k, v, index = inputs(case, dtype)
    k[..., 3] += 5
    lengths = tuple((n - torch.arange(index.batch) * 7).clamp(min=0) for n in full(index))
    for t, given in zip((q, k, v), (lengths[0], lengths[1], lengths[1]), strict=True):
        for item, n in zip(t, given.tolist(), strict=True):
            item[:, n:] = torch.nan
            item[0, :max(0, n // 2)] *= 0  # blocks of zeros
    got = quantize((q, k, v), index, bits, device, lengths, smooth)
    scale = q.shape[3] ** -0.5
    want = quantizers.quantize(q, k, v, problem_of(index, scale, *lengths), Bits(8, bits, smooth))
    if smooth:
        mean = quantizers_triton.key_mean(k.to(device), lengths[1].to(device)).cpu()
        valid = (torch.arange(index.k_len) < lengths[1][:, None])[:, None, :, None]
        size = torch.where(valid, k.float(), 0.0).abs().sum(2, keepdim=True)
        size /= lengths[1].clamp(min=1)[:, None, None, None]
        apart = (mean - quantizers.key_mean(k, lengths[1])).abs()
        assert (apart <= (index.k_len + 8) * 2 * U * size).all(), f"means apart by {float(apart.max()):.3g}"
        ints, scales = quantize_blocks(k.float() - mean, index.block_k, 8, lengths[1])
        want = want._replace(k=ints, k_scale=scales)
        bound = (torch.where(got.q == 0, 0, q.float()).abs() @ size.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
        assert ((got.taken - want.taken).abs()[got.taken != 0] <= (
            (index.k_len + q.shape[3]) * 4 * U * bound[..., 0] * scale + 1e-7)[got.taken != 0]).all()
    for name, one, two in zip(Quantized._fields, got, want, strict=True):
        if name == "taken" or not isinstance(one, Tensor) or (name == "v" and bits == 16):
            continue
        assert one.dtype == two.dtype and one.shape == two.shape, name
        assert torch.equal(one, two), (f"{case} {dtype} {bits} bits: {name} differs in {int((one != two).sum())} of "
                                       f"{one.numel()}, by at most {float((one.double() - two.double()).abs().max())}")


def check_edges_of_the_quantiser(device: str = "cpu") -> None:
    """Ties, the smallest numbers of fp32, and NaN and infinity among the valid rows."""
    index = BlockIndex.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), block_q=32, block_k=32, q_len=128, k_len=128,
                                 causal=False)
    x = (torch.arange(128 * 16) % 255 - 127).view(1, 1, 128, 16) / 2  # multiples of 1/2
    x[0, 0, ::32] = 127.0                                             # with a scale of 1
    x[0, 0, 64:96] = 1e-42
    got = quantize((x, x, x), index, 8, device, smooth=False)
    want = quantizers.quantize(x, x, x, problem_of(index, 0.25, *full(index)), Bits(8, 8, False))
    for one, two in zip(got[:6], want[:6], strict=True):
        assert torch.equal(one, two)
    assert got.q[0, 0, 1, :4].tolist() == [-56, -55, -54, -54]  # -55.5, -55, -54.5, -54: halves to even
    x[0, 0, 5, 2], x[0, 0, 40, 3] = torch.nan, torch.inf
    got = quantize((x, x, x), index, 8, device, smooth=False)
    assert got.k_scale.isnan()[0, 0].tolist() == [True, False, False, False]
    assert got.k_scale.isinf()[0, 0].tolist() == [False, True, False, False]
    assert got.q_factor.isnan()[0, 0, 0] and (got.q[0, 0, :32] == 0).all() and (got.k[0, 0, :64] == 0).all()
    assert got.v_scale is not None and torch.equal(got.v_scale.isnan().nonzero(), torch.tensor([[0, 0, 0, 2]]))
    assert torch.equal(got.v_scale.isinf().nonzero(), torch.tensor([[0, 0, 1, 3]]))
