"""The reproduction runs from end to end on stand-ins; its rules decide what they say; its probes know planted cases."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("looseleaf_lab.study")
pytest.importorskip("transformers")

from looseleaf import Report
from looseleaf_colormae import COLORS, ColorMAE
from looseleaf_colormae import reproduction as R
from looseleaf_lab.study import Results

torch.set_num_threads(1)
HOLDS, NOT, OPEN = "holds", "does not hold", "not shown at this scale"


def test_from_end_to_end():
    small = dataclasses.replace(R.study, quick=R.Scale(steps=2, batch=4, masks=20, draws=1, rounds=2, stand_in=True))
    report = small(seeds=2, quick=True, progress=False)
    assert len(report.claims) == 21 and all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims[4:14]} == {OPEN}, "the quick run decides nothing about models"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(report.images) == 3 and len(report.figures) == 1


def planted(harder, better, learned=0.1, faster=2.0):
    """Red is harder than green than white by ``harder``; green is better than white than red by ``better``."""
    rows = []
    for noise in (-0.001, 0.0, 0.001):
        features = {"untrained": 0.5 - learned, "white": 0.5, "green": 0.5 + better, "red": 0.5 - better}
        hard = {"blue": 0.0, "white": 0.0, "purple": 0.0, "green": 1.0, "red": 2.0}
        rows.append({"features": {c: dict.fromkeys(R.PROBES, v + noise * (c == "white")) for c, v in features.items()},
                     "losses": {c: [0.5 + harder * v] * 4 for c, v in hard.items()}})
    masks = {c: dict.fromkeys(("adjacency", "cluster", "distance"), [float(n)] * 4)
             for n, c in enumerate(("blue", "white", "purple", "green", "red"))}
    cost = {"seconds": dict.fromkeys(("noise", "torch.rand", "masks", "MAE's masks"), 1.0),
            "noise": [faster, faster, faster], "masks": [faster, faster, faster]}
    once = {"spectra": {c: [[1.05, 0.0], [1.0, 0.0]] for c in COLORS}, "masks": masks, "cost 256": cost,
            "flops": dict.fromkeys(COLORS, 4e6)}
    return Results(rows, once, [0, 1, 2], R.Scale(), False)


@pytest.mark.parametrize("values, expected", [
    ((0.1, 0.05), [HOLDS, *[HOLDS] * 3, *[HOLDS] * 6, HOLDS, HOLDS]),
    ((-0.1, -0.05, -0.1, 0.5), [NOT, *[NOT] * 3, *[NOT] * 6, NOT, NOT]),
    ((0.1, 0.0, 0.0), [HOLDS, *[OPEN] * 3, *[OPEN] * 6, HOLDS, HOLDS])])
def test_rules(values, expected):
    found = [c.verdict for c in R.study.claims(planted(*values))]
    assert found == [HOLDS] * 4 + expected + [HOLDS] + [OPEN] * 4


def test_rules_on_spectra_and_operations():
    results = planted(0.1, 0.05)
    results.once["spectra"]["red"] = [[1.2, 0.0], [1.0, 0.0]]
    results.once["flops"]["red"] = 5e6
    found = [c.verdict for c in R.study.claims(results)]
    assert found[0] == NOT and found[16] == NOT


def test_ridge_finds_what_is_there():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=draw)
    y = torch.stack([x[:, 2] > 1.2, x[:, 2] <= 1.2], 1).float()
    assert (R.ridge(x[:400], y[:400], x[400:])[:, 0] - y[400:, 0]).abs().mean() < 0.3
    assert (R.ridge(x[:400, :2], y[:400], x[400:, :2])[:, 0] - y[400:, 0]).square().mean() > 0.08
    torch.testing.assert_close(R.ridge(x[:400], x[:400] * 3 + 1, x[400:], penalty=1e-9), x[400:] * 3 + 1)


def test_probes_see_planted_features(monkeypatch):
    found = R.pictures(True)
    marks = torch.nn.functional.one_hot(found.classes).float()[:, None].expand(-1, 64, -1)
    alpha = torch.nn.functional.unfold(found.alpha[:, None].float(), 8, stride=8).transpose(1, 2)
    monkeypatch.setattr(R, "features", lambda model, images: torch.cat([marks, alpha], 2))
    known = R.probes(None, found)
    monkeypatch.setattr(R, "features", lambda model, images: torch.randn(
        len(images), 64, 8, generator=torch.Generator().manual_seed(0)))
    unknown = R.probes(None, found)
    assert all(known[name] > unknown[name] + 0.1 for name in R.PROBES) and known["linear"] == 1 and known["miou"] > 0.9


def test_losses_are_those_of_the_model():
    model, images = R.autoencoder(0), R.pictures(True).images[:6]
    found = R.losses(model, images, ColorMAE(bank=16, size=16), 1)
    with torch.no_grad():
        noise = ColorMAE(bank=16, size=16).mae_noise(6, R.GRID)
        loss = model.eval()(pixel_values=R.normal(images), noise=noise).loss
    assert sum(found) / 6 == pytest.approx(float(loss), rel=1e-4)


def test_pictures_and_crops():
    found = R.pictures(True)
    assert found.images.dtype == torch.uint8 and found.images.shape[1:] == (3, 64, 64)
    assert 0 < int(found.test.sum()) < len(found.test) and int(found.has_alpha.sum()) == 80
    images = R.normal(found.images)
    one, two = (R.crops(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == images.shape and not torch.allclose(one, images)
    assert one.amin() >= images.amin() - 1e-5 and one.amax() <= images.amax() + 1e-5
