"""Information of texts about a picture from a denoiser's errors, and its partial decomposition.

The noise channel at log-SNR ``a`` is ``z = sqrt(s(a)) x + sqrt(s(-a)) e`` with the sigmoid ``s`` and ``e`` of N(0, I).
Formulas are those of Info-Decomp (Kong et al., arXiv 2310.07972), on which the paper builds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Redundancy = Literal["min", "pointwise"]


@runtime_checkable
class Denoiser(Protocol):
    """What a denoiser must have; anything else of the same names as :class:`PipelineDenoiser` is used where present.

    Those are ``log_snr_range`` (the levels it knows), ``nearest(log_snr)`` (the level that it can really be given),
    ``latent(picture)`` and ``generate(prompt, seed)``.
    """

    def eps(self, z: Tensor, log_snr: Tensor, condition: Sequence[str]) -> Tensor:
        """The noise in ``z``.

        Args:
            z: (n, C, H, W), of variance 1 where the data have it.
            log_snr: (n,) log-SNR of each, float64.
            condition: n texts; "" is the empty one.
        """


# --------------------------------------------------------------------------------------------------- noise levels
def logistic_samples(count: int, *, loc: float = 1.0, scale: float = 2.0, clip: float = 3.0,
                     limits: tuple[float, float] = (-math.inf, math.inf),
                     generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Log-SNRs from a truncated logistic, and weights whose mean times a function is its integral.

    Args:
        count: how many.
        loc, scale: of the logistic.
        clip: scales on either side of ``loc``; the mean weight is ``2 * scale * clip``.
        limits: levels that the denoiser knows; the interval is cut to them.
        generator: draws.

    Returns:
        ``(log_snr, weights)``, both (count,) float64.

    Raises:
        ValueError: the interval and the limits have nothing in common.
    """
    low, high = max(loc - scale * clip, limits[0]), min(loc + scale * clip, limits[1])
    if not low < high:
        raise ValueError(f"loc, scale, clip: expected an interval that meets the log-SNRs {limits[0]:.2f} to "
                         f"{limits[1]:.2f} of the noise schedule, got {loc - scale * clip:.2f} to "
                         f"{loc + scale * clip:.2f}")
    ends = torch.sigmoid((torch.tensor([low, high], dtype=torch.float64) - loc) / scale)
    u = ends[0] + (ends[1] - ends[0]) * torch.rand(count, dtype=torch.float64, generator=generator)
    # density of the logistic is u (1 - u) / scale
    return loc + scale * torch.logit(u), scale * (ends[1] - ends[0]) / (u * (1 - u))


# ----------------------------------------------------------------------------------------------------- information
@dataclasses.dataclass
class Observation:
    """What a denoiser said about one picture; the information is that of each text beyond the first, the context.

    Attributes:
        texts: the context and T - 1 texts.
        log_snr, weights: (n,) float64 of each noisy sample; the mean of weights times a function is its integral.
        errors: (T, n) squared errors of the noise, summed over the picture.
        standard: (T, n) ``(||e - e_0||^2 - ||e - e_y||^2) / 2``; ``standard_map`` (T, H, W) their integral by pixel.
        orthogonal: (T, n) ``||e_0 - e_y||^2 / 2``; ``orthogonal_map`` (T, H, W) likewise.
        groups: samples that share a log-SNR stand one behind the other, so many each.
        dimensions: numbers of a picture.
    """

    texts: list[str]
    log_snr: Tensor
    weights: Tensor
    errors: Tensor
    standard: Tensor
    orthogonal: Tensor
    standard_map: Tensor
    orthogonal_map: Tensor
    groups: int
    dimensions: int

    def contributions(self, estimator: str) -> Tensor:
        """(T, independent samples): their mean is the information of each text in nats."""
        weighted = self.weights * (self.standard if estimator == "standard" else self.orthogonal)
        return weighted.unflatten(1, (-1, self.groups)).mean(2)

    def negative_log_likelihood(self) -> Tensor:
        """(T,) of the picture given each text, in nats; the integral ends where the samples do."""
        excess = self.errors - self.dimensions * torch.sigmoid(self.log_snr)
        return self.dimensions / 2 * math.log(2 * math.pi * math.e) + (self.weights * excess).mean(1) / 2


@torch.no_grad()
def observe(denoiser: Denoiser, x: Tensor, texts: Sequence[str], log_snr: Tensor, weights: Tensor, noise: Tensor, *,
            groups: int = 1, batch: int = 32, step: Callable[[int], Any] = lambda rows: None) -> Observation:
    """Run a denoiser on the same noisy pictures under several texts.

    Args:
        denoiser: see :class:`Denoiser`.
        x: (C, H, W) picture or latent.
        texts: the context first.
        log_snr, weights: (n,) float64, see :func:`logistic_samples`.
        noise: (n, C, H, W) of N(0, I), in the dtype of ``x``.
        groups: samples of the same log-SNR, one behind the other.
        batch: most rows at a time; each noisy picture takes one for each different text.
        step: called with the number of rows after each forward pass.

    Raises:
        ValueError: a picture or prediction that is not finite or of another shape.
    """
    if x.ndim != 3 or not bool(torch.isfinite(x).all()):
        bad = f"the shape {tuple(x.shape)}" if x.ndim != 3 else "NaN or infinity"
        raise ValueError(f"picture: expected finite numbers (C, H, W), got {bad}: a VAE in half precision may "
                         "overflow, use float32, such as pipeline.vae.to(torch.float32)")
    different = list(dict.fromkeys(texts))
    at = [different.index(text) for text in texts]
    level = getattr(denoiser, "nearest", lambda a: a)(log_snr)
    wide = torch.promote_types(x.dtype, torch.float32)  # squares of half precision lose digits and overflow
    sums: dict[str, list[Tensor]] = {"errors": [], "standard": [], "orthogonal": []}
    maps = torch.zeros(2, len(texts), *x.shape[1:], dtype=torch.float64)
    size = max(1, batch // len(different))
    for begin in range(0, len(log_snr), size):
        a, e = level[begin:begin + size], noise[begin:begin + size].to(x.device)
        share = (weights[begin:begin + size] / len(log_snr)).view(-1, 1, 1)
        signal, rest = (torch.sigmoid(sign * a).sqrt().to(wide).to(x.device).view(-1, 1, 1, 1) for sign in (1, -1))
        z = (signal * x + rest * e).to(x.dtype)
        rows = z.repeat(len(different), 1, 1, 1)
        predicted = denoiser.eps(rows, a.repeat(len(different)), [text for text in different for _ in range(len(a))])
        if predicted.shape != rows.shape or not bool(torch.isfinite(predicted).all()):
            got = f"the shape {tuple(predicted.shape)}" if predicted.shape != rows.shape else "NaN or infinity"
            raise ValueError(f"denoiser: expected finite noise of the shape {tuple(rows.shape)}, got {got}: "
                             "a model in half precision may overflow, use float32 or bfloat16")
        noises = predicted.to(wide).unflatten(0, (len(different), len(a)))[at]
        error = (e.to(wide) - noises).square().sum(2).cpu().double()  # channels only: (T, k, H, W)
        gain = (error[:1] - error) / 2
        apart = (noises[:1] - noises).square().sum(2).cpu().double() / 2
        for name, value in (("errors", error), ("standard", gain), ("orthogonal", apart)):
            sums[name].append(value.sum((2, 3)))
        maps[0] += (share * gain).sum(1)
        maps[1] += (share * apart).sum(1)
        step(len(rows))
    return Observation(list(texts), level.double().cpu(), weights, torch.cat(sums["errors"], 1),
                       torch.cat(sums["standard"], 1), torch.cat(sums["orthogonal"], 1), maps[0], maps[1], groups,
                       x.numel())


# ---------------------------------------------------------------------------------------------------- decomposition
class Parts(NamedTuple):
    """Redundant, unique and synergistic information of two texts, numbers or maps, in nats."""

    R: Any
    U1: Any
    U2: Any
    S: Any


def decompose(i1: Any, i2: Any, i12: Any, redundancy: Redundancy = "min",
              surprisals: tuple[float, float] = (0.0, 0.0)) -> Parts:
    """The partial information decomposition; ``R + U1 = i1``, ``R + U2 = i2`` and all four make ``i12``.

    Args:
        i1, i2, i12: information of the first text, the second, and both; numbers, or maps (decomposed by pixel).
        redundancy: "min" of i1 and i2; or "pointwise", specificity minus ambiguity
            ``min(h1, h2) - min(h1 - i1, h2 - i2)`` after Finn & Lizier (2018).
        surprisals: h1 and h2, ``-log p`` of the texts in nats; on maps, of one pixel.
    """
    one, two, both = (torch.as_tensor(i, dtype=torch.float64) for i in (i1, i2, i12))
    if redundancy == "min":
        shared = torch.minimum(one, two)
    else:
        h1, h2 = surprisals
        shared = min(h1, h2) - torch.minimum(h1 - one, h2 - two)
    return Parts(shared, one - shared, two - shared, both - one - two + shared)


def with_errors(contributions: Tensor, redundancy: Redundancy = "min",
                surprisals: tuple[float, float] = (0.0, 0.0)) -> dict[str, tuple[float, float]]:
    """``I1``, ``I2``, ``I12``, ``R``, ``U1``, ``U2``, ``S``: value and standard error of a picture, in nats.

    The redundancy is that of the sums, not the sum of the pixels'. Its error is that of the text that decides it.

    Args:
        contributions: (3, n) of the first text, the second, and both; independent samples whose mean is wanted.
        redundancy, surprisals: see :func:`decompose`.
    """
    one, two, both = contributions
    means = [float(c.mean()) for c in contributions]
    h1, h2 = surprisals
    first = means[0] <= means[1] if redundancy == "min" else h1 - means[0] <= h2 - means[1]
    shared = (one if first else two) + (0 if redundancy == "min" else min(h1, h2) - (h1 if first else h2))
    samples = {"I1": one, "I2": two, "I12": both, "R": shared, "U1": one - shared, "U2": two - shared,
               "S": both - one - two + shared}
    return {name: (float(s.mean()), float(s.std()) / math.sqrt(len(s)) if len(s) > 1 else math.nan)
            for name, s in samples.items()}


# -------------------------------------------------------------------------------------------------- exact denoisers
class Mixture:
    """The exact denoiser of a mixture of Gaussians, whose information is known: a case to check against.

    Args:
        means: (K, C, H, W) of the components.
        std: standard deviation of every number of a component.
        conditions: text -> (K,) weights of the components, which sum to 1; "" must be among them.

    Raises:
        ValueError: weights of another number, negative, or of another sum.
    """

    log_snr_range = (-math.inf, math.inf)

    def __init__(self, means: Tensor, std: float, conditions: dict[str, Sequence[float]]) -> None:
        self.means, self.std = means.double(), std
        self.conditions = {text: torch.as_tensor(w, dtype=torch.float64) for text, w in conditions.items()}
        for text, w in self.conditions.items():
            if w.shape != (len(means),) or bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-9:
                raise ValueError(f"conditions[{text!r}]: expected {len(means)} non-negative weights of sum 1, "
                                 f"got {w.tolist()[:8]}")
        if "" not in self.conditions:
            raise ValueError(f"conditions: expected weights for the empty text \"\", got those of "
                             f"{sorted(self.conditions)[:8]}")

    def eps(self, z: Tensor, log_snr: Tensor, condition: Sequence[str]) -> Tensor:
        """The noise to be expected in ``z``, see :class:`Denoiser`."""
        signal, rest = (torch.sigmoid(s * log_snr).view(-1, 1, 1, 1) for s in (1, -1))
        variance = signal * self.std ** 2 + rest
        weights = self._log_posterior(z.double(), signal, variance, condition).exp()
        mean = torch.einsum("nk,k...->n...", weights, self.means)
        return (rest.sqrt() * (z.double() - signal.sqrt() * mean) / variance).to(z.dtype)

    def log_prob(self, x: Tensor, condition: str) -> Tensor:
        """(n,) log-density of pictures (n, C, H, W) given a text, in nats."""
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        return torch.logsumexp(self._joint(x.double(), one, one * self.std ** 2, [condition] * len(x)), 1)

    def sample(self, condition: str, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, C, H, W) pictures given a text, float64."""
        rows = torch.multinomial(self._weights([condition])[0].exp(), count, True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], dtype=torch.float64, generator=generator)
        return self.means[rows] + self.std * noise

    def _weights(self, condition: Sequence[str]) -> Tensor:
        missing = [text for text in condition if text not in self.conditions]
        if missing:
            raise ValueError(f"condition: expected one of {sorted(self.conditions)}, got {missing[0]!r}")
        return torch.stack([self.conditions[text] for text in condition]).log()

    def _joint(self, z: Tensor, signal: Tensor, variance: Tensor, condition: Sequence[str]) -> Tensor:
        means = self.means.flatten(1)
        flat, s, v = z.flatten(1), signal.flatten(1), variance.flatten(1)
        squares = flat.square().sum(1, keepdim=True) - 2 * s.sqrt() * (flat @ means.T) + s * means.square().sum(1)
        return self._weights(condition) - squares / (2 * v) - means.shape[1] / 2 * (2 * math.pi * v).log()

    def _log_posterior(self, z: Tensor, signal: Tensor, variance: Tensor, condition: Sequence[str]) -> Tensor:
        return torch.log_softmax(self._joint(z, signal, variance, condition), 1)


CASES: dict[str, dict[str, tuple[float, float]]] = {
    "xor": {"": (0.5, 0.5), "a": (0.5, 0.5), "b": (0.5, 0.5), "a b": (1.0, 0.0)},
    "copy": {"": (0.5, 0.5), "a": (1.0, 0.0), "b": (1.0, 0.0), "a b": (1.0, 0.0)},
    "unique": {"": (0.5, 0.5), "a": (1.0, 0.0), "b": (0.5, 0.5), "a b": (1.0, 0.0)},
    "and": {"": (0.25, 0.75), "a": (0.5, 0.5), "b": (0.5, 0.5), "a b": (1.0, 0.0)},
}
"""Chances of the two pictures under each text: both inputs are fair coins that came up 1."""


def known_case(name: str, *, distance: float = 12.0) -> Mixture:
    """A mixture of two pictures that two binary inputs select, of one pixel and two channels.

    The information is in multiples of log 2: XOR has S 1; copy has R 1; unique has U1 1; AND has R 1 and S 1.

    Args:
        name: of :data:`CASES`.
        distance: of the two means in standard deviations: the further, the more exact the multiples.
    """
    means = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).view(2, 2, 1, 1)
    return Mixture(means, math.sqrt(8) / distance, dict(CASES[name]))
