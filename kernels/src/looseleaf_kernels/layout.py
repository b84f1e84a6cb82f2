"""``Layout``: where the blocks of a ragged batch of causal attention lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from looseleaf_kernels.index import BlockIndex
from looseleaf_kernels.problem import lengths_of
from looseleaf_kernels.shapes import BlockMask, Keys, Lengths, Queries


@dataclass(frozen=True)
class Layout:
    """Blocks of queries and keys of causal attention. Queries are the last positions of their item.

    Attributes:
        query_lengths, key_lengths: (B,) int64, valid rows and keys.
        q_len, k_len: Lq and Lk of the tensors.
        block: tokens of a block, of queries and of keys.
    """

    query_lengths: Tensor
    key_lengths: Tensor
    q_len: int
    k_len: int
    block: int

    @classmethod
    def of(cls, query: Queries, key: Keys, block: int, query_lengths: Lengths | None = None,
           key_lengths: Lengths | None = None) -> Layout:
        """From the tensors of a call, (B, Hq, Lq, D) and (B, Hkv, Lk, D), and their lengths (B,); None: all rows.

        Raises:
            ValueError: block is below 1, or lengths of another shape.
        """
        if block < 1:
            raise ValueError(f"block: expected an integer >= 1, got {block}")
        return cls(lengths_of(query, query_lengths, "query_lengths"), lengths_of(key, key_lengths, "key_lengths"),
                   query.shape[2], key.shape[2], block)

    @property
    def rows(self) -> int:
        """Nq, the number of query blocks."""
        return -(-self.q_len // self.block)

    @property
    def columns(self) -> int:
        """Nk, the number of key blocks."""
        return -(-self.k_len // self.block)

    @property
    def row_ends(self) -> tuple[Tensor, Tensor]:
        """Key positions of the first and of the last valid query of each query block, (B, Nq) each.

        The last block of an item may be ragged: its last query is that of the item. A block without a valid query has
        its last before its first. In chunked prefill the two may lie in different key blocks.
        """
        start = torch.arange(self.rows, device=self.key_lengths.device) * self.block
        offset = (self.key_lengths - self.query_lengths)[:, None]
        stop = torch.minimum(start + self.block, self.query_lengths[:, None])
        return start + offset, stop - 1 + offset

    @property
    def column_starts(self) -> Tensor:
        """(Nk,) the first key of each key block."""
        return torch.arange(self.columns, device=self.key_lengths.device) * self.block

    @property
    def key_blocks(self) -> Tensor:
        """(B, 1, Nk) bool: blocks that hold a valid key."""
        return (self.column_starts < self.key_lengths[:, None])[:, None]

    @property
    def causal(self) -> Tensor:
        """(B, 1, Nq, Nk) bool: pairs of blocks with at least one valid query and one key that it may see."""
        first, last = self.row_ends
        return ((self.column_starts <= last[..., None]) & (last >= first)[..., None])[:, None]

    def index(self, blocks: BlockMask) -> BlockIndex:
        """The causal index of a block mask, (B, H, Nq, Nk) bool.

        Raises:
            ValueError: the mask has another shape or is not boolean.
        """
        return BlockIndex.from_mask(blocks, block_q=self.block, block_k=self.block, q_len=self.q_len,
                                    k_len=self.k_len, causal=True)
