# mypy: disable-error-code="no-untyped-def"
"""Block means in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch


@triton.jit
def mean_forward(X, OUT, LENGTHS, heads, length, count,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one head."""
    n = tl.program_id(0)
    bh = tl.program_id(1)
    valid = tl.load(LENGTHS + bh // heads)
    rows = n * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(X + bh.to(tl.int64) * length * D + rows[:, None] * D + d[None, :],
                mask=(rows < valid)[:, None] & (d < D)[None, :], other=0.0)
    many = tl.minimum(tl.maximum(valid - n * BLOCK, 1), BLOCK)
    mean = tl.sum(x.to(tl.float32), 0) / many
    tl.store(OUT + (bh.to(tl.int64) * count + n) * D + d, mean, mask=d < D)


def block_mean(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """As the reference."""
    batch, heads, length, head_dim = x.shape
    count = -(-length // block)
    out = torch.empty(batch, heads, count, head_dim, dtype=torch.float32, device=x.device)
    if out.numel():
        mean_forward[(count, batch * heads)](
            x.contiguous(), out, lengths.to(torch.int32), heads, length, count, D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), BLOCK=block, **launch.mean().options())
    return out


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    return [launch.Job(
        f"mean_forward {dtype} D128 block128", mean_forward,
        launch.types(p_fp32="OUT", p_i32="LENGTHS", i32="heads length count", **{f"p_{dtype}": "X"}),
        {"D": 128, "BLOCK_D": 128, "BLOCK": 128}, lambda arch: launch.mean())
        for dtype in ("fp16", "bf16")]
