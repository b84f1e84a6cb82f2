"""Texts and models whose answer is known: grammars over word classes, a model with planted layers, simple English."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf.plugin import In, check_fields
from looseleaf_word_class.word_model import Sizes


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Texts in which the class of a word depends on the classes of the last one or two words, and on nothing else.

    Of order 1 the next class is known from the last class alone, so that whatever separates next classes has only
    copied: the conditional GDV is 0. Of order 2 it follows from the last two classes, and the last one alone says
    nothing: next class = the sum of both, modulo the number of classes.

    Args:
        order: 1 or 2.
        classes: number of classes, an odd number where ``order`` is 2.
        words: words of each class, all of one probability.
        sharp: probability of the class that follows; the rest is shared by all classes alike.
        frequent: classes, the first ones, with an eighth of the words, each of which is therefore more frequent.
    """

    order: Annotated[int, In("[1, 2]")] = 1
    classes: Annotated[int, In(">= 2")] = 5
    words: Annotated[int, In(">= 1")] = 40
    sharp: Annotated[float, In("[0, 1]")] = 0.8
    frequent: Annotated[int, In(">= 0")] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.order == 2 and self.classes % 2 == 0:
            raise ValueError(f"Grammar.classes: expected an odd number where order is 2, got {self.classes}")

    def name(self, number: int) -> str:
        """Name of a class."""
        return f"C{number}"

    def size(self, number: int) -> int:
        """Words of a class."""
        return max(1, self.words // 8) if number < self.frequent else self.words

    def following(self, before: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The class that follows with probability ``sharp`` (and a little more)."""
        return np.asarray((before + last if self.order == 2 else last + 1) % self.classes)

    def sample(self, count: int, length: int = 40, seed: int = 0) -> list[list[tuple[str, str]]]:
        """Texts of (word, class) pairs."""
        draw = np.random.default_rng(seed)
        classes = draw.integers(0, self.classes, (count, length))
        for n in range(self.order, length):
            follows = self.following(classes[:, n - 2] if self.order == 2 else classes[:, n - 1], classes[:, n - 1])
            classes[:, n] = np.where(draw.random(count) < self.sharp, follows, classes[:, n])
        sizes = np.array([self.size(c) for c in range(self.classes)])
        words = (draw.random((count, length)) * sizes[classes]).astype(int)
        return [[(f"w{c}.{w}", self.name(c)) for c, w in zip(*row, strict=True)]
                for row in zip(classes.tolist(), words.tolist(), strict=True)]

    def vocabulary(self) -> list[str]:
        """All words."""
        return [f"w{c}.{w}" for c in range(self.classes) for w in range(self.size(c))]


class _Next(nn.Module):
    """One-hot of the class that follows, or of whether its words are frequent, at every position."""

    def __init__(self, grammar: Grammar, frequency: bool) -> None:
        super().__init__()
        self.grammar, self.frequency = grammar, frequency

    def forward(self, classes: Tensor) -> Tensor:
        numbers = classes.argmax(-1).numpy()
        before = np.concatenate([numbers[:, :1] * 0, numbers[:, :-1]], 1)
        follows = torch.from_numpy(self.grammar.following(before, numbers))
        if self.frequency:
            return nn.functional.one_hot((follows < self.grammar.frequent).long(), 2).to(classes)
        return nn.functional.one_hot(follows, self.grammar.classes).to(classes)


class _LastClass(nn.Module):
    """One-hot of the class of each word."""

    table: Tensor

    def __init__(self, grammar: Grammar) -> None:
        super().__init__()
        of = torch.tensor([int(word[1:].split(".")[0]) for word in grammar.vocabulary()])
        self.register_buffer("table", nn.functional.one_hot(of, grammar.classes).float())

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = words @ self.table
        return out


class PlantedModel(nn.Module):
    """A model over a grammar, each of whose layers holds what is known: no training, no weights to speak of.

    Layers: ``last`` has the class of the last word, ``next`` the class that follows, ``frequency`` whether the word
    that follows is one of the frequent ones, and ``noise`` random numbers that depend on the context alone. So the GDV
    of ``next`` is that of point classes where ``sharp`` is 1; what ``last`` has does not survive the condition on the
    last class, nor does ``frequency`` survive the condition on frequency; and ``noise`` has 0.
    """

    def __init__(self, grammar: Grammar, seed: int = 0) -> None:
        super().__init__()
        self.grammar = grammar
        self._ids = {word: n for n, word in enumerate(grammar.vocabulary())}
        self.config = Sizes(len(self._ids), len(self._ids), 4)
        self.embedding = nn.Embedding.from_pretrained(torch.eye(len(self._ids)))
        self.last, self.next = _LastClass(grammar), _Next(grammar, False)
        self.frequency = _Next(grammar, True)
        self.noise = nn.RNN(len(self._ids), 16, batch_first=True)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # a chaotic network: its state says all of the context and groups nothing
            for parameter in self.noise.parameters():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=draw))
        self.eval()

    def encode(self, words: tuple[str, ...]) -> list[int]:
        """Ids of words of the grammar."""
        return [self._ids[word] for word in words]

    def get_input_embeddings(self) -> nn.Module:
        """One-hot vectors of the words."""
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Runs the layers; one-hot (B, L, classes) of the class that follows."""
        words = self.embedding(ids)
        classes = self.last(words)
        self.frequency(classes)
        self.noise(words)
        out: Tensor = self.next(classes)
        return out


# -------------------------------------------------------------------------------------------------- simple English
_WORDS = {
    "DET": "the a every this that some",
    "NOUN": "dog river teacher city song garden letter child house bird road doctor stone friend picture table",
    "ADJ": "old green small quiet strange heavy bright cold happy famous",
    "VERB": "sees finds paints carries watches likes follows remembers builds visits",
    "ADV": "slowly often quietly again never gladly soon together",
    "ADP": "near behind under with beside without around",
}
_SENTENCES = ("DET NOUN VERB DET ADJ NOUN ADP DET NOUN .", "DET ADJ NOUN ADV VERB DET NOUN .",
              "DET NOUN ADP DET NOUN VERB DET ADJ NOUN ADV .", "ADV DET ADJ NOUN VERB ADJ NOUN ADP DET NOUN .",
              "DET NOUN VERB ADV ADP DET ADJ NOUN .", "DET ADJ ADJ NOUN VERB NOUN ADP NOUN ADV .")


def example_texts(count: int = 150, seed: int = 0) -> list[list[tuple[str, str]]]:
    """Made-up tagged English of six classes and few words, eight sentences a text."""
    draw = np.random.default_rng(seed)
    words = {name: text.split() for name, text in _WORDS.items()}
    return [[(str(draw.choice(words[name])) if name in words else name, name) for _ in range(8)
             for name in _SENTENCES[draw.integers(len(_SENTENCES))].split()] for _ in range(count)]


__all__ = ["Grammar", "PlantedModel", "example_texts"]
