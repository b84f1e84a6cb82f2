"""Statistics of masks against hand-counted ones and scipy; the report."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from looseleaf import Report
from looseleaf_colormae import COLORS, ColorMAE, color_gain, mask_statistics, masked, show, spectrum


def test_statistics_counted_by_hand():
    keep = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool).view(1, -1)
    found = {name: float(v) for name, v in mask_statistics(keep, (3, 4)).items()}
    assert found["adjacency"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert found["cluster"] == pytest.approx(3 / 2)
    near = [1, 2, 1, 1, 2 ** 0.5, 1, 2, 2, 1]
    assert found["distance"] == pytest.approx(sum(near) / 9)


def test_statistics_agree_with_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    keep = ColorMAE("red", bank=16, size=16).keep_mask(20, (12, 9))
    found = mask_statistics(keep, (12, 9))
    for row in range(20):
        picture = keep[row].view(12, 9).numpy()
        assert float(found["cluster"][row]) == pytest.approx(picture.sum() / ndimage.label(picture)[1])
        assert float(found["distance"][row]) == pytest.approx(ndimage.distance_transform_edt(~picture)[~picture].mean())


def test_colors_differ_as_their_filters_say():
    of = {c: {n: float(v.mean()) for n, v in mask_statistics(ColorMAE(c, bank=64, size=32).keep_mask(200, (14, 14)),
                                                             (14, 14)).items()} for c in COLORS}
    for name in ("adjacency", "cluster", "distance"):
        assert of["blue"][name] < of["white"][name] < of["green"][name] < of["red"][name]
    assert of["white"]["adjacency"] == pytest.approx(48 / 195, abs=0.01)  # the others are drawn without regard


def test_the_report(tmp_path):
    picture = np.random.default_rng(0).random((32, 32, 3))
    report = show(ColorMAE(bank=200, size=16), picture, grid=(8, 8), masks=20)
    assert [len(i.pngs) for i in report.images] == [5, 5, 5] and len(report.tables[0].rows) == 5
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(show(ColorMAE(bank=4, size=16), grid=(8, 8), masks=2).images) == 2
    flat = spectrum(ColorMAE(bank=400, size=16).patterns("white"))
    torch.testing.assert_close(flat, torch.ones(9), atol=0.25, rtol=0)
    green = next(s for s in report.figures[0].series if s.name == "green, filter")
    assert green.y[0] == 0 and len(green.y) == 9 and max(green.y) <= float(color_gain("green", 16).max()) ** 2


def test_a_masked_picture():
    keep = torch.zeros(4, dtype=torch.bool)
    keep[1] = True
    shown = masked(np.zeros((4, 6, 3)), keep, (2, 2))
    assert (shown[:2, 3:] == 0).all() and (shown[2:] > 0.5).all() and (shown[:2, :3] > 0.5).all()


def test_bad_input():
    with pytest.raises(ValueError, match="keep: expected"):
        mask_statistics(torch.ones(2, 5), (2, 2))
    with pytest.raises(ValueError, match="without one"):
        mask_statistics(torch.ones(2, 4, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match="patches fill"):
        masked(np.zeros((5, 4, 3)), torch.ones(4, dtype=torch.bool), (2, 2))
