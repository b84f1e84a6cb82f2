"""Random draws that come out the same under every version of Python.

The standard library promises the sequence of ``random.Random(text).random()`` for ever, but not that of ``sample``,
``shuffle`` and the like; so everything here is made of that one method.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A source of random choices.

    Args:
        seed: any text; equal texts give equal draws on every machine.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.whole(0, len(items) - 1)]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different places of ``items``, in random order."""
        rest = list(items)
        return [rest.pop(self.whole(0, len(rest) - 1)) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of ``items`` in random order."""
        return self.some(items, len(items))

    def word(self, letters: Sequence[str], length: int) -> str:
        """``length`` of ``letters``, each as often as chance will have it."""
        return "".join(self.pick(letters) for _ in range(length))
