"""The interface of language models, local or behind a server."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from looseleaf.budget import costs
from looseleaf.errors import EndpointError

if TYPE_CHECKING:
    import numpy as np


def _scored_tokens(model: LanguageModel, prefixes: list[str], continuations: list[list[str]]) -> int:
    # Of all continuations the longest is booked: they share the prefix, and usually one token is all there is.
    known = {c: model.count_tokens(c) for row in continuations for c in row}
    return sum(map(model.count_tokens, prefixes)) + sum(max(known[c] for c in row) for row in continuations if row)


def _cloze_tokens(model: LanguageModel, befores: list[str], answers: list[list[str]], afters: list[str]) -> int:
    return _scored_tokens(model, befores, with_afters(answers, afters))


def _generated_tokens(model: LanguageModel, prompts: list[str], max_tokens: int, *_: object, **more: object) -> int:
    return sum(map(model.count_tokens, prompts)) + max_tokens * len(prompts)


def with_afters(answers: Sequence[Sequence[str]], afters: Sequence[str]) -> list[list[str]]:
    """Each of the answers with the text that follows it."""
    return [[a + after for a in row] for row, after in zip(answers, afters, strict=True)]


class LanguageModel(ABC):
    """A language model as prompt optimisers see it.

    What its methods cost is declared here for all implementations; see :meth:`looseleaf.Budget.meter`.

    Attributes:
        name: what the model is called; part of the identity of a search.
        calls: prompts given so far (see :class:`looseleaf.Budget`).
        tokens: tokens of those prompts and of what was generated, as if nothing were cached.
    """

    name: str = "model"
    calls: int = 0
    tokens: int = 0

    def fingerprint(self) -> str | None:
        """What tells the weights apart from others of the same ``name``, for searches that resume; None: not known."""
        return None

    @costs(calls=lambda model, prefixes, continuations: len(prefixes), tokens=_scored_tokens)
    @abstractmethod
    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """Log-probability of each continuation after its prefix, summed over its tokens.

        Args:
            prefixes: n texts.
            continuations: for each prefix the texts to score, each with at least one token.

        Returns:
            n lists of natural-log probabilities, in the order given.
        """

    @costs(calls=lambda model, befores, answers, afters: len(befores), tokens=_cloze_tokens)
    def score_cloze(self, befores: list[str], answers: list[list[str]], afters: list[str]) -> list[list[float]]:
        """Log-probability of each answer where it stands between two texts.

        Here that of the answer and the text after it, given the text before, which ranks answers as the likelihood
        of the whole text does. A masked model sees both sides and scores the answer alone.

        Args:
            befores, afters: n texts.
            answers: for each the answers, each with at least one token.

        Returns:
            n lists of natural-log probabilities, in the order given.
        """
        return self.score(befores, with_afters(answers, afters))

    @costs(calls=lambda model, prompts, *_, **more: len(prompts), tokens=_generated_tokens)
    @abstractmethod
    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Continue each prompt by at most ``max_tokens`` tokens, cut before the first of ``stop``."""

    @costs(calls=lambda model, texts: len(texts), tokens=lambda model, texts: sum(map(model.count_tokens, texts)))
    def embed(self, texts: list[str]) -> np.ndarray:
        """One vector per text, float32 of shape (n, hidden)."""
        raise NotImplementedError(f"{type(self).__name__} has no embeddings")

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""

    @abstractmethod
    def detokenize(self, ids: list[int]) -> str:
        """The text of ``ids``."""

    def count_tokens(self, text: str) -> int:
        """How many tokens ``text`` has."""
        return len(self.tokenize(text))

    def token_texts(self, text: str) -> list[str]:
        """``text`` cut where its tokens are: pieces that join to ``text`` again.

        Tokens that only together make a character stay together.
        """
        ids = self.tokenize(text)
        pieces: list[str] = []
        done, pending = 0, 0
        for n in range(1, len(ids) + 1):
            # Decoding a growing beginning keeps the white space that decoding token by token would lose.
            head = self.detokenize(ids[:n])
            if text.startswith(head) and len(head) > done:
                pieces.append(text[done:len(head)])
                done = len(head)
                pending = 0
            else:
                pending += 1
        if done < len(text):
            if pieces and not pending:
                pieces[-1] += text[done:]
            else:
                pieces.append(text[done:])
        return pieces if "".join(pieces) == text else words(text)


def not_finite(model: str, what: str, got: object, number: int, text: str) -> ValueError:
    """The error for numbers that are NaN or infinite: of which model, and for which example."""
    return ValueError(f"{model}: expected finite {what}, got {got} for example {number}, {text!r:.200}: a weight of "
                      "the model is NaN or infinite, or its dtype overflows (float32 or bfloat16 does not)")


def words(text: str) -> list[str]:
    """``text`` cut before each word, white space going with the word after it; the pieces join to ``text``."""
    pieces = re.findall(r"\s*\S+", text)
    rest = text[len("".join(pieces)):]
    if rest and pieces:
        pieces[-1] += rest
    return pieces or ([text] if text else [])


def has_tokens(model: LanguageModel, text: str) -> bool:
    """Whether ``text`` has tokens under the model's tokenizer; True where a server does not tokenize."""
    try:
        return bool(model.tokenize(text))
    except EndpointError:
        return True
