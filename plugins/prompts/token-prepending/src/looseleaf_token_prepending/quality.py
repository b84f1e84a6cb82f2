"""How good embeddings are: rank correlation with graded pairs, the label of the nearest neighbour, and both as a
teacher's embeddings have it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from looseleaf import Example, SetMetric
from looseleaf_text import TextTask


def weighted_spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray,
                      weights: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation, ties by their mean rank; NaN where one side is constant.

    Args:
        x, y: n values each.
        weights: how often each pair counts, (n,) or (samples, n), such as the draws of a bootstrap; None: once.

    Returns:
        float64 of shape () or (samples,).
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError("expected two lists of equal length, two values or more, got the shapes "
                         f"{a.shape} and {b.shape}")
    w = np.ones_like(a) if weights is None else np.asarray(weights, dtype=np.float64)
    total = w.sum(-1, keepdims=True)
    p, q = _ranks(a, w), _ranks(b, w)
    p, q = p - (w * p).sum(-1, keepdims=True) / total, q - (w * q).sum(-1, keepdims=True) / total
    norm = np.sqrt((w * p * p).sum(-1) * (w * q * q).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (w * p * q).sum(-1) / norm, np.nan)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks (up to a constant) where each value stands as often as its weight says."""
    order = np.argsort(values, kind="stable")
    steps = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
    groups = np.add.reduceat(weights[..., order], steps, axis=-1)
    middles = np.cumsum(groups, axis=-1) - groups / 2
    out = np.empty(weights.shape)
    out[..., order] = np.repeat(middles, np.diff(np.r_[steps, len(values)]), axis=-1)
    return out


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Cosine of each row of ``one`` with the same row of ``two``, float64; 0 where a row is zero."""
    return (_unit(one) * _unit(two)).sum(-1)


def nearest_neighbour(vectors: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """For each text 1.0 where the text most like it, itself left out, has the same label, else 0.0."""
    found = nearest(square(vectors))
    return np.array([float(labels[n] == labels[found[n]]) for n in range(len(labels))])


def neighbour_accuracy(vectors: Sequence[Any], examples: Sequence[Example]) -> float:
    """The metric of labelled texts: how many of them have a nearest neighbour, by the predicted vectors, of the same
    target."""
    rows = np.stack([np.asarray(v) for v in vectors])
    return float(nearest_neighbour(rows, [str(e.target) for e in examples]).mean())


def square(vectors: np.ndarray) -> np.ndarray:
    """Cosine of every row with every row, float64 of shape (n, n)."""
    unit = _unit(vectors)
    return unit @ unit.T


def nearest(like: np.ndarray) -> np.ndarray:
    """For each row of ``like`` (n, n) the index of its greatest value, the diagonal left out."""
    alone = like.copy()
    np.fill_diagonal(alone, -np.inf)
    return alone.argmax(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    rows = np.asarray(vectors, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def pairs_task(name: str, pairs: Iterable[tuple[str, str, float]], dev: Iterable[tuple[str, str, float]] = (),
               test: Iterable[tuple[str, str, float]] = ()) -> TextTask:
    """A task of graded pairs for :meth:`TokenPrepending.optimize`.

    Args:
        name: short name.
        pairs: training examples as (text, text, grade); a higher grade means more alike, on any scale.
        dev, test: more of them.
    """
    def examples(part: Iterable[tuple[str, str, float]]) -> list[Example]:
        return [Example({"first": a, "second": b}, float(grade)) for a, b, grade in part]

    return TextTask(name, examples(pairs), examples(dev), examples(test), metric=SetMetric(similarity),
                    template="{first}\n{second}")


def similarity(vectors: Sequence[Any], examples: Sequence[Example]) -> float:
    """The metric of graded pairs: Spearman's correlation of the cosines of the predicted vectors, (2, hidden) for each
    pair, with the grades; -1 where one side is constant."""
    rows = np.stack([np.asarray(v) for v in vectors])
    value = float(weighted_spearman(cosines(rows[:, 0], rows[:, 1]), [_grade(e) for e in examples]))
    return value if math.isfinite(value) else -1.0


@dataclasses.dataclass
class Development:
    """Texts and what embeddings of them are judged by.

    Attributes:
        texts: the different texts.
        grades: graded pairs: the grade of each; None for labelled texts.
        pairs: graded pairs: indices of the two texts of each, (n, 2).
        labels: labelled texts: the label of each.
    """

    texts: list[str]
    grades: list[float] | None = None
    pairs: np.ndarray | None = None
    labels: list[str] | None = None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Development:
        """The examples of a task.

        Raises:
            ValueError: they are neither texts with labels nor pairs with grades, or all of one label or grade.
        """
        if not examples:
            raise ValueError("there are no examples to judge embeddings by: give texts with labels, or graded pairs")
        sizes = {len(e.inputs) for e in examples}
        if sizes == {1} and all(e.target is not None for e in examples):
            labelled = {next(iter(e.inputs.values())): str(e.target) for e in examples}
            if len(set(labelled.values())) < 2 or len(labelled) < 3:
                raise ValueError("expected 3 texts and 2 labels, or more, which a nearest neighbour needs, got "
                                 f"{len(labelled)} different texts of {len(set(labelled.values()))} label(s)")
            return cls(list(labelled), labels=list(labelled.values()))
        if sizes != {2}:
            raise ValueError("expected texts with a target each (one input), or pairs (two inputs) with a number as "
                             f"target, by which embeddings can be judged, got examples of {sorted(sizes)} inputs")
        texts = list(dict.fromkeys(t for e in examples for t in e.inputs.values()))
        place = {t: n for n, t in enumerate(texts)}
        grades = [_grade(e) for e in examples]
        if len(set(grades)) < 2:
            raise ValueError(f"all {len(grades)} pairs have one grade: a rank correlation needs two different ones")
        return cls(texts, grades, np.array([[place[t] for t in e.inputs.values()] for e in examples]))

    @property
    def measure(self) -> str:
        """What :meth:`quality` is."""
        return "accuracy of the nearest neighbour" if self.grades is None else "Spearman's correlation"

    def quality(self, vectors: np.ndarray) -> float:
        """How good ``vectors`` of :attr:`texts` are; -1 for a correlation of embeddings that are all alike."""
        if self.labels is not None:
            return float(nearest_neighbour(vectors, self.labels).mean())
        assert self.pairs is not None and self.grades is not None
        value = float(weighted_spearman(cosines(vectors[self.pairs[:, 0]], vectors[self.pairs[:, 1]]), self.grades))
        return value if math.isfinite(value) else -1.0


def _grade(example: Example) -> float:
    try:
        value = float(example.target)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the pair {tuple(example.inputs.values())}: expected a number as target, higher for more "
                         f"alike, got {example.target!r}")
    return value


# ---------------------------------------------------------------------------------------- a teacher's judgement

DEV_FRACTION, DEV_PAIRS, TEST_PAIRS = 0.35, 400, 1000
"""Fraction of the sentences that layers are chosen on, and pairs drawn of them and of the others."""


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
class SentenceSplit:
    """Which sentences of a set are for choosing and which for measuring.

    Attributes:
        dev_pairs, test_pairs: (m, 2) indices of sentences; no sentence is in both.
        test: indices of the sentences for measuring.
    """

    dev_pairs: np.ndarray
    test: np.ndarray
    test_pairs: np.ndarray

    @classmethod
    def draw(cls, some: Sentences, seed: int) -> SentenceSplit:
        """Sentences and pairs drawn by ``seed``."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(some.texts))
        dev, test = np.split(order, [round(DEV_FRACTION * len(order))])
        return cls(stratified_pairs(some.teacher, dev, DEV_PAIRS, rng), test,
                   stratified_pairs(some.teacher, test, TEST_PAIRS, rng))


def stratified_pairs(teacher: np.ndarray, members: np.ndarray, count: int, rng: np.random.Generator,
                     strata: int = 10) -> np.ndarray:
    """Different pairs of ``members``, as evenly over the range of the teacher's cosines as there are such pairs.

    The range is cut into ``strata`` of equal width. Those with few pairs give all they have, and the others give what
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
class EmbeddingComparison:
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
    splits: list[dict[str, SentenceSplit]]

    def correlation(self, choice: Choice, split: dict[str, SentenceSplit], dev: bool = False) -> float:
        """Spearman's correlation with the teacher on test (or dev) pairs, mean over the sets of ``split``."""
        return float(np.mean([self._correlation(choice, name, part.dev_pairs if dev else part.test_pairs)
                              for name, part in split.items()]))

    def _correlation(self, choice: Choice, name: str, pairs: np.ndarray,
                     weights: np.ndarray | None = None) -> np.ndarray:
        way, leave = choice
        i, j = pairs.T
        return weighted_spearman(self.ways[way][name][leave][i, j], self.sets[name].teacher[i, j], weights)

    def chosen(self, *ways: str) -> list[Choice]:
        """For each split the way and the exit in the upper half that are best on its development pairs."""
        every = [(way, leave) for way in ways for leave in range(max(0, len(self.exits) // 2 - 1), len(self.exits))]
        return [max(every, key=lambda c: self.correlation(c, split, dev=True)) for split in self.splits]

    def resampled(self, split: dict[str, SentenceSplit], one: Choice,
                  other: Choice | None = None) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
        """How many test sentences there are, and the correlation of ``one`` (less ``other``'s) when they are redrawn.

        Sentences are drawn, not pairs: a sentence is in many pairs, so pairs do not vary independently. A pair counts
        as often as its two sentences were drawn together.

        Returns:
            n, and a function of rows (samples, n) of integers in [0, n - 1] that gives (samples,).
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

    def neighbour_matches(self, choice: Choice, split: dict[str, SentenceSplit], teacher: bool) -> np.ndarray:
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
