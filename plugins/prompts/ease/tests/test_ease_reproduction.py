"""The reproduction runs from end to end on a tiny random model, and its rules decide as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from looseleaf import Report
from looseleaf_ease import reproduction
from looseleaf_ease.reproduction import PLAIN, REMAPPED, Scale, study, task_of
from looseleaf_lab.study import Results


def letters(texts: list[str]) -> np.ndarray:
    return np.array([[half.count(c) for half in (t[:len(t) // 2], t[len(t) // 2:]) for c in "abcdefghij"]
                     for t in texts], dtype=np.float32)


def made(ease: float, other: float, correlation: float = 0.4, orders: float = 0.2) -> dict[str, Any]:
    methods = {"EASE": ease, "Best-of-N": other}
    task = {"found": {n: {"validation": v, "test": v} for n, v in methods.items()},
            "curves": {n: [0.5, v] for n, v in methods.items()}, "scores": {n: [0.5, v] for n, v in methods.items()},
            "correlation": correlation, "orders": [0.5, 0.5 + orders], "seconds": {"EASE": 2.0, "Best-of-N": 1.0},
            "prompt": "a prompt"}
    return {REMAPPED: task, PLAIN: task}


def verdicts(rows: list[dict[str, Any]], parts: list[float] | None = None, quick: bool = False) -> list[str]:
    once = {"parts": parts or [0.1, 0.5, 0.1, 3.0], "dtype": "float32", "threads": 1}
    report = study.report(Results(rows, once, list(range(len(rows))), Scale(), quick))
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    return [c.verdict for c in report.claims]


def test_rules_decide() -> None:
    yes, no, open_ = "holds", "does not hold", "not shown at this scale"
    assert verdicts([made(0.9, 0.8), made(0.85, 0.8)]) == [yes, yes, yes, yes, yes, yes, open_, open_]
    assert verdicts([made(0.7, 0.8), made(0.75, 0.8)])[:3] == [no, no, no]
    assert verdicts([made(0.9, 0.8), made(0.7, 0.79)])[:3] == [yes, open_, open_]  # the interval holds 0
    assert verdicts([made(0.9, 0.8, 0.3, 0.05)])[3:5] == [no, no]
    assert verdicts([made(0.9, 0.8, 0.0)])[4] == no
    assert verdicts([made(0.9, 0.8)], [0.1, 0.8, 0.2, 0.0])[5] == no
    assert set(verdicts([made(0.9, 0.8)], quick=True)) == {open_}


@pytest.mark.slow
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("chatterbot_corpus")
    models = pytest.importorskip("looseleaf_lab.models")
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    monkeypatch.setattr(models, "load", lambda name, dtype: (tiny_text_llama(), tiny_tokenizer()))
    monkeypatch.setattr(reproduction, "sentence_encoder", lambda *given: letters)
    reproduction._tools.cache_clear()
    report = study(seeds=1, quick=True, progress=False)
    reproduction._tools.cache_clear()
    assert len(report.claims) == 8 and report.facts["seeds"] == 1 and len(report.figures) == 2
    assert all(c.verdict == "not shown at this scale" for c in report.claims)


@pytest.mark.parametrize("name", [REMAPPED, PLAIN])
def test_tasks(name: str) -> None:
    pytest.importorskip("chatterbot_corpus")
    task = task_of(name, 3)
    assert len(task.train) == 60 and len(task.test) == 150 and 20 <= len(task.dev) <= 21
    assert {e.target for e in task.train} == set(task.labels or ())
    assert not {e.inputs["text"] for e in task.train} & {e.inputs["text"] for e in (*task.dev, *task.test)}
    task.validate()


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds"):
        study(seeds=seeds)
