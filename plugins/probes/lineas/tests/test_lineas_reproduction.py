"""The claims of LinEAS on made-up measurements, and the search for equal cost."""

from __future__ import annotations

import pytest

pytest.importorskip("looseleaf_lab")

from looseleaf_lab.study import Results
from looseleaf_lineas.reproduction import as_dear, study


def row(gain: float) -> dict[str, object]:
    """One draw in which the sentiment rises by ``gain`` at each step of the strength."""
    curve = [[0.1 + gain * i, 20.0 + i] for i in range(5)]
    return {"curves": {name: curve for name in ("LinEAS", "difference in means", "Lin-AcT")},
            "strength": {"difference in means": 0.5, "Lin-AcT": 0.25},
            "lead": {"difference in means": -0.1, "Lin-AcT": 0.2}, "loss": [10.0, 2.0],
            "falls to": 0.2, "nearer": 0.95, "sparse": [0.9, 0.1 + 3 * gain, 21.0]}


def test_claims_and_tables() -> None:
    report = study.report(Results([row(0.1), row(0.2)], {}, [0, 1], study.full, False))
    verdicts = {claim.statement[:40]: claim.verdict for claim in report.claims}
    assert list(verdicts.values()) == ["holds", "does not hold", "holds", "holds", "holds", "holds",
                                       "not shown at this scale", "not shown at this scale"]
    assert report.claims[1].measured == ("sentiment -0.100 (-0.100 to -0.100) against the baseline at strength 0.50; "
                                         "2 seeds")
    assert "90.0% at the identity with 75.0% of the effect" in report.claims[5].measured
    assert [t.title for t in report.tables] == ["Effect of strength", "Sparse steering"]
    assert len(report.tables[0].rows) == 15 and len(report.figures[0].series) == 3
    assert report.facts["steps"] == 100 and report.facts["continuations"] == "16 of 20 tokens"


def test_nothing_is_decided_by_the_quick_run_nor_without_effect() -> None:
    quick = study.report(Results([row(0.1)], {}, [0], study.full, True))
    assert {claim.verdict for claim in quick.claims} == {"not shown at this scale"}
    flat = study.report(Results([row(0.0)], {}, [0], study.full, False))
    assert flat.claims[5].verdict == "not shown at this scale" and flat.claims[0].verdict == "does not hold"


def test_equal_cost() -> None:
    assert as_dear(lambda strength: 10 * strength, 20) == 1.0
    assert as_dear(lambda strength: 10 * strength, 5) == pytest.approx(0.5, abs=0.01)
    assert as_dear(lambda strength: 10 * strength, 0.0) == 0.0
