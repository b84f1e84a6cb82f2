"""Exact rational speech acts: against a reference in fractions, and what the card of the paper promises."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from looseleaf_pragmatic_examples import (
    ExactListener,
    ExactSpeaker,
    agreement,
    diverse_examples,
    random_examples,
    rsa,
    strings,
    which_examples,
)
from looseleaf_pragmatic_examples.regexes import full_match
from looseleaf_pragmatic_examples.speech_acts import best


def reference(matrix: Any, prior: list[int]) -> tuple[list[list[Fraction]], ...]:
    """L0, S1 and L1 by the definitions, in fractions."""
    programs, utterances = range(len(matrix)), range(len(matrix[0]))

    def divided(a: Fraction, b: Fraction) -> Fraction:
        return a / b if b else Fraction(0)

    weights = [[Fraction(int(matrix[d][u]) * prior[d]) for u in utterances] for d in programs]
    literal = [[divided(weights[d][u], sum(weights[e][u] for e in programs)) for u in utterances] for d in programs]
    speaker = [[divided(literal[d][u], sum(literal[d])) for u in utterances] for d in programs]
    listener = [[divided(speaker[d][u] * prior[d], sum(speaker[e][u] * prior[e] for e in programs))
                 for u in utterances] for d in programs]
    return literal, speaker, listener


def random_matrix(seed: int, programs: int = 6, utterances: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).random((programs, utterances)) < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_levels_are_those_of_the_reference(seed: int) -> None:
    matrix, prior = random_matrix(seed), list(range(1, 7))
    for given, weights in ((None, [1] * 6), (prior, prior)):
        for ours, theirs in zip(rsa(matrix, given), reference(matrix, weights), strict=True):
            assert np.abs(ours - np.array(theirs, dtype=float)).max() < 1e-15


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 4.0, 300.0, math.inf])
def test_rows_and_columns_sum_to_one_or_zero(alpha: float) -> None:
    matrix = random_matrix(3)
    matrix[2], matrix[:, 4] = False, False
    levels = rsa(matrix, alpha=alpha)
    for sums in (levels.L0.sum(0), levels.S1.sum(1), levels.L1.sum(0)):
        assert np.isin(np.round(sums, 12), (0, 1)).all() and sums.any()
    assert levels.S1[2].sum() == levels.L0[:, 4].sum() == 0


def test_alpha_zero_is_uniform_over_true_utterances_and_infinity_takes_the_best() -> None:
    matrix = random_matrix(1)
    flat, sharp = rsa(matrix, alpha=0).S1, rsa(matrix, alpha=math.inf).S1
    assert np.allclose(flat, matrix / matrix.sum(1, keepdims=True))
    one = rsa(matrix).S1
    assert ((sharp > 0) == (one >= one.max(1, keepdims=True) * (1 - 1e-9))).all()


def incremental(matrix: np.ndarray, context: list[int]) -> list[Fraction]:
    """L1 of a spec by the definition: the product of S1 over turns, normalised."""
    product = [Fraction(1)] * len(matrix)
    for n, utterance in enumerate(context):
        now = matrix.copy()
        for earlier in context[:n]:
            now[~matrix[:, earlier]] = False
            now[:, earlier] = False
        speaker = reference(now, [1] * len(matrix))[1]
        product = [p * speaker[d][utterance] for d, p in enumerate(product)]
    total = sum(product)
    return [p / total if total else Fraction(0) for p in product]


@pytest.mark.parametrize("seed", range(4))
def test_a_spec_is_the_product_of_its_turns(seed: int) -> None:
    matrix = random_matrix(seed, 7, 8)
    matrix[0] = True
    listener = ExactListener(matrix)
    for context in ([0], [3, 1], [2, 5, 7], []):
        pragmatic = listener.pragmatic(context)
        assert np.abs(pragmatic - np.array(incremental(matrix, context), dtype=float)).max() < 1e-14
        consistent = matrix[:, context].all(1)
        assert not pragmatic[~consistent].any() and not listener.literal(context)[~consistent].any()
        assert np.allclose(listener.literal(context)[consistent], 1 / consistent.sum())


def test_the_distinguishing_example_comes_first() -> None:
    matrix = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 1]])
    assert ExactSpeaker(matrix).choose(0, 2)[0] == 2
    assert ExactListener(matrix).literal([2]).tolist() == [1, 0, 0]
    assert best(ExactListener(matrix).pragmatic([1])) == [1]  # who meant the first would have said 2


def test_names_and_order_change_nothing_but_ties() -> None:
    rng = np.random.default_rng(0)
    matrix = random_matrix(8, 9, 12)
    matrix[0] = True
    programs, utterances = rng.permutation(9), rng.permutation(12)
    other = matrix[programs][:, utterances]
    for ours, theirs in zip(rsa(matrix), rsa(other), strict=True):
        assert np.allclose(ours[programs][:, utterances], theirs, atol=1e-15)
    context = [4, 7]
    moved = [int(np.flatnonzero(utterances == u)[0]) for u in context]
    assert np.allclose(ExactListener(matrix).pragmatic(context)[programs], ExactListener(other).pragmatic(moved))
    first, second = ExactSpeaker(matrix), ExactSpeaker(other)
    for d in range(9):
        here, there = (s.turn().S1[t, s.choose(t, 1)[0]] for s, t in (
            (first, d), (second, int(np.flatnonzero(programs == d)[0]))))
        assert here == pytest.approx(there, abs=1e-15)


def test_duplicates_change_nothing_as_languages_and_something_as_texts() -> None:
    matrix = random_matrix(5, 6, 10)
    matrix[0] = True
    double = np.concatenate([matrix, matrix[[1, 1, 3]]])
    plain, deduped = ExactListener(matrix), ExactListener(double, dedupe="language")
    assert np.allclose(plain.pragmatic([1, 2]), deduped.pragmatic([1, 2])[:6], atol=1e-15)
    assert deduped.pragmatic([1, 2]).sum() == pytest.approx(1) and not deduped.pragmatic([1, 2])[6:].any()
    speakers = ExactSpeaker(matrix), ExactSpeaker(double, dedupe="language")
    assert [s.choose(1, 4) for s in speakers] == [speakers[1].choose(6, 4)] * 2
    assert not np.allclose(ExactSpeaker(double).turn().S1[:6], speakers[0].turn().S1)


def languages() -> np.ndarray:
    """The 107 languages of one or two atoms, over strings of 1 to 4 characters: (107, 60)."""
    atoms = [letter + q for letter in ("a", "b", "[ab]") for q in ("", "+", "{2}", "?")]
    programs = [*atoms, *map("".join, itertools.product(atoms, atoms))]
    rows = {tuple(bool(full_match(p, s)) for s in strings("ab", 4)): None for p in programs}
    positive = np.array(list(rows))
    return np.concatenate([positive, ~positive], axis=1)


def accuracies(matrix: np.ndarray, specs: list[list[int]]) -> np.ndarray:
    """(2, 4): expected top-1 of L0 (a uniform guess) and L1 after 1 to 4 examples, means over targets."""
    listener = ExactListener(matrix)

    def right(probabilities: np.ndarray, target: int) -> float:
        top = best(probabilities)
        return (target in top) / len(top)

    return np.array([[np.mean([right(guess(spec[:n]), d) for d, spec in enumerate(specs)]) for n in range(1, 5)]
                     for guess in (listener.literal, listener.pragmatic)])


def test_the_table_of_107_languages() -> None:
    matrix = languages()
    assert matrix.shape == (107, 60)
    speaker = ExactSpeaker(matrix)
    chosen = accuracies(matrix, [speaker.choose(d, 4) for d in range(107)])
    assert np.abs(chosen - [[.07, .26, .53, .76], [.26, .50, .89, 1.0]]).max() < 0.006
    # a random speaker says + or - with equal chance, then any such string; one draw of it is rough
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(3):
        specs = []
        for row in matrix:
            spec: list[int] = []
            while len(spec) < 4:
                half = rng.integers(2)
                left = [u for u in np.flatnonzero(row) if u // 30 == half and u not in spec]
                spec += [int(rng.choice(left))] if left else []
            specs.append(spec)
        drawn.append(accuracies(matrix, specs))
    assert np.abs(np.mean(drawn, axis=0) - [[.03, .06, .12, .17], [.06, .19, .38, .45]]).max() < 0.09


def test_samples_follow_the_speaker() -> None:
    matrix = random_matrix(2, 4, 6)
    speaker = ExactSpeaker(matrix)
    first = np.bincount([speaker.sample(1, 1, seed)[0] for seed in range(3000)], minlength=6) / 3000
    assert np.abs(first - speaker.turn().S1[1]).max() < 0.03
    assert speaker.sample(1, 3, 5) == speaker.sample(1, 3, 5)
    assert speaker.choose(1, 99) == list(dict.fromkeys(speaker.choose(1, 99))) and \
        len(speaker.choose(1, 99)) == matrix[1].sum()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: rsa([[1, -1]]), r"matrix: expected finite weights >= 0"),
    (lambda: rsa([1, 0]), r"shape \(programs, utterances\), got an array of shape \(2,\)"),
    (lambda: rsa([[1, 0]], prior=[1, 1]), "prior: expected one weight for each of 1 programs, got 2"),
    (lambda: rsa([[1, 0]], prior=[0]), "prior: expected a weight > 0"),
    (lambda: rsa([[1, 0]], alpha=-1), "alpha: expected a number >= 0, got -1"),
    (lambda: ExactSpeaker([[1, .5]]), "matrix: expected 0 and 1"),
    (lambda: ExactSpeaker([[1]], dedupe="x"), "dedupe: expected 'text' or 'language', got 'x'"),  # type: ignore[arg-type]
    (lambda: ExactSpeaker([[1, 1], [0, 0]]).choose(1, 1), "agrees with none: add examples that show it"),
    (lambda: ExactSpeaker([[1, 1]]).choose(3, 1), r"target: expected a program in \[0, 1\), got 3"),
    (lambda: ExactListener([[1, 1]]).literal([0, 0]), r"context: expected different utterances in \[0, 2\)"),
    (lambda: which_examples("a", ["b"], []), "pool: expected inputs to choose examples from, got none"),
    (lambda: which_examples("a", [], ["a"]), "others: expected rules"),
    (lambda: which_examples("a", ["b"], ["a"], k=0), "k: expected an integer >= 1, got 0"),
    (lambda: which_examples("(a", ["b"], ["a"]), r"pattern: expected a regular expression, got '\(a'"),
    (lambda: diverse_examples([], 2, 0), "vectors: expected shape"),
])
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_which_examples_in_one_call() -> None:
    shown = which_examples("a+b?", ["a*", "[ab]+", "a{2}", "a+b"], ["", *strings("ab", 3)], k=3)
    assert shown.remaining[-1] == 1 and shown.literal[-1] == 1 and not shown.confusable
    assert all(label == "+-"[not full_match("a+b?", x)] for x, label in shown.examples)
    assert "left" in str(shown) and shown.report().figures[1].image is not None
    odd = which_examples(lambda n: n % 2 == 1, [lambda n: n < 4, lambda n: True, lambda n: n % 4 == 1], range(8), k=2)
    assert odd.examples[0] == (3, True) or odd.remaining[0] == 2
    same = which_examples("a", ["a", "b"], ["a", "b"])
    assert same.confusable == [0] and same.remaining == [2, 2] and len(same.examples) == 2
    assert which_examples(len, [sum], [[1], [2, 3]], k=1).examples == [([2, 3], 2)]  # unhashable inputs


def test_baselines() -> None:
    assert sorted(random_examples(5, 9, 0)) == list(range(5))
    points = [[0.0], [0.1], [10.0], [5.0]]
    assert set(diverse_examples(points, 3, 0)) >= {2} and len(set(diverse_examples(points, 4, 1))) == 4
    assert agreement([], [1]).shape == (0, 1)
