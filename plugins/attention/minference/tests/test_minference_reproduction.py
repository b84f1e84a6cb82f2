"""The reproduction, on a tiny model and short contexts: that it runs and decides nothing it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from looseleaf.testing.models import tiny_llama

pytest.importorskip("looseleaf_lab")
from looseleaf_lab.study import Results
from looseleaf_minference.reproduction import Scale, equal_a_shape, study
from looseleaf_minference.search import KNOWN_HEADS

TINY = Scale(context=1100, last=64, prompt=1100, trials=1, layers=(1,), repeats=1, rounds=2, head_dim=16)


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __call__(self, text: str, **given: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) % 64 for c in text]}

    def decode(self, ids: Any) -> str:
        return "".join(chr(65 + int(i) % 26) for i in ids)


@pytest.fixture(scope="module")
def measured() -> Any:
    """Rows of two seeds, and what is measured once."""
    from looseleaf.resume import as_plain
    from looseleaf_lab import models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda name: (tiny_llama(), Letters()))
        return as_plain([study.measure(seed, TINY) for seed in range(2)]), as_plain(study.once(TINY))


@pytest.mark.parametrize("quick", [True, False])
def test_the_report_has_all_claims(measured: Any, quick: bool) -> None:
    seeds = [0] if quick else [0, 1]
    report = study.report(Results(measured[0][:len(seeds)], measured[1], seeds, TINY, quick))
    verdicts = {c.statement: c.verdict for c in report.claims}
    assert len(verdicts) == 14
    assert verdicts["The search gives each head the pattern that it has"] == "holds"
    assert sum(v == "holds" for v in verdicts.values()) >= 2
    undecided = sum(v == "not shown at this scale" for v in verdicts.values())
    assert undecided == (12 if quick else 9), verdicts  # a random model finds no key
    known = next(t for t in report.tables if t.title == "Heads whose pattern is known")
    assert [row[:3] for row in known.rows] == [[name, len(seeds), len(seeds)] for name in KNOWN_HEADS]
    winners = next(t for t in report.tables if t.title.startswith("Best pattern of each head in the search"))
    assert [row[0] for row in winners.rows] == ["all", "last 64"]
    assert all(sum(row[1:]) == 8 for row in winners.rows)  # type: ignore[arg-type]  # 2 layers of 4 heads
    fractions = [f for f in report.figures if f.title.startswith("Fraction of the heads")]
    assert len(fractions) == 4 and all(sum(s.y[0] for s in f.series) == 1 for f in fractions)
    drawn = [f for f in report.figures if f.title.startswith("What each head")]
    assert len(drawn) == 1 and drawn[0].panels is not None and len(drawn[0].panels) == 4
    for panel in drawn[0].panels.values():
        assert all(row[i] == 1 for i, row in enumerate(panel)), "the diagonal is always computed"
        assert all(v == 0 for i, row in enumerate(panel) for v in row[i + 1:]), "later keys never are"
    assert report.to_text()


@pytest.mark.parametrize("density", [0.1, 0.35, 0.8])
def test_the_baseline_is_no_sparser(density: float) -> None:
    window, reached = equal_a_shape(1536, density)
    assert reached >= density and window % 64 == 0
    assert reached - density < 0.1 or window == 64


@pytest.mark.slow
@pytest.mark.smollm2
def test_quality_on_a_real_model() -> None:
    import torch

    from looseleaf import attach
    from looseleaf_lab import data, models
    from looseleaf_minference import MInference

    model, tokenizer = models.load("smollm2")
    plugin = MInference()
    plugin.calibrate(model, {"input_ids": data.prose_ids(tokenizer, 1280, "calibration")}, density=0.6)
    ids = data.prose_ids(tokenizer, 1280, "evaluation")
    with torch.inference_mode():
        exact = model.base_model(ids).last_hidden_state[:, -128:]
        with attach(model, plugin) as attached:
            sparse = model.base_model(ids).last_hidden_state[:, -128:]
    densities = [r["density"] for r in attached.records]
    assert len(densities) == 30 and sum(densities) / 30 < 0.65
    assert float((sparse - exact).norm() / exact.norm()) < 0.2
