"""A made-up language model and task to try prompt optimisers on, without torch."""

from __future__ import annotations

import math
import random
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from looseleaf.tasks import Example
from looseleaf_text.model import LanguageModel, words
from looseleaf_text.task import TextTask

if TYPE_CHECKING:
    import numpy as np

GOOD = ("lovely", "bright", "warm", "clever", "fresh", "brisk")
BAD = ("dull", "stale", "grim", "clumsy", "sour", "slow")
FILLER = ("the", "film", "was", "a", "story", "with", "some", "actors", "and", "music", "that", "felt", "quite")
ASKED = "Read what somebody wrote about the film and say with one word what it was that they felt about it."


class ToyLanguageModel(LanguageModel):
    """A made-up model, deterministic and without torch, whose accuracy depends on the words of the prompt.

    Every word has a weight (from its spelling); the sum of the weights of the words before the input sets how well
    the model hears the input's good and bad words and towards which label it leans. So removing, adding or
    exchanging words of the prompt makes it better or worse, and a search has something to find.

    Args:
        delay: seconds slept per call, to test limits on time.
        on_request: called with the number of the request before each ``score`` or ``generate``; may raise.
    """

    name = "toy"

    def __init__(self, delay: float = 0.0, on_request: Callable[[int], None] | None = None) -> None:
        self.calls = 0
        self.tokens = 0
        self.requests = 0
        self.delay = delay
        self.on_request = on_request
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def _request(self, texts: Sequence[str]) -> None:
        self.requests += 1
        if self.on_request is not None:
            self.on_request(self.requests)
        self.calls += len(texts)
        self.tokens += sum(map(self.count_tokens, texts))
        if self.delay:
            time.sleep(self.delay * len(texts))

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """See :meth:`LanguageModel.score`."""
        self._request(prefixes)
        out = []
        for prefix, row in zip(prefixes, continuations, strict=True):
            margin = self._margin(prefix)
            out.append([_log_sigmoid(margin * _side(c)) - 1.0 + 0.01 * _weight(c) for c in row])
        return out

    def _margin(self, prefix: str) -> float:
        every = prefix.split()
        context, shown = every[:-8], every[-8:]
        hears = 0.5 + math.tanh(sum(_weight(w) for w in context) / 2)
        leans = sum(_weight(w + "!") for w in context) / 4
        felt = sum((w in GOOD) - (w in BAD) for w in shown)
        return hears * felt + leans + 0.3 * _weight(prefix)

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """See :meth:`LanguageModel.generate`: ``positive`` or ``negative``, with a temperature random words."""
        self._request(prompts)
        out = []
        for prompt in prompts:
            if temperature > 0:
                rng = random.Random(f"{seed} {prompt}")
                out.append(" " + " ".join(rng.choices((*FILLER, *GOOD, *BAD), k=max(1, min(max_tokens, 6)))))
            else:
                out.append(" positive" if self._margin(prompt) > 0 else " negative")
        self.tokens += sum(map(self.count_tokens, out))
        return out

    def embed(self, texts: list[str]) -> np.ndarray:
        """See :meth:`LanguageModel.embed`: a bag of words in 16 places."""
        import numpy as np

        self._request(texts)
        out = np.zeros((len(texts), 16), dtype=np.float32)
        for n, text in enumerate(texts):
            for word in text.split():
                out[n, zlib.crc32(word.encode()) % 16] += 1
        return out

    def tokenize(self, text: str) -> list[int]:
        """See :meth:`LanguageModel.tokenize`: one token per word."""
        ids = []
        for piece in words(text):
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
            ids.append(self._ids[piece])
        return ids

    def detokenize(self, ids: list[int]) -> str:
        """See :meth:`LanguageModel.detokenize`."""
        return "".join(self._pieces[i] for i in ids)


def toy_task(seed: int = 0, *, size: int = 16, generation: bool = False) -> TextTask:
    """Made-up reviews to be called positive or negative.

    Args:
        seed: decides the reviews.
        size: examples in each of train, dev and test; half of each class.
        generation: no labels, the answer is to be generated.
    """
    rng = random.Random(seed)

    def make() -> list[Example]:
        out = []
        for n in range(size):
            label = "positive" if n % 2 else "negative"
            own, other = (GOOD, BAD) if n % 2 else (BAD, GOOD)
            chosen = [*rng.choices(FILLER, k=4), *rng.choices(own, k=2), *rng.choices(other, k=n % 3 == 0)]
            rng.shuffle(chosen)
            out.append(Example({"text": " ".join(chosen)}, label))
        return out

    return TextTask("toy", make(), make(), make(), labels=None if generation else {
        "positive": " positive", "negative": " negative"}, metric="contains" if generation else "accuracy",
        template=f"{ASKED}\nReview: {{text}}", answer_prefix="Sentiment:")


def _weight(word: str) -> float:
    return zlib.crc32(word.encode()) % 2001 / 1000 - 1.0


def _side(continuation: str) -> float:
    word = continuation.strip()
    return {"positive": 1.0, "negative": -1.0}.get(word, _weight(word))


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x
