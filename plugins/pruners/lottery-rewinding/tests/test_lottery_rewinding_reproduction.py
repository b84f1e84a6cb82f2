"""The reproduction runs from end to end, on the real digits, with short trainings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf import Report
from looseleaf_lottery_rewinding import Stability
from looseleaf_lottery_rewinding.reproduction import Measured, Scale, _claims, reproduce

torch.set_num_threads(1)


def test_from_end_to_end() -> None:
    pytest.importorskip("looseleaf_lab.vision")
    pytest.importorskip("sklearn")
    report = reproduce(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 7 and report.facts["seeds"] == 1 and report.facts["step of 5%"] == 2
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims} == {"not shown at this scale"}, "quick decides nothing"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(report.tables) == 2 and len(report.figures[0].series) == 3


def made(zero: float, early: float, near: tuple[float, float]) -> list[Measured]:
    out = []
    for noise in (-0.002, 0.0, 0.002):
        m = Measured(density=[0.8 ** r for r in range(17)], step=25)
        for start, right in ((0, zero), (0.05, early)):
            m.accuracy[start] = [0.97 + noise, *([right + noise] * 16)]
            far = near[0] if start == 0 else near[1]
            m.stable[start] = {r: Stability(far + noise, 10 * far + noise, (1.0, 1.0)) for r in (4, 8)}
        out.append(m)
    return out


HOLDS, NOT, OPEN = "holds", "does not hold", "not shown at this scale"


@pytest.mark.parametrize("values, expected", [
    ((0.93, 0.965, (2.0, 1.0)), [HOLDS] * 6 + [OPEN]),
    ((0.98, 0.93, (1.0, 2.0)), [NOT] * 6 + [OPEN]),
    ((0.97, 0.97, (1.0, 1.0)), [OPEN, OPEN, HOLDS, OPEN, OPEN, OPEN, OPEN])])
def test_rules(values: Any, expected: list[str]) -> None:
    pytest.importorskip("looseleaf_lab")
    report = Report("rules")
    _claims(report, made(*values), Scale(), quick=False)
    assert [c.verdict for c in report.claims] == expected


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds"):
        reproduce(seeds=seeds)
