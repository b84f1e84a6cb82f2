"""Which key blocks a query block keeps, given how important each is (paper, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blocks_kept(blocks: int, select: float) -> int:
    """k, how many of ``blocks`` key blocks each query block keeps.

    One more than the fraction says, also where it gives a whole number: so the authors' code counts. Never more than
    there are.
    """
    # rounded first: 0.29 * 100 is 28.999... in floating point
    return min(blocks, max(1, math.floor(round(blocks * select, 9)) + 1))


def prompt_blocks(prompt: int, length: int, block: int) -> int:
    """How many of the first key blocks are the prompt's; 0 where there is only one part.

    The block in which the prompt ends and the response begins counts as prompt, as in the authors' code, except where
    it is the last one: then it is the response.

    Args:
        prompt: tokens of the prompt.
        length: tokens of prompt and response.
        block: tokens of a block.
    """
    if not 0 < prompt < length:
        return 0
    return min(-(-prompt // block), -(-length // block) - 1)


def select_blocks(importance: Tensor, lengths: list[int], prompts: list[int], block: int, select: float) -> Tensor:
    """The most important key blocks of each query block, of the prompt and of the response apart.

    The authors' code takes the prompt's from the top k over all blocks; the paper's fraction is of each part.

    Args:
        importance: (B, H, Nq, Nk), larger is more important. Among equals the first are kept.
        lengths: keys of each batch item.
        prompts: tokens of the prompt of each item; 0: no parts.
        block: tokens of a block.
        select: fraction of the blocks to keep, in (0, 1]; see :func:`blocks_kept`.

    Returns:
        (B, H, Nq, Nk) bool, nothing beyond the lengths.
    """
    kept = torch.zeros_like(importance, dtype=torch.bool)
    for b, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        end = -(-length // block)
        middle = prompt_blocks(prompt, length, block)
        for start, stop in ((0, middle), (middle, end)):
            if stop > start:
                part = importance[b, :, :, start:stop]
                order = torch.argsort(part, dim=-1, descending=True, stable=True)
                best = order[..., :blocks_kept(stop - start, select)]
                kept[b, :, :, start:stop].scatter_(-1, best, True)
    return kept
