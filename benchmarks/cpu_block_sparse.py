"""Block-sparse attention against causal SDPA on the CPU: time ratio and peak memory.

Paired and interleaved in one process, medians. The ideal ratio is 1/density.

    python benchmarks/cpu_block_sparse.py [--tokens 8192 16384] [--rounds 7] [--out benchmarks/results/NAME.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from looseleaf_kernels import BlockIndex, block_sparse_attention

HEADS, HEAD_DIM = 9, 64


def random_blocks(tokens: int, block: int, density: float, seed: int) -> tuple[BlockIndex, float]:
    """A causal index with the diagonal, block 0 and random blocks; its density among all causal blocks."""
    g = torch.Generator().manual_seed(seed)
    n = tokens // block
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.rand(1, HEADS, n, n, generator=g) < density
    mask = (mask | torch.eye(n, dtype=torch.bool)) & causal
    mask[..., 0] = True
    # Bring the fraction of blocks to the density asked for by dropping some of the random ones.
    spare = (mask & ~torch.eye(n, dtype=torch.bool)).flatten().nonzero().flatten()
    extra = int(mask.sum()) - int(density * HEADS * causal.sum())
    if extra > 0:
        mask.view(-1)[spare[torch.randperm(len(spare), generator=g)[:extra]]] = False
    index = BlockIndex.from_mask(mask, block_q=block, block_k=block, q_len=tokens, k_len=tokens, causal=True)
    return index, float(mask.sum() / (HEADS * causal.sum()))


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak(function: object) -> int:
    """Bytes by which resident memory rose at most while ``function`` ran, sampled every millisecond."""
    start, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident() - start)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    function()  # type: ignore[operator]
    done.set()
    thread.join()
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--density", type=float, nargs="+", default=[0.10, 0.25])
    parser.add_argument("--block", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for tokens in options.tokens:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, generator=g) for _ in range(3))
        for block in options.block:
            for density in options.density:
                index, exact = random_blocks(tokens, block, density, 1)

                def dense(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
                    F.scaled_dot_product_attention(q, k, v, is_causal=True)

                def sparse(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v,
                           index: BlockIndex = index) -> None:
                    block_sparse_attention(q, k, v, index)

                sparse()
                memory = peak(sparse)
                times: dict[str, list[float]] = {"dense": [], "sparse": []}
                for _ in range(options.rounds):
                    for name, function in (("dense", dense), ("sparse", sparse)):
                        start = time.perf_counter()
                        function()
                        times[name].append(time.perf_counter() - start)
                ratios = sorted(d / s for d, s in zip(times["dense"], times["sparse"], strict=True))
                row = {"tokens": tokens, "block": block, "density": round(exact, 4),
                       "dense_s": round(statistics.median(times["dense"]), 4),
                       "sparse_s": round(statistics.median(times["sparse"]), 4),
                       "ratio": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3),
                       "highest": round(ratios[-1], 3),
                       "fraction_of_ideal": round(statistics.median(ratios) * exact, 3),
                       "peak_extra_mib": round(memory / 2 ** 20, 1),
                       "square_mib": round(HEADS * tokens ** 2 * 4 / 2 ** 20)}
                rows.append(row)
                print(row, flush=True)
    if options.out:
        facts = {"torch": torch.__version__, "threads": options.threads, "heads": HEADS, "head_dim": HEAD_DIM,
                 "dtype": "float32", "machine": platform.machine(), "rounds": options.rounds}
        Path(options.out).write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
