"""Heads whose right order is known, for tests and for the reproduction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from looseleaf_paroattention.permutations import AXES, PERMUTATIONS, grid_order

STRENGTH = 14.0
"""Score of the pairs that a planted head attends to; the others have about 0."""
WIDTH, NOISE = 240, 16
"""Channels that say where a token is, and channels of noise."""


def planted(grid: Sequence[int], seed: int = 0,
            names: Sequence[str] = PERMUTATIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (1, H, L, 256) fp32, for a scale of 1; one head for each name.

    A head named ``abc`` attends to all tokens with its own place on axis a, its own or the next one on axis b, and any
    place on axis c: what it needs is one run of tokens in the order ``abc``, and several runs in the others. Noise
    with a standard deviation of 1 is on all scores, and random codes of the places add about as much.

    Args:
        grid: (F, H, W).
        seed: of codes, noise and values.
        names: permutations.
    """
    g = torch.Generator().manual_seed(seed)
    length = math.prod(grid)
    at = _places(grid)
    query, key = torch.zeros(1, len(names), length, WIDTH), torch.zeros(1, len(names), length, WIDTH)
    for h, name in enumerate(names):
        a, b = AXES.index(name[0]), AXES.index(name[1])
        codes = torch.nn.functional.normalize(torch.randn(grid[a], grid[b], WIDTH, generator=g), dim=-1)
        near = _near(grid[b])
        query[0, h] = STRENGTH * (near @ codes)[at[a], at[b]]
        key[0, h] = codes[at[a], at[b]]
    noise = torch.randn(2, 1, len(names), length, NOISE, generator=g) * NOISE ** -0.25
    value = torch.randn(1, len(names), length, WIDTH + NOISE, generator=g)
    return torch.cat([query, noise[0]], -1), torch.cat([key, noise[1]], -1), value


def expected_mass(name: str, order: str, grid: Sequence[int], block: int) -> Tensor:
    """(N, N): the block masses of a planted head without noise, in an order; L must divide into blocks."""
    at = _places(grid)
    a, b = AXES.index(name[0]), AXES.index(name[1])
    pairs = (at[a][:, None] == at[a]) & _near(grid[b]).bool()[at[b]][:, at[b]]
    places = grid_order(order, grid)
    map_ = pairs[places][:, places].float()
    count = len(places) // block
    return (map_ / map_.sum(-1, keepdim=True)).view(count, block, count, block).sum((1, 3)) / block


def density_for(mass: Tensor, share: float) -> Tensor:
    """The smallest part of the blocks that holds ``share`` of the attention, (...,); ``mass`` (..., N, N)."""
    flat = mass.flatten(-2).double().sort(-1, descending=True).values
    held = flat.cumsum(-1)
    return ((held < share * held[..., -1:]).sum(-1) + 1) / flat.shape[-1]


def _places(grid: Sequence[int]) -> Tensor:
    """(3, L) int64: frame, row and column of each token."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)


def _near(size: int) -> Tensor:
    """(size, size): 1 for a place and the next ones on either side."""
    place = torch.arange(size)
    return ((place[:, None] - place).abs() <= 1).float()
