"""Pooled activations of prompts: mean over the tokens of a prompt, padding and the first token left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import capture


def encode(tokenizer: Any, texts: Sequence[str], device: torch.device, left: bool = False) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (n, L), padded on the right, or on the ``left`` to generate from.

    Raises:
        ValueError: a text without any token.
    """
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    empty = [text for text, row in zip(texts, rows, strict=True) if not row]
    if empty:
        raise ValueError(f"the text {empty[0]!r} has no token: leave it out")
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    length = max(len(row) for row in rows)
    gaps = [length - len(row) for row in rows]
    if left:
        ids = [[pad] * gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    else:
        ids = [row + [pad] * gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[1] * len(row) + [0] * gap for gap, row in zip(gaps, rows, strict=True)]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def weights(mask: Tensor, skip_first: bool) -> Tensor:
    """(n, L, 1) weights of the tokens in a prompt's mean; they sum to 1.

    The first token is left out (where there is another one): its activations are massive and say little.
    """
    kept = mask.clone().float()
    if skip_first:
        kept[:, 0] = torch.where(mask.sum(1) > 1, 0.0, kept[:, 0])
    return (kept / kept.sum(1, keepdim=True))[..., None]


def by_length(batch: dict[str, Tensor], share: Tensor, size: int = 8) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Right-padded prompts in groups of like length, each cut to its longest: much less padding to compute."""
    lengths = batch["attention_mask"].sum(1)
    for rows in lengths.argsort().split(size):
        longest = int(lengths[rows].max())
        yield {key: value[rows, :longest] for key, value in batch.items()}, share[rows, :longest]


def pooled(model: nn.Module, pattern: str, batch: dict[str, Tensor], skip_first: bool) -> dict[str, Tensor]:
    """Module name -> (n, d) mean activations, fp32, without gradient."""
    share = weights(batch["attention_mask"], skip_first)
    with torch.no_grad(), capture(model, pattern, reduce=lambda z: (z.float() * share).sum(1)) as seen:
        body(model)(**batch)
    silent = [name for name, values in seen.items() if not values]
    if silent:
        raise ValueError(f"{silent[0]} matches the pattern {pattern!r} but is not run by the model: name other modules")
    return {name: values[0] for name, values in seen.items()}


def body(model: nn.Module) -> Any:
    """The model without its head, which steering does not need."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for weights and evaluation mode; both as before afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, was in before:
            p.requires_grad_(was)
        model.train(training)
