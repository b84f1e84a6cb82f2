"""Which blocks a head attends to: pattern choice and index selection (paper, section 3 and algorithms 1 to 4).

All heads of all batch items are treated at once; nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels import Layout, top_mass


def select_pattern(query_mean: Tensor, key_blocks: Tensor, vertical: Tensor, layout: Layout, scale: float,
                   tau: float) -> tuple[Tensor, Tensor]:
    """Query-aware sparse pattern determination (section 3.2).

    Args:
        query_mean: (B, Hq, D) mean of the representative queries.
        key_blocks: (B, Hkv, Nk, D) mean of the keys of each block.
        vertical: (B, Hq, Lk) mean attention of the representative queries to each key.
        layout: where the blocks lie.
        scale: factor of the scores.
        tau: threshold on the distance.

    Returns:
        (B, Hq) bool, True where the block estimate can be trusted (query-aware head), and the distance (B, Hq): the
        square root of the Jensen-Shannon divergence with natural logarithms, from 0 to sqrt(ln 2).
    """
    kv_heads = key_blocks.shape[1]
    grouped = query_mean.float().unflatten(1, (kv_heads, -1))
    scores = (grouped @ key_blocks.float().transpose(2, 3)).flatten(1, 2) * scale
    estimate = torch.softmax(scores.masked_fill(~layout.key_blocks, -torch.inf), -1)
    distance = jensen_shannon(estimate, pooled(vertical, layout.block, layout.columns)).sqrt()
    return distance < tau, distance


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last dimension, natural logarithm; 0 log 0 is 0."""
    middle = (p + q) / 2
    divergence = torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(middle, middle)
    return (divergence.sum(-1) / 2).clamp(min=0)


def pooled(scores: Tensor, block: int, count: int) -> Tensor:
    """Sums over blocks, (..., L) -> (..., count)."""
    scores = torch.nn.functional.pad(scores, (0, count * block - scores.shape[-1]))
    return scores.unflatten(-1, (count, block)).sum(-1)


def budget_blocks(scores: Tensor, gamma: float, block: int, smallest: int, largest: int | None) -> Tensor:
    """Blocks that the smallest set of tokens with a fraction ``gamma`` of the attention would fill, (B, Hq).

    Args:
        scores: (B, Hq, Lk) attention by key or by distance.
        smallest, largest: limits in blocks; None: no upper limit.
    """
    tokens = top_mass(scores, gamma).sum(-1)
    return (tokens // block + 1).clamp(min=smallest, max=largest)


def vertical_slash_blocks(vertical: Tensor, slash: Tensor, vertical_budget: Tensor, slash_budget: Tensor,
                          layout: Layout) -> Tensor:
    """Blocks of a vertical-slash head (section 3.3, cumulative-attention based index selection).

    Args:
        vertical, slash: (B, Hq, Lk) mean attention of the representative queries by key and by distance.
        vertical_budget, slash_budget: (B, Hq) how many blocks to take of each.
        layout: where the blocks lie.

    Returns:
        (B, Hq, Nq, Nk) bool. The first key block and the diagonal are always in.
    """
    columns = _best(pooled(vertical, layout.block, layout.columns), vertical_budget, layout)
    distances = _best(pooled(slash, layout.block, layout.columns), slash_budget, layout)
    blocks = columns[:, :, None].expand(-1, -1, layout.rows, -1)
    column = torch.arange(layout.columns, device=blocks.device)
    heads = vertical.shape[1]
    for position in layout.row_ends:  # they straddle two key blocks in chunked prefill
        distance = position[:, :, None] // layout.block - column
        taken = distances.gather(2, distance.clamp(min=0, max=layout.columns - 1)[:, None].expand(
            -1, heads, -1, -1).flatten(2)).unflatten(2, distance.shape[1:])
        blocks = blocks | (taken & (distance >= 0)[:, None])
    return blocks & layout.causal


def _best(scores: Tensor, budget: Tensor, layout: Layout) -> Tensor:
    """The ``budget`` best blocks of each head, block 0 always among them; ties go to the lower index."""
    scores = scores.masked_fill(~layout.key_blocks, -torch.inf)
    scores[..., 0] = torch.inf
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, rank < budget[..., None])


def query_aware_blocks(query_blocks: Tensor, key_blocks: Tensor, layout: Layout, scale: float, gamma: float) -> Tensor:
    """Blocks of a query-aware head (section 3.3): the best block pairs of all rows together.

    Args:
        query_blocks: (B, Hq, Nq, D) and key_blocks: (B, Hkv, Nk, D), means over the valid rows of each block.
        layout: where the blocks lie.
        scale: factor of the scores.
        gamma: fraction of the estimated attention, over all rows, to keep.

    Returns:
        (B, Hq, Nq, Nk) bool.
    """
    kv_heads = key_blocks.shape[1]
    grouped = query_blocks.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores = (grouped @ key_blocks.float().transpose(2, 3)).unflatten(2, (-1, layout.rows)).flatten(1, 2) * scale
    causal = layout.causal
    estimate = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
    estimate = estimate.masked_fill(~causal, 0.0)  # rows beyond the end of an item have no block at all
    return top_mass(estimate.flatten(2), gamma).unflatten(2, (layout.rows, layout.columns)) & causal
