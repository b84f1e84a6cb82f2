"""The batch that the method reads: tokens, what is the response, and what may be removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from looseleaf.errors import did_you_mean

IGNORED = -100
"""Label of a token that is not predicted."""

KEYS = ("input_ids", "attention_mask", "labels", "instruction_mask", "segments", "offsets", "teacher")
"""What a batch may hold:

==================== ============= ====================================================================================
``input_ids``        (B, L) int64  token ids of the student's tokenizer
``attention_mask``   (B, L)        1 for tokens, 0 for padding on either side; left out: no padding
``labels``           (B, L) int64  the response's token ids, -100 everywhere else
``instruction_mask`` (B, L) bool   tokens that may be removed; left out: every token before the response, also those of
                                   a template
``segments``         (B, L) int64  number of the part of the response that a token belongs to, from 1; 0 elsewhere
``offsets``          (B, L, 2)     characters of the instruction that a token covers, from and to (excluded)
``teacher``          mapping       the same samples in the teacher's tokens, where its tokenizer is another one: all of
                                   the above but ``teacher``; both sides need ``offsets`` then
==================== ============= ====================================================================================
"""


def checked(batch: Mapping[str, Any], name: str = "the batch") -> dict[str, Any]:
    """The batch with every mask filled in (bool), after a look at names, shapes and contents.

    Raises:
        ValueError: a name is missing or unknown, shapes differ, a row has no response or nothing before it.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"{name} is a {type(batch).__name__}: allowed is a mapping with input_ids and labels, such as "
                         "looseleaf_leaf.encode makes")
    for key in batch:
        if key not in KEYS:
            raise ValueError(f"{name} has {key!r}: allowed are {', '.join(KEYS)}.{did_you_mean(str(key), KEYS)}")
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise ValueError(f"{name} has no {key!r}: it is needed (looseleaf_leaf.encode makes both; labels are -100 "
                             "outside the response)")
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids of {name} is {shape}: allowed is a tensor (B, L) of token ids that is not empty")
    made: dict[str, Any] = dict(batch)
    made.setdefault("attention_mask", torch.ones_like(ids))
    for key, value in made.items():
        if key == "teacher":
            continue
        wanted = (*ids.shape, 2) if key == "offsets" else tuple(ids.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} of {name} is {shape}: allowed is a tensor of shape {wanted}, as of input_ids")
    made["attention_mask"] = made["attention_mask"].bool()
    response = (made["labels"] != IGNORED) & made["attention_mask"]
    response[:, 0] = False  # nothing stands before the first token that could predict it
    if not bool(response.any(1).all()):
        rows = (~response.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows[:5]} of {name} have no response: labels must differ from -100 somewhere beyond "
                         "the first token")
    made["response_mask"] = response
    before = (response.cumsum(1) == 0) & made["attention_mask"]
    if "instruction_mask" in made:
        mask = made["instruction_mask"].bool()
        wrong = (mask & ~before).any(1)
        if bool(wrong.any()):
            raise ValueError(f"instruction_mask of {name} marks padding or tokens from the response on in rows "
                             f"{wrong.nonzero().flatten().tolist()[:5]}: only tokens before the response can be "
                             "removed")
        made["instruction_mask"] = mask
    else:
        made["instruction_mask"] = before
    return made


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
                raise ValueError(f"segments of row {row} are {part} in the response: allowed is 1 or more there")
            keep = full["attention_mask"][row] & (segments[row] <= part)
            mine = segments[row] == part
            earlier = full["response_mask"][row] & (segments[row] < part)
            rows.append({"input_ids": full["input_ids"][row], "attention_mask": keep.to(torch.int64),
                         "labels": full["labels"][row].where(mine & full["response_mask"][row], IGNORED),
                         "instruction_mask": full["instruction_mask"][row] | earlier})
    return {key: torch.stack([r[key] for r in rows]) for key in rows[0]}
