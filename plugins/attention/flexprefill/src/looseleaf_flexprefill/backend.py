"""FlexPrefill as an attention backend."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase
from looseleaf.plugin import In, OneOf
from looseleaf_flexprefill.patterns import budget_blocks, query_aware_blocks, select_pattern, vertical_slash_blocks
from looseleaf_kernels import BlockIndex, Layout, block_mean, block_sparse_attention, last_query_scores


@dataclasses.dataclass
class FlexPrefill(AttentionBackend):
    """Causal prefill over the blocks that hold a fraction ``gamma`` of each head's attention (arXiv 2502.20766).

    Decode steps, bidirectional calls, masks of the caller's own and short prompts are computed exactly.

    Args:
        gamma: fraction of the attention mass to keep, in (0, 1]; the one knob between speed and quality.
        tau: a head whose block estimate is nearer than this to its attention is query-aware; 0 (never) to 1 (always).
        min_budget: tokens of columns, and of diagonals, that every head keeps at least.
        max_budget: tokens of columns, and of diagonals, that a vertical-slash head keeps at most; None: no limit.
        block_size: tokens of a block: 16, 32, 64 or 128.
    """

    gamma: Annotated[float, In("(0, 1]")] = 0.95
    tau: Annotated[float, In("[0, 1]")] = 0.1
    min_budget: Annotated[int, In(">= 1")] = 1024
    max_budget: Annotated[int | None, In(">= 1")] = None
    block_size: Annotated[int, OneOf(16, 32, 64, 128)] = 128
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill"})
    paper: ClassVar[Paper] = Paper(
        title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        authors=("Xunhao Lai", "Jianqiao Lu", "Yao Luo", "Yiyuan Ma", "Xun Zhou"), year=2025, arxiv="2502.20766",
        venue="ICLR 2025", code="https://github.com/ByteDance-Seed/FlexPrefill",
        summary="Shorter time to first token on long prompts; one knob, no calibration.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """Small blocks and a small budget, so that the method is at work on the kit's 384 tokens."""
        return {"make": lambda: cls(gamma=0.6, min_budget=16, block_size=16)}

    def validate(self) -> None:
        self.check("max_budget", self.max_budget is None or self.max_budget >= self.min_budget,
                   f"None or an integer >= min_budget={self.min_budget}")

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the chosen blocks, (B, Hq, Lq, D), in the dtype of the query."""
        if call.phase != "prefill" or not call.is_causal:
            return call.fall_back("only causal prefill is sparse")
        if call.mask is not None:
            return call.fall_back("a mask of the caller's own")
        if call.shape[4] <= self.shortest:
            return call.fall_back(f"no longer than {self.shortest} tokens")
        index, densities, query_aware = self.select(call)
        call.record(density=densities.mean(), query_aware_heads=query_aware.float().mean(),
                    density_by_head=densities.mean(0), query_aware_by_head=query_aware.float().mean(0))
        out, _ = block_sparse_attention(call.query, call.key, call.value, index, scale=call.scale,
                                        key_lengths=call.key_lengths, query_lengths=call.query_lengths)
        return out

    @property
    def shortest(self) -> int:
        """Keys up to which attention is exact: two blocks, or ``min_budget`` in whole blocks."""
        return max(2 * self.block_size, self._blocks(self.min_budget) * self.block_size)

    def select(self, call: AttentionCall) -> tuple[BlockIndex, Tensor, Tensor]:
        """The block set of a causal call.

        Returns:
            The index for :func:`looseleaf_kernels.block_sparse_attention`; the density of each head (B, Hq), active
            blocks over all causal blocks; and which heads are query-aware (B, Hq).
        """
        query, key, block = call.query, call.key, self.block_size
        layout = Layout.of(query, key, block, call.query_lengths, call.key_lengths)
        lengths = {"query_lengths": call.query_lengths, "key_lengths": call.key_lengths}
        vertical, slash = last_query_scores(query, key, block, scale=call.scale, **lengths)
        key_blocks = block_mean(key, block, call.key_lengths)
        last = _last_rows(query, layout.query_lengths, block)
        query_aware, _ = select_pattern(last, key_blocks, vertical, layout, call.scale, self.tau)
        smallest = self._blocks(self.min_budget)
        largest = None if self.max_budget is None else self._blocks(self.max_budget)
        columns, diagonals = (
            budget_blocks(s, self.gamma, block, smallest, largest).masked_fill(query_aware, smallest)
            for s in (vertical, slash))
        blocks = vertical_slash_blocks(vertical, slash, columns, diagonals, layout)
        estimated = query_aware_blocks(block_mean(query, block, call.query_lengths), key_blocks, layout, call.scale,
                                       self.gamma)
        blocks = blocks | (estimated & query_aware[:, :, None, None])
        short = (layout.key_lengths <= self.shortest)[:, None, None, None]
        blocks = torch.where(short, layout.causal, blocks)
        densities = blocks.sum((2, 3)) / layout.causal.sum((2, 3)).clamp(min=1)
        return layout.index(blocks), densities, query_aware

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def _last_rows(query: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Mean of the last ``count`` valid queries of each item, (B, H, D), fp32."""
    row = torch.arange(query.shape[2], device=query.device)
    chosen = (row < lengths[:, None]) & (row >= lengths[:, None] - count)
    first = max(0, int(row.numel()) - count) if bool((lengths == query.shape[2]).all()) else 0
    rows = torch.where(chosen[:, None, first:, None], query[:, :, first:], 0).float()
    return rows.sum(2) / chosen.sum(1).clamp(min=1)[:, None, None]
