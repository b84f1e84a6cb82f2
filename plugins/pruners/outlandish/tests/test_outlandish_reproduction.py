"""The reproduction's parts, and all of it on a tiny model."""

import dataclasses
import math
from typing import Any

import pytest
import torch

pytest.importorskip("looseleaf_lab.study")

from looseleaf.resume import as_plain
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_lab import models
from looseleaf_lab.study import Results
from looseleaf_outlandish import SAMPLES
from looseleaf_outlandish import reproduction as r
from looseleaf_outlandish.reproduction import (
    AT_END,
    EACH_STEP,
    EARLY,
    KEEP_TOP,
    PLAIN,
    RANDOM,
    STONES,
    STONES_ELSEWHERE,
    Figures,
    Scale,
    at_equal_memorisation,
    largest,
    others,
    slower,
    study,
)

METHODS = [EARLY, PLAIN, AT_END, KEEP_TOP, RANDOM, EACH_STEP, slower(0.25), slower(0.5), STONES, STONES_ELSEWHERE]
TINY = Scale(steps=3, early=2, lr=1e-2, per_level=1, seeds=2, others=False)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, max_position_embeddings=512, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_a_tiny_model_goes_through_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(models, "load", lambda name: (model, tiny_tokenizer()))
    assert study.measure is not None
    results = Results([as_plain(study.measure(seed, TINY)) for seed in range(2)], {}, [0, 1], TINY, False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    figures = Figures(results)
    assert len(figures.rows) == len(figures.some) == 4
    assert {SAMPLES[row["number"]].level for row in figures.some} == {"ordinary", "unusual", "untrue", "outlandish"}
    assert all(sorted(row["methods"]) == sorted(METHODS) for row in figures.some)
    report = study.report(results)
    assert len(report.claims) == 13
    assert report.to_text() and report.tables[-2].title == "Methods"
    quick = study.report(dataclasses.replace(results, quick=True))
    assert {c.verdict for c in quick.claims} == {"not shown at this scale"}


def test_all_samples_are_dealt_to_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: (llama(), tiny_tokenizer()))
    monkeypatch.setattr(r, "learn_all_ways", lambda local, sample, seed, scale, baselines, *_: {
        "text": sample.text, "seed": seed, "methods": {EACH_STEP: (0.0, 0.0)} if baselines else {}})
    assert study.measure is not None
    figures = Figures(Results([study.measure(seed, Scale(seeds=2)) for seed in range(2)], {}, [0, 1], TINY, False))
    assert [row["number"] for row in figures.rows] == list(range(48)) and len(figures.some) == 4 * 5
    assert all(row["text"] == s.text and row["seed"] == n % 2 for n, (row, s) in enumerate(zip(figures.rows, SAMPLES)))
    assert [len(group) for group in figures.by_keyword] == [4] * 12


def measured(baselines: bool, model: Any, scale: Scale) -> dict[str, Any]:
    """One sample, learned by a model whose weights are put back."""
    with r.probe.restored(model) as put_back:
        return r.learn_all_ways(r.LocalModel(model, tiny_tokenizer()), SAMPLES[3], 1, scale, baselines, False, put_back)


def test_plain_training_is_the_same_with_and_without_baselines() -> None:
    model = llama()
    alone, beside = (measured(b, model, Scale(steps=2, early=1, lr=1e-2)) for b in (False, True))
    assert all(alone["methods"][m] == beside["methods"][m] for m in (EARLY, PLAIN))
    assert list(alone["methods"]) == [EARLY, PLAIN]


def test_the_weights_are_put_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text_llama().eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(r, "ordinary_loss", lambda local: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(False, model, Scale(steps=2, early=1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_baselines_keep_and_drop_what_they_say() -> None:
    assert largest(torch.tensor([3.0, 9.0, 1.0, 0.5, 7.0]), 0.4).tolist() == [False, True, False, False, True]
    first, again, other = (others(torch.zeros(50), 0.4, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert int((~first).sum()) == 20 and torch.equal(first, again) and not torch.equal(first, other)


def test_a_smaller_rate_that_memorises_as_much() -> None:
    points = [(2.0, 0.5), (4.0, 2.5), (10.0, 4.0)]
    for wanted, prime in [(0.0, 0.0), (1.0, 0.25), (3.0, 1.5), (4.0, 2.5), (7.0, 3.25), (12.0, 4.0), (-1.0, 0.0)]:
        assert at_equal_memorisation(points, wanted) == pytest.approx(prime)
    assert at_equal_memorisation([(0.0, 0.0), (-1.0, 0.3)], 0.0) == 0.0


def planted(right: bool) -> Results:
    """48 samples for which every claim is right, or wrong."""
    rows = []
    for number in range(len(SAMPLES)):
        log_p = -2.0 - 0.4 * (number * 7 % 48)
        mem, prime = -log_p, -0.5 * log_p if right else 0.5 * (log_p + 25)
        kept, ignored, stones, top = (0.95, 0.2, 0.5, 1.0) if right else (0.5, 1.2, 1.0, 0.9)
        methods = {EARLY: (mem / 2, prime / 2 if right else -prime), PLAIN: (mem, prime)}
        if number % 2:
            pruned = (kept * mem, ignored * prime)
            methods.update({AT_END: pruned, KEEP_TOP: (mem / 2, top * prime), RANDOM: (mem, prime), EACH_STEP: pruned,
                            slower(0.25): (mem / 4, prime / 4), slower(0.5): (mem / 2, prime / 2),
                            STONES: (mem / 2, stones * prime), STONES_ELSEWHERE: (mem, stones * prime)})
        rows.append({"number": number, "log_p_before": log_p, "log_p_stones": -1.0, "methods": methods,
                     "ordinary": {PLAIN: 2.9, EACH_STEP: 2.95}})
    return Results([as_plain({"autocast": False, "ordinary": 3.0, "samples": rows})], {}, [0], Scale(), False)


@pytest.mark.parametrize("right", [True, False])
def test_planted_effects_are_told_from_planted_failures(right: bool) -> None:
    verdicts = [c.verdict for c in study.report(planted(right)).claims]
    assert verdicts == ["holds" if right else "does not hold"] * 9 + ["not shown at this scale"] * 4


def test_the_reduction_is_that_of_the_median() -> None:
    figures = Figures(planted(True))
    middle = sorted(figures.logs(PLAIN, 1))[11:13]
    plain = math.exp(sum(middle) / 2)
    assert figures.median(PLAIN) == pytest.approx(plain)
    assert figures.reduction(EACH_STEP).value == pytest.approx(1 - plain ** 0.2 / plain)
    assert figures.kept(EACH_STEP).value == pytest.approx(0.95)


def test_bad_seeds() -> None:
    with pytest.raises(ValueError, match=r"seeds: expected .*, got 0"):
        study(seeds=0)
