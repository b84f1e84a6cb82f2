"""Time every kernel under other numbers of warps and stages than those of `looseleaf_kernels.launch`.

    python benchmarks/gpu_tune.py [--tokens 32768] [--out benchmarks/results/NAME.json]

The numbers in launch.py come from tables of this script. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from gpu_block_sparse import milliseconds, random_blocks
from torch import Tensor

from looseleaf_kernels import (
    BlockIndex,
    block_importance,
    block_sparse_attention,
    launch,
    quantized_block_sparse_attention,
    vertical_slash_attention,
)

CHOICES = [(warps, stages) for warps in (4, 8) for stages in (1, 2, 3, 4)]


def columns_of(index: BlockIndex, count: int) -> BlockIndex:
    """Single columns for each query block: ``count`` random keys before it. Overlaps do not matter to the time."""
    heads, rows, tokens = index.heads, index.row_ptr.shape[-1] - 1, index.k_len
    g = torch.Generator("cuda").manual_seed(2)
    keys = torch.rand(heads, tokens, generator=g, device="cuda").argsort(-1)[:, :count].sort(-1).values
    seen = keys[:, None] < torch.arange(1, rows + 1, device="cuda")[:, None] * index.block_q
    counts = seen.sum(-1).flatten().cumsum(0)
    pointers = torch.cat([counts.new_zeros(1), counts]).to(torch.int32)
    at = torch.arange(heads, device="cuda")[:, None] * rows + torch.arange(rows + 1, device="cuda")
    column = keys[:, None].expand(-1, rows, -1)[seen].to(torch.int32)
    return BlockIndex(pointers[at][None].contiguous(), column, index.block_q, 1, index.q_len, tokens, True)


def jobs_of(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name -> the function of launch.py that is asked, and the call."""
    block = index.block_q
    jobs: dict[str, tuple[str, Callable[[], object]]] = {
        "block_sparse": ("attention", partial(block_sparse_attention, q, k, v, index))}
    if q.shape[-1] == 128:
        jobs["vertical_slash"] = ("attention", partial(vertical_slash_attention, q, k, v, index,
                                                       columns_of(index, 1000)))
        for bits in (8, 16):
            jobs[f"quantized 8/{bits}"] = ("quantized_attention", partial(quantized_block_sparse_attention, q, k, v,
                                                                          index, pv_bits=bits))
        jobs["importance"] = ("attention", partial(block_importance, q, k, block, block, causal=False))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible: nothing to measure")
        return
    rows = []
    for head_dim, heads, kv_heads in ((128, 32, 8), (64, 32, 8)):
        g = torch.Generator("cuda").manual_seed(0)
        q, k, v = (torch.randn(1, h, options.tokens, head_dim, generator=g, device="cuda", dtype=torch.bfloat16)
                   for h in (heads, kv_heads, kv_heads))
        for block in (64, 128):
            index, _ = random_blocks(options.tokens, block, heads, options.density, 1)
            jobs = jobs_of(q, k, v, index)
            for name, (setting, run) in jobs.items():
                row: dict[str, object] = {"kernel": name, "head_dim": head_dim, "block": block}
                row["as configured"] = timed(run, options.rounds)
                for warps, stages in CHOICES:
                    chosen = launch.Launch(warps, stages)
                    with mock.patch.object(launch, setting, lambda *_, c=chosen, **__: c):  # type: ignore[misc]
                        row[f"{warps} warps, {stages} stages"] = timed(run, options.rounds)
                rows.append(row)
                print(row, flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(
            {"facts": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": options.tokens,
                       "density": options.density}, "rows": rows}, indent=1) + "\n")


def timed(run: Callable[[], object], rounds: int) -> float | str:
    """Median milliseconds, or why it cannot run."""
    try:
        run()
        return round(statistics.median(milliseconds(run) for _ in range(rounds)), 3)
    except Exception as error:  # out of shared memory or registers
        return f"{type(error).__name__}"


if __name__ == "__main__":
    main()
