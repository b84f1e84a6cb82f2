"""What masks look like: numbers, and a report of masks, spectra and a picture under each color."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from looseleaf import Report, Series
from looseleaf_colormae.pruner import ColorMAE, color_gain

HARDEST_FIRST = ("red", "green", "white", "purple", "blue")
GREY = 0.82


def mask_statistics(keep: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """How the kept patches of each mask lie, by name of the statistic, (B,) float32 each.

    - ``adjacency``: mean fraction of a kept patch's four neighbours inside the grid that are kept;
    - ``cluster``: mean size of the four-connected clusters of kept patches, in patches;
    - ``distance``: mean distance of a masked patch to the nearest kept one, in patches.

    Args:
        keep: (B, rows * columns) bool, True = kept; at least one kept and one masked in each row.
        grid: (rows, columns).

    Raises:
        ValueError: another shape; a mask that keeps all or nothing.
    """
    rows, columns = grid
    if keep.ndim != 2 or keep.shape[1] != rows * columns or keep.dtype != torch.bool:
        raise ValueError(f"keep: expected (B, {rows * columns}) bool, got {tuple(keep.shape)} {keep.dtype}")
    if keep.all(1).any() or not keep.any(1).all():
        raise ValueError("keep: expected kept and masked patches in each row, got a row without one of them")
    kept = keep.view(-1, 1, rows, columns)
    plus = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], device=keep.device).view(1, 1, 3, 3)
    inside = F.conv2d(torch.ones_like(kept, dtype=torch.float32), plus, padding=1)
    around = F.conv2d(kept.float(), plus, padding=1) / inside.clamp(min=1)
    adjacency = (around * kept).flatten(1).sum(1) / keep.sum(1)
    own = torch.arange(1, rows * columns + 1, device=keep.device, dtype=torch.float32).view(1, 1, rows, columns)
    labels = own * kept
    while True:  # the largest label spreads over its cluster
        padded = F.pad(labels, (1, 1, 1, 1))
        near = torch.stack([labels, padded[..., 2:, 1:-1], padded[..., :-2, 1:-1], padded[..., 1:-1, 2:],
                            padded[..., 1:-1, :-2]]).amax(0) * kept
        if torch.equal(near, labels):
            break
        labels = near
    clusters = (labels == own).flatten(1).sum(1)
    places = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns))).to(keep.device)
    far = torch.cdist(places, places).expand(len(keep), -1, -1).masked_fill(~keep[:, None, :], torch.inf).amin(2)
    distance = far.masked_fill(keep, 0).sum(1) / (~keep).sum(1)
    return {"adjacency": adjacency, "cluster": keep.sum(1) / clusters, "distance": distance}


def spectrum(bank: Tensor) -> Tensor:
    """Mean power of patterns (n, size, size) at 0, 1, ... size // 2 cycles a pattern, over the frequencies of that
    length: (size // 2 + 1,) float32."""
    return rings(torch.fft.rfft2(bank).abs().square().mean(0) / bank[0].numel())


def masked(picture: Tensor | np.ndarray, keep: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) in [0, 1] with its masked patches in grey; ``keep`` (rows * columns) bool."""
    pixels = np.asarray(picture, dtype=np.float32)
    rows, columns = grid
    if pixels.ndim != 3 or pixels.shape[0] % rows or pixels.shape[1] % columns:
        raise ValueError(f"picture: expected (H, W, 3) that {rows} x {columns} patches fill, got {pixels.shape}")
    block = np.ones((pixels.shape[0] // rows, pixels.shape[1] // columns))
    seen = np.kron(keep.view(rows, columns).cpu().numpy().astype(np.float32), block)[..., None]
    return pixels * seen + GREY * (1 - seen)


def show(method: ColorMAE | None = None, picture: Tensor | np.ndarray | None = None, *,
         grid: tuple[int, int] = (14, 14), masks: int = 200) -> Report:
    """Noise, masks, spectra and statistics of every color, and ``picture`` under a mask of each, as a report.

    Args:
        method: its sigmas, bank, ratio and seed are used for all colors; None: the defaults.
        picture: (H, W, 3) in [0, 1] that the grid fills; None: none is shown.
        grid: (rows, columns) of the masks.
        masks: how many are measured.
    """
    method = method or ColorMAE()
    report = Report("ColorMAE: masks of filtered noise", facts={
        "grid": f"{grid[0]} x {grid[1]}", "ratio": method.ratio, "masks measured": masks})
    table = report.table(f"Masks, means over {masks}", ["color", "adjacency", "cluster", "distance"],
                         note="fraction of kept neighbours of a kept patch; size of clusters of kept patches; distance "
                              "of masked patches to the nearest kept one, in patches")
    noises, views, pictures = [], [], []
    series: list[Series] = []
    for color in HARDEST_FIRST:
        own = dataclasses.replace(method, color=color, schedule=None)
        keep = own.keep_mask(masks, grid)
        table.add(color, *(float(v.mean()) for v in mask_statistics(keep, grid).values()))
        pattern = own.patterns()[0]
        noises.append(_large((pattern - pattern.min()) / (pattern.max() - pattern.min()), 3))
        views.append(_large(keep[0].view(grid).float(), 12))
        if picture is not None:
            pictures.append(masked(picture, keep[0], grid))
        series.append(_line(f"{color}, bank", spectrum(own.patterns()), "points"))
        gain = color_gain(color, own.size, sigma=own.sigma, sigma_low=own.sigma_low, sigma_high=own.sigma_high)
        series.append(_line(f"{color}, filter", rings(gain.square()).float(), "line"))
    for title, arrays in {"Noise": noises, "Masks (white: the encoder sees it)": views,
                          "A picture under each": pictures}.items():
        if arrays:
            report.image(title, arrays, captions=HARDEST_FIRST)
    report.figure("Spectra of the banks and of the filters", x_label="cycles a pattern", y_label="power", series=series)
    return report


def rings(power: Tensor) -> Tensor:
    """Means of a half spectrum, as ``torch.fft.rfft2`` gives it, over rings of equal frequency: of :func:`spectrum`."""
    size = power.shape[0]
    down = torch.fft.fftfreq(size) * size
    across = torch.fft.rfftfreq(size) * size
    ring = (down[:, None] ** 2 + across ** 2).sqrt().round().long()
    weight = torch.full_like(power, 2.0)  # all but the first and, of an even size, the last column stand for two
    weight[:, 0] = 1.0
    if size % 2 == 0:
        weight[:, -1] = 1.0
    inside = ring <= size // 2
    sums = torch.zeros(size // 2 + 1, dtype=power.dtype)
    counts = sums.clone()
    sums.index_add_(0, ring[inside], (power * weight)[inside])
    counts.index_add_(0, ring[inside], weight[inside])
    return sums / counts


def _line(name: str, values: Tensor, style: str) -> Series:
    return Series(name, [float(n) for n in range(len(values))], values.tolist(), style=style)  # type: ignore[arg-type]


def _large(matrix: Tensor, times: int) -> np.ndarray:
    return np.kron(matrix.numpy(), np.ones((times, times), dtype=np.float32))


__all__ = ["mask_statistics", "masked", "rings", "show", "spectrum"]
