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


class Learned(nn.Module):
    """A denoiser of the world that is trained: pictures to be learned, and how much words and noise speak for each.

    Args:
        pictures: (count, 3, 8, 8) that it begins with, such as some of the training's.
        width: of the network that reads words.
    """

    log_snr_range = (-8.0, 2.0)

    def __init__(self, pictures: Tensor, width: int = 128) -> None:
        super().__init__()
        self.pictures = nn.Parameter(pictures.flatten(1).clone())
        self.words = nn.Sequential(nn.Linear(len(WORDS), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                   nn.Linear(width, len(pictures)))
        self.trust = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 1))
        self.log_std = nn.Parameter(torch.tensor(-1.0))

    def clean(self, z: Tensor, log_snr: Tensor, bags: Tensor) -> Tensor:
        """The picture to be expected behind ``z``."""
        s, rest = (torch.sigmoid(sign * log_snr)[:, None] for sign in (1, -1))
        spread, flat = self.log_std.exp() ** 2, z.flatten(1)
        likeness = s.sqrt() * (flat @ self.pictures.T) - s / 2 * self.pictures.square().sum(1)
        trust = self.trust(log_snr[:, None] / 4).exp() / (s * spread + rest)
        weights = torch.softmax(trust * likeness + self.words(bags), 1)
        kept = s.sqrt() * spread / (s * spread + rest)
        out: Tensor = (kept * flat + (1 - kept * s.sqrt()) * (weights @ self.pictures)).view(z.shape)
        return out

    def loss(self, x: Tensor, bags: Tensor, draw: torch.Generator) -> Tensor:
        """Squared error of the noise at log-SNRs drawn over the whole range, tempered where little noise is left."""
        a = self.log_snr_range[0] + (self.log_snr_range[1] - self.log_snr_range[0]) * torch.rand(len(x), generator=draw)
        s, rest = (torch.sigmoid(sign * a).view(-1, 1, 1, 1) for sign in (1, -1))
        clean = x + STD * torch.randn(x.shape, generator=draw)
        z = s.sqrt() * clean + rest.sqrt() * torch.randn(x.shape, generator=draw)
        return ((s + 0.05) * (self.clean(z, a, bags) - clean).square()).mean()

    def eps(self, z: Tensor, log_snr: Tensor, condition: Sequence[str]) -> Tensor:
        """The noise in ``z``, see :class:`looseleaf_diffusionpid.Denoiser`."""
        bags = torch.zeros(len(condition), len(WORDS))
        for n, text in enumerate(condition):
            bags[n, [WORDS.index(word) for word in text.split()]] = 1
        s, rest = (torch.sigmoid(sign * log_snr.float()).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
        return ((z.float() - s * self.clean(z.float(), log_snr.float(), bags)) / rest).to(z.dtype)


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
