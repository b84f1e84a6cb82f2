"""Accuracy over the prior: logistic slopes with intervals, bins, correlations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

RIDGE = 1e-2
"""Weight of the squared coefficients in a logistic fit: where every answer is right, or priors separate right from
wrong, the plain fit has no finite slope."""


@dataclasses.dataclass(frozen=True)
class Slope:
    """Logistic slope of being right on the prior, per nat, with a 95 % bootstrap interval over answers."""

    value: float
    low: float
    high: float

    @property
    def positive(self) -> bool:
        """The interval lies above 0."""
        return self.low > 0

    @property
    def covers_zero(self) -> bool:
        """The interval has 0 in it."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def logistic(features: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None, steps: int = 25,
             ) -> np.ndarray:
    """Ridge-regularised logistic regression by Newton's method, many weightings of the same data at once.

    Args:
        features: (n, k); a constant is added.
        correct: (n,), 0 or 1.
        weights: (m, n) not negative; None: one fit with weight 1 everywhere.
        steps: of Newton's method.

    Returns:
        (m, k + 1) coefficients, that of the constant first; it is not regularised.
    """
    x = np.concatenate([np.ones((len(features), 1)), features], 1)
    w = np.ones((1, len(x))) if weights is None else np.asarray(weights, dtype=np.float64)
    beta = np.zeros((len(w), x.shape[1]))
    # the constant gets next to nothing: it must be finite where all answers are right
    penalty = np.diag([1e-6, *[RIDGE] * (x.shape[1] - 1)])
    y = np.asarray(correct, dtype=np.float64)

    def objective(b: np.ndarray) -> np.ndarray:
        z = b @ x.T
        loss: np.ndarray = (w * (np.logaddexp(0, z) - y * z)).sum(1) + 0.5 * ((b @ penalty) * b).sum(1)
        return loss

    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(beta @ x.T, -500, 500)))
        gradient = (w * (y - p)) @ x - beta @ penalty
        curvature = np.einsum("mn,nk,nj->mkj", w * p * (1 - p), x, x, optimize=True) + penalty
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # a full Newton step can overshoot where the data are nearly separable
        size = np.ones(len(w))
        before = objective(beta)
        for _ in range(20):
            worse = objective(beta + size[:, None] * step) > before + 1e-12
            if not worse.any():
                break
            size[worse] /= 2
        beta = beta + size[:, None] * step
        if np.abs(size[:, None] * step).max() < 1e-8:
            break
    return beta


def resample(groups: Sequence[object], samples: int, seed: int) -> np.ndarray:
    """(samples, n) how often each row is drawn when whole groups are drawn with replacement."""
    _, index = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    count = int(index.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, count, (samples, count))
    times = np.zeros((samples, count))
    np.add.at(times, (np.arange(samples)[:, None], drawn), 1)
    taken: np.ndarray = times[:, index]
    return taken


def slope(prior: Sequence[float], correct: Sequence[float], answers: Sequence[object],
          size: Sequence[float] | None = None, *, samples: int = 1000, seed: int = 0) -> Slope:
    """How the chance of being right rises with the prior of the right answer.

    Whole answers are resampled: questions with the same answer share its prior, so that they are one observation of
    it, not many.

    Args:
        prior: (n,) log prior of each question's right answer, nats.
        correct: (n,) 1 where the model was right.
        answers: (n,) the right answers.
        size: (n,) how hard each question is by itself; the slope is then that at equal size.
        samples: resamples.
        seed: of the resampling.

    Raises:
        ValueError: not equally many values, or fewer than two.
    """
    if not len(prior) == len(correct) == len(answers) or len(prior) < 2:
        raise ValueError(f"{len(prior)} priors, {len(correct)} marks, {len(answers)} answers: allowed is equally many, "
                         "two or more")
    columns = [np.asarray(prior, dtype=np.float64)]
    if size is not None and np.ptp(np.asarray(size)) > 0:
        columns.append(np.asarray(size, dtype=np.float64))
    features = np.stack(columns, 1)
    spread = np.where(features.std(0) > 0, features.std(0), 1.0)
    features = (features - features.mean(0)) / spread
    y = np.asarray(correct, dtype=np.float64)
    value = logistic(features, y)[0, 1] / spread[0]
    low, high = np.quantile(logistic(features, y, resample(answers, samples, seed))[:, 1], [0.025, 0.975]) / spread[0]
    return Slope(float(value), float(low), float(high))


def bins(prior: Sequence[float], marks: Sequence[Sequence[float]], count: int) -> list[tuple[float, int, list[float]]]:
    """Questions in ``count`` groups of like prior: (mean prior, number, mean of each row of ``marks``)."""
    order = np.argsort(np.asarray(prior), kind="stable")
    out = []
    for rows in np.array_split(order, min(count, len(order))):
        out.append((float(np.mean([prior[i] for i in rows])), len(rows),
                    [float(np.mean([row[i] for i in rows])) for row in marks]))
    return out


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant, as nothing then goes with anything."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if any(np.ptp(v) <= 1e-5 * max(1.0, float(np.abs(v).max())) for v in (a, b)):
        return 0.0  # what is left of a constant is the rounding of single precision
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt(float((a * a).sum() * (b * b).sum())))


__all__ = ["Slope", "bins", "correlation", "logistic", "resample", "slope"]
