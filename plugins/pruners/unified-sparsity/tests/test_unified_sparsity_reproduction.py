"""The reproduction runs from end to end on made-up emoji; its rules decide what they say."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("looseleaf_lab")

from looseleaf import Report
from looseleaf_lab import data
from looseleaf_lab.study import Results
from looseleaf_unified_sparsity import reproduction as R

torch.set_num_threads(1)
SCALE = R.Scale(width=16, layers=3, neurons=16, heads=2, codes=8, batch=4, steps=2, tune=1, test=4, calibrate=2,
                draws=2, random=1, keeps=(0.5,), experts=4, drawn=2)


def emoji(monkeypatch: pytest.MonkeyPatch) -> R.Emoji:
    """Made-up pictures, each other one with its own class."""
    monkeypatch.setattr(data, "pictures", lambda name: data.stand_in(name, 60))
    R.emoji.cache_clear()
    R.judge.cache_clear()
    return R.emoji(SCALE.codes, SCALE.text)


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """No made-up pictures are left for others."""
    yield
    R.emoji.cache_clear()
    R.judge.cache_clear()


def test_pictures_are_tokens_of_a_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    e = emoji(monkeypatch)
    assert e.codes.shape == (60, 64) and int(e.codes.max()) < 8 and e.book.shape == (8, 48)
    one = e.pixels[3, 4:8, 8:12].reshape(48)  # row 1, column 2 of the tokens
    assert int(torch.cdist(one[None], e.book).argmin()) == int(e.codes[3, 10])
    book = torch.rand(8, 48)
    again = R.painted(e.codes[:2], book)
    assert torch.equal(again[1, 4:8, 8:12].reshape(48), book[e.codes[1, 10]])
    parts = [set(rows) for rows in e.parts.values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_one_training_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    emoji(monkeypatch)
    monkeypatch.setattr(R, "judge", lambda *_: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 9)))
    row = R.measure(0, SCALE)
    results = Results([row], {}, [0], SCALE, True)
    report = Report("test")
    R.show(report, results)
    claims = list(R.claims(results))
    assert len(report.images) == len(row["pictures"]) + 1 and len(report.figures) == 2
    assert all(claim.verdict.startswith("not shown") for claim in claims)
    weights = row["experts"]["weights"]
    assert weights["experts"]["active"] < weights["dense"]["active"] < weights["experts"]["total"]
    assert row["curves"]["drawing, generation"]["width"]["draws"], "measured at a half"


def results(und: float, gen: float, experts: float, static: float) -> Results:
    """Three trainings with known numbers."""
    full = dataclasses.replace(SCALE, keeps=R.Scale.keeps)

    def curve(value: float) -> dict[str, Any]:
        return {"paper": [value] * 5, "random": [value + 0.1, value + 0.1, value + 0.1, value + 0.1, value - 0.1],
                "half": value}

    def row(n: int) -> dict[str, Any]:
        u, g = und + 0.001 * n, gen + 0.001 * n
        curves = {"drawing, understanding": u, "drawing, generation": g, "reading, understanding": u}
        agreement = {"dense": 0.6, "dense, captions of others": 0.2, "half of understanding, depth": 0.5,
                     "half of understanding, width": 0.5, "half of generation, depth": 0.3 + und,
                     "half of generation, width": 0.3 + und}
        return {"dense": {"drawing": 1.0, "other captions": 1.1}, "of the captions": {"depth": und, "width": und * 10},
                "curves": {name: {way: curve(value) for way in R.WAYS} for name, value in curves.items()},
                "pictures": {name: {"agreement": value} for name, value in agreement.items()},
                "experts": {"dense": 1.0, "experts, not tuned": 1.2, "static half, not tuned": 1.3,
                            "experts, routers tuned": 1.1 + 0.001 * n, "experts, all tuned": experts + 0.001 * n,
                            "static half, all tuned": static, "dense, all tuned": 0.98}}

    return Results([row(n) for n in range(3)], {}, [0, 1, 2], full, False)


def verdicts(found: Results) -> list[str]:
    """Of each claim, the width alone where there are both."""
    return [claim.verdict for claim in R.claims(found) if "(depth)" not in claim.statement]


def test_the_rules_decide() -> None:
    good = verdicts(results(0.01, 0.2, 1.01, 1.05))
    assert good[:3] == ["holds"] * 3
    assert good[-3:-1] == ["holds", "holds"], "experts, routers"
    bad = verdicts(results(0.3, 0.2, 1.2, 1.05))
    assert bad[:3] == ["does not hold", "does not hold", "does not hold"]
    assert bad[-3] == "does not hold"
    assert verdicts(results(0.1, 0.1, 1.01, 1.011))[0].startswith("not shown")
    statements = [claim for claim in R.claims(results(0.01, 0.2, 1.0, 1.1)) if "criterion" in claim.statement]
    assert len(statements) == 6 and all(claim.measured.startswith("4 of 5") for claim in statements)


def test_equal_masks_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    e = emoji(monkeypatch)
    model = R.trained(e, 0, SCALE)
    asked: list[Any] = []
    bench = R.Bench(e, SCALE)
    monkeypatch.setattr(bench, "drawing", lambda model: asked.append(copy.copy(model)) or 1.0)
    out = R.curve_of(model, e, bench, dataclasses.replace(SCALE, keeps=(1.0,), random=3), "width", "generation",
                     "generation", {"drawing": 1.0})
    assert len(asked) == 1 and out["paper"] == [0.0] and out["random"] == [0.0]
