"""``BlockIndex``: which key blocks each query block attends to. The only currency between patterns and kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looseleaf_kernels.shapes import BlockMask, Entries, RowPointers


class Csr(NamedTuple):
    """Which columns each row has: those of row r of a head are ``col[row_ptr[..., r]:row_ptr[..., r + 1]]``."""

    row_ptr: RowPointers
    col: Entries


@dataclass(eq=False)
class BlockIndex:
    """A set of key blocks for each batch item, query head and query block, in CSR form.

    Attributes:
        row_ptr: (B, H, Nq + 1) int32, global offsets into ``col``.
        col: (nnz,) int32 key blocks, ascending in each row.
        block_q, block_k: rows and keys of a block; the last block may be ragged.
        q_len, k_len: Lq and Lk of the tensors.
        causal: query row i sees keys up to i + (key length - query length) of its batch item. Blocks that causality
            empties are harmless.
    """

    row_ptr: RowPointers
    col: Entries
    block_q: int
    block_k: int
    q_len: int
    k_len: int
    causal: bool
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"BlockIndex.{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.row_ptr.dim() != 3 or self.row_ptr.shape[-1] != self.rows + 1:
            raise ValueError(f"BlockIndex.row_ptr: expected shape (B, H, {self.rows + 1}) for q_len={self.q_len} in "
                             f"blocks of {self.block_q}, got {tuple(self.row_ptr.shape)}")
        for name in ("row_ptr", "col"):
            if getattr(self, name).dtype != torch.int32:
                raise ValueError(f"BlockIndex.{name}: expected dtype torch.int32, got {getattr(self, name).dtype}")

    @property
    def rows(self) -> int:
        """Nq, the number of query blocks."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """Nk, the number of key blocks."""
        return -(-self.k_len // self.block_k)

    @property
    def heads(self) -> int:
        """H, the number of query heads."""
        return self.row_ptr.shape[1]

    @property
    def batch(self) -> int:
        """B."""
        return self.row_ptr.shape[0]

    @property
    def csr(self) -> Csr:
        """The entries alone."""
        return Csr(self.row_ptr, self.col)

    @classmethod
    def from_mask(cls, mask: BlockMask, *, block_q: int, block_k: int, q_len: int, k_len: int,
                  causal: bool) -> BlockIndex:
        """From a boolean block mask, (B, H, Nq, Nk).

        Raises:
            ValueError: the mask has another shape or is not boolean.
        """
        rows, columns = -(-q_len // block_q), -(-k_len // block_k)
        if mask.dtype != torch.bool or mask.dim() != 4 or tuple(mask.shape[2:]) != (rows, columns):
            raise ValueError(f"mask: expected torch.bool of shape (B, H, {rows}, {columns}), got {mask.dtype} of shape "
                             f"{tuple(mask.shape)}")
        col = mask.nonzero()[:, 3].to(torch.int32).contiguous()
        return cls(row_pointers(mask.sum(-1, dtype=torch.int32)), col, block_q, block_k, q_len, k_len, causal)

    @classmethod
    def from_lists(cls, lists: list[list[list[list[int]]]], *, block_q: int, block_k: int, q_len: int, k_len: int,
                   causal: bool) -> BlockIndex:
        """From ``lists[batch][head][query block]`` = key blocks.

        Raises:
            ValueError: a key block outside the range, or rows of unequal number.
        """
        rows, columns = -(-q_len // block_q), -(-k_len // block_k)
        mask = torch.zeros(len(lists), len(lists[0]) if lists else 0, rows, columns, dtype=torch.bool)
        for b, heads in enumerate(lists):
            for h, blocks in enumerate(heads):
                if len(blocks) != rows:
                    raise ValueError(f"lists: expected {rows} rows, got {len(blocks)} for item {b}, head {h}")
                for r, chosen in enumerate(blocks):
                    bad = [c for c in chosen if not 0 <= c < columns]
                    if bad:
                        raise ValueError(f"lists: expected key blocks in [0, {columns - 1}], got {bad[0]} in item {b}, "
                                         f"head {h}, row {r}")
                    mask[b, h, r, chosen] = True
        return cls.from_mask(mask, block_q=block_q, block_k=block_k, q_len=q_len, k_len=k_len, causal=causal)

    @classmethod
    def from_flex(cls, flex: Any, *, causal: bool, heads: int | None = None) -> BlockIndex:
        """From a FlexAttention ``BlockMask``; what its ``mask_mod`` says inside of blocks is taken from ``causal``."""
        q_len, k_len = flex.seq_lengths
        mask = flex.to_dense().bool()
        if heads is not None and mask.shape[1] == 1:
            mask = mask.expand(-1, heads, -1, -1)
        return cls.from_mask(mask, block_q=flex.BLOCK_SIZE[0], block_k=flex.BLOCK_SIZE[1], q_len=q_len, k_len=k_len,
                             causal=causal)

    def to_flex(self) -> Any:
        """A FlexAttention ``BlockMask`` of the same blocks, causal inside of them where this index is."""
        from torch.nn.attention.flex_attention import BlockMask

        mask = self.to_mask()
        if self.causal:
            mask = mask & self._visible(mask.device)
        order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True).to(torch.int32)
        offset = self.k_len - self.q_len
        block = self.block_q, self.block_k
        causal = self.causal
        dense = mask

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            chosen = dense[b, h, q // block[0], k // block[1]]
            return chosen & (q + offset >= k) if causal else chosen

        return BlockMask.from_kv_blocks(mask.sum(-1, dtype=torch.int32), order, BLOCK_SIZE=block, mask_mod=keep,
                                        seq_lengths=(self.q_len, self.k_len))

    def to_mask(self) -> Tensor:
        """The boolean block mask, (B, H, Nq, Nk)."""
        mask = torch.zeros(self.batch, self.heads, self.rows, self.columns, dtype=torch.bool, device=self.col.device)
        mask.view(-1)[self.row_of_entry().long() * self.columns + self.col.long()] = True
        return mask

    def row_of_entry(self) -> Tensor:
        """(nnz,) int64: the flat row (batch, head, query block) of each entry of ``col``."""
        if "row_of_entry" not in self._cache:
            counts = (self.row_ptr[..., 1:] - self.row_ptr[..., :-1]).flatten().long()
            self._cache["row_of_entry"] = torch.repeat_interleave(counts)
        row: Tensor = self._cache["row_of_entry"]
        return row

    def density(self, lengths: Tensor | None = None) -> Tensor:
        """(B, H) float: active blocks over all blocks with a query that sees a key.

        Args:
            lengths: (B,) valid keys of each item, all queries being the last of them; None: all.
        """
        visible = self._visible(self.col.device)
        mask = self.to_mask() & visible
        if lengths is None:
            return mask.sum((2, 3)) / visible.sum().clamp(min=1)
        k_ok = torch.arange(self.columns, device=mask.device) * self.block_k < lengths[:, None]
        rows = lengths - self.k_len + self.q_len if self.causal else torch.full_like(lengths, self.q_len)
        q_ok = torch.arange(self.rows, device=mask.device) * self.block_q < rows[:, None]
        ok = visible & q_ok[:, None, :, None] & k_ok[:, None, None, :]
        return (mask & ok).sum((2, 3)) / ok.sum((2, 3)).clamp(min=1)

    def _visible(self, device: torch.device) -> Tensor:
        """(Nq, Nk) bool: blocks with at least one query that sees a key."""
        if not self.causal:
            return torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        last = (torch.arange(1, self.rows + 1, device=device) * self.block_q).clamp(max=self.q_len) - 1
        return torch.arange(self.columns, device=device) * self.block_k <= (last + self.k_len - self.q_len)[:, None]

    def expand(self) -> Tensor:
        """The dense boolean mask, (B, H, Lq, Lk), with causality in it. For tests: it is of size L x L."""
        dense = self.to_mask().repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)
        dense = dense[:, :, :self.q_len, :self.k_len]
        if self.causal:
            q = torch.arange(self.q_len, device=dense.device)[:, None] + self.k_len - self.q_len
            dense = dense & (torch.arange(self.k_len, device=dense.device) <= q)
        return dense

    def transpose(self) -> Csr:
        """The same set by columns: (B, H, Nk + 1) int32 offsets and (nnz,) int32 query blocks. Made once."""
        if "transpose" not in self._cache:
            row = self.row_of_entry()
            head, query = row // max(1, self.rows), row % max(1, self.rows)
            flat = head * self.columns + self.col.long()
            order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=self.batch * self.heads * self.columns)
            self._cache["transpose"] = Csr(row_pointers(counts.view(self.batch, self.heads, self.columns)),
                                           query[order].to(torch.int32).contiguous())
        transposed: Csr = self._cache["transpose"]
        return transposed

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same index on another device."""
        return BlockIndex(self.row_ptr.to(device), self.col.to(device), self.block_q, self.block_k, self.q_len,
                          self.k_len, self.causal)


def row_pointers(counts: Tensor) -> Tensor:
    """(B, H, N + 1) int32: the global offsets of rows that have so many entries, (B, H, N)."""
    ends = torch.nn.functional.pad(counts.flatten().cumsum(0, dtype=torch.int32), (1, 0))
    starts = torch.arange(counts.shape[0] * counts.shape[1], device=counts.device) * counts.shape[2]
    row = starts[:, None] + torch.arange(counts.shape[2] + 1, device=counts.device)
    return ends[row].view(*counts.shape[:2], -1)
