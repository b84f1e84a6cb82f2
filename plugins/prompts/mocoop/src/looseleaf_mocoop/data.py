"""Few-shot tasks whose pictures come in styles: the same classes as emoji, clip art and stamps, and in four inks."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from looseleaf import Example, Task
from looseleaf_vision import as_image, few_shot_task

Cell = tuple[str, str, str]
CLASSES: dict[str, Cell] = {
    "birds": ("animal-bird", "animals/birds", "animals/birds"),
    "bugs": ("animal-bug", "animals/bugs", "animals/insects"),
    "buildings": ("place-building", "buildings/homes", "town/houses"),
    "clothing": ("clothing", "people/clothing", "clothes/"),
    "fish": ("animal-marine", "animals/fish", "animals/fish"),
    "flowers": ("plant-flower", "plants/flowers", "plants/flowers"),
    "fruit": ("food-fruit", "food/fruit", "food/fruit"),
    "mammals": ("animal-mammal", "animals/mammals", "animals/mammals"),
    "music": ("musical-instrument", "recreation/music", "hobbies/music"),
    "sports": ("sport", "recreation/sports", "sports/"),
    "tools": ("tool", "tools/", "household/tools"),
    "vegetables": ("food-vegetable", "food/vegetables", "food/vegetables")}
"""Class -> finer class of the emoji, and folders of clip art and stamps."""
SETS = ("emoji", "clip-art", "stamps")
INKS = {"green": (0.10, 0.65, 0.15), "blue": (0.10, 0.20, 0.85), "yellow": (0.95, 0.85, 0.10),
        "pink": (1.00, 0.50, 0.70)}
TEMPLATES = {
    "styles": ("a cartoon of a {}.", "a drawing of a {}.", "a photo of a {}."),
    "inks": tuple(text for ink in INKS for text in (f"a {ink} {{}}.", f"a drawing of {ink} {{}}."))}
GROUPS = {"styles": (1, 1, 1), "inks": (2, 2, 2, 2)}
EACH = 8
"""Most test pictures, and most pictures that shots are drawn from, of a class in a style."""
SIDE = 64


@dataclasses.dataclass(frozen=True)
class Styled:
    """Pictures of some classes in some styles.

    Attributes:
        train, test: examples with the inputs ``image`` (what a model sees) and ``style`` (what it never sees).
    """

    train: list[Example]
    test: list[Example]

    def task(self, shots: int, seed: int, *, without: str | None = None) -> Task:
        """Shots of each class over all styles, or over all but one, on which it is then tested."""
        train = [e for e in self.train if e.inputs["style"] != without]
        test = [e for e in self.test if without is None or e.inputs["style"] == without]
        return few_shot_task("styles", train, test, shots=shots, seed=seed)


def styled(name: str, cells: Mapping[tuple[str, str], Sequence[np.ndarray]]) -> Styled:
    """The pictures of ``"styles"`` or ``"inks"``.

    Args:
        name: which; of the styles the true one is the data set, of the inks the colour that a clip art is drawn in.
        cells: see :func:`by_class`.
    """
    if name == "inks":
        cells = {(label, ink): [drawn_in(image, ink) for image in images[n::len(INKS)]]
                 for (label, kind), images in cells.items() if kind == "clip-art" for n, ink in enumerate(INKS)}
    train, test = [], []
    for (label, style), images in cells.items():
        examples = [Example({"image": image, "style": style}, label) for image in images[:2 * EACH]]
        half = len(examples) // 2
        test += examples[:half]
        train += examples[half:]
    return Styled(train, test)


def by_class(sets: Mapping[str, Any]) -> dict[tuple[str, str], list[np.ndarray]]:
    """(class, data set) -> its pictures (64, 64, 3), in an order that has nothing to do with their names.

    Args:
        sets: name -> pictures of the lab, with ``rows`` and ``images``.
    """
    found: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = defaultdict(list)
    for number, name in enumerate(SETS):
        for row, image in zip(sets[name].rows, sets[name].images, strict=True):
            place = row["sublabel"] if name == "emoji" else f"{row['label']}/{row['sublabel']}"
            for label, folders in CLASSES.items():
                if place == folders[number] or place.startswith(f"{folders[number]}/"):
                    found[label, name].append((row["key"], _small(image)))
    return {cell: [image for _, image in sorted(found[cell], key=lambda each: each[0])]
            for cell in ((label, name) for label in CLASSES for name in SETS)}


def made_up(classes: int = 4, each: int = 8) -> dict[tuple[str, str], list[np.ndarray]]:
    """Noise in the place of :func:`by_class`, for tests; never for results."""
    rng = np.random.default_rng(0)
    return {(label, name): list(rng.integers(0, 255, (each, SIDE, SIDE, 3), dtype=np.uint8))
            for label in list(CLASSES)[:classes] for name in SETS}


def drawn_in(image: np.ndarray, ink: str) -> np.ndarray:
    """A picture (H, W, 3), uint8, with its darkness as the amount of an ink on white."""
    darkness = 1 - image.astype(np.float32).mean(-1, keepdims=True) / 255
    colour = 1 - darkness * (1 - np.array(INKS[ink], dtype=np.float32))
    return (255 * colour).round().astype(np.uint8)


def _small(image: Any) -> np.ndarray:
    picture = as_image(np.asarray(image))
    return np.array(picture if picture.size == (SIDE, SIDE) else picture.resize((SIDE, SIDE), 3))


def information(chosen: Sequence[Any], style: Sequence[Any]) -> float:
    """Mutual information of what was chosen with the style, as a fraction of the style's entropy, in [0, 1]."""
    def entropy(values: Sequence[Any]) -> float:
        counts = np.array(np.unique([str(v) for v in values], return_counts=True)[1], dtype=np.float64)
        odds = counts / counts.sum()
        return float(-(odds * np.log(odds)).sum())

    both = [f"{a} | {b}" for a, b in zip(chosen, style, strict=True)]
    return (entropy(chosen) + entropy(style) - entropy(both)) / entropy(style)


__all__ = [
    "CLASSES",
    "GROUPS",
    "INKS",
    "SETS",
    "TEMPLATES",
    "Styled",
    "by_class",
    "drawn_in",
    "information",
    "made_up",
    "styled",
]
