"""A text to calibrate on, in which something far away is asked for (paper, section 3.2: one sample of such a task)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

SHORTEST = 256
"""Tokens that hold a few pairs and the question."""


def key_value_ids(tokenizer: Any, length: int, seed: int = 0) -> Tensor:
    """A list of random keys and values, and the question for one that stands about a quarter of the way in.

    Args:
        tokenizer: of transformers.
        length: tokens of the text, 256 or more: about as many as your prompts have.
        seed: of keys and values.

    Returns:
        (1, length) int64; it begins with the tokenizer's start token where it has one.

    Raises:
        ValueError: ``length`` is too small.
    """
    if length < SHORTEST:
        raise ValueError(f"length={length}: allowed is {SHORTEST} tokens or more. For MInference.calibrate take more "
                         "than its min_length")

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    rng = random.Random(seed)
    start = getattr(tokenizer, "bos_token_id", None)
    first = [] if start is None else [start]
    text = [*first, *ids("The keys and their values:\n")]
    question: list[int] = []
    while len(text) + len(question) < length:
        key, value = (f"{rng.getrandbits(32):08x}" for _ in range(2))
        text += ids(f'"{key}": "{value}"\n')
        if not question and len(text) >= length // 4:
            question = ids(f'\nThe value of the key "{key}" is "')
    return torch.tensor([text[:length - len(question)] + question], dtype=torch.int64)
