"""Arms of the bandit: an instruction and an ordered set of exemplars."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Sequence

import numpy as np

from looseleaf_text import Example
from looseleaf_ease.transport import Ints

Arm = tuple[int, tuple[int, ...]]
"""Place of the instruction among the candidates, and places of the exemplars in the pool, in their order."""


def generator(*purpose: object) -> np.random.Generator:
    """A generator of its own for each purpose, such as (seed, "round", 7): nothing random depends on what came
    before, so that a search can be resumed anywhere."""
    return np.random.default_rng(random.Random(repr(purpose)).getrandbits(128))


def draw(rng: np.random.Generator, pool: int, k: int, instructions: int, count: int,
         without: Collection[Arm] = ()) -> list[Arm]:
    """Different arms drawn uniformly: ``count`` of them, fewer after those drawn twice or in ``without`` are left
    out, and all there are where there are no more than ``count``.

    Args:
        rng: the source of randomness.
        pool, k: exemplars to choose from, and how many are chosen, in order.
        instructions: how many there are to choose from.
        count: how many arms are drawn.
        without: arms not wanted.
    """
    if math.perm(pool, k) * instructions <= count:
        every = list(itertools.product(range(instructions), itertools.permutations(range(pool), k)))
        arms = [every[n] for n in rng.permutation(len(every))]
    else:
        # The k least of random keys, in the order of their keys, are a uniformly drawn ordered set.
        keys = rng.random((count, pool))
        sets = np.argpartition(keys, k - 1, axis=1)[:, :k]
        sets = np.take_along_axis(sets, np.take_along_axis(keys, sets, 1).argsort(1), 1)
        chosen = rng.integers(instructions, size=count)
        arms = [(int(i), tuple(s)) for i, s in zip(chosen, sets.tolist(), strict=True)]
    return [arm for arm in dict.fromkeys(arms) if arm not in without]


def sets_of(arms: Sequence[Arm]) -> Ints:
    """The exemplars of arms of like size, (arms, k)."""
    return np.array([exemplars for _, exemplars in arms], dtype=np.int64)


def in_turn(examples: Sequence[Example], most: int) -> list[Example]:
    """The first ``most`` examples, labels taking turns so that each has its share."""
    groups: dict[str | None, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.label, []).append(example)
    rounds = itertools.zip_longest(*groups.values())
    return [e for row in rounds for e in row if e is not None][:most]
