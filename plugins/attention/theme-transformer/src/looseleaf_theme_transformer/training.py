"""Training rows of annotated pieces, and batches of them for transformers' ``Trainer`` or a loop of your own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from looseleaf_theme_transformer.music import Piece
from looseleaf_theme_transformer.tokens import PITCHES, ThemeTokenizer

Row = dict[str, list[int]]


def training_rows(pieces: Sequence[Piece], tokenizer: ThemeTokenizer, *, length: int = 513,
                  starts: Literal["every", "all", "theme"] = "every", prompt: bool = False) -> list[Row]:
    """Pieces cut into segments, each with its theme and theme labels.

    Args:
        pieces: with theme regions, such as those of :meth:`ThemeRetriever.annotate`.
        tokenizer: the vocabulary.
        length: tokens of a segment.
        starts: a segment begins every ``length - 1`` tokens and is kept if a theme marker is in it, as in the authors'
            data; ``"all"``: all are kept [ours]; ``"theme"``: one begins at each Theme_Start, as in their script of
            today.
        prompt: put the theme in front of the piece before it is cut, for the prompt baseline.

    Raises:
        ValueError: a piece without theme regions; the message names it.
    """
    rows: list[Row] = []
    markers = {tokenizer.id("Theme_Start"), tokenizer.id("Theme_End")}
    for piece in pieces:
        if not piece.themes:
            raise ValueError(f"{piece.name}, bars 1 to {piece.bars}: expected theme regions, got none: annotate it "
                             "with a ThemeRetriever first")
        theme, ids = tokenizer.theme(piece), tokenizer.encode(piece)
        labels = tokenizer.labels(torch.tensor(ids)).tolist()
        if prompt:
            ids, labels = theme + ids, [0] * len(theme) + labels
        firsts = range(0, max(1, len(ids) - 1), length - 1) if starts != "theme" else [
            n for n, i in enumerate(ids) if i == tokenizer.id("Theme_Start")]
        for first in firsts:
            part = ids[first:first + length]
            if starts == "all" or markers & set(part):
                rows.append({"input_ids": part, "theme_labels": labels[first:first + length], "theme_ids": theme})
    return rows


@dataclasses.dataclass
class ThemeCollator:
    """Makes a padded batch of rows; call it with a list of them.

    Args:
        tokenizer: the vocabulary.
        transpose: move theme and piece together by a random number of semitones, at most this many either way and
            never out of range; None: over the whole range, as the authors do; 0: not at all.
        skip: kinds of tokens that are left out of the loss, such as ``("Note-Velocity",)`` where they are constant.
        seed: of the transpositions.
    """

    tokenizer: ThemeTokenizer
    transpose: int | None = None
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._draw = torch.Generator().manual_seed(self.seed)
        self._pitches = self.tokenizer.pitches()
        self._skipped = torch.tensor([self.tokenizer.token(n).kind in self.skip for n in range(len(self.tokenizer))])

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Tensors ``input_ids``, ``theme_labels``, ``theme_ids`` and ``labels``, (B, L) and (B, M) int64."""
        moved = []
        for row in rows:
            ids, theme = torch.tensor(row["input_ids"]), torch.tensor(row["theme_ids"])
            by = self._by(torch.cat([ids, theme]))
            moved.append((self.tokenizer.transpose(ids, by), self.tokenizer.transpose(theme, by),
                          torch.tensor(row["theme_labels"])))
        ids, themes, labels = (torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True)
                               for column in zip(*moved, strict=True))
        targets = ids.masked_fill((ids == 0) | self._skipped[ids], -100)
        return {"input_ids": ids, "theme_labels": labels, "theme_ids": themes, "labels": targets}

    def _by(self, ids: Tensor) -> int:
        pitches = self._pitches[ids]
        pitches = pitches[pitches > 0]
        if not len(pitches):
            return 0
        low, high = 1 - int(pitches.min()), PITCHES - int(pitches.max())
        if self.transpose is not None:
            low, high = max(low, -self.transpose), min(high, self.transpose)
        return int(torch.randint(low, high + 1, (), generator=self._draw))


def paper_optimizer(parameters: Any, steps: int, lr: float = 2e-4, last: float = 1e-5, warmup: int = 400,
                    ) -> tuple[torch.optim.Optimizer, Any]:
    """Adam and its schedule as the authors train: ``warmup`` steps up to ``lr``, then half a cosine down to ``last``.

    Also clip the norm of gradients at 3, and take 8 segments a step.
    """
    optimizer = torch.optim.Adam(parameters, lr)
    return optimizer, LambdaLR(optimizer, learning_rate(steps, last / lr, warmup))


def learning_rate(steps: int, last: float = 0.05, warmup: int = 400) -> Callable[[int], float]:
    """Step -> factor of the learning rate: up in ``warmup`` steps, then half a cosine down to ``last``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
