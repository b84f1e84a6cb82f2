"""The largest of many numbers, found exactly without sorting them all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from looseleaf import Unstructured

SAMPLED = 1 << 13
"""Numbers that are sorted to find out where the threshold lies, about."""


def keep_smallest(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks (True = keep) that drop exactly the ``count`` largest of all magnitudes together.

    Of equal magnitudes at the threshold the one that comes first (order of the tensors, then row-major) is dropped
    first: the convention of :mod:`looseleaf.pruning.selection`, whose masks these are (see :func:`reference`). That
    looks at every bit of every number in turn; this one sorts a sample, counts what lies above, and goes on with the
    few numbers near the threshold. It is several times as fast, which matters as it runs at every training step.

    Args:
        magnitudes: non-negative numbers without NaN, any shapes.
        count: how many to drop, 0 to all.
    """
    total = sum(m.numel() for m in magnitudes)
    if count in (0, total):
        return [torch.full(m.shape, count == 0, dtype=torch.bool, device=m.device) for m in magnitudes]
    if len({(m.dtype, m.device) for m in magnitudes}) > 1:
        return reference(magnitudes, count)
    threshold, ties, equal = _threshold([m.reshape(-1) for m in magnitudes], count, total)
    masks = [m < threshold for m in magnitudes]
    if ties < equal:
        for mask, m in zip(masks, magnitudes, strict=True):
            places = (m == threshold).view(-1).nonzero()[:, 0]
            mask.view(-1)[places[ties:]] = True
            ties = max(0, ties - len(places))
    return masks


def reference(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """What :func:`keep_smallest` gives, by the core's selection rule."""
    total = sum(m.numel() for m in magnitudes)
    rule = Unstructured(count / total, "global")
    return list(rule.select({str(i): -m for i, m in enumerate(magnitudes)}).values())


def _threshold(pool: list[Tensor], count: int, total: int) -> tuple[Tensor, int, int]:
    """The ``count``-th largest number, how many equal to it must go, and how many there are."""
    while total > 4 * SAMPLED:
        sample = torch.cat([_some(m, SAMPLED * len(m) // total) for m in pool]).sort(descending=True).values
        place = count / total * len(sample)
        # four standard deviations of the rank of the threshold in a random sample, and some for small ones
        margin = 4 * math.sqrt(place * (1 - count / total)) + 8
        high, low = int(place - margin), int(place + margin)
        upper = sample[high] if high >= 0 else torch.full_like(sample[0], math.inf)
        lower = sample[low] if low < len(sample) else torch.full_like(sample[0], -1.0)
        above = sum(int(torch.count_nonzero(m > upper)) for m in pool)
        near = torch.cat([m[(m >= lower) & (m <= upper)] for m in pool])
        # The sample misled, as it may where numbers follow a pattern, or too many are alike.
        if not 0 < count - above <= len(near) <= total // 2:
            break
        pool, count, total = [near], count - above, len(near)
    rest = torch.cat(pool)
    threshold = rest.kthvalue(total - count + 1).values
    ties = count - int(torch.count_nonzero(rest > threshold))
    return threshold, ties, int(torch.count_nonzero(rest == threshold))


def _some(numbers: Tensor, count: int) -> Tensor:
    """``count`` of the numbers, spread evenly by the golden ratio: equal steps would fall into the same column."""
    places = torch.arange(count, dtype=torch.float64, device=numbers.device).mul_(0.6180339887498949).frac_()
    return numbers[places.mul_(len(numbers)).long()]
