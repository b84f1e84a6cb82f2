"""From texts to token ids: prompt around the text, placeholder inside, cut where the model's context ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looseleaf_text.task import fill
from looseleaf_token_prepending.templates import PLACEHOLDER, around

NOWHERE = -1
"""Place of the placeholder in a row that has none."""


@dataclass(frozen=True)
class Row:
    """One prompt as token ids.

    Attributes:
        ids: token ids; what stands at the placeholder is an id like any other, its embedding is exchanged later.
        at: index of the placeholder in ``ids``, or :data:`NOWHERE`.
    """

    ids: list[int]
    at: int


def tokenize(tokenizer: Any, template: str, texts: Sequence[str], limit: int | None = None) -> list[Row]:
    """Each text in the template, as ids that end with the template's last token.

    The tokeniser's special tokens go in front, none behind: the last token of the prompt is the embedding. A text too
    long for ``limit`` tokens loses its end, never the prompt around it, and one warning says how many did.

    Raises:
        ValueError: a prompt without any token, or one that is longer than ``limit`` without a text.
    """
    head, rest = around(template) if PLACEHOLDER in template else ("", template)
    start = [*special_start(tokenizer), *(_ids(tokenizer, [head])[0] if head else [])]
    marked = PLACEHOLDER in template
    # any id will do for the placeholder; one that exists keeps the embedding's look-up in range
    start += [0] * marked
    rows, shortened = [], 0
    for text, tail in zip(texts, _ids(tokenizer, [fill(rest, {"text": t}) for t in texts]), strict=True):
        if limit is not None and len(start) + len(tail) > limit:
            tail = _shortened(tokenizer, rest, text, limit, len(start))
            shortened += 1
        if not tail:
            raise ValueError(f"the text {text!r} has no token in the prompt {template!r}: leave it out")
        rows.append(Row([*start, *tail], len(start) - 1 if marked else NOWHERE))
    if shortened:
        warnings.warn(f"{shortened} of {len(texts)} texts were cut so that they fit into {limit} tokens with their "
                      "prompt; cut them yourself, or embed their parts", UserWarning, stacklevel=2)
    return rows


def _shortened(tokenizer: Any, rest: str, text: str, limit: int, before: int) -> list[int]:
    """Ids of ``rest`` around as much of the beginning of ``text`` as fits, ``before`` tokens being there already."""
    ids = _ids(tokenizer, [text])[0]
    keep = len(ids)
    tail = _ids(tokenizer, [fill(rest, {"text": text})])[0]
    # text and prompt are tokenised together, so what a cut saves is known only afterwards
    while before + len(tail) > limit:
        keep -= before + len(tail) - limit
        if keep < 1:
            raise ValueError(f"the prompt that ends with {rest!r} leaves no room for a text within {limit} tokens: "
                             "give a larger max_length or a shorter prompt")
        part = tokenizer.decode(ids[:keep], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        tail = _ids(tokenizer, [fill(rest, {"text": part})])[0]
    return tail


def special_start(tokenizer: Any) -> list[int]:
    """The special tokens that this tokeniser puts before every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    return next((whole[:n] for n in range(len(whole)) if whole[n:n + len(bare)] == bare), [])


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose: a text beyond the context is cut here, so that the tokeniser need not warn of it
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def collate(rows: Sequence[Row], left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``rows`` padded to one length.

    Returns:
        ids (B, L) int64, mask (B, L) int64 with 1 for what is no padding, and places of the placeholder (B,) int64.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    at = torch.full((len(rows),), NOWHERE, dtype=torch.long)
    for n, row in enumerate(rows):
        begin = width - len(row.ids) if left else 0
        ids[n, begin:begin + len(row.ids)] = torch.tensor(row.ids)
        mask[n, begin:begin + len(row.ids)] = 1
        if row.at != NOWHERE:
            at[n] = begin + row.at
    return ids, mask, at


def batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Indices of ``rows`` in batches of like length, each of ``size`` positions at most, padding included.

    A row longer than ``size`` is a batch of its own.
    """
    batch: list[int] = []
    for n in sorted(range(len(rows)), key=lambda n: len(rows[n].ids)):
        if batch and (len(batch) + 1) * len(rows[n].ids) > size:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch
