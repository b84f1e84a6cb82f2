"""Which keys a head attends to: the three patterns and their indices (paper, section 3.1, 3.2 and algorithms 2 to 4).

All heads of all batch items are treated at once. A pattern gives whole blocks of keys for each block of queries; a
vertical-slash head also has single key columns, which count only where no block of the row has them already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from looseleaf_kernels import BlockIndex, Layout, column_index


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

    def expand(self) -> Tensor:
        """The boolean mask of the attention, (B, Hq, Lq, Lk), with causality and lengths in it.

        For tests and for reading: it is of size L x L.
        """
        layout = self.layout
        wide = self.blocks.repeat_interleave(layout.block, 2).repeat_interleave(layout.block, 3)
        mask = wide[:, :, :layout.q_len, :layout.k_len] | self.columns[:, :, None]
        query = torch.arange(layout.q_len, device=mask.device)
        key = torch.arange(layout.k_len, device=mask.device)
        position = query + (layout.key_lengths - layout.query_lengths)[:, None]
        seen = (key <= position[..., None]) & (key < layout.key_lengths[:, None])[:, None]
        return mask & (seen & (query < layout.query_lengths[:, None])[..., None])[:, None]


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
