"""Sensitivities of one tokenizer's tokens carried over to another's."""

from __future__ import annotations

import torch
from torch import Tensor


def align(norms: Tensor, offsets: Tensor, onto: Tensor, mask: Tensor) -> Tensor:
    """For each token of the student the largest norm among the teacher's tokens that share a character with it.

    The largest, because a token matters to the teacher when any part of it does [this project's rule; in the paper both
    have one tokenizer].

    Args:
        norms: (B, T) of the teacher's tokens.
        offsets: (B, T, 2) int, characters of the instruction that each of the teacher's tokens covers, from and to
            (excluded); (0, 0): none.
        onto: (B, L, 2), the same of the student's tokens.
        mask: (B, L) bool, tokens that need a value; the others get zero.

    Raises:
        ValueError: a token of ``mask`` shares no character with any of the teacher's tokens, or other rows.
    """
    if len(norms) != len(onto):
        raise ValueError(f"the teacher's encoding has {len(norms)} rows, the student's {len(onto)}: both must hold the "
                         "same samples")
    offsets = offsets.to(norms.device)
    onto, mask = onto.to(norms.device), mask.to(norms.device)
    out = torch.zeros(mask.shape, dtype=norms.dtype, device=norms.device)
    for row in range(len(onto)):  # row by row: (L, T) fits where (B, L, T) may not
        starts = torch.maximum(onto[row, :, None, 0], offsets[row, None, :, 0])
        ends = torch.minimum(onto[row, :, None, 1], offsets[row, None, :, 1])
        shared = ends > starts
        lost = mask[row] & ~shared.any(1)
        if bool(lost.any()):
            token = int(lost.nonzero()[0])
            raise ValueError(f"the tokenizers cannot be aligned: token {token} of row {row} (characters "
                             f"{onto[row, token].tolist()} of the instruction) shares no character with any of the "
                             "teacher's tokens; give encode the same texts for both")
        best = norms[row].expand_as(shared).masked_fill(~shared, -torch.inf).amax(1)
        out[row] = torch.where(mask[row], best, out[row])
    return out
