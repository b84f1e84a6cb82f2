"""The generalized discrimination value (GDV): how far classes of points are separated, whatever their dimension.

0: the classes are not separated; -1: two point-like classes of one size. Every class weighs the same whatever its
size. Shifting, scaling, reordering or repeating dimensions changes nothing; rotating the points does.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from looseleaf.statistics import Interval, bootstrap

Labels = Sequence[Hashable] | np.ndarray | Tensor
CHUNK, KEPT = 256, 5000
"""Rows whose distances are computed at a time, and most points whose distances are all kept."""
CLOSE = 1e-4
"""Squared distances below this part of the points' squared lengths are computed from differences."""


class PairGDV(NamedTuple):
    """The GDV of each pair of classes; its mean over pairs is the GDV of all.

    Attributes:
        classes: in the order of the matrix.
        matrix: float64 (L, L), symmetric, 0 on the diagonal.
    """

    classes: list[Any]
    matrix: np.ndarray


@overload
def gdv(X: np.ndarray | Tensor, y: Labels, pairwise: Literal[False] = False, *, drop_small: bool = False) -> float: ...
@overload
def gdv(X: np.ndarray | Tensor, y: Labels, pairwise: Literal[True], *, drop_small: bool = False) -> PairGDV: ...
def gdv(X: np.ndarray | Tensor, y: Labels, pairwise: bool = False, *, drop_small: bool = False) -> float | PairGDV:
    """The GDV of labelled points, or that of each pair of their classes.

    Args:
        X: points (N, D), of any floating or integer type; computed in float64.
        y: a label for each.
        pairwise: return a :class:`PairGDV`, whose dimensions are scaled over the points of all classes.
        drop_small: leave out classes of one point, with a warning that names them.

    Raises:
        ValueError: labels of another length, values that are not finite, fewer than two classes, or a class of one
            point, whose mean distance within is undefined.

    Source:
        Schilling et al., Neural Networks 139 (2021); constant dimensions as in the authors' code.
    """
    points, labels, classes = checked(X, y, drop_small)
    separation = Separation(points)
    if pairwise:
        return PairGDV(classes, separation.pairs(labels))
    return float(separation(labels)[0])


def gdv_reference(X: np.ndarray, y: Labels) -> float:
    """The GDV as it is written down, one distance after the other: slow, and what :func:`gdv` is tested against."""
    points = np.asarray(X, dtype=np.float64)
    labels = [str(label) for label in y]
    scaled = np.zeros_like(points)
    for d in range(points.shape[1]):
        column = points[:, d]
        if column.max() > column.min():
            scaled[:, d] = 0.5 * (column - column.mean()) / column.std()
    names = sorted(set(labels))
    of = {c: [n for n, label in enumerate(labels) if label == c] for c in names}

    def mean(pairs: list[tuple[int, int]]) -> float:
        return float(np.mean([np.sqrt(((scaled[i] - scaled[j]) ** 2).sum()) for i, j in pairs]))

    intra = [mean([(i, j) for i in of[c] for j in of[c] if i != j]) for c in names]
    inter = [mean([(i, j) for i in of[c] for j in of[d]]) for n, c in enumerate(names) for d in names[n + 1:]]
    return float((np.mean(intra) - np.mean(inter)) / np.sqrt(points.shape[1]))


def checked(X: Any, y: Labels, drop_small: bool = False) -> tuple[Tensor, np.ndarray, list[Any]]:
    """Points (N, D), numbers of their classes int64 (N,), and the classes; the errors of :func:`gdv`."""
    points = as_points(X)
    names = y.tolist() if isinstance(y, (np.ndarray, Tensor)) else list(y)
    if len(names) != len(points):
        raise ValueError(f"y: expected a label for each of {len(points)} points, got {len(names)}")
    classes = ordered(names)
    counts = {c: names.count(c) for c in classes}
    small = [c for c in classes if counts[c] < 2]
    if small and drop_small:
        warnings.warn(f"classes of one point are left out: {_shown(small)}", stacklevel=3)
        rows = [n for n, name in enumerate(names) if counts[name] > 1]
        points, names, classes = points[rows], [names[n] for n in rows], [c for c in classes if counts[c] > 1]
    elif small and len(classes) > 1:
        raise ValueError(f"y: expected two points or more of each class, got one of {_shown(small)}: the mean distance "
                         "within such a class is undefined. Give more points, or drop_small=True to leave them out")
    if len(classes) < 2:
        raise ValueError(f"y: expected two classes or more, got {_shown(classes) or 'none'}: there is nothing to "
                         "tell apart")
    number = {c: n for n, c in enumerate(classes)}
    return points, np.array([number[name] for name in names]), classes


def as_points(X: Any) -> Tensor:
    """A tensor (N, D) on the CPU.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    points = torch.as_tensor(X).detach().cpu()
    if points.dim() != 2 or not points.numel():
        raise ValueError(f"X: expected points (N, D), got the shape {tuple(points.shape)}")
    if not bool(torch.isfinite(points).all()):
        bad = int((~torch.isfinite(points).all(1)).sum())
        raise ValueError(f"X: expected finite values, got NaN or infinity in {bad} of {len(points)} points: "
                         "activations overflow in float16, try the model in bfloat16 or float32")
    return points


def ordered(names: Sequence[Any]) -> list[Any]:
    """The distinct labels, sorted where they can be."""
    classes = list(dict.fromkeys(names))
    try:
        return sorted(classes)
    except TypeError:
        return sorted(classes, key=str)


def _shown(classes: Sequence[Any]) -> str:
    return ", ".join(map(str, classes[:8])) + ("..." if len(classes) > 8 else "")


def scaled(points: Tensor) -> tuple[Tensor, float]:
    """Dimensions z-scored by their population standard deviation and halved, float64; and the fraction of dead ones.

    A dimension that is constant, but for the last digits of the type the points came in, is 0 and still counts.
    """
    eps = min(torch.finfo(points.dtype).eps, 1e-6) if points.is_floating_point() else 0.0
    x = points.double()
    low, high = x.min(0)[0], x.max(0)[0]
    dead = high - low <= 4 * eps * torch.maximum(low.abs(), high.abs())
    sigma = x.std(0, correction=0)
    return torch.where(dead, 0.0, 0.5 * (x - x.mean(0)) / torch.where(dead, 1.0, sigma)), float(dead.double().mean())


class Separation:
    """Points from which the GDV of any labels follows; distances are computed once.

    Args:
        X: points (N, D).
        chunk: rows whose distances are computed at a time.

    Attributes:
        dead: fraction of dimensions that are constant.
    """

    def __init__(self, X: Any, *, chunk: int = CHUNK) -> None:
        self.points, self.dead = scaled(as_points(X))
        self.chunk = chunk
        self._all: Tensor | None = None

    def __call__(self, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """The GDV of several labellings, float64 (K,); NaN where fewer than two classes have points.

        Args:
            labels: int64 (K, N) or (N,), classes from 0 on; a class without points counts for nothing.
            weights: non-negative (K, N): how often each point counts, as in a bootstrap. A point has no distance to
                itself, nor to its own repetitions.
        """
        intra, inter = self._means(labels, weights)
        classes = intra.shape[1]
        there = ~np.isnan(intra)
        upper = np.triu(np.ones((classes, classes), dtype=bool), 1)
        pairs = there[:, :, None] & there[:, None, :] & upper
        count, many = there.sum(1), pairs.sum((1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            within = np.where(there, intra, 0).sum(1) / count
            between = np.where(pairs, inter, 0).sum((1, 2)) / many
        return np.asarray((within - between) / np.sqrt(self.points.shape[1]))

    def pairs(self, labels: np.ndarray) -> np.ndarray:
        """The GDV of each pair of classes, float64 (L, L); the points are scaled over all classes."""
        intra, inter = (part[0] for part in self._means(labels, None))
        matrix = ((intra[:, None] + intra[None, :]) / 2 - inter) / np.sqrt(self.points.shape[1])
        np.fill_diagonal(matrix, 0.0)
        return np.asarray((matrix + matrix.T) / 2)  # the sums differ by rounding

    def _means(self, labels: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Mean distance within each class (K, L), NaN where there is none, and between classes (K, L, L)."""
        rows = np.atleast_2d(labels)
        if weights is not None:
            rows = np.broadcast_to(rows, weights.shape)
        one_hot = torch.nn.functional.one_hot(torch.tensor(rows)).double()
        if weights is not None:
            one_hot *= torch.from_numpy(weights).double()[..., None]
        sums = self._sums(one_hot).numpy()
        total, square = one_hot.sum(1).numpy(), one_hot.square().sum(1).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            inter = sums / (total[:, :, None] * total[:, None, :])
            pairs = total ** 2 - square
            intra = np.where(pairs > 0.5, np.einsum("kll->kl", sums) / pairs, np.nan)
        return intra, inter

    def _sums(self, one_hot: Tensor) -> Tensor:
        """Distances summed over pairs of classes, (K, L, L), from memberships (K, N, L)."""
        labellings, count, classes = one_hot.shape
        flat = one_hot.permute(1, 0, 2).reshape(count, -1)
        out = torch.zeros(labellings, classes, classes, dtype=torch.float64)
        for start in range(0, count, self.chunk):
            rows = slice(start, start + self.chunk)
            to_class = (self._distances(rows) @ flat).reshape(-1, labellings, classes)
            out += torch.bmm(one_hot[:, rows].transpose(1, 2), to_class.permute(1, 0, 2))
        return out

    def _distances(self, rows: slice) -> Tensor:
        if len(self.points) > KEPT:
            return distances(self.points[rows], self.points)
        if self._all is None:
            starts = range(0, len(self.points), self.chunk)
            self._all = torch.cat([distances(self.points[n:n + self.chunk], self.points) for n in starts])
        return self._all[rows]


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, M) of float64 points, by a matrix product where that is exact enough.

    A product loses digits of distances that are small beside the points' lengths; these are computed from differences.
    """
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    squares = lengths - 2 * x @ y.T
    close = squares <= CLOSE * lengths
    if int(close.sum()) > 0.02 * close.numel():
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    i, j = close.nonzero(as_tuple=True)
    squares[i, j] = (x[i] - y[j]).square().sum(1)
    return squares.sqrt()


# ---------------------------------------------------------------------------------------------- chance and conditions
@dataclasses.dataclass(frozen=True)
class Measured:
    """A GDV beside what chance gives.

    Attributes:
        interval: the value, with a 95 % bootstrap interval over texts.
        null: mean over permuted labels.
        null_low: their 2.5 % quantile.
        p: fraction of labellings, permuted ones and the real one, whose GDV is as low as that of the real one.
        points: how many points it is of.
    """

    interval: Interval
    null: float
    null_low: float
    p: float
    points: int

    @property
    def value(self) -> float:
        """The GDV."""
        return self.interval.value


def measure(separation: Separation, labels: np.ndarray, texts: np.ndarray, *, permutations: int = 100,
            samples: int = 200, seed: int = 0) -> Measured:
    """The GDV of labelled points, its interval and its permutation test.

    Args:
        separation: the points.
        labels: int64 (N,), classes from 0 on.
        texts: int64 (N,): points of one text are drawn together, as they overlap.
        permutations: how often labels are permuted.
        samples: resamples of the interval; scaling stays that of all points.
        seed: of both.
    """
    draw = np.random.default_rng(seed)
    permuted = np.stack([labels, *(draw.permutation(labels) for _ in range(permutations))])
    values = separation(permuted)
    units, member = np.unique(texts, return_inverse=True)

    def resampled(picks: np.ndarray) -> np.ndarray:
        times = np.stack([np.bincount(row.astype(int), minlength=len(units)) for row in picks])
        return separation(labels, times[:, member].astype(np.float64))

    interval = _interval(resampled, len(units), float(values[0]), samples, seed)
    return Measured(interval, *_chance(values), len(labels))


def conditional(X: np.ndarray | Tensor, labels: np.ndarray, condition: np.ndarray, texts: np.ndarray, *,
                permutations: int = 100, samples: int = 200, seed: int = 0, least: int = 2) -> Measured | None:
    """The GDV of classes among points of one condition, averaged over conditions.

    What a condition explains does not count: with the class of the last word as the condition, a model that does no
    more than copy that class has 0. Points are scaled among those of their condition, labels permuted among them, and
    conditions weighted by their points.

    Args:
        X: points (N, D).
        labels: int64 (N,).
        condition: int64 (N,).
        texts, permutations, samples, seed: as for :func:`measure`.
        least: points of a class that a condition needs for the class to count.

    Returns:
        None where no condition has two classes of ``least`` points.
    """
    points, draw = as_points(X), np.random.default_rng(seed)
    units, member = np.unique(texts, return_inverse=True)
    parts: list[tuple[Separation, np.ndarray, np.ndarray]] = []
    values, sizes = [], []
    for each in np.unique(condition):
        rows = np.flatnonzero(condition == each)
        classes, counts = np.unique(labels[rows], return_counts=True)
        rows = rows[np.isin(labels[rows], classes[counts >= least])]
        if np.count_nonzero(counts >= least) < 2:
            continue
        own = np.unique(labels[rows], return_inverse=True)[1]
        separation = Separation(points[rows])
        values.append(separation(np.stack([own, *(draw.permutation(own) for _ in range(permutations))])))
        sizes.append(len(rows))
        parts.append((separation, own, member[rows]))
    if not parts:
        return None
    weights = np.array(sizes) / sum(sizes)

    def resampled(picks: np.ndarray) -> np.ndarray:
        times = np.stack([np.bincount(row.astype(int), minlength=len(units)) for row in picks]).astype(np.float64)
        found = np.stack([separation(own, times[:, of]) for separation, own, of in parts])
        there = np.isfinite(found)
        with np.errstate(invalid="ignore"):
            return np.where(there, found, 0).T @ weights / (there.T @ weights)

    means = weights @ np.stack(values)
    interval = _interval(resampled, len(units), float(means[0]), samples, seed)
    return Measured(interval, *_chance(means), sum(sizes))


def _interval(resampled: Any, units: int, value: float, samples: int, seed: int) -> Interval:
    """A bootstrap interval; resamples that leave fewer than two classes take the value of all points."""
    def statistic(picks: np.ndarray) -> np.ndarray:
        found = resampled(picks)
        return np.where(np.isfinite(found), found, value)

    return bootstrap(range(units), seed, samples=samples, statistic=statistic)


def _chance(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 2.5 % quantile of permuted labellings, and the p-value of the first, which is the real one."""
    null = values[1:]
    if not len(null):
        return float("nan"), float("nan"), float("nan")
    # a labelling that gives the same but for rounding counts as equal
    return (float(null.mean()), float(np.quantile(null, 0.025)),
            float((1 + np.count_nonzero(null <= values[0] + 1e-12)) / len(values)))


__all__ = ["Measured", "PairGDV", "Separation", "as_points", "checked", "conditional", "distances", "gdv",
           "gdv_reference", "measure", "ordered", "scaled"]
