"""Orders of the tokens of a grid, and how tensors are brought into one and back (paper, token reordering).

Tokens are numbered frame by frame, row by row (F-major). A permutation is named by its axes from the slowest to the
fastest: ``HWF`` puts all frames of one place next to each other. Attention does not care in which order its tokens
come, as long as queries, keys, values and outputs agree; rotary embeddings are on the tensors already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

AXES = "FHW"
PERMUTATIONS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""All six; the first is the order in which the tokens come."""


def grid_order(name: str, grid: Sequence[int]) -> Tensor:
    """(F * H * W,) int64: the token that comes to each place.

    Raises:
        ValueError: an unknown permutation.
    """
    if name not in PERMUTATIONS:
        raise ValueError(f"permutation {name!r}: allowed is {', '.join(PERMUTATIONS)}")
    return torch.arange(math.prod(grid)).view(*grid).permute([AXES.index(axis) for axis in name]).flatten()


def distinct(grid: Sequence[int]) -> tuple[str, ...]:
    """The permutations that differ on this grid: six, two for an image (F = 1), one for a line."""
    found: dict[tuple[int, ...], str] = {}
    for name in PERMUTATIONS:
        # Axes of size 1 do not move a token: only the order of the others counts.
        found.setdefault(tuple(AXES.index(a) for a in name if grid[AXES.index(a)] > 1), name)
    return tuple(found.values())


def token_orders(names: Sequence[str], grid: Sequence[int], tokens: int, text_first: bool,
                 lengths: Sequence[int] | None = None) -> Tensor:
    """The token that comes to each place, for grid and text together, (B, H, tokens) int64; B is 1 without lengths.

    Grid tokens come first, in the permutation of each head, so that blocks begin where planes of the grid do; text
    follows in its own order, then what lies beyond an item's length. The caller's output has its own order again.

    Args:
        names: the permutation of each head.
        grid: (F, H, W).
        tokens: of the tensors, text and padding included.
        text_first: text stands before the grid in the caller's order, else after it.
        lengths: valid tokens of each batch item, those of the grid and as much text as there is; 0 for an item that
            is all padding.
    """
    cells = math.prod(grid)
    orders = {name: grid_order(name, grid) for name in dict.fromkeys(names)}
    items = []
    for length in [tokens] if lengths is None else lengths:
        start = length - cells if text_first else 0
        if length < cells:  # all padding: any order will do
            items.append(torch.arange(tokens).expand(len(names), -1))
            continue
        text = torch.arange(start) if text_first else torch.arange(cells, length)
        rest = torch.cat([text, torch.arange(length, tokens)])
        items.append(torch.stack([torch.cat([orders[name] + start, rest]) for name in names]))
    return torch.stack(items)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes ``order``, of the same shape."""
    return torch.argsort(order, -1)


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Bring the tokens of (B, H, L, D) into an order (B or 1, H, L); a contiguous copy."""
    batch, heads, length, width = x.shape
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    rows = (order + start).flatten()
    return x.reshape(-1, width).index_select(0, rows).view(batch, heads, length, width)
