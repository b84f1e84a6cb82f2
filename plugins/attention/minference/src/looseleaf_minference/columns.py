"""Attention over blocks and single columns together (paper, section 3.2 and appendix on kernels)."""

from __future__ import annotations

from torch import Tensor

from looseleaf_kernels import vertical_slash_attention
from looseleaf_minference.patterns import Keys


def attention(query: Tensor, key: Tensor, value: Tensor, keys: Keys, scale: float) -> Tensor:
    """Causal softmax attention over ``keys``, each counted once; exact inside of them and differentiable.

    Args:
        query: (B, Hq, Lq, D). key, value: (B, Hkv, Lk, D). What lies beyond the lengths may be NaN.
        keys: what each query block attends to.
        scale: factor of the scores.

    Returns:
        (B, Hq, Lq, D) in the dtype of the query; rows beyond the lengths are zero.
    """
    layout = keys.layout
    out, _ = vertical_slash_attention(query, key, value, *keys.indices(), scale=scale,
                                      query_lengths=layout.query_lengths, key_lengths=layout.key_lengths)
    return out
