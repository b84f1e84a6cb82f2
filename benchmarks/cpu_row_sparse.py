"""Where attention of every query to its own keys pays on a CPU: milliseconds beside dense and masked SDPA.

Random keys, 6 heads of 64, as a small ViT has them. Interleaved, medians of the rounds, one thread unless
OMP_NUM_THREADS says more. usage: python benchmarks/cpu_row_sparse.py [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from looseleaf_kernels import row_sparse_attention

CASES = [(197, 0.25), (197, 0.05), (1370, 0.25), (1370, 0.05), (1370, 0.01), (4097, 0.05), (4097, 0.01)]


def variants(tokens: int, keep: float) -> dict[str, Callable[[], Tensor]]:
    """The three ways to compute the same, dense apart."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, tokens, 64, generator=g) for _ in range(3))
    index = torch.rand(1, 6, tokens, tokens, generator=g).topk(max(1, round(keep * tokens))).indices.int()
    mask = torch.zeros(1, 6, tokens, tokens, dtype=torch.bool).scatter_(3, index.long(), True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return {"dense": lambda: attend(q, k, v), "masked": lambda: attend(q, k, v, mask),
            "row sparse": lambda: row_sparse_attention(q, k, v, index)[0]}


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print("| tokens | keys kept | dense ms | masked ms | row sparse ms | over dense | over masked |")
    print("|---|---|---|---|---|---|---|")
    for tokens, keep in CASES:
        ways = variants(tokens, keep)
        times: dict[str, list[float]] = {name: [] for name in ways}
        torch.testing.assert_close(ways["row sparse"](), ways["masked"](), atol=2e-5, rtol=2e-5)
        for _ in range(rounds):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        dense, masked, sparse = (1e3 * statistics.median(x) for x in times.values())
        print(f"| {tokens} | {keep:.0%} | {dense:.1f} | {masked:.1f} | {sparse:.1f} | {sparse / dense:.1f} | "
              f"{sparse / masked:.1f} |", flush=True)


if __name__ == "__main__":
    main()
