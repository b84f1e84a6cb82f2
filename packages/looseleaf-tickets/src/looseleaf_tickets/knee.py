"""Where a curve of quality over sparsity falls off the cliff (essential sparsity, arXiv 2306.03805, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from looseleaf.plugin import check_fields

Mean = Literal["mean", "exp-mean"]


@dataclass
class Curve:
    """A metric over sparsity, batch by batch.

    Attributes:
        levels: sparsities, ascending, in [0, 1); the first is the dense reference, 0.0.
        batches: for each level the metric of each evaluation batch: the same batches at every level, so that a
            bootstrap over batches compares like with like.
        name: what the metric is called.
        higher_is_better: True for accuracy, False for loss and perplexity.
        mean: how batches become one value: ``"mean"``, or ``"exp-mean"`` (batches are mean losses in nats, the value is
            perplexity). The knee is sought on the loss then: on the scale of perplexity, which grows over orders of
            magnitude beyond the cliff, only the last level would count.
    """

    levels: list[float]
    batches: list[list[float]]
    name: str = "metric"
    higher_is_better: bool = True
    mean: Mean = "mean"

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or len(self.levels) != len(self.batches):
            raise ValueError(f"Curve: expected at least 2 levels and a row of batches for each, got {len(self.levels)} "
                             f"levels and {len(self.batches)} rows")
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:]))
        if self.levels[0] != 0.0 or not ascending or not all(0.0 <= s < 1.0 for s in self.levels):
            raise ValueError("Curve.levels: expected ascending sparsities in [0, 1), the first 0.0 (the dense "
                             f"reference), got {self.levels!r}")
        sizes = {len(row) for row in self.batches}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"Curve.batches: expected rows of one length, at least 1, got {sorted(sizes)}")
        check_fields(self)
        if not all(math.isfinite(x) for x in self.batches[0]):
            raise ValueError("the metric of the dense model is not a number: repair the evaluation first")

    def values(self) -> list[float]:
        """The metric at each level."""
        return [float(v) for v in self._reduce(np.asarray(self.batches, dtype=np.float64).mean(1))]

    def intervals(self, resamples: int = 1000, seed: int = 0) -> list[tuple[float, float]]:
        """95 % bootstrap interval over batches at each level."""
        drawn = self._reduce(self._resampled(resamples, seed))
        low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
        return [(float(a), float(b)) for a, b in zip(low, high)]

    def _resampled(self, resamples: int, seed: int) -> np.ndarray:
        """Means over resampled batches, (resamples, levels); the same batches at every level."""
        data = np.asarray(self.batches, dtype=np.float64)
        chosen = np.random.default_rng(seed).integers(0, data.shape[1], (resamples, data.shape[1]))
        return np.stack([data[:, index].mean(1) for index in chosen])

    def _reduce(self, means: np.ndarray) -> np.ndarray:
        if self.mean == "mean":
            return means
        with np.errstate(over="ignore"):
            return np.exp(means)


@dataclass(frozen=True)
class Interval:
    """A sparsity with its 95 % bootstrap interval; ``value`` is None where there is none."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "none in range"
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return f"{self.value:.1%} (95% {self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Knee:
    """What :func:`essential_sparsity` found.

    Attributes:
        within: tolerance -> the largest measured sparsity whose relative drop from dense is within it.
        knee: the turning point of the curve; None where the curve has no drop to turn into.
        step: the largest distance between neighbouring levels: no estimate is finer than that.
        dense: the metric without pruning.
    """

    within: dict[float, Interval] = field(default_factory=dict)
    knee: Interval = Interval(None, None, None)
    step: float = 0.0
    dense: float = math.nan


def essential_sparsity(curve: Curve, tolerances: Sequence[float] = (0.01, 0.05), *, resamples: int = 1000,
                       seed: int = 0) -> Knee:
    """Two estimates of the essential sparsity, each with a bootstrap interval over evaluation batches.

    s*(t) is the largest level whose relative drop from dense is at most t (the metric gets worse by at most t times
    its dense value). The knee is the level of the largest distance between the curve, normalised to the unit square,
    and the chord from its first to its last point; it depends on the last level swept, so state the range with it.
    Paired resampling: all levels see the same resampled batches.

    Args:
        curve: the sweep.
        tolerances: relative drops, each > 0.
        resamples: bootstrap resamples; 0: no intervals.
        seed: random seed of the resampling.

    Raises:
        ValueError: a tolerance or ``resamples`` out of range.
    """
    if not tolerances or not all(isinstance(t, (int, float)) and 0.0 < t < math.inf for t in tolerances):
        raise ValueError(f"tolerances: expected numbers > 0, such as 0.01 for 1 percent, got {tolerances!r}")
    if resamples < 0:
        raise ValueError(f"resamples: expected an integer >= 0, got {resamples!r}")
    means = np.asarray(curve.batches, dtype=np.float64).mean(1)
    one = len(curve.batches[0]) == 1  # a bootstrap over one batch would claim a certainty that is not there
    drawn = curve._resampled(0 if one else resamples, seed) if resamples and not one else np.empty((0, len(means)))
    within = {}
    for t in tolerances:
        value = _largest_within(curve, means, t)
        within[float(t)] = _interval(value, [_largest_within(curve, row, t) for row in drawn])
    knee = _interval(_turning_point(curve, means), [_turning_point(curve, row) for row in drawn])
    step = max(b - a for a, b in zip(curve.levels, curve.levels[1:]))
    return Knee(within, knee, step, float(curve._reduce(means)[0]))


def relative_drops(curve: Curve) -> list[float]:
    """How much worse each level is than dense, relative to dense (0.01 = 1 percent); negative = better."""
    return [float(d) for d in _drops(curve, np.asarray(curve.batches, dtype=np.float64).mean(1))]


def _drops(curve: Curve, means: np.ndarray) -> np.ndarray:
    values = curve._reduce(means)
    worse = (values[0] - values) if curve.higher_is_better else (values - values[0])
    if not values[0]:
        return np.where(worse > 0, np.inf, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        return worse / abs(values[0])


def _largest_within(curve: Curve, means: np.ndarray, tolerance: float) -> float | None:
    drops = _drops(curve, means)  # a level that is not a number compares False: not within
    fits = [s for s, d in zip(curve.levels, drops) if d <= tolerance + 1e-12]
    return max(fits) if fits else None


def _turning_point(curve: Curve, means: np.ndarray) -> float | None:
    finite = np.isfinite(means)
    if finite.sum() < 3:
        return None
    # levels where the model broke altogether count as bad as the worst that could be measured
    sign = 1.0 if curve.higher_is_better else -1.0
    y = sign * means
    y = np.where(finite, y, y[finite].min())
    y = np.minimum.accumulate(y)  # noise upwards is not a turning point
    x = np.asarray(curve.levels, dtype=np.float64)
    if y[0] - y[-1] <= 1e-12 * max(1.0, abs(y[0])):
        return None
    x, y = (x - x[0]) / (x[-1] - x[0]), (y - y[-1]) / (y[0] - y[-1])
    distance = y - (1.0 - x)  # above the falling chord
    best = int(distance.argmax())
    return float(curve.levels[best]) if distance[best] > 1e-9 else None


def _interval(value: float | None, drawn: list[float | None]) -> Interval:
    found = [v for v in drawn if v is not None]
    if value is None or not found:
        return Interval(value, None, None)
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(value, float(low), float(high))
