"""What patterns have in common: reading a picture elsewhere, drawing on it, and summing it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from looseleaf_anypattern.patterns import Picture


def grid(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all pixels, from -1 to 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, picture.shape[0]), np.linspace(-1, 1, picture.shape[1]), indexing="ij")
    return y, x


def sample(picture: Picture, y: np.ndarray, x: np.ndarray, fill: float | None = None) -> Picture:
    """The picture read at places between -1 and 1, bilinear; outside its edge, or ``fill``."""
    height, width = picture.shape[:2]
    rows, columns = (y + 1) * (height - 1) / 2, (x + 1) * (width - 1) / 2
    inner_y, inner_x = rows.clip(0, height - 1), columns.clip(0, width - 1)
    top, left = inner_y.astype(int), inner_x.astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    v, u = (inner_y - top)[..., None], (inner_x - left)[..., None]
    read = ((1 - v) * ((1 - u) * picture[top, left] + u * picture[top, right])
            + v * ((1 - u) * picture[bottom, left] + u * picture[bottom, right]))
    if fill is not None:
        read[(abs(y) > 1) | (abs(x) > 1)] = fill
    return read


def turned(picture: Picture, angle: float, fill: float | None = 0.0) -> Picture:
    y, x = grid(picture)
    c, s = np.cos(angle), np.sin(angle)
    return sample(picture, c * y - s * x, s * y + c * x, fill)


def blocks(picture: Picture, side: int, order: np.ndarray) -> Picture:
    """Blocks of a ``side`` x ``side`` grid in another order; what is left over at the edges stays."""
    high, wide = picture.shape[0] // side, picture.shape[1] // side
    if not high or not wide:
        return picture
    out = picture.copy()
    for to, source in enumerate(order):
        (a, b), (c, d) = divmod(to, side), divmod(int(source), side)
        out[a * high:(a + 1) * high, b * wide:(b + 1) * wide] = \
            picture[c * high:(c + 1) * high, d * wide:(d + 1) * wide]
    return out


def blurred(picture: Picture, radius: float) -> Picture:
    from PIL import ImageFilter

    return from_pil(pil(picture).filter(ImageFilter.GaussianBlur(radius)))


def pil(picture: Picture) -> Any:
    from PIL import Image

    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def from_pil(image: Any) -> Picture:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def resized(picture: Picture, height: int, width: int, resample: int = 2) -> Picture:
    return from_pil(pil(picture).resize((max(1, width), max(1, height)), resample))


def grey(picture: Picture) -> np.ndarray:
    brightness: np.ndarray = picture @ np.array((0.299, 0.587, 0.114), np.float32)
    return brightness


def gradients(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    dy, dx = np.gradient(grey(picture))
    return dy, dx


def nearest(picture: Picture, rng: np.random.Generator, count: int, jitter: bool) -> np.ndarray:
    """Which of ``count`` seeds is nearest to each pixel; of a jittered grid, or anywhere."""
    y, x = grid(picture)
    if jitter:
        side = max(2, round(count ** 0.5))
        points = (np.stack(np.meshgrid(*2 * [np.arange(side)], indexing="ij"), -1).reshape(-1, 2) + 0.5) / side * 2 - 1
        points = points + rng.normal(0, 0.3 / side, points.shape)
    else:
        points = rng.uniform(-1, 1, (count, 2))
    which: np.ndarray = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    return which


def mean_of(picture: Picture, labels: np.ndarray) -> Picture:
    """Each pixel the mean colour of its label."""
    flat = labels.ravel()
    counts = np.bincount(flat, minlength=flat.max() + 1).clip(1)
    means = np.stack([np.bincount(flat, picture[..., c].ravel(), flat.max() + 1) / counts for c in range(3)], -1)
    return means[labels]


def drawn(picture: Picture, draw: Callable[[Any, int, int], None]) -> Picture:
    """The picture with what ``draw(ImageDraw, height, width)`` puts on it."""
    from PIL import ImageDraw

    image = pil(picture)
    draw(ImageDraw.Draw(image), *picture.shape[:2])
    return from_pil(image)


def random_colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(v) for v in rng.integers(0, 256, 3))


__all__ = ["blocks", "blurred", "drawn", "from_pil", "gradients", "grey", "grid",
           "mean_of", "nearest", "pil", "random_colour", "resized", "sample", "turned"]
