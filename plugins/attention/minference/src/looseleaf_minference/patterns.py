"""Which keys a head attends to: the three patterns and their indices (paper, sections 3.1 and 3.2, algorithms 2 to 4).

All heads of all batch items are treated at once. A pattern gives whole blocks of keys for each block of queries; a
vertical-slash head also has single key columns, which count only where no block of the row has them already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looseleaf import AttentionCall
from looseleaf.errors import did_you_mean
from looseleaf_kernels import (
    BlockIndex,
    Layout,
    block_mean,
    column_index,
    last_query_scores,
    vertical_slash_attention,
)

NAMES = ("a_shape", "vertical_slash", "block_sparse")
LEAST_COLUMNS, LEAST_DIAGONALS = 30, 50
"""Columns and diagonals that a vertical-slash head has at least, whatever its configuration says."""


@dataclass(frozen=True)
class Pattern:
    """The pattern of one head, in tokens (``block_sparse``: in blocks).

    Attributes:
        name: ``a_shape``, ``vertical_slash`` or ``block_sparse``.
        first: first keys that all queries see; or columns; or key blocks of each query block.
        second: the window; or diagonals; 0 for ``block_sparse``.
        score: the error that the search measured, the smaller the better (in the authors' files it may be a recall);
            only kept.
    """

    name: str
    first: int
    second: int = 0
    score: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"pattern: expected {', '.join(NAMES)}, got {self.name!r}."
                             f"{did_you_mean(str(self.name), NAMES)}")
        smallest = {"a_shape": (0, 1), "vertical_slash": (0, 0), "block_sparse": (1, 0)}[self.name]
        for value, low in zip((self.first, self.second), smallest, strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"pattern {self.name}: expected integers >= {smallest[0]} and >= {smallest[1]}, got "
                                 f"{self.first!r} and {self.second!r}")


DEFAULT = Pattern("vertical_slash", 1000, 6096)
"""What the authors' code gives a head that no search has seen."""


@dataclass
class Keys:
    """What each query block attends to.

    Attributes:
        blocks: (B, Hq, Nq, Nk) bool, whole blocks of keys, causal inside.
        columns: (B, Hq, Lk) bool, single keys that all later queries of a head see.
        layout: where the blocks lie.
    """

    blocks: Tensor
    columns: Tensor
    layout: Layout

    def indices(self) -> tuple[BlockIndex, BlockIndex]:
        """The blocks, and the single columns of each query block that are in none of its blocks."""
        return self.layout.index(self.blocks), column_index(self.blocks, self.columns, self.layout)

    def density(self) -> Tensor:
        """(B, Hq): score elements that are computed, over those of all causal blocks."""
        layout = self.layout
        singles = torch.nn.functional.pad(self.columns, (0, layout.columns * layout.block - layout.k_len))
        per_block = singles.unflatten(-1, (layout.columns, layout.block)).sum(-1)
        # per head: a product of counts and uncovered blocks, without anything of size L x L
        outside = (layout.causal & ~self.blocks).float()
        single = torch.einsum("bhqk,bhk->bh", outside, per_block.float()) / layout.block
        return (self.blocks.sum((2, 3)) + single) / layout.causal.sum((2, 3)).clamp(min=1)

    def attention(self, call: AttentionCall) -> Tensor:
        """Causal softmax attention over these keys, each counted once; exact inside of them and differentiable.

        Returns:
            (B, Hq, Lq, D) in the dtype of the query; rows beyond the lengths are zero.
        """
        out, _ = vertical_slash_attention(call.query, call.key, call.value, *self.indices(), scale=call.scale,
                                          query_lengths=self.layout.query_lengths, key_lengths=self.layout.key_lengths)
        return out


@dataclass(frozen=True)
class Selector:
    """Finds the keys of a prompt for heads whose patterns are given.

    Attributes:
        block_size: tokens of a block.
        last_q: how many of the last queries decide which columns and diagonals matter.
        min_length: keys up to which a batch item is exact.
        forced_columns: first columns that are taken before all others.
        forced_offsets: nearest diagonals that are taken before all others.
    """

    block_size: int
    last_q: int
    min_length: int
    forced_columns: int
    forced_offsets: int

    def scores(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of the last queries by key and by distance, (B, Hq, Lk) each, fp32."""
        return last_query_scores(call.query, call.key, self.last_q, scale=call.scale,
                                 query_lengths=call.query_lengths, key_lengths=call.key_lengths)

    def keys(self, call: AttentionCall, names: Sequence[str], first: Tensor, second: Tensor,
             scores: tuple[Tensor, Tensor] | None = None) -> Keys:
        """What each query block of a causal call attends to.

        Args:
            call: the call.
            names: pattern of each query head.
            first, second: (Hq,) or (B, Hq) int64, the sizes of the patterns.
            scores: what :meth:`scores` gave, where it is at hand.
        """
        query, key = call.query, call.key
        batch, heads, _, _, lk, _ = call.shape
        first, second = (x.expand(batch, heads) for x in (first, second))
        layout = Layout.of(query, key, self.block_size, call.query_lengths, call.key_lengths)
        causal = layout.causal
        blocks = torch.zeros(batch, heads, layout.rows, layout.columns, dtype=torch.bool, device=query.device)
        columns = torch.zeros(batch, heads, lk, dtype=torch.bool, device=query.device)
        heads_of = {name: [h for h, n in enumerate(names) if n == name] for name in NAMES}
        if chosen := heads_of["a_shape"]:
            blocks[:, chosen] = a_shape_blocks(first[:, chosen], second[:, chosen], layout)
        if chosen := heads_of["vertical_slash"]:
            vertical, slash = (s[:, chosen] for s in scores or self.scores(call))
            blocks[:, chosen], columns[:, chosen] = vertical_slash(
                vertical, slash, first[:, chosen].clamp(min=LEAST_COLUMNS),
                second[:, chosen].clamp(min=LEAST_DIAGONALS), layout, forced_columns=self.forced_columns,
                forced_offsets=self.forced_offsets)
        if chosen := heads_of["block_sparse"]:
            best_blocks = block_sparse_blocks(block_mean(query, self.block_size, call.query_lengths),
                                              block_mean(key, self.block_size, call.key_lengths), first, layout)
            blocks[:, chosen] = best_blocks[:, chosen]
        # an item of a batch is as exact as it would be alone
        short = (layout.key_lengths <= self.min_length)[:, None, None]
        return Keys(torch.where(short[..., None], causal, blocks), columns & ~short, layout)


def a_shape_blocks(sink: Tensor, window: Tensor, layout: Layout) -> Tensor:
    """Blocks with a key among the first ``sink``, or among the last ``window`` before some query of the row.

    Args:
        sink, window: (B, H) int64, tokens; both are rounded out to whole blocks.
        layout: where the blocks lie.

    Returns:
        (B, H, Nq, Nk) bool; the diagonal is in.
    """
    first, _ = layout.row_ends
    start = layout.column_starts
    near = start + layout.block > (first[:, None] - window[..., None].clamp(min=1) + 1)[..., None]
    return ((start < sink[..., None])[:, :, None] | near) & layout.causal


def vertical_slash(vertical: Tensor, slash: Tensor, n_v: Tensor, n_s: Tensor, layout: Layout, *, forced_columns: int,
                   forced_offsets: int) -> tuple[Tensor, Tensor]:
    """Columns and diagonals of a vertical-slash head (algorithm 2).

    Args:
        vertical, slash: (B, H, Lk) attention of the last queries, summed by key and by distance query - key.
        n_v, n_s: (B, H) int64, how many columns and diagonals to take, forced ones included.
        layout: where the blocks lie.
        forced_columns: so many first columns are taken before all others.
        forced_offsets: so many smallest distances are taken before all others; distance 0 always is.

    Returns:
        (B, H, Nq, Nk) bool, every block that a chosen diagonal crosses in the rows of a query block; and (B, H, Lk)
        bool, the chosen columns.
    """
    columns = best(vertical, n_v, layout.key_lengths, forced_columns)
    distances = best(slash, n_s.clamp(min=1), layout.key_lengths, max(1, forced_offsets))
    # How many chosen distances are below d, for d = 0 .. Lk: a block is crossed if a range of distances has any.
    below = torch.nn.functional.pad(distances.cumsum(-1, dtype=torch.int32), (1, 0))
    first, last = layout.row_ends
    nearest = first[..., None] - layout.column_starts - (layout.block - 1)
    farthest = last[..., None] - layout.column_starts
    heads = vertical.shape[1]

    def count(distance: Tensor) -> Tensor:
        at = distance.clamp(0, layout.k_len).flatten(1)[:, None].expand(-1, heads, -1)
        return below.gather(2, at).unflatten(2, (layout.rows, layout.columns))

    return (count(farthest + 1) > count(nearest)) & layout.causal, columns


def block_sparse_blocks(query_blocks: Tensor, key_blocks: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """The ``k`` best key blocks of each query block by the product of their means (algorithm 3).

    The softmax of the paper keeps the order within a row, so that it is not computed.

    Args:
        query_blocks: (B, H, Nq, D), key_blocks: (B, Hkv, Nk, D), means over the valid tokens of each block; H may be
            any multiple of Hkv.
        k: (B, H) int64, blocks of a row, the diagonal among them.
        layout: where the blocks lie.

    Returns:
        (B, H, Nq, Nk) bool.
    """
    kv_heads = key_blocks.shape[1]
    grouped = query_blocks.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores = (grouped @ key_blocks.float().transpose(2, 3)).unflatten(2, (-1, layout.rows)).flatten(1, 2)
    first, last = layout.row_ends
    start = layout.column_starts
    # In chunked prefill a row of blocks straddles two key blocks: both are the diagonal.
    diagonal = ((start + layout.block > first[..., None]) & (start <= last[..., None]))[:, None]
    scores = scores.masked_fill(diagonal, torch.inf).masked_fill(~layout.causal, -torch.inf)
    return (_rank(scores) < k.clamp(min=1)[..., None, None]) & layout.causal | (diagonal & layout.causal)


def best(scores: Tensor, count: Tensor, lengths: Tensor, forced: int) -> Tensor:
    """The ``count`` best valid entries of each row, (B, H, L) bool, the first ``forced`` before all others.

    Ties go to the lower index.
    """
    at = torch.arange(scores.shape[-1], device=scores.device)
    valid = (at < lengths[:, None])[:, None]
    scores = scores.masked_fill(at < forced, torch.inf).masked_fill(~valid, -torch.inf)
    return (_rank(scores) < count[..., None]) & valid


def _rank(scores: Tensor) -> Tensor:
    """Place of each entry in falling order along the last dimension, ties by index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def layer_of(call: AttentionCall) -> int:
    """The decoder layer of a call, by its module: a model may have other attention modules before the decoder's."""
    index = getattr(call.module, "layer_idx", None)
    return call.layer if index is None else int(index)
