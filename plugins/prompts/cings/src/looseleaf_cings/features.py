"""Rows for training: instruction, context and response as token ids, and which of them the loss is on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from looseleaf.plugin import In, check_fields
from looseleaf_text.encoding import Encoding

IGNORED = -100
"""Label of a token that the loss is not on."""
Arm = Literal["context", "no_mask", "no_context"]
Messages = str | Sequence[Mapping[str, str]]
"""What the user says, or the messages of a chat that ends with the user's."""
_MARK = "looseleaf response"


@dataclasses.dataclass
class Rows:
    """Makes rows for any trainer out of triples of instruction, context and response.

    A row is the chat template around the instruction, the opening of the assistant's turn, context, separator, response
    and end of turn. The loss is on the response and the token that ends the turn (section 3 of the paper). The context
    is attended to, and gradients pass through it: it is hidden from the loss alone.

    Instruction, context and separator are tokenized as one text and the response apart, so that no token straddles the
    context and the response, and so that a server that is given the same text reads the same tokens (ours: the paper
    does not say).

    Args:
        tokenizer: of transformers, with a chat template unless ``chat_template`` is given.
        arm: ``context``: CInGS. ``no_mask``: the loss is on context and separator, too. ``no_context``: the context is
            left out, which is plain instruction tuning.
        placement: where the context stands: at the beginning of the assistant's turn, as in the paper, or before the
            instruction in the user's.
        separator: between the context and what follows it (ours: the paper's is not known).
        max_length: most tokens of a row, >= 8. A context that is too long is cut, never the response.
        context_keep: which end of such a context is kept.
        chat_template: instead of the tokenizer's own.

    Raises:
        ValueError: no chat template, no token that ends a turn, or ``no_mask`` with the context in the user's turn.
    """

    tokenizer: Any
    arm: Arm = "context"
    placement: Literal["assistant", "user"] = "assistant"
    separator: str = "\n"
    max_length: Annotated[int, In(">= 8")] = 2048
    context_keep: Literal["head", "tail"] = "head"
    chat_template: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.arm == "no_mask" and self.placement == "user":
            raise ValueError("Rows.arm: expected 'context' or 'no_context' with placement='user', got 'no_mask': the "
                             "loss would be on a part of the user's turn")
        if not (self.chat_template or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError(f"expected a tokenizer with a chat template, got {type(self.tokenizer).__name__} without: "
                             "give chat_template=..., or take the tokenizer of the model's instruct version")

    @functools.cached_property
    def _encoding(self) -> Encoding:
        return Encoding(self.tokenizer)

    @functools.cached_property
    def _turn(self) -> tuple[str, int]:
        """What opens the assistant's turn where the template does not do so by itself, and the token that ends it."""
        asked = [{"role": "user", "content": "a"}]
        closed = self._chat([*asked, {"role": "assistant", "content": _MARK}])
        before, found, after = closed.rpartition(_MARK)
        if not found:
            raise ValueError("expected a chat template that keeps what the assistant says, got one that does not")
        bare = self._chat(asked)
        opens = self._chat(asked, add_generation_prompt=True) != bare
        special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        ends = [n for n in self._encoding.bare([after])[0] if n in special] if after else []
        end = ends[0] if ends else self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"expected a tokenizer with a token that ends a turn, got {type(self.tokenizer).__name__} "
                             "without an eos_token: set one")
        return "" if opens else before.removeprefix(bare), int(end)

    def _chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        text = str(self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False,
                                                      chat_template=self.chat_template, **options))
        first = getattr(self.tokenizer, "bos_token", None)
        if first and self.tokenizer.bos_token_id in self._encoding.begin:
            text = text.removeprefix(first)  # or there would be two
        return text

    @property
    def end(self) -> int:
        """The token that ends the assistant's turn."""
        return self._turn[1]

    def text(self, instruction: Messages, context: str | None = None, *, reserve: int = 0) -> str:
        """What comes before the response; the context is cut where ``max_length - reserve`` tokens do not hold it all.

        Args:
            instruction: see :data:`Messages`.
            context: None or empty: the instruction alone.
            reserve: tokens kept for the response.

        Raises:
            ValueError: nothing of the context would be left, or the instruction alone is too long.
        """
        return self._compose(instruction, context, reserve)[0]

    def __call__(self, example: Mapping[str, Any], index: int | None = None) -> dict[str, list[int]]:
        """The row of one example: ``input_ids``, ``attention_mask`` and ``labels``, equally many integers.

        Args:
            example: ``instruction`` (see :data:`Messages`), ``context`` and ``response``.
            index: names the example in errors.

        Raises:
            ValueError: no response or instruction, no context in an arm that reads it, or no room; the row is named.
        """
        try:
            return self._row(example)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}" if index is not None else str(error)) from error

    def all(self, examples: Iterable[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
        """The rows of several examples; an error names the row."""
        return [self(example, index) for index, example in enumerate(examples)]

    def _row(self, example: Mapping[str, Any]) -> dict[str, list[int]]:
        instruction, context, response = (example.get(k) for k in ("instruction", "context", "response"))
        if not instruction:
            raise ValueError(f"instruction: expected a text or messages, got {instruction!r}")
        if not isinstance(response, str) or not response.strip():
            raise ValueError(f"response: expected a text, got {response!r}")
        if self.arm == "no_context":
            context = None
        elif not isinstance(context, str):
            raise ValueError(f"context: expected a text in arm {self.arm!r} (empty where there is none), got "
                             f"{context!r}")
        answer = [*self._encoding.alone(response), self.end]
        _, ids, opening = self._compose(instruction, context, len(answer))
        start = opening if self.arm == "no_mask" else len(ids)
        return {"input_ids": [*ids, *answer], "attention_mask": [1] * (len(ids) + len(answer)),
                "labels": [IGNORED] * start + ids[start:] + answer}

    def _compose(self, instruction: Messages, context: str | None, reserve: int) -> tuple[str, list[int], int]:
        """The text before the response, its ids, and how many of them come before the context."""
        text = self._joined(instruction, context)
        ids = self._ids(text)
        limit, kept = self.max_length - reserve, context or ""
        if len(ids) > limit:
            least = len(self._ids(self._joined(instruction, None)))
            pieces = self._encoding.bare([kept])[0] if kept else []
            keep = len(pieces)
            while len(ids) > limit:
                keep -= len(ids) - limit
                if keep <= 0:
                    raise ValueError(f"expected instruction, response and some of the context within max_length="
                                     f"{self.max_length} tokens, got {least} + {reserve} without the context: raise "
                                     "max_length or shorten them")
                part = pieces[:keep] if self.context_keep == "head" else pieces[-keep:]
                kept = str(self.tokenizer.decode(part, clean_up_tokenization_spaces=False)).strip("\ufffd")
                text = self._joined(instruction, kept)
                ids = self._ids(text)
        opening = self._ids(self._joined(instruction, None)) if self.arm == "no_mask" else ids
        return text, ids, _common(ids, opening)

    def _joined(self, instruction: Messages, context: str | None) -> str:
        messages = [{"role": "user", "content": instruction}] if isinstance(instruction, str) else [
            dict(m) for m in instruction]
        if context and self.placement == "user":
            messages[-1]["content"] = context + self.separator + messages[-1]["content"]
        opening = self._chat(messages, add_generation_prompt=True) + self._turn[0]
        return opening + context + self.separator if context and self.placement == "assistant" else opening

    def _ids(self, text: str) -> list[int]:
        return self._encoding.opened([text])[0]


def cings_features(example: Mapping[str, Any], tokenizer: Any, **options: Any) -> dict[str, list[int]]:
    """One row for any trainer, see :class:`Rows`, which is faster for many.

    Args:
        example: ``instruction``, ``context`` and ``response``.
        tokenizer: of transformers.
        options: ``arm``, ``placement``, ``separator``, ``max_length``, ``context_keep``, ``chat_template``.

    Raises:
        ValueError: as :class:`Rows`.
    """
    return Rows(tokenizer, **options)(example)


def packed(rows: Iterable[Mapping[str, Sequence[int]]], length: int) -> list[dict[str, list[int]]]:
    """Rows joined to longer ones of at most ``length`` tokens, in order, with ``position_ids`` that begin anew.

    Models of transformers let the parts of such a row not see one another, where it comes without an attention mask;
    :class:`CInGSTrainer` checks that.

    Raises:
        ValueError: a row is longer than ``length``.
    """
    out: list[dict[str, list[int]]] = []
    for n, row in enumerate(rows):
        size = len(row["input_ids"])
        if size > length:
            raise ValueError(f"row {n}: expected at most length={length} tokens, got {size}: raise length, or make the "
                             "rows with a smaller max_length")
        if not out or len(out[-1]["input_ids"]) + size > length:
            out.append({"input_ids": [], "position_ids": [], "labels": []})
        out[-1]["input_ids"] += row["input_ids"]
        out[-1]["position_ids"] += range(size)
        # the first token of a row would be predicted from the row before
        out[-1]["labels"] += [IGNORED, *row["labels"][1:]]
    return out


@dataclasses.dataclass
class Collator:
    """Pads rows and stacks them to tensors, int64 (rows, longest).

    Args:
        pad_token_id: fills ``input_ids``; any id will do, padding is not attended to.
        side: of the padding.
    """

    pad_token_id: int = 0
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``; with them ``attention_mask``, or ``position_ids`` of :func:`packed` rows.

        Raises:
            ValueError: none of the rows has a labelled token after its first, whose loss would be NaN.
        """
        if not any(label != IGNORED for row in rows for label in row["labels"][1:]):
            raise ValueError("expected a batch with labelled tokens, got one where all labels are -100: its loss would "
                             "be NaN. Leave out rows whose response was cut away")
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}
        parts = ("position_ids",) if "position_ids" in rows[0] else ("attention_mask",)
        width = max(len(row["input_ids"]) for row in rows)
        out = {}
        for name in ("input_ids", "labels", *parts):
            lines = []
            for row in rows:
                own = list(row[name]) if name in row else [1] * len(row["input_ids"])
                fill = [fills[name]] * (width - len(own))
                lines.append(own + fill if self.side == "right" else fill + own)
            out[name] = torch.tensor(lines, dtype=torch.long)
        return out


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))
