"""A small video diffusion transformer that trains in minutes on one core: handwritten digits that move.

The model is diffusers' own CogVideoX transformer at a small size, so that everything made for diffusers models can be
tried on it. It is a rectified flow: with noise n and a video x, the state at time t in [0, 1] is (1 - t) x + t n, and
the model learns n - x.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looseleaf.errors import LooseleafError
from looseleaf.files import cache_dir
from looseleaf.progress import track
from looseleaf_lab.training import fit, warmup_cosine

CANVAS, FRAMES, DIGIT = 16, 8, 8
WORDS, WORD_SIZE = 3, 16
"""A caption has three words: digit, horizontal and vertical speed, one-hot each."""
THETA = 100
"""Base of the rotary embeddings: the longest wave is a few times the grid."""
CLOCK = 1000.0
"""Timesteps as diffusers counts them: 1000 for noise, falling to 0."""


class MissingDiffusersError(LooseleafError, ModuleNotFoundError):
    """diffusers is not installed."""


@dataclasses.dataclass(frozen=True)
class Videos:
    """Videos with captions.

    Attributes:
        frames: (N, 8, 1, 16, 16) fp32 in [-1, 1].
        captions: (N, 3, 16) fp32, what :func:`captions` makes.
        classes: (N,) int64, the digit.
    """

    frames: Tensor
    captions: Tensor
    classes: Tensor


def moving_digits(count: int, seed: int = 0, part: str = "train") -> Videos:
    """Digits of scikit-learn on a canvas of 16 x 16, moving by -1, 0 or 1 pixel a frame and back at the edges.

    Args:
        count: videos, 1 or more.
        seed: of digits, places and speeds.
        part: ``train``, ``validation`` or ``test`` digits, which share none.

    Raises:
        ValueError: an argument out of range.
        looseleaf_lab.data.MissingDataError: scikit-learn is not installed.
    """
    from looseleaf_lab import vision

    if count < 1 or part not in ("train", "validation", "test"):
        raise ValueError("moving_digits: expected count >= 1 of train, validation or test, "
                         f"got count={count}, part={part!r}")
    images, classes = getattr(vision.digits(), part)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count,), generator=g)
    room = CANVAS - DIGIT
    place = torch.randint(room + 1, (count, 2), generator=g)
    speed = torch.randint(-1, 2, (count, 2), generator=g)
    time = torch.arange(FRAMES)
    far = place[:, None] + speed[:, None] * time[:, None]  # (N, frames, 2): x and y
    at = room - (far.remainder(2 * room) - room).abs()
    frames = torch.full((count, FRAMES, 1, CANVAS, CANVAS), -1.0)
    for n, digit in enumerate(images[chosen] * 2 - 1):
        for f in range(FRAMES):
            x, y = at[n, f].tolist()
            frames[n, f, :, y:y + DIGIT, x:x + DIGIT] = digit
    return Videos(frames, captions(classes[chosen], speed), classes[chosen])


def captions(classes: Tensor, speed: Tensor) -> Tensor:
    """Three one-hot words for each video, (N, 3, 16) fp32.

    Args:
        classes: (N,) digits.
        speed: (N, 2) horizontal and vertical, each -1, 0 or 1.
    """
    numbers = torch.stack([classes, 10 + speed[:, 0] + 1, 13 + speed[:, 1] + 1], 1)
    return torch.nn.functional.one_hot(numbers, WORD_SIZE).float()


def denoiser(seed: int = 0, *, layers: int = 4, heads: int = 4, width: int = 16, patch: int = 2) -> Any:
    """A CogVideoX transformer with new weights: 8 x 8 x 8 tokens of video after 3 tokens of text at patch 2.

    Args:
        seed: of the weights.
        layers: transformer blocks.
        heads: attention heads of a block.
        width: channels of a head, a multiple of 16.
        patch: pixels of a token in each direction; 1 or 2.

    Raises:
        MissingDiffusersError: diffusers is not installed.
    """
    try:
        from diffusers import CogVideoXTransformer3DModel
    except ModuleNotFoundError as error:
        raise MissingDiffusersError("the video model needs diffusers, which is not installed: pip install diffusers"
                                    ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _rotated(CogVideoXTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width, in_channels=1, out_channels=1, time_embed_dim=64,
            text_embed_dim=WORD_SIZE, num_layers=layers, sample_width=CANVAS, sample_height=CANVAS,
            sample_frames=FRAMES, patch_size=patch, temporal_compression_ratio=1, max_text_seq_length=WORDS,
            use_rotary_positional_embeddings=True))


def grid(model: Any) -> tuple[int, int, int]:
    """Frames, height and width of the video tokens of a :func:`denoiser`."""
    side = CANVAS // model.config.patch_size
    return FRAMES, side, side


def velocity(model: Any, state: Tensor, text: Tensor, time: Tensor) -> Tensor:
    """What the model says the flow is, as large as the state.

    Args:
        model: a :func:`denoiser`.
        state: (N, 8, 1, 16, 16).
        text: (N, 3, 16).
        time: (N,) from 0 (video) to 1 (noise).
    """
    out: Tensor = model(hidden_states=state, encoder_hidden_states=text, timestep=time * CLOCK, return_dict=False)[0]
    return out


class _Rotated:
    """diffusers' attention processor, with the rotary embeddings of the one grid that there is.

    The model need not be given them with every call.
    """

    def __init__(self, inner: Any, rotary: tuple[Tensor, Tensor]) -> None:
        self.inner, self.rotary = inner, rotary

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: Tensor | None = None, image_rotary_emb: Any = None) -> Any:
        """As the processor inside."""
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, self.rotary)


def _rotated(model: Any) -> Any:
    """The same model, with rotary embeddings of its grid in its attention processors."""
    from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid(model)
    cosine, sine = get_3d_rotary_pos_embed(model.config.attention_head_dim, ((0, 0), (height, width)),
                                           (height, width), frames, theta=THETA)
    model.set_attn_processor(_Rotated(CogVideoXAttnProcessor2_0(), (cosine, sine)))
    return model


def train(model: Any, steps: int, seed: int = 0, *, batch: int = 2, rate: float = 5e-3,
          progress: bool | None = None) -> list[float]:
    """Train in place on digits of the training part; new videos at every step.

    Args:
        model: a :func:`denoiser`, left in evaluation mode.
        steps: of AdamW; the learning rate rises for a twentieth of them and then falls to 0 as a half cosine.
        seed: of videos, noise and times.
        batch: videos of a step.
        rate: the largest learning rate.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        The mean squared error of each step.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"train: expected steps >= 1 and batch >= 1, got steps={steps}, batch={batch}")
    videos = moving_digits(steps * batch, seed)
    g = torch.Generator().manual_seed(seed + 1)

    def loss(step: int) -> Tensor:
        part = slice(step * batch, (step + 1) * batch)
        frames, text = videos.frames[part], videos.captions[part]
        noise = torch.randn(frames.shape, generator=g)
        time = torch.sigmoid(torch.randn(len(frames), generator=g))
        at = time.view(-1, 1, 1, 1, 1)
        return (velocity(model, (1 - at) * frames + at * noise, text, time) - (noise - frames)).square().mean()

    losses = fit(model, loss, steps=steps, clip=1.0, label="training a video model", progress=progress,
                 optimizer=lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.01),
                 schedule=lambda optimizer: warmup_cosine(optimizer, steps))
    model.eval()
    return losses


@torch.no_grad()
def sample(model: Any, text: Tensor, seed: int = 0, *, steps: int = 20, progress: bool | None = None) -> Tensor:
    """Videos from noise by Euler steps, (N, 8, 1, 16, 16) in [-1, 1].

    The timesteps that the model is given fall from 1000, from which an attached backend knows the denoising step; say
    ``attach(..., steps=steps)`` where it has to know their number.

    Args:
        model: a trained :func:`denoiser`.
        text: (N, 3, 16) captions.
        seed: of the noise; the same for each way of attention makes videos that can be compared.
        steps: of the sampler.
        progress: show a progress bar; None: only on a terminal.
    """
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps}")
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(len(text), FRAMES, 1, CANVAS, CANVAS, generator=g)
    for step in track(range(steps), "making videos", show=progress):
        time = torch.full((len(text),), 1 - step / steps)
        state = state - velocity(model, state, text, time) / steps
    return state.clamp(-1, 1)


def trained(steps: int = 2400, seed: int = 0, *, batch: int = 2, patch: int = 2, progress: bool | None = None) -> Any:
    """A trained :func:`denoiser`, in evaluation mode; trained once and then read from the cache of the lab.

    Args:
        steps, batch: of :func:`train`; 2400 steps of 2 take about four minutes on one core.
        seed: of weights and training.
        patch: of :func:`denoiser`.
        progress: show a progress bar; None: only on a terminal.
    """
    from looseleaf_lab import cache

    blank = denoiser(seed, patch=patch)
    name = f"moving-digits-v2-p{patch}-s{steps}-b{batch}-seed{seed}"

    def build(folder: Path) -> None:
        train(blank, steps, seed, batch=batch, progress=progress)
        blank.save_pretrained(folder)

    with _quiet():
        folder = cache.build_once(cache_dir() / "models" / name, build)
        return _rotated(type(blank).from_pretrained(folder)).eval()


@functools.lru_cache(maxsize=4)
def _components(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and 16 principal components of real videos of the training part, (P,) and (P, 16) fp64."""
    flat = moving_digits(count, seed).frames.flatten(1).double()
    mean = flat.mean(0)
    return mean, torch.linalg.svd(flat - mean, full_matrices=False).Vh[:16].T


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Fréchet distance of two sets of videos in 16 principal components of real ones; the smaller the better.

    The formula of the Fréchet inception distance, with components of the pixels in place of a network.

    Args:
        one, two: (N, 8, 1, 16, 16), 32 videos or more of each.

    Raises:
        ValueError: fewer videos.
    """
    if min(len(one), len(two)) < 32:
        raise ValueError(f"frechet_distance: expected 32 videos or more of each, got {len(one)} and {len(two)}")
    mean, components = _components(1000, 12345)
    features = [(x.flatten(1).double() - mean) @ components for x in (one, two)]
    means = [f.mean(0) for f in features]
    covariances = [torch.cov(f.T) for f in features]
    root = _root(covariances[0])
    middle = _root(root @ covariances[1] @ root)
    return float((means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * middle.trace())


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars of diffusers, which a log cannot use."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
