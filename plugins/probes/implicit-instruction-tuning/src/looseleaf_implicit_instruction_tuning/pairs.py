"""Instructions with their responses: how they are written, made into ids, and read from what users have."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from looseleaf import unwrapped
from looseleaf.modes import evaluating
from looseleaf_text import LocalModel

IGNORED = -100
"""Label of a token without loss."""


@dataclasses.dataclass(frozen=True)
class Tags:
    """The plain-text tags around an instruction; no new tokens (format of Tulu).

    Args:
        user: line before the instruction.
        assistant: line before the response.
    """

    user: str = "<|user|>"
    assistant: str = "<|assistant|>"

    def prompt(self, instruction: str) -> str:
        """What a response follows: both tags and, between them, the instruction without white space around it."""
        return f"{self.user}\n{instruction.strip()}\n{self.assistant}\n"


@dataclasses.dataclass(frozen=True)
class Pair:
    """An instruction and its response; ``instruction`` may be empty."""

    instruction: str
    response: str


def as_pairs(data: Any, least: int = 2) -> list[Pair]:
    """Pairs of what users have.

    Args:
        data: an iterable of :class:`Pair`, of ``(instruction, response)``, or of rows with ``instruction`` and
            ``response`` (or ``output``), with ``prompt`` and ``completion``, or with ``messages`` of which the first
            user's and the answer to it are taken.
        least: fewest pairs that will do.

    Raises:
        ValueError: a row of another form, without an assistant's turn, with an empty response; or too few rows.
    """
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise ValueError(f"data: expected a list of (instruction, response) pairs, got {type(data).__name__}")
    pairs = [_pair(row, n) for n, row in enumerate(data)]
    if len(pairs) < least:
        raise ValueError(f"data: expected {least} pairs or more, got {len(pairs)}")
    return pairs


def _pair(row: Any, n: int) -> Pair:
    if isinstance(row, Mapping):
        if "messages" in row:
            row = _turns(row["messages"], n)
        else:
            for names in (("instruction", "response"), ("instruction", "output"), ("prompt", "completion")):
                if all(name in row for name in names):
                    row = tuple(row[name] for name in names)
                    break
            else:
                raise ValueError(f"pair {n}: expected instruction and response, prompt and completion, or messages, "
                                 f"got {', '.join(map(str, row)) or 'an empty row'}")
    if isinstance(row, Pair):
        row = (row.instruction, row.response)
    if not isinstance(row, (tuple, list)) or len(row) != 2 or not all(isinstance(part, str) for part in row):
        raise ValueError(f"pair {n}: expected two texts, instruction and response, got {row!r:.80}")
    if not row[1].strip():
        raise ValueError(f"pair {n}: expected a response, got an empty text: leave the pair out")
    return Pair(row[0].strip(), row[1].strip())


def _turns(messages: Sequence[Mapping[str, str]], n: int) -> tuple[str, str]:
    """The first user's turn and the assistant's answer to it; the paper's data have single turns."""
    for user, answer in itertools.pairwise(messages):
        if user.get("role") == "user" and answer.get("role") == "assistant":
            return str(user.get("content", "")), str(answer.get("content", ""))
    roles = ", ".join(str(m.get("role")) for m in messages)
    raise ValueError(f"pair {n}: expected a user's turn and an assistant's turn after it, got {roles or 'no turns'}")


def strip_instructions(data: Any) -> list[Pair]:
    """The pairs with every instruction empty: what response tuning is trained on."""
    return [Pair("", pair.response) for pair in as_pairs(data, 1)]


def end_of(tokenizer: Any) -> int:
    """The id that ends a text; ValueError without one."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise ValueError("expected a tokenizer with an end-of-text token, got one without: set tokenizer.eos_token")
    return int(end)


def encode(local: LocalModel, pairs: Sequence[Pair], tags: Tags) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and response ids of each pair, the end of text behind the response.

    A prompt's ids are the same in training, scoring and generation: a response never changes how the prompt before it
    is tokenized. What the tokenizer itself puts before a text stays.
    """
    end = end_of(local.tokenizer)
    heads, tails = local.encode_pairs([tags.prompt(p.instruction) for p in pairs], [[p.response] for p in pairs])
    return [(head, [*tail, end]) for head, (tail,) in zip(heads, tails, strict=True)]


def features(local: LocalModel, data: Any, *, method: str = "instruction", tags: Tags | None = None,
             max_length: int = 2048) -> tuple[list[dict[str, list[int]]], int]:
    """Rows to train on, and how many pairs were left out.

    Args:
        local: model and tokenizer.
        data: see :func:`as_pairs`.
        method: ``"instruction"``; ``"response"``, with empty instructions; ``"single-task"``, as instruction.
        tags: around the instructions; None: Tulu's.
        max_length: longest row in tokens. A longer pair is left out: cut off, its response would have no end, which
            teaches a model to run on.

    Returns:
        rows of ``input_ids`` and ``labels``, -100 up to the newline after the assistant's tag; and the number left out.

    Raises:
        ValueError: an unknown method, or no pair is short enough; see also :func:`as_pairs`.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected {', '.join(map(repr, METHODS))}, got {method!r}")
    pairs = strip_instructions(data) if method == "response" else as_pairs(data, 1)
    rows = [{"input_ids": [*head, *tail], "labels": [*[IGNORED] * len(head), *tail]}
            for head, tail in encode(local, pairs, tags or Tags())]
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if not kept:
        raise ValueError(f"max_length: expected pairs of at most {max_length} tokens, got none: the shortest has "
                         f"{min(len(row['input_ids']) for row in rows)}")
    return kept, len(rows) - len(kept)


METHODS = ("instruction", "response", "single-task")
"""The paper's ways to tune."""


@dataclasses.dataclass(frozen=True)
class Response:
    """What a model answered: the text, its ids without the end, and whether it ended by itself."""

    text: str
    ids: list[int]
    ended: bool


@torch.no_grad()
def respond(local: LocalModel, instructions: Sequence[str], *, rules: Any = None, tags: Tags | None = None,
            max_new_tokens: int = 128, batch: int = 64) -> list[Response]:
    """Greedy responses to instructions, through the model's own ``generate``.

    Every penalty that a model's generation settings may bring is off. Prompts are padded on the left where the model
    undoes that, else only prompts of one length share a batch.

    Args:
        local: model and tokenizer.
        instructions: texts.
        rules: a :class:`RuleAdapter`, or None.
        tags: around the instructions; None: Tulu's.
        max_new_tokens: after which a response is cut off.
        batch: most prompts at a time.
    """
    from transformers import GenerationConfig

    tags, model, tokenizer = tags or Tags(), local.model, local.tokenizer
    prompts = local.encode_pairs([tags.prompt(text) for text in instructions], [["a"]] * len(instructions))[0]
    settings = getattr(model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    ends = sorted({end_of(tokenizer), *([own] if isinstance(own, int) else own or [])})
    padding = getattr(tokenizer, "pad_token_id", None)
    # what is not set here is taken from the model's own settings, penalties included
    config = GenerationConfig(max_new_tokens=max_new_tokens, min_length=0, do_sample=False,
                              num_beams=1, repetition_penalty=1.0, encoder_repetition_penalty=1.0,
                              no_repeat_ngram_size=0, guidance_scale=1.0, eos_token_id=ends,
                              pad_token_id=ends[0] if padding is None else padding)
    out: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    with evaluating(model):
        pads = len({len(p) for p in prompts}) == 1 or _undoes_padding(local, prompts)
        at = 0
        while at < len(order):
            rows = [n for n in order[at:at + batch] if pads or len(prompts[n]) == len(prompts[order[at]])]
            at += len(rows)
            ids, mask = _padded([prompts[n] for n in rows], local.device)
            processors = [] if rules is None else [rules.after(ids)]
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config,
                                  logits_processor=processors)[:, ids.shape[1]:].tolist()
            for n, row in zip(rows, made, strict=True):
                stop = next((i for i, token in enumerate(row) if token in ends), len(row))
                text = str(tokenizer.decode(row[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False))
                out[n] = Response(text, row[:stop], stop < len(row))
    return out


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long, device=device)
    for n, row in enumerate(rows):
        ids[n, width - len(row):] = torch.tensor(row, device=device)
        mask[n, width - len(row):] = 1
    return ids, mask


def _undoes_padding(local: LocalModel, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the shortest prompt reads the same padded on the left to the length of the longest."""
    model = local.model
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    ids, mask = _padded([shortest, longest], local.device)
    extra: dict[str, Any] = {}
    if "position_ids" in inspect.signature(unwrapped(model).forward).parameters:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[0, -1].float()
    alone = model(input_ids=ids[:1, -len(shortest):], use_cache=False).logits[0, -1].float()
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
    return bool((padded - alone).abs().max() <= tolerance * alone.abs().max().clamp(min=1.0))


__all__ = ["IGNORED", "METHODS", "Pair", "Response", "Tags", "as_pairs", "encode", "end_of", "features", "respond",
           "strip_instructions"]
