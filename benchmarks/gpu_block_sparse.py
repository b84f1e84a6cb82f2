"""Block-sparse attention on a GPU against SDPA (flash and cuDNN back ends) and FlexAttention with the same blocks.

Paired and interleaved in one process, medians of CUDA-event times. The ideal ratio is 1/density.

    python benchmarks/gpu_block_sparse.py [--tokens 32768 131072] [--out benchmarks/results/NAME.json]

Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from looseleaf_kernels import BlockIndex, block_sparse_attention


def random_blocks(tokens: int, block: int, heads: int, density: float, seed: int) -> tuple[BlockIndex, float]:
    """A causal index on the GPU with the diagonal, block 0 and random blocks; its density among all causal blocks."""
    g = torch.Generator("cuda").manual_seed(seed)
    n = tokens // block
    causal = torch.ones(n, n, dtype=torch.bool, device="cuda").tril()
    mask = torch.rand(1, heads, n, n, generator=g, device="cuda") < density
    mask = (mask | torch.eye(n, dtype=torch.bool, device="cuda")) & causal
    mask[..., 0] = True
    index = BlockIndex.from_mask(mask, block_q=block, block_k=block, q_len=tokens, k_len=tokens, causal=True)
    return index, float(mask.sum() / (heads * causal.sum()))


def milliseconds(function: Callable[[], object]) -> float:
    """Time of one call on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Name -> milliseconds of each round; every other round runs them in the reverse order."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        order = list(functions.items())
        for name, function in order if turn % 2 == 0 else reversed(order):
            times[name].append(milliseconds(function))
    return times


def facts() -> dict[str, object]:
    """GPU, driver and versions."""
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout.strip()
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
            "triton": metadata.version("triton"), "dtype": "bfloat16"}


def alternatives(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 index: BlockIndex) -> dict[str, Callable[[], object]]:
    """Name -> call, of all that can run here; what cannot is named on standard output."""
    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    from torch.nn.attention.flex_attention import flex_attention

    # A second size would be compiled with sizes as variables, which is slower: each is compiled by itself.
    torch.compiler.reset()
    compiled, blocks = torch.compile(flex_attention, dynamic=False), index.to_flex()
    tiles = {"BLOCK_M": index.block_q, "BLOCK_N": index.block_k} if index.block_q < 128 else None
    wanted: dict[str, Callable[[], object]] = {
        "flash SDPA": sdpa(SDPBackend.FLASH_ATTENTION), "cuDNN SDPA": sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlexAttention": lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True,
                                          kernel_options=tiles),  # type: ignore[arg-type]
        "looseleaf": lambda: block_sparse_attention(q, k, v, index)}
    ready = {}
    for name, function in wanted.items():
        try:
            function()
            torch.cuda.synchronize()
            ready[name] = function
        except Exception as error:  # a back end that this device or version lacks
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
    return ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.10, 0.25, 0.50])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="query and key heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible: nothing to measure")
        return
    rows = []
    for tokens in options.tokens:
        g = torch.Generator("cuda").manual_seed(0)
        q, k, v = (torch.randn(1, h, tokens, options.head_dim, generator=g, device="cuda", dtype=torch.bfloat16)
                   for h in (options.heads[0], options.heads[1], options.heads[1]))
        for block in options.block:
            for density in options.density:
                index, exact = random_blocks(tokens, block, options.heads[0], density, 1)
                times = interleaved(alternatives(q, k, v, index), options.rounds)
                row: dict[str, object] = {"tokens": tokens, "block": block, "density": round(exact, 4)}
                row |= {f"{name}, ms": round(statistics.median(t), 3) for name, t in times.items()}
                for name in times:
                    if name != "looseleaf":
                        ratio = statistics.median(a / b for a, b in zip(times[name], times["looseleaf"], strict=True))
                        row[f"{name} / looseleaf"] = round(ratio, 3)
                        if name == "flash SDPA":
                            row["fraction of ideal"] = round(ratio * exact, 3)
                rows.append(row)
                print(row, flush=True)
    if options.out:
        about = facts() | {"heads": options.heads, "head_dim": options.head_dim, "rounds": options.rounds}
        Path(options.out).write_text(json.dumps({"facts": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
