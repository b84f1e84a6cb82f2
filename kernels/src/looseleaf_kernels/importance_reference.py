"""Block importance in plain torch, obviously right and of any float dtype. Memory is of size L x L: for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def block_importance(query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, causal: bool,
                     query_lengths: Tensor, key_lengths: Tensor) -> Tensor:
    """Sums of the softmax probabilities of each block, (B, H, Nq, Nk)."""
    lq, lk = query.shape[2], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    q_at, k_at = (torch.arange(n, device=query.device) for n in (lq, lk))
    q_ok, k_ok = q_at < query_lengths[:, None], k_at < key_lengths[:, None]
    seen = q_ok[:, :, None] & k_ok[:, None]
    if causal:
        position = q_at + (key_lengths - query_lengths)[:, None]
        seen = seen & (k_at <= position[..., None])
    # NaN in padding must not leak: padding is replaced, not only masked.
    q = torch.where(q_ok[:, None, :, None], query, 0).to(wide)
    k = torch.where(k_ok[:, None, :, None], key, 0).to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen[:, None], -torch.inf)
    p = torch.where(seen.any(-1)[:, None, :, None], torch.softmax(scores, -1), 0.0)
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    p = torch.nn.functional.pad(p, (0, nk * block_k - lk, 0, nq * block_q - lq))
    return p.view(*p.shape[:2], nq, block_q, nk, block_k).sum((3, 5))
