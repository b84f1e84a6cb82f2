"""Whole attention of every backend, estimation included, against dense SDPA.

Inputs: `smollm2`, what layers 5, 15 and 25 of SmolLM2-135M are given on real text (beyond 8192 tokens the same again);
`random`, what the second layer of a model with random weights and the shapes of Llama-3.1-8B is given, whose attention
is close to uniform; `planted`, heads with known patterns, of the same shapes. Methods for denoising are bidirectional
and take the same tensors; their densities are fixed, so that their time does not depend on what is in them.

    python benchmarks/attention_backends.py --device cpu --inputs smollm2 --tokens 8192 16384
    python benchmarks/attention_backends.py --device cuda --inputs random planted --tokens 32768 65536 131072
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import looseleaf
from looseleaf import AttentionBackend, AttentionCall
from looseleaf_flexprefill import FlexPrefill
from looseleaf_lab.attention import KeepAttention, calibrate
from looseleaf_minference import MInference
from looseleaf_minference.search import KNOWN_HEADS
from looseleaf_paroattention import PAROAttention
from looseleaf_paroattention.plan import LayerPlan, Plan
from looseleaf_sparsed import SparseD

SMOLLM2_LAYERS = (5, 15, 25)
SMOLLM2_TOKENS = 8192
GRIDS = {2048: (8, 16, 16), 4096: (16, 16, 16), 8192: (8, 32, 32), 16384: (16, 32, 32),
         32768: (32, 32, 32), 65536: (16, 64, 64), 131072: (32, 64, 64)}
"""Frames, height and width of the video of so many tokens."""


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Time of one call, with the work on the device finished."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


Inputs = tuple[Tensor, Tensor, Tensor, float]
"""Queries, keys, values and scale."""
Setting = tuple[str, Inputs, dict[str, AttentionBackend]]
"""Name, inputs, and backends that belong to them alone."""


def smollm2(tokens: int, options: argparse.Namespace) -> Iterator[Setting]:
    """Real layers, and MInference calibrated on another text."""
    from looseleaf_lab import data, models

    model, tokenizer = models.load("smollm2", device=options.device)
    calibrated = MInference()
    calibrate(calibrated, model, tokenizer)
    ids = data.prose_ids(tokenizer, min(tokens, SMOLLM2_TOKENS)).to(options.device)
    taken = KeepAttention(layers=SMOLLM2_LAYERS)
    with looseleaf.attach(model, taken):
        model.base_model(input_ids=ids, use_cache=False)
    for layer, found in taken.found.items():
        q, k, v = (x.repeat(1, 1, tokens // x.shape[2], 1).to(options.dtype) for x in found)
        yield f"SmolLM2, layer {layer}", (q, k, v, q.shape[-1] ** -0.5), {"MInference, calibrated": calibrated}


def random(tokens: int, options: argparse.Namespace) -> Iterator[Setting]:
    """The second layer of a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, kv_heads = options.heads
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=heads * options.width, intermediate_size=14336,
                         num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         head_dim=options.width, max_position_embeddings=tokens,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(options.dtype).eval()
    ids = torch.randint(0, 4096, (1, tokens), device=options.device)
    taken = KeepAttention(layers=(1,))
    with torch.inference_mode(), looseleaf.attach(model, taken):
        model.base_model(input_ids=ids, use_cache=False)
    yield "random weights", (*taken.found[1], options.width ** -0.5), {}


def planted(tokens: int, options: argparse.Namespace) -> Iterator[Setting]:
    """Heads that look at sinks and nearby tokens, at single tokens and a diagonal, or at blocks, in turns."""
    heads, kv_heads = options.heads
    makers = list(KNOWN_HEADS.values())
    queries, keys = [], []
    for n in range(kv_heads):
        query, key = (F.pad(x, (0, options.width - x.shape[1])) for x in makers[n % len(makers)](tokens, n))
        keys.append(key)
        g = torch.Generator().manual_seed(1000 + n)
        queries += [query + 0.1 * torch.randn(query.shape, generator=g) for _ in range(heads // kv_heads)]
    value = torch.randn(1, kv_heads, tokens, options.width, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.to(options.device, options.dtype)
               for x in (torch.stack(queries)[None], torch.stack(keys)[None], value))
    yield "planted patterns", (q, k, v, 1.0), {}


def sdpa(call: AttentionCall, backend: SDPBackend) -> Callable[[], object]:
    """torch's dense attention by one of its implementations."""
    def run() -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=call.is_causal,
                                                  scale=call.scale, enable_gqa=True)

    return run


def uniform(name: str, first: int, second: int, heads: int, layers: int) -> MInference:
    """MInference with one pattern for all heads."""
    return MInference(config=[{str(h): [name, first, second, 0.0] for h in range(heads)} for _ in range(layers)])


def causal_backends(call: AttentionCall, own: dict[str, AttentionBackend]
                    ) -> Iterator[tuple[str, AttentionBackend, Callable[[], object]]]:
    """Name, backend and its estimation alone."""
    heads = call.shape[1]
    for title, learnt in own.items():
        assert isinstance(learnt, MInference)
        yield title, learnt, partial(learnt.select, call, learnt.patterns(call, call.layer))
    flex = FlexPrefill(gamma=0.95)
    yield "FlexPrefill, gamma 0.95", flex, partial(flex.select, call)
    for title, pattern in (("A-shape (128, 4096)", ("a_shape", 128, 4096)),
                           ("vertical-slash (1000, 4096)", ("vertical_slash", 1000, 4096)),
                           ("vertical-slash (500, 700)", ("vertical_slash", 500, 700)),
                           ("block-sparse (100)", ("block_sparse", 100, 0))):
        backend = uniform(*pattern, heads, call.layer + 1)
        yield f"MInference, {title}", backend, partial(backend.select, call, backend.patterns(call, call.layer))


def paro(tokens: int, heads: int, qk_bits: int, pv_bits: int) -> PAROAttention:
    """PAROAttention with random orders and random blocks, 30 % of them."""
    backend = PAROAttention(grid=GRIDS[tokens], qk_bits=qk_bits, pv_bits=pv_bits, density=0.3)
    blocks = tokens // backend.block
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(1, heads, blocks, blocks, generator=g) < backend.density
    masks |= torch.eye(blocks, dtype=torch.bool)
    names = tuple(("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")[h * 6 // heads] for h in range(heads))
    backend.plan = Plan(backend.settings(), {1: LayerPlan(names, masks)})
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", default=["random", "planted"], choices=["smollm2", "random", "planted"])
    parser.add_argument("--bits", nargs="+", default=["16/16", "8/16", "8/8", "8/4"], help="of QK and PV")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="query and key heads")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out")
    options = parser.parse_args()
    options.dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible: nothing to measure")
        return
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        for tokens in options.tokens:
            for make in options.inputs:
                for setting, (q, k, v, scale), own in globals()[make](tokens, options):
                    call = AttentionCall(q, k, v, scale, True, layer=int(setting.split()[-1]) if own else 1)
                    for name, backend, estimate in causal_backends(call, own):
                        rows.append(measure(setting, name, call, backend, estimate, options))
            call = AttentionCall(q, k, v, scale, False, phase="bidirectional", layer=1, step=5, steps=10)
            sparse = SparseD()
            rows.append(measure("bidirectional", "SparseD, select 0.3", call, sparse, partial(sparse.pattern, call),
                                options))
            for bits in options.bits:
                qk_bits, pv_bits = map(int, bits.split("/"))
                rows.append(measure("bidirectional", f"PAROAttention, density 0.3, {bits} bits", call,
                                    paro(tokens, call.shape[1], qk_bits, pv_bits), None, options))
    if options.out:
        Path(options.out).write_text(json.dumps({"facts": facts(options, call), "rows": rows}, indent=1) + "\n")


def measure(setting: str, name: str, call: AttentionCall, backend: AttentionBackend,
            estimate: Callable[[], object] | None, options: argparse.Namespace) -> dict[str, object]:
    """One row: medians and paired ratios of what takes turns."""
    said: dict[str, object] = {}
    call.record = said.update
    row: dict[str, object] = {"setting": setting, "tokens": call.shape[3], "backend": name}
    wanted: dict[str, Callable[[], object]] = {
        "flash": sdpa(call, SDPBackend.FLASH_ATTENTION), "total": lambda: backend.attend(call)}
    if options.device == "cuda":
        wanted["cuDNN"] = sdpa(call, SDPBackend.CUDNN_ATTENTION)
    if estimate is not None:
        wanted["estimation"] = estimate
    ready = {}
    for part, function in wanted.items():
        try:
            for _ in range(2):  # SparseD finds its pattern at the first call of a run, and uses it at the second
                milliseconds(function, options.device)
            ready[part] = function
        except Exception as error:  # one part that cannot run must not cost the others their figures
            row[part] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    times: dict[str, list[float]] = {part: [] for part in ready}
    for turn in range(options.rounds):
        order = list(ready.items())
        for part, function in order if turn % 2 == 0 else reversed(order):
            times[part].append(milliseconds(function, options.device))
    density = said.get("density")
    row["density"] = round(float(density), 4) if density is not None else said.get("fallback")  # type: ignore[arg-type]
    row |= {f"{part}, ms": round(statistics.median(t), 3) for part, t in times.items()}
    if "total" in times:
        for rival in ("flash", "cuDNN"):
            if rival in times:
                ratios = [a / b for a, b in zip(times[rival], times["total"], strict=True)]
                row[f"{rival} / total"] = round(statistics.median(ratios), 3)
    if "estimation" in times and "flash" in times:
        row["estimation / flash"] = round(statistics.median(times["estimation"]) / statistics.median(times["flash"]), 4)
    print(row, flush=True)
    return row


def facts(options: argparse.Namespace, call: AttentionCall) -> dict[str, object]:
    """What the figures depend on."""
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout.strip() if options.device == "cuda" else ""
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {"device": name, "driver": driver, "torch": torch.__version__, "triton": metadata.version("triton"),
            "dtype": str(options.dtype), "heads": call.shape[1:3], "head_dim": call.shape[5], "rounds": options.rounds}


if __name__ == "__main__":
    main()
