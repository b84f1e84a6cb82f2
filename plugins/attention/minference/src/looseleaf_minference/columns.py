"""Attention over blocks and single columns together, no key counted twice (paper, section 3.2 and appendix on kernels).

The blocks go through the shared block-sparse kernel. For a few hundred queries at a time the keys of the single columns
are gathered, those inside a block that the row has already are left out, and the two parts are put together by their
log-sum-exps. Nothing of size L x L is made: the largest tensor is (rows of a chunk) x (columns of a head).

The loop below runs over batch items, heads and chunks in Python: good on a CPU, slow on a GPU. A fused kernel would
take the same block index and one more of the same form, whose entries are single key columns: for each query block
those that none of its blocks has and that its last query may see, ascending. One program per (query block, head, item)
goes through the blocks, then through the columns, ``block`` of them at a time by gathered loads, with one running
maximum and sum for both; only columns from the block's first query on need the causal comparison. It gives the output
and the log-sum-exp; the backward is that of the blocks, with dK and dV of the columns scattered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels import BlockIndex, block_sparse_attention
from looseleaf_minference.patterns import Keys

SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Score elements of a chunk."""


def attention(query: Tensor, key: Tensor, value: Tensor, keys: Keys, scale: float) -> Tensor:
    """Causal softmax attention over ``keys``, exact inside of them and differentiable.

    Args:
        query: (B, Hq, Lq, D). key, value: (B, Hkv, Lk, D). What lies beyond the lengths may be NaN.
        keys: what each query block attends to.
        scale: factor of the scores.

    Returns:
        (B, Hq, Lq, D) in the dtype of the query; rows beyond the lengths are zero. Scores, softmax and sums of the
        columns are fp32 (fp64 for fp64).
    """
    out: Tensor = _Attention.apply(query, key, value, keys, scale)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """The gradient of each part needs only the output and the log-sum-exp of the whole."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Keys, scale: float) -> Tensor:
        layout = keys.layout
        index = BlockIndex.from_mask(keys.blocks, block_q=layout.block, block_k=layout.block, q_len=layout.q_len,
                                     k_len=layout.k_len, causal=True)
        out, lse = block_sparse_attention(query, key, value, index, scale=scale, key_lengths=layout.key_lengths,
                                          query_lengths=layout.query_lengths)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = lse.to(wide)
        for b, h, rows, picked, hidden in chunks(keys):
            k, v = _gathered(key, value, b, h, picked, query.shape[1], wide)
            scores = (query[b, h, rows].to(wide) * scale @ k.T).masked_fill_(hidden, -torch.inf)
            other = torch.logsumexp(scores, -1)
            former = lse[b, h, rows]
            total = torch.logaddexp(former, other)
            weights = torch.exp_(scores.sub_(total[:, None]))
            kept = torch.exp(former - total)[:, None] * out[b, h, rows].to(wide)
            out[b, h, rows] = torch.addmm(kept, weights, v).to(out.dtype)
            lse[b, h, rows] = total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.keys, ctx.index, ctx.scale = keys, index, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        keys, index, scale = ctx.keys, ctx.index, ctx.scale
        layout = keys.layout
        grads = torch.ops.looseleaf.block_sparse_attention_backward(
            grad_out, query, key, value, out, lse.float() if query.dtype != torch.float64 else lse, index.row_ptr,
            index.col, scale, True, layout.block, layout.block, layout.query_lengths, layout.key_lengths)
        wide = torch.promote_types(query.dtype, torch.float32)
        dq, dk, dv = (g.to(wide) for g in grads)
        group = query.shape[1] // key.shape[1]
        for b, h, rows, picked, hidden in chunks(keys):
            k, v = _gathered(key, value, b, h, picked, query.shape[1], wide)
            q, grad = query[b, h, rows].to(wide), grad_out[b, h, rows].to(wide)
            weights = torch.exp((q * scale @ k.T).masked_fill_(hidden, -torch.inf) - lse[b, h, rows, None])
            delta = (grad * out[b, h, rows].to(wide)).sum(-1, keepdim=True)
            inner = weights * (grad @ v.T - delta) * scale
            dq[b, h, rows] += inner @ k
            dk[b, h // group].index_add_(0, picked, inner.T @ q)
            dv[b, h // group].index_add_(0, picked, weights.T @ grad)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def chunks(keys: Keys) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
    """The single columns, a few hundred queries at a time.

    Yields:
        Batch item, query head, the rows, the key columns (n,) int64 that some of the rows attend to, and the mask
        (rows, n) bool of what a row does not: later keys, and keys in a block that the row has already.
    """
    layout = keys.layout
    block = layout.block
    heads = keys.columns.shape[1]
    if not bool(keys.columns.any()):
        return
    device = keys.columns.device
    budget = SCORES.get(device.type, SCORES["cuda"])
    for b, (nq, nk) in enumerate(zip(layout.query_lengths.tolist(), layout.key_lengths.tolist(), strict=True)):
        for h in range(heads):
            columns = keys.columns[b, h].nonzero()[:, 0]
            if not len(columns):
                continue
            in_block = columns // block
            start = 0
            size = max(1, budget // len(columns) // block) * block
            while start < nq:
                stop = min(nq, start + size)
                position = torch.arange(start, stop, device=device) + (nk - nq)
                covered = keys.blocks[b, h, start // block:-(-stop // block)][:, in_block]
                # What all rows have already, and what comes after the last of them, is not gathered at all.
                needed = (~covered).any(0) & (columns < stop + nk - nq)
                picked = columns[needed]
                if len(picked):
                    hidden = covered[:, needed].repeat_interleave(block, 0)[:stop - start]
                    hidden = hidden | (picked > position[:, None])
                    yield b, h, slice(start, stop), picked, hidden
                start = stop


def _gathered(key: Tensor, value: Tensor, b: int, h: int, picked: Tensor, heads: int,
              wide: torch.dtype) -> tuple[Tensor, Tensor]:
    kv_head = h // (heads // key.shape[1])
    return key[b, kv_head].index_select(0, picked).to(wide), value[b, kv_head].index_select(0, picked).to(wide)
