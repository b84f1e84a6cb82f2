"""A masked language model of transformers: it fills blanks, and scores answers by pseudo-likelihood."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looseleaf.errors import UnsupportedModelError
from looseleaf.fingerprint import fingerprint
from looseleaf.unwrap import unwrapped
from looseleaf_text.batching import (
    device_of,
    expect_eval,
    ordinary_ids,
    positions,
    positions_table,
    reading,
    same,
    text_config,
    tolerance,
)
from looseleaf_text.encoding import Encoding
from looseleaf_text.model import LanguageModel, not_finite

if TYPE_CHECKING:
    import numpy as np

Ids = list[int]
Asked = tuple[int, int, int, int]
"""Prompt, answer, position in the row, token wanted there."""


class MaskedModel(LanguageModel):
    """A transformers masked language model and its tokenizer.

    The score of an answer is its pseudo-log-likelihood (Salazar et al. 2020, section 2): the sum over its tokens of the
    log-probability of the token where it alone is masked. Text before and after the answer is seen in full, which is
    what cloze prompts are made for.

    Args:
        model: any ``AutoModelForMaskedLM``, in evaluation mode; moved nowhere, evaluated where it is.
        tokenizer: its tokenizer, with a mask token.
        batch_tokens: most positions (rows x longest row) in memory at once.

    Raises:
        ValueError: no mask token, or something that is no model or tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int = 8192) -> None:
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"MaskedModel.batch_tokens: expected an integer >= 1, got {batch_tokens!r}")
        inner = unwrapped(model)
        if not callable(model) or not hasattr(inner, "config"):
            raise ValueError(f"MaskedModel: expected a transformers masked language model, got {type(model).__name__}")
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError("MaskedModel: expected a tokenizer with a mask token, got a "
                             f"{type(tokenizer).__name__} without: a causal language model goes into LocalModel")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.calls = 0
        self.tokens = 0
        self.name = f"{type(inner).__name__}-{sum(p.numel() for p in model.parameters())}"
        self._inner = inner
        self._encoding = Encoding(tokenizer)
        self._begin, self._end = self._encoding.begin, self._encoding.end

    @functools.cached_property
    def _measured(self) -> tuple[int | None, bool]:
        """The longest row that the model takes, and whether padding leaves the other rows of a batch as they are."""
        ids = ordinary_ids(self._inner, self.tokenizer, 17)
        limit = positions(text_config(self._inner))
        short, long = ids[:5], ids[5:12 if limit is None else min(12, limit + 5)]
        with positions_table(self._inner, len(long)) as tables:
            alone = self._forward([long]).logits[0]
        short_alone, both = self._forward([short]).logits[0], self._forward([short, long]).logits
        fine = tolerance(self._inner)
        harmless = same(both[0, :len(short)], short_alone, fine) and same(both[1, :len(long)], alone, fine)
        return min([n for n in (limit, *tables) if n is not None], default=None), harmless

    def fingerprint(self) -> str:
        """Of the weights as they are now, see :func:`looseleaf.fingerprint.fingerprint`."""
        return fingerprint(self.model)

    def tokenize(self, text: str) -> Ids:
        """Token ids of ``text``, without special tokens."""
        return self._encoding.bare([text])[0]

    def detokenize(self, ids: Ids) -> str:
        """The text of ``ids``; special tokens are kept."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        """Pseudo-log-likelihood of each continuation after its prefix; an empty prefix scores a whole text."""
        return self.score_cloze(prefixes, continuations, [""] * len(prefixes))

    def score_cloze(self, befores: list[str], answers: list[list[str]], afters: list[str]) -> list[list[float]]:
        """Pseudo-log-likelihood of each answer between two texts.

        The three are tokenized each by itself, spaces between the first two going with the answer.

        Args:
            befores, afters: n texts; either may be empty.
            answers: for each the answers, each with at least one token.

        Raises:
            ValueError: not equally many, an answer without tokens, or a text longer than the model takes.
        """
        if not len(befores) == len(answers) == len(afters):
            raise ValueError("score_cloze: expected one text before, one list of answers and one text after for every "
                             f"prompt, got {len(befores)}, {len(answers)} and {len(afters)}")
        rows: dict[tuple[int, ...], list[Asked]] = {}
        out = [[0.0] * len(row) for row in answers]
        for n, (before, row, after) in enumerate(zip(befores, answers, afters, strict=True)):
            bare = before.rstrip(" ")
            head, tail = [*self._begin, *self.tokenize(bare)], [*self.tokenize(after), *self._end]
            longest = 0
            for k, answer in enumerate(row):
                ids = self.tokenize(before[len(bare):] + answer)
                if not ids:
                    raise ValueError(f"the answer {answer!r} has no tokens; give it a text")
                longest = max(longest, len(ids))
                for place, target in enumerate(ids):
                    masked = (*head, *ids[:place], self.tokenizer.mask_token_id, *ids[place + 1:], *tail)
                    # Answers of one token share a row: it differs from none of theirs.
                    rows.setdefault(masked, []).append((n, k, len(head) + place, target))
            self.calls += 1
            self.tokens += len(head) + longest + len(tail)
        for asked, log_probs in self._masked(rows):
            for n, k, place, target in asked:
                out[n][k] += float(log_probs[place, target])
        for n, values in enumerate(out):
            if not all(map(math.isfinite, values)):
                raise not_finite(self.name, "pseudo-log-likelihoods", values, n, befores[n])
        return out

    def _masked(self, rows: dict[tuple[int, ...], list[Asked]]) -> Iterator[tuple[list[Asked], Tensor]]:
        """What is asked of each row and its log-probabilities (length, vocabulary), in batches."""
        order = sorted(rows, key=len)
        if not order:
            return
        harmless = self._check(len(order[-1]))
        at = 0
        while at < len(order):
            end = at + 1
            while end < len(order) and (end + 1 - at) * len(order[end]) <= self.batch_tokens and (
                    harmless or len(order[end]) == len(order[at])):
                end += 1
            part = order[at:end]
            log_probs = torch.log_softmax(self._forward(part).logits.float(), dim=-1).cpu()
            for r, ids in enumerate(part):
                yield rows[ids], log_probs[r]
            at = end

    def _check(self, length: int) -> bool:
        """Whether rows may be padded; an error for a row that is too long."""
        expect_eval(self.model)
        longest, harmless = self._measured
        if longest is not None and length > longest:
            raise ValueError(f"expected prompts of at most {longest} positions (the model's "
                             f"max_position_embeddings), got one of {length}: shorten it")
        return harmless

    @torch.no_grad()
    def _forward(self, part: Sequence[Sequence[int]], **more: Any) -> Any:
        """Forward right-padded rows."""
        device = device_of(self.model)
        width = max(map(len, part))
        padding = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(part), width), padding, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for r, row in enumerate(part):
            ids[r, :len(row)] = torch.tensor(row, dtype=torch.long)
            mask[r, :len(row)] = 1
        with reading(self.model):
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device), **more)

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None,
                 temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Not what a masked language model does.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(f"{self.name} is a masked language model: it fills blanks and does not continue "
                                    "texts. Use LocalModel with a causal one, or a task with labels")

    def embed(self, texts: list[str]) -> np.ndarray:
        """The mean of the last hidden states over each text's tokens, float32 of shape (n, hidden)."""
        import numpy as np

        rows = [[*self._begin, *self.tokenize(text), *self._end] for text in texts]
        self._check(max(map(len, rows), default=0))
        self.calls += len(rows)
        self.tokens += sum(map(len, rows))
        hidden = [self._forward([row], output_hidden_states=True).hidden_states[-1][0].mean(0) for row in rows]
        for n, vector in enumerate(hidden):
            if not bool(vector.isfinite().all()):
                raise not_finite(self.name, "hidden states", "others", n, texts[n])
        return torch.stack(hidden).float().cpu().numpy() if hidden else np.zeros((0, 0), dtype=np.float32)
