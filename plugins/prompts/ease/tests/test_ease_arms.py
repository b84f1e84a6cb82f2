"""Drawing arms."""

from __future__ import annotations

import math
from collections import Counter

from looseleaf_ease.search import draw, generator


def test_arms_are_ordered_sets_drawn_evenly() -> None:
    arms = draw(generator(0, "x"), 4, 2, 1, 5)
    assert len(arms) <= 5
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(600):
        counts.update(exemplars for _, exemplars in draw(generator(seed), 4, 2, 1, 3))
    assert len(counts) == math.perm(4, 2)
    assert max(counts.values()) < 1.5 * min(counts.values())
    assert all(len(set(s)) == 2 for s in counts)


def test_small_domains_are_listed_whole_and_what_was_tried_is_left_out() -> None:
    everything = draw(generator(0), 3, 2, 2, 12)
    assert len(everything) == len(set(everything)) == 12
    assert set(draw(generator(1), 3, 2, 2, 12, everything[:11])) == {everything[11]}
    many = draw(generator(2), 30, 3, 2, 500)
    assert not set(draw(generator(2), 30, 3, 2, 500, many))
    assert {i for i, _ in many} == {0, 1}


def test_drawing_more_begins_with_the_same_arms() -> None:
    assert draw(generator(4), 50, 5, 1, 200)[:20] == draw(generator(4), 50, 5, 1, 20)
