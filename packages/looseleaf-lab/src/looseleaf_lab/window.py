"""The trivial rival of sparse bidirectional attention: the nearest blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass
class BlockWindow(AttentionBackend):
    """Bidirectional attention in which each query block sees the key blocks nearest to it, equally many each.

    At the ends of the sequence they are all on one side. Causal calls, cross attention and masks stay exact.

    Args:
        density: share of the key blocks, rounded up to whole blocks; above 0 and up to 1.
        block: tokens of a block; 1 or more.
        full_steps: so many first denoising steps are exact; 0 or more.
    """

    density: float = 0.3
    block: int = 64
    full_steps: int = 0
    changes: ClassVar[Phase] = "encode"
    paper: ClassVar[Paper] = Paper("Sliding window", ("The Looseleaf authors",), 2026)

    def validate(self) -> None:
        self.check("density", 0 < self.density <= 1, "a number above 0 and up to 1")
        self.check("block", isinstance(self.block, int) and self.block >= 1, "a whole number from 1")
        self.check("full_steps", isinstance(self.full_steps, int) and self.full_steps >= 0, "a whole number from 0")

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention over the nearest blocks, (B, Hq, L, D)."""
        import math

        import torch

        from looseleaf_kernels import BlockIndex, block_sparse_attention

        batch, heads, _, length, keys, _ = call.shape
        if call.is_causal or call.phase != "encode" or length != keys or call.mask is not None:
            return call.fall_back("only bidirectional self-attention without a mask is changed")
        if call.step is not None and call.step < self.full_steps:
            call.record(density=1.0)
            return call.dense()
        blocks = -(-length // self.block)
        kept = max(1, math.ceil(self.density * blocks - 1e-9))
        at = torch.arange(blocks, device=call.query.device)
        first = (at - kept // 2).clamp(0, blocks - kept)[:, None]
        mask = (at >= first) & (at < first + kept)
        index = BlockIndex.from_mask(mask.expand(batch, heads, -1, -1), block_q=self.block, block_k=self.block,
                                     q_len=length, k_len=length, causal=False)
        call.record(density=kept / blocks)
        return block_sparse_attention(call.query, call.key, call.value, index, scale=call.scale,
                                      key_lengths=call.key_lengths, query_lengths=call.query_lengths)[0]
