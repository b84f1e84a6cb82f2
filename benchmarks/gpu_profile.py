"""Where the time of a backend's estimation goes on a GPU: the operations that take longest.

    python benchmarks/gpu_profile.py [--tokens 32768 131072]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from attention_backends import paro, planted, uniform
from torch.profiler import ProfilerActivity, profile

from looseleaf import AttentionCall
from looseleaf_flexprefill import FlexPrefill
from looseleaf_sparsed import SparseD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible: nothing to measure")
        return
    shape = argparse.Namespace(heads=[32, 8], width=128, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        for tokens in options.tokens:
            (_, (q, k, v, scale), _), = planted(tokens, shape)
            call = AttentionCall(q, k, v, scale, True, layer=1)
            both = AttentionCall(q, k, v, scale, False, phase="bidirectional", layer=1, step=5, steps=10)
            columns = uniform("vertical_slash", 500, 700, 32, 2)
            jobs: dict[str, Callable[[], object]] = {
                "FlexPrefill.select": partial(FlexPrefill().select, call),
                "MInference.select": partial(columns.select, call, columns.patterns(call, 1)),
                "MInference.attend": partial(columns.attend, call),
                "SparseD.pattern": partial(SparseD().pattern, both),
                "PAROAttention.attend 16/16": partial(paro(tokens, 32, 16, 16).attend, both),
                "PAROAttention.attend 8/8": partial(paro(tokens, 32, 8, 8).attend, both)}
            for name, run in jobs.items():
                run()
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                    run()
                    torch.cuda.synchronize()
                print(f"\n{name}, {tokens} tokens")
                events = found.key_averages()
                print(f"  device {sum(e.self_device_time_total for e in events) / 1e3:.2f} ms, "
                      f"host {sum(e.self_cpu_time_total for e in events) / 1e3:.2f} ms")
                for event in sorted(events, key=lambda e: -e.self_device_time_total)[:8]:
                    print(f"  {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d} x {event.key[:90]}")


if __name__ == "__main__":
    main()
