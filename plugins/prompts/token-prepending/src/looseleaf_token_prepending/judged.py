"""Embeddings judged by a teacher: pairs of sentences graded by the teacher's cosine, and nearest neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from looseleaf_token_prepending.quality import nearest, spearman

DEV_SHARE, DEV_PAIRS, TEST_PAIRS = 0.35, 400, 1000
"""Share of the sentences that layers are chosen on, and pairs drawn of them and of the others."""


@dataclasses.dataclass
class Sentences:
    """One set of sentences.

    Attributes:
        texts, labels: n sentences and their topics.
        teacher: (n, n) cosines of the teacher's embeddings.
    """

    texts: list[str]
    labels: list[str]
    teacher: np.ndarray


@dataclasses.dataclass
class Split:
    """Which sentences of a set are for choosing and which for measuring.

    Attributes:
        dev_pairs, test_pairs: (m, 2) indices of sentences; no sentence is in both.
        test: indices of the sentences for measuring.
    """

    dev_pairs: np.ndarray
    test: np.ndarray
    test_pairs: np.ndarray

    @classmethod
    def draw(cls, some: Sentences, seed: int) -> Split:
        """Sentences and pairs drawn by ``seed``."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(some.texts))
        dev, test = np.split(order, [round(DEV_SHARE * len(order))])
        return cls(stratified_pairs(some.teacher, dev, DEV_PAIRS, rng), test,
                   stratified_pairs(some.teacher, test, TEST_PAIRS, rng))


def stratified_pairs(teacher: np.ndarray, members: np.ndarray, count: int, rng: np.random.Generator,
                     strata: int = 10) -> np.ndarray:
    """Different pairs of ``members``, as evenly over the range of the teacher's cosines as there are such pairs.

    The range is cut into ``strata`` of equal width. Those with few pairs give all they have, and the others share what
    is missing.

    Returns:
        (m, 2) indices, m the lesser of ``count`` and all pairs there are.
    """
    i, j = np.triu_indices(len(members), 1)
    pairs = np.stack([members[i], members[j]], axis=1)
    grades = teacher[pairs[:, 0], pairs[:, 1]]
    edges = np.linspace(grades.min(), grades.max(), strata + 1)[1:-1]
    bins = [rng.permutation(np.flatnonzero(np.digitize(grades, edges) == s)) for s in range(strata)]
    chosen: list[int] = []
    # the smallest first: what they lack goes to those after them
    for left, stratum in zip(range(strata, 0, -1), sorted(bins, key=len), strict=True):
        chosen += stratum[:(count - len(chosen)) // left].tolist()
    return pairs[sorted(chosen)]


Likeness = dict[str, np.ndarray]
"""Set -> (exit layers, n, n) cosines of the embeddings made in one way."""
Choice = tuple[str, int]
"""A way of embedding, and the index of an exit layer."""


@dataclasses.dataclass
class Judged:
    """Several ways of embedding the same sentences.

    Attributes:
        sets: the sentences.
        exits: exit layers, all of the model's, counted from 1.
        ways: name of a way -> its cosines, in the order of ``exits``.
        splits: for each seed, set -> split.
    """

    sets: dict[str, Sentences]
    exits: list[int]
    ways: dict[str, Likeness]
    splits: list[dict[str, Split]]

    def correlation(self, choice: Choice, split: dict[str, Split], dev: bool = False) -> float:
        """Spearman's correlation with the teacher on test (or dev) pairs, mean over the sets of ``split``."""
        return float(np.mean([self._correlation(choice, name, part.dev_pairs if dev else part.test_pairs)
                              for name, part in split.items()]))

    def _correlation(self, choice: Choice, name: str, pairs: np.ndarray,
                     weights: np.ndarray | None = None) -> np.ndarray:
        way, leave = choice
        i, j = pairs.T
        return spearman(self.ways[way][name][leave][i, j], self.sets[name].teacher[i, j], weights)

    def chosen(self, *ways: str) -> list[Choice]:
        """For each split the way and the exit in the upper half that are best on its development pairs."""
        every = [(way, leave) for way in ways for leave in range(max(0, len(self.exits) // 2 - 1), len(self.exits))]
        return [max(every, key=lambda c: self.correlation(c, split, dev=True)) for split in self.splits]

    def resampled(self, split: dict[str, Split], one: Choice,
                  other: Choice | None = None) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
        """How many test sentences there are, and the correlation of ``one`` (less ``other``'s) when they are redrawn.

        Sentences are drawn, not pairs: a sentence is in many pairs, so pairs do not vary independently. A pair counts
        as often as its two sentences were drawn together.

        Returns:
            n, and a function of rows (samples, n) of numbers from 0 to n - 1 that gives (samples,).
        """
        owners = np.concatenate([np.full(len(part.test), k) for k, part in enumerate(split.values())])

        def statistic(rows: np.ndarray) -> np.ndarray:
            drawn = np.stack([np.bincount(row, minlength=len(owners)) for row in rows.astype(int)])
            out = []
            for k, (name, part) in enumerate(split.items()):
                counts = np.zeros((len(rows), len(self.sets[name].texts)))
                counts[:, part.test] = drawn[:, owners == k]
                i, j = part.test_pairs.T
                weights = counts[:, i] * counts[:, j]
                value = self._correlation(one, name, part.test_pairs, weights)
                out.append(value if other is None else value - self._correlation(other, name, part.test_pairs, weights))
            return np.mean(out, axis=0)

        return len(owners), statistic

    def hits(self, choice: Choice, split: dict[str, Split], teacher: bool) -> np.ndarray:
        """For each test sentence 1.0 where its nearest neighbour among them has its topic, or is the teacher's.

        Args:
            choice: way and exit.
            split: which sentences.
            teacher: ask for the teacher's nearest neighbour in place of the topic.
        """
        way, leave = choice
        out = []
        for name, part in split.items():
            among = np.ix_(part.test, part.test)
            found = nearest(self.ways[way][name][leave][among])
            labels = np.array(self.sets[name].labels)[part.test]
            out.append(found == nearest(self.sets[name].teacher[among]) if teacher else labels[found] == labels)
        return np.concatenate(out).astype(float)


def paired(ones: Sequence[Choice], others: Sequence[Choice] | None) -> list[tuple[Choice, Choice | None]]:
    """The choices of each split side by side; nothing on the other side where there is nothing to compare with."""
    return [(one, None if others is None else others[n]) for n, one in enumerate(ones)]
