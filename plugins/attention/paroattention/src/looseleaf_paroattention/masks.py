"""Which blocks of a head's permuted attention map are computed: fixed once, from block sums (paper, sparsity)."""

from __future__ import annotations

import torch
from torch import Tensor


def block_masks(mass: Tensor, *, density: float = 0.3, threshold: float | None = None) -> Tensor:
    """The blocks to keep; at least the best one of each row of blocks, so that every query sees something.

    Args:
        mass: (..., N, N), the mean over the calibration of the share of a row's attention in each block.
        density: share of all blocks of each head to keep, the heaviest ones.
        threshold: keep the blocks with at least this mass instead; None: by ``density``.

    Returns:
        (..., N, N) bool.
    """
    if not mass.numel():
        return torch.ones_like(mass, dtype=torch.bool)
    best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    if threshold is not None:
        return (mass >= threshold) | best
    blocks = mass.shape[-1] * mass.shape[-2]
    keep = max(mass.shape[-2], round(density * blocks))
    order = torch.sort(mass.masked_fill(best, torch.inf).flatten(-2), dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(*mass.shape[:-2], blocks, dtype=torch.bool, device=mass.device)
    return mask.scatter_(-1, order[..., :keep], True).view_as(mass)
