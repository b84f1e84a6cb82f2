"""What a backend attends to, read from its outputs: no backend needs to say it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING

from looseleaf import AttentionBackend, AttentionCall

if TYPE_CHECKING:
    from torch import Tensor

CELLS = 32
"""Most cells along a side of a map."""


def attention_map(backend: AttentionBackend | None, call: AttentionCall, cells: int = CELLS) -> Tensor:
    """Attention probability of each cell of queries and keys, as the backend computes it.

    A row of attention is a mean of values. Where the values are the indicators of ``cells`` groups of keys, it is what
    the row gives to each group, and exactly zero for the groups that were left out.

    Args:
        backend: whose; None: exact attention.
        call: a call of attention over itself, Lq = Lk; batch item 0 is looked at, and what the state holds stays.
        cells: of a side; fewer where the heads or the text are smaller.

    Returns:
        (Hq, n, n) fp32: rows are queries, each a mean over its queries; a row of exact attention sums to 1.
    """
    import torch

    length, width = call.key.shape[2], call.value.shape[-1]
    cells = min(cells, width, length)
    cell = torch.arange(length, device=call.key.device) * cells // length
    indicators = torch.nn.functional.one_hot(cell, width).to(call.value.dtype)
    made = dataclasses.replace(call, value=indicators.expand_as(call.value).contiguous(), record=lambda **_: None,
                               state=SimpleNamespace(**vars(call.state)))
    out = (made.dense() if backend is None else backend.attend(made))[0, :, :, :cells].float()
    sums = torch.zeros(len(out), cells, cells, device=out.device).index_add_(1, cell[-out.shape[1]:], out)
    found: Tensor = sums / torch.bincount(cell, minlength=cells)[:, None]
    return found
