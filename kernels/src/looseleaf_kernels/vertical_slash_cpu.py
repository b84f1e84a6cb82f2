"""Attention over blocks and single columns on a few CPU cores.

The blocks go through block-sparse attention. The single columns of a head are nearly the same for neighbouring query
blocks, so that a few query blocks share one gather of them: first the columns that all of their queries attend to, at
the end those that only some do, because the others have them in a block already or lie before them. A mask has to be
written for that end only. Torch's fused attention gives output and log-sum-exp, which join those of the blocks. Memory
beyond inputs and output is that of the keys of a head, and (query blocks x columns) bools.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from looseleaf_kernels import cpu

SHARED_ROWS = 256
"""Queries that share a gather of columns: more save gathering, fewer leave less to mask."""


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, row_ptr: Tensor, col: Tensor,
                             column_ptr: Tensor, column: Tensor, scale: float, block_q: int, block_k: int,
                             query_lengths: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference; products in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    dtype, (query, key, value) = query.dtype, (x.to(wide) for x in (query, key, value))
    out, lse = cpu.block_sparse_attention(query, key, value, row_ptr, col, scale, True, block_q, block_k,
                                          query_lengths, key_lengths)
    group = query.shape[1] // key.shape[1]
    step = max(1, SHARED_ROWS // block_q)
    mask, written = query.new_zeros(step * block_q, 0), 0  # zero but for its last columns, as many as were written
    for b, (n, m) in enumerate(zip(query_lengths.tolist(), key_lengths.tolist(), strict=True)):
        for h in range(query.shape[1]):
            keys, member = _members(column_ptr[b, h].long(), column, key.shape[2])
            if not len(keys):
                continue
            if mask.shape[1] < len(keys):
                mask, written = query.new_zeros(step * block_q, len(keys)), 0
            for start, stop in _spans(member, n, block_q, step):
                rows = member[start // block_q:-(-stop // block_q)]
                every, some = rows.all(0).logical_and_(keys <= start + m - n), rows.any(0)
                mixed = (some & ~every).nonzero()[:, 0]
                picked = torch.cat([keys[every], keys[mixed]])
                if not len(picked):
                    continue
                count, written = len(picked), max(written, len(mixed))
                position = torch.arange(start, stop) + (m - n)
                hidden = (~rows[:, mixed]).repeat_interleave(block_q, 0)[:stop - start]
                hidden = hidden.logical_or_(keys[mixed] > position[:, None])
                here = mask[:stop - start, mask.shape[1] - count:]
                here[:, max(0, count - written):] = 0.0
                here[:, count - len(mixed):].masked_fill_(hidden, -torch.inf)
                other, statistics = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query[b:b + 1, h:h + 1, start:stop], key[b, h // group].index_select(0, picked)[None, None],
                    value[b, h // group].index_select(0, picked)[None, None], 0.0, False, attn_mask=here[None, None],
                    scale=scale)
                other, statistics = other[0, 0], statistics[0, 0].to(lse.dtype)
                if count == len(mixed):
                    empty = hidden.all(-1)
                    other.masked_fill_(empty[:, None], 0.0)
                    statistics.masked_fill_(empty, -torch.inf)
                former = lse[b, h, start:stop]
                share = torch.sigmoid(statistics - former).nan_to_num(0.0)  # NaN: neither part has a key
                out[b, h, start:stop].lerp_(other, share[:, None])
                lse[b, h, start:stop] = torch.logaddexp(former, statistics)
    return out.to(dtype), lse


def _spans(member: Tensor, length: int, block_q: int, step: int) -> Iterator[tuple[int, int]]:
    """Queries that are computed together: ``step`` blocks, or one, where blocks have less than half in common."""
    for start in range(0, length, step * block_q):
        stop = min(length, start + step * block_q)
        rows = member[start // block_q:-(-stop // block_q)]
        if 2 * int(rows.sum()) >= len(rows) * int(rows.any(0).sum()):
            yield start, stop
        else:
            yield from ((at, min(stop, at + block_q)) for at in range(start, stop, block_q))


def _members(pointers: Tensor, column: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The columns of one head, (n,) int64 ascending, and which query blocks have them, (Nq, n) bool."""
    first = int(pointers[0])
    entries = column[first:int(pointers[-1])].long()
    place = torch.zeros(length, dtype=torch.long)
    place[entries] = 1
    keys = place.nonzero()[:, 0]
    place[keys] = torch.arange(len(keys))
    member = torch.zeros(len(pointers) - 1, len(keys), dtype=torch.bool)
    row = torch.repeat_interleave(pointers[1:] - pointers[:-1])
    member.view(-1)[row.mul_(len(keys)).add_(place[entries])] = True
    return keys, member
