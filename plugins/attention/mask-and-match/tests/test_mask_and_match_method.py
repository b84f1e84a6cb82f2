"""The card's equations: losses, correspondences, masks, maps and the prior."""

import math

import pytest
import torch
from torch import nn

from looseleaf import AttentionCall
from looseleaf_mask_and_match import ContrastivePretraining, MaskAndMatch
from looseleaf_mask_and_match.backend import Beta, attended, log_prior
from looseleaf_mask_and_match.contrast import Warp, centers, duplicates, local_contrast, nt_xent, square_grid
from looseleaf_mask_and_match.masking import (
    entropy,
    hidden_cells,
    hide,
    hiding_order,
    ink_in_cells,
    ink_of,
    masked_softmax,
    ratio_at,
    valid_cells,
)


def scribbles(count: int = 6, height: int = 32, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Images (count, 1, H, W) with some strokes of ink 1 on 0."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 1, height, width)
    for image in images:
        for _ in range(5):
            y, x = (int(torch.randint(2, n - 12, (), generator=draw)) for n in (height, width))
            image[0, y:y + 2, x:x + 10] = image[0, y:y + 10, x:x + 2] = 1
    return images


def cnn(channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 4, 1), nn.ReLU())


# --------------------------------------------------------------------------------------------------------------- losses
def reference_nt_xent(one, two, temperature, same=None):
    """The card's sum, in loops."""
    views, count = [*one, *two], len(one)
    total = 0.0
    for i, z in enumerate(views):
        p = (i + count) % (2 * count)
        below = sum(math.exp(float(torch.cosine_similarity(z, other, 0)) / temperature) for j, other in enumerate(views)
                    if j != i and (j == p or same is None or not same[i % count][j % count]))
        total -= float(torch.cosine_similarity(z, views[p], 0)) / temperature - math.log(below)
    return total / (2 * count)


def test_nt_xent_is_its_loop() -> None:
    one, two = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    same = torch.zeros(5, 5, dtype=torch.bool)
    same[1, 3] = same[3, 1] = True
    for given in (None, same):
        assert float(nt_xent(one, two, 0.3, given)) == pytest.approx(reference_nt_xent(one, two, 0.3, given), abs=1e-5)
    eye = torch.eye(6, dtype=torch.float64)
    for t in (0.1, 0.5):
        expected = math.log(1 + (2 * 6 - 2) * math.exp(-1 / t))
        assert float(nt_xent(eye, eye, t)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="batch: expected two items or more for a contrastive loss, got 1"):
        nt_xent(eye[:1], eye[:1])


def test_local_contrast_is_its_loop() -> None:
    a, p = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    c = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    skipped = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) > 0.6
    total = 0.0
    for i in range(4):
        own = math.exp(float(torch.cosine_similarity(a[i], p[i], 0)) / 0.2)
        others = sum(math.exp(float(torch.cosine_similarity(a[i], c[k], 0)) / 0.2) for k in range(6)
                     if not skipped[i, k])
        total -= math.log(own / (own + others))
    assert float(local_contrast(a, p, c, skipped, 0.2)) == pytest.approx(total / 4, abs=1e-5)


def test_correspondences_of_a_translation_are_exact() -> None:
    size = (32, 64)
    still = Warp(torch.eye(2)[None], torch.zeros(1, 2), torch.zeros(1, 2, 3, 6), size)
    moved = Warp(torch.eye(2)[None], torch.tensor([[-8.0, 4.0]]), torch.zeros(1, 2, 3, 6), size)
    places = centers((4, 8), spread=size)[None]
    there = moved.from_source(still.to_source(places))
    assert torch.equal(there, places + torch.tensor([8.0, -4.0]))
    image = scribbles(1)
    view = moved.apply(image, torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(view[..., :28, 8:], image[..., 4:, :-8], atol=1e-5, rtol=0)


def test_correspondences_lead_back_through_a_warp_and_show_the_same_ink() -> None:
    pretraining = ContrastivePretraining(cnn())
    draw = torch.Generator().manual_seed(0)
    image = scribbles(4)
    first, second = (pretraining.warp(4, (32, 64), draw) for _ in range(2))
    places = centers((32, 64))[None].expand(4, -1, -1)
    there = second.from_source(first.to_source(places))
    torch.testing.assert_close(second.to_source(there), first.to_source(places), atol=1e-3, rtol=0)
    smooth = nn.functional.avg_pool2d(image, 9, 1, 4)
    one, two = (w.apply(smooth, torch.zeros(4, 1, 1, 1)) for w in (first, second))
    back = nn.functional.grid_sample(two, second.scale(there).view(4, 32, 64, 2), align_corners=False)
    inside = ((second.scale(there).abs() < 0.9).all(-1) & (first.scale(places).abs() < 0.9).all(-1)).view(4, 32, 64)
    assert float((back[:, 0] - one[:, 0])[inside].abs().mean()) < 0.005
    wrong = nn.functional.grid_sample(two, first.scale(places).view(4, 32, 64, 2), align_corners=False)
    assert float((wrong[:, 0] - one[:, 0])[inside].abs().mean()) > 0.03


def test_duplicates_are_no_negatives() -> None:
    images = scribbles(3)[[0, 1, 0, 2]]
    assert torch.equal(duplicates(images).nonzero()[:, 0], torch.tensor([0, 0, 1, 2, 2, 3]))
    pretraining = ContrastivePretraining(cnn(), local_weight=0)
    pretraining.fit(images, steps=1, batch=4)
    losses = [float(pretraining(images, torch.Generator().manual_seed(1), groups).detach())
              for groups in (None, [0, 1, 0, 2], [0, 1, 2, 3])]
    assert losses[0] == losses[1] < losses[2]


def test_pretraining_learns_and_the_encoder_reloads() -> None:
    encoder, images = cnn(), scribbles(16)
    losses = ContrastivePretraining(encoder).fit(images, steps=30, batch=8, lr=5e-3)
    assert sum(losses[-10:]) / 10 < 0.95 * sum(losses[:5]) / 5
    again = cnn()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(images), encoder(images))
    one, two = cnn(), cnn()
    first = ContrastivePretraining(one).fit(images, steps=2, batch=8)
    assert first == ContrastivePretraining(two).fit(images, steps=2, batch=8)


# ---------------------------------------------------------------------------------------------------------------- masks
def test_ink_is_the_same_whatever_the_colors() -> None:
    images = scribbles()
    ink = ink_of(images)
    assert torch.equal(ink, images[:, 0])
    torch.testing.assert_close(ink_of(5 - 3 * images.repeat(1, 3, 1, 1)), ink)
    mask = torch.ones(6, 32, 64)
    mask[:, :, 60:] = 0
    padded = images.masked_fill(mask[:, None] == 0, 0.5)
    assert torch.equal(ink_of(padded, mask)[:, :, :60], ink[:, :, :60]) and not ink_of(padded, mask)[:, :, 60:].any()
    with pytest.raises(ValueError, match=r"images: expected ink in each, got none in \[1\]"):
        ink_of(torch.stack([images[0], torch.ones(1, 32, 64)]))


@pytest.mark.parametrize("mode", ["random", "block", "attended"])
def test_the_hidden_fraction_is_right_within_one_cell(mode: str) -> None:
    images, draw = scribbles(), torch.Generator().manual_seed(0)
    ink = ink_of(images)
    cells = ink_in_cells(ink, (4, 8))
    torch.testing.assert_close(cells.flatten(1).sum(1), ink.flatten(1).sum(1))
    attention = torch.rand(6, 4, 8, generator=draw)
    for ratio in (0.0, 0.1, 0.35, 0.6, 0.9):
        order = hiding_order(cells, mode, draw, attention)
        hidden = hidden_cells(order, cells, ratio)
        assert not hidden[cells == 0].any()
        left = ink_of(images)[:, None] * (hide(images, hidden) > 0)
        gone = 1 - left.flatten(1).sum(1) / ink.flatten(1).sum(1)
        largest = cells.flatten(1).amax(1) / cells.flatten(1).sum(1)
        assert bool((gone >= ratio - 1e-6).all()) and bool((gone < ratio + largest + 1e-6).all())
        assert ratio > 0 or torch.equal(hide(images, hidden), images)
        for item in range(6):  # those that are hidden come first among cells with ink
            on = cells[item] > 0
            if hidden[item].any() and (on & ~hidden[item]).any():
                assert order[item][hidden[item]].min() >= order[item][on & ~hidden[item]].max()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "steps"])
def test_the_ratio_never_falls(schedule: str) -> None:
    ratios = [ratio_at(n / 99, 0.1, 0.6, schedule) for n in range(100)]
    assert ratios == sorted(ratios) and ratios[0] == pytest.approx(0.1) and ratios[-1] == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"ratio: expected 0 <= start <= end < 1, got 0\.1 and 1\.0"):
        ratio_at(0.5, 0.1, 1.0, schedule)


# ----------------------------------------------------------------------------------------------------------------- maps
def test_maps_sum_to_one_and_padding_gets_nothing() -> None:
    valid = torch.ones(2, 4, 8, dtype=torch.bool)
    valid[1, :, 5:] = False
    a = masked_softmax(torch.randn(2, 4, 8), valid)
    torch.testing.assert_close(a.flatten(1).sum(1), torch.ones(2))
    assert not a[~valid].any() and torch.isfinite(entropy(a)).all()
    mask = torch.ones(1, 32, 64)
    mask[:, :, 40:] = 0
    assert torch.equal(valid_cells(mask, (4, 8))[0], valid[1])
    plugin, images = MaskAndMatch(), scribbles()
    plugin.calibrate(cnn(), [images], lr=1e-2)
    found = plugin.grid_maps(cnn(), images, mask.expand(6, -1, -1))
    torch.testing.assert_close(found.flatten(1).sum(1), torch.ones(6))
    assert found.shape == (6, 4, 8) and not found[:, :, 5:].any()
    plugin.floor = 0.5
    assert float(plugin.grid_maps(cnn(), images).detach().min()) >= 0.5 / 32


def test_attended_vector_is_its_sum() -> None:
    f, a = torch.randn(2, 3, 4, 5), masked_softmax(torch.randn(2, 4, 5))
    expected = sum(a[:, None, i, j] * f[:, :, i, j] for i in range(4) for j in range(5))
    torch.testing.assert_close(attended(f, a), expected)


def test_the_matching_loss_is_its_equation() -> None:
    encoder, images = cnn(), scribbles()
    plugin = MaskAndMatch(kl_weight=0.5, mask_mode="attended")
    plugin.calibrate(encoder, [images])
    with torch.no_grad():
        loss, facts = plugin.matching_loss(encoder, images, 0.4, torch.Generator())
        full = encoder(images)
        a = plugin.network(full)[:, 0].flatten(1).softmax(1).view(6, 4, 8)
        hidden = hidden_cells(a, ink_in_cells(ink_of(images), (4, 8)), 0.4)
        masked = encoder(hide(images, hidden))
        b = plugin.network(masked)[:, 0].flatten(1).softmax(1).view(6, 4, 8)
        m, target = (torch.stack([(f * w).sum((1, 2)) for f, w in zip(fs, ws)]) for fs, ws in ((masked, b), (full, a)))
        total = reference_nt_xent(m, target, 0.1)
        for n in range(6):
            seen = ~hidden[n]
            p = a[n][seen] / a[n][seen].sum()
            total += 0.5 * float((p * (p / b[n][seen]).log()).sum()) / 6
    assert float(loss) == pytest.approx(total, abs=1e-4)
    assert facts["entropy"] == pytest.approx(float(entropy(a).mean()), abs=1e-5)


def test_only_the_network_learns_while_the_encoder_is_frozen() -> None:
    encoder, images = cnn(), scribbles(12)
    encoder[0].eval()
    encoder[2].weight.requires_grad_(False)
    modes = [m.training for m in encoder.modules()]
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    plugin = MaskAndMatch()
    plugin.calibrate(encoder, images.split(6), epochs=10, lr=5e-3)
    assert all(torch.equal(before[name], x) for name, x in encoder.state_dict().items())
    assert [m.training for m in encoder.modules()] == modes and encoder[0].weight.requires_grad
    assert not encoder[2].weight.requires_grad and all(p.grad is None for p in encoder.parameters())
    losses = [row["loss"] for row in plugin.history]
    assert len(losses) == 20 and [row["ratio"] for row in plugin.history] == pytest.approx(
        [0.1 + 0.5 * n / 19 for n in range(20)])
    other = MaskAndMatch()
    other.calibrate(encoder, images.split(6), epochs=10, lr=5e-3)
    assert [row["loss"] for row in other.history] == losses
    loose = MaskAndMatch(freeze=False, match="cosine")
    loose.calibrate(encoder, images.split(6))
    assert not torch.equal(before["0.weight"], encoder[0].weight)


def test_the_map_finds_what_tells_images_apart() -> None:
    """The same planted bar in all images says nothing about which one it is: attention must go to the other ink."""
    draw = torch.Generator().manual_seed(0)
    images = torch.zeros(32, 1, 32, 64)
    images[:, :, 2:6, 2:62] = 1  # the bar, in the upper cells
    for image in images:
        x = 16 * int(torch.randint(0, 3, (), generator=draw)) + 4
        image[0, 20:28, x:x + 8] = (torch.rand(8, 8, generator=draw) > 0.5).float()
    encoder = nn.Conv2d(1, 64, 8, 8)
    torch.manual_seed(0)
    nn.init.normal_(encoder.weight)
    plugin = MaskAndMatch(mask_end=0.3)
    plugin.calibrate(encoder, list(images.split(16)) * 40, lr=1e-2)
    rows = plugin.grid_maps(encoder, images).sum((0, 2)).detach() / 32
    assert float(rows[2:].sum()) > 0.8, rows


# ---------------------------------------------------------------------------------------------------------------- prior
def call(keys: int = 12, lengths=None, **given):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=draw) for n in (5, keys, keys))
    return AttentionCall(q, k, v, 8 ** -0.5, False, key_lengths=lengths, phase="bidirectional", is_cross=True, **given)


def test_the_prior_is_its_equation() -> None:
    a = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 7])
    plugin, one = MaskAndMatch(beta=0.7, learn_beta=False), call(lengths=lengths, context={"map": a})
    out = plugin.compute(one)
    for n, length in enumerate(lengths.tolist()):
        prior = 0.7 * (length * a[n, :length] / a[n, :length].sum()).log()
        scores = one.query[n] @ one.key[n, :, :length].mT * one.scale + prior
        torch.testing.assert_close(out[n], scores.softmax(-1) @ one.value[n, :, :length], atol=1e-5, rtol=1e-5)


def test_a_uniform_map_and_beta_0_change_nothing() -> None:
    for lengths in (None, torch.tensor([12, 7])):
        exact = call(lengths=lengths).dense()
        flat = call(lengths=lengths, context={"map": torch.full((2, 12), 1 / 12)})
        torch.testing.assert_close(MaskAndMatch().compute(flat), exact, atol=1e-6, rtol=0)
        some = call(lengths=lengths, context={"map": torch.rand(2, 12)})
        torch.testing.assert_close(MaskAndMatch(beta=0).compute(some), exact, atol=1e-6, rtol=0)


def test_one_place_and_a_large_beta_give_its_value() -> None:
    one = call(context={"map": torch.eye(12)[[3, 8]]})
    out = MaskAndMatch(beta=50.0).compute(one)
    for n, place in enumerate((3, 8)):
        torch.testing.assert_close(out[n], one.value[n, :, place:place + 1].expand(-1, 5, -1))


def test_the_prior_goes_with_masks_biases_and_half_precision() -> None:
    a = torch.rand(2, 12) + 0.1
    prior = log_prior(a, torch.tensor([12, 12]))[:, None, None]
    mask = torch.rand(2, 1, 5, 12) > 0.4
    bias = torch.randn(1, 4, 5, 12)
    one = call(context={"map": a}, mask=mask, score_changes={"position_bias": bias})
    scores = (one.query @ one.key.mT * one.scale + prior + bias).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(MaskAndMatch().compute(one), scores.softmax(-1) @ one.value, atol=1e-5, rtol=1e-4)
    for name in ("query", "key", "value"):
        setattr(one, name, getattr(one, name).bfloat16())
    assert MaskAndMatch().compute(one).dtype == torch.bfloat16


def test_without_a_map_or_for_self_attention_it_is_exact_and_counted() -> None:
    for one in (call(), call(context={"map": torch.rand(2, 11)}), call(context={"map": torch.rand(2, 12)})):
        one.is_cross = "map" not in one.context or one.context["map"].shape[1] == 11
        seen: dict = {}
        one.record = seen.update
        assert torch.equal(MaskAndMatch().compute(one), one.dense()) and seen["fallback"]


def test_beta_and_the_map_have_gradients_and_beta_stays_above_0() -> None:
    a = torch.rand(2, 12, requires_grad=True)
    plugin = MaskAndMatch()
    plugin.modules = {0: Beta(1.0)}
    plugin.compute(call(context={"map": a})).square().sum().backward()
    assert bool(a.grad.any()) and float(plugin.modules[0].value.grad) != 0
    with torch.no_grad():
        plugin.modules[0].value.fill_(-0.3)
    assert plugin.modules[0]().item() == pytest.approx(0.3)


def test_grids_of_patches() -> None:
    assert square_grid(48, 192, 36) == (3, 12) and square_grid(224, 224, 197) == (14, 14)
    assert square_grid(224, 224, 198) == (14, 14)
    with pytest.raises(ValueError, match=r"grid: expected 35 tokens that square patches of 48 x 192 pixels give"):
        square_grid(48, 192, 35)


BAD = {
    "ratio": (lambda: MaskAndMatch(mask_end=1.0), r"mask_end: expected a number in \[0, 1\), got 1.0"),
    "ratio falls": (lambda: MaskAndMatch(mask_start=0.5, mask_end=0.2), r"mask_end: expected a number >= mask_start"),
    "batch of one": (lambda: MaskAndMatch().calibrate(cnn(), [scribbles(1)]), "batch: expected two images or more for"),
    "nothing": (lambda: MaskAndMatch().calibrate(cnn(), []), "batches: expected one or more, got 0"),
    "no ink": (lambda: MaskAndMatch().calibrate(cnn(), [torch.ones(4, 1, 32, 64)]), "images: expected ink in each"),
    "no images": (lambda: MaskAndMatch().calibrate(cnn(), [{"labels": 3}]), r"images: expected a tensor \(B, C,"),
    "not learned": (lambda: MaskAndMatch().maps(cnn(), scribbles()), "expected a learned map, got none: call"),
    "negative map": (lambda: MaskAndMatch().compute(call(context={"map": -torch.ones(2, 12)})),
                     r"context\['map'\]: expected numbers >= 0"),
    "empty map": (lambda: MaskAndMatch().compute(call(context={"map": torch.zeros(2, 12)})), "that are not all 0"),
    "save": (lambda: MaskAndMatch().save("nothing"), "save: expected a map, got none: calibrate first"),
    "one image": (lambda: ContrastivePretraining(cnn()).fit(scribbles(1)), "expected two images"),
    "temperature": (lambda: ContrastivePretraining(cnn(), temperature=0), "temperature: expected a number >= 1e-06"),
    "no loss": (lambda: ContrastivePretraining(cnn(), local_weight=0, global_weight=0), "expected local_weight or"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    function, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        function()
