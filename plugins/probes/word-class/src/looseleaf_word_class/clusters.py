"""Beside the GDV: agreement of clusters with classes, a linear probe with its control task, and maps in the plane."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Maps = Sequence[str]
MAP_POINTS = 40
"""Most points of a class on a map; multidimensional scaling takes the square of all points."""


class Agreement(NamedTuple):
    """Agreement of k-means clusters with classes: adjusted Rand index and normalised mutual information."""

    ari: float
    nmi: float


def clusters(points: np.ndarray, labels: np.ndarray, seed: int = 0) -> Agreement:
    """As many clusters as classes by k-means, best of four starts, and how they agree with the classes.

    Args:
        points: (N, D), scaled as for the GDV.
        labels: int64 (N,).
        seed: of the starts.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # points that coincide may leave clusters empty
        found = KMeans(len(np.unique(labels)), n_init=4, random_state=seed).fit_predict(points)
    return Agreement(float(adjusted_rand_score(labels, found)), float(normalized_mutual_info_score(labels, found)))


class LinearScore(NamedTuple):
    """Accuracy of a linear probe on windows of other texts, and on a control task in which it can only memorise.

    Attributes:
        accuracy: on the classes.
        control: where each last word has a class drawn at random, the same wherever it occurs; NaN without last words.
        majority: of the most frequent class.
    """

    accuracy: float
    control: float
    majority: float

    @property
    def selectivity(self) -> float:
        """Accuracy on the classes less that on the control task (Hewitt and Liang, 2019)."""
        return self.accuracy - self.control


def linear_probe(points: np.ndarray, labels: np.ndarray, texts: np.ndarray, last_words: Sequence[str],
                 seed: int = 0) -> LinearScore:
    """A logistic regression fitted on half of the texts and scored on the others.

    Args:
        points: (N, D), scaled.
        labels: int64 (N,).
        texts: int64 (N,): windows of a text overlap, so all are on one side. Where that leaves a class out, as with
            one text alone, windows are divided instead.
        last_words: of the control task.
        seed: of the division and the control task.
    """
    draw = np.random.default_rng(seed)
    units = draw.permutation(np.unique(texts))
    fit = np.isin(texts, units[:len(units) // 2])
    if any(len(np.unique(labels[side])) < len(np.unique(labels)) for side in (fit, ~fit)):
        order = np.lexsort((draw.random(len(labels)), labels))
        fit = np.zeros(len(labels), dtype=bool)
        fit[order[::2]] = True
    types, of = np.unique(last_words, return_inverse=True)
    random_class = draw.choice(labels, len(types))
    return LinearScore(_accuracy(points, labels, fit, seed), _accuracy(points, random_class[of], fit, seed),
                       float(np.bincount(labels[~fit]).max() / (~fit).sum()))


def _accuracy(points: np.ndarray, labels: np.ndarray, fit: np.ndarray, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels[fit])) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after so many steps is good enough for a comparison
        model = LogisticRegression(C=0.1, max_iter=200, random_state=seed).fit(2 * points[fit], labels[fit])
    return float(model.score(2 * points[~fit], labels[~fit]))


def plane(points: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """Points in the plane, float64 (N, 2).

    Args:
        points: (N, D), scaled.
        kind: ``"mds"``, metric multidimensional scaling by SMACOF from the principal components, as the paper shows;
            ``"tsne"``; or ``"pca"``.
        seed: of t-SNE.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE, smacof
    from sklearn.metrics import pairwise_distances

    dims = min(2, *points.shape)
    start: np.ndarray = np.zeros((len(points), 2))
    start[:, :dims] = PCA(dims, svd_solver="full").fit_transform(points)
    if kind == "pca" or not start.any():
        return start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # defaults that change from version to version, all given here
        found: Any
        if kind == "mds":
            found = smacof(pairwise_distances(points), n_components=2, init=start, n_init=1, max_iter=300,
                           normalized_stress=False)[0]
        else:
            found = TSNE(2, init=1e-4 * start / start[:, 0].std(), perplexity=min(30, (len(points) - 1) / 3),
                         random_state=seed).fit_transform(points)
    return np.asarray(found, dtype=np.float64)


def chosen(labels: np.ndarray, seed: int = 0, most: int = MAP_POINTS) -> np.ndarray:
    """Numbers of the points on a map: at most ``most`` of each class."""
    draw = np.random.default_rng(seed)
    return np.sort(np.concatenate([draw.permutation(np.flatnonzero(labels == c))[:most] for c in np.unique(labels)]))


__all__ = ["MAP_POINTS", "Agreement", "LinearScore", "chosen", "clusters", "linear_probe", "plane"]
