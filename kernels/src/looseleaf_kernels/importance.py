"""Block importance: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from looseleaf_kernels.ops import _check, _lengths, implementation_for

NAME = "block_importance"
REDUCTIONS = ("mean", "sum")


@torch.library.custom_op(f"looseleaf::{NAME}", mutates_args=())
def _importance(query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, causal: bool, mean: bool,
                query_lengths: Tensor, key_lengths: Tensor, impl: str) -> Tensor:
    module = importlib.import_module(f"looseleaf_kernels.importance_{impl}")
    made: Tensor = module.block_importance(query, key, block_q, block_k, scale, causal, query_lengths, key_lengths)
    return made.div_(block_q * block_k) if mean else made


@_importance.register_fake
def _importance_fake(query: Tensor, key: Tensor, block_q: int, block_k: int, scale: float, causal: bool, mean: bool,
                     query_lengths: Tensor, key_lengths: Tensor, impl: str) -> Tensor:
    b, h, lq, _ = query.shape
    return query.new_empty(b, h, -(-lq // block_q), -(-key.shape[2] // block_k),
                           dtype=torch.promote_types(query.dtype, torch.float32))


def block_importance(query: Tensor, key: Tensor, block_q: int, block_k: int, *, causal: bool,
                     scale: float | None = None, reduce: str = "mean", key_lengths: Tensor | None = None,
                     query_lengths: Tensor | None = None, impl: str | None = None) -> Tensor:
    """Softmax probability of each block of the attention map, without making the map. Not differentiable.

    Args:
        query: (B, Hq, Lq, D). key: (B, Hkv, Lk, D), same dtype; Hkv divides Hq.
        block_q, block_k: queries and keys of a block, at least 1; the last block may be ragged.
        causal: query row i sees keys up to i + (key length - query length) of its item.
        scale: factor of the scores; None: 1 / sqrt(D).
        reduce: ``"sum"`` over the pairs of a block; or ``"mean"``, that sum divided by block_q * block_k, for ragged
            blocks and blocks with padding too, so that a block with fewer pairs counts less.
        key_lengths, query_lengths: (B,) valid rows of each item; what lies beyond may be NaN, takes part in no
            softmax and adds nothing. None: all.
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`looseleaf_kernels.implementation_for`.

    Returns:
        (B, Hq, Nq, Nk), fp32 (fp64 for fp64). The sums of a head add up to its valid queries that see a key. Memory
        beyond inputs and output grows with L, not with L x L, except in the reference.

    Raises:
        ValueError: shapes, dtypes, blocks, ``reduce`` or lengths that do not fit.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}: allowed is 'mean' or 'sum'")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ValueError(f"{name}={block}: allowed is 1 or more")
    batch, _, lq, width = _check(query, key)
    if key.dtype != query.dtype:
        raise ValueError(f"key has dtype {key.dtype}: allowed is the query's, {query.dtype}")
    chosen = impl or implementation_for(NAME, query.device, query.dtype, width)[0]
    if chosen not in ("reference", "cpu", "triton"):
        raise ValueError(f"impl={impl!r}: allowed is reference, cpu, triton")
    if chosen == "triton" and any(b < 16 or b > 128 or b & (b - 1) for b in (block_q, block_k)):
        if impl == "triton":
            raise ValueError(f"blocks of {block_q} x {block_k}: the Triton kernel takes powers of two from 16 to 128")
        chosen = "cpu"  # plain torch, on any device
    made: Tensor = _importance(
        query, key, block_q, block_k, width ** -0.5 if scale is None else float(scale), causal, reduce == "mean",
        _lengths(query_lengths, batch, lq, query.device, "query_lengths"),
        _lengths(key_lengths, batch, key.shape[2], query.device, "key_lengths"), chosen)
    return made
