"""The reproduction runs from end to end on stand-ins; its parts share no picture; its control knows the answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("looseleaf_lab.study", reason="looseleaf-lab is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from looseleaf import Report
from looseleaf_anypattern import apply, keyed
from looseleaf_anypattern import reproduction as R
from looseleaf_anypattern.retrieval import micro_average_precision

torch.set_num_threads(1)
SMALL = R.Scale(steps=1, batch=4, queries=3, limits=(12, 8, 4, 4), samples=10, stand_in=True)


def test_from_end_to_end():
    report = dataclasses.replace(R.study, quick=SMALL)(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 17 and all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims} == {"not shown at this scale"}, "the quick run decides nothing"
    assert len(report.tables) == 3 and len(report.images) == 2
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()


def test_no_picture_is_in_two_parts():
    pictures = [row.tobytes() for part in R.parts(True, (900, 300, 80, 200)) for row in part]
    assert len(pictures) == len(set(pictures)) > 20
    base = {p.name for p in R.BASE}
    assert len(base) == 40 and not base & {p.name for patterns in R.NOVEL.values() for p in patterns}
    for first in (5, 20, 40):
        assert sum(p.family == "keyed" for p in R.BASE[:first]) == first * 3 // 5
    what = R.asked(0, SMALL, R.NOVEL["keyed"])
    searched = {row.tobytes() for row in R.parts(True, SMALL.limits)[1]}
    assert not searched & {original.tobytes() for _, original, _ in what.support}
    names = {replica.tobytes(): name for replica, _, name in what.support}
    chosen = {mode: [names[x.tobytes()] for x in what.contexts[mode][0]] for mode in ("right", "wrong")}
    assert chosen["right"] == what.patterns and all(a != b for a, b in zip(chosen["wrong"], what.patterns, strict=True))


def test_the_control_undoes_colours_by_the_right_pair():
    rng = np.random.default_rng(0)
    picture, example = ((rng.random((2, 32, 32, 3)) ** 0.5) * 255).astype(np.uint8)
    edit, other = keyed("colours", 100), keyed("colours", 101)
    error = {one.name: np.abs(R.undone(apply([edit], picture), apply([one], example), example) - picture).mean()
             for one in (edit, other)}
    assert error[edit.name] < 15 < 30 < error[other.name]


def test_the_bootstrap_measures_what_the_metric_does():
    rng = np.random.default_rng(0)
    scores, right = rng.random((12, 4)), np.eye(4, dtype=int)[rng.integers(4, size=12)]
    expected = micro_average_precision(scores, right, 12)
    assert R.area((scores, right), np.arange(12)) == pytest.approx(expected, abs=1e-12)
    results = R.Results([{"best": {"40": {"keyed": {"right": [scores, right], "self": [scores, 0 * right]}}}}] * 2, {},
                        [0, 1], SMALL, False)
    assert R.gap(results, "keyed", "right", "self").value == pytest.approx(expected, abs=1e-12)
