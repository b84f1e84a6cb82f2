"""The planted world, and the reproduction on stand-ins."""

from __future__ import annotations

import math
import random

import pytest
import torch

from looseleaf.resume import as_plain
from looseleaf_diffusionpid import planted


def test_what_is_planted() -> None:
    world = planted.World(3)
    for k, c, p in ((0, 0, 0), (5, 2, 1)):
        at = world.facts.index((k, c, p))
        for text in (planted.NAMES[k], planted.SYNONYMS[k], f"{planted.NAMES[k]} {planted.SYNONYMS[k]}"):
            weights = world.conditions[world.add(text)]
            assert float(weights.sum()) == pytest.approx(1)
            assert float(weights[at] / world.conditions[""][at]) == pytest.approx(8), text
        weights = world.conditions[world.add("u0 v1")]
        assert all(float(w) == 0 for w, fact in zip(weights, world.facts, strict=True) if fact[2] == 0)
        torch.testing.assert_close(world.conditions[world.add("u0")], world.conditions[""])  # nothing by itself
    colours = [float(world.conditions[""][[f[1] == c for f in world.facts]].sum()) for c in range(4)]
    assert colours == pytest.approx([0.25] * 4)
    assert [round(b, 2) for b in (planted.BIASES[0], planted.BIASES[-1])] == [0.25, 1.0]
    pictures, bags = world.captions(200, random.Random(0))
    for picture, bag in zip(pictures, bags, strict=True):
        words = [word for word, there in zip(planted.WORDS, bag, strict=True) if there]
        (row,) = [n for n, mean in enumerate(world.means) if torch.equal(mean.float(), picture)]
        assert all(planted.true(word, words, *world.facts[row]) for word in words)


def test_a_denoiser_that_has_learned_all_is_exact() -> None:
    world = planted.World(0)
    learned = planted.Learned(world.means.float())
    a, texts = torch.linspace(-6, 2, 12, dtype=torch.float64), ["", world.add("name1 u0")] * 6
    z = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    learned.log_std.data.fill_(math.log(planted.STD))
    learned.trust = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(learned.trust.weight), torch.nn.init.zeros_(learned.trust.bias)
    logs = {tuple([0.0] * len(planted.WORDS)): world.conditions[""].log().float()}
    bag = torch.zeros(len(planted.WORDS))
    bag[[planted.WORDS.index(word) for word in ("name1", "u0")]] = 1
    logs[tuple(bag.tolist())] = world.conditions["name1 u0"].log().float()
    del learned.words
    learned.words = lambda bags: torch.stack([logs[tuple(b.tolist())] for b in bags])
    torch.testing.assert_close(learned.eps(z, a, texts), world.eps(z, a, texts), atol=1e-4, rtol=1e-3)


def test_samples_of_the_world_are_what_was_asked_for() -> None:
    world = planted.World(0)
    noise = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = planted.sample(world, [world.add("name2 colour1 u0 v1")] * 8, noise)
    expected = world.means[world.facts.index((2, 1, 1))].float()
    assert (pictures - expected).abs().mean() < 0.15


def test_quick_study(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    models = pytest.importorskip("looseleaf_lab.models")
    if "emoji-diffusion" not in models.own():
        pytest.skip("looseleaf-models is not installed")
    from looseleaf_diffusionpid import reproduction

    made_up = reproduction.scenes.Painter(made_up=True)
    monkeypatch.setattr(reproduction.scenes, "Painter", lambda: made_up)
    scale = reproduction.Scale(pictures=1, samples=8, steps=2, rows=2, levels=8)
    results = reproduction.Results([as_plain(reproduction.measure(0, scale))], {}, [0], scale, True)
    report = reproduction.study.report(results)
    assert report.tables[0].title == "Maps of words against the masks of their things"
    assert len(report.claims) == 15 and {c.verdict for c in report.claims} == {"not shown at this scale"}
    fractions = results.rows[0]["world"]["exact"]["fractions"]["orthogonal"]
    assert fractions["synonyms"]["R"] == pytest.approx(1) and fractions["XOR"]["S"] == pytest.approx(1)
