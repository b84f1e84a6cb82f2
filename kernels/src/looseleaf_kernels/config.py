"""Launch parameters of the Triton kernels: no tuning happens at import or on a user's first call.

The numbers are starting points chosen from the register and shared-memory reports of ahead-of-time compilation; they
were not tuned on the devices.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched."""

    num_warps: int
    num_stages: int


def attention(arch: str, block_q: int, block_k: int, head_dim: int, itemsize: int) -> Launch:
    """Launch parameters of block-sparse attention.

    Args:
        arch: ``"80"``, ``"90"``, ``"100"`` for CUDA, ``"gfx942"`` for ROCm, ``""`` for the interpreter.
        block_q, block_k: tile sizes.
        head_dim: D.
        itemsize: bytes of one element.
    """
    warps = 8 if block_q >= 128 else 4
    if arch.startswith("gfx"):
        return Launch(warps, 1)
    # K and V tiles of every stage lie in shared memory; keep well below 164 KiB (sm_80) or 227 KiB (sm_90, sm_100).
    tile = 2 * block_k * max(head_dim, 16) * itemsize
    limit = 96 * 1024 if arch == "80" else 160 * 1024
    return Launch(warps, 2 if 2 * tile <= limit else 1)
