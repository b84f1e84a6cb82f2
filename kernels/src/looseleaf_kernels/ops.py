"""The public operations: checks, choice of implementation, registration with ``torch.library``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from looseleaf_kernels import backward, cpu, reference
from looseleaf_kernels.index import BlockIndex

IMPLEMENTATIONS = ("reference", "cpu", "triton")
_OPERATIONS: dict[str, tuple[str, ...]] = {
    "block_sparse_attention": IMPLEMENTATIONS,
    "quantized_block_sparse_attention": IMPLEMENTATIONS,
    "vertical_slash_attention": IMPLEMENTATIONS,
    "block_mean": IMPLEMENTATIONS,
    "block_importance": IMPLEMENTATIONS,
    # Plain torch code, the same on every device; "cpu" names it for that reason.
    "last_query_scores": ("reference", "cpu"),
    "top_mass": ("reference", "cpu"),
}
_PLAIN = {"quantized_block_sparse_attention": "cpu"}
"""The implementation that is plain torch and runs on any device, where that is not the reference."""
_forced: list[str] = []


def available_implementations(op: str) -> tuple[str, ...]:
    """The implementations that exist for an operation.

    Raises:
        ValueError: unknown operation.
    """
    if op not in _OPERATIONS:
        raise ValueError(f"op={op!r}: allowed is {', '.join(_OPERATIONS)}")
    return _OPERATIONS[op]


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Force one implementation inside a with-block: ``reference``, ``cpu`` or ``triton``."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: allowed is {', '.join(IMPLEMENTATIONS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def implementation_for(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Which implementation runs, and why.

    Raises:
        ValueError: unknown operation, or LOOSELEAF_KERNELS holds an unknown name.
    """
    known = available_implementations(op)
    forced = _forced[-1] if _forced else os.environ.get("LOOSELEAF_KERNELS", "")
    if forced:
        if forced not in IMPLEMENTATIONS:
            raise ValueError(f"LOOSELEAF_KERNELS={forced!r}: allowed is {', '.join(IMPLEMENTATIONS)}")
        if forced in known:
            return forced, "forced"
    if dtype == torch.float64:
        return "reference" if op == "block_sparse_attention" else "cpu", "float64 is for checking"
    if device.type == "cuda" and "triton" in known:
        if importlib.util.find_spec("triton") is None:
            return _PLAIN.get(op, "reference"), "a GPU but no Triton: pip install triton"
        if not 16 <= head_dim <= 256:
            return _PLAIN.get(op, "reference"), f"head_dim {head_dim} is outside 16 to 256"
        return "triton", "a GPU and Triton are there"
    return "cpu", "plain torch" if device.type == "cuda" else "a CPU"


def _module(name: str) -> Any:
    if name == "triton":
        return importlib.import_module("looseleaf_kernels.triton_kernels")
    return {"reference": reference, "cpu": cpu}[name]


@torch.library.custom_op("looseleaf::block_sparse_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float, causal: bool,
               block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor,
               impl: str) -> tuple[Tensor, Tensor]:
    out, lse = _module(impl).block_sparse_attention(
        query, key, value, row_ptr, col, scale, causal, block_q, block_k, query_lengths, key_lengths)
    return out, lse


@_attention.register_fake
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor, scale: float,
                    causal: bool, block_q: int, block_k: int, query_lengths: Tensor, key_lengths: Tensor,
                    impl: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("looseleaf::block_sparse_attention_backward", mutates_args=())
def _attention_grad(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                    row_ptr: Tensor, col: Tensor, scale: float, causal: bool, block_q: int, block_k: int,
                    query_lengths: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backward.block_sparse_attention_backward(
        grad_out, query, key, value, out, lse, row_ptr, col, scale, causal, block_q, block_k, query_lengths,
        key_lengths)


@_attention_grad.register_fake
def _attention_grad_fake(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                         row_ptr: Tensor, col: Tensor, scale: float, causal: bool, block_q: int, block_k: int,
                         query_lengths: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty_like(query, memory_format=torch.contiguous_format),
            torch.empty_like(key, memory_format=torch.contiguous_format),
            torch.empty_like(value, memory_format=torch.contiguous_format))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, row_ptr, col, scale, causal, block_q, block_k, query_lengths, key_lengths, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, row_ptr, col, query_lengths, key_lengths)
    ctx.numbers = (scale, causal, block_q, block_k)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, row_ptr, col, query_lengths, key_lengths = ctx.saved_tensors
    scale, causal, block_q, block_k = ctx.numbers
    dq, dk, dv = _attention_grad(grad_out, query, key, value, out, lse, row_ptr, col, scale, causal, block_q, block_k,
                                 query_lengths, key_lengths)
    return (dq, dk, dv) + (None,) * 9


_attention.register_autograd(_differentiate, setup_context=_save)


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, index: BlockIndex, *,
                           scale: float | None = None, key_lengths: Tensor | None = None,
                           query_lengths: Tensor | None = None, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over chosen blocks of keys, exact inside of them.

    Args:
        query: (B, Hq, Lq, D), fp32, fp16, bf16 or (reference) fp64; D from 16 to 256.
        key, value: (B, Hkv, Lk, D); Hkv divides Hq.
        index: the blocks; its sizes must be those of the tensors.
        scale: factor of the scores; None: 1 / sqrt(D).
        key_lengths, query_lengths: (B,) valid rows of each item; what lies beyond may be NaN. None: all. With
            ``index.causal``, query row i sees keys up to i + (key length - query length).
        impl: ``reference``, ``cpu`` or ``triton``; None: chosen, see :func:`implementation_for`.

    Returns:
        The output, (B, Hq, Lq, D), in the query's dtype, and the natural log-sum-exp of the scaled scores,
        (B, Hq, Lq), fp32, not differentiable. Rows without any key: 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or block sizes that do not fit.
    """
    batch, _, lq, width = _check_attention(query, key, value, index=index)
    q_lengths = _lengths(query_lengths, batch, lq, query.device, "query_lengths")
    k_lengths = _lengths(key_lengths, batch, key.shape[2], query.device, "key_lengths")
    chosen = _implementation("block_sparse_attention", query, index, impl)
    if not lq or not key.shape[2] or not batch:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    out, lse = _attention(query, key, value, index.row_ptr, index.col, width ** -0.5 if scale is None else float(scale),
                          index.causal, index.block_q, index.block_k, q_lengths, k_lengths, chosen)
    return out, lse


@torch.library.custom_op("looseleaf::block_mean", mutates_args=())
def _mean(x: Tensor, block: int, lengths: Tensor, impl: str) -> Tensor:
    made: Tensor = _module(impl).block_mean(x, block, lengths)
    return made


@_mean.register_fake
def _mean_fake(x: Tensor, block: int, lengths: Tensor, impl: str) -> Tensor:
    b, h, n, d = x.shape
    return x.new_empty(b, h, -(-n // block), d, dtype=torch.promote_types(x.dtype, torch.float32))


def block_mean(x: Tensor, block: int, lengths: Tensor | None = None) -> Tensor:
    """Mean over the valid rows of each block.

    Args:
        x: (B, H, L, D).
        block: rows of a block, at least 1.
        lengths: (B,) valid rows; None: all.

    Returns:
        (B, H, ceil(L / block), D), fp32; blocks without a valid row are 0.
    """
    if block < 1:
        raise ValueError(f"block={block}: allowed is 1 or more")
    valid = _lengths(lengths, x.shape[0], x.shape[2], x.device, "lengths")
    chosen = implementation_for("block_mean", x.device, x.dtype, x.shape[-1])[0]
    if chosen == "triton" and block & (block - 1):
        chosen = "cpu"
    made: Tensor = _mean(x, block, valid, chosen)
    return made


@torch.library.custom_op("looseleaf::last_query_scores", mutates_args=())
def _last(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor, key_lengths: Tensor,
          impl: str) -> tuple[Tensor, Tensor]:
    vertical, slash = _module(impl).last_query_scores(query, key, last_q, scale, query_lengths, key_lengths)
    return vertical, slash


@_last.register_fake
def _last_fake(query: Tensor, key: Tensor, last_q: int, scale: float, query_lengths: Tensor, key_lengths: Tensor,
               impl: str) -> tuple[Tensor, Tensor]:
    made = query.new_empty(*query.shape[:2], key.shape[2], dtype=torch.promote_types(query.dtype, torch.float32))
    return made, torch.empty_like(made)


def last_query_scores(query: Tensor, key: Tensor, last_q: int, *, scale: float | None = None,
                      key_lengths: Tensor | None = None, query_lengths: Tensor | None = None
                      ) -> tuple[Tensor, Tensor]:
    """Where the last valid queries look: causal softmax, averaged over them by key and by distance.

    Args:
        query: (B, Hq, Lq, D). key: (B, Hkv, Lk, D).
        last_q: how many of the last valid queries, at least 1; fewer are used where there are fewer.
        scale, key_lengths, query_lengths: as in :func:`block_sparse_attention`.

    Returns:
        vertical (B, Hq, Lk) by key, and slash (B, Hq, Lk) by distance query - key; fp32, each sums to 1.
    """
    if last_q < 1:
        raise ValueError(f"last_q={last_q}: allowed is 1 or more")
    batch, _, lq, width = _check(query, key)
    vertical, slash = _last(
        query, key, last_q, width ** -0.5 if scale is None else float(scale),
        _lengths(query_lengths, batch, lq, query.device, "query_lengths"),
        _lengths(key_lengths, batch, key.shape[2], query.device, "key_lengths"),
        implementation_for("last_query_scores", query.device, query.dtype, width)[0])
    return vertical, slash


@torch.library.custom_op("looseleaf::top_mass", mutates_args=())
def _top(scores: Tensor, mass: Tensor, impl: str) -> Tensor:
    made: Tensor = _module(impl).top_mass(scores, mass)
    return made


@_top.register_fake
def _top_fake(scores: Tensor, mass: Tensor, impl: str) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def top_mass(scores: Tensor, mass: float | Tensor) -> Tensor:
    """The smallest set of largest scores of each row whose sum reaches a share of the row's total.

    Args:
        scores: (..., n), not negative.
        mass: share in (0, 1], a number or (...,). 1 takes every positive score. Ties go to the lower index.

    Returns:
        (..., n) bool; a row that is all zero selects nothing.
    """
    share = torch.as_tensor(mass, dtype=torch.float32, device=scores.device)
    made: Tensor = _top(scores, share.expand(scores.shape[:-1]).contiguous(),
                        implementation_for("top_mass", scores.device, scores.dtype, 64)[0])
    return made


def _check(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)}: allowed is (B, Hq, Lq, D) and "
                         "(B, Hkv, Lk, D)")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads and {key.shape[1]} key heads: the second must divide the first")
    b, h, n, d = query.shape
    return b, h, n, d


def _check_attention(query: Tensor, key: Tensor, value: Tensor, **indices: BlockIndex) -> tuple[int, int, int, int]:
    """Batch, query heads, Lq and D of tensors that go together, and with the indices."""
    batch, heads, lq, width = _check(query, key)
    if value.shape != key.shape or value.dtype != query.dtype or key.dtype != query.dtype:
        raise ValueError(f"key {tuple(key.shape)} {key.dtype} and value {tuple(value.shape)} {value.dtype}: allowed is "
                         f"equal shapes and the query's dtype, {query.dtype}")
    for name, given in indices.items():
        if (given.batch, given.heads, given.q_len, given.k_len) != (batch, heads, lq, key.shape[2]):
            raise ValueError(f"{name} is for batch {given.batch}, {given.heads} heads, Lq {given.q_len}, "
                             f"Lk {given.k_len}: the tensors have {batch}, {heads}, {lq}, {key.shape[2]}")
    return batch, heads, lq, width


def _implementation(op: str, query: Tensor, index: BlockIndex, impl: str | None,
                    least: tuple[int, int] = (16, 16)) -> str:
    """The implementation that runs: ``impl``, or the best one that takes blocks of these sizes."""
    chosen = impl or implementation_for(op, query.device, query.dtype, query.shape[-1])[0]
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: allowed is {', '.join(IMPLEMENTATIONS)}")
    sizes = index.block_q, index.block_k
    if chosen == "triton" and any(n < low or n & (n - 1) for n, low in zip(sizes, least, strict=True)):
        if impl == "triton":
            raise ValueError(f"blocks of {sizes[0]} x {sizes[1]}: the Triton kernel takes powers of two, from "
                             f"{least[0]} for block_q and from {least[1]} for block_k")
        return _PLAIN.get(op, "reference")
    return chosen


def _lengths(given: Tensor | None, batch: int, length: int, device: torch.device, name: str) -> Tensor:
    if given is None:
        return torch.full((batch,), length, dtype=torch.int64, device=device)
    if given.shape != (batch,):
        raise ValueError(f"{name} has shape {tuple(given.shape)}: allowed is ({batch},)")
    return given.to(device=device, dtype=torch.int64)
