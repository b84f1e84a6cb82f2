"""Queries and keys of heads whose pattern is known, to see whether the search finds it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTH = 64
"""Head dimension. Scores are plain products, with a scale of 1."""
BLOCK = 64
NOISE = 0.3
"""Standard deviation of what is no pattern, in every dimension of queries and keys."""


def streaming(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L, D) queries and keys that like the first 128 tokens and every fourth one nearby, to an eighth of the length.

    Every fourth, because what is smooth over a block is a block pattern as well: its means show it.
    """
    g = torch.Generator().manual_seed(seed)
    frequencies = math.pi / 2 + torch.randn(31, generator=g) * 8 / length
    q, k = (NOISE * torch.randn(length, WIDTH, generator=g) for _ in range(2))
    near = _waves(torch.arange(length), frequencies) * math.sqrt(10)
    q[:, :62] += near
    k[:, :62] += near
    q[:, 62] = 1
    k[:128, 62] = 8
    return q, k


def verticals_and_diagonal(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L, D) queries and keys that like 16 single tokens of the first half and one token a third of the length ago."""
    g = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(31, generator=g) * math.pi
    q, k = (NOISE * torch.randn(length, WIDTH, generator=g) for _ in range(2))
    q[:, :62] += _waves(torch.arange(length) - length // 3, frequencies) * math.sqrt(14)
    k[:, :62] += _waves(torch.arange(length), frequencies) * math.sqrt(14)
    q[:, 62] = 1
    k[torch.randperm(length // 2, generator=g)[:16], 62] = 13
    return q, k


def block_clusters(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(L, D) queries and keys in blocks of 64; each block has one of 8 subjects and likes blocks of the same one."""
    g = torch.Generator().manual_seed(seed)
    subject = torch.randint(0, 8, (-(-length // BLOCK),), generator=g).repeat_interleave(BLOCK)[:length]
    ours = torch.nn.functional.one_hot(subject, WIDTH) * math.sqrt(12)
    return tuple(ours + NOISE * torch.randn(length, WIDTH, generator=g) for _ in range(2))  # type: ignore[return-value]


HEADS = {"a_shape": streaming, "vertical_slash": verticals_and_diagonal, "block_sparse": block_clusters}
"""The pattern that the search should find, and the head."""


def heads(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, 3, L, D) of one head of each kind, in the order of :data:`HEADS`."""
    made = [make(length, seed + n) for n, make in enumerate(HEADS.values())]
    value = torch.randn(1, len(made), length, WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.stack([q for q, _ in made])[None], torch.stack([k for _, k in made])[None], value


def _waves(position: Tensor, frequencies: Tensor) -> Tensor:
    """(L, 2 n) features whose products depend on distance alone (random Fourier features); a product of 1 at 0."""
    angle = position[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(len(frequencies))
