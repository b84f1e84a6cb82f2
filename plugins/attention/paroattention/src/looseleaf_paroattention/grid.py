"""The grid of tokens: its orders, tensors brought into one and back, and which calls lie on it (paper, reordering).

Tokens are numbered frame by frame, row by row (F-major). A permutation is named by its axes from the slowest to the
fastest: ``HWF`` puts all frames of one place next to each other. Attention does not care in which order its tokens
come, as long as queries, keys, values and outputs agree; rotary embeddings are on the tensors already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looseleaf import AttentionCall

AXES = "FHW"
PERMUTATIONS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""All six; the first is the order in which the tokens come."""


def grid_order(name: str, grid: Sequence[int]) -> Tensor:
    """(F * H * W,) int64: the token that comes to each place.

    Raises:
        ValueError: an unknown permutation.
    """
    if name not in PERMUTATIONS:
        raise ValueError(f"permutation: expected {', '.join(PERMUTATIONS)}, got {name!r}")
    return torch.arange(math.prod(grid)).view(*grid).permute([AXES.index(axis) for axis in name]).flatten()


def distinct(grid: Sequence[int]) -> tuple[str, ...]:
    """The permutations that differ on this grid: six, two for an image (F = 1), one for a line."""
    first: dict[tuple[int, ...], str] = {}
    for name in PERMUTATIONS:
        # axes of size 1 do not move a token: only the order of the others counts
        first.setdefault(tuple(AXES.index(a) for a in name if grid[AXES.index(a)] > 1), name)
    return tuple(first.values())


def token_orders(names: Sequence[str], grid: Sequence[int], tokens: int, text_first: bool,
                 lengths: Sequence[int] | None = None) -> Tensor:
    """The token that comes to each place, for grid and text together, (B, H, tokens) int64; B is 1 without lengths.

    Grid tokens come first, in the permutation of each head, so that blocks begin where planes of the grid do; text
    follows in its own order, then what lies beyond an item's length. The caller's output has its own order again.

    Args:
        names: the permutation of each head.
        grid: (F, H, W).
        tokens: of the tensors, text and padding included.
        text_first: text stands before the grid in the caller's order, else after it.
        lengths: valid tokens of each batch item, those of the grid and as much text as there is; 0 for an item that
            is all padding.
    """
    cells = math.prod(grid)
    orders = {name: grid_order(name, grid) for name in dict.fromkeys(names)}
    items = []
    for length in [tokens] if lengths is None else lengths:
        start = length - cells if text_first else 0
        if length < cells:  # all padding: any order will do
            items.append(torch.arange(tokens).expand(len(names), -1))
            continue
        text = torch.arange(start) if text_first else torch.arange(cells, length)
        rest = torch.cat([text, torch.arange(length, tokens)])
        items.append(torch.stack([torch.cat([orders[name] + start, rest]) for name in names]))
    return torch.stack(items)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes ``order``, of the same shape."""
    return torch.argsort(order, -1)


def permute(x: Tensor, order: Tensor) -> Tensor:
    """Bring the tokens of (B, H, L, D) into an order (B or 1, H, L); a contiguous copy."""
    batch, heads, length, head_dim = x.shape
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * length
    rows = (order + start).flatten()
    return x.reshape(-1, head_dim).index_select(0, rows).view(batch, heads, length, head_dim)


@dataclass(frozen=True)
class TokenGrid:
    """What calls must look like, and how their tokens are reordered; shared by the method and its calibration.

    Attributes:
        size: frames, height and width, or None: not known yet.
        text_tokens: tokens of text in the same sequence, at most.
        text_first: text stands before the grid, else after it.
        permutations: as :class:`PAROAttention` takes them.
        dense_steps: number of initial denoising steps that are exact.
        step_groups: parts of a run of denoising steps.
    """

    size: tuple[int, int, int] | None
    text_tokens: int
    text_first: bool
    permutations: Any
    dense_steps: int
    step_groups: int

    def not_for(self, call: AttentionCall) -> str | None:
        """Why a call is computed exactly whatever its step, or None."""
        _, _, _, queries, keys, _ = call.shape
        if call.is_causal or call.phase != "bidirectional":
            return "causal attention"
        if call.is_cross or queries != keys:
            return "cross attention"
        if call.mask is not None:
            return "a mask of the caller's own"
        if call.value.shape != call.key.shape:
            return "values of another size than keys"
        if call.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{call.query.dtype}"
        if not queries:
            return "no tokens"
        return None

    def item_lengths(self, call: AttentionCall) -> tuple[int, ...] | None:
        """Valid tokens of each batch item; None where all are.

        Raises:
            ValueError: they are not the tokens of grid and text.
        """
        tokens = call.query.shape[2]
        if self.size is None:
            side = math.isqrt(max(0, tokens - self.text_tokens))
            square = f", such as (1, {side}, {side})" if side and side * side == tokens - self.text_tokens else ""
            raise ValueError(f"PAROAttention.grid: expected (frames, height, width) whose product and text_tokens="
                             f"{self.text_tokens} make the {tokens} tokens of a self-attention call{square}, got None. "
                             "Pass the size of the latents in patches")
        cells = math.prod(self.size)
        if cells + self.text_tokens != tokens:
            raise ValueError(
                f"PAROAttention.grid: expected a grid and text_tokens that make the {tokens} tokens of a "
                f"self-attention call, got grid={self.size} with {cells} tokens and text_tokens={self.text_tokens}, "
                f"{cells + self.text_tokens} together. Pass the size of the latents in patches, and leave layers of "
                "another size out with attach(..., layers=...)")
        if call.query_lengths is None and call.key_lengths is None:
            return None
        query_lengths, key_lengths = (lengths.tolist() for lengths in call.lengths())
        for queries, keys in zip(query_lengths, key_lengths, strict=True):
            if queries != keys or (keys and keys < cells):
                raise ValueError(f"batch item: expected equally many queries and keys, the {cells} tokens of grid="
                                 f"{self.size} and up to {self.text_tokens} of text, or none, got {queries} queries "
                                 f"and {keys} keys")
        return tuple(key_lengths)

    def step_group(self, call: AttentionCall) -> int | None:
        """The step group of a call, from 0; None for one of the first ``dense_steps``.

        Raises:
            ValueError: the step, or the number of steps, is needed and not known.
        """
        if (self.dense_steps or self.step_groups > 1) and call.step is None:
            raise ValueError(f"dense_steps={self.dense_steps} and step_groups={self.step_groups}: expected a denoising "
                             "step, got none. Attach to a diffusers pipeline or model, or set attached.step before "
                             "each step of your sampling loop")
        if call.step is not None and call.step < self.dense_steps:
            return None
        if self.step_groups == 1:
            return 0
        if not call.steps:
            raise ValueError(f"step_groups={self.step_groups}: expected the number of denoising steps, got none. "
                             "Attach to a diffusers pipeline, or pass attach(..., steps=...)")
        return min((call.step or 0) * self.step_groups // call.steps, self.step_groups - 1)

    def requested(self, layer: int, heads: int) -> tuple[str, ...] | None:
        """The permutation of each head that the caller asked for; None: the best of each is to be found.

        Raises:
            ValueError: names for another number of heads.
        """
        names = self.permutations
        if isinstance(names, Mapping):
            names = names.get(layer, "auto")
        if names == "auto":
            return None
        names = (names,) * heads if isinstance(names, str) else tuple(names)
        if len(names) != heads:
            raise ValueError(f"permutations: expected one name for layer {layer} or one for each of its {heads} heads, "
                             f"got {len(names)}")
        return names

    def orders(self, names: Sequence[str], tokens: int, lengths: Sequence[int] | None) -> Tensor:
        """:func:`token_orders` for this grid, (B or 1, H, tokens) int64 on the CPU."""
        assert self.size is not None
        return token_orders(names, self.size, tokens, self.text_first, lengths)
