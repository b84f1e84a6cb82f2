"""The reproduction on few pictures."""

from __future__ import annotations

from looseleaf_jigsaw_r1.reproduction import study


def test_controls_hold() -> None:
    report = study(quick=True, progress=False)
    assert [claim.verdict for claim in report.claims] == ["holds"] + ["not shown at this scale"] * 3
