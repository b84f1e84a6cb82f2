"""Scores of the last queries, head by head: obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import statistics_dtype


def last_query_scores(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor,
                      key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the last valid queries of the causal softmax, by key and by distance."""
    batch, heads, _, _ = query.shape
    lk = key.shape[2]
    dtype = statistics_dtype(query)
    vertical = torch.zeros(batch, heads, lk, dtype=dtype, device=query.device)
    slash = torch.zeros_like(vertical)
    group = heads // key.shape[1]
    for b in range(batch):
        nq, nk = int(query_lengths[b]), int(key_lengths[b])
        rows = min(last_q, nq, nk)  # earlier rows see no key
        if not rows:
            continue
        for h in range(heads):
            scores = query[b, h, nq - rows:nq].to(dtype) @ key[b, h // group, :nk].to(dtype).T * scale
            position = torch.arange(nk - rows, nk, device=query.device)[:, None]
            distance = position - torch.arange(nk, device=query.device)
            p = torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1)
            vertical[b, h, :nk] = p.sum(0) / rows
            slash[b, h].index_add_(0, distance.clamp(min=0).flatten(), (p / rows).flatten())
    return vertical, slash
