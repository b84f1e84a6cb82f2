"""The reproduction runs from end to end, on the real digits, with short trainings; its rules decide what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("looseleaf_lab.study")

from looseleaf import Report
from looseleaf.resume import as_plain
from looseleaf_lab.study import Results
from looseleaf_lottery_ticket.reproduction import MASK, REINIT, TICKET, Scale, study

torch.set_num_threads(1)
VERDICTS = ["reach the whole", "iterations", "learn faster", "reinitialised tickets are worse", "Random masks",
            "learn slower"]


def test_from_end_to_end() -> None:
    pytest.importorskip("sklearn")
    report = study(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 7 and report.facts["seeds"] == 1
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims} == {"not shown at this scale"}, "quick decides nothing"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(report.figures) == 2 and len(report.tables[0].rows) == 1 + 3 * 2


def planted(ticket: float, other: float, early: float, late: float) -> Results:
    scale, rows = Scale(), []
    for noise in (-0.001, 0.0, 0.001):
        row: dict[str, Any] = {"density": {r: 0.8 ** r for r in (0, *scale.rounds)}}
        for kind, right, stop in ((TICKET, ticket, early), (REINIT, other, late), (MASK, other, late)):
            row[kind] = {r: {"stopped_accuracy": right + noise, "early_stop": stop, "final": right, "cut_off": 0.0}
                         for r in scale.rounds}
        row[TICKET][0] = {"stopped_accuracy": 0.96 + noise, "early_stop": 500, "final": 0.96, "cut_off": 0.0}
        rows.append(as_plain(row))
    return Results(rows, {}, [0, 1, 2], scale, False)


@pytest.mark.parametrize("values, expected", [
    ((0.97, 0.9, 400, 600), [True] * 6), ((0.9, 0.9, 600, 500), [False] * 6),
    ((0.955, 0.954, 500, 500), [True, True, False, False, False, True])])
def test_rules(values: Any, expected: list[bool]) -> None:
    report = study.report(planted(*values))
    for word, wanted in zip(VERDICTS, expected, strict=True):
        claim = next(c for c in report.claims if word in c.statement)
        assert claim.verdict == ("holds" if wanted else "does not hold"), claim


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds"):
        study(seeds=seeds)
