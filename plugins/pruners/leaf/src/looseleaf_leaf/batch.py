"""The batch that the method reads: tokens, what is the response, what may be removed; and how texts become one.

Where instruction and response lie is asked of the tokenizer, never counted by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looseleaf.errors import did_you_mean

IGNORED = -100
"""Label of a token that is not predicted."""

KEYS = ("input_ids", "attention_mask", "labels", "instruction_mask", "white_space", "segments", "offsets", "teacher")
"""What a batch may hold:

==================== ============= ====================================================================================
``input_ids``        (B, L) int64  token ids of the student's tokenizer
``attention_mask``   (B, L)        1 for tokens, 0 for padding on either side; left out: no padding
``labels``           (B, L) int64  the response's token ids, -100 everywhere else
``instruction_mask`` (B, L) bool   tokens that may be removed; left out: every token before the response, also those of
                                   a template
``white_space``      (B, L) bool   tokens of white space alone: those of the instruction count in minimum, maximum and
                                   quantile, but are never removed [official code]; left out: none
``segments``         (B, L) int64  number of the part of the response that a token belongs to, from 1; 0 elsewhere
``offsets``          (B, L, 2)     characters of the instruction that a token covers: first, one beyond the last
``teacher``          mapping       the same samples in the teacher's tokens, where its tokenizer is another one: all of
                                   the above but ``teacher``; both sides need ``offsets`` then
==================== ============= ====================================================================================
"""


MARKS = ("\ue000instruction\ue001", "\ue000response\ue001")
"""Stand in for the texts to see where a chat template puts them; private-use characters, in no real text."""


def checked(batch: Mapping[str, Any], name: str = "the batch") -> dict[str, Any]:
    """The batch with every mask filled in (bool), after a look at names, shapes and contents.

    Raises:
        ValueError: a name is missing or unknown, shapes differ, a row has no response or nothing before it.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"{name}: expected a mapping with input_ids and labels, such as looseleaf_leaf.encode makes, "
                         f"got {type(batch).__name__}")
    for key in batch:
        if key not in KEYS:
            raise ValueError(f"{name}: expected {', '.join(KEYS)}, got {key!r}.{did_you_mean(str(key), KEYS)}")
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise ValueError(f"{name} has no {key!r}: it is needed (looseleaf_leaf.encode makes both; labels are -100 "
                             "outside the response)")
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids of {name}: expected a non-empty tensor (B, L) of token ids, got {shape}")
    full: dict[str, Any] = dict(batch)
    full.setdefault("attention_mask", torch.ones_like(ids))
    for key, value in full.items():
        if key == "teacher":
            continue
        expected = (*ids.shape, 2) if key == "offsets" else tuple(ids.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} of {name}: expected a tensor of shape {expected}, as input_ids, got {shape}")
    full["attention_mask"] = full["attention_mask"].bool()
    response = (full["labels"] != IGNORED) & full["attention_mask"]
    response[:, 0] = False  # nothing stands before the first token that could predict it
    if not bool(response.any(1).all()):
        rows = (~response.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows[:5]} of {name} have no response: labels must differ from -100 somewhere beyond "
                         "the first token")
    full["response_mask"] = response
    before = (response.cumsum(1) == 0) & full["attention_mask"]
    if "instruction_mask" in full:
        mask = full["instruction_mask"].bool()
        wrong = (mask & ~before).any(1)
        if bool(wrong.any()):
            raise ValueError(f"instruction_mask of {name} marks padding or tokens from the response on in rows "
                             f"{wrong.nonzero().flatten().tolist()[:5]}: only tokens before the response can be "
                             "removed")
        full["instruction_mask"] = mask
    else:
        full["instruction_mask"] = before
    full["white_space"] = full.get("white_space", torch.zeros_like(before)).bool()
    return full


def response_level(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch for response-level pruning: earlier parts of the response count as context and may be pruned too.

    Every row becomes one row for each part k of its response: the loss is on part k, and the parts before k join the
    instruction; those after k are cut off. The parts' labels together are those of the response, each once. The first
    row of a sample is its instruction-level row with the response cut after its first part. [section 3 of the paper]

    Args:
        batch: a batch with ``segments``, as :func:`looseleaf_leaf.encode` makes from responses given as lists.

    Returns:
        A batch without ``segments``; rows in the order of the samples, then of their parts.

    Raises:
        ValueError: no ``segments``, or a teacher with another tokenizer (its parts would have to be cut alike).
    """
    if "segments" not in batch:
        raise ValueError("the batch has no 'segments': give responses to encode as lists of parts, such as one for "
                         "each line")
    if "teacher" in batch:
        raise ValueError("the batch carries the teacher's own tokens: response-level pruning needs one tokenizer")
    full = checked(batch)
    segments, rows = full["segments"], []
    for row in range(len(segments)):
        for part in sorted(set(segments[row][full["response_mask"][row]].tolist())):
            if part < 1:
                raise ValueError(f"segments of row {row}: expected 1 or more in the response, got {part}")
            keep = full["attention_mask"][row] & (segments[row] <= part)
            current = segments[row] == part
            earlier = full["response_mask"][row] & (segments[row] < part)
            rows.append({"input_ids": full["input_ids"][row], "attention_mask": keep.to(torch.int64),
                         "labels": full["labels"][row].where(current & full["response_mask"][row], IGNORED),
                         "instruction_mask": full["instruction_mask"][row] | earlier,
                         "white_space": full["white_space"][row]})
    return {key: torch.stack([r[key] for r in rows]) for key in rows[0]}


# ------------------------------------------------------------------------------------ texts
class Rendered(NamedTuple):
    """A sample as one text; where its instruction and its response lie in it (first character, one beyond the last);
    and how many characters of white space the template trimmed off the start of the instruction."""

    text: str
    instruction: tuple[int, int]
    response: tuple[int, int]
    trimmed: int


def encode(tokenizer: Any, samples: Sequence[tuple[str, str | Sequence[str]]], *, template: str | None = None,
           teacher_tokenizer: Any = None, teacher_template: str | None = None,
           device: torch.device | str | None = None) -> dict[str, Any]:
    """Tokenize (instruction, response) pairs into a batch, padded on the right.

    A token belongs to the instruction when its characters, white space at its ends aside, all lie in it. Tokens of
    white space alone are marked: they are never removed [official code]. Labels are the response's tokens and the
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
        ``instruction_mask``, ``white_space``, ``offsets``, and ``segments`` where a response has parts.

    Raises:
        ValueError: no samples, an empty text, a slow tokenizer, a template that is not one or that changes the texts.
    """
    if not samples:
        raise ValueError("samples: expected at least one (instruction, response), got none")
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
        raise ValueError(f"samples: expected texts that are not empty, got the instruction {instruction[:40]!r} and "
                         f"the response {response[:40]!r}")
    if template is not None:
        for name in ("{instruction}", "{response}"):
            if template.count(name) != 1:
                raise ValueError("template: expected a text with {instruction} and {response} once each, got "
                                 f"{template!r}")
        before, _, rest = template.partition("{instruction}")
        between, _, after = rest.partition("{response}")
        if "{response}" in before:
            raise ValueError(f"template: expected the instruction before the response, got {template!r}")
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: pass template=, such as '{instruction}\\n{response}'")
        marked = _chat(tokenizer, *MARKS)
        before, first, rest = marked.partition(MARKS[0])
        between, second, after = rest.partition(MARKS[1])
        if not first or not second:
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
    for instruction, answers in samples:
        parts = [answers] if isinstance(answers, str) else list(answers)
        if len(parts) > 1 and not all(parts):
            raise ValueError(f"response: expected parts that are not empty, got {parts!r}")
        text, (start, stop), (answer, end), trimmed = render(tokenizer, instruction, "".join(parts), template)
        # a chat template writes the special tokens itself
        encoded = tokenizer(text, add_special_tokens=template is not None, return_offsets_mapping=True, verbose=False)
        row: dict[str, list[Any]] = {"input_ids": list(encoded["input_ids"]), "labels": [], "instruction_mask": [],
                                     "white_space": [], "segments": [], "offsets": []}
        borders = _borders(parts, answer, end)
        closed = False
        for token, (left, right) in zip(row["input_ids"], encoded["offset_mapping"], strict=True):
            piece = text[left:right]
            first = left + len(piece) - len(piece.lstrip())  # " Paris" begins at its letter
            last = right - (len(piece) - len(piece.rstrip())) if piece.strip() else right
            blank = not piece.strip()
            if blank:
                first = left
            inside = right > left and start <= first and last <= stop
            response = right > left and answer <= first < end
            if not response and not closed and left >= end:  # the first token after the response
                closed, response = True, token in specials
            row["labels"].append(token if response else IGNORED)
            row["instruction_mask"].append(inside)
            row["white_space"].append(blank and right > left)
            row["segments"].append(1 + sum(first >= b for b in borders) if response else 0)
            left, right = max(first, start) - start, min(last, stop) - start
            row["offsets"].append((left + trimmed, right + trimmed) if right > left else (0, 0))
        words = any(i and not w for i, w in zip(row["instruction_mask"], row["white_space"], strict=True))
        if not words or all(label == IGNORED for label in row["labels"]):
            raise ValueError(f"no token of the sample {instruction[:40]!r} lies within its "
                             f"{'response' if words else 'instruction'}: separate the texts "
                             "in the template by a space or a line")
        rows.append(row)
    batch = _padded(rows, tokenizer.pad_token_id)
    if not any(isinstance(answers, (list, tuple)) for _, answers in samples):
        del batch["segments"]
    return batch


def _borders(parts: list[str], start: int, end: int) -> list[int]:
    """First characters of the second and later parts of a response that begins at ``start``."""
    if len(parts) > 1 and sum(map(len, parts)) != end - start:
        raise ValueError("the chat template trims a response given in parts: trim it before you cut it into parts")
    return [start + sum(map(len, parts[:k])) for k in range(1, len(parts))]


def _padded(rows: list[dict[str, list[Any]]], pad: int | None) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad or 0, "labels": IGNORED, "instruction_mask": False, "white_space": False, "segments": 0,
            "offsets": (0, 0)}
    lengths = [len(row["input_ids"]) for row in rows]
    out: dict[str, Any] = {key: torch.tensor([row[key] + [empty] * (width - n) for row, n in zip(rows, lengths)])
                           for key, empty in fill.items()}
    out["attention_mask"] = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return out


def _to(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else _to(value, device) for key, value in batch.items()}
