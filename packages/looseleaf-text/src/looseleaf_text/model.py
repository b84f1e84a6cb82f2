"""What a prompt is for: the interface of language models, local or behind a server."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from looseleaf.budget import Budget


class LanguageModel(ABC):
    """A language model as prompt optimisers see it.

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

    @abstractmethod
    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """Log-probability of each continuation after its prefix, summed over its tokens.

        Args:
            prefixes: n texts.
            continuations: for each prefix the texts to score, each with at least one token.

        Returns:
            n lists of natural-log probabilities, in the order given.
        """

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
        return self.score(befores, [[a + after for a in row] for row, after in zip(answers, afters, strict=True)])

    @abstractmethod
    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Continue each prompt by at most ``max_tokens`` tokens, cut before the first of ``stop``."""

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


def words(text: str) -> list[str]:
    """``text`` cut before each word, white space going with the word after it; the pieces join to ``text``."""
    pieces = re.findall(r"\s*\S+", text)
    rest = text[len("".join(pieces)):]
    if rest and pieces:
        pieces[-1] += rest
    return pieces or ([text] if text else [])


class MeteredModel(LanguageModel):
    """A model whose work is booked on a budget before it is done.

    Every method asks :meth:`looseleaf.Budget.spend` first, so that a search can simply be written against it and
    end where :class:`looseleaf.BudgetExhausted` is raised: nothing beyond the budget is ever computed.

    Args:
        model: who does the work.
        budget: what pays for it.
    """

    def __init__(self, model: LanguageModel, budget: Budget) -> None:
        self.model = model
        self.budget = budget
        self.name = model.name

    def fingerprint(self) -> str | None:
        """That of the model behind."""
        return self.model.fingerprint()

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Calls of the model behind."""
        return self.model.calls

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """Tokens of the model behind."""
        return self.model.tokens

    @property
    def _counts(self) -> bool:
        return self.budget.tokens is not None

    def _spend(self, texts: Sequence[str], more: int = 0) -> None:
        # Without a limit on tokens there is no need to tokenize twice; what was used is then booked afterwards.
        tokens = sum(map(self.model.count_tokens, texts)) + more if self._counts else 0
        self.budget.spend(calls=len(texts), tokens=tokens)

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """See :meth:`LanguageModel.score`."""
        return self._scored(prefixes, continuations, lambda: self.model.score(prefixes, continuations))

    def score_cloze(self, befores: list[str], answers: list[list[str]], afters: list[str]) -> list[list[float]]:
        """See :meth:`LanguageModel.score_cloze`."""
        rest = [[a + after for a in row] for row, after in zip(answers, afters, strict=True)]
        return self._scored(befores, rest, lambda: self.model.score_cloze(befores, answers, afters))

    def _scored(self, prefixes: list[str], continuations: list[list[str]],
                work: Callable[[], list[list[float]]]) -> list[list[float]]:
        # Of all continuations the longest is booked: they share the prefix, and usually one token is all there is.
        known = {c: self.model.count_tokens(c) for row in continuations for c in row} if self._counts else {}
        self._spend(prefixes, sum(max(known[c] for c in row) for row in continuations if row) if known else 0)
        before = self.model.tokens
        out = work()
        self._after(before)
        return out

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """See :meth:`LanguageModel.generate`; with a limit on tokens the longest answers are booked."""
        self._spend(prompts, max_tokens * len(prompts))
        before = self.model.tokens
        out = self.model.generate(prompts, max_tokens, stop, temperature, seed)
        self._after(before)
        return out

    def embed(self, texts: list[str]) -> np.ndarray:
        """See :meth:`LanguageModel.embed`."""
        self._spend(texts)
        before = self.model.tokens
        out = self.model.embed(texts)
        self._after(before)
        return out

    def _after(self, before: int) -> None:
        if not self._counts:
            self.budget.book(tokens=max(0, self.model.tokens - before))

    def tokenize(self, text: str) -> list[int]:
        """See :meth:`LanguageModel.tokenize`; free."""
        return self.model.tokenize(text)

    def detokenize(self, ids: list[int]) -> str:
        """See :meth:`LanguageModel.detokenize`; free."""
        return self.model.detokenize(ids)

    def count_tokens(self, text: str) -> int:
        """See :meth:`LanguageModel.count_tokens`; free."""
        return self.model.count_tokens(text)

    def token_texts(self, text: str) -> list[str]:
        """See :meth:`LanguageModel.token_texts`; free."""
        return self.model.token_texts(text)
