"""The paper's claims on SmolLM2-135M: 48 texts, each learned by a few steps of full fine-tuning."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf import Claim, Report
from looseleaf.pruning.selection import removed
from looseleaf.statistics import Interval, bootstrap, spearman
from looseleaf_lab import models
from looseleaf_lab.study import Results, Study, add_table, below, resampled
from looseleaf_outlandish import probe
from looseleaf_outlandish.data import HELD_OUT, LEVELS, ORDINARY, SAMPLES, Sample
from looseleaf_outlandish.pruner import IgnoreTopK
from looseleaf_outlandish.stones import stepping_stones
from looseleaf_outlandish.updates import keep_smallest, of_model
from looseleaf_text import LocalModel

PLAIN, EARLY = "plain", "plain, first presentations"
EACH_STEP, AT_END = "ignore top k, each step", "ignore top k, at the end"
KEEP_TOP, RANDOM = "keep top k only, at the end", "drop a random k, at the end"
STONES = "stepping stones"
STONES_ELSEWHERE = "stepping stones, in the context of the plain text"
SOURCE = "What counts as working here, fixed before measuring"
REDUCTION, KEPT, STONES_REDUCTION, SHARP, THRESHOLD = 0.5, 0.8, 0.3, 2.0, 1e-3
"""What the claims are decided by."""
FEWEST = 6
"""Samples needed on either side of the threshold."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How samples are learned: the same for all methods but where a method is what differs.

    The learning rate is the first of 3e-6, 1e-5, 3e-5 at which four other texts with other keywords were learned: after
    ten steps the median probability of the keyword in the text was 0.5 or more. Priming played no part in the choice,
    nor did any baseline.
    """

    steps: int = 10  # each with the sample
    early: int = 3  # after which plain training is looked at as well
    lr: float = 3e-5
    replay: int = 2  # ordinary sentences in each step
    k: float = 0.08  # fraction of the update that is ignored
    slower: tuple[float, ...] = (0.25, 0.5)  # smaller learning rates of the fair baseline, as factors, rising
    seeds: int = 5  # streams of replayed sentences, to which the samples are dealt
    per_level: int = 5  # samples of each level, drawn at random, that are learned by all methods
    others: bool = True  # learn the other samples too, plainly


def measure(seed: int, scale: Scale) -> Row:
    """Learn the samples of one stream, some of them by all methods; logarithms are natural ones."""
    model, tokenizer = models.load("smollm2")
    draw, autocast = random.Random(0), models.bfloat16_is_fast()
    chosen = {s for level in LEVELS for s in draw.sample([s for s in SAMPLES if s.level == level], scale.per_level)}
    with probe.restored(model) as put_back:
        local = LocalModel(model, tokenizer)
        row: Row = {"autocast": autocast, "ordinary": ordinary_loss(local), "samples": []}
        for number, sample in enumerate(SAMPLES):
            if number % scale.seeds == seed and (scale.others or sample in chosen):
                row["samples"].append({"number": number, **learn_all_ways(
                    local, sample, seed, scale, sample in chosen, autocast, put_back)})
    return row


def learn_all_ways(local: LocalModel, sample: Sample, seed: int, scale: Scale, baselines: bool, autocast: bool,
                   put_back: Callable[[], None]) -> Row:
    """Learn a sample plainly and, with ``baselines``, by all other methods; the weights are put back.

    Returns:
        ``log_p_before``, of the keyword in the text before learning, ``log_p_stones``, in the text with stepping
        stones; ``methods``: method -> (log S_mem, log S_prime); ``ordinary``: method -> loss on sentences that are
        never learned, nats per token.
    """
    model, before = local.model, probe.keyword_probabilities(local, sample)
    row: Row = {"log_p_before": before.log_p, "methods": {}, "ordinary": {}, "log_p_stones": None}

    def note(method: str, first: probe.KeywordProbabilities = before, text: Sample = sample) -> None:
        after = probe.keyword_probabilities(local, text)
        row["methods"][method] = probe.log_memorisation(first, after), probe.log_priming(first, after)

    def train(text: str = sample.text, lr: float = scale.lr, pruner: IgnoreTopK | None = None) -> None:
        for step, _ in enumerate(probe.learn(model, local.tokenizer, text, steps=scale.steps, lr=lr, ordinary=ORDINARY,
                                       replay=scale.replay, seed=seed, pruner=pruner, autocast=autocast), 1):
            if step == scale.early and (text, lr, pruner) == (sample.text, scale.lr, None):
                note(EARLY)

    def weights() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    try:
        start = weights()
        train()
        note(PLAIN)
        row["ordinary"][PLAIN] = ordinary_loss(local)
        if not baselines:
            return row
        trained = weights()
        IgnoreTopK(scale.k, when="end").apply(model, start)
        note(AT_END)
        generator = torch.Generator().manual_seed(seed)
        for method in (KEEP_TOP, RANDOM):  # made of one and the same finished training
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(trained[name])
                for update in of_model(model, start):
                    update.put_back(largest(update.magnitude(), scale.k) if method == KEEP_TOP else
                                    others(update.after, scale.k, generator))
            note(method)
        put_back()
        train(pruner=IgnoreTopK(scale.k))
        note(EACH_STEP)
        row["ordinary"][EACH_STEP] = ordinary_loss(local)
        for factor in scale.slower:
            put_back()
            train(lr=factor * scale.lr)
            note(slower(factor))
        put_back()
        stones = dataclasses.replace(sample, text=stepping_stones(sample.text, sample.keyword))
        first = probe.keyword_probabilities(local, stones)
        row["log_p_stones"] = first.log_p
        train(stones.text)
        note(STONES, first, stones)
        note(STONES_ELSEWHERE)
        return row
    finally:
        put_back()


def ordinary_loss(local: LocalModel) -> float:
    """Negative log-likelihood of the held-out sentences, nats per token."""
    scores = local.score([""] * len(HELD_OUT), [[text] for text in HELD_OUT])
    return -sum(row[0] for row in scores) / sum(map(local.count_tokens, HELD_OUT))


def slower(factor: float) -> str:
    """The name of the baseline with a smaller learning rate."""
    return f"learning rate x {factor:g}"


def largest(magnitude: Tensor, k: float) -> Tensor:
    """The opposite of ignoring them: keep the largest entries only, as many as would be ignored (as TIES does)."""
    return ~keep_smallest([magnitude], removed(k, magnitude.numel()))[0]


def others(like: Tensor, k: float, generator: torch.Generator) -> Tensor:
    """Drop as many entries anywhere."""
    drawn = torch.rand(like.shape, generator=generator)
    return keep_smallest([drawn], removed(k, drawn.numel()))[0].to(like.device)


class Figures:
    """What was measured of all samples: ``rows`` in their order, ``some`` of them by all methods."""

    def __init__(self, results: Results) -> None:
        self.rows = sorted(results.joined("samples"), key=lambda row: row["number"])
        self.some = [row for row in self.rows if EACH_STEP in row["methods"]]
        self.by_keyword = [list(group) for _, group in itertools.groupby(
            self.rows, key=lambda row: SAMPLES[row["number"]].keyword)]
        self.rates = [*map(slower, results.scale.slower), PLAIN]

    def logs(self, method: str, which: int) -> np.ndarray:
        """log S_mem (0) or log S_prime (1) of the samples learned by all methods."""
        return np.array([row["methods"][method][which] for row in self.some])

    def median(self, method: str, which: int = 1) -> float:
        """Median of S_mem (0) or S_prime (1)."""
        return math.exp(np.median(self.logs(method, which)))

    def reduction(self, method: str) -> Interval:
        """How much lower the median of S_prime is than that of plain training, as a fraction."""
        ours, plain = self.logs(method, 1), self.logs(PLAIN, 1)
        return resampled(len(ours), lambda i: 1 - np.exp(np.median(ours[i], -1) - np.median(plain[i], -1)),
                         samples=1000)

    def kept(self, method: str) -> Interval:
        """The mean of log S_mem as a fraction of that of plain training."""
        ours, plain = self.logs(method, 0), self.logs(PLAIN, 0)
        return resampled(len(ours), lambda i: ours[i].mean(-1) / plain[i].mean(-1), samples=1000)

    def excess(self, method: str) -> Interval:
        """Mean of log S_prime beyond that of a smaller learning rate that memorises as much."""
        return bootstrap([row["methods"][method][1] - at_equal_memorisation(
            [row["methods"][rate] for rate in self.rates], row["methods"][method][0]) for row in self.some],
            samples=1000)

    def over_keywords(self, statistic: Callable[[list[Row]], float]) -> Interval:
        """A statistic of all samples; keywords are resampled, as the samples of one are not independent."""
        return resampled(len(self.by_keyword), lambda i: np.array(
            [statistic([row for n in chosen for row in self.by_keyword[n]]) for chosen in i]), samples=1000)

    def within_keywords(self) -> Interval:
        """Mean over keywords of the correlation of a keyword's own samples."""
        return bootstrap(map(correlation, self.by_keyword), samples=1000)


def at_equal_memorisation(points: Sequence[tuple[float, float]], log_mem: float) -> float:
    """log S_prime of a smaller learning rate that memorises as much, interpolated between the (log S_mem, log S_prime)
    of rising learning rates and (0, 0) at rate 0; beyond the last point that point's priming counts."""
    for (m0, p0), (m1, p1) in itertools.pairwise([(0.0, 0.0), *points]):
        if min(m0, m1) <= log_mem <= max(m0, m1):
            return p0 + (p1 - p0) * ((log_mem - m0) / (m1 - m0) if m1 != m0 else 1.0)
    return points[-1][1] if log_mem > 0 else 0.0


def correlation(rows: Sequence[Row]) -> float:
    """Spearman's, of the probability before with priming."""
    if len(rows) < 2:
        return 0.0
    rho = spearman([row["log_p_before"] for row in rows], [row["methods"][PLAIN][1] for row in rows])
    return 0.0 if math.isnan(rho) else rho  # a resample of one keyword may be constant


def first_steps(rows: Sequence[Row]) -> float:
    """Mean of log S_prime after the first presentations."""
    return statistics.fmean(row["methods"][EARLY][1] for row in rows)


def show(report: Report, results: Results) -> None:
    """The probe's own tables and figure, correlations, methods, and the fair comparison."""
    figures, scale, first = Figures(results), dataclasses.asdict(results.scale), results.rows[0]
    report.facts |= {
        "model": "SmolLM2-135M-Instruct", "threads": torch.get_num_threads(), "samples": len(figures.rows),
        "samples learned by all methods": len(figures.some), "autocast": first["autocast"],
        **{name: scale[name] for name in ("steps", "early", "lr", "replay", "k")},
        "slower": ", ".join(f"{factor:g}" for factor in scale["slower"]), "ordinary loss before": first["ordinary"],
        "ordinary loss after, plain": statistics.fmean(row["ordinary"][PLAIN] for row in figures.rows),
        "ordinary loss after, ignore top k": statistics.fmean(row["ordinary"][EACH_STEP] for row in figures.some)}
    outcomes = [probe.Outcome(row["log_p_before"], *row["methods"][PLAIN]) for row in figures.rows]
    report.extend(probe.report_of([SAMPLES[row["number"]] for row in figures.rows], outcomes, {}))
    add_table(report, "Rank correlation of P_before with S_prime", [
        {"of": "all samples", "correlation": figures.over_keywords(correlation)},
        {"of": "samples of one keyword", "correlation": figures.within_keywords()}],
        "95 % bootstrap over keywords; within: mean over keywords of the correlation of a keyword's own samples, which "
        "no property of the keyword itself can explain")
    methods = figures.some[0]["methods"]
    add_table(report, "Methods", (
        {"method": method, "S_mem": figures.median(method, 0), "S_prime": figures.median(method),
         "reduction": figures.reduction(method), "log S_mem kept": figures.kept(method)} for method in methods),
        f"medians of S over {len(figures.some)} samples; reduction: of the median of S_prime against plain; kept: "
        "ratio of the means of log S_mem; 95 % bootstrap over samples")
    report.arrays.update({method: [row["methods"][method] for row in figures.some] for method in methods})
    report.arrays["log P_before with stepping stones"] = [row["log_p_stones"] for row in figures.some]
    add_table(report, "Against a smaller learning rate that memorises as much", (
        {"method": method, "difference in log S_prime": figures.excess(method)} for method in (EACH_STEP, AT_END)),
        "mean over samples; below 0: the method primes less; the baseline is interpolated between learning rates "
        f"{', '.join(f'{f:g}' for f in (0.0, *results.scale.slower, 1.0))} times as large; 95 % bootstrap over samples")


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper."""
    claim, figures, scale = results.claim, Figures(results), results.scale
    rows, some, plain = figures.rows, f"; {len(figures.some)} samples", figures.median(PLAIN)
    rho, early = map(figures.over_keywords, (correlation, first_steps))
    yield claim("The less likely a keyword is in a text before it is learned, the more the text primes afterwards",
                f"paper, abstract; {SOURCE} (1)", "holds across models [abstract]",
                "the interval over keywords lies below 0", rho.high < 0,
                f"Spearman {rho:+.2f} over {len(rows)} samples of {len(figures.by_keyword)} keywords; within keywords "
                f"{figures.within_keywords():+.2f}")
    sides = [[row["methods"][PLAIN][1] for row in rows if (row["log_p_before"] < math.log(THRESHOLD)) == rare]
             for rare in (True, False)]
    rare, common = (math.exp(statistics.median(side)) if side else math.nan for side in sides)
    yield claim("Priming rises sharply where that probability is below about 1e-3", "paper, figures", "about 1e-3",
                "the median below is twice that above or more",
                None if min(map(len, sides)) < FEWEST else rare >= SHARP * common,
                f"median S_prime {rare:.2f} of {len(sides[0])} samples below, {common:.2f} of {len(sides[1])} above")
    learned = math.exp(statistics.median(row["methods"][EARLY][0] for row in rows))
    yield claim(f"{({2: 'Two', 3: 'Three'}).get(scale.early, scale.early)} presentations suffice for priming",
                "paper, abstract", "as few as three [abstract]",
                "the interval over keywords of the mean of log S_prime lies above 0", early.low > 0,
                f"mean log S_prime {early:.3f} after {scale.early} steps, median S_mem {learned:.2f}")
    top = f"the largest {scale.k:.0%}"
    for method, when in ((EACH_STEP, "of each step"), (AT_END, "of the finished training")):
        less, memory, gap = figures.reduction(method), figures.kept(method), figures.excess(method)
        yield claim(f"Ignoring {top} {when} halves priming and keeps memorisation", f"paper, abstract; {SOURCE} (2)",
                    "50 to 95 % less priming [abstract], 96 % on PaLM-2",
                    "median S_prime at least 50 % lower, and at least 80 % of the mean of log S_mem kept",
                    less.value >= REDUCTION and memory.value >= KEPT,
                    f"median S_prime {plain:.2f} to {figures.median(method):.2f}, {less:.0%} less; log S_mem kept "
                    f"{memory:.0%}{some}")
        yield claim(f"Ignoring {top} {when} primes less than a smaller learning rate that memorises as much",
                    f"{SOURCE} (2)", "not a figure of the paper", "holds where the interval lies below 0, does not "
                    "hold where it lies at or above 0; not shown otherwise", below(gap, touching=False),
                    f"log S_prime {gap:+.3f}{some}")
    keeping, ignoring, less = figures.median(KEEP_TOP), figures.median(AT_END), figures.reduction(STONES)
    yield claim(f"Keeping only {top} primes more than ignoring them",
                f"paper, section on update pruning; {SOURCE} (2)", "keeping the top keeps priming",
                "the median of S_prime is higher, both at the end of one and the same training", keeping > ignoring,
                f"median S_prime {keeping:.2f} against {ignoring:.2f}, plain {plain:.2f}; log S_mem kept "
                f"{figures.kept(KEEP_TOP).value:.0%} against {figures.kept(AT_END).value:.0%}{some}")
    before, after = (math.exp(statistics.median(row[f"log_p_{when}"] for row in figures.some))
                     for when in ("before", "stones"))
    yield claim("Stepping stones lower priming", f"paper, abstract; {SOURCE} (3)", "medians of about 50 to 75 %",
                "median S_prime at least 30 % lower", less.value >= STONES_REDUCTION,
                f"median S_prime {plain:.2f} to {figures.median(STONES):.2f}, {less:.0%} less; median P_before "
                f"{before:.2g} to {after:.2g}; in the context of the plain text log S_mem kept "
                f"{figures.kept(STONES_ELSEWHERE).value:.0%}{some}")
    yield from results.unmeasured("paper, abstract and figures", "as stated", {
        "The relation of probability before and priming holds across PaLM-2, Gemma and Llama": "those models",
        "Ignore-top-k lowers priming by a median of 96 % on PaLM-2 while memorisation stays": "PaLM-2",
        "Stepping stones lower priming by a median of about 75 % (PaLM-2-xs) and 50 % (Gemma, Llama)":
            "those models, the 1,320 samples and a large model that rewrites",
        "The presentations may lie up to 20 iterations apart": "presentations with other training in between"})


study = Study("New texts, and how far they leak: SmolLM2-135M", measure, claims, show, full=Scale(),
              quick=Scale(steps=3, early=2, seeds=1, per_level=1, others=False), quick_seeds=1)
