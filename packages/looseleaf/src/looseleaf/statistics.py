"""Uncertainty and agreement: bootstrap intervals, paired differences, rank correlation, AUROC, calibration error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and the ends of its interval; ``f"{interval:+.2f}"`` formats all three."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"

    def __str__(self) -> str:
        return format(self)

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low)


def bootstrap(values: Iterable[float], seed: int = 0, *, level: float = 0.95, samples: int = 2000,
              statistic: Callable[[np.ndarray], np.ndarray] | None = None) -> Interval:
    """The statistic of all values with its percentile bootstrap interval; a single value is its own interval.

    Args:
        values: one for each independent unit (seed, window, example).
        seed: random seed of the resampling.
        level: coverage of the interval.
        samples: number of resamples.
        statistic: maps (samples, n) to (samples,); None: the mean over the last axis.

    Raises:
        ValueError: no value, a value that is not finite, or a level out of range.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"bootstrap: expected finite values and at least one, got {array.tolist()[:10]}")
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f"bootstrap: expected 0 < level < 1 and samples >= 1, got level={level}, samples={samples}")
    of = statistic or (lambda rows: rows.mean(-1))
    picks = np.random.default_rng(seed).integers(0, array.size, (samples, array.size))
    low, high = np.quantile(of(array[picks]), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(of(array[None])[0]), float(low), float(high))


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0, **options: Any) -> Interval:
    """Mean of the differences ``ours - theirs`` of the same units, with its :func:`bootstrap` interval.

    Raises:
        ValueError: not equally many; see also :func:`bootstrap`.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired: expected equally many values, got {len(ours)} and {len(theirs)}")
    return bootstrap([a - b for a, b in zip(ours, theirs, strict=True)], seed, **options)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, float64; ties have their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    mean_ranks: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return mean_ranks[inverse]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties by their mean rank; NaN where one side is constant.

    Raises:
        ValueError: not equally many, or fewer than two.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"spearman: expected equally many values, two or more, got {len(x)} and {len(y)}")
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores higher than a negative, ties counted as a half.

    Raises:
        ValueError: one side is empty.
    """
    n = len(positive)
    if not n or not len(negative):
        raise ValueError(f"auroc: expected scores on both sides, got {n} and {len(negative)}")
    return float((_ranks([*positive, *negative])[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by how many fall into each, in [0, 1].

    Raises:
        ValueError: not equally many, none, or a confidence outside [0, 1].
    """
    p, hit = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != hit.shape or not p.size or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"expected_calibration_error: expected equally many confidences in [0, 1] and outcomes, "
                         f"got {p.size} and {hit.size}")
    gaps = np.bincount(np.minimum((p * bins).astype(int), bins - 1), weights=p - hit)
    return float(np.abs(gaps).sum() / p.size)


__all__ = ["Interval", "auroc", "bootstrap", "expected_calibration_error", "paired", "spearman"]
