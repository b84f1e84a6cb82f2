"""The reproduction runs from end to end on stand-ins; its rules decide what they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("looseleaf_lab.study")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from looseleaf import Report
from looseleaf_lab.study import Results
from looseleaf_sparsifiner import reproduction as R

torch.set_num_threads(1)
HOLDS, NOT, OPEN = "holds", "does not hold", "not shown at this scale"


def test_from_end_to_end() -> None:
    small = dataclasses.replace(R.study, quick=R.Scale(train=2, test=3, epochs=1, batch=2, steps=1, tune_batch=1,
                                                       lengths=((65, 0.25),), rounds=2, stand_in=True))
    report = small(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 13 and all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims} == {OPEN}, "the quick run decides nothing"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(report.images) == 3 and len(report.figures) == 2 and len(report.tables) == 4


def planted(gain: float, error: float, saved: float, faster: float) -> Results:
    """Learned keys hold more attention by ``gain`` and change features less by ``error``."""
    rows = []
    for noise in (0.0, 0.001, 0.002):
        def measured(value: float, iou: float = 0.6, noise: float = noise) -> dict[str, list[float]]:
            return {"feature error": [value + noise, value], "IoU": [iou, iou + noise], "AUC": [0.9, 0.9]}

        rows.append({
            "recall": {f"{n} {r}": [[0.5 + noise + gain * (n == "learned")] * 2] * 3 for n in R.METHODS
                       for r in R.RATES},
            "dense": measured(0.0, 0.6 - gain),
            "macs": {str(r): {"dense": 100.0, "ours": 100 * (1 - saved), "basis": 0.3} for r in R.LOOKED},
            "stage 1": {"guess": measured(0.5), **{f"{n} {r}": measured(0.5 - error * (n == "learned"))
                                                   for n in R.METHODS for r in R.LOOKED}},
            "stage 2": {n: measured(0.4 - error * (n == "learned")) for n in ("learned", *R.RIVALS)}})
    times: list[dict[str, Any]] = [{"tokens": 257, "rate": 0.25, "ratio": [faster] * 3, "gathered ratio": [0.1] * 3}]
    return Results(rows, {"times": times}, [0, 1, 2], R.Scale(), False)


@pytest.mark.parametrize("values, expected", [((0.1, 0.1, 0.5, 1.2), HOLDS), ((-0.1, -0.1, 0.3, 0.5), NOT)])
def test_rules(values: tuple[float, float, float, float], expected: str) -> None:
    found = [c.verdict for c in R.study.claims(planted(*values))]  # type: ignore[operator]
    assert found == [expected] * 10 + [OPEN] * 3


def test_the_share_of_blocks() -> None:
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 0, 0] = mask[..., 40, 40] = True
    assert R.coverage({0: mask}) == {"16": 2 / 16, "32": 2 / 4, "64": 1.0}


def test_recorded_layers_teach_what_the_model_does() -> None:
    """Predictors learned from recorded queries and keys are those learned from the model itself, but for rounding."""
    scale = R.Scale(train=2, test=1, epochs=1, batch=2, stand_in=True)
    model, pixels = R.saliency(True), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    recorded, features = R.first_stage(model, pixels, 0, scale)
    direct = R.Sparsifiner()
    direct.calibrate(model.backbone, pixels, epochs=1, lr=scale.lr, warmup=scale.warmup)
    assert recorded.losses == pytest.approx(direct.losses, rel=1e-3)
    assert features.shape == (2, 256, 384)
