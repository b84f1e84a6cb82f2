"""The reproduction runs from end to end, on the real digits, with short trainings; its rules decide what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("looseleaf_lab.study")

from looseleaf import Report
from looseleaf_lab.study import Results
from looseleaf_lottery_rewinding.reproduction import Scale, study

torch.set_num_threads(1)


def test_from_end_to_end() -> None:
    pytest.importorskip("sklearn")
    report = study(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 7 and report.facts["seeds"] == 1 and report.facts["step of 5%"] == 2
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims} == {"not shown at this scale"}, "quick decides nothing"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(report.tables) == 2 and len(report.figures[0].series) == 3


def planted(zero: float, early: float, near: tuple[float, float]) -> Results:
    rows: list[dict[str, Any]] = []
    for noise in (-0.002, 0.0, 0.002):
        rows.append({"density": [0.8 ** r for r in range(17)], "step": 25,
                     "accuracy": [[0.97 + noise, *([right + noise] * 16)] for right in (zero, early)],
                     "stable": [[{"distance": far + noise, "angle": 10 * far + noise, "travelled": [1.0, 1.0]}] * 2
                                for far in near]})
    return Results(rows, {}, [0, 1, 2], Scale(), False)


HOLDS, NOT, OPEN = "holds", "does not hold", "not shown at this scale"


@pytest.mark.parametrize("values, expected", [
    ((0.93, 0.965, (2.0, 1.0)), [HOLDS] * 6 + [OPEN]),
    ((0.98, 0.93, (1.0, 2.0)), [NOT] * 6 + [OPEN]),
    ((0.97, 0.97, (1.0, 1.0)), [OPEN, OPEN, HOLDS, OPEN, OPEN, OPEN, OPEN])])
def test_rules(values: Any, expected: list[str]) -> None:
    assert [c.verdict for c in study.report(planted(*values)).claims] == expected


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds"):
        study(seeds=seeds)
