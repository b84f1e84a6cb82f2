"""What is ink, and which cells of an image are hidden: progressive spatial masking."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Schedule = Literal["linear", "cosine", "steps"]
MaskMode = Literal["random", "block", "attended"]
FAINT = 0.1
"""Fraction of an image's darkest ink below which a pixel is paper [choice]."""
LEVELS = 5
"""Levels of the schedule ``steps`` [choice]."""


def ink_of(images: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
    """How far each pixel is from the paper, (B, H, W) float32 in [0, 1].

    Paper is the median of each channel of an image, so that black on white, white on black and normalised images work
    alike; what covers more than half of the pixels is taken for paper [choice].

    Args:
        images: (B, C, H, W).
        pixel_mask: (B, H, W), 0 where an image is padded.

    Raises:
        ValueError: an image without ink.
    """
    if images.dim() != 4:
        raise ValueError(f"images: expected (B, C, H, W), got {tuple(images.shape)}")
    ink = (images.float() - paper_of(images, pixel_mask).float()).abs().mean(1)
    if pixel_mask is not None:
        ink = ink * (pixel_mask > 0)
    darkest = ink.amax((1, 2), keepdim=True)
    if not bool((darkest > 0).all()):
        empty = [n for n, value in enumerate(darkest.flatten().tolist()) if not value > 0]
        raise ValueError(f"images: expected ink in each, got none in {empty}: leave blank images out")
    ink = ink / darkest
    return ink * (ink >= FAINT)


def paper_of(images: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
    """The color of the paper of each image, (B, C, 1, 1)."""
    pixels = images.flatten(2)
    if pixel_mask is None:
        return pixels.median(-1).values[..., None, None]
    hidden = (pixel_mask <= 0).flatten(1)[:, None]
    return pixels.float().masked_fill(hidden, torch.nan).nanmedian(-1).values.to(images.dtype)[..., None, None]


def cells_of(height: int, width: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """To which cell of a grid each pixel belongs, (H, W) int64, cells counted row by row.

    Raises:
        ValueError: fewer pixels than cells.
    """
    rows, columns = grid
    if height < rows or width < columns:
        raise ValueError(f"images: expected at least {rows} x {columns} pixels, one for each cell, got {height} x "
                         f"{width}")
    row = torch.arange(height, device=device) * rows // height
    return row[:, None] * columns + torch.arange(width, device=device) * columns // width


def ink_in_cells(ink: Tensor, grid: tuple[int, int]) -> Tensor:
    """The sum of ink (B, H, W) in each cell, (B, rows, columns)."""
    cells = cells_of(ink.shape[1], ink.shape[2], grid, ink.device).flatten()
    out = ink.new_zeros(len(ink), grid[0] * grid[1])
    return out.index_add(1, cells, ink.flatten(1)).view(len(ink), *grid)


def ratio_at(progress: float, start: float, end: float, schedule: Schedule = "linear") -> float:
    """The fraction of ink that is hidden when ``progress`` in [0, 1] of the training is over; it never falls.

    Raises:
        ValueError: a ratio outside [0, 1), one that falls, or an unknown schedule.
    """
    if not 0 <= start <= end < 1:
        raise ValueError(f"ratio: expected 0 <= start <= end < 1, got {start} and {end}")
    shapes = {"linear": lambda t: t, "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
              "steps": lambda t: min(LEVELS - 1, math.floor(LEVELS * t)) / (LEVELS - 1)}
    if schedule not in shapes:
        raise ValueError(f"schedule: expected one of {', '.join(shapes)}, got {schedule!r}")
    return start + (end - start) * shapes[schedule](min(1.0, max(0.0, progress)))


def hiding_order(cells: Tensor, mode: MaskMode, generator: torch.Generator, attention: Tensor | None = None) -> Tensor:
    """How early each cell is hidden, (B, rows, columns): the largest first.

    Args:
        cells: ink of each cell, (B, rows, columns).
        mode: ``random``; ``block``: those nearest to a random cell with ink; ``attended``: those with most attention.
        generator: draws on the CPU.
        attention: the map of each image, (B, rows, columns), for ``attended``.
    """
    if mode == "attended":
        if attention is None:
            raise ValueError("attention: expected a map for mask_mode 'attended', got None")
        return attention
    if mode == "random":
        return torch.rand(cells.shape, generator=generator).to(cells.device)
    rows, columns = cells.shape[1:]
    middle = torch.multinomial((cells.flatten(1) > 0).float().cpu(), 1, generator=generator)[:, :, None]
    down = torch.arange(rows)[:, None] - middle // columns
    right = torch.arange(columns) - middle % columns
    return -(down.float() ** 2 + right.float() ** 2).to(cells.device)


def hidden_cells(order: Tensor, cells: Tensor, ratio: float) -> Tensor:
    """The first cells with ink until ``ratio`` of the ink is hidden, (B, rows, columns) bool.

    What is hidden is at least ``ratio`` of the ink and less than one cell more. Cells without ink stay: hiding them
    changes nothing.

    Args:
        order: see :func:`hiding_order`.
        cells: ink of each cell, (B, rows, columns).
        ratio: in [0, 1).

    Raises:
        ValueError: a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio: expected a number in [0, 1), got {ratio}")
    ink, order = cells.flatten(1).double(), order.flatten(1).double()
    first = order.masked_fill(ink <= 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    fractions = (ink / ink.sum(1, keepdim=True)).gather(1, first)
    before = fractions.cumsum(1) - fractions
    chosen = (before < ratio - 1e-9) & (fractions > 0)
    return torch.zeros_like(chosen).scatter(1, first, chosen).view(cells.shape)


def hide(images: Tensor, hidden: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
    """The images with paper in place of hidden cells.

    Args:
        images: (B, C, H, W).
        hidden: (B, rows, columns) bool.
        pixel_mask: see :func:`ink_of`.
    """
    cells = cells_of(images.shape[-2], images.shape[-1], (hidden.shape[1], hidden.shape[2]), images.device)
    return torch.where(hidden.flatten(1)[:, cells][:, None], paper_of(images, pixel_mask), images)


def valid_cells(pixel_mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells in which an image has any pixel, (B, rows, columns) bool."""
    return ink_in_cells((pixel_mask > 0).float(), grid) > 0


def masked_softmax(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Softmax of logits (B, rows, columns) over the valid positions of each image; 0 elsewhere."""
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    return F.softmax(logits.flatten(1), 1).view(logits.shape)


def entropy(attention: Tensor) -> Tensor:
    """Entropy of each map (B, rows, columns) in nats, (B,): 0 for one cell, log of their number for a flat one."""
    return -torch.special.xlogy(attention, attention).flatten(1).sum(1)


__all__ = ["MaskMode", "Schedule", "cells_of", "entropy", "hidden_cells", "hide", "hiding_order", "ink_in_cells",
           "ink_of", "masked_softmax", "paper_of", "ratio_at", "valid_cells"]
