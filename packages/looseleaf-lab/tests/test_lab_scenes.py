"""Scenes: what the caption says is what is drawn, and where the masks say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from looseleaf_lab import scenes

pytest.importorskip("PIL")


def test_masks_hold_the_things_and_nothing_else() -> None:
    painter = scenes.Painter(made_up=True)
    for scene in painter.scenes(40, seed=1):
        ground = np.ones((scenes.SIZE, scenes.SIZE), dtype=bool)
        for mask in scene.masks:
            assert mask.any() and scene.image.shape == (32, 32, 3) and scene.image.dtype == np.uint8
            ground &= ~mask
        assert len(scene.things) == len(scene.masks) in (1, 2)
        corner = scene.image[ground].astype(int)
        assert (np.abs(corner - np.median(corner, 0)).max(1) < 40).mean() > 0.8  # one plain ground
        if len(scene.masks) == 2:
            assert not scene.masks[0][:, 16:].any() and not scene.masks[1][:, :16].any()


def test_captions_and_colours() -> None:
    painter = scenes.Painter(made_up=True)
    red = painter.scene([scenes.Thing("cat", "red"), scenes.Thing("dog")], random.Random(0))
    assert red.caption == "a red cat left of a dog"
    pixels = red.image[red.masks[0]].mean(0)
    assert pixels[0] > pixels[1] + 40 and pixels[0] > pixels[2] + 40
    same = [[s.image for s in painter.scenes(5, seed=3)] for _ in range(2)]
    assert all((a == b).all() for a, b in zip(*same))
    assert not any(thing.colour for s in painter.scenes(20, coloured=0.0, two=1.0) for thing in s.things)


def test_a_hidden_thing_lies_on_top_of_copies_that_take_on_its_colours() -> None:
    thing = np.zeros((64, 64, 4), np.uint8)
    thing[8:56, 8:56] = (200, 40, 40, 255)
    other = np.zeros((64, 64, 4), np.uint8)
    other[:] = (20, 40, 220, 255)
    plain, alike = (scenes.hidden(thing, other, random.Random(3), camouflage=c) for c in (0.0, 1.0))
    for scene in (plain, alike):
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert np.abs(scene.image[scene.mask].astype(int).mean(0) - (200, 40, 40)).max() < 12
        assert 30 ** 2 < scene.mask.sum() < 60 ** 2 and 1 <= len(scene.copies) <= 8
        assert not any((scene.mask & copy).any() for copy in scene.copies)
    copies = np.any(plain.copies, axis=0)
    assert np.abs(plain.image[copies].astype(int).mean(0) - (20, 40, 220)).max() < 25
    assert np.abs(alike.image[copies].astype(int).mean(0) - (200, 40, 40)).max() < 12
    alone = scenes.hidden(thing, other, random.Random(3), side=64, copies=0)
    assert not alone.copies and alone.image.shape == (64, 64, 3) and len(np.unique(alone.image[~alone.mask][:, 0])) < 40


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected a name of apple"):
        scenes.Thing("unicorn")
    with pytest.raises(ValueError, match="expected 1 or 2 things, got 3"):
        scenes.Painter(made_up=True).scene([scenes.Thing("cat")] * 3, random.Random(0))
