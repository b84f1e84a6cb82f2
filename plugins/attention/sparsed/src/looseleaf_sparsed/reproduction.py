"""SparseD's claims on a small masked diffusion model trained here, and its speed on the CPU."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Claim, Paper, Report, Series, attach
from looseleaf_kernels import block_importance
from looseleaf_sparsed.backend import SparseD
from looseleaf_sparsed.patterns import blocks_kept

PROMPT, LENGTH, STEPS, BLOCK = 192, 192, 32, 16
SKIP, SELECT = 0.2, 0.3
EACH = 4
"""Texts for each seed."""
SELECTIONS = (0.1, 0.5, 0.7)
LEARNED, SIMILAR = 0.9, 0.9
SPEED_LENGTHS, SPEED_STEPS, SPEED_HEADS = (512, 1024, 2048, 4096), 20, 4
MEMORY_LENGTH, MEMORY_SHARE = 8192, 0.1
QUICK_TRAINING = 100


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure what the paper claims, on a model of 1.8 million parameters and one CPU core.

    Args:
        seeds: sets of four texts.
        quick: one set, a model trained for a few steps, short lengths timed; what that cannot show is said so.
        progress: show progress bars; None: only on a terminal.
    """
    from looseleaf_lab import data, masked_diffusion

    start = time.perf_counter()
    model, tokenizer = masked_diffusion.small_model(
        progress=progress, **({"steps": QUICK_TRAINING} if quick else {}))
    loaded = time.perf_counter() - start
    count = EACH * (1 if quick else seeds)
    size = PROMPT + LENGTH
    texts = tokenizer.encode(data.prose(count * size, "evaluation"))[:count * size].view(count, size)
    report = Report("SparseD on a small masked diffusion model")
    report.facts = {"model": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, characters, "
                             "trained on Python's documentation", "seconds to train or load": loaded,
                    "texts": count, "prompt": PROMPT, "response": LENGTH, "steps": STEPS, "block": BLOCK,
                    "threads": torch.get_num_threads(), "torch": torch.__version__}
    lab = _Lab(model, tokenizer, texts, quick, progress)
    _learned(report, lab)
    _similarity(report, lab)
    _agreement(report, lab)
    _speed(report, quick)
    _memory(report, quick)
    _elsewhere(report)
    return report


@dataclasses.dataclass
class _Lab:
    """The model and what it is asked.

    Attributes:
        texts: (N, PROMPT + LENGTH) token ids.
    """

    model: Any
    tokenizer: Any
    texts: Tensor
    quick: bool
    progress: bool | None

    def generate(self, backend: AttentionBackend | None, texts: Tensor | None = None) -> tuple[Tensor, float]:
        """(N, L) prompts and responses, and the density over all steps: computed blocks over all blocks.

        Tokens are drawn, and places filled in a drawn order: the likeliest tokens at the surest places are little but
        spaces for a model this small. All methods have the same draws.
        """
        from looseleaf_lab.masked_diffusion import generate

        out, densities = [], []
        for seed, batch in enumerate((self.texts if texts is None else texts).split(EACH)):
            given: dict[str, Any] = {"length": LENGTH, "steps": STEPS, "mask_id": self.tokenizer.mask_id,
                                     "temperature": 1.0, "remasking": "random", "seed": seed,
                                     "progress": self.progress}
            if backend is None:
                out.append(generate(self.model, batch[:, :PROMPT], **given))
                continue
            with attach(self.model, backend, steps=STEPS) as attached:
                out.append(generate(self.model, batch[:, :PROMPT], attached=attached, **given))
                densities += [r["density"] for r in attached.records]
        return torch.cat(out), sum(densities) / len(densities) if densities else 1.0

    def nll(self, ids: Tensor) -> Tensor:
        """(N,) nats a token of the responses, by the model with exact attention."""
        from looseleaf_lab.masked_diffusion import nll

        return torch.cat([nll(self.model, batch, mask_id=self.tokenizer.mask_id, prompt_tokens=PROMPT)
                          for batch in ids.split(EACH)])


def _learned(report: Report, lab: _Lab) -> None:
    from looseleaf_lab.masked_diffusion import unigram_entropy
    from looseleaf.statistics import bootstrap

    entropy = unigram_entropy(lab.texts, lab.tokenizer.vocabulary)
    loss = bootstrap(lab.nll(lab.texts).tolist())
    report.claims.append(Claim.decide(
        None if lab.quick else loss[2] < LEARNED * entropy, statement="The model has learned from its context",
        source="this project's rule", paper="-",
        measured=f"{loss[0]:.3f} ({loss[1]:.3f} to {loss[2]:.3f}) nats a character on {len(lab.texts)} texts it has "
                 f"not seen; without context {entropy:.3f}",
        rule=f"bound of the negative log-likelihood, with its 95 % interval, below {LEARNED} of the unigram entropy"))


def _similarity(report: Report, lab: _Lab) -> None:
    """Block importance of every head in every step of a run with exact attention."""
    from looseleaf.statistics import bootstrap

    first = SparseD(skip=SKIP).full_steps(STEPS)
    same: list[Tensor] = []
    between: list[Tensor] = []
    for text in lab.texts[::1 if lab.quick else 2]:
        watch = _Importance()
        lab.generate(watch, text[None])
        # (steps, layers, heads, blocks of queries x blocks of keys), of length one
        seen = torch.stack([torch.stack([watch.seen[layer, step] for layer in range(watch.layers)])
                            for step in range(STEPS)]).flatten(3)
        seen = F.normalize(seen, dim=-1)
        same.append((seen * seen[first]).sum(-1).mean((1, 2)))
        products = seen @ seen.transpose(-1, -2)
        heads = products.shape[-1]
        between.append((products.sum((2, 3)) - heads).mean(1) / (heads * (heads - 1)))
    own, others = torch.stack(same), torch.stack(between)  # (texts, steps)
    later = bootstrap(own[:, first + 1:].mean(1).tolist())
    other = bootstrap(others[:, first].tolist())
    gap = bootstrap((own[:, first + 1:].mean(1) - others[:, first]).tolist())
    steps = [float(t) for t in range(STEPS)]
    report.figure("Similarity of block importance over steps", x_label="denoising step", y_label="cosine", series=[
        Series("a head with itself at the pattern's step", steps, own.mean(0).tolist()),
        Series("two heads of a layer", steps, others.mean(0).tolist())],
        note=f"exact attention, means over heads, layers and {len(own)} texts; the pattern's step is {first}")
    report.claims.append(Claim.decide(
        None if lab.quick else later[0] >= SIMILAR,
        statement="What is important to a head hardly changes over the steps", source="abstract; figures of patterns",
        paper="high, as pictures",
        measured=f"cosine {later[0]:.3f} ({later[1]:.3f} to {later[2]:.3f}) between step {first} and the later ones, "
                 f"{len(own)} texts; step 0 with step {first}: {float(own[:, 0].mean()):.3f}",
        rule=f"mean over heads and later steps at least {SIMILAR}"))
    report.claims.append(Claim.decide(
        None if lab.quick else gap[1] > 0, statement="Patterns differ between heads more than over steps",
        source="abstract; figures of patterns", paper="as pictures",
        measured=f"cosine {other[0]:.3f} ({other[1]:.3f} to {other[2]:.3f}) between heads of a layer, lower by "
                 f"{gap[0]:.3f} ({gap[1]:.3f} to {gap[2]:.3f})",
        rule="paired difference above 0 with its 95 % interval, over texts"))


def _agreement(report: Report, lab: _Lab) -> None:
    """What is generated against what exact attention generates, by SparseD and by its rivals."""
    from looseleaf.statistics import bootstrap

    exact, _ = lab.generate(None)
    exact_nll = lab.nll(exact)
    table = report.table("Responses against those of exact attention", [
        "method", "density of the pattern", "density over the run", "agreement", "low", "high", "nats a token",
        "difference"], note=f"{len(exact)} texts; agreement: share of equal tokens; intervals: 95 % bootstrap over "
                            "texts; difference: mean absolute difference of nats a token to exact attention's response")
    table.add("exact", 1.0, 1.0, 1.0, 1.0, 1.0, float(exact_nll.mean()), 0.0)

    def measure(name: str, backend: AttentionBackend, pattern: float) -> _Measured:
        ids, density = lab.generate(backend)
        agreement = (ids == exact)[:, PROMPT:].double().mean(1)
        nats = lab.nll(ids)
        gap = (nats - exact_nll).abs()
        table.add(name, pattern, density, *bootstrap(agreement.tolist()), float(nats.mean()), float(gap.mean()))
        return _Measured(density, agreement, gap)

    from looseleaf_lab.window import BlockWindow

    blocks = PROMPT // BLOCK, LENGTH // BLOCK
    whole = sum(blocks)
    kept = sum(blocks_kept(n, SELECT) for n in blocks)
    full = SparseD(skip=SKIP).full_steps(STEPS)
    over_run = (full + 1 + (STEPS - full - 1) * kept / whole) / STEPS
    given: dict[str, Any] = {"block_size": BLOCK, "prompt_tokens": PROMPT, "min_length": 1}
    ours = measure("SparseD", SparseD(skip=SKIP, select=SELECT, **given), kept / whole)
    select, dense_enough = _no_sparser(lambda s: sum(blocks_kept(n, s) for n in blocks) / whole,
                                       (over_run * STEPS - 1) / (STEPS - 1))
    window = math.ceil(round(over_run * whole, 9))
    rivals = (
        ("skip 0, the same pattern density", SparseD(skip=0.0, select=SELECT, **given), kept / whole),
        ("skip 0, the same density over the run", SparseD(skip=0.0, select=select, **given), dense_enough),
        ("window, the same pattern density and skip", BlockWindow(kept / whole, BLOCK, full + 1), kept / whole),
        ("window, the same density over the run", BlockWindow(window / whole, BLOCK), window / whole))
    for name, backend, pattern in rivals:
        _better(report, lab, name, ours, measure(name, backend, pattern))
    points = [(kept / whole, ours)]
    if not lab.quick:
        for s in SELECTIONS:
            pattern = sum(blocks_kept(n, s) for n in blocks) / whole
            points.append((pattern, measure(f"SparseD, select {s}", SparseD(skip=SKIP, select=s, **given), pattern)))
    points.sort(key=lambda point: point[0])
    report.figure("Agreement with exact attention", x_label="density of the pattern", y_label="share of equal tokens",
                  series=[Series("SparseD, skip 0.2", [d for d, _ in points],
                                 [float(m.agreement.mean()) for _, m in points])])
    report.examples.append(("exact attention", lab.tokenizer.decode(exact[0])))


@dataclasses.dataclass
class _Measured:
    """Density over the run; agreement and absolute difference of nats a token of each text, (N,)."""

    density: float
    agreement: Tensor
    difference: Tensor


def _better(report: Report, lab: _Lab, name: str, ours: _Measured, rival: _Measured) -> None:
    from looseleaf.statistics import bootstrap

    gain = bootstrap((ours.agreement - rival.agreement).tolist())
    closer = bootstrap((rival.difference - ours.difference).tolist())
    report.claims.append(Claim.decide(
        None if lab.quick else gain[1] > 0 and closer[0] >= 0,
        statement=f"Responses agree with exact attention's better than by: {name}",
        source="paper, ablations; here: a small model", paper="better, on tasks",
        measured=f"{float(ours.agreement.mean()):.3f} against {float(rival.agreement.mean()):.3f} of the tokens, "
                 f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f}); nats a token nearer by {closer[0]:+.3f} "
                 f"({closer[1]:+.3f} to {closer[2]:+.3f}); density over the run {ours.density:.3f} against "
                 f"{rival.density:.3f}; {len(lab.texts)} texts",
        rule="paired difference of agreement above 0 with its 95 % interval, and nats a token no further from exact"))


def _no_sparser(density: Callable[[float], float], wanted: float) -> tuple[float, float]:
    """The smallest ``select`` whose pattern is no sparser than wanted, and its density."""
    for hundredths in range(1, 101):
        reached = density(hundredths / 100)
        if reached >= wanted:
            break
    return hundredths / 100, reached


def _speed(report: Report, quick: bool) -> None:
    """Seconds of the attention of one layer over a whole run."""
    from looseleaf_lab.timing import interleave

    lengths = SPEED_LENGTHS[:2] if quick else SPEED_LENGTHS
    table = report.table(f"Seconds of one layer's attention over a run of {SPEED_STEPS} steps", [
        "tokens", "SDPA", "SparseD", "ratio", "low", "high"],
        note=f"{SPEED_HEADS} heads of 64, float32; finding the pattern included; ratio: SDPA over SparseD, medians of "
             "interleaved rounds; defaults but for min_length")
    plugin = SparseD(min_length=1)
    for length in lengths:
        g = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(1, SPEED_HEADS, length, 64, generator=g) for _ in range(3))

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            for _ in range(SPEED_STEPS):
                F.scaled_dot_product_attention(q, k, v)

        def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            state = SimpleNamespace()
            for step in range(SPEED_STEPS):
                plugin.attend(AttentionCall(q, k, v, q.shape[-1] ** -0.5, is_causal=False, phase="encode", step=step,
                                            steps=SPEED_STEPS, state=state))

        with torch.inference_mode():
            timing = interleave({"dense": dense, "sparse": sparse}, rounds=3 if quick or length > 2048 else 5)
        table.add(length, timing.median("dense"), timing.median("sparse"), *timing.ratio("sparse", "dense"))
    ratios = [float(row[3] or 0) for row in table.rows]
    faster = [n for i, n in enumerate(lengths) if all(r > 1 for r in ratios[i:])]
    report.claims.append(Claim.decide(
        None if quick else float(table.rows[-1][4] or 0) > 1,
        statement="The attention of a whole denoising run is faster than full attention",
        source="abstract; here: CPU", paper="up to 1.50x end to end at 64k tokens and 1024 steps on a GPU",
        measured="; ".join(f"{row[0]} tokens: {row[3]:.2f}x ({row[4]:.2f} to {row[5]:.2f})" for row in table.rows)
                 + (f"; faster from {faster[0]} tokens on" if faster else "; not faster at the longest"),
        rule=f"ratio above 1 with its 95 % interval at {SPEED_LENGTHS[-1]} tokens"))


def _memory(report: Report, quick: bool) -> None:
    from looseleaf_lab.timing import peak_memory

    length = MEMORY_LENGTH // (4 if quick else 1)
    q, k, v = (torch.randn(1, SPEED_HEADS, length, 64, generator=torch.Generator().manual_seed(s)) for s in range(3))
    call = AttentionCall(q, k, v, 0.125, is_causal=False, phase="encode", step=1, steps=1)
    with torch.inference_mode(), peak_memory() as peak:
        SparseD().pattern(call)
    matrix = SPEED_HEADS * length ** 2 * 4
    report.claims.append(Claim.decide(
        None if quick or not peak.bytes else peak.bytes < MEMORY_SHARE * matrix,
        statement="Finding the pattern never holds the matrix of all probabilities", source="this project's rule",
        paper="-", measured=f"{peak.bytes / 2 ** 20:.0f} MiB at {length} tokens and {SPEED_HEADS} heads; the matrix "
                            f"would be {matrix / 2 ** 20:.0f} MiB",
        rule=f"peak memory below {MEMORY_SHARE:.0%} of the matrix at {MEMORY_LENGTH} tokens"))


def _elsewhere(report: Report) -> None:
    for statement, source, paper, measured, rule in (
            ("Generation of Dream-7B and LLaDA-1.5 is faster than with FlashAttention", "abstract",
             "up to 1.50x at 64k tokens and 1024 steps", "not measured: needs a GPU and an 8B model",
             "ratio above 1 to SDPA's flash kernel at 64k tokens"),
            ("On MMLU, GSM8K, HumanEval and RULER quality is that of full attention", "paper, tables",
             "near lossless", "not measured: needs an 8B model", "averages within one point of full attention")):
        report.claims.append(Claim.decide(None, statement=statement, source=source, paper=paper, measured=measured,
                                          rule=rule))


@dataclasses.dataclass
class _Importance(AttentionBackend):
    """Exact attention that keeps the block importance of every layer and step, (H, Nq, Nk) each, of one text."""

    seen: dict[tuple[int, int], Tensor] = dataclasses.field(default_factory=dict)
    layers: int = 0
    paper: ClassVar[Paper] = SparseD.paper

    def attend(self, call: AttentionCall) -> Tensor:
        importance = block_importance(call.query, call.key, BLOCK, BLOCK, causal=False, scale=call.scale)
        self.seen[call.layer, call.step or 0] = importance[0]
        self.layers = max(self.layers, call.layer + 1)
        call.record(density=1.0)
        return call.dense()
