"""Optimal transport between few exemplars and the validation examples, for many sets of exemplars at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 512
"""Problems solved together: large enough for numpy, small enough to stop early and to stay in the cache."""
TOLERANCE = 1e-12


def earth_movers_distance(cost: Floats) -> Floats:
    """Exact earth mover's distance with uniform weights on both sides, of many small problems at once.

    The validation examples are served one after the other, each along the cheapest way that the exemplars' free
    capacity allows, where serving may hand what was served before from one exemplar to another (successive shortest
    paths). With k exemplars a way has at most k stations, so that everything but the loop over the m examples is
    arithmetic on arrays.

    Args:
        cost: (problems, k, m), finite; cost of moving one unit of mass from exemplar to validation example.

    Returns:
        (problems,) least mean cost.

    Raises:
        ValueError: not three dimensions, an empty side, or a cost that is not finite.
    """
    cost = np.asarray(cost, dtype=np.float64)
    if cost.ndim != 3 or 0 in cost.shape[1:] or not np.isfinite(cost).all():
        raise ValueError("cost: expected finite values of shape (problems, k, m) with k, m >= 1, got the shape "
                         f"{cost.shape}")
    out = np.empty(len(cost))
    for start in range(0, len(cost), BLOCK):
        out[start:start + BLOCK] = _solve(cost[start:start + BLOCK])
    return out


def _solve(cost: Floats) -> Floats:
    problems, k, m = cost.shape
    # In whole units: each exemplar gives units / k, each validation example takes units / m.
    units = math.lcm(k, m)
    free = np.full((problems, k), units // k)
    flow = np.zeros((problems, k, m), dtype=np.int64)
    for example in range(m):
        wanted = np.full(problems, units // m)
        open_ = np.arange(problems)
        while len(open_):
            _serve(cost, free, flow, wanted, example, open_)
            open_ = open_[wanted[open_] > 0]
    return (flow * cost).sum((1, 2)) / units


def _serve(cost: Floats, free: Ints, flow: Ints, wanted: Ints, example: int, open_: Ints) -> None:
    """Send as much as one cheapest way can carry to ``example`` in each of the problems ``open_``."""
    k = cost.shape[1]
    mine, served = cost[open_], flow[open_]
    distance = mine[:, :, example].copy()  # the way that starts at exemplar j and serves the example directly
    before = np.full((len(open_), k), -1)
    through = np.zeros((len(open_), k, k), dtype=np.int64)
    if example:
        # Exemplar j takes over one of the examples that i serves; i is then free to serve something else.
        change = mine[:, None, :, :example] - mine[:, :, None, :example]
        change = np.where(served[:, :, None, :example] > 0, change, np.inf)
        through = change.argmin(-1)
        step = np.take_along_axis(change, through[..., None], -1)[..., 0]
        for _ in range(k - 1):
            ways = distance[:, :, None] + step
            source = ways.argmin(1)
            found = np.take_along_axis(ways, source[:, None], 1)[:, 0]
            shorter = found < distance - TOLERANCE
            if not shorter.any():
                break
            distance = np.where(shorter, found, distance)
            before = np.where(shorter, source, before)
    last = np.where(free[open_] > 0, distance, np.inf).argmin(1)
    amount = np.minimum(wanted[open_], free[open_, last])
    way = _back(before, through, last)
    for here, there, what in way:
        amount[here] = np.minimum(amount[here], served[here, before[here, there], what])
    start = last.copy()
    for here, there, what in way:
        start[here] = before[here, there]
        served[here, start[here], what] -= amount[here]
        served[here, there, what] += amount[here]
    served[np.arange(len(open_)), start, example] += amount
    flow[open_] = served
    free[open_, last] -= amount
    wanted[open_] -= amount


def _back(before: Ints, through: Ints, last: Ints) -> list[tuple[Ints, Ints, Ints]]:
    """The hand-overs of each way, from its end to its start: (problems, exemplar that takes over, what it takes)."""
    out = []
    problems, there = np.arange(len(last)), last
    for _ in range(before.shape[1]):
        on_the_way = before[problems, there] >= 0
        problems, there = problems[on_the_way], there[on_the_way]
        if not len(problems):
            break
        giver = before[problems, there]
        out.append((problems, there, through[problems, giver, there]))
        there = giver
    return out


def lower_bound(cost: Floats, exemplars: Ints, sets: Ints) -> Floats:
    """What each set's earth mover's distance is at least: the larger of the two relaxations.

    Without the weights of the exemplars every validation example takes from its nearest; without those of the
    validation examples together (but none taking more than its own) every exemplar gives to its nearest.

    Args:
        cost: (n, m) between all exemplars and the validation examples.
        exemplars: the rows of ``cost`` that occur in ``sets``.
        sets: (problems, k) rows of ``cost``.
    """
    k, m = sets.shape[1], cost.shape[1]
    fraction = np.clip(m / k - np.arange(m), 0, 1)  # how much of its nearest, second nearest ... it fills
    nearest = np.zeros(len(cost))
    nearest[exemplars] = (np.sort(cost[exemplars], 1) * fraction).sum(1) / (m / k)
    takers = np.concatenate([cost[sets[at:at + BLOCK]].min(1).mean(1) for at in range(0, len(sets), BLOCK)])
    return np.maximum(takers, nearest[sets].mean(1))


def closest(cost: Floats, sets: Ints, keep: int) -> Ints:
    """The ``keep`` sets of exemplars with the least earth mover's distance to the validation examples.

    Exact, but solved only where it can matter: sets are taken in the order of a lower bound, until that exceeds the
    distance of the ``keep``-th best set so far.

    Args:
        cost: (n, m) between all exemplars and the validation examples.
        sets: (problems, k) rows of ``cost``.
        keep: how many, >= 1.

    Returns:
        Indices into ``sets``, nearest first; equal distances in the order given.
    """
    keep = min(keep, len(sets))
    bound = lower_bound(cost, np.unique(sets), sets)
    order = np.argsort(bound, kind="stable")
    distance = np.full(len(sets), np.inf)
    for start in range(0, len(order), BLOCK):
        # Rounding must not lose a set whose distance equals its bound.
        if start >= keep and bound[order[start]] > np.partition(distance, keep - 1)[keep - 1] + 1e-9:
            break
        block = order[start:start + BLOCK]
        distance[block] = earth_movers_distance(cost[sets[block]])
    return np.lexsort((np.arange(len(sets)), distance))[:keep]
