"""The questions, the planted case, and the report of the reproduction, without any model."""

from __future__ import annotations

import random
from typing import Any

import pytest

from looseleaf_sa_icl.data import PlantedModel, kinds, question_task

pytest.importorskip("looseleaf_lab")
from looseleaf_lab.study import Results
from looseleaf_sa_icl import reproduction
from looseleaf_sa_icl.reproduction import ONE, OURS, RELATIVES, SEEN, WRONG, Scale, claims, planted, study

TOPICS = {"elements": ("element", "symbol", "number"), "capitals": ("country", "capital"),
          "states": ("state", "capital"), "young": ("adult", "young"), "collectives": ("individuals", "collective"),
          "flowers": ("flower", "meaning")}


def made_kinds() -> Any:
    """Kinds of made-up rows with the fields of the real ones."""
    quiz = [{"topic": topic, "answers": {f: [f"{f} {n}"] for f in fields}} for topic, fields in TOPICS.items()
            for n in range(12)]
    return kinds(quiz, {name: [{"question": f"{name} {n}", "answer": str(n)} for n in range(12)]
                        for name in reproduction.GENERATORS})


def test_questions() -> None:
    task = question_task(made_kinds(), 2, 0, explained=True)
    task.validate()
    assert len(task.train) == 20 == len(task.test) and not {e.inputs["text"] for e in task.train} & {
        e.inputs["text"] for e in task.test}
    assert all(len(set(e.inputs["candidates"])) == 4 and e.inputs["explanation"] for e in task.train)
    plain = question_task(made_kinds(), 2, 0)
    assert [(e.inputs["text"], e.inputs["candidates"], e.target) for e in plain.test] == [
        (e.inputs["text"], e.inputs["candidates"], e.target) for e in task.test]


def test_relatives_are_what_they_are_called() -> None:
    all_kinds = made_kinds()
    names = [kind.name for kind in all_kinds]
    given = reproduction._relatives(all_kinds, names, names, 0)
    subject = {kind.name: kind.subject for kind in all_kinds}
    for n, name in enumerate(names):
        same, near, far = (names[given[relative][n][0]] for relative in RELATIVES)
        assert same == name != near and subject[near] == subject[name] != subject[far]


def test_planted_case() -> None:
    """What only a refined schema of the right example can give is there with SA-ICL, and not without."""
    found = planted(Scale())
    assert found["accuracy"][OURS] == 1.0 and found["accuracy"][WRONG] <= found["first"] + 0.1
    assert found["accuracy"][ONE] == found["first"]
    assert PlantedModel().detokenize(PlantedModel().tokenize("x")) == "x"


def test_report() -> None:
    rng = random.Random(0)
    rows = [{"correct": {name: [float(rng.random() < 0.4) for _ in range(10)] for name in (
        "zero-shot", ONE, "one-shot, worked explanation", "five-shot", "schema only", OURS, WRONG, SEEN, *RELATIVES)},
        "costs": {n: {"calls": 1.0, "tokens": 2.0, "seconds": 3.0} for n in (ONE, "five-shot", OURS)},
        "nearest": {"question": [0.0] * 10, "schema by the model": [1.0] * 10, "schema by rule": [1.0] * 10},
        "complete": 0.5, "schemas": ["s"]} for _ in range(2)]
    results = Results(rows, planted(Scale()), [0, 1], Scale(), False)
    report = study.report(results)
    assert len(report.tables) == 5 and "SA-ICL" in report.to_text()
    verdicts = [c.verdict for c in claims(results)]
    assert verdicts[:2] == ["holds", "holds"] and verdicts[-2] == "holds" and len(verdicts) == 11
