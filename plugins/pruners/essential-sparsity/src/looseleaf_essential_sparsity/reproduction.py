"""The paper's claims at small real scale: a language model, a sentence encoder and small networks trained here."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import Claim, Masks, Report, Series, Unstructured, prunable_parameters
from looseleaf_tickets import find_tickets
from looseleaf.progress import track
from looseleaf.pruning.knee import Curve, Knee, essential_sparsity, relative_drops
from looseleaf_essential_sparsity.pruner import MagnitudePruner
from looseleaf_essential_sparsity.sweep import add_curves, masked_metric, sparsity_curve

CONTEXT = 256


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure each claim of the paper, and each rule of this project.

    Args:
        seeds: networks trained for the comparison with iterative pruning; the sweeps are deterministic, and their
            intervals are bootstraps over evaluation batches.
        quick: minutes instead of thoroughness: fewer levels, less text, fewer networks.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: ``seeds`` below 1.
        ModuleNotFoundError: the extra ``reproduce`` is not installed.
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number, at least 1")
    seeds = min(seeds, 2) if quick else seeds
    report = Report("essential-sparsity: the paper's claims", facts={
        "seeds": seeds, "quick": quick, "torch": torch.__version__, "threads": torch.get_num_threads()})
    language = _language_model(report, quick, progress)
    _encoder(report, language, quick, progress)
    _iterative(report, seeds, quick, progress)
    report.claims.append(Claim.decide(
        None, statement="Self-supervised pre-training gives more emergent sparsity than supervised pre-training",
        source="abstract", paper="figure [abstract]",
        measured="not measured: it needs the same vision transformer trained both ways",
        rule="no rule: nothing is measured here"))
    return report


# ---------------------------------------------------------------------------------------------- language model
def _language_model(report: Report, quick: bool, progress: bool | None) -> Knee:
    from looseleaf_lab import data, metrics, models

    model, tokenizer = models.load("smollm2")
    _cost(report, model, 1 if quick else 5)
    windows = 4 if quick else 12
    text = data.prose(CONTEXT * windows * 8, part="evaluation")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :CONTEXT * windows]
    if ids.shape[1] < CONTEXT * windows:
        raise ValueError(f"the evaluation text has only {ids.shape[1]} tokens")
    report.facts["text"] = (f"{getattr(text, 'source', 'looseleaf_lab.data.prose, evaluation part')}; {windows} "
                            f"windows of {CONTEXT} tokens")
    counted = MagnitudePruner().prune(model).metadata
    report.facts["weights"] = (f"{counted['prunable']:,} of {counted['parameters']:,} parameters are prunable; "
                               "SmolLM2-135M-Instruct, 4-bit weights widened to float32")

    def losses(masked: nn.Module) -> list[float]:
        return metrics.perplexity(masked, ids, CONTEXT, CONTEXT, progress=False).losses

    def hits(masked: nn.Module) -> list[float]:
        with torch.inference_mode():
            return [float((masked(w[None]).logits[0, :-1].argmax(-1) == w[1:]).float().mean())
                    for w in ids[0].split(CONTEXT)]

    coarse = [0.1, 0.3, 0.5, 0.7] if quick else [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7]
    levels = coarse if quick else [x / 100 for x in range(5, 71, 5)]
    curves, points = {}, {}
    for scope in ("global", "layer"):
        curves[scope] = sparsity_curve(
            model, losses, levels if scope == "global" else coarse, pruner=MagnitudePruner(scope=scope),
            name="perplexity", higher_is_better=False, mean="exp-mean", progress=progress)
    for pattern in ("4:8", "2:4", "1:2"):
        points[pattern] = (0.5, masked_metric(model, losses, MagnitudePruner(pattern=pattern)))
    accuracy = sparsity_curve(model, hits, coarse, name="next-token accuracy", progress=progress)
    add_curves(report, curves, points)
    add_curves(report, {"global": accuracy}, {})
    curve = curves["global"]
    knee, by_hits = essential_sparsity(curve), essential_sparsity(accuracy)
    values = dict(zip(curve.levels, curve.values()))
    at = f"{windows} windows of {CONTEXT} tokens, 95% bootstrap over windows"

    falls = _falls(curve)
    report.claims.append(Claim.decide(
        not falls, statement="Perplexity grows with sparsity", source="this project's rule", paper="monotone",
        measured=f"{len(falls)} of {len(curve.levels) - 1} steps fall beyond noise"
                 f"{' (at ' + ', '.join(f'{s:.0%}' for s in falls) + ')' if falls else ''}; {at}",
        rule="no step at which the paired 95% interval of the loss difference lies below 0"))
    accurate = by_hits.within[0.01]
    report.claims.append(Claim.decide(
        None if accurate.value is None or accurate.low is None else accurate.low >= 0.30,
        statement="30 to 50% of the weights can be removed in one shot for about 1% of performance",
        source="abstract and section 4", paper="about 30-50% with about 1% drop [paper, as remembered]",
        measured=f"next-token accuracy: s*(1%) = {accurate}, s*(5%) = {by_hits.within[0.05]}, knee {by_hits.knee}; "
                 f"perplexity: s*(1%) = {knee.within[0.01]}, s*(5%) = {knee.within[0.05]}, knee {knee.knee}; "
                 f"levels at most {knee.step:.0%} apart for perplexity, {by_hits.step:.0%} for accuracy; {at}",
        rule="lower end of s*(1%) of next-token accuracy >= 30%; the paper tunes on a task, here nothing is tuned"))
    ratio = relative_drops(curve)[curve.levels.index(0.1)]
    low, high = _ratio_interval(curve, curve.levels.index(0.1))
    report.claims.append(Claim.decide(
        ratio <= 0.02, statement="Removing 10% is free: perplexity within 2% of dense",
        source="this project's rule", paper="flat below the essential sparsity [memory]",
        measured=f"{ratio:+.2%} (95% {low:+.2%} to {high:+.2%}); dense {values[0.0]:.2f}, at 10% {values[0.1]:.2f}; "
                 f"{at}",
        rule="perplexity at 10% <= 1.02 x dense"))
    report.claims.append(_cliff(curve, knee, at))
    ppl = {label: Curve([0.0, s], [curve.batches[0], b], "perplexity", False, "exp-mean").values()[1]
           for label, (s, b) in points.items()}
    half = values.get(0.5)
    report.claims.append(Claim.decide(
        max(ppl["2:4"], ppl["4:8"]) <= 2 * values[0.0],
        statement="N:M patterns 4:8 and 2:4 are usable in one shot", source="section 4 (Vicuna-7B, MMLU)",
        paper="4:8 and 2:4 usable; unstructured to about 40-45% [memory]",
        measured=", ".join(f"{k} {v:.4g}" for k, v in ppl.items())
                 + (f", unstructured 50% {half:.4g}" if half else "") + f", dense {values[0.0]:.4g} (perplexity); {at}",
        rule="perplexity of both at most twice dense"))
    return knee


def _falls(curve: Curve) -> list[float]:
    """Levels at which the mean falls below that of the level before, beyond noise (paired bootstrap)."""
    drawn = curve._resampled(1000, 0)
    steps = np.diff(drawn, axis=1)
    return [curve.levels[i + 1] for i in range(steps.shape[1]) if np.percentile(steps[:, i], 97.5) < 0]


def _ratio_interval(curve: Curve, level: int) -> tuple[float, float]:
    drawn = curve._resampled(1000, 0)
    ratios = np.exp(drawn[:, level] - drawn[:, 0]) - 1
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def _cliff(curve: Curve, knee: Knee, at: str) -> Claim:
    """Beyond the knee perplexity at least doubles within 20 points."""
    values = dict(zip(curve.levels, curve.values()))
    start = knee.knee.value
    later = [] if start is None else [s for s in curve.levels if start < s <= start + 0.2 + 1e-9]
    measured, holds = "no knee in the range", None
    if later and start is not None:
        worst = max(values[s] for s in later)
        holds = worst >= 2 * values[start]
        measured = (f"knee {knee.knee}: perplexity {values[start]:.4g} there, {worst:.4g} at most up to "
                    f"{later[-1]:.0%} ({worst / values[start]:.3g} x); {at}")
    return Claim.decide(holds, statement="There is a sharp turn: beyond the knee performance drops much faster",
                        source="section 3; this project's rule", paper="sharp turning point [memory]",
                        measured=measured, rule="perplexity at least doubles within 20 points beyond the knee")


# ------------------------------------------------------------------------------------------------------- cost
def _cost(report: Report, model: nn.Module, rounds: int) -> None:
    from looseleaf_lab import timing

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    counted = sum(p.numel() for p in prunable_parameters(model).values())
    for parameter in model.parameters():
        parameter.detach().sum()  # a memory-mapped file is read when first touched; that is loading, not pruning
    times, busy, extra = [], [], []
    for _ in range(rounds):
        with timing.peak_memory(every=0.002) as peak:
            start, used = time.perf_counter(), time.process_time()
            MagnitudePruner().prune(model)
            times.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
        extra.append(peak.bytes)
    seconds, memory = statistics.median(times), max(extra)
    table = report.table("cost of one global pruning of SmolLM2-135M at 50%", [
        "weights", "seconds (median)", "slowest", "processor seconds (median)", "seconds per billion weights",
        "extra memory, MB", "of the model"], note="processor seconds: what remains where other work slows the machine")
    table.add(counted, seconds, max(times), statistics.median(busy), seconds / counted * 1e9,
              memory / 1e6 if memory else None, memory / size if memory else None)
    fits = seconds < 5 and memory / size < 1.5
    report.claims.append(Claim.decide(
        fits if memory else None, statement="Global pruning is cheap: no sorting, little memory",
        source="this project's rule", paper="no figure in the paper; ours: under 5 s, 1.5 x the model's memory",
        measured=f"{seconds:.2f} s median of {rounds} ({seconds / counted * 1e9:.1f} s per billion weights; "
                 f"{statistics.median(busy):.2f} s of processor time, {torch.get_num_threads()} threads), "
                 f"peak memory above the start {memory / size:.2f} x the model's ({memory / 1e6:.0f} MB)"
                 if memory else f"{seconds:.2f} s; memory cannot be read on this system",
        rule="median under 5 s and peak extra resident memory under 1.5 x the bytes of the model"))


# ---------------------------------------------------------------------------------------------------- encoder
def _encoder(report: Report, language: Knee, quick: bool, progress: bool | None) -> None:
    from looseleaf_lab import data, models

    model, tokenizer = models.load("minilm")
    batches, size = (4, 32) if quick else (16, 32)
    passages = _passages(data.prose(400 * batches * size, part="evaluation"), batches * size)
    halves = [_halves(p) for p in passages]

    def hits(masked: nn.Module) -> list[float]:
        out = []
        with torch.inference_mode():
            for at in range(0, len(halves) - size + 1, size):
                part = halves[at:at + size]
                first, second = (_embed(masked, tokenizer, [h[i] for h in part]) for i in (0, 1))
                found = (first @ second.T).argmax(1)
                out.append(float((found == torch.arange(size)).float().mean()))
        return out

    levels = [x / 100 for x in (range(10, 71, 20) if quick else range(5, 71, 5))]
    name = "retrieval accuracy (MiniLM)"
    curves = {scope: sparsity_curve(model, hits, levels, pruner=MagnitudePruner(scope=scope, exclude=("pooler*",)),
                                    name=name, progress=progress) for scope in ("global", "layer")}
    points = {p: (0.5, masked_metric(model, hits, MagnitudePruner(pattern=p, exclude=("pooler*",))))
              for p in ("4:8", "2:4")}
    add_curves(report, curves, points)
    knee = essential_sparsity(curves["global"])
    mine, theirs = knee.within[0.05], language.within[0.05]
    decided = None
    if mine.low is not None and theirs.high is not None:
        decided = True if mine.low > theirs.high else False if (mine.high or 0) <= (theirs.low or 0) else None
    dense = curves["global"].values()[0]
    report.claims.append(Claim.decide(
        decided, statement="A sentence encoder tolerates more than the language model",
        source="this project's rule", paper="no figure in the paper for this pair",
        measured=f"encoder s*(5%) = {mine}, s*(1%) = {knee.within[0.01]}, knee {knee.knee} (dense accuracy "
                 f"{dense:.3f}: the second half of a passage among {size}, {len(curves['global'].batches[0])} "
                 f"batches); language model s*(5%) of perplexity = {theirs}",
        rule="the 95% interval of the encoder's s*(5%) lies above that of the language model's; below: does not hold; "
             "overlap: not shown"))


def _passages(text: str, count: int) -> list[str]:
    found = [" ".join(p.split()) for p in text.split("\n\n")]
    found = [p for p in dict.fromkeys(found) if len(p.split()) >= 24]
    if len(found) < count // 4:
        raise ValueError(f"the evaluation text has only {len(found)} passages of 24 words or more")
    return found[:count]


def _halves(passage: str) -> tuple[str, str]:
    words = passage.split()[:80]
    return " ".join(words[:len(words) // 2]), " ".join(words[len(words) // 2:])


def _embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    hidden = model(**inputs).last_hidden_state
    weight = inputs["attention_mask"][..., None].to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


# ------------------------------------------------------------------------------- one-shot and iterative pruning
def _iterative(report: Report, seeds: int, quick: bool, progress: bool | None) -> None:
    """Masks of one-shot pruning against masks of iterative pruning with rewinding, on digits.

    As in the paper the network is pre-trained (digits 0-9 of one half of the images), the task is another (odd or even
    digit, the other half), one-shot masks are magnitudes of the pre-trained weights, and iterative pruning goes back
    to the pre-trained weights after each round. The same from random weights for comparison.
    """
    from looseleaf.statistics import bootstrap

    rounds = 6 if quick else 12
    levels = [1 - 0.8 ** k for k in range(1, rounds + 1)]
    found: dict[str, list[list[float]]] = {"pre-trained": [], "random": []}
    other: dict[str, list[list[float]]] = {"overlap": [], "hamming": []}
    accuracy: list[list[float]] = []
    moved: list[float] = []
    for seed in track(range(seeds), "iterative pruning", show=progress):
        data = _digits(seed)
        for start in found:
            model = _mlp(seed)
            if start == "pre-trained":
                _train(model, data["pre"], seed, steps=600, rate=0.1)
                model[-1] = _seeded_linear(100, 2, seed)
            else:
                model[-1] = _seeded_linear(100, 2, seed)
            tickets = _imp(model, data["train"], levels, seed)
            shots = _one_shot(model, data["train"], levels, seed, trained_first=start == "random")
            found[start].append([a.cosine(b) for a, b in zip(shots, tickets)])
            if start == "pre-trained":
                other["overlap"].append([a.overlap(b) for a, b in zip(shots, tickets)])
                other["hamming"].append([a.hamming(b) for a, b in zip(shots, tickets)])
                accuracy.append(_tuned(model, data, [None, *shots], seed))
                moved.append(_movement(model, data["train"], seed))
    table = report.table("one-shot against iterative masks (digits)", [
        "sparsity", "cosine, pre-trained", "low", "high", "overlap", "hamming", "cosine, random start",
        "cosine of random masks", "accuracy, one-shot and tuned", "of dense"],
        note=f"means over {seeds} seeds, 95% bootstrap over seeds; random masks of density d have cosine d; tuning "
             f"moves the pruned weights by {np.mean(moved):.1%} of their norm")
    dense = float(np.mean([row[0] for row in accuracy]))
    essential, series = [], {"pre-trained": ([], [], []), "random": ([], [], [])}  # type: ignore[var-annotated]
    for i, level in enumerate(levels):
        for start, (y, low, high) in series.items():
            for values, value in zip((y, low, high), bootstrap([row[i] for row in found[start]], 0)):
                values.append(value)
        tuned = float(np.mean([row[i + 1] for row in accuracy]))
        if tuned >= 0.99 * dense:
            essential.append(i)
        pre = series["pre-trained"]
        table.add(level, pre[0][i], pre[1][i], pre[2][i], float(np.mean([r[i] for r in other["overlap"]])),
                  float(np.mean([r[i] for r in other["hamming"]])), series["random"][0][i], 1 - level, tuned,
                  tuned / dense)
    figure = report.figure("one-shot against iterative masks (digits)", x_label="sparsity",
                           y_label="cosine of the masks")
    for start, (y, low, high) in series.items():
        figure.series.append(Series(f"{start} start", levels, y, low, high))
    figure.series.append(Series("random masks", levels, [1 - s for s in levels], style="line"))
    low = [series["pre-trained"][1][i] for i in essential]
    last = levels[max(essential)] if essential else None
    report.claims.append(Claim.decide(
        min(low) > 0.9 if low else None,
        statement="One-shot and lottery-ticket masks are highly similar in the essential range",
        source="section 5", paper="cosine > 0.9 [memory]",
        measured="no sparsity within 1% of dense" if last is None else
                 f"lowest cosine in the essential range (to {last:.0%}) "
                 f"{min(series['pre-trained'][0][i] for i in essential):.3f}"
                 f", its 95% lower end {min(low):.3f}; at {levels[0]:.0%} {series['pre-trained'][0][0]:.3f}, "
                 f"from random weights {series['random'][0][0]:.3f}; {seeds} seeds, MLP 64-300-100-2 on digits",
        rule="lower end of the 95% interval over seeds > 0.9 at each sparsity whose tuned accuracy is >= 0.99 x dense"))


def _digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    half, most = len(x) // 2, len(x) * 3 // 4
    return {"pre": (x[:half], y[:half]), "train": (x[half:most], y[half:most] % 2), "test": (x[most:], y[most:] % 2)}


def _mlp(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def _seeded_linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        return nn.Linear(inputs, outputs)


def _train(model: nn.Module, data: tuple[Tensor, Tensor], seed: int, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    x, y = data
    for _ in range(steps):
        batch = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


BODY = ("0", "2")  # the output layer is new in every task and is not pruned
TUNING = {"steps": 200, "rate": 0.01}


def _imp(model: nn.Module, data: tuple[Tensor, Tensor], levels: list[float], seed: int) -> list[Masks]:
    """Masks of iterative magnitude pruning that goes back to the start weights after each round."""
    def tune(copied: nn.Module) -> None:
        _train(copied, data, seed, TUNING["steps"], TUNING["rate"])  # type: ignore[arg-type]

    tickets = find_tickets(model, tune, [Unstructured(level) for level in levels],
                           weights=prunable_parameters(model, BODY), seed=seed, train_last=False, progress=False)
    return [ticket.masks for ticket in tickets[1:]]


def _one_shot(model: nn.Module, data: tuple[Tensor, Tensor], levels: list[float], seed: int,
              trained_first: bool) -> list[Masks]:
    """Masks of the magnitudes of the start weights, or of those after one training (random start)."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    if trained_first:
        _train(model, data, seed, TUNING["steps"], TUNING["rate"])  # type: ignore[arg-type]
    masks = [MagnitudePruner(sparsity=level, targets=BODY).prune(model) for level in levels]
    model.load_state_dict(start)
    return masks


def _movement(model: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> float:
    """How far tuning moves the weights, relative to their norm: masks can only differ where weights move."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    names = list(prunable_parameters(model, BODY))
    _train(model, data, seed, TUNING["steps"], TUNING["rate"])  # type: ignore[arg-type]
    now = model.state_dict()
    far = sum(float((now[n] - start[n]).square().sum()) for n in names)
    norm = sum(float(start[n].square().sum()) for n in names)
    model.load_state_dict(start)
    return (far / norm) ** 0.5


def _tuned(model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], masks: list[Masks | None],
           seed: int) -> list[float]:
    """Test accuracy after fine-tuning from the start weights under each mask (None: dense)."""
    start = {k: v.clone() for k, v in model.state_dict().items()}
    out = []
    for mask in masks:
        if mask is not None:
            mask.apply(model)
        _train(model, data["train"], seed, TUNING["steps"], TUNING["rate"])  # type: ignore[arg-type]
        x, y = data["test"]
        with torch.no_grad():
            out.append(float((model(x).argmax(1) == y).float().mean()))
        if mask is not None:
            mask.remove(model)
        model.load_state_dict(start)
    return out
