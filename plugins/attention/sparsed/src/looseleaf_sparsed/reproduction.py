"""SparseD's claims on a small masked diffusion model trained in the lab, and its speed on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from statistics import fmean
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf import Attached, AttentionBackend, AttentionCall, Claim, Report, attach
from looseleaf.attention.call import Phase
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_kernels import block_importance
from looseleaf_lab import data, masked_diffusion
from looseleaf_lab.attention import BlockWindow
from looseleaf_lab.study import Results, Study, curve
from looseleaf_lab.timing import interleave, peak_memory
from looseleaf_sparsed.backend import SparseD
from looseleaf_sparsed.patterns import blocks_kept

BLOCK, SKIP, SELECT = 16, 0.2, 0.3
HEADS, HEAD_DIM = 4, 64
ALTERNATIVES = ("skip 0, the same pattern density", "skip 0, the same density over the run",
                "window, the same pattern density and skip", "window, the same density over the run")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Tokens of prompt and response, denoising steps, texts of a seed, of which every so many is looked at for
    similarity, and further values of ``select``; steps of training (None: enough); lengths and steps of the runs that
    are timed; and the length at which memory is measured."""

    prompt: int = 192
    response: int = 192
    steps: int = 32
    texts: int = 4
    every: int = 2
    selections: tuple[float, ...] = (0.1, 0.5, 0.7)
    training: int | None = None
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    timed_steps: int = 20
    rounds: int = 5
    memory_length: int = 8192


def measure(seed: int, scale: Any) -> dict[str, Any]:
    """A few texts: how similar block importance is over steps and heads, and what each method makes of the prompts."""
    model, tokenizer = masked_diffusion.small_model(steps=scale.training, progress=False)
    size, first = scale.prompt + scale.response, seed * scale.texts
    ids = tokenizer.encode(data.prose((first + scale.texts) * size, "evaluation"))
    texts = ids[first * size:(first + scale.texts) * size].view(scale.texts, size)

    def generate(prompts: Tensor, draws: int, attached: Attached | None = None) -> Tensor:
        # Tokens are drawn, and places filled in a drawn order: the likeliest tokens at the surest places are little but
        # spaces for a model this small. All methods have the same draws.
        return masked_diffusion.generate(
            model, prompts[:, :scale.prompt], length=scale.response, steps=scale.steps, mask_id=tokenizer.mask_id,
            temperature=1.0, remasking="random", seed=draws, attached=attached, progress=False)

    def nats(ids: Tensor) -> list[float]:
        """Nats a token of each response, by the model with exact attention."""
        return masked_diffusion.nll(model, ids, mask_id=tokenizer.mask_id, prompt_tokens=scale.prompt).tolist()

    exact = generate(texts, seed)
    out: dict[str, Any] = {"ids": texts.tolist(), "text nats": nats(texts), "own": [], "others": [], "methods": {},
                           "exact nats": nats(exact), "example": tokenizer.decode(exact[0])}
    for text in texts[::scale.every]:
        watch = Importance()
        with attach(model, watch, steps=scale.steps) as attached:
            generate(text[None], 0, attached)
        for name, similar in zip(("own", "others"), watch.similarities(first_sparse(scale)), strict=True):
            out[name].append(similar.tolist())
    for name, (backend, _) in methods(scale).items():
        with attach(model, backend, steps=scale.steps) as attached:
            ids = generate(texts, seed, attached)
            density = fmean(r["density"] for r in attached.records)
        out["methods"][name] = {"density": density, "nats": nats(ids),
                                "agreement": (ids == exact)[:, scale.prompt:].double().mean(1).tolist()}
    return out


def first_sparse(scale: Scale) -> int:
    """The step in which SparseD finds its pattern."""
    return SparseD(skip=SKIP).full_steps(scale.steps)


def methods(scale: Scale) -> dict[str, tuple[AttentionBackend, float]]:
    """SparseD and its alternatives, each with the density of its pattern."""
    blocks = scale.prompt // BLOCK, scale.response // BLOCK
    whole = sum(blocks)

    def sparsed(skip: float, select: float) -> tuple[SparseD, float]:
        pattern = sum(blocks_kept(n, select) for n in blocks) / whole
        return SparseD(skip, select, BLOCK, prompt_tokens=scale.prompt, min_length=1), pattern

    ours, pattern = sparsed(SKIP, SELECT)
    full = ours.full_steps(scale.steps)
    over_run = (full + 1 + (scale.steps - full - 1) * pattern) / scale.steps
    # the smallest ``select`` that is no sparser over the run, whose first step is exact
    denser = next(backend for backend in (sparsed(0.0, hundredths / 100) for hundredths in range(1, 101))
                  if backend[1] >= (over_run * scale.steps - 1) / (scale.steps - 1))
    window = math.ceil(round(over_run * whole, 9)) / whole
    baselines = (sparsed(0.0, SELECT), denser, (BlockWindow(pattern, BLOCK, full + 1), pattern),
                 (BlockWindow(window, BLOCK), window))
    return {"SparseD": (ours, pattern), **dict(zip(ALTERNATIVES, baselines, strict=True)),
            **{f"SparseD, select {select}": sparsed(SKIP, select) for select in scale.selections}}


@dataclasses.dataclass
class Importance(AttentionBackend):
    """Exact attention that keeps the block importance of every layer and step of one text."""

    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps: dict[int, dict[int, Tensor]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, Hq, Lq, D)."""
        importance = block_importance(call.query, call.key, BLOCK, BLOCK, causal=False, scale=call.scale)
        self.steps.setdefault(call.step or 0, {})[call.layer] = F.normalize(importance[0].flatten(1), dim=-1)
        call.record(density=1.0)
        return call.dense()

    def similarities(self, first: int) -> tuple[Tensor, Tensor]:
        """(steps,) cosine of a head with itself in step ``first``, and of two heads of a layer; means."""
        seen = torch.stack([torch.stack([layers[n] for n in sorted(layers)])
                            for _, layers in sorted(self.steps.items())])
        products = seen @ seen.transpose(-1, -2)  # (steps, layers, heads, heads)
        heads = products.shape[-1]
        return (seen * seen[first]).sum(-1).mean((1, 2)), \
            (products.sum((2, 3)) - heads).mean(1) / (heads * (heads - 1))


def once(scale: Any) -> dict[str, Any]:
    """Seconds of the attention of one layer over a whole run, and memory of finding the pattern."""
    began = time.perf_counter()
    model, _ = masked_diffusion.small_model(steps=scale.training, progress=False)
    loaded = time.perf_counter() - began
    plugin, times = SparseD(min_length=1), []

    def exact(q: Tensor, k: Tensor, v: Tensor) -> None:
        for _ in range(scale.timed_steps):
            F.scaled_dot_product_attention(q, k, v)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> None:
        state = SimpleNamespace()
        for step in range(scale.timed_steps):
            plugin.attend(AttentionCall(q, k, v, HEAD_DIM ** -0.5, False, phase="bidirectional", step=step,
                                        steps=scale.timed_steps, state=state))

    for length in scale.lengths:
        g = torch.Generator().manual_seed(length)
        tensors = [torch.randn(1, HEADS, length, HEAD_DIM, generator=g) for _ in range(3)]
        with torch.inference_mode():
            timing = interleave({"exact": functools.partial(exact, *tensors), "sparse": functools.partial(
                sparse, *tensors)}, 3 if length > 2048 else scale.rounds)
        times.append([length, timing.median("exact"), timing.median("sparse"), *timing.ratio("sparse", "exact")])
    q, k, v = (torch.randn(1, HEADS, scale.memory_length, HEAD_DIM, generator=torch.Generator().manual_seed(s))
               for s in range(3))
    with torch.inference_mode(), peak_memory() as peak:
        SparseD().pattern(AttentionCall(q, k, v, HEAD_DIM ** -0.5, False, phase="bidirectional", step=1, steps=1))
    return {"parameters": sum(p.numel() for p in model.parameters()), "loaded": loaded, "times": times,
            "peak": peak.bytes, "matrix": HEADS * scale.memory_length ** 2 * 4}


def _difference(results: Results, name: str) -> list[float]:
    """Absolute difference of nats per token to exact attention's response, of each text."""
    return [abs(a - b) for a, b in zip(results.joined("methods", name, "nats"), results.joined("exact nats"),
                                       strict=True)]


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, scale, once, first = results.claim, results.scale, results.once, first_sparse(results.scale)
    ids = torch.tensor(results.joined("ids"))
    entropy = masked_diffusion.unigram_entropy(ids, masked_diffusion.Characters.vocabulary)
    loss = bootstrap(results.joined("text nats"))
    own, others = torch.tensor(results.joined("own")), torch.tensor(results.joined("others"))  # (texts, steps)
    later, other, gap = (bootstrap(x.tolist()) for x in (
        own[:, first + 1:].mean(1), others[:, first], own[:, first + 1:].mean(1) - others[:, first]))
    yield claim("The model has learned from its context", "this project's rule", "-", "bound of the negative "
                "log-likelihood, with its 95 % interval, below 0.9 of the unigram entropy", loss.high < 0.9 * entropy,
                f"{loss:.3f} nats a character on {len(ids)} texts it has not seen; without context {entropy:.3f}")
    yield claim("What is important to a head hardly changes over the steps", "abstract; figures of patterns",
                "high, as pictures", "mean over heads and later steps at least 0.9", later.value >= 0.9,
                f"cosine {later:.3f} between step {first} and the later ones, {len(own)} texts; step 0 with step "
                f"{first}: {float(own[:, 0].mean()):.3f}")
    yield claim("Patterns differ between heads more than over steps", "abstract; figures of patterns", "as pictures",
                "paired difference above 0 with its 95 % interval, over texts", gap.low > 0,
                f"cosine {other:.3f} between heads of a layer, lower by {gap:.3f}")
    for name in ALTERNATIVES:
        ours, theirs = (results.joined("methods", method, "agreement") for method in ("SparseD", name))
        gain, nearer = paired(ours, theirs), paired(_difference(results, name), _difference(results, "SparseD"))
        density, against = (results.mean("methods", method, "density") for method in ("SparseD", name))
        yield claim(f"Responses agree with exact attention's better than by: {name}",
                    "paper, ablations; here: a small model", "better, on tasks", "paired difference of agreement above "
                    "0 with its 95 % interval, and nats per token no further from exact",
                    gain.low > 0 and nearer.value >= 0,
                    f"{fmean(ours):.3f} against {fmean(theirs):.3f} of the tokens, {gain:+.3f}; nats per token nearer "
                    f"by {nearer:+.3f}; density over the run {density:.3f} against {against:.3f}; {len(ours)} texts")
    ratios = {row[0]: Interval(*row[3:]) for row in once["times"]}
    faster = [n for n in ratios if n > max((m for m, ratio in ratios.items() if ratio.value <= 1), default=0)]
    yield claim("The attention of a whole denoising run is faster than full attention", "abstract; here: CPU",
                "up to 1.50x end to end at 64k tokens and 1024 steps on a GPU",
                f"ratio above 1 with its 95 % interval at {scale.lengths[-1]} tokens",
                ratios[scale.lengths[-1]].low > 1, "; ".join(
                    f"{n} tokens: {r.value:.2f}x ({r.low:.2f} to {r.high:.2f})" for n, r in ratios.items())
                + (f"; faster from {faster[0]} tokens on" if faster else "; not faster at the longest"))
    yield claim("Finding the pattern never holds the matrix of all probabilities", "this project's rule", "-",
                f"peak memory below 10 % of the matrix at {scale.memory_length} tokens",
                once["peak"] < 0.1 * once["matrix"] if once["peak"] else None, f"{once['peak'] / 2 ** 20:.0f} MiB at "
                f"{scale.memory_length} tokens and {HEADS} heads; the matrix would be {once['matrix'] / 2 ** 20:.0f} "
                "MiB")
    yield claim("Generation of Dream-7B and LLaDA-1.5 is faster than with FlashAttention", "abstract",
                "up to 1.50x at 64k tokens and 1024 steps", "ratio above 1 to SDPA's flash kernel at 64k tokens", None,
                "not measured: needs a GPU and an 8B model")
    yield claim("On MMLU, GSM8K, HumanEval and RULER quality is that of full attention", "paper, tables", "near "
                "lossless", "averages within one point of full attention", None, "not measured: needs an 8B model")


def show(report: Report, results: Results) -> None:
    """Similarity over steps, responses against exact attention's, and times."""
    own, others, exact = (results.joined(name) for name in ("own", "others", "exact nats"))
    report.figure("Similarity of block importance over steps", x_label="denoising step", y_label="cosine", series=[
        curve(name, range(results.scale.steps), torch.tensor(values).mean(0).tolist()) for name, values in (
            ("a head with itself at the pattern's step", own), ("two heads of a layer", others))],
        note=f"exact attention, means over heads, layers and {len(own)} texts; the pattern's step is "
             f"{first_sparse(results.scale)}")
    table = report.table("Responses against those of exact attention", [
        "method", "density of the pattern", "density over the run", "agreement", "low", "high", "nats per token",
        "difference"], [["exact", 1.0, 1.0, 1.0, 1.0, 1.0, fmean(exact), 0.0]],
        note=f"{len(exact)} texts; agreement: fraction of equal tokens; intervals: 95 % bootstrap over texts; "
             "difference: mean absolute difference of nats per token to exact attention's response")
    points = []
    for name, (_, pattern) in methods(results.scale).items():
        agreement = bootstrap(results.joined("methods", name, "agreement"))
        table.add(name, pattern, results.mean("methods", name, "density"), *agreement,
                  fmean(results.joined("methods", name, "nats")), fmean(_difference(results, name)))
        if name.startswith("SparseD"):
            points.append((pattern, agreement.value))
    patterns, agreements = zip(*sorted(points), strict=True)
    report.figure("Agreement with exact attention", x_label="density of the pattern",
                  y_label="fraction of equal tokens", series=[curve("SparseD, skip 0.2", patterns, agreements)])
    report.examples.append(("exact attention", results.rows[0]["example"]))
    report.table(f"Seconds of one layer's attention over a run of {results.scale.timed_steps} steps", [
        "tokens", "SDPA", "SparseD", "ratio", "low", "high"], results.once["times"],
        note=f"{HEADS} heads of {HEAD_DIM}, float32; finding the pattern included; ratio: SDPA over SparseD, medians "
             "of interleaved rounds; defaults but for min_length")


study = Study(
    "SparseD on a small masked diffusion model", measure, claims, show=show, once=once, full=Scale(), quick_seeds=1,
    quick=Scale(every=1, selections=(), training=100, lengths=(512, 1024), rounds=3, memory_length=2048),
    facts=lambda results: {
        "model": f"{results.once['parameters'] / 1e6:.1f} million parameters, characters, trained on Python's "
                 "documentation", "seconds to train or load": results.once["loaded"],
        "texts": len(results.joined("ids")), "prompt": results.scale.prompt, "response": results.scale.response,
        "steps": results.scale.steps, "block": BLOCK, "threads": torch.get_num_threads()})
