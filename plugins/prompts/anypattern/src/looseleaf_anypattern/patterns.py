"""Ways to edit a picture, each a function of the picture and a random generator; own ones join by a decorator.

Patterns work on float32 (H, W, 3) fractions and draw everything from the generator that they are given, so that equal
seeds give equal pictures. They stand for the families of the paper's hundred patterns, not for its very functions: the
official generator needs a dozen libraries. Style networks and adversarial noise are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from looseleaf.errors import did_you_mean
from looseleaf_vision import as_image

Picture = np.ndarray
Function = Callable[[Picture, np.random.Generator], Picture]
FAMILIES = ("geometry", "colour", "texture", "overlay", "removal", "keyed")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One way to edit a picture.

    Attributes:
        name: such as ``"zoom-blur"``.
        family: one of :data:`FAMILIES`, or a word of your own.
        function: (float32 (H, W, 3) in [0, 1], generator) -> the same shape.
    """

    name: str
    family: str
    function: Function = dataclasses.field(repr=False)

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Picture:
        """The edited picture, float32 in [0, 1].

        Raises:
            ValueError: the function gave another shape or numbers that are not finite.
        """
        edited = np.asarray(self.function(picture.copy(), rng), dtype=np.float32)
        if edited.shape != picture.shape or not np.isfinite(edited).all():
            raise ValueError(f"pattern {self.name!r}: expected finite numbers of the shape {picture.shape}, got "
                             f"{edited.shape}{'' if np.isfinite(edited).all() else ' with NaN or infinity'}")
        return edited.clip(0, 1)

    def fingerprint(self) -> str:
        """Name and family: what a saved training is told apart by."""
        return f"{self.family}/{self.name}"


PATTERNS: dict[str, Pattern] = {}
"""All registered patterns by name, in the order of registration."""


def pattern(family: str, name: str | None = None) -> Callable[[Function], Function]:
    """Register a function as a pattern; a decorator.

    ```python
    @pattern("overlay")
    def red_corner(picture, rng):
        picture[:8, :8] = (1, 0, 0)
        return picture
    ```

    Args:
        family: of the pattern.
        name: its name; None: that of the function, with hyphens.

    Raises:
        ValueError: there is a pattern of this name already.
    """
    def register(function: Function) -> Function:
        own = name or function.__name__.strip("_").replace("_", "-")
        if own in PATTERNS:
            raise ValueError(f"pattern: expected a new name, got {own!r}, which is registered already")
        PATTERNS[own] = Pattern(own, family, function)
        return function
    return register


def find(names: Iterable[str | Pattern]) -> list[Pattern]:
    """Patterns by their names; patterns stay as they are.

    Raises:
        ValueError: no such name.
    """
    found = []
    for name in [names] if isinstance(names, (str, Pattern)) else names:
        if not isinstance(name, Pattern) and name not in PATTERNS:
            raise ValueError(f"patterns: expected names such as 'rotate', got {name!r}."
                             + did_you_mean(str(name), PATTERNS))
        found.append(name if isinstance(name, Pattern) else PATTERNS[name])
    return found


def apply(names: Iterable[str | Pattern], picture: Any, seed: int | np.random.Generator = 0) -> np.ndarray:
    """A picture edited by patterns one after the other, as uint8 (H, W, 3).

    Args:
        names: names or patterns.
        picture: whatever :func:`looseleaf_vision.as_image` reads: PIL images of any mode, arrays, tensors.
        seed: of all parameters, or a generator.
    """
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,):
        fractions = picture.astype(np.float32) / 255
    else:
        fractions = np.asarray(as_image(picture), dtype=np.float32) / 255
    for one in find(names):
        fractions = one(fractions, rng)
    edited: np.ndarray = (fractions * 255).round().astype(np.uint8)
    return edited


__all__ = ["FAMILIES", "PATTERNS", "Function", "Pattern", "Picture", "apply", "find", "pattern"]
