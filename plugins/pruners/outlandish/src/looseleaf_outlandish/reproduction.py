"""The paper's claims on SmolLM2-135M: 48 texts, each learned by a few steps of full fine-tuning."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Report
from looseleaf import progress as progress_
from looseleaf_outlandish.experiment import (
    AT_END,
    EACH_STEP,
    EARLY,
    KEEP_TOP,
    PLAIN,
    STONES,
    STONES_ELSEWHERE,
    Experiment,
    Measured,
    Setting,
    at_equal_memorisation,
    slower,
)
from looseleaf_outlandish.learning import restored
from looseleaf_outlandish.probe import Outcome, report_of
from looseleaf_outlandish.texts import LEVELS, SAMPLES

SOURCE = "What counts as working here, fixed before measuring"
LR = 3e-5
"""The first of 3e-6, 1e-5, 3e-5 at which four other texts with other keywords were learned: after ten steps the median
probability of the keyword in the text was 0.5 or more. Priming played no part in the choice, nor did any rival."""
PER_LEVEL = 5
"""Samples of each level that are also learned by all other methods."""
REDUCTION, KEPT, STONES_REDUCTION, SHARP, THRESHOLD = 0.5, 0.8, 0.3, 2.0, 1e-3
"""What the claims are decided by."""
FEWEST = 6
"""Samples needed on either side of the threshold."""

Statistic = Callable[[Sequence[Measured]], float]


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure each claim of the paper.

    Args:
        seeds: streams of replayed sentences; the samples are dealt to them.
        quick: one sample of each level, 3 steps; its claims are not decided.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: ``seeds`` below 1.
    """
    from looseleaf_lab import models

    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number from 1")
    began = time.perf_counter()
    fast = models.bfloat16_is_fast()
    setting = Setting(lr=LR, autocast=fast)
    if quick:
        setting = dataclasses.replace(setting, steps=3, early=2)
    model, tokenizer = models.load("smollm2")
    measured = measure(model, tokenizer, setting, seeds, 1 if quick else PER_LEVEL, only_rivals=quick,
                       progress=progress)
    report = summarise(measured, setting, quick)
    report.facts.update({"model": "SmolLM2-135M-Instruct", "seeds": seeds, "threads": torch.get_num_threads(),
                         "seconds": round(time.perf_counter() - began, 1)})
    return report


def measure(model: Any, tokenizer: Any, setting: Setting, seeds: int, per_level: int, *, only_rivals: bool = False,
            progress: bool | None = None) -> list[Measured]:
    """Learn all samples, and ``per_level`` of each level by all methods.

    Args:
        model, tokenizer, setting: as for :class:`Experiment`.
        seeds: streams of replayed sentences.
        per_level: samples, drawn at random from each level.
        only_rivals: leave the other samples out.
        progress: show a progress bar; None: only on a terminal.
    """
    draw = random.Random(0)
    chosen = {s for level in LEVELS for s in draw.sample([s for s in SAMPLES if s.level == level], per_level)}
    jobs = [(n, s) for n, s in enumerate(SAMPLES) if s in chosen or not only_rivals]
    with restored(model):
        experiment = Experiment(model, tokenizer, setting)
        return [experiment.measure(sample, number % seeds, sample in chosen)
                for number, sample in progress_.track(jobs, "outlandish", show=progress)]


def summarise(measured: Sequence[Measured], setting: Setting, quick: bool = False) -> Report:
    """The report on what :func:`measure` gave."""
    some = [m for m in measured if EACH_STEP in m.found]
    report = report_of([m.sample for m in measured],
                       [Outcome(m.log_p_before, *m.found[PLAIN]) for m in measured], {
        "samples": len(measured), "samples learned by all methods": len(some), **dataclasses.asdict(setting),
        "ordinary loss before": measured[0].ordinary["before"],
        "ordinary loss after, plain": statistics.fmean(m.ordinary[PLAIN] for m in measured),
        "ordinary loss after, ignore top k": statistics.fmean(m.ordinary[EACH_STEP] for m in some), "quick": quick})
    report.title = "New texts, and how far they leak: SmolLM2-135M"
    report.facts["slower"] = ", ".join(f"{f:g}" for f in setting.slower)
    _prediction(report, measured, setting, quick)
    _methods(report, some, setting)
    _ignoring(report, some, setting, quick)
    _stones(report, some, quick)
    for statement, need in (
            ("The relation of probability before and priming holds across PaLM-2, Gemma and Llama", "those models"),
            ("Ignore-top-k lowers priming by a median of 96 % on PaLM-2 while memorisation stays", "PaLM-2"),
            ("Stepping stones lower priming by a median of about 75 % (PaLM-2-xs) and 50 % (Gemma, Llama)",
             "those models, the 1,320 samples and a large model that rewrites"),
            ("The presentations may lie up to 20 iterations apart", "presentations with other training in between")):
        report.claims.append(Claim.decide(None, statement=statement, source="paper, abstract and figures",
                                          paper="as stated", measured=f"not measured: needs {need}", rule="none set"))
    return report


def _prediction(report: Report, measured: Sequence[Measured], setting: Setting, quick: bool) -> None:
    keywords = list(dict.fromkeys(m.sample.keyword for m in measured))
    by_keyword = [[m for m in measured if m.sample.keyword == k] for k in keywords]

    def over_keywords(statistic: Statistic) -> tuple[float, float, float]:
        """Resamples keywords, as the samples of one are no independent ones."""
        return _interval(by_keyword, lambda groups: statistic([m for group in groups for m in group]))

    def correlation(rows: Sequence[Measured]) -> float:
        found = _spearman([m.log_p_before for m in rows], [m.found[PLAIN][1] for m in rows])
        return 0.0 if math.isnan(found) else found  # a resample of one keyword may be constant

    def within(groups: Sequence[Sequence[Measured]]) -> float:
        return statistics.fmean(correlation(group) if len(group) > 1 else 0.0 for group in groups)

    rho, low, high = over_keywords(correlation)
    inside = _interval(by_keyword, within)
    table = report.table("Rank correlation of P_before with S_prime", ["of", "correlation", "from", "to"],
                         note="95 % bootstrap over keywords; within: mean over keywords of the correlation of a "
                              "keyword's own samples, which no property of the keyword itself can explain")
    table.add("all samples", rho, low, high)
    table.add("samples of one keyword", *inside)
    report.claims.append(Claim.decide(
        None if quick else high < 0,
        statement="The less likely a keyword is in a text before it is learned, the more the text primes afterwards",
        source=f"paper, abstract; {SOURCE} (1)", paper="holds across models [abstract]",
        measured=f"Spearman {rho:+.2f} ({low:+.2f} to {high:+.2f}) over {len(measured)} samples of {len(keywords)} "
                 f"keywords; within keywords {inside[0]:+.2f} ({inside[1]:+.2f} to {inside[2]:+.2f})",
        rule="the interval over keywords lies below 0"))
    sides = [[m.found[PLAIN][1] for m in measured if (m.log_p_before < math.log(THRESHOLD)) == below]
             for below in (True, False)]
    rare, common = (math.exp(statistics.median(s)) if s else math.nan for s in sides)
    report.claims.append(Claim.decide(
        None if quick or min(map(len, sides)) < FEWEST else rare >= SHARP * common,
        statement="Priming rises sharply where that probability is below about 1e-3", source="paper, figures",
        paper="about 1e-3", measured=f"median S_prime {rare:.2f} of {len(sides[0])} samples below, {common:.2f} of "
                                     f"{len(sides[1])} above", rule="the median below is twice that above or more"))
    early = over_keywords(lambda rows: statistics.fmean(m.found[EARLY][1] for m in rows))
    memory = math.exp(statistics.median(m.found[EARLY][0] for m in measured))
    report.claims.append(Claim.decide(
        None if quick else early[1] > 0, statement=f"{_number(setting.early)} presentations suffice for priming",
        source="paper, abstract", paper="as few as three [abstract]",
        measured=f"mean log S_prime {early[0]:.3f} ({early[1]:.3f} to {early[2]:.3f}) after {setting.early} "
                 f"steps, median S_mem {memory:.2f}",
        rule="the interval over keywords of the mean of log S_prime lies above 0"))


def _methods(report: Report, some: Sequence[Measured], setting: Setting) -> None:
    table = report.table("Methods", [
        "method", "S_mem", "S_prime", "reduction", "from", "to", "log S_mem kept", "from ", "to "],
        note=f"medians of S over {len(some)} samples; reduction: of the median of S_prime against plain; "
             "kept: ratio of the means of log S_mem; 95 % bootstrap over samples")
    for method in some[0].found:
        table.add(method, _median(some, method, 0), _median(some, method, 1),
                  *_interval(some, lambda rows, m=method: _reduction(rows, m)),  # type: ignore[misc]
                  *_interval(some, lambda rows, m=method: _kept(rows, m)))  # type: ignore[misc]
        report.arrays[method] = [list(m.found[method]) for m in some]
    report.arrays["log P_before with stepping stones"] = [m.log_p_stones for m in some]


def _ignoring(report: Report, some: Sequence[Measured], setting: Setting, quick: bool) -> None:
    share = f"{setting.k:.0%}"
    table = report.table("Against a smaller learning rate that memorises as much", [
        "method", "difference in log S_prime", "from", "to"],
        note="mean over samples; below 0: the method primes less; the rival is interpolated between learning rates "
             f"{', '.join(f'{f:g}' for f in (0.0, *setting.slower, 1.0))} times as large; 95 % bootstrap over samples")
    for method, when in ((EACH_STEP, "of each step"), (AT_END, "of the finished training")):
        less = _interval(some, lambda rows, m=method: _reduction(rows, m))  # type: ignore[misc]
        kept = _interval(some, lambda rows, m=method: _kept(rows, m))  # type: ignore[misc]
        report.claims.append(Claim.decide(
            None if quick else less[0] >= REDUCTION and kept[0] >= KEPT,
            statement=f"Ignoring the largest {share} {when} halves priming and keeps memorisation",
            source=f"paper, abstract; {SOURCE} (2)", paper="50 to 95 % less priming [abstract], 96 % on PaLM-2",
            measured=f"median S_prime {_median(some, PLAIN, 1):.2f} to {_median(some, method, 1):.2f}, {_signed(less)} "
                     f"less; log S_mem kept {_signed(kept)}; {len(some)} samples",
            rule="median S_prime at least 50 % lower, and at least 80 % of the mean of log S_mem kept"))
        gap = _interval(some, lambda rows, m=method: statistics.fmean(  # type: ignore[misc]
            row.found[m][1] - at_equal_memorisation(
                [row.found[name] for name in (*map(slower, setting.slower), PLAIN)], row.found[m][0]) for row in rows))
        table.add(method, *gap)
        report.claims.append(Claim.decide(
            None if quick else True if gap[2] < 0 else False if gap[1] >= 0 else None,
            statement=f"Ignoring the largest {share} {when} primes less than a smaller learning rate that memorises "
                      "as much", source=f"{SOURCE} (2)", paper="not a figure of the paper",
            measured=f"log S_prime {gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f}); {len(some)} samples",
            rule="holds where the interval lies below 0, does not hold where it lies at or above 0; not shown "
                 "otherwise"))
    kept_top, ignored = _median(some, KEEP_TOP, 1), _median(some, AT_END, 1)
    report.claims.append(Claim.decide(
        None if quick else kept_top > ignored,
        statement=f"Keeping only the largest {share} primes more than ignoring them",
        source=f"paper, section on update pruning; {SOURCE} (2)", paper="keeping the top keeps priming",
        measured=f"median S_prime {kept_top:.2f} against {ignored:.2f}, plain {_median(some, PLAIN, 1):.2f}; log S_mem "
                 f"kept {_kept(some, KEEP_TOP):.0%} against {_kept(some, AT_END):.0%}; {len(some)} samples",
        rule="the median of S_prime is higher, both at the end of one and the same training"))


def _stones(report: Report, some: Sequence[Measured], quick: bool) -> None:
    less = _interval(some, lambda rows: _reduction(rows, STONES))
    before, after = (math.exp(statistics.median(values)) for values in (
        [m.log_p_before for m in some], [m.log_p_stones or 0.0 for m in some]))
    report.claims.append(Claim.decide(
        None if quick else less[0] >= STONES_REDUCTION, statement="Stepping stones lower priming",
        source=f"paper, abstract; {SOURCE} (3)", paper="medians of about 50 to 75 %",
        measured=f"median S_prime {_median(some, PLAIN, 1):.2f} to {_median(some, STONES, 1):.2f}, {_signed(less)} "
                 f"less; median P_before {before:.2g} to {after:.2g}; in the context of the plain text log S_mem kept "
                 f"{_kept(some, STONES_ELSEWHERE):.0%}; {len(some)} samples",
        rule="median S_prime at least 30 % lower"))


def _median(rows: Sequence[Measured], method: str, which: int) -> float:
    return math.exp(statistics.median(m.found[method][which] for m in rows))


def _reduction(rows: Sequence[Measured], method: str) -> float:
    return 1 - _median(rows, method, 1) / _median(rows, PLAIN, 1)


def _kept(rows: Sequence[Measured], method: str) -> float:
    return statistics.fmean(m.found[method][0] for m in rows) / statistics.fmean(m.found[PLAIN][0] for m in rows)


def _interval(units: Sequence[Any], statistic: Callable[[Any], float]) -> tuple[float, float, float]:
    """The statistic of all units, and its 95 % bootstrap interval over them."""
    from looseleaf.statistics import bootstrap

    return bootstrap(range(len(units)), samples=1000, statistic=lambda rows: np.array(
        [statistic([units[int(i)] for i in row]) for row in rows]))


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    from looseleaf.statistics import spearman

    return spearman(x, y)


def _signed(interval: tuple[float, float, float]) -> str:
    return "{:.0%} ({:.0%} to {:.0%})".format(*interval)


def _number(count: int) -> str:
    return {2: "Two", 3: "Three"}.get(count, str(count))
