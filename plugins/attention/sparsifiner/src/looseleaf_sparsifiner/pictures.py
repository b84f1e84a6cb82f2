"""Masks drawn over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf import Report
from looseleaf_sparsifiner.backend import RowKeys

FAINT = 0.25
"""Brightness of patches that no head keeps."""
FRAME = np.array((1.0, 0.85, 0.1), dtype=np.float32)


def draw_keys(picture: Tensor | np.ndarray, kept: Tensor, grid: tuple[int, int], query: int | None = None,
              prefix: int = 1) -> np.ndarray:
    """A picture whose patches are the brighter the more heads keep them, (H, W, 3) float32 in [0, 1].

    Args:
        picture: (H, W, 3) in [0, 1]; the grid fills it.
        kept: (heads, N, N) bool, the masks of one layer and picture.
        grid: rows and columns of patches.
        query: the patch whose keys are drawn, framed, counted row by row; None: those of all patches, as fractions of
            the most wanted one.
        prefix: tokens before the patches.

    Raises:
        ValueError: sizes that do not fit.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    rows, columns = grid
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.shape[0] % rows or pixels.shape[1] % columns:
        raise ValueError(f"picture: expected (H, W, 3) that {rows} x {columns} patches fill, got {pixels.shape}")
    if kept.dim() != 3 or kept.shape[-1] != prefix + rows * columns or kept.shape[1] != kept.shape[2]:
        raise ValueError(f"kept: expected (heads, N, N) for N = {prefix} + {rows} x {columns}, got {tuple(kept.shape)}")
    if query is not None and not 0 <= query < rows * columns:
        raise ValueError(f"query: expected a patch from 0 to {rows * columns - 1}, got {query}")
    patches = kept[:, prefix:, prefix:].float()
    seen = patches[:, query].mean(0) if query is not None else patches.mean((0, 1))
    if query is None:
        seen = seen / seen.max().clamp(min=torch.finfo(torch.float32).tiny)
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    light = np.kron(seen.view(rows, columns).cpu().numpy(), np.ones((high, wide), dtype=np.float32))[..., None]
    drawn: np.ndarray = pixels * (FAINT + (1 - FAINT) * light)
    if query is not None:
        top, left = query // columns * high, query % columns * wide
        inside = drawn[top + 2:top + high - 2, left + 2:left + wide - 2].copy()
        drawn[top:top + high, left:left + wide] = FRAME
        drawn[top + 2:top + high - 2, left + 2:left + wide - 2] = inside
    return drawn


def show(backend: RowKeys, model: Any, batch: Any, pictures: Sequence[Any], grid: tuple[int, int], *,
         queries: Sequence[int] | None = None, layers: Sequence[int] | None = None) -> Report:
    """Which keys the patches of each picture keep, drawn over it, as a report.

    Args:
        backend: calibrated.
        model, batch: as for :meth:`RowKeys.masks`.
        pictures: one for each item of the batch, (H, W, 3) in [0, 1]; the grid fills each.
        grid: rows and columns of patches.
        queries: the patch of each picture whose keys are drawn; None: the middle one.
        layers: which layers are drawn; None: the first, the middle and the last.
    """
    masks = backend.masks(model, batch)
    names = list(masks)
    chosen = [names[0], names[len(names) // 2], names[-1]] if layers is None else list(layers)
    report = Report(f"{type(backend).__name__}: keys that patches keep", {
        "keep rate": backend.keep_rate, "grid": f"{grid[0]} x {grid[1]}"})
    for number, picture in enumerate(pictures):
        query = grid[0] // 2 * grid[1] + grid[1] // 2 if queries is None else queries[number]
        drawn, captions = [np.asarray(picture, dtype=np.float32)], ["picture"]
        for layer in dict.fromkeys(chosen):
            kept = masks[layer][number]
            drawn += [draw_keys(picture, kept, grid, at, backend.prefix_tokens) for at in (query, None)]
            captions += [f"layer {layer}, keys of the framed patch", f"layer {layer}, keys of all patches"]
        report.image(f"Picture {number}", drawn, "the brighter a patch, the more heads keep it", captions=captions)
    return report


__all__ = ["draw_keys", "show"]
