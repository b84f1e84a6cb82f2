"""How a stacked encoder is trained: pictures of one identity together, and an example of the same edit beside each."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.files import load_tensors, save_tensors
from looseleaf.fingerprint import content_fingerprint
from looseleaf.modes import own_random_state, training, with_gradients
from looseleaf.progress import bar
from looseleaf.resume import StateError
from looseleaf_anypattern.encoder import Encoded, StackedEncoder, stack
from looseleaf_anypattern.patterns import Pattern, apply, find

FORMAT = "looseleaf.anypattern/1"


class Samples(NamedTuple):
    """A batch: what is seen, and what should be said of it.

    Attributes:
        pictures, replicas, originals: uint8 (B, H, W, 3); an original has itself in all three.
        identities: (B,) int64.
        labels: (B, patterns) fp32, 1 where a pattern was applied.
    """

    pictures: np.ndarray
    replicas: np.ndarray
    originals: np.ndarray
    identities: np.ndarray
    labels: np.ndarray


def sample(images: np.ndarray, patterns: Sequence[Pattern], rng: np.random.Generator, *, batch: int,
           per_identity: int = 4, most: int = 2, context: Literal["exact", "none"] = "exact") -> Samples:
    """Draw a batch: of each identity its original and replicas, each with an example of exactly the same patterns.

    Args:
        images: uint8 (identities, H, W, 3), one original each.
        patterns: those to draw from.
        rng: of everything.
        batch: samples, in groups of ``per_identity``: one original, the others replicas (ours).
        per_identity: samples of an identity; the authors' 4.
        most: patterns of a replica, 1 to this many, applied one after the other (ours).
        context: ``exact``: the same set, with its own parameters, on another picture than the sample's own;
            ``none``: every sample is stacked on itself.
    """
    chosen = rng.choice(len(images), max(1, batch // per_identity), replace=len(images) < batch // per_identity)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    labels = np.zeros((len(chosen) * per_identity, len(patterns)), np.float32)
    for identity in chosen:
        own = images[identity]
        rows.append((own, own, own))
        for _ in range(per_identity - 1):
            places = rng.choice(len(patterns), int(rng.integers(1, min(most, len(patterns)) + 1)), replace=False)
            which = [patterns[p] for p in places]
            labels[len(rows), places] = 1
            edited = apply(which, own, rng)
            if context == "none":
                rows.append((edited, edited, edited))
                continue
            other = int(rng.integers(len(images) - 1))
            example = images[other + (other >= identity)]  # never the sample's own original
            rows.append((edited, apply(which, example, rng), example))
    pictures, replicas, originals = (np.stack(part) for part in zip(*rows, strict=True))
    return Samples(pictures, replicas, originals, np.repeat(chosen, per_identity), labels)


def margin_loss(cosines: Tensor, targets: Tensor, margin: float, scale: float) -> Tensor:
    """CosFace: cross-entropy of ``scale * (cos_c - margin * [c = y])``; cosines (B, classes), targets (B,)."""
    right = F.one_hot(targets, cosines.shape[1]).to(cosines)
    return F.cross_entropy(scale * (cosines - margin * right), targets)


class Losses(nn.Module):
    """The three terms, and the weights of identities that two of them have.

    Args:
        width, descriptor: sizes of features and descriptors.
        identities: how many there are.
        margin: of features and of descriptors.
        scale: s of both.
        pattern_weight: of the binary cross-entropy of the patterns, a mean over samples and patterns.
    """

    def __init__(self, width: int, descriptor: int, identities: int, margin: tuple[float, float] = (0.35, 0.6),
                 scale: float = 64.0, pattern_weight: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Parameter(0.02 * torch.randn(identities, width))
        self.descriptors = nn.Parameter(0.02 * torch.randn(identities, descriptor))
        self.margin, self.scale, self.pattern_weight = margin, scale, pattern_weight

    def forward(self, encoded: Encoded, identities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three weighted terms, scalars: identity by features, identity by descriptors, patterns."""
        first, second = (F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).T for x, w in (
            (encoded.features, self.features), (encoded.descriptor, self.descriptors)))
        patterns = F.binary_cross_entropy_with_logits(encoded.logits[:, :labels.shape[1]], labels)
        return (margin_loss(first, identities, self.margin[0], self.scale),
                margin_loss(second, identities, self.margin[1], self.scale), self.pattern_weight * patterns)


def learning_rate(step: int, steps: int) -> float:
    """Factor of the rate: from 0.01 up over a fifth of the steps, flat to two fifths, then half a cosine down."""
    done = step / steps
    if done < 0.2:
        return 0.01 + 0.99 * done / 0.2
    return 1.0 if done < 0.4 else 0.5 * (1 + math.cos(math.pi * (done - 0.4) / 0.6))


def train(encoder: StackedEncoder, images: Sequence[Any], patterns: Sequence[str | Pattern], seed: int = 0, *,
          steps: int = 10_000, batch: int = 128, per_identity: int = 4, lr: float = 3.5e-4,
          margin: tuple[float, float] = (0.35, 0.6), scale: float = 64.0, pattern_weight: float = 0.5,
          most: int = 2, ema: float = 0.9999, context: Literal["exact", "none"] = "exact",
          state_dir: str | Path | None = None, save_every: int = 200, progress: bool | None = None) -> list[float]:
    """Train an encoder, in place, to find originals with the help of an example; the average of its weights stays.

    Adam, its rate as in :func:`learning_rate`. Random numbers of a step depend on seed and step alone. The official
    batch is 512, for 25 times 10,000 steps on one GPU node; the defaults here are smaller.

    Args:
        encoder: has at least as many outputs for patterns as there are patterns; frozen parts stay frozen.
        images: one original of each identity, any pictures; exact duplicates are dropped.
        patterns: names, or patterns of your own, in the order of the encoder's outputs.
        seed: of batches and of the weights of identities.
        steps, batch, per_identity, most, context: see :func:`sample`.
        lr: highest rate.
        margin, scale, pattern_weight: see :class:`Losses`.
        ema: decay of the average of weights, at most (1 + step) / (10 + step) (the latter ours, for short runs).
        state_dir: everything is kept there each ``save_every`` steps; the same call goes on.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        The loss of each step.

    Raises:
        ValueError: fewer than two identities, no patterns, more than the encoder has outputs for, or a loss that is
            not finite.
        StateError: the state on disk is that of another training.
    """
    wanted = find(patterns)
    if not wanted or len(wanted) > encoder.n_patterns:
        raise ValueError(f"patterns: expected 1 to {encoder.n_patterns}, the outputs of the encoder, got {len(wanted)}")
    if steps < 1 or per_identity < 2 or batch < per_identity or most < 1:
        raise ValueError("train: expected steps >= 1, per_identity >= 2, batch >= per_identity and most >= 1, got "
                         f"{steps}, {per_identity}, {batch} and {most}")
    pictures = originals_of(encoder, images)
    with own_random_state(seed):
        losses = Losses(encoder.width, encoder.to_descriptor.out_features, len(pictures), margin, scale,
                        pattern_weight).to(encoder.device)
    both = nn.ModuleDict({"encoder": encoder, "losses": losses})
    average = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], lr)
    identity = {"encoder": encoder.fingerprint(), "pictures": content_fingerprint(pictures), "seed": seed,
                "patterns": [p.fingerprint() for p in wanted],
                "settings": [steps, batch, per_identity, lr, *margin, scale, pattern_weight, most, ema, context]}
    path = None if state_dir is None else Path(state_dir) / "training.safetensors"
    curve = [] if path is None else _restore(path, identity, both, average, optimizer)
    with with_gradients(), training(encoder), bar("anypattern", steps, progress) as progress_bar:
        progress_bar.update(len(curve))
        for step in range(len(curve), steps):
            rng = np.random.default_rng([seed, step])
            drawn = sample(pictures, wanted, rng, batch=batch, per_identity=per_identity, most=most, context=context)
            shown = [encoder.pixels(part) for part in drawn[:3 if context == "exact" else 1]]
            with own_random_state(int(rng.integers(2 ** 31))):  # dropout and drop path of the base
                encoded = encoder(stack(*shown))
            loss = torch.stack(losses(encoded, *(torch.from_numpy(target).to(encoder.device)
                                                 for target in (drawn.identities, drawn.labels)))).sum()
            curve.append(float(loss.detach()))
            if not math.isfinite(curve[-1]):
                raise ValueError(f"step {step}: expected a finite loss, got {curve[-1]}: lower lr")
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(step, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _average(average, encoder, min(ema, (1 + step) / (10 + step)))
            if path is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(path, identity, both, average, optimizer, curve)
            progress_bar.set_postfix(loss=f"{curve[-1]:.3g}", refresh=False)
            progress_bar.update()
    encoder.load_state_dict(average.state_dict())
    return curve


def originals_of(encoder: StackedEncoder, images: Sequence[Any]) -> np.ndarray:
    """Different pictures, see :meth:`StackedEncoder.keep`; exact duplicates are dropped.

    Raises:
        ValueError: fewer than two different ones.
    """
    rows: Sequence[np.ndarray] = list(encoder.keep(images)) if len(images) else []
    different = list({row.tobytes(): row for row in rows}.values())
    if len(different) < 2:
        raise ValueError(f"images: expected two identities or more, got {len(different)} different picture"
                         f"{'' if len(different) == 1 else 's'} of {len(rows)}: an example must be of another picture")
    return np.stack(different)


@torch.no_grad()
def _average(average: nn.Module, now: nn.Module, decay: float) -> None:
    for mean, value in zip(average.state_dict().values(), now.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)


def _save(path: Path, identity: dict[str, Any], both: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer,
          curve: list[float]) -> None:
    tensors = {f"now.{k}": v for k, v in both.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    tensors |= {f"adam.{n}.{k}": torch.as_tensor(v) for n, row in optimizer.state_dict()["state"].items()
                for k, v in row.items()}
    save_tensors(path, tensors, {"identity": identity, "curve": curve}, format=FORMAT)


def _restore(path: Path, identity: dict[str, Any], both: nn.Module, average: nn.Module,
             optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses so far; weights, average and optimiser go on from there."""
    if not path.is_file():
        return []
    try:
        tensors, info = load_tensors(path, format=FORMAT)
    except ValueError as error:
        raise StateError(f"{path}: expected the state of this training, got {error}: remove it to begin "
                         "anew") from error
    if info["identity"] != identity:
        other = [k for k, v in identity.items() if info["identity"].get(k) != v]
        raise StateError(f"{path}: expected the state of this training, got one with other {', '.join(other)}: give "
                         "another state_dir, or remove it to begin anew")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    both.load_state_dict(part("now."))
    average.load_state_dict(part("average."))
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in part("adam.").items():
        number, _, key = name.partition(".")
        states.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    curve: list[float] = info["curve"]
    return curve


__all__ = ["Losses", "Samples", "learning_rate", "margin_loss", "originals_of", "sample", "train"]
