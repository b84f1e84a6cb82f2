"""SparseD as an attention backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase
from looseleaf.plugin import In, OneOf
from looseleaf_kernels import BlockIndex, block_importance, block_sparse_attention
from looseleaf_sparsed.patterns import select_blocks


@dataclasses.dataclass
class SparseD(AttentionBackend):
    """Bidirectional attention whose sparse pattern is found once in a denoising run (arXiv 2509.24014).

    The first steps are exact. Then the probabilities of each head are pooled by blocks, once, and each query block
    keeps its most important key blocks for the rest of the run. Causal calls, masks of the caller's own and short
    inputs are computed exactly.

    Attach it with ``attach(model, SparseD(), steps=T)`` and set ``attached.step = t`` before each step of your own
    sampling loop. Step 0, a step smaller than the last, and ``attached.reset()`` begin a new run. Where the number of
    tokens changes within a run, the pattern is found anew.

    Args:
        skip: fraction of the steps, the first ones, that are exact, in [0, 1].
        select: fraction of the key blocks that each query block keeps, in (0, 1]; 0.5 for short contexts.
        block_size: tokens of a block: 16, 32, 64 or 128; 32 for short contexts.
        prompt_tokens: tokens of the prompt, padding not counted; one number, or one for each batch item. Each query
            block then keeps its fraction of the prompt's blocks and of the response's. None: no difference is made
            between them.
        min_length: keys up to which attention is exact.
    """

    skip: Annotated[float, In("[0, 1]")] = 0.2
    select: Annotated[float, In("(0, 1]")] = 0.3
    block_size: Annotated[int, OneOf(16, 32, 64, 128)] = 128
    prompt_tokens: Annotated[int | Sequence[int] | None, In(">= 0")] = None
    min_length: Annotated[int, In(">= 1")] = 512
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
    paper: ClassVar[Paper] = Paper(
        title="SparseD: Sparse Attention for Diffusion Language Models",
        authors=("Zeqing Wang", "Gongfan Fang", "Xinyin Ma", "Xingyi Yang", "Xinchao Wang"), year=2026,
        arxiv="2509.24014", venue="ICLR 2026", code="https://github.com/INV-WZQ/SparseD",
        summary="Diffusion language models denoise faster: each head's pattern is found once and used again.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """Small blocks, so that the method is at work on the kit's 384 tokens."""
        return {"make": lambda: cls(block_size=16, min_length=48)}

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, or attention over the blocks of the run's pattern, (B, Hq, Lq, D), the query's dtype.

        Raises:
            ValueError: the step or the number of steps is missing or impossible, or ``prompt_tokens`` does not fit.
        """
        if call.is_causal or call.phase != "bidirectional":
            return call.fall_back("only bidirectional attention is sparse")
        if call.mask is not None:
            return call.fall_back("a mask of the caller's own")
        step, steps = _step_of(call)
        state = call.state
        if step == 0 or step < getattr(state, "step", 0):
            state.index = None
        state.step = step
        if call.shape[4] <= self.min_length or not call.shape[3]:
            return call.fall_back(f"no longer than {self.min_length} tokens")
        if step < self.full_steps(steps):
            call.record(stage="full", density=1.0)
            return call.dense()
        shape = _shape_of(call)
        if getattr(state, "index", None) is None or state.shape != shape:
            state.index, state.density, state.shape = *self.pattern(call), shape
            # The authors' code, too, computes this step exactly and is sparse from the next one on.
            call.record(stage="pattern found", density=1.0)
            return call.dense()
        call.record(stage="sparse", density=state.density)
        out, _ = block_sparse_attention(call.query, call.key, call.value, state.index, scale=call.scale,
                                        key_lengths=call.key_lengths, query_lengths=call.query_lengths)
        return out

    def full_steps(self, steps: int) -> int:
        """How many steps are exact before the pattern is looked for, of ``steps``."""
        return math.floor(round(self.skip * steps, 9))

    def pattern(self, call: AttentionCall) -> tuple[BlockIndex, Tensor]:
        """The blocks that each head attends to, found from the probabilities of this call (paper, section 4).

        Memory is of size Lk x ``block_size`` for each head, never Lq x Lk.

        Returns:
            The index for :func:`looseleaf_kernels.block_sparse_attention`, and its density: the fraction of the blocks
            that is kept, a scalar tensor.
        """
        _, _, _, lq, lk, _ = call.shape
        block = self.block_size
        importance = block_importance(call.query, call.key, block, block, causal=False, scale=call.scale,
                                      key_lengths=call.key_lengths, query_lengths=call.query_lengths)
        queries, keys = _lengths(call)
        kept = select_blocks(importance, keys, self.prompts(keys), block, self.select)
        possible = 0
        for b, (rows, columns) in enumerate(zip(queries, keys, strict=True)):
            if columns <= self.min_length:
                kept[b, ..., :-(-columns // block)] = True
            kept[b, :, -(-rows // block):] = False
            possible += -(-rows // block) * -(-columns // block) * kept.shape[1]
        index = BlockIndex.from_mask(kept, block_q=block, block_k=block, q_len=lq, k_len=lk, causal=False)
        return index, kept.sum() / max(1, possible)

    def prompts(self, lengths: list[int]) -> list[int]:
        """Tokens of the prompt of each batch item; 0 where there are no parts.

        Raises:
            ValueError: ``prompt_tokens`` is for another number of items, or longer than every item of the batch.
        """
        given = self.prompt_tokens
        if given is None:
            return [0] * len(lengths)
        prompts = list(given) if isinstance(given, Sequence) else [given] * len(lengths)
        if len(prompts) != len(lengths) or max(prompts, default=0) > max(lengths, default=0):
            raise ValueError(f"SparseD.prompt_tokens: expected one number or one for each of {len(lengths)} items, no "
                             f"larger than their {', '.join(map(str, lengths))} tokens of prompt and response, got "
                             f"{given!r}. Set plugin.prompt_tokens before each run")
        return prompts


def _step_of(call: AttentionCall) -> tuple[int, int]:
    """The step of a call and the number of steps, checked."""
    step, steps = call.step, call.steps
    if step is None or steps is None or not 0 <= step < steps:
        raise ValueError(f"SparseD: expected a denoising step from 0 to steps - 1, got step={step} of steps={steps}. "
                         "Pass the number of steps as looseleaf.attach(model, SparseD(), steps=T) and set "
                         "attached.step = t before each step of the sampling loop")
    return step, steps


def _shape_of(call: AttentionCall) -> tuple[Any, ...]:
    """What must not change for a pattern to be used again."""
    batch, heads, _, queries, keys, _ = call.shape
    return (batch, heads, queries, keys, *_lengths(call))


def _lengths(call: AttentionCall) -> list[list[int]]:
    """Valid queries and keys of each item, as ``call.lengths()``; the device is not asked where all rows are valid."""
    batch, _, _, queries, keys, _ = call.shape
    return [[count] * batch if lengths is None else lengths.tolist()
            for lengths, count in ((call.query_lengths, queries), (call.key_lengths, keys))]
