"""The prompts whose last token becomes the embedding, where the placeholder stands in them, and their token ids."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looseleaf.errors import did_you_mean
from looseleaf_text.slots import fill, slots

PLACEHOLDER = "<PST>"
"""Marks in a template where the placeholder token goes; it is never tokenized as text."""

NOWHERE = -1
"""Place of the placeholder in a row that has none."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "prompteol": ('This sentence : <PST> "{text}" means in one word:"',),
    "pretended-cot": ('After thinking step by step , this sentence : <PST> "{text}" means in one word:"',),
    "knowledge": (
        "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
        'additional but less central details. With this in mind , this sentence : <PST> "{text}" means in one word:"',),
    "metaeol": (
        'Text is to be sorted by its topic. The topic of this sentence : <PST> "{text}" is in one word:"',
        'Opinions are to be told apart. The feeling of this sentence : <PST> "{text}" is in one word:"',
        'Sentences are to be compared by what they say. This sentence : <PST> "{text}" means in one word:"',
        'Facts are to be noted down. The main thing in this sentence : <PST> "{text}" is in one word:"'),
}
"""Name -> templates; the embedding is the mean over them.

``prompteol``, ``pretended-cot`` and ``knowledge`` are the prompts of PromptEOL, Pretended CoT and Knowledge
Enhancement, with the placeholder before the opening quote as in the authors' code. ``metaeol`` asks several questions
as MetaEOL does: topic, feeling, meaning, main fact; the wording is this project's, not that paper's.
"""


def templates_of(prompt: str) -> tuple[str, ...]:
    """The templates of a name of :data:`TEMPLATES`, or ``prompt`` itself where it is a template.

    Raises:
        ValueError: neither; near names are given.
    """
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    check_template(prompt)
    return (prompt,)


def check_template(template: str) -> None:
    """Raise ValueError unless ``template`` has the slot ``{text}`` once and the placeholder at most once, before it."""
    where, marks = template.count("{text}"), template.count(PLACEHOLDER)
    if where != 1 or marks > 1 or template.find(PLACEHOLDER) > template.find("{text}"):
        raise ValueError(
            f"prompt: expected {', '.join(TEMPLATES)}, or a text with the slot {{text}} once and, if you like, "
            f"{PLACEHOLDER} before it, got {template!r}.{did_you_mean(template, TEMPLATES)}")


def with_placeholder(template: str) -> str:
    """``template`` with the placeholder: where it is marked, else right before the text."""
    return template if PLACEHOLDER in template else template.replace("{text}", PLACEHOLDER + "{text}")


def without_placeholder(template: str) -> str:
    """``template`` without the placeholder: the prompt of the method below."""
    bare = re.sub(f" ?{PLACEHOLDER}", "", template)
    return bare.lstrip(" ") if template.startswith(PLACEHOLDER) else bare


def around(template: str) -> tuple[str, str]:
    """What stands before and behind the placeholder.

    A space before the placeholder goes behind it: tokenizers keep a space with the word after it, and by itself it
    would be a token of its own.
    """
    head, _, rest = template.partition(PLACEHOLDER)
    bare = head.rstrip(" ")
    return bare, rest if rest[:1].isspace() else head[len(bare):] + rest


def rename_slot(template: str, old: str, new: str) -> str:
    """``template`` with the slot ``{old}`` called ``{new}``."""
    return template.replace("{" + old + "}", "{" + new + "}")


def only_slot(template: str) -> str:
    """The name of the one slot of ``template``.

    Raises:
        ValueError: none, or several.
    """
    found = slots(template)
    if len(found) != 1:
        raise ValueError(f"the prompt {template!r} has the slots {found}: an embedding is of one text, so give a "
                         "prompt with one slot")
    return found[0]


def tidy(text: str) -> str:
    """``text`` as the authors' evaluation quotes it.

    Double quotes become single ones, for the prompt quotes the text itself; a text without an end gets a full stop, and
    a question mark at the end becomes one.
    """
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


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

    The tokenizer's special tokens go in front, none behind: the last token of the prompt is the embedding. A text too
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
    # text and prompt are tokenized together, so what a cut saves is known only afterwards
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
    """Indices of ``rows`` in batches of similar length, each of ``size`` positions at most, padding included.

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
