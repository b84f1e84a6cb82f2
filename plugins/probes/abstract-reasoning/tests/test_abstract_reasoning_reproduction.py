"""The rules that decide the claims, and the reproduction from end to end on a small random model."""

from __future__ import annotations

from typing import Any

import pytest

from looseleaf import Claim, Report
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_abstract_reasoning import AbstractReasoningProbe, Memoriser, Oracle, problems
from looseleaf_abstract_reasoning import reproduction as subject
from looseleaf_abstract_reasoning.items import KINDS
from looseleaf_abstract_reasoning.scores import Mark

pytest.importorskip("looseleaf_lab", reason="looseleaf-lab is not installed")

PROBE = AbstractReasoningProbe(shots=4, per_category=12)


@pytest.fixture
def no_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes long and is tested elsewhere."""
    monkeypatch.setattr(subject, "_generation", lambda report: None)
    monkeypatch.setattr(subject, "_controls", lambda report, quick: None)


def claims(samples: list[list[Mark]], quick: bool = False) -> dict[str, Claim]:
    report = subject.summarise(samples, PROBE, quick)
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    return {claim.statement.split(":")[0]: claim for claim in report.claims}


def test_claims_follow_their_rules(no_suite: None) -> None:
    """A memoriser depends on all symbols, an oracle on none."""
    basic, behind, operands, thought = (
        "SmolLM2-135M depends on the symbols of basic computation",
        "Symbolic reasoning falls behind the same tasks in original symbols",
        "Operands are memorised more than operators",
        "The gaps persist with chain-of-thought prompts")
    remembers, reasons = [], []
    for seed in range(3):
        remembers.append(subject.sample(PROBE, Memoriser(PROBE.items(seed)), seed))
        reasons.append(subject.sample(PROBE, Oracle.of(PROBE.problems(seed), KINDS, seed), seed))
    found = claims(remembers)
    assert found[basic].verdict == found[behind].verdict == "holds"
    assert found[operands].verdict == "does not hold", "no more than operators: a difference of exactly 0"
    assert "both remapped: +1.000 (+1.000 to +1.000); operators +1.000" in found[basic].measured
    found = claims(reasons)
    assert found[basic].verdict == found[behind].verdict == "does not hold"
    assert found[thought].verdict == "not shown at this scale"
    assert {c.verdict for c in claims(remembers, quick=True).values()} == {"not shown at this scale"}


def test_problems_of_different_seeds_stay_apart() -> None:
    marks = [m for s in (0, 1) for m in subject.sample(PROBE, Memoriser(PROBE.items(s)), s)]
    assert len({(m.item.problem, m.item.kind) for m in marks}) == len(marks)


def test_faults_in_remappings_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems("divide", 1)[0]
    assert all(subject._sound(problem, kind) for kind in problem.remappings)
    real = subject.draw_remapping(problem, "both")
    for operands in ({**real.operands, "1": real.operands["2"]}, {**real.operands, "1": "1"},
                     {k: v for k, v in real.operands.items() if k != "1"}):
        monkeypatch.setattr(subject, "draw_remapping", lambda p, k, o=operands: type(real)(o, real.operators))
        assert not subject._sound(problem, "both")


@pytest.mark.parametrize("seeds", [0, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds="):
        subject.reproduce(seeds=seeds)


@pytest.mark.slow
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("looseleaf_lab.models")
    monkeypatch.setattr(models, "load", lambda name: (tiny_text_llama(), tiny_tokenizer()))
    report = subject.reproduce(seeds=3, quick=True, progress=False)
    assert len(report.claims) == 11 and report.facts["seeds"] == 1
    held = [c for c in report.claims if c.verdict == "holds"]
    assert [c.statement.split(":")[0] for c in held[:2]] == ["Control"] * 2 and len(held) == 5
    assert all(c.verdict == "not shown at this scale" for c in report.claims if c not in held)
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
