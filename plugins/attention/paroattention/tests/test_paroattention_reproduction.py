"""The reproduction, on a model that was not trained: that it runs and decides nothing it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf_paroattention import block_masks

pytest.importorskip("looseleaf_lab")
from looseleaf.resume import as_plain
from looseleaf_lab.study import Results
from looseleaf_paroattention.reproduction import Scale, study, window_masks

TINY = Scale(videos=32, sampler=2, error_steps=2, calibration_videos=1, error_videos=1, speed_grid=(2, 16, 16),
             speed_heads=2, speed_head_dim=16, planted_grid=(4, 8, 8), planted_block=16, rounds=2)


@pytest.fixture(scope="module")
def measured() -> Any:
    """The row of one seed, and what is measured once."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from looseleaf_lab import video

    model = video.denoiser(0, layers=1, heads=2, width=16).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "trained", lambda *given, **named: model)
        return as_plain(study.measure(0, TINY)), as_plain(study.once(TINY))


@pytest.mark.parametrize("quick", [True, False])
def test_the_report_has_all_claims(measured: Any, quick: bool) -> None:
    report = study.report(Results([measured[0]], measured[1], [0], TINY, quick))
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
    window = window_masks(masks, mass)
    assert torch.equal(window.sum((2, 3)), masks.sum((2, 3)))
    assert bool(window.diagonal(dim1=-2, dim2=-1).all())
    place = torch.arange(9)
    away = (place[:, None] - place).abs()
    assert not window[..., (away > 1) & (place < 8)].any()
    near = (away == 1) | ((place == 8) & (away > 1))
    worst = torch.where(window & near, mass, torch.inf).amin((2, 3))
    best = torch.where(~window & near, mass, -torch.inf).amax((2, 3))
    assert bool((worst >= best).all())
