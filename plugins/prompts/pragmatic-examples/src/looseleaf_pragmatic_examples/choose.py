"""Which examples show a rule best: the choice by exact RSA, by chance, and by diversity."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from looseleaf import Report, Series
from looseleaf_pragmatic_examples.regexes import MatchesRegex
from looseleaf_pragmatic_examples.speech_acts import ExactListener, ExactSpeaker

Rule = Callable[[Any], Any]
"""What gives an input its label."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """The examples chosen for a rule, in order, and what they tell.

    Attributes:
        examples: pairs of input and label.
        remaining: after each example how many rules agree with all so far, the target among them.
        literal: after each the probability of the target for a reader who takes examples as they come (L0).
        pragmatic: after each that for a reader who knows they were chosen (L1).
        confusable: the alternatives, by number, that the examples do not tell from the target.
        s1: for the first example: (rules, pool) how likely the speaker of each rule shows each example of the target;
            the target's row comes first.
        pool: the pairs that were chosen from.
    """

    examples: list[tuple[Any, Any]]
    remaining: list[int]
    literal: list[float]
    pragmatic: list[float]
    confusable: list[int]
    s1: list[list[float]]
    pool: list[tuple[Any, Any]]

    def __str__(self) -> str:
        width = max(len(repr(x)) for x, _ in self.examples)
        lines = [f"{x!r:{width}}  {label!s:8}  {left} left  {p:.0%} sure" for (x, label), left, p in
                 zip(self.examples, self.remaining, self.literal, strict=True)]
        return "\n".join(lines)

    def report(self) -> Report:
        """The examples as a table, the probability of the target as a figure, and the speaker's as a heat map."""
        report = Report("Pragmatic examples", facts={"rules": len(self.s1), "pool": len(self.pool)})
        report.table("Examples in order", ["input", "label", "rules left", "L0 of the target", "L1 of the target"],
                     [[repr(x), str(label), left, p, q] for (x, label), left, p, q in zip(
                         self.examples, self.remaining, self.literal, self.pragmatic, strict=True)])
        turns = [float(n + 1) for n in range(len(self.examples))]
        report.figure("Probability of the target", x_label="examples", y_label="probability",
                      series=[Series("literal reader, L0", turns, self.literal),
                              Series("reader who knows they were chosen, L1", turns, self.pragmatic)])
        report.figure("How likely the speaker of each rule shows each example first", x_label="example of the pool",
                      y_label="rule, the target on top", image=self.s1)
        return report


def which_examples(target: str | Rule, others: Sequence[str | Rule], pool: Sequence[Any], k: int = 4, *,
                   labels: tuple[Any, Any] = ("+", "-"), alpha: float = 1.0) -> Shown:
    """The ``k`` examples of ``pool`` that best tell ``target`` from ``others``, in order.

    At each turn the example that leaves the fewest rules, of those that no earlier one has ruled out, is shown; ties go
    to the first of the pool. This is the greedy incremental speaker S1. [section on RSA]

    Args:
        target: the rule to be shown: a function from an input to its label, or a regular expression.
        others: what it might be taken for, of the same kinds.
        pool: inputs to choose from; the target labels them.
        k: how many, >= 1; fewer are returned where the pool has fewer different inputs.
        labels: for regular expressions: of inputs that match as a whole, and of those that do not.
        alpha: of the speaker that the L1 reader expects; see :func:`rsa`.

    Raises:
        ValueError: an empty pool, no alternatives, k below 1, or an invalid regular expression.
    """
    inputs = list(dict.fromkeys(pool)) if _hashable(pool) else list(pool)
    if not inputs:
        raise ValueError("pool: expected inputs to choose examples from, got none")
    if not others:
        raise ValueError("others: expected rules that the target might be taken for, got none")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {k!r}")
    rules = [MatchesRegex(rule, labels=labels) if isinstance(rule, str) else rule for rule in (target, *others)]
    pairs = [(x, rules[0](x)) for x in inputs]
    speaker = ExactSpeaker.of(rules, pairs, alpha=alpha)
    listener = ExactListener(speaker.matrix, alpha=alpha)
    chosen = speaker.choose(0, k)
    literal = [listener.literal(chosen[:n + 1]) for n in range(len(chosen))]
    return Shown([pairs[n] for n in chosen], [int((p > 0).sum()) for p in literal], [float(p[0]) for p in literal],
                 [float(listener.pragmatic(chosen[:n + 1])[0]) for n in range(len(chosen))],
                 (np.flatnonzero(literal[-1][1:])).tolist(), speaker.turn().S1.tolist(), pairs)


def random_examples(count: int, k: int, seed: int) -> list[int]:
    """``k`` different numbers below ``count``: the baseline by chance."""
    return random.Random(seed).sample(range(count), min(k, count))


def diverse_examples(vectors: ArrayLike, k: int, seed: int) -> list[int]:
    """Each example the one farthest from those before, the first at random: the baseline by diversity.

    Args:
        vectors: (pool, dimensions) features of any kind, such as embeddings or counts of letters.
        k: how many; no more than the pool has.
        seed: decides the first.
    """
    points = np.asarray(vectors, dtype=np.float64)
    if points.ndim != 2 or not len(points):
        raise ValueError(f"vectors: expected shape (pool, dimensions), got {points.shape}")
    chosen = [random.Random(seed).randrange(len(points))]
    nearest = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < min(k, len(points)):
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


def edit_features(texts: Sequence[str]) -> np.ndarray:
    """(texts, features) length, and counts of single characters and of neighbouring pairs, for short strings."""
    pieces = [[*text, *(text[n:n + 2] for n in range(len(text) - 1))] for text in texts]
    place = {piece: n for n, piece in enumerate(sorted({p for row in pieces for p in row}))}
    out = np.zeros((len(texts), len(place) + 1))
    for n, (text, row) in enumerate(zip(texts, pieces, strict=True)):
        out[n, -1] = len(text)
        for piece in row:
            out[n, place[piece]] += 1
    return out


def _hashable(values: Sequence[Any]) -> bool:
    try:
        return bool({hash(v) for v in values}) or True
    except TypeError:
        return False


Dedupe = Literal["text", "language"]
__all__ = ["Dedupe", "Rule", "Shown", "diverse_examples", "edit_features", "random_examples", "which_examples"]
