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

from looseleaf_kernels.block_sparse.cpu import block_sparse_attention, fused, join
from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem, statistics_dtype

SHARED_ROWS = 256
"""Queries that share a gather of columns: more save gathering, fewer leave less to mask."""


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Csr, columns: Csr,
                             problem: Problem) -> tuple[Tensor, Tensor]:
    """As the reference; products in fp32 (fp64 for fp64)."""
    dtype, (query, key, value) = query.dtype, (x.to(statistics_dtype(query)) for x in (query, key, value))
    out, lse = block_sparse_attention(query, key, value, blocks, problem)
    group, block_q = query.shape[1] // key.shape[1], problem.block_q
    step = max(1, SHARED_ROWS // block_q)
    lengths = zip(problem.query_lengths.tolist(), problem.key_lengths.tolist(), strict=True)
    mask, written = query.new_zeros(step * block_q, 0), 0  # zero but for its last columns, as many as were written
    for b, (n, m) in enumerate(lengths):
        for h in range(query.shape[1]):
            keys, member = _members(columns.row_ptr[b, h].long(), columns.col, key.shape[2])
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
                k, v = (x[b, h // group].index_select(0, picked)[None, None] for x in (key, value))
                empty = hidden.all(-1)[None, None] if count == len(mixed) else None
                of_columns = fused(query[b:b + 1, h:h + 1, start:stop], k, v, problem.scale, here[None, None], empty)
                join(out[b, h, start:stop], lse[b, h, start:stop], *(x[0, 0] for x in of_columns))
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
