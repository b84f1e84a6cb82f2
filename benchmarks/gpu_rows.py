"""On a GPU: attention of every query to its own keys, rows gathered and scattered by block, and block score maxima.

Each against the obvious call of PyTorch that computes the same, results compared first. Interleaved, medians of
CUDA-event times, bf16.

    python benchmarks/gpu_rows.py [--rounds N] [--out benchmarks/results/NAME.json]

Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_block_sparse import facts, interleaved
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from looseleaf_kernels import block_score_max, gather_rows, row_sparse_attention, scatter_rows_add

Ways = dict[str, Callable[[], Tensor]]
OURS = "looseleaf"


def drawn(*shape: int) -> Tensor:
    """Normal numbers in bf16."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def row_sparse() -> Iterator[tuple[dict[str, Any], Ways]]:
    """Case and ways: 16 heads of 64, keys at random."""
    for tokens, keep in ((197, 0.25), (1370, 0.25), (1370, 0.05), (4097, 0.05), (4097, 0.01), (16385, 0.01),
                         (16385, 0.002)):
        q, k, v = (drawn(1, 16, tokens, 64) for _ in range(3))
        many = max(1, round(keep * tokens))
        index = torch.rand(1, 16, tokens, tokens, device="cuda", dtype=torch.float16).topk(many).indices.int()
        mask = torch.zeros(1, 16, tokens, tokens, dtype=torch.bool, device="cuda").scatter_(3, index.long(), True)

        def flash(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(q, k, v)

        def masked(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> Tensor:
            return scaled_dot_product_attention(q, k, v, mask)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, index: Tensor = index) -> Tensor:
            return row_sparse_attention(q, k, v, index)[0]

        yield ({"kernel": "row_sparse_attention", "tokens": tokens, "kept": keep},
               {"flash SDPA, dense": flash, "SDPA, masked": masked, OURS: ours})


def rows() -> Iterator[tuple[dict[str, Any], Ways]]:
    """Case and ways: hidden states of 4096, blocks of 64, 40 % of them."""
    for tokens in (8192, 32768):
        x, block = drawn(2, tokens, 4096), 64
        count = tokens // block
        blocks = torch.rand(2, count, device="cuda").topk(round(0.4 * count)).indices.sort().values.int()
        places = (blocks.long()[..., None] * block + torch.arange(block, device="cuda")).flatten(1)
        spread = places[..., None].expand(-1, -1, x.shape[-1])
        taken = x.gather(1, spread)
        yield ({"kernel": "gather_rows", "tokens": tokens, "kept": 0.4},
               {"gather": lambda: x.gather(1, spread),  # noqa: B023 - run before the next case
                "index of rows": lambda: x[torch.arange(2, device="cuda")[:, None], places],  # noqa: B023
                OURS: lambda: gather_rows(x, blocks, block)})  # noqa: B023
        yield ({"kernel": "scatter_rows_add", "tokens": tokens, "kept": 0.4},
               {"scatter_add": lambda: x.scatter_add(1, spread, taken),  # noqa: B023
                "zeros, scatter, sum": lambda: x + torch.zeros_like(x).scatter(1, spread, taken),  # noqa: B023
                OURS: lambda: scatter_rows_add(x, taken, blocks, block)})  # noqa: B023


def score_max() -> Iterator[tuple[dict[str, Any], Ways]]:
    """Case and ways: 32 query and 8 key heads of 128; PyTorch's way writes every score."""
    for tokens in (4096, 16384):
        q, k, block = drawn(1, 32, tokens, 128), drawn(1, 8, tokens, 128), 64
        count = tokens // block

        def plain(q: Tensor = q, k: Tensor = k, count: int = count) -> Tensor:
            total = torch.zeros(q.shape[2], k.shape[2], device="cuda")
            for head in range(q.shape[1]):
                total += (q[0, head] @ k[0, head // 4].T * q.shape[-1] ** -0.5).relu_()
            return total.view(1, count, block, count, block).amax((2, 4))  # noqa: B023

        def ours(q: Tensor = q, k: Tensor = k) -> Tensor:
            return block_score_max(q, k, block, causal=False)  # noqa: B023

        yield {"kernel": "block_score_max", "tokens": tokens, "kept": 1.0}, {"scores head by head": plain, OURS: ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible: nothing to measure")
        return
    torch.manual_seed(0)
    found = []
    for cases in (row_sparse, rows, score_max):
        for case, ways in cases():
            same = [way for name, way in ways.items() if "dense" not in name]
            goal = same[0]().float()
            error = max(float((way().float() - goal).abs().max() / goal.abs().max()) for way in same[1:])
            times = interleaved(ways, options.rounds)
            row = case | {f"{name}, ms": round(statistics.median(t), 4) for name, t in times.items()}
            row |= {f"{name} / {OURS}": round(statistics.median(
                a / b for a, b in zip(times[name], times[OURS], strict=True)), 3) for name in times if name != OURS}
            found.append(row | {"largest relative difference": round(error, 5)})
            print(found[-1], flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(
            {"facts": facts() | {"rounds": options.rounds}, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
