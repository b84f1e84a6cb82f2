"""Known answers: on a bigram model with a planted prior and a copying circuit the probe recovers both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from looseleaf_prior_distribution import (
    PriorProbe,
    answer_scores,
    behaviour,
    lens_scores,
    locate,
    mitigate,
    observe,
    priors,
    scaling,
    split_by_answer,
)
from looseleaf_prior_distribution.controls import planted
from looseleaf_text import LocalModel, LogitLens


@pytest.mark.parametrize("span", [1, 2])
def test_prior_and_answers_are_what_was_planted(span: int) -> None:
    model, tokenizer, task, known = planted(span=span, copy=2.0)
    local = LocalModel(model, tokenizer)
    found = priors(local, task)
    assert found == pytest.approx(known, abs=1e-5)
    table = model.model["layers"][-1].mlp.table.double()
    space = [tokenizer(a)["input_ids"] for a in task.answers]
    wanted = np.zeros((len(task.instances), len(space)))
    for n, instance in enumerate(task.instances):
        question = tokenizer(instance.text)["input_ids"]
        for k, answer in enumerate(space):
            text = [*question, 0, *answer]
            for t in range(span, len(text) - 1):  # the place before each token of the answer
                logits = table[text[t]].clone()
                logits[text[t - span]] += 2.0
                wanted[n, k] += float(logits.log_softmax(-1)[text[t + 1]])
    scores = answer_scores(local, task)
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
    made = behaviour(local, task)
    assert 0.1 < made.accuracy < 0.9
    assert [a for a, ok in zip(made.responses, made.correct, strict=True) if ok] == [
        i.answer for i, ok in zip(task.instances, made.correct, strict=True) if ok]
    assert made.slope().positive and (made.prior_gap or 0) > 0
    chances = torch.tensor(wanted).softmax(1)
    rights = [task.answers.index(i.answer) for i in task.instances]
    np.testing.assert_allclose(made.surprisal, -chances[range(len(rights)), rights].log(), atol=1e-4)


@pytest.mark.parametrize("span", [1, 2])
def test_prior_enters_where_it_was_planted(span: int) -> None:
    model, tokenizer, task, known = planted(span=span)
    local = LocalModel(model, tokenizer)
    made = behaviour(local, task)
    layers = observe(local, LogitLens(model), task, made.prior, made.responses)
    np.testing.assert_allclose(layers.correlation[:-1], 0, atol=1e-6)
    assert locate(layers.correlation.tolist(), 1) == [3]
    # before the last layer only copying has spoken, so that the right answer is far ahead
    assert (layers.gold[:-1] > layers.favoured[:-1]).all()
    direct = local.score([task.prompt(i) for i in task.instances],
                         [[task.continuation(i.answer)] for i in task.instances])
    own = np.asarray(direct)[:, 0] / span
    np.testing.assert_allclose(layers.gold[-1], own, atol=1e-5)
    wanted = np.corrcoef(own, [known[i.answer] for i in task.instances])[0, 1]
    assert layers.correlation[-1] == pytest.approx(wanted, abs=1e-4) and wanted > 0.8


def test_turning_down_the_planted_layers() -> None:
    model, tokenizer, task, _ = planted()
    local = LocalModel(model, tokenizer)
    made = behaviour(local, task)
    assert made.accuracy < 1
    alternatives = len(task.answers) - 1
    found = scaling(local, task, made.prior, 0.0, alternatives=alternatives)
    assert found.accuracy[-1] == pytest.approx(made.accuracy)
    assert found.correlation[-1] > 0.99
    assert found.accuracy[3] == 1.0 and found.correlation[3] == 0.0  # no prior: copying is all there is
    assert found.accuracy[0] == pytest.approx(1 / len(task.answers))  # no copying: always the likeliest answer
    for idle in (1, 2):
        assert (found.accuracy[idle], found.correlation[idle]) == (found.accuracy[-1], found.correlation[-1])
    same = scaling(local, task, made.prior, 1.0, alternatives=alternatives)
    assert set(same.accuracy.values()) == {found.accuracy[-1]}
    assert set(same.correlation.values()) == {found.correlation[-1]}
    attention = scaling(local, task, made.prior, 0.0, part="attention", alternatives=alternatives)
    assert attention.accuracy[3] == attention.accuracy[-1] and attention.accuracy[0] < attention.accuracy[-1]


def test_without_a_prior_there_is_no_slope() -> None:
    model, tokenizer, task, _ = planted(spread=0.0)
    made = behaviour(LocalModel(model, tokenizer), task)
    assert made.accuracy == 1.0 and made.slope().covers_zero and made.prior_gap is None


def test_mitigation_in_the_planted_layer_helps_answers_never_trained_on() -> None:
    model, tokenizer, task, _ = planted(answers=32, instances=128, spread=2.0)
    local = LocalModel(model, tokenizer)
    prior = priors(local, task)
    train, test = split_by_answer(task, prior, seed=1)
    before = behaviour(local, test, prior)
    gain = model.model["layers"][3].mlp.gain.item()
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    located = mitigate(model, tokenizer, train, [3], lr=0.1, epochs=4)
    idle = mitigate(model, tokenizer, train, [1, 3], lr=1e-9, epochs=1)
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    with located.apply(model):
        after = behaviour(local, test, prior)
        assert model.model["layers"][3].mlp.gain.item() < gain
    assert after.accuracy >= before.accuracy + 0.2
    with idle.apply(model):
        assert behaviour(local, test, prior).accuracy == before.accuracy
    assert located.info["loss"][-1] < located.info["loss"][0]


def test_the_probe_as_a_whole() -> None:
    model, tokenizer, task, _ = planted()
    report = PriorProbe(layers=1, scaled=32, alpha=0.0).run((model, tokenizer), task, progress=False)
    assert report.facts["copying: located layers"] == "3"
    assert report.facts["copying: dominated by the prior"] is True
    assert len(report.figures) == 5 and report.examples
    calm, tokenizer, task, _ = planted(spread=0.0)
    report = PriorProbe(layers=1).run((calm, tokenizer), task, progress=False)
    assert report.facts["copying: dominated by the prior"] is False


def test_lens_scores_in_other_batches_are_the_same() -> None:
    model, tokenizer, task, _ = planted(span=2, instances=10)
    local, lens = LocalModel(model, tokenizer), LogitLens(model)
    rights = [i.answer for i in task.instances]
    np.testing.assert_allclose(lens_scores(local, lens, task, rights, batch=3),
                               lens_scores(local, lens, task, rights, batch=10), atol=1e-6)
