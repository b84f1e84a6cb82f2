"""Blocks of rows: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.operations import ANYWHERE, Operation, register
from looseleaf_kernels.problem import check_numbers, like
from looseleaf_kernels.shapes import Blocks, Hidden, Taken

_RUNS = {"reference": ANYWHERE, "cpu": ANYWHERE, "triton": ("cuda",)}
GATHER = register(Operation("gather_rows", __package__, _RUNS, differentiable=True, any_width=True))
SCATTER = register(Operation("scatter_rows_add", __package__, _RUNS, differentiable=True, any_width=True))


@torch.library.custom_op(GATHER.operator, mutates_args=())
def _gather(x: Tensor, blocks: Tensor, block: int, impl: str) -> Tensor:
    _check_blocks(blocks, x.shape[1] // block)
    taken: Tensor = GATHER.module(impl).gather_rows(x, blocks, block)
    return taken


@_gather.register_fake
def _fake_gather(x: Tensor, blocks: Tensor, block: int, impl: str) -> Tensor:
    return x.new_empty(x.shape[0], blocks.shape[1] * block, x.shape[2])


@torch.library.custom_op(SCATTER.operator, mutates_args=())
def _scatter(residual: Tensor, y: Tensor, blocks: Tensor, block: int, impl: str) -> Tensor:
    _check_blocks(blocks, residual.shape[1] // block)
    total: Tensor = SCATTER.module(impl).scatter_rows_add(residual, y, blocks, block)
    return total


@_scatter.register_fake
def _fake_scatter(residual: Tensor, *_: Any) -> Tensor:
    return like(residual)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing but the numbers of the blocks and the length is kept for the gradient."""
    *tensors, blocks, ctx.block, ctx.impl = inputs
    ctx.length = tensors[0].shape[1]
    ctx.save_for_backward(blocks)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    [blocks] = ctx.saved_tensors
    nothing = grad.new_zeros(grad.shape[0], ctx.length, grad.shape[2])
    return _scatter(nothing, grad, blocks, ctx.block, ctx.impl), None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    [blocks] = ctx.saved_tensors
    return grad, _gather(grad, blocks, ctx.block, ctx.impl), None, None, None


_gather.register_autograd(_gather_backward, setup_context=_keep)
_scatter.register_autograd(_scatter_backward, setup_context=_keep)


def _check_blocks(blocks: Tensor, count: int) -> None:
    check_numbers("blocks", blocks, count, "numbers", "each block once, got block {} twice in an item")


def _check(x: Tensor, blocks: Tensor, block: int, name: str) -> None:
    if x.dim() != 3 or blocks.dim() != 2 or blocks.shape[0] != x.shape[0]:
        raise ValueError(f"{name}, blocks: expected shapes (B, L, H) and (B, K), got {tuple(x.shape)} and "
                         f"{tuple(blocks.shape)}")
    if block < 1 or x.shape[1] % block:
        raise ValueError(f"block: expected a number of rows that divides the {x.shape[1]} of {name}, got {block}: pad "
                         "the sequence")


def gather_rows(x: Hidden, blocks: Blocks, block: int, *, impl: str | None = None) -> Taken:
    """The rows of some blocks of a sequence, one block after another. Its gradient is :func:`scatter_rows_add`.

    Args:
        x: (B, L, H), of any float dtype; L is a multiple of ``block``.
        blocks: (B, K) int32, the blocks of each item, each at most once; -1: none, zeros.
        block: rows of a block.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        (B, K * block, H). For the backward nothing but ``blocks`` is kept.

    Raises:
        ValueError: shapes that do not fit; on a CPU also blocks that do not exist or come twice.
    """
    _check(x, blocks, block, "x")
    taken: Tensor = _gather(x, blocks, block, GATHER.choose(x, impl))
    return taken


def scatter_rows_add(residual: Hidden, y: Taken, blocks: Blocks, block: int, *, impl: str | None = None) -> Hidden:
    """A sequence with rows added to some of its blocks, deterministic. Its gradients are ``grad`` and that of a gather.

    Args:
        residual: (B, L, H); L is a multiple of ``block``.
        y: (B, K * block, H), the same dtype, what is added.
        blocks, block, impl: as in :func:`gather_rows`.

    Returns:
        (B, L, H), a new tensor.

    Raises:
        ValueError: shapes or dtypes that do not fit; on a CPU also blocks that do not exist or come twice.
    """
    _check(residual, blocks, block, "residual")
    wanted = (residual.shape[0], blocks.shape[1] * block, residual.shape[2])
    if y.shape != wanted or y.dtype != residual.dtype:
        raise ValueError(f"y: expected shape {wanted} and the residual's dtype, {residual.dtype}, got "
                         f"{tuple(y.shape)} and {y.dtype}")
    total: Tensor = _scatter(residual, y, blocks, block, SCATTER.choose(residual, impl))
    return total
