"""The claims on made-up measurements."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("looseleaf_lab")

from looseleaf_lab.study import Results
from looseleaf_metadata_conditioning.reproduction import ARMS, BINS, FOUR, LENGTHS, NONE, crossing, study


def row(short: float, long: float, loss: float) -> dict[str, Any]:
    """One seed; the model of all four levels differs from that without metadata by these numbers."""
    arms = {}
    for name, (depth, _) in ARMS.items():
        change = [(short if t <= 4 else long) if name == FOUR else 0.0 for t in LENGTHS]
        arms[name] = {"excess": 0.1, "excess by position": [0.1] * 17, "excess told": 0.05, "layer": 1,
                      "loss": 0.8 + loss * bool(depth), "loss told": 0.8 - 0.2 * bool(depth), "training loss": 0.8,
                      "probe": [[0.7 + c] * 4 for c in change], "own grammar": [0.5 + c for c in change],
                      "any grammar": [0.6 + c for c in change]}
    return {"arms": arms, "majority": [0.5], "exact": {"accuracy": [[0.95] * 4] * len(LENGTHS)}}


ONCE = {"no metadata": {"without": [[2.0] * len(BINS)] * 3},
        "genre": {"without": [[2.1] * len(BINS)] * 3, "told": [[1.9] * len(BINS)] * 3,
                  "another genre": [[2.2] * len(BINS)] * 3},
        "SmolLM2": {"without": [[None, *[3.0] * (len(BINS) - 2), None]] * 3, "told": [[2.9] * len(BINS)] * 3,
                    "another genre": [[2.8] * len(BINS)] * 3}}


def test_claims_and_tables() -> None:
    results = Results([row(-0.1, 0.1, 0.01), row(-0.2, 0.1, 0.01)], ONCE, [0, 1], study.full, False)
    report = study.report(results)
    assert {claim.verdict for claim in report.claims if "cooldown" not in claim.statement} == {"holds"}
    assert report.claims[2].measured.startswith("all levels less none -0.1500 (-0.2000 to -0.1000)")
    assert crossing(results, FOUR, "probe", NONE) == 6 and crossing(results, FOUR, "own grammar", FOUR) == 1
    brown = report.tables[-1]
    assert len(brown.rows) == 5 * len(BINS) - 2  # nothing precedes SmolLM2's first token
    assert not any("nan" in str(cell) for r in brown.rows for cell in r)


def test_the_opposite_does_not_hold_and_the_quick_run_decides_nothing() -> None:
    rows = [row(0.1, -0.1, -0.01), row(0.1, -0.1, -0.02)]
    report = study.report(Results(rows, ONCE, [0, 1], study.full, False))
    assert [claim.verdict for claim in report.claims[:8]] == [
        "does not hold", "holds", *["does not hold"] * 6]
    assert crossing(Results(rows, ONCE, [0, 1], study.full, False), FOUR, "probe", NONE) is None
    quick = study.report(Results(rows, ONCE, [0, 1], study.full, True))
    assert {claim.verdict for claim in quick.claims} == {"not shown at this scale"}
