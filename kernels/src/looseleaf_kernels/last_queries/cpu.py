"""Scores of the last queries in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.problem import statistics_dtype

SCORES = 1 << 27
"""Scores made at a time on a GPU, where one head after another would be a launch after another."""


def last_query_scores(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor,
                      key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; the (last_q x Lk) matrices of the heads of one key head at a time, on a GPU of more."""
    batch, heads, _, _ = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    group = heads // kv_heads
    dtype = statistics_dtype(query)
    vertical = torch.zeros(batch, heads, lk, dtype=dtype, device=query.device)
    slash = torch.zeros_like(vertical)
    for b in range(batch):
        nq, nk = int(query_lengths[b]), int(key_lengths[b])
        rows = min(last_q, nq, nk)
        if rows == 0 or nk == 0:
            continue
        last = torch.arange(rows, device=query.device)[:, None] + (nk - rows)
        hidden = torch.arange(nk, device=query.device) > last
        first = max(0, nk - rows)
        many = 1 if query.device.type == "cpu" else max(1, SCORES // (group * rows * nk))
        for start in range(0, kv_heads, many):
            of_key, of_query = slice(start, start + many), slice(start * group, (start + many) * group)
            q = query[b, of_query, nq - rows:nq].to(dtype).unflatten(0, (-1, group)).flatten(1, 2) * scale
            p = (q @ key[b, of_key, :nk].to(dtype).transpose(1, 2)).view(-1, rows, nk)
            p[:, :, first:].masked_fill_(hidden[:, first:], -torch.inf)
            p = torch.softmax(p, -1) / rows
            vertical[b, of_query, :nk] = p.sum(1)
            slash[b, of_query, :nk] = _diagonal_sums(p)
    return vertical, slash


def _diagonal_sums(p: Tensor) -> Tensor:
    """(G, R, N) -> (G, N): sums by the distance of row r, which stands at position N - R + r, from the key."""
    group, rows, n = p.shape
    # With `rows` zeros in front and a stride of one more than a row, entries of equal distance share a column.
    padded = torch.nn.functional.pad(p, (rows, 0)).contiguous()
    lined_up = padded.as_strided((group, rows, n), (padded.stride(0), n + rows + 1, 1), padded.storage_offset() + 1)
    return lined_up.sum(1).flip(-1)
