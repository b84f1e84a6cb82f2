"""The reproduction on a tiny model, and the probe on the real one."""

from __future__ import annotations

import pytest
import torch

from looseleaf import Report
from looseleaf.resume import as_plain
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_lab.study import Results
from looseleaf_prior_distribution import acronym, behaviour, lens_scores, mitigate, reproduction
from looseleaf_prior_distribution.reproduction import Scale, control, measure, peaks, study
from looseleaf_text import LocalModel, LogitLens


def test_control() -> None:
    assert set(control(Scale()).values()) == {True}


def test_every_claim_is_measured_and_decided_by_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "EPOCHS", 1)
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    monkeypatch.setattr(reproduction, "smollm2", lambda: (model, tokenizer))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    scale = Scale(questions=16, answers=8, counting=6, observed=6, scaled=2)
    rows = [as_plain(measure(seed, scale)) for seed in range(2)]
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    for row in rows:
        for name in ("acronym", "middle word"):
            assert not set(row["located"][name]) & set(row["control"][name])
            assert len(row["located"][name]) == len(row["control"][name]) == 1
    assert as_plain(measure(1, scale)) == rows[1]
    report = study.report(Results(rows, control(scale), [0, 1], scale, quick=False))
    assert len(report.claims) == 8 and report.claims[0].verdict == "holds"
    by_statement = {c.statement: c for c in report.claims}
    tuning = by_statement["Tuning the located layers reaches high held-out accuracy"]
    assert tuning.verdict in ("holds", "does not hold")
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()
    quick = study.report(Results(rows[:1], control(scale), [0], scale, quick=True))
    assert {c.verdict for c in quick.claims} == {"not shown at this scale"}


def test_the_layer_is_chosen_without_the_seed_it_is_measured_on() -> None:
    assert peaks([[0.0, 9.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 5.0]]) == [0.0, 0.0, 0.0]
    assert peaks([[0.0, 9.0, 0.0]]) == [9.0]


@pytest.mark.slow
@pytest.mark.smollm2
def test_real_model() -> None:
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
