"""How good a mask is: mean absolute error, IoU, and the measures of camouflaged object detection.

S-measure (Fan et al. 2017), E-measure (Fan et al. 2018) and weighted F-measure (Margolin et al. 2014), as the programs
of their authors compute them. Predictions are (H, W) of bool, or floats in [0, 1]; targets are (H, W) of bool, uint8 of
0 and 255, or anything that is above one half where the object is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

_EPS = np.spacing(1)


def _read(prediction: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """A prediction as float64 and a target as bool, of one shape."""
    predicted, truth = (np.asarray(a.detach().cpu() if hasattr(a, "detach") else a) for a in (prediction, target))
    if predicted.ndim != 2 or predicted.shape != truth.shape or not predicted.size:
        raise ValueError(f"a mask: expected a prediction and a target of one shape (H, W), got {predicted.shape} and "
                         f"{truth.shape}")
    values = predicted.astype(np.float64)
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"a prediction: expected bool or numbers in [0, 1], got {values.min():.4g} to "
                         f"{values.max():.4g}: divide uint8 by 255")
    limit = 127 if truth.dtype == np.uint8 and truth.max() > 1 else 0.5
    return values, truth.astype(bool) if truth.dtype == bool else truth > limit


def mean_absolute_error(prediction: Any, target: Any) -> float:
    """Mean absolute difference of prediction and target; lower is better."""
    predicted, truth = _read(prediction, target)
    return float(np.abs(predicted - truth).mean())


def iou(prediction: Any, target: Any) -> float:
    """Intersection over union of the prediction above one half and the target; 1 where both are empty."""
    predicted, truth = _read(prediction, target)
    mask = predicted > 0.5
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def s_measure(prediction: Any, target: Any) -> float:
    """Structure measure: the mean of likeness by object and by four regions around the target's centre of gravity."""
    predicted, truth = _read(prediction, target)
    fraction = truth.mean()
    if fraction in (0, 1):
        return float(1 - predicted.mean() if fraction == 0 else predicted.mean())
    objects = fraction * _alike(predicted[truth]) + (1 - fraction) * _alike(1 - predicted[~truth])
    height, width = truth.shape
    y, x = (int(v) + 1 for v in np.argwhere(truth).mean(0).round())
    regions = 0.0
    for rows, columns in ((slice(None, y), slice(None, x)), (slice(None, y), slice(x, None)),
                          (slice(y, None), slice(None, x)), (slice(y, None), slice(x, None))):
        part = truth[rows, columns]
        if part.size:
            regions += part.size / (height * width) * _ssim(predicted[rows, columns], part.astype(np.float64))
    return float(max(0.0, 0.5 * objects + 0.5 * regions))


def _alike(values: np.ndarray) -> float:
    mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
    return float(2 * mean / (mean ** 2 + 1 + spread + _EPS))


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    count = max(1, a.size - 1)
    x, y = a.mean(), b.mean()
    spread = ((a - x) ** 2).sum() / count + ((b - y) ** 2).sum() / count
    both = 4 * x * y * ((a - x) * (b - y)).sum() / count
    whole = (x ** 2 + y ** 2) * spread
    return float(both / (whole + _EPS)) if both != 0 else 1.0 if whole == 0 else 0.0


def e_measure(prediction: Any, target: Any) -> float:
    """Enhanced alignment of the prediction above one half with the target."""
    predicted, truth = _read(prediction, target)
    mask = predicted > 0.5
    if truth.all() or not truth.any():
        agreed = (mask == truth).sum()
    else:
        a, b = mask - mask.mean(), truth - truth.mean()
        agreed = ((2 * a * b / (a ** 2 + b ** 2 + _EPS) + 1) ** 2 / 4).sum()
    return float(agreed / (truth.size - 1 + _EPS))


def weighted_f_measure(prediction: Any, target: Any) -> float:
    """F-measure whose errors count by what is around them and how far they are from the object; 0 without one."""
    predicted, truth = _read(prediction, target)
    if not truth.any():
        return 0.0
    distance, nearest = ndimage.distance_transform_edt(~truth, return_indices=True)
    error = np.abs(predicted - truth)
    around = np.where(truth, error, error[tuple(nearest)])
    at = np.arange(-3, 4) ** 2
    kernel = np.exp(-(at[:, None] + at[None]) / (2 * 5 ** 2))
    smooth = ndimage.convolve(around, kernel / kernel.sum(), mode="constant", cval=0)
    weighed = np.where(truth & (smooth < error), smooth, error) * np.where(
        truth, 1.0, 2 - np.exp(np.log(0.5) / 5 * distance))
    hits, false = truth.sum() - weighed[truth].sum(), weighed[~truth].sum()
    recall, precision = 1 - weighed[truth].mean(), hits / (hits + false + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


MEASURES = {"MAE": mean_absolute_error, "IoU": iou, "S": s_measure, "E": e_measure, "weighted F": weighted_f_measure}
"""Name -> measure; all but the first are better the higher they are."""

__all__ = ["MEASURES", "e_measure", "iou", "mean_absolute_error", "s_measure", "weighted_f_measure"]
