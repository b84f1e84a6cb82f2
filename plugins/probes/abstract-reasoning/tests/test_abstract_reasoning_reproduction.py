"""The rules that decide the claims, and the reproduction from end to end on a small random model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from looseleaf import Claim, Report
from looseleaf.resume import as_plain
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_abstract_reasoning import AbstractReasoningProbe, Memoriser, Oracle, problems
from looseleaf_abstract_reasoning import reproduction as subject
from looseleaf_abstract_reasoning.items import KINDS
from looseleaf_lab.study import Results
from looseleaf_text import LanguageModel

PROBE = AbstractReasoningProbe(shots=4, per_category=12)
SCALE = subject.Scale(PROBE)
SUITE = {"items": 9095, "datasets": 82, "seconds": 1.0, "digests": 3 * [subject.SUITE_DIGEST], "remappings": 11975,
         "duplicates": 0, "faults": 0}
"""What a faultless suite gives, without the time it takes."""


@pytest.fixture(scope="module")
def controls() -> list[list[Any]]:
    some = [problem for name in ("add", "stories", "sets") for problem in problems(name, 2)]
    return as_plain(subject.both_controls(some))  # type: ignore[no-any-return]


def rows_of(monkeypatch: pytest.MonkeyPatch, models: list[LanguageModel]) -> list[dict[str, Any]]:
    """What ``measure`` gives for each seed where SmolLM2 is another model."""
    monkeypatch.setattr(subject, "smollm2", lambda: ())
    rows = []
    for seed, model in enumerate(models):
        monkeypatch.setattr(subject, "LocalModel", lambda model=model: model)
        rows.append(as_plain(subject.measure(seed, SCALE)))
    return rows


def claims(rows: list[dict[str, Any]], once: dict[str, Any], quick: bool = False) -> dict[str, Claim]:
    report = subject.study.report(Results(rows, once, list(range(len(rows))), SCALE, quick))
    assert len(report.claims) == 11 and all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    return {claim.statement.split(":")[0]: claim for claim in report.claims}


BASIC, BEHIND, OPERANDS, BASES = (
    "SmolLM2-135M depends on the symbols of basic computation",
    "Symbolic reasoning falls behind the same tasks in original symbols",
    "Operands are memorised more than operators",
    "Arithmetic in other bases is harder than decimal arithmetic")


def test_claims_follow_their_rules(monkeypatch: pytest.MonkeyPatch, controls: list[list[Any]]) -> None:
    """A memoriser depends on all symbols, an oracle on none."""
    once = {"controls": controls, **SUITE}
    remembers = rows_of(monkeypatch, [Memoriser(named(PROBE.items(seed), seed)) for seed in range(3)])
    found = claims(remembers, once)
    assert found[BASIC].verdict == found[BEHIND].verdict == "holds"
    assert found[OPERANDS].verdict == "does not hold", "no more than operators: a difference of exactly 0"
    assert found[BASES].verdict == "not shown at this scale" or "+0.0" in found[BASES].measured
    assert "both remapped: +1.000 (+1.000 to +1.000); operators +1.000" in found[BASIC].measured
    assert found[BASIC].measured.endswith("; 36 problems, 3 seeds")
    reasons = rows_of(monkeypatch, [Oracle.of(PROBE.problems(seed), KINDS, seed) for seed in range(3)])
    found = claims(reasons, once)
    assert found[BASIC].verdict == found[BEHIND].verdict == "does not hold"
    assert found["The gaps persist with chain-of-thought prompts"].verdict == "not shown at this scale"
    quick = claims(remembers, once, quick=True)
    exact = [c for s, c in quick.items() if c.verdict == "holds"]
    assert len(exact) == 4, "the two controls have one name before the colon each; the suite has three claims"
    assert {c.verdict for c in quick.values() if c not in exact} == {"not shown at this scale"}


def named(items: list[Any], seed: int) -> list[Any]:
    return [dataclasses.replace(item, problem=f"{item.problem} of seed {seed}") for item in items]


def test_faults_of_controls_and_suite_are_reported(monkeypatch: pytest.MonkeyPatch, controls: list[list[Any]]) -> None:
    rows = rows_of(monkeypatch, [Memoriser(PROBE.items(0))])
    wrong = [[*row[:4], row[4], 0.5, row[6]] if row[0] == "oracle" and row[2] == "operands" else row
             for row in controls]
    report = subject.study.report(Results(rows, {"controls": wrong, **SUITE}, [0], SCALE, False))
    verdicts = {claim.statement: claim.verdict for claim in report.claims}
    assert verdicts["Control: the memoriser has Gamma 1 and Delta 1"] == "holds"
    assert verdicts["Control: the oracle has Gamma 1 and Delta 0"] == "does not hold"
    for change in ({"items": 9094}, {"datasets": 81}, {"seconds": 10.5}, {"faults": 1}, {"duplicates": 1},
                   {"digests": ["a", "a", subject.SUITE_DIGEST]}):
        found = claims(rows, {"controls": controls, **SUITE, **change})
        assert [c.verdict for c in found.values()].count("does not hold") == 1 + (found[OPERANDS].verdict ==
                                                                                  "does not hold"), change


def test_problems_of_different_seeds_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = subject.scores_of(rows_of(monkeypatch, [Memoriser(PROBE.items(seed)) for seed in (0, 1)]))
    assert len({(score.item.problem, score.item.kind) for score in scores}) == len(scores)


def test_faults_in_remappings_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems("divide", 1)[0]
    assert all(subject.sound(problem, kind) for kind in problem.remappings)
    real = subject.draw_remapping(problem, "both")
    for operands in ({**real.operands, "1": real.operands["2"]}, {**real.operands, "1": "1"},
                     {k: v for k, v in real.operands.items() if k != "1"}):
        monkeypatch.setattr(subject, "draw_remapping", lambda p, k, o=operands: type(real)(o, real.operators))
        assert not subject.sound(problem, "both")


@pytest.mark.parametrize("seeds", [0, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds: expected an integer >= 1"):
        subject.study(seeds=seeds)


@pytest.mark.slow
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "smollm2", lambda: (tiny_text_llama(), tiny_tokenizer()))
    report = subject.study(seeds=3, quick=True, progress=False)
    assert len(report.claims) == 11 and report.facts["seeds"] == 1
    held = [c for c in report.claims if c.verdict == "holds"]
    assert [c.statement.split(":")[0] for c in held[:2]] == ["Control"] * 2 and len(held) == 5
    assert all(c.verdict == "not shown at this scale" for c in report.claims if c not in held)
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
