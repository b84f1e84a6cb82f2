"""The paper's claims at small real scale: a language model, a sentence encoder and small networks trained here."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import Claim, Masks, Report, Unstructured, prunable_parameters
from looseleaf.statistics import Interval, paired
from looseleaf_essential_sparsity.pruner import MagnitudePruner
from looseleaf_essential_sparsity.sweep import add_curves, curves_and_points
from looseleaf_lab import data, metrics, models, timing, training
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_tickets import find_tickets
from looseleaf_tickets.knee import Curve, essential_sparsity, relative_drops

OURS = "this project's rule"
CONTEXT, BATCH = 256, 32
BODY = ("0", "2")
"""The layers of the small networks that are pruned: the output layer is new in every task."""
FINE = tuple(x / 100 for x in range(5, 71, 5))


@dataclass(frozen=True)
class Scale:
    """How much is measured of the language model, of the encoder and of the small networks."""

    repeats: int = 5  # of the timing
    windows: int = 12
    levels: tuple[float, ...] = FINE
    coarse: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)  # of next-token accuracy
    batches: int = 16
    encoder_levels: tuple[float, ...] = FINE
    rounds: int = 12


def once(scale: Scale) -> dict[str, Any]:
    """The sweeps, which are deterministic (their intervals are over evaluation batches), and the cost of pruning."""
    model, tokenizer = models.load("smollm2")
    costs = cost(model, scale.repeats)
    text = data.prose(CONTEXT * scale.windows * 8, part="evaluation")
    ids = data.token_ids(tokenizer, text, CONTEXT * scale.windows)

    def losses(masked: nn.Module) -> list[float]:
        return metrics.perplexity(masked, ids, CONTEXT, CONTEXT, progress=False).losses

    @torch.inference_mode()
    def correct(masked: nn.Module) -> list[float]:
        return [float((masked(window[None]).logits[0, :-1].argmax(-1) == window[1:]).float().mean())
                for window in ids[0].split(CONTEXT)]

    language = sweep(model, losses, scale.levels, ("global", "layer", "4:8", "2:4", "1:2"), name="perplexity",
                     higher_is_better=False, mean="exp-mean")
    accuracy = sweep(model, correct, scale.coarse, ("global",), name="next-token accuracy")
    counted = MagnitudePruner().prune(model).metadata
    encoder, tokenizer = models.load("minilm")
    halves = passages(data.prose(400 * scale.batches * BATCH, part="evaluation"), scale.batches * BATCH)

    def retrieved(masked: nn.Module) -> list[float]:
        """How often the second half of a passage is the nearest to its first, among a batch of them."""
        out = []
        for start in range(0, len(halves) - BATCH + 1, BATCH):
            first, second = (nn.functional.normalize(models.sentence_embeddings(
                (masked, tokenizer), part, max_length=128), dim=-1) for part in zip(*halves[start:start + BATCH]))
            out.append(float(((first @ second.T).argmax(1) == torch.arange(BATCH)).float().mean()))
        return out

    return {"cost": costs, "language": language, "accuracy": accuracy, "counted": counted,
            "encoder": sweep(encoder, retrieved, scale.encoder_levels, ("global", "layer", "4:8", "2:4"), ("pooler*",),
                             name="retrieval accuracy (MiniLM)"),
            "text": getattr(text, "source", "looseleaf_lab.data.prose, evaluation part")}


def sweep(model: nn.Module, evaluate: Any, levels: Sequence[float], labels: Sequence[str],
          exclude: tuple[str, ...] | None = None, **options: Any) -> dict[str, Any]:
    """A curve of each scope and a point of each pattern among ``labels``, as plain data."""
    fields: list[dict[str, Any]] = [{"pattern" if ":" in label else "scope": label} for label in labels]
    pruners = {label: MagnitudePruner(exclude=exclude, **own) for label, own in zip(labels, fields, strict=True)}
    curves, points = curves_and_points(model, evaluate, levels, pruners, progress=False, **options)
    return {"curves": {label: dataclasses.asdict(curve) for label, curve in curves.items()}, "points": points}


def curves_of(measured: dict[str, Any]) -> dict[str, Curve]:
    """The curves of a sweep."""
    return {label: Curve(**fields) for label, fields in measured["curves"].items()}


def cost(model: nn.Module, repeats: int) -> dict[str, Any]:
    """Time and memory of one global pruning."""
    for parameter in model.parameters():
        parameter.detach().sum()  # a memory-mapped file is read when first touched; that is loading, not pruning
    times, busy, extra = [], [], []
    for _ in range(repeats):
        with timing.peak_memory(every=0.002) as peak:
            start, used = time.perf_counter(), time.process_time()
            MagnitudePruner().prune(model)
            times.append(time.perf_counter() - start)
            busy.append(time.process_time() - used)
        extra.append(peak.bytes)
    return {"seconds": statistics.median(times), "slowest": max(times), "busy": statistics.median(busy),
            "bytes": max(extra) or None, "weights": sum(p.numel() for p in prunable_parameters(model).values()),
            "size": sum(p.numel() * p.element_size() for p in model.parameters())}


def passages(text: str, count: int) -> list[tuple[str, str]]:
    """Paragraphs of 24 words or more, each once, cut in two halves of at most 40 words."""
    paragraphs = [p.split() for p in dict.fromkeys(" ".join(p.split()) for p in text.split("\n\n"))]
    long = [words[:80] for words in paragraphs if len(words) >= 24]
    if len(long) < count // 4:
        raise ValueError(f"the evaluation text has only {len(long)} passages of 24 words or more")
    return [(" ".join(words[:len(words) // 2]), " ".join(words[len(words) // 2:])) for words in long[:count]]


def levels_of(scale: Scale) -> list[float]:
    """The sparsities of the small networks."""
    return [1 - 0.8 ** k for k in range(1, scale.rounds + 1)]


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Masks of one-shot pruning against those of iterative pruning with rewinding, on digits.

    As in the paper the network is pre-trained (digits 0-9 of one half of the images), the task is another (odd or even
    digit, the other half), one-shot masks are magnitudes of the pre-trained weights, and iterative pruning goes back
    to the pre-trained weights after each round. The same from random weights, whose one-shot masks are magnitudes
    after one training.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    half, most = len(x) // 2, len(x) * 3 // 4
    task = (x[half:most], y[half:most] % 2)
    levels = levels_of(scale)
    row: dict[str, Any] = {}
    for start in ("random", "pre-trained"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
            torch.manual_seed(1000 + seed)
            output = nn.Linear(100, 2)
        if start == "pre-trained":
            train(model, (x[:half], y[:half]), seed, steps=600, rate=0.1)
        model[-1] = output
        after, tickets = tuned(model, task, seed), iterative(model, task, levels, seed)
        shots = [MagnitudePruner(sparsity=level, targets=BODY).prune(after if start == "random" else model)
                 for level in levels]
        row[start] = [shot.cosine(ticket) for shot, ticket in zip(shots, tickets, strict=True)]
    for likeness in ("overlap", "hamming"):
        row[likeness] = [getattr(shot, likeness)(ticket) for shot, ticket in zip(shots, tickets, strict=True)]
    row["accuracy"] = [float((network(x[most:]).argmax(1) == y[most:] % 2).float().mean())
                       for network in (after, *(tuned(model, task, seed, shot) for shot in shots))]
    was, now, names = model.state_dict(), after.state_dict(), list(prunable_parameters(model, BODY))
    row["moved"] = (sum(float((now[n] - was[n]).square().sum()) for n in names)
                    / sum(float(was[n].square().sum()) for n in names)) ** 0.5
    return row


def train(model: nn.Module, task: tuple[Tensor, Tensor], seed: int, steps: int = 200, rate: float = 0.01) -> None:
    """SGD with momentum on batches drawn by ``seed``; the defaults are those of tuning."""
    draw, (x, y) = torch.Generator().manual_seed(seed), task

    def loss(_: int) -> Tensor:
        batch = torch.randint(0, len(x), (64,), generator=draw)
        return nn.functional.cross_entropy(model(x[batch]), y[batch])

    training.fit(model, loss, steps=steps, optimizer=lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9),
                 progress=False)


def tuned(model: nn.Module, task: tuple[Tensor, Tensor], seed: int, masks: Masks | None = None) -> nn.Module:
    """A copy of the model, tuned under masks."""
    copied = copy.deepcopy(model)
    if masks is not None:
        masks.apply(copied)
    train(copied, task, seed)
    return copied


def iterative(model: nn.Module, task: tuple[Tensor, Tensor], levels: list[float], seed: int) -> list[Masks]:
    """Masks of iterative magnitude pruning that goes back to the start weights after each round."""
    tickets = find_tickets(model, lambda copied: train(copied, task, seed), [Unstructured(level) for level in levels],
                           weights=prunable_parameters(model, BODY), seed=seed, train_last=False, progress=False)
    return [ticket.masks for ticket in tickets[1:]]


def show(report: Report, results: Results) -> None:
    """Cost, sweeps, and how alike the masks are."""
    counted = results.once["counted"]
    report.facts |= {"threads": torch.get_num_threads(),
                     "text": f"{results.once['text']}; {results.scale.windows} windows of {CONTEXT} tokens",
                     "weights": f"{counted['prunable']:,} of {counted['parameters']:,} parameters are prunable; "
                                "SmolLM2-135M-Instruct, 4-bit weights widened to float32"}
    costs = results.once["cost"]
    add_table(report, "cost of one global pruning of SmolLM2-135M at 50%", [
        {"weights": costs["weights"], "seconds (median)": costs["seconds"], "slowest": costs["slowest"],
         "processor seconds (median)": costs["busy"],
         "seconds per billion weights": costs["seconds"] / costs["weights"] * 1e9,
         "extra memory, MB": costs["bytes"] and costs["bytes"] / 1e6,
         "of the model": costs["bytes"] and costs["bytes"] / costs["size"]}],
        "processor seconds: what remains where other work slows the machine")
    for name in ("language", "accuracy", "encoder"):
        add_curves(report, curves_of(results.once[name]), results.once[name]["points"])
    title, levels, dense = "one-shot against iterative masks (digits)", levels_of(results.scale), _accuracy(results)[0]
    add_table(report, title, (
        {"sparsity": level, "cosine, pre-trained": results.interval("pre-trained", i),
         "overlap": results.mean("overlap", i), "hamming": results.mean("hamming", i),
         "cosine, random start": results.mean("random", i), "cosine of random masks": 1 - level,
         "accuracy, one-shot and tuned": _accuracy(results)[i + 1], "of dense": _accuracy(results)[i + 1] / dense}
        for i, level in enumerate(levels)),
        f"means over {len(results.seeds)} seeds, 95% bootstrap over seeds; random masks of density d have cosine d; "
        f"tuning moves the pruned weights by {results.mean('moved'):.1%} of their norm")
    report.figure(title, x_label="sparsity", y_label="cosine of the masks", series=[
        *(curve(f"{start} start", levels, [results.interval(start, i) for i in range(len(levels))])
          for start in ("pre-trained", "random")), curve("random masks", levels, [1 - s for s in levels], "line")])


def _accuracy(results: Results) -> list[float]:
    """Of the whole network, and after tuning at each sparsity, means over seeds."""
    return [results.mean("accuracy", i) for i in range(len(levels_of(results.scale)) + 1)]


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper, and each rule of this project; the quick run decides them as well."""
    claim = functools.partial(results.claim, any_scale=True)
    perplexity, encoder = (curves_of(results.once[name])["global"] for name in ("language", "encoder"))
    levels, losses = perplexity.levels, perplexity.batches
    correct = essential_sparsity(curves_of(results.once["accuracy"])["global"])
    knee, values = essential_sparsity(perplexity), dict(zip(levels, perplexity.values(), strict=True))
    at = f"; {results.scale.windows} windows of {CONTEXT} tokens, 95% bootstrap over windows"
    costs = results.once["cost"]
    extra = (costs["bytes"] or 0) / costs["size"]
    yield claim("Global pruning is cheap: no sorting, little memory", OURS,
                "no figure in the paper; ours: under 5 s, 1.5 x the model's memory",
                "median under 5 s and peak extra resident memory under 1.5 x the bytes of the model",
                costs["seconds"] < 5 and extra < 1.5 if extra else None,
                f"{costs['seconds']:.2f} s median of {results.scale.repeats} "
                f"({costs['seconds'] / costs['weights'] * 1e9:.1f} s per billion weights; {costs['busy']:.2f} s of "
                f"processor time, {torch.get_num_threads()} threads), peak memory above the start {extra:.2f} x the "
                f"model's ({costs['bytes'] / 1e6:.0f} MB)" if extra else
                f"{costs['seconds']:.2f} s; memory cannot be read on this system")
    falls = [level for level, after, before in zip(levels[1:], losses[1:], losses)
             if paired(after, before, samples=1000).high < 0]
    yield claim("Perplexity grows with sparsity", OURS, "monotone",
                "no step at which the paired 95% interval of the loss difference lies below 0", not falls,
                f"{len(falls)} of {len(levels) - 1} steps fall beyond noise"
                f"{' (at ' + ', '.join(f'{s:.0%}' for s in falls) + ')' if falls else ''}{at}")
    accurate, tenth = correct.within[0.01], levels.index(0.1)
    yield claim("30 to 50% of the weights can be removed in one shot for about 1% of performance",
                "abstract and section 4", "about 30-50% with about 1% drop [paper, as remembered]",
                "lower end of s*(1%) of next-token accuracy >= 30%; the paper tunes on a task, here nothing is tuned",
                None if accurate.value is None or accurate.low is None else accurate.low >= 0.30,
                f"next-token accuracy: s*(1%) = {accurate}, s*(5%) = {correct.within[0.05]}, knee {correct.knee}; "
                f"perplexity: s*(1%) = {knee.within[0.01]}, s*(5%) = {knee.within[0.05]}, knee {knee.knee}; levels at "
                f"most {knee.step:.0%} apart for perplexity, {correct.step:.0%} for accuracy{at}")
    ratio = Interval(*np.expm1(paired(losses[tenth], losses[0], samples=1000)))
    yield claim("Removing 10% is free: perplexity within 2% of dense", OURS,
                "flat below the essential sparsity [memory]", "perplexity at 10% <= 1.02 x dense",
                relative_drops(perplexity)[tenth] <= 0.02,
                f"{ratio.value:+.2%} (95% {ratio.low:+.2%} to {ratio.high:+.2%}); dense {values[0.0]:.2f}, at 10% "
                f"{values[0.1]:.2f}{at}")
    start = knee.knee.value
    later = [] if start is None else [s for s in levels if start < s <= start + 0.2 + 1e-9]
    turn, worst = values.get(start, 0.0), max((values[s] for s in later), default=0.0)  # type: ignore[arg-type]
    yield claim("There is a sharp turn: beyond the knee performance drops much faster", f"section 3; {OURS}",
                "sharp turning point [memory]", "perplexity at least doubles within 20 points beyond the knee",
                worst >= 2 * turn if later else None,
                f"knee {knee.knee}: perplexity {turn:.4g} there, {worst:.4g} at most up to {later[-1]:.0%} "
                f"({worst / turn:.3g} x){at}" if later else "no knee in the range")
    points = {pattern: Curve([0.0, s], [losses[0], batches], "perplexity", False, "exp-mean").values()[1]
              for pattern, (s, batches) in results.once["language"]["points"].items()}
    yield claim("N:M patterns 4:8 and 2:4 are usable in one shot", "section 4 (Vicuna-7B, MMLU)",
                "4:8 and 2:4 usable; unstructured to about 40-45% [memory]", "perplexity of both at most twice dense",
                max(points["2:4"], points["4:8"]) <= 2 * values[0.0],
                ", ".join(f"{pattern} {value:.4g}" for pattern, value in points.items())
                + (f", unstructured 50% {values[0.5]:.4g}" if 0.5 in values else "")
                + f", dense {values[0.0]:.4g} (perplexity){at}")
    tolerant = essential_sparsity(encoder)
    ours, other = tolerant.within[0.05], knee.within[0.05]
    higher = None
    if ours.low is not None and other.high is not None:
        higher = True if ours.low > other.high else False if (ours.high or 0) <= (other.low or 0) else None
    yield claim("A sentence encoder tolerates more than the language model", OURS,
                "no figure in the paper for this pair", "the 95% interval of the encoder's s*(5%) lies above that of "
                "the language model's; below: does not hold; overlap: not shown", higher,
                f"encoder s*(5%) = {ours}, s*(1%) = {tolerant.within[0.01]}, knee {tolerant.knee} (dense accuracy "
                f"{encoder.values()[0]:.3f}: the second half of a passage among {BATCH}, {len(encoder.batches[0])} "
                f"batches); language model s*(5%) of perplexity = {other}")
    sparsities, (dense, *tuned) = levels_of(results.scale), _accuracy(results)
    cosines = [results.interval("pre-trained", i) for i in range(len(sparsities))]
    free = [i for i, accuracy in enumerate(tuned) if accuracy >= 0.99 * dense]
    low = min((cosines[i].low for i in free), default=None)
    yield claim("One-shot and lottery-ticket masks are highly similar in the essential range", "section 5",
                "cosine > 0.9 [memory]", "lower end of the 95% interval over seeds > 0.9 at each sparsity whose tuned "
                "accuracy is >= 0.99 x dense", None if low is None else low > 0.9,
                "no sparsity within 1% of dense" if low is None else
                f"lowest cosine in the essential range (to {sparsities[max(free)]:.0%}) "
                f"{min(cosines[i].value for i in free):.3f}, its 95% lower end {low:.3f}; at {sparsities[0]:.0%} "
                f"{cosines[0].value:.3f}, from random weights {results.mean('random', 0):.3f}; "
                f"{len(results.seeds)} seeds, MLP 64-300-100-2 on digits")
    yield claim("Self-supervised pre-training gives more emergent sparsity than supervised pre-training", "abstract",
                "figure [abstract]", "no rule: nothing is measured here", None,
                "not measured: it needs the same vision transformer trained both ways")


study = Study("essential-sparsity: the paper's claims", measure, claims, show, once, Scale(), Scale(
    1, 4, (0.1, 0.3, 0.5, 0.7), (0.1, 0.3, 0.5, 0.7), 4, (0.1, 0.3, 0.5, 0.7), 6))
