"""The reproduction: what it measures on stand-ins of the data, and what its rules make of planted results."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from looseleaf_jigsaw_r1 import reproduction
from looseleaf_jigsaw_r1.reproduction import BLIND, BOTH, GRPO, KINDS, SFT, UNTRAINED, Scale, claims, study
from looseleaf_lab import data
from looseleaf_lab.study import Results


def test_quick_run_on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="needs looseleaf-jigsaw-r1[train]")
    pytest.importorskip("looseleaf_models", reason="needs looseleaf-jigsaw-r1[reproduce]")
    monkeypatch.setattr(data, "pictures", lambda name: data.stand_in(name, 40))
    # the stand-ins look alike, and the same puzzle twice would have two answers of the planted solver
    monkeypatch.setattr(reproduction, "NEAR", -1.0)
    small = dataclasses.replace(study, quick=Scale(steps=2, prompts=1, batch=2, test=4, windows=2))
    report = small(quick=True, progress=False)
    verdicts = [claim.verdict for claim in report.claims]
    assert verdicts == ["holds"] + ["not shown at this scale"] * (len(verdicts) - 1)
    table = report.tables[0]
    assert [row[0] for row in table.rows] == [UNTRAINED, GRPO, BLIND, SFT, BOTH, "planted", "seams", "constant",
                                              "random"]
    assert len(report.figures) == 2 and len(report.images) == len(KINDS)


def row(grpo: float, begun: float = 0.9) -> dict[str, Any]:
    right = {UNTRAINED: 0.5, GRPO: grpo, BLIND: 0.5, SFT: 0.7, BOTH: 0.95, "planted": 0.75, "seams": 0.7,
             "constant": 0.5, "random": 0.5}
    of_2x2 = {name: 0.15 if name == GRPO else value for name, value in right.items()} | {"planted": 0.75}
    return {"right": {name: {"2x1": value, "3x1": 0.6 if name == GRPO else value, "2x2": of_2x2[name]}
                      for name, value in right.items()},
            "form": {name: dict.fromkeys(KINDS, 1.0) for name in right}, "pictures": [10, 5],
            "curves": {way: {"step": [1.0, 2.0, 3.0], "accuracy": [0.5, 0.7, 0.8], "format": [begun, 1.0, 1.0],
                             "equal": [0.1, 0.2, 0.3]} for way in (GRPO, BOTH)}}


def test_rules_decide_planted_results() -> None:
    def verdicts(*grpo: float, begun: float = 0.9) -> dict[str, str]:
        results = Results([row(value, begun) for value in grpo], {}, list(range(len(grpo))), Scale(), False)
        return {claim.statement: claim.verdict for claim in claims(results)}

    found = verdicts(0.85, 0.9, 0.82)
    assert found["A model that was not trained on puzzles is near chance on 2x1 pairs"] == "holds"
    assert found["GRPO on 2x1 pairs solves them on new pictures"] == "holds"
    assert found["The form of answers is learnt before what they say"] == "holds"
    assert found["GRPO on 2x1 pairs carries over to 3x1 pairs"] == "holds"
    assert found["GRPO on 2x1 pairs carries over to 2x2 pairs"] == "not shown at this scale"
    assert found["GRPO is better than SFT on as many puzzles"] == "holds"
    assert found["GRPO is better than SFT, then GRPO on as many puzzles"] == "does not hold"
    assert found["The trained model is better than putting patches together by their seams"] == "holds"
    one_fails = verdicts(0.9, 0.9, 0.79, begun=0.97)
    assert one_fails["GRPO on 2x1 pairs solves them on new pictures"] == "does not hold"
    assert one_fails["The form of answers is learnt before what they say"] == "not shown at this scale"


def test_pictures_are_cut_to_what_is_drawn_and_near_copies_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "pictures", lambda name: data.stand_in(name, 40))
    training, testing = reproduction.pictures()
    assert training and testing and {picture.size for picture in training + testing} == {(48, 48)}
    monkeypatch.setattr(reproduction, "NEAR", 2.0)
    assert reproduction.pictures()[1] == []
