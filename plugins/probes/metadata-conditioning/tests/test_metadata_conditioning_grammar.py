"""Exact likelihoods, posteriors and predictions against enumeration and the inside algorithm."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf_metadata_conditioning import LevelledPCFG, enumerate_texts, inside

SMALL = LevelledPCFG.random(2, seed=3)
"""Two levels, rules of two and three symbols: at most 8 texts of up to nine terminals for each j."""
UNEVEN = LevelledPCFG(((  # probabilities that differ, one text with two derivations, rules of one symbol
    (((0.3, (0, 1)), (0.7, (1,))),), (((0.6, (1, 0)), (0.4, (0, 1))),)), (
    (((0.25, (0,)), (0.75, (1, 0))), ((0.5, (0, 1)), (0.5, (1,)))),
    (((0.9, (1, 1)), (0.1, (0,))), ((1.0, (0, 0, 1)),)))))


@pytest.fixture(params=[SMALL, UNEVEN], ids=["random", "uneven"])
def grammar(request: Any) -> LevelledPCFG:
    return request.param


def languages(grammar: LevelledPCFG) -> list[dict[tuple[int, ...], float]]:
    return [enumerate_texts(grammar, j) for j in grammar.metadata.tolist()]


def test_texts_sum_to_one_and_have_their_probability(grammar: LevelledPCFG) -> None:
    for j, texts in zip(grammar.metadata.tolist(), languages(grammar), strict=True):
        assert sum(texts.values()) == pytest.approx(1, abs=1e-12)
        scan = grammar.scan(list(texts))
        g = int(grammar.index(j).argmax())
        np.testing.assert_allclose(scan.log_prob[:, g].exp().numpy(), list(texts.values()), rtol=1e-12)
        for text, p in texts.items():
            assert math.exp(grammar.log_prob(text, j)) == pytest.approx(p, rel=1e-12)
            assert inside(grammar, text, j) == pytest.approx(p, rel=1e-12)


def test_prefixes_are_sums_over_completions(grammar: LevelledPCFG) -> None:
    texts = languages(grammar)
    prefixes = sorted({text[:t] for own in texts for text in own for t in range(len(text) + 1)})
    for prefix in prefixes[::3]:
        wanted = [sum(p for text, p in own.items() if text[:len(prefix)] == prefix) for own in texts]
        scan = grammar.scan([prefix])
        np.testing.assert_allclose(scan.log_prefix[0, len(prefix)].exp().numpy(), wanted, rtol=1e-12, atol=1e-15)
        for j, p in zip(grammar.metadata.tolist(), wanted, strict=True):
            assert inside(grammar, prefix, j, prefix=True) == pytest.approx(p, rel=1e-12, abs=1e-15)
        posterior = grammar.posterior(prefix)
        np.testing.assert_allclose(posterior.flatten(), np.array(wanted) / sum(wanted), atol=1e-12)
        assert posterior.sum() == pytest.approx(1, abs=1e-12)
        for known in ((), tuple(grammar.metadata[int(np.argmax(wanted))][:1]),
                      tuple(grammar.metadata[int(np.argmax(wanted))])):
            allowed = grammar.index(known)
            counts = np.zeros(grammar.terminals + 1)
            for own, ok in zip(texts, allowed, strict=True):
                for text, p in own.items():
                    if ok and text[:len(prefix)] == prefix:
                        counts[text[len(prefix)] if len(text) > len(prefix) else -1] += p
            np.testing.assert_allclose(grammar.predict(prefix, known), counts / counts.sum(), atol=1e-12)
        mean = sum(wanted) / len(wanted)
        assert math.exp(grammar.prefix_log_prob(prefix)) == pytest.approx(mean, rel=1e-12)


def test_nothing_is_known_before_the_first_terminal(grammar: LevelledPCFG) -> None:
    np.testing.assert_allclose(grammar.posterior(()), 1 / grammar.rule_sets ** grammar.levels, atol=1e-15)
    assert grammar.prefix_log_prob(()) == 0.0


def test_deep_grammars_agree_with_the_inside_algorithm() -> None:
    deep = LevelledPCFG.random(4, seed=1)
    documents = deep.sample(6, seed=2)
    scan = deep.scan([text for text, _ in documents])
    for n, (text, own) in enumerate(documents):
        for j in (own, (0, 1, 0, 1)):
            g = int(deep.index(j).argmax())
            for t in (1, 4, len(text)):
                wanted = inside(deep, text[:t], j, prefix=True)
                assert float(scan.log_prefix[n, t, g].exp()) == pytest.approx(wanted, rel=1e-10, abs=1e-300)
            assert float(scan.log_prob[n, g].exp()) == pytest.approx(inside(deep, text, j), rel=1e-10, abs=1e-300)
    inside_text = torch.arange(scan.following.shape[1]) <= scan.lengths[:, None]
    assert scan.predict().sum(-1)[inside_text].sub(1).abs().max() < 1e-12


def test_batches_do_not_matter() -> None:
    texts = [text for text, _ in SMALL.sample(40, seed=1)]
    whole = SMALL.scan(texts)
    for n in (0, 31, 32, 39):
        alone = SMALL.scan([texts[n]])
        torch.testing.assert_close(alone.log_prefix[0], whole.log_prefix[n, :len(texts[n]) + 1], rtol=0, atol=0)
        torch.testing.assert_close(alone.predict()[0], whole.predict()[n, :len(texts[n]) + 1], rtol=0, atol=1e-15)


def entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p if x)


def test_the_loss_of_the_exact_prediction_is_the_entropy_and_metadata_take_off_the_information() -> None:
    texts, chance = languages(SMALL), 1 / len(SMALL.metadata)
    mixed: dict[tuple[int, ...], float] = {}
    for own in texts:
        for text, p in own.items():
            mixed[text] = mixed.get(text, 0.0) + p * chance
    h, given = entropy(list(mixed.values())), chance * sum(entropy(list(own.values())) for own in texts)
    losses = {False: 0.0, True: 0.0}
    for j, own in zip(SMALL.metadata.tolist(), texts, strict=True):
        scan = SMALL.scan(list(own))
        for told in losses:
            predicted = scan.predict([j] * len(own) if told else None)
            for n, (text, p) in enumerate(own.items()):
                steps = predicted[n, range(len(text) + 1), [*text, SMALL.terminals]]
                losses[told] -= chance * p * float(steps.log().sum())
    assert losses[False] == pytest.approx(h, abs=1e-10) and losses[True] == pytest.approx(given, abs=1e-10)
    posterior_entropy = sum(p * entropy(SMALL.scan([text]).log_prob[0].softmax(0).tolist())
                            for text, p in mixed.items())
    information = math.log(len(SMALL.metadata)) - posterior_entropy  # I(X; J), the other way around
    assert losses[False] - losses[True] == pytest.approx(information, abs=1e-10) and information > 0.1


@pytest.mark.parametrize("told", [False, True])
def test_samples_have_the_right_frequencies(told: bool) -> None:
    from scipy.stats import chisquare

    documents = UNEVEN.sample(20_000, seed=5, metadata=(1, 0) if told else None)
    texts, chance = languages(UNEVEN), 1 / len(UNEVEN.metadata)
    expected: Counter[Any] = Counter()
    for j, own in zip(UNEVEN.metadata.tolist(), texts, strict=True):
        for text, p in own.items():
            if not told:
                expected[text, tuple(j)] += p * chance
            elif j == [1, 0]:
                expected[text, tuple(j)] += p
    seen = Counter((text, j) for text, j in documents)
    assert set(seen) <= set(expected)
    keys = list(expected)
    assert chisquare([seen[k] for k in keys], [expected[k] * len(documents) for k in keys]).pvalue > 0.01


def test_derives() -> None:
    deep = LevelledPCFG.random(4, rule_lengths=(2,), seed=0)
    documents = deep.sample(12, seed=1)
    rng = np.random.default_rng(0)
    wrong = 0
    for text, j in documents:
        assert deep.derives(text, j) and deep.derives(text) and deep.derives(text, j[:2])
        place = int(rng.integers(len(text)))
        changed = (*text[:place], (text[place] + 1) % deep.terminals, *text[place + 1:])
        assert deep.derives(changed, j) == (inside(deep, changed, j) > 0)
        assert deep.derives(changed) == any(inside(deep, changed, k) > 0 for k in deep.metadata.tolist())
        wrong += not deep.derives(changed, j)
        assert not deep.derives(text[:-1], j) and not deep.derives((*text, 0), j)
    assert wrong > 6
    assert not deep.derives(()) and not deep.derives([99]) and deep.log_prob([99]) == -math.inf


def test_two_metadata_of_one_language_share_the_posterior() -> None:
    rules = UNEVEN.rules
    twins = LevelledPCFG(((rules[0][0], rules[0][0]), rules[1]))
    for text, j in twins.sample(20, seed=0):
        posterior = twins.posterior(text)
        np.testing.assert_allclose(posterior[0], posterior[1], atol=1e-15)
        assert posterior.max() <= 0.5 and posterior[:, j[1]].sum() > 0


def test_json_and_seeds() -> None:
    assert LevelledPCFG.from_json(SMALL.to_json()) == SMALL == LevelledPCFG.random(2, seed=3)
    assert LevelledPCFG.random(2, seed=4) != SMALL
    assert SMALL.sample(5, seed=1) == SMALL.sample(5, seed=1) != SMALL.sample(5, seed=2)
    for sets in SMALL.rules:
        for symbols in sets:  # an expansion has one origin
            texts = [text for expansions in symbols for _, text in expansions]
            assert len(set(texts)) == len(texts)
    assert SMALL.longest == 9 and SMALL.symbols[:2] == (1, 3)


GOOD = (((1.0, (0,)),),)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LevelledPCFG(()), "one level or more"),
    (lambda: LevelledPCFG((((((0.5, (0,)),),),),)), "sum to 1"),
    (lambda: LevelledPCFG((((((-0.5, (0,)), (1.5, (0,))),),),)), "sum to 1"),
    (lambda: LevelledPCFG((((((1.0, ()),),),),)), "one symbol of the next level or more"),
    (lambda: LevelledPCFG((((((1.0, (0, 3)),),),), (GOOD,))), r"integers in \[0, 0\], got \(0, 3\)"),
    (lambda: LevelledPCFG((((((1.0, (0,)),),),), (GOOD, GOOD))), "expected 1 rule sets"),
    (lambda: LevelledPCFG((((*GOOD[0:1], *GOOD[0:1]),),)), "1 symbol, the root"),
    (lambda: LevelledPCFG.random(0), "levels: expected an integer >= 1, got 0"),
    (lambda: LevelledPCFG.random(2, symbols=(1, 3)), "expected 3 numbers"),
    (lambda: LevelledPCFG.random(2, rule_lengths=()), "rule_lengths"),
    (lambda: LevelledPCFG.random(2, rules_per_symbol=9, rule_lengths=(2,)), "expected at most 3"),
    (lambda: LevelledPCFG.from_json("{}"), "schema"),
    (lambda: SMALL.sample(0), "count: expected an integer >= 1"),
    (lambda: SMALL.sample(1, metadata=(0,)), "one for each level"),
    (lambda: SMALL.sample(1, metadata=(0, 2)), r"integers in \[0, 1\]"),
    (lambda: SMALL.index((0, 0, 0)), "at most 2 integers"),
    (lambda: SMALL.scan([]), "one text or more"),
    (lambda: SMALL.predict((99,)), "text 0: expected one that a grammar with these metadata writes"),
    (lambda: SMALL.posterior((0, 99)), "text 0: expected one that a grammar"),
])
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_all_strings_of_a_length_are_judged_alike() -> None:
    """``derives`` on every string, derivable or not, against the enumerated languages."""
    texts = languages(SMALL)
    for text in itertools.product(range(SMALL.terminals), repeat=4):
        for j, own in zip(SMALL.metadata.tolist(), texts, strict=True):
            assert SMALL.derives(text, j) == (text in own)
