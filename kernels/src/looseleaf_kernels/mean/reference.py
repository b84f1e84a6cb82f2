"""Block means, block by block: obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import statistics_dtype


def block_mean(x: Tensor, block: int, lengths: Tensor) -> Tensor:
    """Mean over the valid rows of each block, (B, H, N, D); 0 for a block without any."""
    batch, heads, length, head_dim = x.shape
    dtype = statistics_dtype(x)
    out = torch.zeros(batch, heads, -(-length // block), head_dim, dtype=dtype, device=x.device)
    for b in range(batch):
        for n in range(out.shape[2]):
            rows = x[b, :, n * block:min((n + 1) * block, int(lengths[b]))]
            if rows.shape[1]:
                out[b, :, n] = rows.to(dtype).mean(1)
    return out
