"""Block means: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import lengths_of, statistics_dtype
from looseleaf_kernels.shapes import BlockVectors, Lengths, Vectors

OPERATION = register(Operation("block_mean", __package__, {"reference": ANYWHERE, "cpu": ANYWHERE, "triton": ("cuda",)},
                               triton_blocks={"block": (1, float("inf"))}))


@torch.library.custom_op(OPERATION.operator, mutates_args=())
def _forward(x: Tensor, block: int, lengths: Tensor, impl: str) -> Tensor:
    means: Tensor = OPERATION.module(impl).block_mean(x, block, lengths)
    return means


@_forward.register_fake
def _fake(x: Tensor, block: int, *_: Any) -> Tensor:
    b, h, n, d = x.shape
    return x.new_empty(b, h, -(-n // block), d, dtype=statistics_dtype(x))


def block_mean(x: Vectors, block: int, lengths: Lengths | None = None) -> BlockVectors:
    """Mean over the valid rows of each block.

    Args:
        x: (B, H, L, D).
        block: rows of a block, at least 1.
        lengths: (B,) valid rows; None: all.

    Returns:
        (B, H, ceil(L / block), D), fp32 (fp64 for fp64); blocks without a valid row are 0.

    Raises:
        ValueError: a block below 1, or lengths of another shape.
    """
    if block < 1:
        raise ValueError(f"block: expected an integer >= 1, got {block}")
    means: Tensor = _forward(x, block, lengths_of(x, lengths, "lengths"), OPERATION.choose(x, block=block))
    return means
