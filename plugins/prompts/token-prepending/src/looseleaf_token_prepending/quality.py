"""How good embeddings are: rank correlation with graded pairs, and the label of the nearest neighbour."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from looseleaf_text import Example, Task


class Encodes(Protocol):
    """Anything that makes vectors of texts, such as :class:`SentenceEncoder` or a ``SentenceTransformer``."""

    def encode(self, texts: list[str], /) -> np.ndarray:
        """(n, hidden) vectors of n texts."""


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray,
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
        raise ValueError(f"values of shapes {a.shape} and {b.shape}: allowed are two lists of equal length, from 2")
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
               test: Iterable[tuple[str, str, float]] = ()) -> Task:
    """A task of graded pairs for :meth:`TokenPrepending.optimize`.

    Args:
        name: short name.
        pairs: training examples as (text, text, grade); a higher grade means more alike, on any scale.
        dev, test: more of them.
    """
    def examples(part: Iterable[tuple[str, str, float]]) -> list[Example]:
        return [Example({"first": a, "second": b}, reference=str(float(grade))) for a, b, grade in part]

    return Task(name, examples(pairs), examples(dev), examples(test), metric=similarity, template="{first}\n{second}")


def similarity(prediction: str, example: Example) -> float:
    """The metric of a task of graded pairs: Spearman's correlation of cosines with grades.

    It names the metric and cannot be called: a correlation is of many pairs. :func:`pair_correlation` measures it.
    """
    raise ValueError("a rank correlation is of many pairs, not of one: use pair_correlation(encoder, task.test)")


def pair_correlation(encoder: Encodes, examples: Sequence[Example]) -> float:
    """Spearman's correlation of the cosines of pairs with their grades."""
    data = Development.of(examples)
    if data.grades is None:
        raise ValueError("the examples are no graded pairs: give each two fields and a number as reference")
    return data.quality(encoder.encode(data.texts))


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
        if all(e.label is not None and len(e.fields) == 1 for e in examples):
            labelled = {next(iter(e.fields.values())): str(e.label) for e in examples}
            if len(set(labelled.values())) < 2 or len(labelled) < 3:
                raise ValueError(f"{len(labelled)} different texts of {len(set(labelled.values()))} label(s): a "
                                 "nearest neighbour needs 3 texts and 2 labels, or more")
            return cls(list(labelled), labels=list(labelled.values()))
        if not all(e.label is None and len(e.fields) == 2 for e in examples):
            raise ValueError("embeddings can be judged by texts with a label each (one field), or by pairs (two "
                             "fields) with a number as reference; these examples are neither")
        texts = list(dict.fromkeys(t for e in examples for t in e.fields.values()))
        place = {t: n for n, t in enumerate(texts)}
        grades = [_grade(e) for e in examples]
        if len(set(grades)) < 2:
            raise ValueError(f"all {len(grades)} pairs have one grade: a rank correlation needs two different ones")
        return cls(texts, grades, np.array([[place[t] for t in e.fields.values()] for e in examples]))

    @property
    def measure(self) -> str:
        """What :meth:`quality` is."""
        return "accuracy of the nearest neighbour" if self.grades is None else "Spearman's correlation"

    def quality(self, vectors: np.ndarray) -> float:
        """How good ``vectors`` of :attr:`texts` are; -1 for a correlation of embeddings that are all alike."""
        if self.labels is not None:
            return float(nearest_neighbour(vectors, self.labels).mean())
        assert self.pairs is not None and self.grades is not None
        value = float(spearman(cosines(vectors[self.pairs[:, 0]], vectors[self.pairs[:, 1]]), self.grades))
        return value if math.isfinite(value) else -1.0


def _grade(example: Example) -> float:
    try:
        value = float(example.reference or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the pair {tuple(example.fields.values())} has reference {example.reference!r}: allowed is a "
                         "number, higher for more alike")
    return value
