"""Attention of every query to keys of its own in plain torch, and its gradient: keys are gathered a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from looseleaf_kernels.problem import Problem, statistics_dtype, without_padding

CHUNK_BYTES = 1 << 22
"""Keys and values gathered at a time: what two cores keep in their second-level caches."""


def row_sparse_attention(query: Tensor, key: Tensor, value: Tensor, index: Tensor,
                         problem: Problem) -> tuple[Tensor, Tensor]:
    """As the reference; products in fp32 (fp64 for fp64)."""
    rows = _Rows(query, key, value, index, problem)
    out, lse = torch.zeros_like(rows.q), rows.q.new_full(rows.q.shape[:1], -torch.inf)
    for part in rows.parts():
        _, v, scores = rows.scores(part)
        lse[part] = torch.logsumexp(scores, 1)
        p = (scores - lse[part].nan_to_num(neginf=0.0)[:, None]).exp()
        out[part] = torch.bmm(p[:, None], v)[:, 0]
    return out.view(query.shape).to(query.dtype), lse.view(query.shape[:3])


def gradient(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, index: Tensor,
             problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, on any device: see :mod:`looseleaf_kernels.gradient` for the formulas."""
    rows = _Rows(query, key, value, index, problem)
    do, o = (without_padding(x, problem.query_lengths).to(rows.q.dtype).reshape(rows.q.shape) for x in (grad_out, out))
    delta, lse = (do * o).sum(-1, keepdim=True), lse.reshape(-1).to(rows.q.dtype).nan_to_num(neginf=0.0)
    dq, dk, dv = torch.zeros_like(rows.q), torch.zeros_like(rows.k), torch.zeros_like(rows.v)
    for part in rows.parts():
        k, v, scores = rows.scores(part)
        p = (scores - lse[part, None]).exp()
        ds = p * (torch.bmm(v, do[part, :, None])[..., 0] - delta[part]) * problem.scale
        dq[part] = torch.bmm(ds[:, None], k)[:, 0]
        at = rows.at[part].flatten()
        dk.index_add_(0, at, (ds[..., None] * rows.q[part, None]).flatten(0, 1))
        dv.index_add_(0, at, (p[..., None] * do[part, None]).flatten(0, 1))
    return (dq.view(query.shape).to(query.dtype), dk.view(key.shape).to(key.dtype),
            dv.view(value.shape).to(value.dtype))


class _Rows:
    """The R = B * Hq * Lq queries, all keys in one list, and which keys each query has.

    Attributes:
        q: (R, D). k, v: (B * Hkv * Lk, D), zeros in padding.
        at: (R, K) int64 places in ``k``. seen: (R, K) which of them take part.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor, problem: Problem) -> None:
        dtype, (batch, heads, lq, width), lk = statistics_dtype(query), query.shape, key.shape[2]
        self.problem = problem
        self.q = without_padding(query, problem.query_lengths).to(dtype).reshape(-1, width)
        self.k, self.v = (without_padding(x, problem.key_lengths).to(dtype).reshape(-1, width) for x in (key, value))
        bound = problem.key_lengths[:, None].expand(batch, lq)
        position = torch.arange(lq, device=query.device)
        if problem.causal:
            bound = torch.minimum(bound, position + problem.offsets[:, None] + 1)
        bound = torch.where(position < problem.query_lengths[:, None], bound, 0)
        self.seen = ((index >= 0) & (index < bound[:, None, :, None])).view(-1, index.shape[3])
        head = torch.arange(batch * heads, device=query.device)
        key_head = head // heads * key.shape[1] + head % heads // (heads // key.shape[1])
        self.at = (index.clamp(min=0).long() + (key_head * lk).view(batch, heads, 1, 1)).view(-1, index.shape[3])

    def parts(self) -> Iterator[slice]:
        """A few rows at a time."""
        size = max(1, CHUNK_BYTES // max(1, 2 * self.at.shape[1] * self.q.shape[1] * self.q.element_size()))
        return (slice(n, n + size) for n in range(0, len(self.q), size))

    def scores(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (R, K, D), and scaled scores (R, K), -inf where a key does not take part."""
        at = self.at[part]
        k, v = (x.index_select(0, at.flatten()).view(*at.shape, -1) for x in (self.k, self.v))  # faster than x[at]
        scores = torch.bmm(k, self.q[part, :, None])[..., 0] * self.problem.scale
        return k, v, scores.masked_fill(~self.seen[part], -torch.inf)
