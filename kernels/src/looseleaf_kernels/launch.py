"""Launch parameters of the Triton kernels: no tuning happens at import or on a user's first call.

Those of sm_90 were chosen from times on an H200 (benchmarks/gpu_tune.py); the others from the register and
shared-memory reports of ahead-of-time compilation, not tuned on the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched."""

    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A kernel to compile ahead of time.

    Attributes:
        name: what is printed.
        kernel: the function.
        types: the type of each argument that is no constant, see :func:`types`.
        constants: the values of the others.
        launch: chooses the launch parameters of an architecture.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    launch: Callable[[str], Launch]


def types(**names: str) -> dict[str, str]:
    """The type of each argument: ``types(fp32="a b", p_bf16="X")`` has two numbers and a pointer."""
    return {name: kind.replace("p_", "*") for kind, listed in names.items() for name in listed.split()}


def architecture(device: torch.device) -> str:
    """``"80"``, ``"90"``, ``"100"`` for CUDA, ``"gfx942"`` for ROCm, ``""`` for the interpreter."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def attention(arch: str, block_q: int, block_k: int, head_dim: int, itemsize: int) -> Launch:
    """Launch parameters of block-sparse attention.

    Args:
        arch: see :func:`architecture`.
        block_q, block_k: tile sizes.
        head_dim: D.
        itemsize: bytes of one element.
    """
    # Measured on an H200 at D 128 (benchmarks/gpu_tune.py): blocks of 64 are fastest with 3 stages, of 128 with 2.
    stages = 3 if arch == "90" and block_k <= 64 else 2
    return _tiled(arch, block_q, 2 * block_k * max(head_dim, 16) * itemsize, stages)


def quantized_attention(arch: str, block_q: int, block_k: int, head_dim: int, value_itemsize: int) -> Launch:
    """Launch parameters of quantised block-sparse attention; as :func:`attention`, V being int8 or floats.

    Args:
        arch, block_q, block_k, head_dim: as in :func:`attention`.
        value_itemsize: bytes of one element of V; those of Q and K are one byte.
    """
    return _tiled(arch, block_q, block_k * max(head_dim, 32) * (1 + value_itemsize), 3)


def quantizer(arch: str, block: int, head_dim: int) -> Launch:
    """Launch parameters of quantising (block, head_dim) tiles, each read once: about 64 numbers for each thread."""
    threads = 64 if arch.startswith("gfx") else 32
    return Launch(min(8, max(2, block * head_dim // (64 * threads))), 1)


def mean() -> Launch:
    """Launch parameters of block means, whose tiles are read once."""
    return Launch(4, 1)


def copy() -> Launch:
    """Launch parameters of copies of long rows."""
    return Launch(4, 1)


def row_sparse(arch: str, head_dim: int) -> Launch:
    """Launch parameters of attention of single queries, whose keys are gathered; the same on all architectures."""
    return Launch(2 if head_dim <= 64 else 4, 2)


def _tiled(arch: str, block_q: int, tile: int, stages: int) -> Launch:
    """For kernels that keep ``tile`` bytes of K and V for every stage."""
    warps = 8 if block_q >= 128 else 4
    if arch.startswith("gfx"):
        return Launch(warps, 1)
    # The tiles of every stage lie in shared memory; keep well below 164 KiB (sm_80) or 227 KiB (sm_90, sm_100).
    limit = 96 * 1024 if arch == "80" else 160 * 1024
    return Launch(warps, stages if stages * tile <= limit else 1)
