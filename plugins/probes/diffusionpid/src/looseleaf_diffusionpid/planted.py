"""A small world of pictures whose words are redundant, biased, independent or meaningful only together, as planted.

A picture of 8 x 8 pixels shows a shape in a colour and a patch in its corner. Each shape has a name and a synonym. Each
name favours a colour with a probability of its own, while every colour is as frequent. Two switches, each of two words,
decide the patch by XOR and show nowhere else.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from looseleaf_diffusionpid.information import Denoiser, Mixture

SHAPES, SIZE, STD = 8, 8, 0.1
COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, -1.0))
BIASES = tuple(0.25 + 0.75 * k / (SHAPES - 1) for k in range(SHAPES))
"""Probability of the favoured colour of each name, from that of balance to certainty."""
NAMES, SYNONYMS = [f"name{k}" for k in range(SHAPES)], [f"synonym{k}" for k in range(SHAPES)]
HUES, SWITCHES = [f"colour{c}" for c in range(4)], ["u0", "u1", "v0", "v1"]
WORDS = [*NAMES, *SYNONYMS, *HUES, *SWITCHES]


def favourite(k: int) -> int:
    """The colour that name ``k`` favours: names of complementary biases share one, so that colours are balanced."""
    return min(k, SHAPES - 1 - k)


class World(Mixture):
    """The world and its exact denoiser, for every text of :data:`WORDS`.

    Args:
        seed: of the shapes.
    """

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.facts = [(k, c, p) for k in range(SHAPES) for c in range(4) for p in range(2)]
        shapes = torch.rand(SHAPES, 6, SIZE, generator=draw) < 0.5
        means = torch.full((len(self.facts), 3, SIZE, SIZE), 0.0)
        for n, (k, c, p) in enumerate(self.facts):
            for channel in range(3):
                means[n, channel, :6][shapes[k]] = COLOURS[c][channel]
            means[n, :, 6:, 6:] = 1.0 - 2.0 * p
        super().__init__(means, STD, {"": [self._prior(*fact) for fact in self.facts]})

    @staticmethod
    def _prior(k: int, c: int, p: int) -> float:
        return 1 / SHAPES * (BIASES[k] if c == favourite(k) else (1 - BIASES[k]) / 3) / 2

    def add(self, text: str) -> str:
        """Make a text of words known to the denoiser; gives it back."""
        if text not in self.conditions:
            words = text.split()
            weights = torch.tensor([self._prior(*fact) * all(true(word, words, *fact) for word in words)
                                    for fact in self.facts], dtype=torch.float64)
            self.conditions[text] = weights / weights.sum()
        return text

    def captions(self, count: int, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Clean pictures (count, 3, 8, 8) float32, and which words their captions have (count, words) float32.

        Each true word is there by a half; a tenth of the captions is empty.
        """
        prior = self.conditions[""].tolist()
        rows = draw.choices(range(len(self.facts)), prior, k=count)
        bags = torch.zeros(count, len(WORDS))
        for n, row in enumerate(rows):
            k, c, p = self.facts[row]
            u = draw.randrange(2)
            words = [NAMES[k], SYNONYMS[k], HUES[c], f"u{u}", f"v{u ^ p}"]
            if draw.random() >= 0.1:
                bags[n, [WORDS.index(word) for word in words if draw.random() < 0.5]] = 1
        return self.means[rows].float(), bags


def true(word: str, words: Sequence[str], k: int, c: int, p: int) -> bool:
    """Whether a word may stand in a caption of ``words`` for the shape, colour and patch."""
    if word in SWITCHES:
        us, vs = ([w[1] for w in words if w in SWITCHES and w[0] == letter] for letter in "uv")
        return not (us and vs) or int(us[0]) ^ int(vs[0]) == p
    return word in (NAMES[k], SYNONYMS[k], HUES[c])


class Network(nn.Module):
    """A small conditional denoiser of the world, with the preconditioning of EDM (Karras et al., 2022)."""

    log_snr_range = (-8.0, 2.0)
    spread = 0.6
    """Standard deviation of the pictures' numbers."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        size = 3 * SIZE * SIZE
        self.words, self.levels = nn.Linear(len(WORDS), width), nn.Linear(16, width)
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, size)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(),
                                                  nn.Linear(2 * width, width)) for _ in range(3))

    def residual(self, z: Tensor, log_snr: Tensor, bags: Tensor) -> Tensor:
        """What is left for the network to predict, of variance 1."""
        waves = log_snr[:, None] / 8 * 2.0 ** torch.arange(8)
        scaled = z / (torch.sigmoid(log_snr) * self.spread ** 2 + torch.sigmoid(-log_snr)).sqrt().view(-1, 1, 1, 1)
        context = self.words(bags) + self.levels(torch.cat([waves.sin(), waves.cos()], 1))
        x = self.first(scaled.flatten(1)) + context
        for layer in self.layers:
            x = x + layer(x + context)
        return self.last(x).view(z.shape)  # type: ignore[no-any-return]

    def factors(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """``skip`` and ``out``: the clean picture is ``skip z + out residual``."""
        s, n = (torch.sigmoid(sign * log_snr).view(-1, 1, 1, 1) for sign in (1, -1))
        variance = s * self.spread ** 2 + n
        return s.sqrt() * self.spread ** 2 / variance, self.spread * (n / variance).sqrt()

    def loss(self, x: Tensor, bags: Tensor, draw: torch.Generator) -> Tensor:
        """Squared error at log-SNRs drawn over the whole range; the pictures get their own noise."""
        a = self.log_snr_range[0] + (self.log_snr_range[1] - self.log_snr_range[0]) * torch.rand(len(x), generator=draw)
        s, n = (torch.sigmoid(sign * a).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
        clean = x + STD * torch.randn(x.shape, generator=draw)
        z = s * clean + n * torch.randn(x.shape, generator=draw)
        skip, out = self.factors(a)
        return (self.residual(z, a, bags) - (clean - skip * z) / out).square().mean()

    def eps(self, z: Tensor, log_snr: Tensor, condition: Sequence[str]) -> Tensor:
        """The noise in ``z``, see :class:`looseleaf_diffusionpid.Denoiser`."""
        bags = torch.zeros(len(condition), len(WORDS))
        for n, text in enumerate(condition):
            bags[n, [WORDS.index(word) for word in text.split()]] = 1
        a = log_snr.float()
        skip, out = self.factors(a)
        s, n_ = (torch.sigmoid(sign * a).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
        clean = skip * z.float() + out * self.residual(z.float(), a, bags)
        return ((z.float() - s * clean) / n_).to(z.dtype)


@torch.no_grad()
def sample(denoiser: Denoiser, texts: Sequence[str], noise: Tensor, *, steps: int = 30, low: float = -8.0,
           high: float = 2.0) -> Tensor:
    """Pictures of texts by DDIM: the same noise gives pictures that differ by their texts alone.

    Args:
        denoiser: of the world.
        texts: one for each row.
        noise: (n, 3, 8, 8).
        steps: from log-SNR ``low`` to ``high``.
    """
    levels = torch.linspace(low, high, steps + 1, dtype=torch.float64)
    z, clean = noise, noise
    for a, following in itertools.pairwise(levels):
        e = denoiser.eps(z, a.expand(len(z)), texts)
        clean = (z - math.sqrt(torch.sigmoid(-a)) * e) / math.sqrt(torch.sigmoid(a))
        z = math.sqrt(torch.sigmoid(following)) * clean + math.sqrt(torch.sigmoid(-following)) * e
    return clean
