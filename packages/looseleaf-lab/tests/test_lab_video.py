"""Moving digits, the small video model, its training and its sampler."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf import SlidingWindow, attach
from looseleaf_lab import video

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_digits_move() -> None:
    videos, again, other = (video.moving_digits(40, seed) for seed in (0, 0, 1))
    assert videos.frames.shape == (40, 8, 1, 16, 16) and videos.captions.shape == (40, 3, 16)
    assert torch.equal(videos.frames, again.frames) and not torch.equal(videos.frames, other.frames)
    assert float(videos.frames.min()) == -1 and float(videos.frames.max()) == 1
    words = videos.captions.argmax(-1)
    assert torch.equal(videos.captions.sum(-1), torch.ones(40, 3)) and torch.equal(words[:, 0], videos.classes)
    assert not torch.equal(video.moving_digits(40, 0, "test").frames, videos.frames)
    # The ink is the same in every frame, and moves as the caption says until the digit meets an edge.
    ink = (videos.frames + 1).flatten(3).sum((2, 3))
    torch.testing.assert_close(ink, ink[:, :1].expand_as(ink))
    place = torch.arange(16.0)
    weight = (videos.frames[:, :, 0] + 1) / ink[:, :, None, None]
    centre = torch.stack([(weight.sum(2) * place).sum(-1), (weight.sum(3) * place).sum(-1)], -1)
    step = (centre[:, 1:] - centre[:, :-1]).round()
    said = torch.stack([words[:, 1] - 11, words[:, 2] - 14], -1)
    assert torch.equal(step.abs(), said[:, None].abs().expand_as(step))
    first = step[:, 0] == said
    assert first.float().mean() > 0.8 and bool((first | (step[:, 0] == -said)).all())


@pytest.mark.parametrize(("count", "part"), [(0, "train"), (1, "tests")])
def test_what_is_no_part(count: int, part: str) -> None:
    with pytest.raises(ValueError, match="expected count >= 1 of train, validation or test"):
        video.moving_digits(count, 0, part)


def test_frechet_distance() -> None:
    real, more = (video.moving_digits(128, seed).frames for seed in (5, 6))
    assert video.frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    near = video.frechet_distance(real, more)
    far = video.frechet_distance(real, (more + 0.5 * torch.randn(more.shape)).roll(4, -1).clamp(-1, 1) * 0.5)
    assert 0 < near < far and video.frechet_distance(more, real) == pytest.approx(near)
    with pytest.raises(ValueError, match="expected 32 videos or more of each, got 128 and 31"):
        video.frechet_distance(real, more[:31])


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("diffusers"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match="pip install diffusers"):
        video.denoiser()


def test_training_is_repeatable_and_learns() -> None:
    pytest.importorskip("diffusers")
    small: dict[str, Any] = {"layers": 1, "heads": 2, "width": 16}
    losses = []
    for _ in range(2):
        model = video.denoiser(0, **small)
        losses.append(video.train(model, 20, 3, progress=False))
        assert not model.training
    assert losses[0] == losses[1] and sum(losses[0][-5:]) < 0.7 * sum(losses[0][:5])
    assert video.grid(model) == (8, 8, 8)
    with pytest.raises(ValueError, match="expected steps >= 1 and batch >= 1, got steps=0, batch=2"):
        video.train(model, 0)


def test_samples_and_steps() -> None:
    pytest.importorskip("diffusers")
    model = video.denoiser(0, layers=1, heads=2, width=16).eval()
    text = video.moving_digits(2, 0).captions
    one, again, other = (video.sample(model, text, seed, steps=3, progress=False) for seed in (0, 0, 1))
    assert one.shape == (2, 8, 1, 16, 16) and float(one.abs().max()) <= 1
    assert torch.equal(one, again) and not torch.equal(one, other)
    seen: list[int | None] = []
    backend = SlidingWindow()
    with attach(model, backend, steps=3) as attached:
        compute = attached.compute

        def watched(call: Any, layer: int) -> Any:
            out = compute(call, layer)
            seen.append(call.step)
            return out

        attached.compute = watched  # type: ignore[method-assign]
        assert torch.equal(video.sample(model, text, 0, steps=3, progress=False), one)
        video.sample(model, text, 0, steps=2, progress=False)
    assert seen == [0, 1, 2, 0, 1] and attached.records[0]["phase"] == "bidirectional"
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        video.sample(model, text, steps=0)


def test_trained_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    one = video.trained(2, batch=2, progress=False)
    monkeypatch.setattr(video, "train", lambda *a, **k: pytest.fail("trained again"))
    two = video.trained(2, batch=2, progress=False)
    assert not two.training
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    text = video.moving_digits(2, 0).captions
    made = [video.sample(model, text, 0, steps=2, progress=False) for model in (one, two)]
    assert torch.equal(made[0], made[1])
