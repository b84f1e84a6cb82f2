"""Blocks of rows in plain torch, block by block: obviously right."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x: Tensor, blocks: Tensor, block: int) -> Tensor:
    """The rows of the named blocks one after another; zeros for a block of -1."""
    out = x.new_zeros(x.shape[0], blocks.shape[1] * block, x.shape[2])
    for b, row in enumerate(blocks.tolist()):
        for n, m in enumerate(row):
            if m >= 0:
                out[b, n * block:(n + 1) * block] = x[b, m * block:(m + 1) * block]
    return out


def scatter_rows_add(residual: Tensor, y: Tensor, blocks: Tensor, block: int) -> Tensor:
    """The residual with the rows of ``y`` added at the named blocks; those of -1 are left out."""
    out = residual.clone()
    for b, row in enumerate(blocks.tolist()):
        for n, m in enumerate(row):
            if m >= 0:
                out[b, m * block:(m + 1) * block] += y[b, n * block:(n + 1) * block]
    return torch.as_tensor(out)
