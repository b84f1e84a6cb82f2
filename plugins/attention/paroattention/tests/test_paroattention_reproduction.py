"""The reproduction, on a model that was not trained: that it runs and decides nothing it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf_paroattention import reproduction
from looseleaf_paroattention.masks import block_masks

pytest.importorskip("looseleaf_lab")


@pytest.mark.parametrize("quick", [True, False])
def test_reproduction_runs(monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from looseleaf_lab import video

    model = video.denoiser(0, layers=1, heads=2, width=16).eval()
    monkeypatch.setattr(video, "trained", lambda *given, **named: model)
    small: dict[str, Any] = {"VIDEOS": 32, "SAMPLER_STEPS": 2, "ERROR_STEPS": 2, "CALIBRATION_VIDEOS": 1,
                             "ERROR_VIDEOS": 1, "SPEED_GRID": (2, 16, 16), "SPEED_HEADS": 2, "SPEED_WIDTH": 16,
                             "PLANTED_GRID": (4, 8, 8), "PLANTED_BLOCK": 16}
    for name, value in small.items():
        monkeypatch.setattr(reproduction, name, value)
    report = reproduction.reproduce(seeds=1, quick=quick, progress=False)
    verdicts = {c.statement: c.verdict for c in report.claims}
    assert len(verdicts) == 15
    undecided = [s for s, v in verdicts.items() if v == "not shown at this scale"]
    assert len(undecided) == (13 if quick else 3), undecided
    assert verdicts["Calibration finds the order of each head that has one"] == "holds"
    # weights without training have no pattern: nothing may be found in them
    assert "holds" not in [v for s, v in verdicts.items() if "much" in s]
    titles = [t.title for t in report.tables]
    assert {"Planted heads", "Relative error of the attention output", "32 videos at density 0.3"} <= set(titles)
    assert len(report.figures) == 3 and report.to_text()


def test_the_window_is_as_dense_and_as_good_as_it_can_be() -> None:
    mass = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    masks = block_masks(mass, density=0.3)
    window = reproduction.window_masks(masks, mass)
    assert torch.equal(window.sum((2, 3)), masks.sum((2, 3)))
    assert bool(window.diagonal(dim1=-2, dim2=-1).all())
    place = torch.arange(9)
    away = (place[:, None] - place).abs()
    assert not window[..., (away > 1) & (place < 8)].any()
    near = (away == 1) | ((place == 8) & (away > 1))
    worst = torch.where(window & near, mass, torch.inf).amin((2, 3))
    best = torch.where(~window & near, mass, -torch.inf).amax((2, 3))
    assert bool((worst >= best).all())
