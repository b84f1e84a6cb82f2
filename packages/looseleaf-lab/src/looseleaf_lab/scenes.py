"""Pictures of one or two emoji on a plain ground, or of one among many of another, with exact masks.

An object has a name of :data:`NAMES` and a colour of :data:`COLOURS` or its own; two stand side by side. What a caption
says can be left to chance or given, so that words can be made redundant, biased or meaningful only together.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from looseleaf_lab import data

SIZE = 32
NAMES = ("apple", "banana", "bell", "bus", "butterfly", "cactus", "carrot", "cat", "crab", "dog", "duck", "fish",
         "frog", "guitar", "key", "mushroom", "owl", "pear", "rocket", "sailboat", "snail", "sunflower", "turtle",
         "umbrella")
EMOJI = {"apple": "red apple", "cat": "cat face", "dog": "dog face", "fish": "tropical fish", "frog": "frog face"}
"""Where the emoji's own name is another."""
COLOURS = {"red": (225, 45, 40), "green": (40, 165, 60), "blue": (45, 90, 225), "yellow": (245, 205, 40),
           "purple": (150, 60, 190), "grey": (140, 140, 140)}


@dataclass(frozen=True)
class Thing:
    """An object: its name, and its colour or None for the emoji's own."""

    name: str
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES or self.colour not in (None, *COLOURS):
            raise ValueError(f"thing: expected a name of {', '.join(NAMES)} and a colour of {', '.join(COLOURS)} or "
                             f"None, got {self.name!r}, {self.colour!r}")

    def __str__(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name


@dataclass(frozen=True)
class Scene:
    """A picture (32, 32, 3) uint8, its caption, its one or two things, and a mask (32, 32) bool of each."""

    image: np.ndarray
    caption: str
    things: tuple[Thing, ...]
    masks: tuple[np.ndarray, ...]


class Painter:
    """Draws scenes with the emoji of one style.

    Args:
        made_up: take the stand-in of the data, where coloured squares stand for the emoji.
        style: ``emoji`` or ``emoji-other-style``.
    """

    def __init__(self, *, made_up: bool = False, style: str = "emoji") -> None:
        found = data.stand_in(style, 64) if made_up else data.pictures(style)
        assert isinstance(found, data.Pictures)
        captions = found.column("caption")
        rows = [i % len(captions) if made_up else captions.index(EMOJI.get(name, name))
                for i, name in enumerate(NAMES)]
        self._emoji = {name: np.asarray(found.images[row]) for name, row in zip(NAMES, rows, strict=True)}

    def scene(self, things: Sequence[Thing], rng: random.Random) -> Scene:
        """The picture of one or two things, side by side in the order given; ``rng`` draws ground, places and sizes.

        Raises:
            ValueError: another number of things.
        """
        if len(things) not in (1, 2):
            raise ValueError(f"scene: expected 1 or 2 things, got {len(things)}")
        image = np.full((SIZE, SIZE, 3), rng.randint(200, 255), dtype=np.float32)
        wide, masks = SIZE // len(things), []
        for n, thing in enumerate(things):
            side = rng.randint(13, 16) if len(things) == 2 else rng.randint(18, 26)
            left, top = n * wide + rng.randint(0, wide - side), rng.randint(0, SIZE - side)
            pixels, alpha = self._painted(thing, side)
            here = image[top:top + side, left:left + side]
            here[:] = alpha[..., None] * pixels + (1 - alpha[..., None]) * here
            mask = np.zeros((SIZE, SIZE), dtype=bool)
            mask[top:top + side, left:left + side] = alpha > 0.5
            masks.append(mask)
        caption = " left of ".join(f"a {thing}" for thing in things)
        return Scene(image.round().astype(np.uint8), caption, tuple(things), tuple(masks))

    def scenes(self, count: int, seed: int = 0, *, two: float = 0.5, coloured: float = 0.5) -> list[Scene]:
        """Scenes of things drawn by chance: a part ``two`` has two of them, a part ``coloured`` of all has a colour."""
        rng = random.Random(f"scenes {seed}")
        return [self.scene(draw(rng, two=two, coloured=coloured), rng) for _ in range(count)]

    def _painted(self, thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
        from PIL import Image

        picture: Any = Image.fromarray(self._emoji[thing.name]).resize((side, side), Image.Resampling.BOX)
        whole = np.asarray(picture.convert("RGBA"), dtype=np.float32)
        pixels, alpha = whole[..., :3], whole[..., 3] / 255
        if thing.colour:  # grey levels between 60 and 140 % of the colour: shape and shading stay to be seen
            grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
            pixels = ((0.6 + 0.8 * grey)[..., None] * np.array(COLOURS[thing.colour], dtype=np.float32)).clip(0, 255)
        return pixels, alpha


def draw(rng: random.Random, *, two: float = 0.5, coloured: float = 0.5, names: Iterable[str] = NAMES) -> list[Thing]:
    """One or two things of different names, by chance."""
    chosen = rng.sample(list(names), 2 if rng.random() < two else 1)
    return [Thing(name, rng.choice(list(COLOURS)) if rng.random() < coloured else None) for name in chosen]


@dataclass(frozen=True)
class Hidden:
    """A picture (side, side, 3) uint8 of a thing that lies on copies of another, and exact masks (side, side) bool.

    Attributes:
        image: the picture.
        mask: of the thing.
        copies: what can be seen of each copy; those that are covered are left out.
    """

    image: np.ndarray
    mask: np.ndarray
    copies: tuple[np.ndarray, ...]


def hidden(thing: np.ndarray, other: np.ndarray, rng: random.Random, *, side: int = 128, copies: int = 8,
           camouflage: float = 0.0) -> Hidden:
    """A scene of one thing among copies of another, as things are hidden that have to be found by their name.

    Args:
        thing: uint8 RGBA, such as an emoji; it takes a third to a half of the side.
        other: likewise; each copy takes a fifth to two fifths.
        rng: draws ground, places and sizes.
        side: of the picture in pixels.
        copies: how many, 0 for a plain ground.
        camouflage: from 0 to 1, how far copies and ground take on the mean and spread of the thing's colours.
    """
    centre, spread = _statistics(thing)
    ground = np.array([rng.randint(200, 255)] * 3 if copies else [rng.randint(60, 255) for _ in range(3)], np.float32)
    image = np.empty((side, side, 3), np.float32)
    image[:] = (1 - camouflage) * ground + camouflage * centre
    own = _statistics(other)
    painted = other.astype(np.float32)
    like = (painted[..., :3] - own[0]) / own[1] * spread + centre
    painted[..., :3] = ((1 - camouflage) * painted[..., :3] + camouflage * like).clip(0, 255)
    owner = np.zeros((side, side), dtype=np.int64)
    for n in range(copies):
        size = rng.randint(round(0.2 * side), round(0.4 * side))
        _paste(image, owner, n + 1, painted.round().astype(np.uint8), size, rng, size // 3)
    _paste(image, owner, copies + 1, thing, rng.randint(round(0.34 * side), round(0.52 * side)), rng, 0)
    masks = [owner == n + 1 for n in range(copies + 1)]
    return Hidden(image.round().astype(np.uint8), masks[-1], tuple(m for m in masks[:-1] if m.any()))


def _statistics(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each colour where a picture is opaque."""
    pixels = picture[..., :3][picture[..., 3] > 127].astype(np.float32).reshape(-1, 3)
    pixels = pixels if len(pixels) else np.full((1, 3), 127, np.float32)
    return pixels.mean(0), pixels.std(0) + 8  # flat ones would be blown up


def _paste(image: np.ndarray, owner: np.ndarray, number: int, picture: np.ndarray, size: int, rng: random.Random,
           beyond: int) -> None:
    """Put a picture at a random place, at most ``beyond`` pixels outside, and its number where it is opaque."""
    from PIL import Image

    side = len(image)
    x, y = (rng.randint(-beyond, side - size + beyond) for _ in range(2))
    scaled: Any = Image.fromarray(picture).convert("RGBa").resize((size, size), Image.Resampling.BILINEAR)
    whole = np.asarray(scaled.convert("RGBA"), dtype=np.float32)
    inside = np.s_[max(0, -y):side - y, max(0, -x):side - x]
    alpha, here = whole[..., 3:][inside] / 255, np.s_[max(0, y):y + size, max(0, x):x + size]
    image[here] = alpha * whole[..., :3][inside] + (1 - alpha) * image[here]
    owner[here][alpha[..., 0] > 0.5] = number


__all__ = ["COLOURS", "EMOJI", "NAMES", "SIZE", "Hidden", "Painter", "Scene", "Thing", "draw", "hidden"]
