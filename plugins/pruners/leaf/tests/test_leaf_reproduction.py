"""The controlled task, and the reproduction from end to end on a scale of seconds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("looseleaf_lab.study")
pytest.importorskip("transformers")

from looseleaf import Report
from looseleaf.resume import as_plain
from looseleaf_lab.study import Results
from looseleaf_leaf import data as task
from looseleaf_leaf.reproduction import GAPS, LANGUAGE, TINY, scatter, study

torch.set_num_threads(1)
SHORT = replace(TINY, samples=200, steps=2, tests=40, corpus=24, distil_steps=1, distil_batch=8)


def test_the_task_is_what_it_says() -> None:
    samples = task.draw(200, 0, 0.5)
    ids, free, planted = samples.batch["input_ids"], samples.batch["instruction_mask"], samples.planted
    assert int(planted.sum()) == 100 * task.SPAN and not planted[100:].any() and bool((free | ~planted).all())
    for row in range(200):
        question = int(ids[row][free[row]][-1]) - task.QUESTION
        kind, lure = (int(x[row]) - task.VALUE for x in (samples.answer, samples.lure))
        assert kind // task.VALUES == question == lure // task.VALUES
        assert int(samples.answer[row]) in ids[row][free[row]]
        words = ids[row][planted[row]] - task.WORD
        assert (kind != lure) == (row < 100) and set((words // task.WORDS).tolist()) <= {lure}
        assert int((ids[row] == samples.lure[row]).sum()) == 2 * (row >= 100), "the lure stands nowhere in the text"
    misled = samples.misled()
    right = misled["labels"][torch.arange(200), (misled["labels"] != -100).int().argmax(1)]
    assert torch.equal(right, samples.lure) and torch.equal(misled["labels"] != -100, samples.batch["labels"] != -100)
    assert torch.equal(task.draw(200, 0, 0.5).batch["input_ids"], ids)


def test_random_spans_fit_and_do_not_overlap() -> None:
    rng, starts = np.random.default_rng(0), []
    for _ in range(200):
        spans = sorted(scatter([2, 1, 3], 9, rng))
        assert sorted(b - a for a, b in spans) == [1, 2, 3] and spans[0][0] >= 0 and spans[-1][1] <= 9
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        starts.append(spans[0][0])
    assert set(starts) == {0, 1, 2, 3}


def test_from_end_to_end() -> None:
    assert study.measure is not None
    rows = [as_plain(study.measure(seed, (SHORT,))) for seed in range(2)]
    report = study.report(Results(rows, {}, [0, 1], (SHORT,), quick=True))
    assert len(report.claims) == 10 and len(report.strips) == 3
    assert {c.verdict for c in report.claims[1:]} == {"not shown at this scale"}, "nothing was learned in two steps"
    assert report.claims[0].verdict == "does not hold"
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert all(f"{arm}, distracted" in rows[0][TINY.models] for arm in TINY.arms)
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()


def verdicts(*rows: dict[str, float]) -> list[str]:
    results = Results([{TINY.models: row} for row in rows], {}, list(range(len(rows))), (TINY,), quick=False)
    return [c.verdict for c in study.report(results).claims]


def test_verdicts_follow_the_rules() -> None:
    row: dict[str, float] = {
        "teacher, clean": 1.0, "teacher, distracted": 0.95, "student, clean": 0.9, "student, distracted": 0.1,
        "teacher, attention": 0.0, "student, attention": 0.5, "AUROC, difference": 0.95, "AUROC, student alone": 0.9,
        "AUROC, teacher alone": 0.5, "AUROC, random": 0.5, "student without detected spans": 0.8,
        "student without random spans": 0.2, "recall of planted tokens": 0.9,
        **dict.fromkeys(GAPS, 0.1), **{f"{arm}, distracted": 0.5 for arm in TINY.arms},
        **{f"{arm}, attention": 0.4 for arm in TINY.arms}}
    row["LeaF, distracted"] = 0.6
    assert verdicts(row, row) == ["holds"] * 8 + ["not shown at this scale"] * 2
    worse = {**row, "LeaF, distracted": 0.5, "AUROC, difference": 0.9, "LeaF, attention": 0.5}
    assert verdicts(worse, worse) == ["holds", "does not hold", "does not hold", "holds", *["does not hold"] * 4,
                                      *["not shown at this scale"] * 2]
    sober = {**row, "student, distracted": 0.5}
    assert verdicts(row, sober) == ["does not hold", *["not shown at this scale"] * 9], "one seed is not confounded"


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_english_task_with_adapters() -> None:
    pytest.importorskip("peft")
    models = pytest.importorskip("looseleaf_lab.models")
    tokenizer = models.load("smollm2", dtype=torch.bfloat16)[1]
    samples = task.draw_english(tokenizer, 6, 0, 0.5)
    texts = [tokenizer.decode(ids[mark]) for ids, mark in zip(samples.batch["input_ids"], samples.planted)]
    for row in range(3):
        assert texts[row].strip() == f"Some people say {tokenizer.decode([int(samples.lure[row])]).strip()}."
    assert texts[3:] == [""] * 3 and torch.equal(samples.answer[3:], samples.lure[3:])
    assert study.measure is not None
    row = study.measure(0, (replace(LANGUAGE, samples=16, steps=2, tests=4, corpus=4, distil_steps=1, distil_batch=2),))
    assert 0 <= row[LANGUAGE.models]["AUROC, difference"] <= 1 and "LeaF, distracted" in row[LANGUAGE.models]


@pytest.mark.parametrize("seeds", [0, -1, 1.5, True])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds"):
        study(seeds=seeds)
