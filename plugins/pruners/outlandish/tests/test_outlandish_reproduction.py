"""The reproduction's parts, and all of it on a tiny model."""

import math
from typing import Any

import pytest
import torch

from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_outlandish import SAMPLES
from looseleaf_outlandish import reproduction as r
from looseleaf_outlandish.experiment import (
    AT_END,
    EACH_STEP,
    EARLY,
    KEEP_TOP,
    PLAIN,
    RANDOM,
    STONES,
    STONES_ELSEWHERE,
    Experiment,
    Measured,
    Setting,
    at_equal_memorisation,
    largest,
    others,
    slower,
)
from looseleaf_outlandish.updates import Update

METHODS = [EARLY, PLAIN, AT_END, KEEP_TOP, RANDOM, EACH_STEP, slower(0.25), slower(0.5), STONES, STONES_ELSEWHERE]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, max_position_embeddings=512, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_a_tiny_model_goes_through_all_of_it() -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    setting = Setting(steps=3, early=2, lr=1e-2)
    measured = r.measure(model, tiny_tokenizer(), setting, 2, 1, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len(measured) == 48 and sum(EACH_STEP in m.found for m in measured) == 4
    some = [m for m in measured if EACH_STEP in m.found]
    assert {m.sample.level for m in some} == {"ordinary", "unusual", "untrue", "outlandish"}
    assert all(sorted(m.found) == sorted(METHODS) for m in some)
    report = r.summarise(measured, setting)
    assert len(report.claims) == 13
    assert report.to_text() and report.tables[-2].title == "Methods"
    quick = r.summarise(some, setting, quick=True)
    assert {c.verdict for c in quick.claims} == {"not shown at this scale"}


def test_plain_training_is_the_same_with_and_without_rivals() -> None:
    model = llama()
    runs = [Experiment(model, tiny_tokenizer(), Setting(steps=2, early=1, lr=1e-2)).measure(SAMPLES[3], 1, rivals)
            for rivals in (False, True)]
    assert all(runs[1].found[m] == runs[0].found[m] for m in (EARLY, PLAIN))
    assert list(runs[0].found) == [EARLY, PLAIN]


def test_the_weights_are_put_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text_llama().eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    experiment = Experiment(model, tiny_tokenizer(), Setting(steps=2, early=1))
    monkeypatch.setattr(experiment, "ordinary_loss", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.measure(SAMPLES[0], 0, False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_rivals_keep_and_drop_what_they_say() -> None:
    update = Update("w", torch.tensor([3.0, -9.0, 1.0, 0.5, 7.0]), torch.zeros(5))
    assert largest(update, 0.4).tolist() == [False, True, False, False, True]
    assert int((~others(0)(update, 0.4)).sum()) == 2
    assert torch.equal(others(7)(update, 0.4), others(7)(update, 0.4))


def test_a_smaller_rate_that_memorises_as_much() -> None:
    points = [(2.0, 0.5), (4.0, 2.5), (10.0, 4.0)]
    for wanted, prime in [(0.0, 0.0), (1.0, 0.25), (3.0, 1.5), (4.0, 2.5), (7.0, 3.25), (12.0, 4.0), (-1.0, 0.0)]:
        assert at_equal_memorisation(points, wanted) == pytest.approx(prime)
    assert at_equal_memorisation([(0.0, 0.0), (-1.0, 0.3)], 0.0) == 0.0


def planted(right: bool) -> list[Measured]:
    """48 samples for which every claim is right, or wrong."""
    made = []
    for number, sample in enumerate(SAMPLES):
        log_p = -2.0 - 0.4 * (number * 7 % 48)
        mem, prime = -log_p, -0.5 * log_p if right else 0.5 * (log_p + 25)
        kept, ignored, stones, top = (0.95, 0.2, 0.5, 1.0) if right else (0.5, 1.2, 1.0, 0.9)
        found = {EARLY: (mem / 2, prime / 2 if right else -prime), PLAIN: (mem, prime)}
        if number % 2:
            pruned = (kept * mem, ignored * prime)
            found.update({AT_END: pruned, KEEP_TOP: (mem / 2, top * prime), RANDOM: (mem, prime), EACH_STEP: pruned,
                          slower(0.25): (mem / 4, prime / 4), slower(0.5): (mem / 2, prime / 2),
                          STONES: (mem / 2, stones * prime), STONES_ELSEWHERE: (mem, stones * prime)})
        made.append(Measured(sample, log_p, found, {"before": 3.0, PLAIN: 2.9, EACH_STEP: 2.95}, -1.0))
    return made


@pytest.mark.parametrize("right", [True, False])
def test_planted_effects_are_told_from_planted_failures(right: bool) -> None:
    verdicts = [c.verdict for c in r.summarise(planted(right), Setting()).claims]
    assert verdicts == ["holds" if right else "does not hold"] * 9 + ["not shown at this scale"] * 4


def test_the_reduction_is_that_of_the_median() -> None:
    rows = planted(True)[1::2]
    median = sorted(m.found[PLAIN][1] for m in rows)[11:13]
    plain = math.exp(sum(median) / 2)
    assert r._median(rows, PLAIN, 1) == pytest.approx(plain)
    assert r._reduction(rows, EACH_STEP) == pytest.approx(1 - plain ** 0.2 / plain)
    assert r._kept(rows, EACH_STEP) == pytest.approx(0.95)


def test_bad_seeds() -> None:
    with pytest.raises(ValueError, match="seeds=0"):
        r.reproduce(seeds=0)
