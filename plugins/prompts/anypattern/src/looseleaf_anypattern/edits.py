"""The patterns themselves: geometry, colour, texture, overlays, removal, and those keyed by a number.

They stand for the families of the paper's hundred patterns, not for its very functions: the official generator needs a
dozen libraries. Style networks and adversarial noise are left out. All draw from ``rng`` alone.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from looseleaf_anypattern import canvas
from looseleaf_anypattern.patterns import Function, Pattern, Picture, pattern


# ------------------------------------------------------------------------------------------------------------ keyed
def keyed(kind: str, key: int) -> Pattern:
    """A pattern whose parameters are fixed by a key, so that one example of it tells all about it. (Ours.)

    Args:
        kind: ``colours`` (channels change places, then a tone curve for each), ``blocks`` (a permutation of 4 x 4
            blocks) or ``warp`` (a smooth displacement).
        key: an integer >= 0.

    Raises:
        ValueError: another kind.
    """
    if kind not in _KEYED:
        raise ValueError(f"kind: expected one of {sorted(_KEYED)}, got {kind!r}")
    parameters = (zlib.crc32(kind.encode()), key)

    def function(picture: Picture, rng: np.random.Generator) -> Picture:
        return _KEYED[kind](picture, np.random.default_rng(parameters))

    return Pattern(f"{kind}-{key}", "keyed", function)


def _keyed_colours(picture: Picture, rng: np.random.Generator) -> Picture:
    channels = rng.permutation(3)
    knots = np.linspace(0, 1, 5)
    curves = [np.sort(rng.random(5))[::int(rng.choice((1, -1)))] for _ in range(3)]
    return np.stack([np.interp(picture[..., c], knots, curve) for c, curve in zip(channels, curves, strict=True)], -1)


def _keyed_blocks(picture: Picture, rng: np.random.Generator) -> Picture:
    return canvas.blocks(picture, 4, rng.permutation(16))


def _keyed_warp(picture: Picture, rng: np.random.Generator) -> Picture:
    y, x = canvas.grid(picture)
    a, b, phases = rng.normal(0, 0.18, (2, 2)), rng.uniform(1, 4, (2, 2)), rng.uniform(0, 6.28, (2, 2))
    dy, dx = (sum(a[n, k] * np.sin(b[n, k] * (x, y)[k] + phases[n, k]) for k in range(2)) for n in range(2))
    return canvas.sample(picture, y + dy, x + dx)


_KEYED: Mapping[str, Function] = {"colours": _keyed_colours, "blocks": _keyed_blocks, "warp": _keyed_warp}


def _scene(picture: Picture, rng: np.random.Generator) -> Picture:
    """A made-up picture of the same size: smooth colours with a few shapes."""
    coarse = canvas.pil(rng.random((3, 3, 3), dtype=np.float32)).resize(picture.shape[1::-1], 3)
    return _shapes(canvas.from_pil(coarse), rng)


# --------------------------------------------------------------------------------------------------------- geometry
@pattern("geometry")
def rotate(p: Picture, rng: np.random.Generator) -> Picture:
    return canvas.turned(p, rng.uniform(0.25, 6.03))


@pattern("geometry")
def flip(p: Picture, rng: np.random.Generator) -> Picture:
    return p[:, ::-1]


@pattern("geometry")
def upside_down(p: Picture, rng: np.random.Generator) -> Picture:
    return p[::-1]


@pattern("geometry")
def skew(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), k = canvas.grid(p), rng.choice((-1, 1)) * rng.uniform(0.3, 0.7)
    return canvas.sample(p, y, x + k * y, 0.0) if rng.random() < 0.5 else canvas.sample(p, y + k * x, x, 0.0)


@pattern("geometry")
def perspective(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), (a, b) = canvas.grid(p), rng.uniform(-0.45, 0.45, 2)
    w = 1 + a * y + b * x
    return canvas.sample(p, y / w, x / w, 0.0)


@pattern("geometry")
def elastic(p: Picture, rng: np.random.Generator) -> Picture:
    y, x = canvas.grid(p)
    dy, dx = (canvas.blurred(rng.random((*p.shape[:2], 3), dtype=np.float32), p.shape[0] / 16)[..., 0] - 0.5
              for _ in range(2))
    k = 0.15 / max(1e-6, float(np.hypot(dy, dx).mean()))
    return canvas.sample(p, y + k * dy, x + k * dx)


@pattern("geometry")
def swirl(p: Picture, rng: np.random.Generator) -> Picture:
    y, x = canvas.grid(p)
    angle = rng.choice((-1, 1)) * rng.uniform(1.5, 4) * np.exp(-2 * (y ** 2 + x ** 2))
    c, s = np.cos(angle), np.sin(angle)
    return canvas.sample(p, c * y - s * x, s * y + c * x)


@pattern("geometry")
def polar(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), turn = canvas.grid(p), rng.uniform(0, 2)
    angle = (np.arctan2(y, x) / np.pi + 1 + turn) % 2 - 1
    return canvas.sample(p, 2 * np.hypot(y, x) / 2 ** 0.5 - 1, angle)


@pattern("geometry")
def kaleidoscope(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), parts = canvas.grid(p), int(rng.integers(3, 7))
    wedge = 2 * np.pi / parts
    angle = abs((np.arctan2(y, x) + rng.uniform(0, wedge)) % wedge - wedge / 2)
    return canvas.sample(p, np.hypot(y, x) * np.sin(angle), np.hypot(y, x) * np.cos(angle))


@pattern("geometry")
def mirror(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), side = canvas.grid(p), rng.choice((-1, 1))
    return canvas.sample(p, y, side * abs(x)) if rng.random() < 0.5 else canvas.sample(p, side * abs(y), x)


@pattern("geometry")
def jigsaw(p: Picture, rng: np.random.Generator) -> Picture:
    side = int(rng.integers(2, 5))
    return canvas.blocks(p, side, rng.permutation(side * side))


@pattern("geometry")
def split_rotate(p: Picture, rng: np.random.Generator) -> Picture:
    half = min(p.shape[:2]) // 2
    for top in (0, half):
        for left in (0, half):
            here = np.s_[top:top + half, left:left + half]
            p[here] = np.rot90(p[here], int(rng.integers(4)))
    return p


@pattern("geometry")
def repeat(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), (a, b) = canvas.grid(p), rng.integers(2, 4, 2)
    return canvas.sample(p, (y + 1) * a % 2 - 1, (x + 1) * b % 2 - 1)


@pattern("geometry")
def crop(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), k = canvas.grid(p), rng.uniform(0.4, 0.75)
    return canvas.sample(p, k * y + rng.uniform(k - 1, 1 - k), k * x + rng.uniform(k - 1, 1 - k))


@pattern("geometry")
def pad(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), k = canvas.grid(p), rng.uniform(1.4, 2.2)
    return canvas.sample(p, k * y + rng.uniform(1 - k, k - 1), k * x + rng.uniform(1 - k, k - 1), rng.random())


@pattern("geometry")
def wave(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), (a, b) = canvas.grid(p), rng.uniform((0.06, 5), (0.14, 12))
    return canvas.sample(p, y, x + a * np.sin(b * y + rng.uniform(0, 6.28)))


@pattern("geometry")
def fisheye(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), k = canvas.grid(p), rng.choice((-0.35, 0.7))
    scale = 1 + k * (y ** 2 + x ** 2 - 1) * 0.7
    return canvas.sample(p, y * scale, x * scale)


# ----------------------------------------------------------------------------------------------------------- colour
@pattern("colour")
def brightness(p: Picture, rng: np.random.Generator) -> Picture:
    return p * rng.choice((rng.uniform(0.3, 0.6), rng.uniform(1.5, 2.2)))


@pattern("colour")
def contrast(p: Picture, rng: np.random.Generator) -> Picture:
    return p.mean() + (p - p.mean()) * rng.choice((rng.uniform(0.2, 0.5), rng.uniform(1.8, 3)))


@pattern("colour")
def saturation(p: Picture, rng: np.random.Generator) -> Picture:
    grey = canvas.grey(p)[..., None]
    return grey + (p - grey) * rng.uniform(2.0, 4.0)


@pattern("colour")
def hue(p: Picture, rng: np.random.Generator) -> Picture:
    angle = rng.uniform(0.8, 5.5)
    c, s = np.cos(angle), np.sin(angle) / 3 ** 0.5
    turn = (1 - c) / 3 + np.array([[c, -s, s], [s, c, -s], [-s, s, c]])  # a rotation around grey
    return p @ turn.T


@pattern("colour")
def channel_swap(p: Picture, rng: np.random.Generator) -> Picture:
    return p[..., [(1, 2, 0), (2, 0, 1), (2, 1, 0), (1, 0, 2), (0, 2, 1)][int(rng.integers(5))]]


@pattern("colour")
def channel_drop(p: Picture, rng: np.random.Generator) -> Picture:
    p[..., int(rng.integers(3))] = rng.choice((0.0, 1.0))
    return p


@pattern("colour")
def quantise(p: Picture, rng: np.random.Generator) -> Picture:
    return canvas.from_pil(canvas.pil(p).quantize(int(rng.integers(3, 9))))


@pattern("colour")
def posterise(p: Picture, rng: np.random.Generator) -> Picture:
    steps = int(rng.integers(1, 4))
    return (p * steps).round() / steps


@pattern("colour")
def solarise(p: Picture, rng: np.random.Generator) -> Picture:
    limit = rng.uniform(0.2, 0.7)
    return np.where(p < limit, p, 1 - p)


@pattern("colour")
def sepia(p: Picture, rng: np.random.Generator) -> Picture:
    return p @ np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]]).T


@pattern("colour")
def heat_map(p: Picture, rng: np.random.Generator) -> Picture:
    grey = canvas.grey(p)
    return np.stack([1.5 - abs(4 * grey - k) for k in (3, 2, 1)], -1)


@pattern("colour")
def gamma(p: Picture, rng: np.random.Generator) -> Picture:
    return p ** rng.choice((rng.uniform(0.3, 0.55), rng.uniform(1.9, 3.5)))


@pattern("colour")
def tone_curve(p: Picture, rng: np.random.Generator) -> Picture:
    knots = np.linspace(0, 1, 6)
    return np.stack([np.interp(p[..., c], knots, np.sort(rng.random(6))) for c in range(3)], -1)


@pattern("colour")
def match_histogram(p: Picture, rng: np.random.Generator) -> Picture:
    other = _scene(p, rng).reshape(-1, 3)
    out = np.empty_like(p)
    for c in range(3):
        ranks = np.argsort(np.argsort(p[..., c].ravel(), kind="stable"), kind="stable")
        out[..., c] = np.sort(other[:, c])[ranks].reshape(p.shape[:2])
    return out


@pattern("colour")
def greyscale(p: Picture, rng: np.random.Generator) -> Picture:
    return np.repeat(canvas.grey(p)[..., None], 3, -1)


@pattern("colour")
def invert(p: Picture, rng: np.random.Generator) -> Picture:
    return 1 - p


@pattern("colour")
def duotone(p: Picture, rng: np.random.Generator) -> Picture:
    dark, light = rng.uniform(0, 0.5, 3), rng.uniform(0.5, 1, 3)
    return dark + canvas.grey(p)[..., None] * (light - dark)


@pattern("colour")
def equalise(p: Picture, rng: np.random.Generator) -> Picture:
    from PIL import ImageOps

    return canvas.from_pil(ImageOps.equalize(canvas.pil(p)))


# ---------------------------------------------------------------------------------------------------------- texture
@pattern("texture")
def blur(p: Picture, rng: np.random.Generator) -> Picture:
    return canvas.blurred(p, rng.uniform(0.02, 0.05) * p.shape[0])


@pattern("texture")
def motion_blur(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), angle, reach = canvas.grid(p), rng.uniform(0, np.pi), rng.uniform(0.12, 0.3)
    steps = np.linspace(-reach, reach, 7)
    return np.mean([canvas.sample(p, y + t * np.sin(angle), x + t * np.cos(angle)) for t in steps], 0)


@pattern("texture")
def zoom_blur(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), reach = canvas.grid(p), rng.uniform(0.25, 0.5)
    return np.mean([canvas.sample(p, y * k, x * k) for k in np.linspace(1 - reach, 1, 7)], 0)


@pattern("texture")
def pixelate(p: Picture, rng: np.random.Generator) -> Picture:
    side = int(rng.integers(8, 17))
    return canvas.resized(canvas.resized(p, side, side), p.shape[0], p.shape[1], 0)


@pattern("texture")
def jpeg(p: Picture, rng: np.random.Generator) -> Picture:
    from PIL import Image

    written = io.BytesIO()
    canvas.pil(p).save(written, "JPEG", quality=int(rng.integers(3, 12)))
    return canvas.from_pil(Image.open(written))


@pattern("texture")
def noise(p: Picture, rng: np.random.Generator) -> Picture:
    return p + rng.normal(0, rng.uniform(0.12, 0.3), p.shape)


@pattern("texture")
def salt_and_pepper(p: Picture, rng: np.random.Generator) -> Picture:
    drawn = rng.random(p.shape[:2])
    share = rng.uniform(0.05, 0.2)
    p[drawn < share], p[drawn > 1 - share] = 0, 1
    return p


@pattern("texture")
def glass(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), reach = canvas.grid(p), rng.uniform(0.06, 0.14)
    return canvas.sample(p, y + rng.uniform(-reach, reach, y.shape), x + rng.uniform(-reach, reach, y.shape))


@pattern("texture")
def oil(p: Picture, rng: np.random.Generator) -> Picture:
    from PIL import ImageFilter

    flat = canvas.pil((p * 6).round() / 6)
    return canvas.from_pil(flat.filter(ImageFilter.ModeFilter(2 * int(rng.integers(1, 4)) + 3)))


@pattern("texture")
def cartoon(p: Picture, rng: np.random.Generator) -> Picture:
    steps, (dy, dx) = int(rng.integers(3, 6)), canvas.gradients(canvas.blurred(p, 0.7))
    flat = (canvas.blurred(p, 1.0) * steps).round() / steps
    flat[np.hypot(dy, dx) > 0.1] = 0
    return flat


@pattern("texture")
def ink(p: Picture, rng: np.random.Generator) -> Picture:
    local = canvas.grey(canvas.blurred(p, p.shape[0] / 10))
    return np.repeat((canvas.grey(p) > local - rng.uniform(0.0, 0.06))[..., None].astype(np.float32), 3, -1)


@pattern("texture")
def emboss(p: Picture, rng: np.random.Generator) -> Picture:
    (dy, dx), angle = canvas.gradients(p), rng.uniform(0, 6.28)
    return np.repeat((0.5 + 2 * (np.sin(angle) * dy + np.cos(angle) * dx))[..., None], 3, -1)


@pattern("texture")
def edges(p: Picture, rng: np.random.Generator) -> Picture:
    drawn = np.hypot(*canvas.gradients(p)) * rng.uniform(3, 6)
    return np.repeat((drawn if rng.random() < 0.5 else 1 - drawn)[..., None], 3, -1)


@pattern("texture")
def voronoi(p: Picture, rng: np.random.Generator) -> Picture:
    return canvas.mean_of(p, canvas.nearest(p, rng, int(rng.integers(60, 160)), jitter=False))


@pattern("texture")
def superpixels(p: Picture, rng: np.random.Generator) -> Picture:
    labels = canvas.nearest(p, rng, int(rng.integers(49, 122)), jitter=True)
    return canvas.mean_of(p, labels * 4 + (canvas.grey(p) * 3.99).astype(int).clip(0, 3))


@pattern("texture")
def ascii_art(p: Picture, rng: np.random.Generator) -> Picture:
    cell = max(4, p.shape[0] // 16)
    rows, columns = -(-p.shape[0] // cell), -(-p.shape[1] // cell)
    level = ((1 - canvas.grey(canvas.resized(p, rows, columns, 4))) * 6.99).astype(int)

    def glyph(sign: str) -> Picture:
        return canvas.drawn(np.zeros((cell, cell, 3), np.float32), lambda image, height, width: image.text(
            (0, -1), sign, fill="white", font_size=height + 2))

    glyphs = list(map(glyph, "@#*+:. "))
    return np.concatenate([np.concatenate([glyphs[v] for v in row], 1) for row in level])[:p.shape[0], :p.shape[1]]


@pattern("texture")
def moire(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), (a, b) = canvas.grid(p), rng.uniform(15, 40, 2)
    rings = np.sin(a * np.hypot(y - 0.2, x)) * np.sin(b * np.hypot(y, x + 0.3))
    return p + 0.3 * rings[..., None]


@pattern("texture")
def wavelet(p: Picture, rng: np.random.Generator) -> Picture:
    height, width, limit = p.shape[0] // 2 * 2, p.shape[1] // 2 * 2, rng.uniform(0.1, 0.3)
    a, b, c, d = (p[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    mean, rest = (a + b + c + d) / 4, [(a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4]
    u, v, w = (np.sign(r) * 3 * (abs(r) - limit / 4).clip(0) for r in rest)
    for (i, j), value in zip(((0, 0), (0, 1), (1, 0), (1, 1)),
                             (mean + u + v + w, mean - u + v - w, mean + u - v - w, mean - u - v + w), strict=True):
        p[i:height:2, j:width:2] = value
    return p


@pattern("texture")
def sharpen(p: Picture, rng: np.random.Generator) -> Picture:
    return p + rng.uniform(2, 5) * (p - canvas.blurred(p, 1.5))


@pattern("texture")
def halftone(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), k = canvas.grid(p), p.shape[0] * rng.uniform(0.5, 0.8)
    dots = 0.5 + 0.25 * (np.sin(k * (x + y)) + np.sin(k * (x - y)))
    return np.repeat((canvas.grey(p) > dots)[..., None].astype(np.float32), 3, -1)


# --------------------------------------------------------------------------------------------------------- overlays
@pattern("overlay")
def text(p: Picture, rng: np.random.Generator) -> Picture:
    def draw(image: Any, height: int, width: int) -> None:
        for _ in range(int(rng.integers(2, 5))):
            word = "".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUVW"), 6))
            image.text((rng.uniform(0, width / 2), rng.uniform(0, height * 0.8)), word, fill=canvas.random_colour(rng),
                       font_size=height / 4)
    return canvas.drawn(p, draw)


@pattern("overlay")
def emoji(p: Picture, rng: np.random.Generator) -> Picture:
    def draw(image: Any, height: int, width: int) -> None:
        for _ in range(int(rng.integers(1, 4))):
            r = height * rng.uniform(0.12, 0.22)
            y, x = rng.uniform(r, height - r), rng.uniform(r, width - r)
            image.ellipse((x - r, y - r, x + r, y + r), fill=(255, 210, 40), outline=(120, 80, 0))
            for side in (-0.4, 0.4):
                image.ellipse((x + side * r - r / 7, y - r / 2, x + side * r + r / 7, y - r / 6), fill=(60, 40, 0))
            image.arc((x - r * 0.6, y - r * 0.4, x + r * 0.6, y + r * 0.6), 20, 160, fill=(60, 40, 0), width=2)
    return canvas.drawn(p, draw)


@pattern("overlay")
def image_on_top(p: Picture, rng: np.random.Generator) -> Picture:
    other, side = _scene(p, rng), rng.uniform(0.35, 0.55)
    height, width = int(side * p.shape[0]), int(side * p.shape[1])
    top, left = int(rng.integers(p.shape[0] - height + 1)), int(rng.integers(p.shape[1] - width + 1))
    p[top:top + height, left:left + width] = canvas.resized(other, height, width)
    return p


@pattern("overlay")
def stripes(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), angle = canvas.grid(p), rng.uniform(0, np.pi)
    bands = np.sin(rng.uniform(12, 25) * (np.sin(angle) * y + np.cos(angle) * x)) > rng.uniform(0.2, 0.6)
    p[bands] = rng.random(3)
    return p


@pattern("overlay", "shapes")
def _shapes(p: Picture, rng: np.random.Generator) -> Picture:
    def draw(image: Any, height: int, width: int) -> None:
        for _ in range(int(rng.integers(3, 7))):
            y, x, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.05, 0.18) * height
            kind = image.ellipse if rng.random() < 0.5 else image.rectangle
            kind((x - r, y - r, x + r, y + r), fill=canvas.random_colour(rng))
    return canvas.drawn(p, draw)


@pattern("overlay")
def screenshot(p: Picture, rng: np.random.Generator) -> Picture:
    height, width = p.shape[:2]
    out = np.full_like(p, rng.choice((0.1, 0.95)))
    top, side = height // 6, width // 10
    out[top:height - height // 8, side:width - side] = canvas.resized(p, height - height // 8 - top, width - 2 * side)

    def draw(image: Any, high: int, wide: int) -> None:
        image.rectangle((0, 0, wide, high // 12), fill=canvas.random_colour(rng))
        for n in range(3):
            place = (n * wide // 10 + 1, 1, n * wide // 10 + high // 14, high // 14)
            image.ellipse(place, fill=canvas.random_colour(rng))
    return canvas.drawn(out, draw)


@pattern("overlay")
def rain(p: Picture, rng: np.random.Generator) -> Picture:
    lean = rng.uniform(-0.3, 0.3)

    def draw(image: Any, height: int, width: int) -> None:
        for y, x in rng.uniform(-0.1, 1, (60, 2)):
            image.line((x * width, y * height, (x + 0.15 * lean) * width, (y + 0.15) * height), fill=(200, 210, 230))
    return canvas.drawn(p * 0.75, draw)


@pattern("overlay")
def snow(p: Picture, rng: np.random.Generator) -> Picture:
    flakes = (rng.random(p.shape[:2]) < rng.uniform(0.02, 0.06)).astype(np.float32)
    return p + 3 * canvas.blurred(np.repeat(flakes[..., None], 3, -1), p.shape[0] / 64)


@pattern("overlay")
def sun_flare(p: Picture, rng: np.random.Generator) -> Picture:
    (y, x), (a, b) = canvas.grid(p), rng.uniform(-0.7, 0.7, 2)
    glow = np.exp(-6 * ((y - a) ** 2 + (x - b) ** 2)) + 0.4 * np.exp(-25 * ((y + a) ** 2 + (x + b) ** 2))
    return p + 1.2 * glow[..., None] * np.array((1.0, 0.9, 0.6))


@pattern("overlay")
def meme(p: Picture, rng: np.random.Generator) -> Picture:
    band, out = p.shape[0] // 4, np.ones_like(p)
    out[band:] = canvas.resized(p, p.shape[0] - band, p.shape[1])
    word = "".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUVW "), 8))
    return canvas.drawn(out, lambda image, height, width: image.text((2, 1), word, fill="black", font_size=band * 0.8))


@pattern("overlay")
def collage(p: Picture, rng: np.random.Generator) -> Picture:
    half = (p.shape[0] // 2, p.shape[1] // 2)
    place = int(rng.integers(4))
    for n in range(4):
        part = p if n == place else _scene(p, rng)
        small = canvas.resized(part, p.shape[0] - half[0], p.shape[1] - half[1])
        if n == 0:
            out = np.empty_like(p)
        top, left = n // 2 * half[0], n % 2 * half[1]
        out[top:top + small.shape[0], left:left + small.shape[1]] = small
    return out


@pattern("overlay")
def opacity(p: Picture, rng: np.random.Generator) -> Picture:
    k = rng.uniform(0.3, 0.55)
    return k * p + (1 - k) * _scene(p, rng)


@pattern("overlay")
def frame(p: Picture, rng: np.random.Generator) -> Picture:
    band, colour = max(2, int(p.shape[0] * rng.uniform(0.1, 0.2))), rng.random(3)
    p[:band], p[-band:], p[:, :band], p[:, -band:] = colour, colour, colour, colour
    return p


# ---------------------------------------------------------------------------------------------------------- removal
@pattern("removal")
def erase(p: Picture, rng: np.random.Generator) -> Picture:
    height, width = (int(s * rng.uniform(0.4, 0.65)) for s in p.shape[:2])
    top, left = int(rng.integers(p.shape[0] - height + 1)), int(rng.integers(p.shape[1] - width + 1))
    p[top:top + height, left:left + width] = rng.random(3)
    return p


def _foreground(p: Picture) -> np.ndarray:
    """What differs from the median colour of the border."""
    border = np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]])
    different: np.ndarray = abs(p - np.median(border, 0)).max(-1) > 0.15
    return different


@pattern("removal")
def remove_background(p: Picture, rng: np.random.Generator) -> Picture:
    p[~_foreground(p)] = rng.random(3)
    return p


@pattern("removal")
def remove_foreground(p: Picture, rng: np.random.Generator) -> Picture:
    y, x = canvas.grid(p)
    hidden = _foreground(p) & (rng.choice((-1, 1)) * (y if rng.random() < 0.5 else x) > rng.uniform(-0.3, 0.1))
    p[hidden] = np.median(np.concatenate([p[0], p[-1]]), 0)
    return p


@pattern("removal")
def vignette(p: Picture, rng: np.random.Generator) -> Picture:
    y, x = canvas.grid(p)
    return np.where((np.hypot(y, x) < rng.uniform(0.55, 0.8))[..., None], p, 0)


__all__ = ["keyed"]
