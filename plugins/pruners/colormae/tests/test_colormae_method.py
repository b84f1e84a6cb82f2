"""Filters, banks and masks against a plain reference and the figures of the paper's definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from looseleaf.pruning.selection import PerRow
from looseleaf_colormae import COLORS, ColorMAE, color_gain, filtered, gaussian_gain

SMALL = {"bank": 24, "size": 16}


def blurred(white: torch.Tensor, sigma: float) -> torch.Tensor:
    """The plain reference: convolution with a Gaussian, the picture repeated around itself."""
    size, reach = white.shape[-1], math.ceil(7 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    line = line / line.sum()
    out = torch.zeros_like(white)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            out += line[dy + reach] * line[dx + reach] * white.roll((dy % size, dx % size), (1, 2))
    return out


@pytest.mark.parametrize("sigmas", [(0.5, 2.0), (1.0, 2.0), (1.5, 3.0)])
def test_each_color_is_its_sum_of_convolutions(sigmas):
    white = torch.randn(2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = sigmas
    band = blurred(white, low) - blurred(white, high)
    expected = {"red": blurred(white, low), "blue": white - blurred(white, low), "green": band,
                "purple": white - band, "white": white}
    for color in COLORS:
        found = filtered(white, color, sigma=low, sigma_low=low, sigma_high=high)
        torch.testing.assert_close(found, expected[color], atol=1e-10, rtol=0)


def test_red_and_blue_as_green_and_purple_add_up_to_white():
    method = ColorMAE(**SMALL)
    white = method.patterns("white")
    for one, two in (("red", "blue"), ("green", "purple")):
        torch.testing.assert_close(method.patterns(one) + method.patterns(two), white, atol=1e-6, rtol=0)


def test_green_patterns_sum_to_zero():
    white = torch.randn(5, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert filtered(white, "green").sum((1, 2)).abs().max() < 1e-9
    assert color_gain("green", 64)[0, 0] == 0 and color_gain("blue", 64)[0, 0] == 0
    assert ColorMAE(**SMALL).patterns("green").mean((1, 2)).abs().max() < 1e-6


def test_with_a_vanishing_sigma_red_is_white():
    method = ColorMAE("red", sigma=1e-4, **SMALL)
    torch.testing.assert_close(method.patterns("red"), method.patterns("white"), atol=1e-6, rtol=0)
    assert torch.equal(method.keep_mask(8, (7, 7)), ColorMAE("white", **SMALL).keep_mask(8, (7, 7)))


@pytest.mark.parametrize("color", COLORS)
def test_the_spectrum_of_the_bank_is_that_of_the_filter(color):
    bank = ColorMAE(bank=1500, size=16).patterns(color)
    power = torch.fft.rfft2(bank.double()).abs().square().mean(0) / 16 ** 2
    expected = color_gain(color, 16).square()
    # each cell is a mean of exponential variables of that mean: 7 standard errors
    assert ((power - expected).abs() <= 7 * math.sqrt(2 / 1500) * expected + 1e-9).all()


def test_a_wider_gaussian_lets_less_through_and_a_band_is_never_negative():
    for size in (8, 15, 64):
        gains = [gaussian_gain(s, size) for s in (0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 30.0)]
        for narrow, wide in itertools.pairwise(gains):
            assert (narrow - wide >= -1e-12).all() and narrow[0, 0] == 1.0
    assert gaussian_gain(1.0, 8, 3).shape == (8, 8, 5)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("grid", [(14, 14), (7, 11), (3, 8, 8)])
def test_counts_and_ids_agree(color, grid):
    for video in ("tube", "volume"):
        for side in ("high", "low"):
            method = ColorMAE(color, bank=32, size=16, side=side, video=video)
            ids = method.ids(6, grid)
            n = math.prod(grid)
            assert ids.mask.shape == (6, n) and ((ids.mask == 0).sum(1) == method.kept(grid)).all()
            assert torch.equal(ids.ids_keep.sort(1).values, (ids.mask == 0).nonzero()[:, 1].view(6, -1))
            order = ids.ids_restore.argsort(1)
            assert torch.equal(order[:, :method.kept(grid)], ids.ids_keep)
            assert torch.equal(ids.ids_restore.gather(1, order), torch.arange(n).expand(6, n))
            # tokens that are shuffled by the order come back by ids_restore
            tokens = torch.randn(6, n, 3)
            shuffled = tokens.gather(1, order[..., None].expand(-1, -1, 3))
            assert torch.equal(shuffled.gather(1, ids.ids_restore[..., None].expand(-1, -1, 3)), tokens)


def test_the_largest_values_are_kept_as_a_selection_of_the_core_does():
    for side, sign in (("high", 1), ("low", -1)):
        method = ColorMAE(side=side, **SMALL)
        noise = method.noise(5, (9, 13))
        method.step = 0
        kept = method.keep_mask(5, (9, 13))
        assert torch.equal(kept, PerRow(keep=method.kept((9, 13))).select({"n": sign * noise})["n"])


def test_the_count_is_truncated_as_in_mae():
    assert ColorMAE(ratio=0.75).kept((14, 14)) == 49
    assert ColorMAE(ratio=0.9).kept((14, 14)) == 19
    assert ColorMAE(ratio=0.9).kept((8, 14, 14)) == 8 * 19  # tubes
    assert ColorMAE(ratio=0.9, video="volume").kept((8, 14, 14)) == int(8 * 196 * (1 - 0.9))


def test_windows_are_crops_and_flips_of_the_bank():
    method = ColorMAE(bank=3, size=8, seed=4)
    bank = method.patterns("green")
    seen = set()
    for window in method.noise(64, (5, 6)).view(64, 5, 6):
        found = [(p, y, x, f) for p in range(3) for y in range(4) for x in range(3)
                 for f, dims in enumerate([(), (0,), (1,), (0, 1)])
                 if torch.equal(bank[p, y:y + 5, x:x + 6].flip(dims), window)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 40 and {s[3] for s in seen} == {0, 1, 2, 3} and {s[0] for s in seen} == {0, 1, 2}


def test_windows_of_a_volume_are_crops_and_flips_of_its_cubes():
    method = ColorMAE(bank=8, size=4, video="volume")
    bank = method.patterns("green", dims=3)
    assert bank.shape == (2, 4, 4, 4)
    flips = [dims for n in range(4) for dims in itertools.combinations(range(3), n)]
    seen = set()
    for window in method.noise(64, (2, 3, 4)).view(64, 2, 3, 4):
        found = [(p, z, y, dims) for p in range(2) for z in range(3) for y in range(2) for dims in flips
                 if torch.equal(bank[p, z:z + 2, y:y + 3].flip(dims), window)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 30 and {s[3] for s in seen} == set(flips)


def test_official_batching_shares_crop_and_flips():
    method = ColorMAE(bank=6, size=8, official_batching=True)
    bank = method.patterns("green")
    windows = method.noise(8, (5, 5)).view(8, 5, 5)
    found = [(y, x, dims) for y in range(4) for x in range(4) for dims in ((), (1,), (2,), (1, 2))
             if torch.equal(bank[torch.arange(8) % 6, y:y + 5, x:x + 5].flip(dims), windows)]
    assert len(found) == 1


def test_same_seed_same_masks_and_the_next_step_others():
    one, two = ColorMAE(**SMALL), ColorMAE(**SMALL)
    first = one.keep_mask(4, (8, 8))
    assert torch.equal(first, two.keep_mask(4, (8, 8)))
    second = one.keep_mask(4, (8, 8))
    assert not torch.equal(first, second)
    resumed = ColorMAE(**SMALL)
    resumed.step = 1
    assert torch.equal(resumed.keep_mask(4, (8, 8)), second)
    assert not torch.equal(ColorMAE(seed=1, **SMALL).keep_mask(4, (8, 8)), first)


@pytest.mark.parametrize("fields", [{}, {"official_batching": True}, {"video": "volume"}])
def test_masks_are_made_on_their_own_device_whatever_the_default_is(fields):
    expected = ColorMAE(seed=7, **SMALL, **fields).ids(3, (2, 8, 8))
    with torch.device("meta"):
        ids = ColorMAE(seed=8, **SMALL, **fields).ids(3, (2, 8, 8))  # another bank, made here
        again = ColorMAE(seed=7, **SMALL, **fields).ids(3, (2, 8, 8))
    assert ids.mask.device.type == "cpu" and all(map(torch.equal, again, expected))


class Masks(torch.utils.data.Dataset):
    """A dataset whose workers draw masks."""

    def __init__(self):
        self.method = ColorMAE(**SMALL)

    def __len__(self):
        return 8

    def __getitem__(self, _):
        return self.method.keep_mask(1, (8, 8))[0]


def test_workers_draw_other_masks_and_each_epoch_others():
    loader = torch.utils.data.DataLoader(Masks(), batch_size=1, num_workers=2,
                                         generator=torch.Generator().manual_seed(0))
    rows = torch.cat([mask for _ in range(2) for mask in loader])
    assert len(rows.unique(dim=0)) == 16


def test_ranks_draw_other_masks(monkeypatch):
    def rows():
        loader = torch.utils.data.DataLoader(Masks(), batch_size=8, num_workers=1,
                                             generator=torch.Generator().manual_seed(0))
        return torch.cat([ColorMAE(**SMALL).keep_mask(4, (8, 8)), next(iter(loader))])
    first, again = rows(), rows()
    monkeypatch.setenv("RANK", "1")
    assert torch.equal(first, again) and len(torch.cat([first, rows()]).unique(dim=0)) == 24


def test_a_tube_is_one_mask_and_a_volume_is_not():
    tube = ColorMAE(**SMALL).keep_mask(3, (4, 8, 8)).view(3, 4, 64)
    assert (tube == tube[:, :1]).all() and (tube.sum(2) == 16).all()
    volume = ColorMAE("red", bank=64, size=16, video="volume").keep_mask(3, (4, 8, 8)).view(3, 4, 64)
    assert not (volume == volume[:, :1]).all() and (volume.sum((1, 2)) == 64).all()
    stays = (volume[:, 1:] == volume[:, :-1]).float().mean()  # red noise changes little from frame to frame
    assert stays > 0.72  # independent frames: 0.625


def test_the_schedule_changes_the_color():
    method = ColorMAE("white", schedule={2: "green", 5: "blue"}, **SMALL)
    colors = []
    for method.epoch in range(7):
        colors.append(method.current_color)
    assert colors == ["white"] * 2 + ["green"] * 3 + ["blue"] * 2
    method.step = 0
    assert torch.equal(method.keep_mask(3, (8, 8)), ColorMAE("blue", **SMALL).keep_mask(3, (8, 8)))


def test_index_lists_and_blocks():
    def method():
        return ColorMAE(**SMALL)
    mask = method().keep_mask(4, (8, 8))
    context, target = method().index_lists(4, (8, 8))
    for row in range(4):
        assert context[row].tolist() == mask[row].nonzero().flatten().tolist()
        assert target[row].tolist() == (~mask[row]).nonzero().flatten().tolist()
    coarse = method().bool_masked_pos(4, (16, 24), block=2).view(4, 16, 24)
    fine = ~method().keep_mask(4, (8, 12)).view(4, 8, 12)
    for dy in (0, 1):
        for dx in (0, 1):
            assert torch.equal(coarse[:, dy::2, dx::2], fine)


@pytest.mark.parametrize("fields, words", [
    ({"ratio": 0.0}, "ratio"), ({"ratio": 1.0}, "ratio"), ({"sigma_low": 2.0, "sigma_high": 2.0}, "sigma_low"),
    ({"sigma_low": 3.0}, "sigma_high"), ({"color": "gren"}, "Did you mean 'green'"), ({"sigma": 0.0}, "sigma"),
    ({"schedule": {0: "gren"}}, "schedule"), ({"schedule": {-1: "green"}}, "schedule"), ({"bank": 0}, "bank"),
    ({"side": "top"}, "side"), ({"color": None}, "color")])
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        ColorMAE(**fields)


@pytest.mark.parametrize("call, words", [
    (lambda m: m.noise(2, (20, 8)), "raise ColorMAE.size"), (lambda m: m.noise(2, 8), "grid"),
    (lambda m: m.noise(2, (8, 0)), "grid"), (lambda m: m.noise(2, (8, 8.0)), "grid"),
    (lambda m: m.noise(0, (8, 8)), "batch"), (lambda m: m.keep_mask(2, (1, 3)), "keeps a patch"),
    (lambda m: m.bool_masked_pos(2, (8, 9), block=2), "block"),
    (lambda m: m.keep(None, {"images": 1}), "'patches' or 'pixel_values'"),
    (lambda m: m.keep(None, {"patches": torch.zeros(2, 3)}), "patches"),
    (lambda m: m.keep(None, {"pixel_values": torch.zeros(2, 3, 8, 8)}), "give the grid")])
def test_bad_calls(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call(ColorMAE(**SMALL))
