# mypy: disable-error-code="no-untyped-def"
"""Blocks of rows in Triton: coalesced copies, deterministic. Imported only where Triton is installed and wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from looseleaf_kernels import launch

WIDTH = 1024
"""Numbers that a program copies."""


@triton.jit
def gather_forward(X, OUT, BLOCKS, kept, count, size, WIDTH: tl.constexpr):
    """A part of one block that is taken; ``size`` numbers are a block."""
    at = tl.program_id(0)
    block = tl.load(BLOCKS + at)
    part = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    item = at // kept
    source = (item.to(tl.int64) * count + tl.maximum(block, 0)) * size
    x = tl.load(X + source + part, mask=part < tl.where(block >= 0, size, 0), other=0.0)
    tl.store(OUT + at.to(tl.int64) * size + part, x, mask=part < size)


@triton.jit
def scatter_forward(RESIDUAL, Y, OUT, INVERSE, kept, count, size, WIDTH: tl.constexpr):
    """A part of one block of the sum: each is read and written once, whether something is added to it or not."""
    at = tl.program_id(0)
    block = tl.load(INVERSE + at)
    part = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    place = at.to(tl.int64) * size + part
    source = ((at // count).to(tl.int64) * kept + tl.maximum(block, 0)) * size
    x = tl.load(RESIDUAL + place, mask=part < size, other=0.0)
    y = tl.load(Y + source + part, mask=part < tl.where(block >= 0, size, 0), other=0.0)
    total = x.to(tl.float32) + y.to(tl.float32)
    tl.store(OUT + place, total.to(OUT.dtype.element_ty), mask=part < size)


def gather_rows(x: Tensor, blocks: Tensor, block: int) -> Tensor:
    """As the reference."""
    batch, kept = blocks.shape
    size = block * x.shape[2]
    out = x.new_empty(batch, kept * block, x.shape[2])
    if out.numel():
        gather_forward[(batch * kept, triton.cdiv(size, WIDTH))](
            x.contiguous(), out, blocks.to(torch.int32).contiguous(), kept, x.shape[1] // block, size, WIDTH=WIDTH,
            **launch.copy().options())
    return out


def scatter_rows_add(residual: Tensor, y: Tensor, blocks: Tensor, block: int) -> Tensor:
    """As the reference; sums in fp32."""
    (batch, kept), count = blocks.shape, residual.shape[1] // block
    size = block * residual.shape[2]
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    # Which of the added blocks comes where; a last column takes those of -1.
    inverse = torch.full((batch, count + 1), -1, dtype=torch.int32, device=residual.device)
    numbers = torch.arange(kept, dtype=torch.int32, device=residual.device).expand(batch, kept)
    inverse.scatter_(1, torch.where(blocks < 0, count, blocks).long(), numbers)
    if out.numel():
        scatter_forward[(batch * count, triton.cdiv(size, WIDTH))](
            residual.contiguous(), y.contiguous(), out, inverse[:, :count].contiguous(), kept, count, size,
            WIDTH=WIDTH, **launch.copy().options())
    return out


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    numbers = launch.types(i32="kept count size")
    return [launch.Job(f"{kernel.__name__} {dtype}", kernel,
                       {**numbers, **launch.types(**{"p_i32": index, f"p_{dtype}": pointers})}, {"WIDTH": WIDTH},
                       lambda arch: launch.copy())
            for kernel, index, pointers in ((gather_forward, "BLOCKS", "X OUT"),
                                            (scatter_forward, "INVERSE", "RESIDUAL Y OUT"))
            for dtype in ("fp16", "bf16")]
