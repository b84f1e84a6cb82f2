"""Pictures of one or two emoji on a plain ground, with captions and exact masks.

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


__all__ = ["COLOURS", "EMOJI", "NAMES", "SIZE", "Painter", "Scene", "Thing", "draw"]
