"""How good a prompt is on labelled examples."""

from __future__ import annotations

from collections.abc import Sequence

from looseleaf_text import Example

WRONG, RIGHT = 180.0, 200.0
"""lambda1 and lambda2 of the piecewise reward [paper, appendix; memory]."""


def accuracy(log_probs: Sequence[Sequence[float]], golds: Sequence[int]) -> float:
    """Share of examples whose gold label is the likeliest.

    Args:
        log_probs: (examples, labels) natural-log probabilities.
        golds: place of the right label of each example.
    """
    hits = [row[gold] >= max(row) and _first_best(row) == gold for row, gold in zip(log_probs, golds, strict=True)]
    return sum(hits) / len(hits)


def reward(log_probs: Sequence[Sequence[float]], golds: Sequence[int], wrong: float = WRONG,
           right: float = RIGHT) -> float:
    """The piecewise reward: mean over classes of the weighted margins of their examples.

    The margin is the log-probability of the gold label less that of the best other one; it counts ``right`` times
    where positive, ``wrong`` times where not. Classes weigh the same whatever their number of examples.

    Args:
        log_probs: (examples, labels) natural-log probabilities.
        golds: place of the right label of each example.
        wrong: weight of a margin on the wrong side (lambda1).
        right: weight of a margin on the right side (lambda2).
    """
    by_class: dict[int, list[float]] = {}
    for row, gold in zip(log_probs, golds, strict=True):
        margin = row[gold] - max(v for n, v in enumerate(row) if n != gold)
        by_class.setdefault(gold, []).append(margin * (right if margin > 0 else wrong))
    return sum(sum(v) / len(v) for v in by_class.values()) / len(by_class)


def some_per_class(examples: Sequence[Example], most: int) -> list[Example]:
    """The first ``most`` examples of each label, in order; without labels, the first ``most``."""
    seen: dict[str | None, int] = {}
    out = []
    for example in examples:
        seen[example.label] = seen.get(example.label, 0) + 1
        if seen[example.label] <= most:
            out.append(example)
    return out


def _first_best(row: Sequence[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)
