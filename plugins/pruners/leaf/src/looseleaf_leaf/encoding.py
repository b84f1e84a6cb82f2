"""Samples as text to batches: where instruction and response lie is asked of the tokenizer, never counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looseleaf_leaf.batch import IGNORED

MARKS = ("\ue000instruction\ue001", "\ue000response\ue001")
"""Stand in for the texts to see where a chat template puts them; private-use characters, in no real text."""


class Rendered(NamedTuple):
    """A sample as one text, the characters of its instruction and response in it, from and to (excluded), and how many
    characters of white space the template trimmed off the start of the instruction."""

    text: str
    instruction: tuple[int, int]
    response: tuple[int, int]
    trimmed: int


def encode(tokenizer: Any, samples: Sequence[tuple[str, str | Sequence[str]]], *, template: str | None = None,
           teacher_tokenizer: Any = None, teacher_template: str | None = None,
           device: torch.device | str | None = None) -> dict[str, Any]:
    """Tokenize (instruction, response) pairs into a batch, padded on the right.

    A token belongs to the instruction when its characters, white space at its ends aside, all lie in it; tokens of
    white space alone do not, so they are never removed [official code]. Labels are the response's tokens and the
    special token that ends the turn, if one follows.

    Args:
        tokenizer: a fast tokenizer of transformers (it knows which characters a token covers).
        samples: pairs; a response may be a list of parts for :func:`looseleaf_leaf.response_level`, joined as they are.
        template: a text with ``{instruction}`` and ``{response}`` once each; None: the tokenizer's chat template.
        teacher_tokenizer: the teacher's, when it may be another one. Where it gives other tokens for these samples, the
            batch carries the teacher's encoding under ``"teacher"`` and offsets to align both by characters.
        teacher_template: as ``template`` for the teacher; None: the same as ``template``.
        device: where the tensors go.

    Returns:
        The batch, see :data:`looseleaf_leaf.batch.KEYS`: ``input_ids``, ``attention_mask``, ``labels``,
        ``instruction_mask``, ``offsets``, and ``segments`` where a response has parts.

    Raises:
        ValueError: no samples, an empty text, a slow tokenizer, a template that is not one or that changes the texts.
    """
    if not samples:
        raise ValueError("samples=[]: allowed is at least one (instruction, response)")
    batch = _encode(tokenizer, samples, template)
    if teacher_tokenizer is not None:
        own = _encode(teacher_tokenizer, samples, teacher_template or template)
        same = own["input_ids"].shape == batch["input_ids"].shape and \
            torch.equal(own["input_ids"], batch["input_ids"]) and torch.equal(own["labels"], batch["labels"])
        if not same:
            batch["teacher"] = own
    return _to(batch, device) if device is not None else batch


def render(tokenizer: Any, instruction: str, response: str, template: str | None = None) -> Rendered:
    """Instruction and response in their template.

    A chat template may trim the texts, as most do; one that changes them otherwise is an error.
    """
    if not instruction.strip() or not response.strip():
        raise ValueError(f"instruction={instruction[:40]!r}, response={response[:40]!r}: allowed are texts that are "
                         "not empty")
    if template is not None:
        for name in ("{instruction}", "{response}"):
            if template.count(name) != 1:
                raise ValueError(f"template={template!r}: allowed is a text with {{instruction}} and {{response}} once "
                                 "each")
        before, _, rest = template.partition("{instruction}")
        between, _, after = rest.partition("{response}")
        if "{response}" in before:
            raise ValueError(f"template={template!r}: the instruction must come before the response")
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: pass template=, such as '{instruction}\\n{response}'")
        marked = _chat(tokenizer, *MARKS)
        before, found, rest = marked.partition(MARKS[0])
        between, also, after = rest.partition(MARKS[1])
        if not found or not also:
            raise ValueError("the chat template does not show instruction and response in this order: pass template=")
    text, trimmed = before + instruction + between + response + after, 0
    if template is None:
        text = _chat(tokenizer, instruction, response)
        for cut in (str, str.strip):  # as they are, or trimmed
            if text == before + cut(instruction) + between + cut(response) + after:
                trimmed = len(instruction) - len(cut(instruction + "|")) + 1
                instruction, response = cut(instruction), cut(response)
                break
        else:
            raise ValueError(f"the chat template changes the texts of the sample {instruction[:40]!r}: pass template=")
    start = len(before)
    answer = start + len(instruction) + len(between)
    return Rendered(text, (start, start + len(instruction)), (answer, answer + len(response)), trimmed)


def _chat(tokenizer: Any, instruction: str, response: str) -> str:
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def _encode(tokenizer: Any, samples: Sequence[tuple[str, str | Sequence[str]]], template: str | None) -> dict[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say which characters its tokens cover: use a fast "
                         "tokenizer (AutoTokenizer gives one), or make the batch yourself with an instruction_mask")
    specials = set(tokenizer.all_special_ids)
    rows: list[dict[str, list[Any]]] = []
    for instruction, given in samples:
        parts = [given] if isinstance(given, str) else list(given)
        if len(parts) > 1 and not all(parts):
            raise ValueError(f"a part of the response {parts!r} is empty: allowed are texts")
        text, (start, stop), (answer, end), trimmed = render(tokenizer, instruction, "".join(parts), template)
        # a chat template writes the special tokens itself
        made = tokenizer(text, add_special_tokens=template is not None, return_offsets_mapping=True, verbose=False)
        row: dict[str, list[Any]] = {"input_ids": list(made["input_ids"]), "labels": [], "instruction_mask": [],
                                     "segments": [], "offsets": []}
        borders = _borders(parts, answer, end)
        closed = False
        for token, (left, right) in zip(row["input_ids"], made["offset_mapping"], strict=True):
            piece = text[left:right]
            first = left + len(piece) - len(piece.lstrip())  # " Paris" begins at its letter
            last = right - (len(piece) - len(piece.rstrip())) if piece.strip() else right
            inside = bool(piece.strip()) and start <= first and last <= stop
            if not piece.strip():
                first = left
            response = right > left and answer <= first < end
            if not response and not closed and left >= end:  # the first token after the response
                closed, response = True, token in specials
            row["labels"].append(token if response else IGNORED)
            row["instruction_mask"].append(inside)
            row["segments"].append(1 + sum(first >= b for b in borders) if response else 0)
            left, right = max(first, start) - start, min(last, stop) - start
            row["offsets"].append((left + trimmed, right + trimmed) if right > left else (0, 0))
        if not any(row["instruction_mask"]) or all(label == IGNORED for label in row["labels"]):
            raise ValueError(f"no token of the sample {instruction[:40]!r} lies within its "
                             f"{'instruction' if not any(row['instruction_mask']) else 'response'}: separate the texts "
                             "in the template by a space or a line")
        rows.append(row)
    batch = _padded(rows, tokenizer.pad_token_id)
    if not any(isinstance(given, (list, tuple)) for _, given in samples):
        del batch["segments"]
    return batch


def _borders(parts: list[str], start: int, end: int) -> list[int]:
    """First characters of the second and later parts of a response that begins at ``start``."""
    if len(parts) > 1 and sum(map(len, parts)) != end - start:
        raise ValueError("the chat template trims a response given in parts: trim it before you cut it into parts")
    return [start + sum(map(len, parts[:k])) for k in range(1, len(parts))]


def _padded(rows: list[dict[str, list[Any]]], pad: int | None) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad or 0, "labels": IGNORED, "instruction_mask": False, "segments": 0, "offsets": (0, 0)}
    lengths = [len(row["input_ids"]) for row in rows]
    out: dict[str, Any] = {key: torch.tensor([row[key] + [empty] * (width - n) for row, n in zip(rows, lengths)])
                           for key, empty in fill.items()}
    out["attention_mask"] = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return out


def _to(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else _to(value, device) for key, value in batch.items()}
