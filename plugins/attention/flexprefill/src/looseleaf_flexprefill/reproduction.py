"""FlexPrefill's claims on SmolLM2-135M and real text: quality at fixed gamma, retrieval, and speed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from looseleaf import Claim, Report, attach
from looseleaf_flexprefill.backend import FlexPrefill
from looseleaf_lab import attention_claims as shared
from looseleaf_lab import data, metrics, models
from looseleaf_lab.study import Results, Study, add_table

LAST, TRIALS, SOLVED = 512, 4, 0.8


@dataclass(frozen=True)
class Scale:
    """Tokens of the windows, of the prompts with a key, and which layers are timed how often at which multiples of the
    longest window."""

    contexts: tuple[int, ...] = (4096, 8192)
    prompts: tuple[int, ...] = (1536, 2048, 3072)
    layers: tuple[int, ...] = (5, 15, 25)
    repeats: tuple[int, ...] = (1, 2)
    rounds: int = 7


def measure(seed: int, scale: Any) -> dict[str, Any]:
    """One window of text of each length, and four pass keys in a prompt of each length."""
    model, tokenizer = models.load("smollm2")
    text = data.prose_ids(tokenizer, max(scale.contexts) * (seed + 1)).flatten()
    quality = {n: shared.perplexity_beside_exact(model, FlexPrefill(), text[n * seed:n * (seed + 1)], LAST)
               for n in scale.contexts}

    def found(context: int) -> float:
        return sum(metrics.passkey(model, tokenizer, context, trials=TRIALS, seed=seed, progress=False).correct)

    exact = {n: found(n) for n in scale.prompts}
    with attach(model, FlexPrefill()):
        keys = {n: [exact[n], found(n)] for n in scale.prompts}
    return {"quality": quality, "keys": keys}


def once(scale: Any) -> dict[str, Any]:
    """Seconds of single layers, estimation included."""
    model, tokenizer = models.load("smollm2")
    kept = shared.kept_activations(model, data.prose_ids(tokenizer, max(scale.contexts)), scale.layers)
    return {"times": shared.layer_times(kept, FlexPrefill(), scale.repeats, scale.rounds)}


def _keys(results: Results) -> dict[int, tuple[float, float]]:
    """Length of the prompt -> how many keys exact attention and FlexPrefill found."""
    return {n: (sum(results.values("keys", n, 0)), sum(results.values("keys", n, 1))) for n in results.scale.prompts}


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, asked = results.claim, TRIALS * len(results.seeds)
    ratios = {n: shared.perplexity_ratio(results, "quality", n) for n in results.scale.contexts}
    densities = {n: results.interval("quality", n, "density") for n in results.scale.contexts}
    first, last = results.scale.contexts[0], results.scale.contexts[-1]
    solved = [pair for pair in _keys(results).values() if pair[0] >= SOLVED * asked]
    lost, keys = sum((exact - sparse for exact, sparse in solved), 0.0), asked * len(solved)
    yield claim("At gamma 0.95 the quality is that of full attention", "paper, section 4; here: perplexity",
                "about equal on RULER [memory]", "perplexity on the last 512 tokens at most 1 % above dense, at 4096 "
                "and 8192 tokens", all(r.value <= 1.01 for r in ratios.values()), "; ".join(
                    f"{n} tokens: ratio {r:.4f}" for n, r in ratios.items()) + f"; {len(results.seeds)} windows")
    yield claim("The pattern is sparse", "this project's rule", "-", "block density below 0.60 at 8192 tokens",
                densities[last].value < 0.6, f"density {densities[last]:.3f} at {last} tokens")
    yield claim("Longer contexts get sparser at fixed gamma", "paper, figure 3", "qualitative",
                "density at 8192 tokens below that at 4096", densities[last].value < densities[first].value,
                "; ".join(f"{n} tokens: {density.value:.3f}" for n, density in densities.items()))
    yield claim("A key hidden in a long prompt is found as by full attention", "paper, section 4 (RULER)",
                "about equal [memory]", "at most one key in 20 fewer than dense, on contexts where dense finds 80 % or "
                "more; 20 keys or more", lost <= keys / 20 if keys >= 20 else None,
                f"{lost:+.0f} keys lost of {keys}" if keys else "the dense model solves no context tried",
                any_scale=True)
    yield claim("Attention is faster than full attention", "paper, figure of latency; here: CPU",
                "about 2.4x at 128k tokens on a GPU, gamma 0.95 [memory]", "median ratio above 1 at 8192 and 16384 "
                "tokens for every layer timed", *shared.faster_everywhere(results))
    yield claim("On a GPU, attention at 128k tokens is faster by gamma 0.95 than full attention",
                "paper, figure of latency", "about 2.4x [memory]", "ratio above 1 to SDPA's flash kernel at 32k to "
                "128k tokens, 32/8 heads, D 128, bf16", None,
                "not measured here: see benchmarks/gpu_block_sparse.py for machines with a GPU")
    yield claim("On RULER from 4k to 128k tokens, quality about equals full attention", "paper, table of RULER results",
                "full 88.7, FlexPrefill 88.6 to 89.1 [memory]", "average within one point of full attention", None,
                "not measured: needs an 8B model and 128k tokens")


def show(report: Report, results: Results) -> None:
    """Perplexity, pass keys and times."""
    shared.show_perplexity(report, results, "FlexPrefill", LAST,
                           {n: ("quality", str(n)) for n in results.scale.contexts},
                           {"query-aware heads": "query_aware_heads"})
    asked = TRIALS * len(results.seeds)
    add_table(report, "Pass keys found", (
        {"context": n, "keys": asked, "dense": exact / asked, "FlexPrefill": sparse / asked}
        for n, (exact, sparse) in _keys(results).items()),
        f"contexts that the dense model solves ({SOLVED:.0%} or more) decide")
    shared.show_times(report, results, "FlexPrefill")


study = Study("FlexPrefill on SmolLM2-135M-Instruct", measure, claims, show=show, once=once, full=Scale(),
              quick=Scale(contexts=(4096,), layers=(15,), repeats=(1,), rounds=3), quick_seeds=1,
              facts=lambda results: {"model": "SmolLM2-135M-Instruct, float32", "gamma": FlexPrefill.gamma,
                                     "windows": len(results.seeds), "threads": torch.get_num_threads()})
