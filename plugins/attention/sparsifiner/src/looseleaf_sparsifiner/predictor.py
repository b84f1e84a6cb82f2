"""What guesses the attention maps of a layer, which keys a row keeps of a guess, and what both cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Predictor(nn.Module):
    """Guesses the attention maps of one layer from its queries and keys (paper, section 3.2).

    Keys are projected to ``head_dim // reduce_c`` channels and ``tokens // reduce_n`` mixtures of tokens; each query
    then has a softmax over these mixtures, the coefficients, and an up-projection turns them into a row of the map.
    All heads share the weights. Everything is computed in float32 at least, so that half precision makes no ties.

    Args:
        head_dim, tokens, heads, kv_heads: sizes of the layer, class token and registers counted.
        reduce_n, reduce_c, shared: as :class:`Sparsifiner` takes them.

    Raises:
        ValueError: no token or no channel would be left.
    """

    def __init__(self, head_dim: int, tokens: int, heads: int = 1, kv_heads: int | None = None, *, reduce_n: int = 6,
                 reduce_c: int = 2, shared: bool = False) -> None:
        super().__init__()
        self.head_dim, self.tokens, self.heads, self.kv_heads = head_dim, tokens, heads, kv_heads or heads
        self.rank, self.width = tokens // reduce_n, head_dim // reduce_c
        for name, size, whole in (("reduce_n", self.rank, f"{tokens} tokens"),
                                  ("reduce_c", self.width, f"heads of {head_dim}")):
            if size < 1:
                raise ValueError(f"{name}: expected at most the size of what it divides, {whole}, got a larger number")
        self.query, self.key = nn.Linear(head_dim, self.width), nn.Linear(head_dim, self.width)
        self.down = nn.Parameter(torch.empty(tokens, self.rank))
        self.up = None if shared else nn.Parameter(torch.empty(tokens, self.rank))
        for matrix in (self.down, self.up):
            if matrix is not None:
                nn.init.trunc_normal_(matrix, std=0.02)

    def coefficients(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Softmax of each query over the mixtures of keys, (B, H, L, n).

        Args:
            query: (B, H, L, D), any rows of the queries.
            key: (B, Hkv, tokens, D), all keys; Hkv divides H.
            scale: factor of the scores.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            rows, keys = (F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
                          for x, layer in ((query, self.query), (key, self.key)))
            mixtures = self.down.to(dtype).mT @ keys
            mixtures = mixtures.repeat_interleave(query.shape[1] // key.shape[1], 1)
            return torch.softmax(scale * rows @ mixtures.mT, -1)

    def dense_map(self, coefficients: Tensor) -> Tensor:
        """The guess of the first stage of training, signed, (B, H, L, tokens)."""
        with torch.autocast(coefficients.device.type, enabled=False):
            return coefficients @ self._up.to(coefficients.dtype).mT

    def basis(self, threshold: float) -> Tensor:
        """Absolute values of the up-projection, (n, tokens); those up to ``threshold`` are 0.

        The sign is lost here, as in the authors' code. It costs as much as a hundredth of one product with it, so it is
        made anew in each call instead of being kept and going stale while somebody trains.
        """
        size = self._up.abs()
        return torch.where(size > threshold, size, 0).mT

    def sparse_map(self, coefficients: Tensor, threshold: float, topk: int) -> Tensor:
        """The guess at work: the ``topk`` largest coefficients of a row times the sparse basis, (B, H, L, tokens)."""
        values, places = coefficients.flatten(0, -2).topk(min(topk, coefficients.shape[-1]), -1)
        basis = self.basis(threshold).to(coefficients.dtype).contiguous()
        # a sum of a few rows of the basis: a product with all of them would cost more than attention itself
        rows = F.embedding_bag(places, basis, per_sample_weights=values, mode="sum")
        return rows.view(*coefficients.shape[:-1], basis.shape[1])

    @property
    def _up(self) -> Tensor:
        return self.down if self.up is None else self.up


def budget(keep_rate: float, tokens: int) -> int:
    """Keys that a row keeps of ``tokens``: ceil(keep_rate * tokens), at least 1."""
    return min(tokens, max(1, math.ceil(round(keep_rate * tokens, 9))))  # rounded first: 0.07 * 100 is above 7


def top_keys(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest scores of each row, (..., N) bool; of equal ones those that come first."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and not scores.requires_grad:
        # NumPy's sort is vectorised: at 257 tokens it takes an eighth of the time of torch.topk
        last = torch.from_numpy(np.sort(scores.numpy(), -1)[..., -count, None])
    else:
        last = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    mask = scores >= last
    if int(mask.sum()) > mask[..., 0].numel() * count:
        above = scores > last
        mask = above | (mask & ((mask & ~above).cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return mask


def index_of(mask: Tensor) -> Tensor:
    """The kept keys of each row of a mask (..., N), (..., K) int32 for the longest row, -1 behind those of others."""
    count = int(mask.sum(-1).max())
    kept, places = mask.to(torch.uint8).topk(max(1, count), -1)
    return torch.where(kept > 0, places, -1).int()


def macs(tokens: int, heads: int, head_dim: int, pairs: Any, *, kv_heads: int | None = None, rank: int = 0,
         width: int = 0, coefficients: int = 0, basis_density: Any = 0.0, prefix: int = 1) -> dict[str, Any]:
    """Multiply-adds of the attention of one layer and item; projections of the layer itself are not counted.

    Args:
        tokens, heads, head_dim, kv_heads: of the layer.
        pairs: kept pairs of query and key in one head, a number or a scalar tensor.
        rank, width: of the predictor; 0: there is none.
        coefficients: how many of a row are not 0.
        basis_density: fraction of the entries of the sparse basis that are not 0, likewise.
        prefix: rows that attend to everything, for which nothing is guessed.

    Returns:
        ``projections``, ``mixtures``, ``coefficients``, ``map``, ``attention``, their sum ``total``, and ``dense``.
    """
    kv_heads = kv_heads or heads
    parts = {"projections": float(tokens * head_dim * width * (heads + kv_heads)),
             "mixtures": float(rank * tokens * kv_heads * width),
             "coefficients": float(heads * tokens * width * rank),
             "map": coefficients * basis_density * heads * (tokens - prefix) * tokens if rank else 0.0,
             "attention": 2.0 * heads * head_dim * pairs}
    return {**parts, "total": sum(parts.values()), "dense": 2.0 * tokens * tokens * heads * head_dim}
