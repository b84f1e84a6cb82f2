"""SparseD as an attention backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Paper
from looseleaf.attention.call import Phase
from looseleaf_kernels import BlockIndex, block_importance, block_sparse_attention
from looseleaf_sparsed.patterns import select_blocks


@dataclasses.dataclass
class SparseD(AttentionBackend):
    """Bidirectional attention whose sparse pattern is found once in a denoising run (arXiv 2509.24014).

    The first steps are exact. Then the probabilities of each head are summed up by blocks, once, and each query block
    keeps its most important key blocks for the rest of the run. Causal calls, masks of the caller's own and short
    inputs are computed exactly.

    Attach it with ``attach(model, SparseD(), steps=T)`` and set ``attached.step = t`` before each step of your own
    sampling loop. Step 0, a step smaller than the last, and ``attached.reset()`` begin a new run. Where the number of
    tokens changes within a run, the pattern is found anew.

    Args:
        skip: share of the steps, the first ones, that are exact; from 0 to 1.
        select: share of the key blocks that each query block keeps, above 0 and up to 1; 0.5 for short contexts.
        block_size: tokens of a block: 16, 32, 64 or 128; 32 for short contexts.
        prompt_tokens: tokens of the prompt, padding not counted; one number, or one for each batch item. Of prompt and
            response each query block then keeps its share apart. None: no difference is made between them.
        min_length: keys up to which attention is exact; 1 or more.
    """

    skip: float = 0.2
    select: float = 0.3
    block_size: int = 128
    prompt_tokens: int | Sequence[int] | None = None
    min_length: int = 512
    changes: ClassVar[Phase] = "encode"
    paper: ClassVar[Paper] = Paper(
        title="SparseD: Sparse Attention for Diffusion Language Models",
        authors=("Zeqing Wang", "Gongfan Fang", "Xinyin Ma", "Xingyi Yang", "Xinchao Wang"), year=2026,
        arxiv="2509.24014", venue="ICLR 2026", code="https://github.com/INV-WZQ/SparseD",
        summary="Diffusion language models denoise faster: each head's pattern is found once and used again.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """Small blocks, so that the method is at work on the kit's 384 tokens."""
        return {"make": lambda: cls(block_size=16, min_length=48)}

    def validate(self) -> None:
        self.check("skip", 0 <= self.skip <= 1, "a number from 0 to 1")
        self.check("select", 0 < self.select <= 1, "a number above 0 and up to 1")
        self.check("block_size", self.block_size in (16, 32, 64, 128), "16, 32, 64 or 128")
        given = self.prompt_tokens
        numbers = [] if given is None else [given] if isinstance(given, (int, float)) else given
        self.check("prompt_tokens", all(isinstance(n, int) and n >= 0 for n in numbers),
                   "None, a whole number from 0, or one for each batch item")
        self.check("min_length", isinstance(self.min_length, int) and self.min_length >= 1, "a whole number from 1")

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, or attention over the blocks of the run's pattern, (B, Hq, Lq, D), the query's dtype.

        Raises:
            ValueError: the step or the number of steps is missing or impossible, or ``prompt_tokens`` does not fit.
        """
        if call.is_causal or call.phase != "encode":
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
            The index for :func:`looseleaf_kernels.block_sparse_attention`, and its density: the share of the blocks
            that are kept, a scalar tensor.
        """
        _, _, _, lq, lk, _ = call.shape
        block = self.block_size
        importance = block_importance(call.query, call.key, block, block, causal=False, scale=call.scale,
                                      key_lengths=call.key_lengths, query_lengths=call.query_lengths)
        keys = _lengths(call.key_lengths, len(call.query), lk)
        kept = select_blocks(importance, keys, self.prompts(keys), block, self.select)
        for b, n in enumerate(keys):
            if n <= self.min_length:
                kept[b, ..., :-(-n // block)] = True
        possible = 0
        for b, n in enumerate(_lengths(call.query_lengths, len(call.query), lq)):
            rows = -(-n // block)
            kept[b, :, rows:] = False
            possible += rows * -(-keys[b] // block) * kept.shape[1]
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
        prompts = [given] * len(lengths) if isinstance(given, int) else list(given)
        if len(prompts) != len(lengths) or max(prompts, default=0) > max(lengths, default=0):
            raise ValueError(f"SparseD.prompt_tokens={given!r} for a batch of {len(lengths)} with "
                             f"{', '.join(map(str, lengths))} tokens: allowed is one number or one for each item, no "
                             "larger than the tokens of prompt and response. Set plugin.prompt_tokens before each run")
        return prompts


def _step_of(call: AttentionCall) -> tuple[int, int]:
    """The step of a call and the number of steps, checked."""
    step, steps = call.step, call.steps
    if step is None or steps is None or not 0 <= step < steps:
        raise ValueError(f"SparseD needs to know the denoising step: step={step} of steps={steps} was given, allowed "
                         "is step from 0 to steps - 1. Pass the number of steps as looseleaf.attach(model, SparseD(), "
                         "steps=T) and set attached.step = t before each step of the sampling loop")
    return step, steps


def _shape_of(call: AttentionCall) -> tuple[Any, ...]:
    """What must not change for a pattern to be used again."""
    batch, heads, _, lq, lk, _ = call.shape
    return (batch, heads, lq, lk, _lengths(call.query_lengths, batch, lq), _lengths(call.key_lengths, batch, lk))


def _lengths(given: Tensor | None, batch: int, length: int) -> list[int]:
    return [length] * batch if given is None else [int(n) for n in given.tolist()]
