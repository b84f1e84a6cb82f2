"""The gradient of attention over blocks, and over single columns, in plain torch on any device.

P is computed again from the log-sum-exp, chunk by chunk, so that memory beyond the gradients does not grow with L.
Rows add to dK and dV with ``index_add_``: deterministic on a CPU, not on a GPU, where the additions are atomic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from looseleaf_kernels.cpu import _blocks

CHUNK_SCORES = 1 << 19
"""Scores per chunk: 2 MiB of fp32, about one core's cache."""


def block_sparse_attention_backward(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, row_ptr: Tensor,
        col: Tensor, scale: float, causal: bool, block_q: int, block_k: int, query_lengths: Tensor,
        key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) in the dtypes of the inputs. The log-sum-exp is not differentiated.

    With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O): dS = P * (dP - delta), dV = P^T dO,
    dQ = scale dS K, dK = scale dS^T Q (FlashAttention, arXiv 2205.14135, appendix B.4).
    """
    _, heads, lq, _ = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    nq, nk = -(-lq // block_q), -(-lk // block_k)
    wide, device = torch.promote_types(query.dtype, torch.float32), query.device
    q = _blocks(query, nq, block_q, query_lengths, wide).to(device)
    k = _blocks(key, nk, block_k, key_lengths, wide).to(device)
    v = _blocks(value, nk, block_k, key_lengths, wide).to(device)
    do = _blocks(grad_out, nq, block_q, query_lengths, wide).to(device)
    o = _blocks(out, nq, block_q, query_lengths, wide).to(device)
    statistics = torch.nn.functional.pad(lse.to(wide), (0, nq * block_q - lq), value=-torch.inf).reshape(-1, block_q)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (do * o).sum(-1, keepdim=True)

    counts = (row_ptr[..., 1:] - row_ptr[..., :-1]).flatten().long()
    row_of_entry = torch.repeat_interleave(counts)
    arange_q, arange_k = torch.arange(block_q, device=device), torch.arange(block_k, device=device)
    size = max(1, CHUNK_SCORES // (block_q * block_k))
    for begin in range(0, col.numel(), size):
        rows, columns = row_of_entry[begin:begin + size], col[begin:begin + size].long()
        item = rows // (heads * nq)
        kv = (item * kv_heads + (rows // nq % heads) // (heads // kv_heads)) * nk + columns
        scores = torch.bmm(q[rows], k[kv].transpose(1, 2)) * scale
        keys = columns[:, None] * block_k + arange_k
        at = (rows % nq)[:, None] * block_q + arange_q
        bound = (key_lengths[item] - 1)[:, None].expand_as(at)
        if causal:
            bound = torch.minimum(bound, at + (key_lengths - query_lengths)[item][:, None])
        row_lse = statistics[rows]
        hidden = (keys[:, None] > bound[..., None]) | torch.isneginf(row_lse)[..., None]
        p = torch.where(hidden, 0.0, (scores - row_lse.nan_to_num(neginf=0.0)[..., None]).exp())
        dp = torch.bmm(do[rows], v[kv].transpose(1, 2))
        ds = p * (dp - delta[rows]) * scale
        dv.index_add_(0, kv, torch.bmm(p.transpose(1, 2), do[rows]))
        dk.index_add_(0, kv, torch.bmm(ds.transpose(1, 2), q[rows]))
        dq.index_add_(0, rows, torch.bmm(ds, k[kv]))

    return _unblock(dq, query), _unblock(dk, key), _unblock(dv, value)


def columns_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                     column_ptr: Tensor, column: Tensor, scale: float, block_q: int, query_lengths: Tensor,
                     key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the single key columns of causal attention add to (dQ, dK, dV), in the dtypes of the inputs.

    As :func:`block_sparse_attention_backward`; ``out`` and ``lse`` are those of the whole attention. Rows with about
    equally many columns are computed together.
    """
    _, heads, lq, _ = query.shape
    kv_heads, lk = key.shape[1], key.shape[2]
    nq = -(-lq // block_q)
    wide, device = torch.promote_types(query.dtype, torch.float32), query.device
    q, do, o = (_blocks(x, nq, block_q, query_lengths, wide).to(device) for x in (query, grad_out, out))
    k, v = (_blocks(x, lk, 1, key_lengths, wide).to(device)[:, 0] for x in (key, value))
    statistics = torch.nn.functional.pad(lse.to(wide), (0, nq * block_q - lq), value=-torch.inf).reshape(-1, block_q)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (do * o).sum(-1, keepdim=True)
    starts, counts = column_ptr[..., :-1].reshape(-1).long(), (column_ptr[..., 1:] - column_ptr[..., :-1]).reshape(-1)
    order = torch.argsort(counts, descending=True, stable=True)
    sizes = counts[order].tolist()
    begin = 0
    while begin < len(sizes) and sizes[begin]:
        n = sizes[begin]
        rows = order[begin:begin + max(1, CHUNK_SCORES // (block_q * n))]
        begin += len(rows)
        entry = torch.arange(n, device=device)
        inside = entry < counts[rows, None]
        keys = column[(starts[rows, None] + entry).clamp(max=column.numel() - 1)].long()
        item = rows // (heads * nq)
        kv = ((item * kv_heads + rows // nq % heads // (heads // kv_heads)) * lk)[:, None] + keys
        position = (rows % nq * block_q + (key_lengths - query_lengths)[item])[:, None] + \
            torch.arange(block_q, device=device)
        bound = torch.minimum(position, (key_lengths[item] - 1)[:, None])
        row_lse = statistics[rows]
        hidden = (keys[:, None] > bound[..., None]) | ~inside[:, None] | torch.isneginf(row_lse)[..., None]
        scores = torch.bmm(q[rows], k[kv].transpose(1, 2)) * scale
        p = torch.where(hidden, 0.0, (scores - row_lse.nan_to_num(neginf=0.0)[..., None]).exp())
        ds = p * (torch.bmm(do[rows], v[kv].transpose(1, 2)) - delta[rows]) * scale
        dv.index_add_(0, kv.flatten(), torch.bmm(p.transpose(1, 2), do[rows]).flatten(0, 1))
        dk.index_add_(0, kv.flatten(), torch.bmm(ds.transpose(1, 2), q[rows]).flatten(0, 1))
        dq.index_add_(0, rows, torch.bmm(ds, k[kv]))
    return _unblock(dq, query), _unblock(dk, key), _unblock(dv, value)


def _unblock(x: Tensor, like: Tensor) -> Tensor:
    return x.view(like.shape[0], like.shape[1], -1, like.shape[3])[:, :, :like.shape[2]].to(like.dtype).contiguous()
