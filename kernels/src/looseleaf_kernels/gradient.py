"""The gradient of attention over blocks, and over single columns, in plain torch on any device.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O): dS = P * (dP - delta), dV = P^T dO, dQ = scale dS K,
dK = scale dS^T Q (FlashAttention, arXiv 2205.14135, appendix B.4).
P is computed again from the log-sum-exp, chunk by chunk, so that memory beyond the gradients does not grow with L.
Rows add to dK and dV with ``index_add_``: deterministic on a CPU, not on a GPU, where the additions are atomic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem, like, statistics_dtype
from looseleaf_kernels.rows import Rows, from_blocks, to_blocks

CHUNK_SCORES = 1 << 19
"""Scores per chunk: 2 MiB of fp32, about one core's cache."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""dQ, dK and dV in the dtypes of the inputs."""


def register_gradient(forward: Any, gradient: Any) -> None:
    """Let one operator of ``torch.library`` differentiate another. The log-sum-exp is not differentiated.

    Args:
        forward: takes query, key, value, ..., and last the name of an implementation; returns output and log-sum-exp.
        gradient: takes grad_out, query, key, value, output, log-sum-exp, ...; returns dQ, dK and dV.
    """
    @gradient.register_fake
    def fake(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Gradients:
        return like(query), like(key), like(value)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        arguments = (*inputs[:3], *output, *inputs[3:-1])
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]

    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if x is None else x for x in ctx.others]
        return (*gradient(grad_out, *arguments),) + (None,) * (len(arguments) - 4)

    forward.register_autograd(backward, setup_context=save)


def blocks_gradient(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                    blocks: Csr, problem: Problem) -> Gradients:
    """What the blocks add to the gradients; ``out`` and ``lse`` are those of the whole attention."""
    parts = _Parts(grad_out, query, key, value, out, lse, blocks, problem)
    nk = -(-key.shape[2] // problem.block_k)
    base = parts.rows.key_heads(key.shape[1]) * nk
    row_of_entry, offsets = parts.rows.of_entries(), torch.arange(problem.block_k, device=query.device)
    size = max(1, CHUNK_SCORES // (problem.block_q * problem.block_k))
    for begin in range(0, blocks.col.numel(), size):
        rows, columns = row_of_entry[begin:begin + size], blocks.col[begin:begin + size].long()
        parts.add(rows, base[rows] + columns, columns[:, None] * problem.block_k + offsets)
    return parts.gradients(query, key, value)


def columns_gradient(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                     columns: Csr, problem: Problem) -> Gradients:
    """As :func:`blocks_gradient` for single keys. Rows with about equally many columns are computed together."""
    parts = _Parts(grad_out, query, key, value, out, lse, columns, problem._replace(block_k=1))
    lk, entries = key.shape[2], parts.rows
    base = entries.key_heads(key.shape[1]) * lk
    starts, counts = entries.starts.long(), entries.ends - entries.starts
    order = torch.argsort(counts, descending=True, stable=True)
    sizes = counts[order].tolist()
    begin = 0
    while begin < len(sizes) and sizes[begin]:
        n = sizes[begin]
        rows = order[begin:begin + max(1, CHUNK_SCORES // (problem.block_q * n))]
        begin += len(rows)
        entry = torch.arange(n, device=query.device)
        keys = columns.col[(starts[rows, None] + entry).clamp(max=columns.col.numel() - 1)].long()
        # Entries of the next rows are put behind every query.
        parts.add(rows, base[rows, None] + keys, torch.where(entry < counts[rows, None], keys, lk))
    return parts.gradients(query, key, value)


class _Parts:
    """Gradients to which parts of the keys add, one after another. K and V are cut into ``block_k`` keys."""

    def __init__(self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                 entries: Csr, problem: Problem) -> None:
        self.rows, self.scale = Rows(entries, problem), problem.scale
        dtype, block_q = statistics_dtype(query), problem.block_q
        self.q, self.do, o = (to_blocks(x, block_q, problem.query_lengths, dtype) for x in (query, grad_out, out))
        self.k, self.v = (to_blocks(x, problem.block_k, problem.key_lengths, dtype) for x in (key, value))
        padding = self.rows.count * block_q - query.shape[2]
        self.lse = torch.nn.functional.pad(lse.to(dtype), (0, padding), value=-torch.inf).reshape(-1, block_q)
        self.delta = (self.do * o).sum(-1, keepdim=True)
        self.dq, self.dk, self.dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)

    def add(self, rows: Tensor, blocks: Tensor, keys: Tensor) -> None:
        """What n rows owe to some keys.

        Args:
            rows: (n,) which.
            blocks: (n, ...) the blocks of K that hold the keys of each.
            keys: (n, m) positions of these keys; one that no query of the row sees hides its key.
        """
        lse = self.lse[rows]
        q, do = self.q[rows], self.do[rows]
        k, v = (x[blocks].view(len(rows), -1, x.shape[-1]) for x in (self.k, self.v))
        hidden = (keys[:, None] > self.rows.last_keys(rows)[..., None]) | torch.isneginf(lse)[..., None]
        scores = torch.bmm(q, k.transpose(1, 2)) * self.scale
        p = torch.where(hidden, 0.0, (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp())
        ds = p * (torch.bmm(do, v.transpose(1, 2)) - self.delta[rows]) * self.scale
        at = blocks.flatten()
        self.dv.index_add_(0, at, torch.bmm(p.transpose(1, 2), do).view(-1, *self.v.shape[1:]))
        self.dk.index_add_(0, at, torch.bmm(ds.transpose(1, 2), q).view(-1, *self.k.shape[1:]))
        self.dq.index_add_(0, rows, torch.bmm(ds, k))

    def gradients(self, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        """All that was added."""
        dq, dk, dv = (from_blocks(x, like).to(like.dtype).contiguous()
                      for x, like in ((self.dq, query), (self.dk, key), (self.dv, value)))
        return dq, dk, dv
