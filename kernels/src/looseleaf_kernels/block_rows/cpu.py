"""Blocks of rows in plain torch, on any device: a block is one long row, so that one index serves all of it."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x: Tensor, blocks: Tensor, block: int) -> Tensor:
    """As the reference."""
    flat, there = _flat(blocks, x.shape[1] // block)
    rows = x.reshape(-1, block * x.shape[2]).index_select(0, flat)
    if not bool(there.all()):
        rows.masked_fill_(~there[:, None], 0)
    return rows.view(x.shape[0], -1, x.shape[2])


def scatter_rows_add(residual: Tensor, y: Tensor, blocks: Tensor, block: int) -> Tensor:
    """As the reference."""
    flat, there = _flat(blocks, residual.shape[1] // block)
    rows, width = y.reshape(-1, block * y.shape[2]), block * y.shape[2]
    if not bool(there.all()):
        flat, rows = flat[there], rows[there]
    out = residual.clone(memory_format=torch.contiguous_format)
    out.view(-1, width).index_add_(0, flat, rows)
    return out


def _flat(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B * K,) the places of the blocks in the whole batch, and whether there is one."""
    there = blocks >= 0
    items = torch.arange(blocks.shape[0], device=blocks.device)[:, None] * count
    return (blocks.clamp(min=0).long() + items).flatten(), there.flatten()
