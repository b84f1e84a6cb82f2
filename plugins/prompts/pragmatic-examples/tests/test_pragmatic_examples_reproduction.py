"""The reproduction runs from end to end on tiny models, and its rules decide as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenery")
pytest.importorskip("looseleaf_lab")
reproduction = pytest.importorskip("looseleaf_pragmatic_examples.reproduction")


@pytest.mark.slow
def test_it_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from looseleaf_text.testing import ToyLanguageModel

    monkeypatch.setattr(reproduction, "language_model", ToyLanguageModel)
    monkeypatch.setattr(reproduction, "ALPHAS", {"S1": 1.0})
    scale = reproduction.Scale(programs=48, epochs=2, rounds=1, targets=6, samples=40, tested=3, queries=8)
    row = reproduction.measure(0, scale)
    assert set(row["top-1"]) == {*reproduction.METHODS, "exact L0", "exact L1"}
    assert all(np.shape(row["top-1"][m][a]) == (4, 3) for m in row["top-1"] for a in reproduction.ALPHAS)
    assert set(row["few-shot"]) == {"pragmatic", "random", "diverse"} and len(row["few-shot"]["random"]) == 8


def test_the_exact_part_and_the_rules() -> None:
    once = reproduction.exact(reproduction.Scale())
    means = {name: [float(np.mean(values)) for values in rows] for name, rows in once["top-1"].items()}
    assert means["S1, L0"] == pytest.approx([.07, .26, .53, .76], abs=0.006)
    assert means["S1, L1"] == pytest.approx([.26, .50, .89, 1.0], abs=0.006)
    assert np.mean(once["needed"]["S1"]) < np.mean(once["needed"]["random"])

    def row(pragmatic: float) -> dict[str, Any]:
        top = {m: {a: [[0.2, 0.4]] * 4 for a in reproduction.ALPHAS} for m in (*reproduction.METHODS, "exact L0",
                                                                              "exact L1")}
        top["PraX"] = {a: [[pragmatic, 0.5]] * 4 for a in reproduction.ALPHAS}
        return {"top-1": top, "examples per spec": 4.0, "speaker agrees": 1.0,
                "few-shot": {"pragmatic": [0.6, 0.6], "random": [0.5, 0.5], "diverse": [0.5, 0.7]}}

    def verdicts(pragmatic: float, seeds: int = 3, quick: bool = False) -> list[str]:
        rows = [row(pragmatic + 0.01 * n) for n in range(seeds)]
        results = reproduction.Results(rows, once, list(range(seeds)), reproduction.Scale(), quick)
        return [c.verdict for c in reproduction.study.report(results).claims]

    unsure = "not shown at this scale"
    assert verdicts(0.6) == ["holds"] * 6 + [unsure, unsure]
    assert verdicts(0.0)[:3] == ["does not hold"] * 3
    assert verdicts(0.09)[:3] == [unsure] * 3 or verdicts(0.09)[:3] == ["holds"] * 3
    assert verdicts(0.6, seeds=2)[:5] == verdicts(0.6, quick=True)[:5] == [unsure] * 3 + ["holds"] * 2
