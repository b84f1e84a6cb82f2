"""The reproduction on a tiny model: every claim is decided by its rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from looseleaf import Report
from looseleaf.resume import as_plain
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_implicit_instruction_tuning import PAIRS, reproduction
from looseleaf_implicit_instruction_tuning.reproduction import Scale, measure, study
from looseleaf_lab.study import Results


def test_every_claim_is_measured_and_decided_by_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    monkeypatch.setattr(reproduction, "smollm2", lambda steps: (model, tokenizer))
    monkeypatch.setattr(reproduction, "recipes", lambda: list(PAIRS))
    monkeypatch.setattr(reproduction, "embed", lambda texts: np.array([[len(t), t.count("e") + 1.0] for t in texts]))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    scale = Scale(untuning=0, prompts=3, tokens=3, pairs=4, epochs=1, recipes=3)
    row = as_plain(measure(0, scale))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    report = study.report(Results([row, row], {"planted": True}, [0, 1], scale, quick=False))
    assert len(report.claims) == 14 and report.claims[0].verdict == "holds"
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()
    quick = study.report(Results([row], {"planted": False}, [0], scale, quick=True))
    assert [c.verdict for c in quick.claims] == ["does not hold", *["not shown at this scale"] * 13]
