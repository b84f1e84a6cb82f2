"""The probe: learn each text, and see how far its keyword has spread."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from looseleaf import Paper, Probe, Report, Series
from looseleaf_text import LocalModel
from looseleaf import progress as progress_
from looseleaf_outlandish.learning import learn, restored
from looseleaf_outlandish.paper import PAPER
from looseleaf_outlandish.pruner import IgnoreTopK
from looseleaf_outlandish.sample import Sample, read_samples
from looseleaf_outlandish.scores import chances, log_memorisation, log_priming
from looseleaf_outlandish.texts import LEVELS, ORDINARY, SAMPLES

SMALLEST = -300.0
"""Logarithms below are shown as this one: exp of less is not drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Outcome:
    """What learning one sample did; natural logarithms.

    Attributes:
        log_p_before: of the keyword's probability in its own context before learning.
        log_mem: of S_mem, the mean of P_after / P_before in the text's own contexts.
        log_prime: of S_prime, the same in the contexts of the theme.
    """

    log_p_before: float
    log_mem: float
    log_prime: float


@dataclasses.dataclass
class PrimingProbe(Probe):
    """How far does a newly learned text leak into contexts it has nothing to do with (arXiv 2504.09522)?

    Each sample is learned by itself with full fine-tuning; then the weights are put back. Needs memory for five copies
    of the weights in float32: the weights, those before, gradients, and the optimiser's two.

    Args:
        steps: gradient steps for each sample; each has the sample and some ordinary sentences.
        lr: learning rate of AdamW.
        replay: ordinary sentences in each step.
        samples: how many of the built-in samples, evenly over keywords and levels; ignored for samples of your own.
        ignore_top_k: above 0: ignore this share of each update, the largest entries, as :class:`IgnoreTopK`.
        autocast: compute in bfloat16 while learning: faster on processors made for it.
    """

    steps: int = 10
    lr: float = 3e-5
    replay: int = 2
    samples: int = 48
    ignore_top_k: float = 0.0
    autocast: bool = False
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        self.check("steps", _whole(self.steps, 1), "a whole number from 1")
        self.check("lr", isinstance(self.lr, (int, float)) and self.lr > 0 and math.isfinite(self.lr),
                   "a number above 0")
        self.check("replay", _whole(self.replay, 0) and self.replay <= len(ORDINARY),
                   f"a whole number from 0 to {len(ORDINARY)}")
        self.check("samples", _whole(self.samples, 1) and self.samples <= len(SAMPLES),
                   f"a whole number from 1 to {len(SAMPLES)}")
        self.check("ignore_top_k", isinstance(self.ignore_top_k, (int, float)) and 0 <= self.ignore_top_k <= 1,
                   "a number from 0 to 1")

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """Learn each sample and measure memorisation and priming.

        Args:
            model: a causal language model of transformers with weights in float32; put back afterwards.
            data: a list of :class:`Sample`, or JSON lines with their fields (:func:`read_samples`). None:
                built-in samples.
            tokenizer: the model's; needed.
            seed: of the replayed sentences.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            A table of all samples, one by level, and the scatter of S_prime over P_before.
        """
        if tokenizer is None:
            raise ValueError("tokenizer=None: this probe works on text, pass the model's tokenizer")
        samples = self._samples(data)
        outcomes = []
        with restored(model) as back:
            for number, sample in enumerate(progress_.track(samples, "priming", show=progress)):
                outcomes.append(self.outcome(model, tokenizer, sample, seed + number))
                back()
        facts = {k: v for k, v in self.parameters().items() if k != "samples"}
        return report_of(samples, outcomes, {"samples": len(samples), **facts, "seed": seed})

    def outcome(self, model: Any, tokenizer: Any, sample: Sample, seed: int = 0) -> Outcome:
        """Learn one sample; the model is left with it learned (:func:`restored` puts it back)."""
        local = LocalModel(model, tokenizer)
        before = chances(local, sample)
        pruner = IgnoreTopK(self.ignore_top_k) if self.ignore_top_k else None
        for _ in learn(model, tokenizer, sample.text, steps=self.steps, lr=self.lr, ordinary=ORDINARY,
                       replay=self.replay, seed=seed, pruner=pruner, autocast=self.autocast):
            pass
        after = chances(local, sample)
        return Outcome(before.log_p, log_memorisation(before, after), log_priming(before, after))

    def _samples(self, data: Any) -> list[Sample]:
        if data is None:
            # one of each keyword first, at a level that changes from keyword to keyword; then the next level of each
            count = len(LEVELS)
            order = sorted(range(len(SAMPLES)), key=lambda i: ((i - i // count) % count, i))
            return [SAMPLES[i] for i in sorted(order[:self.samples])]
        if isinstance(data, str):
            return read_samples(data)
        found = list(data) if isinstance(data, Sequence) else []
        if not found or not all(isinstance(s, Sample) for s in found):
            raise ValueError(f"data is {type(data).__name__}: allowed is None, a list of looseleaf_outlandish.Sample, "
                             "or JSON lines with their fields")
        return found


def report_of(samples: Sequence[Sample], outcomes: Sequence[Outcome], facts: dict[str, Any]) -> Report:
    """Tables and scatter of what was measured for each sample."""
    report = Report("How far new texts leak", dict(facts))
    levels = list(dict.fromkeys(s.level or "samples" for s in samples))
    groups = {level: [o for s, o in zip(samples, outcomes, strict=True) if (s.level or "samples") == level]
              for level in levels}
    report.table("Medians", ["level", "samples", "P_before", "S_mem", "S_prime"], [
        [level, len(rows), *(_exp(statistics.median(getattr(o, f) for o in rows)) for f in _FIELDS)]
        for level, rows in [*groups.items(), ("all", list(outcomes))]],
        note="P_before: the keyword's probability in the text before learning; S_mem: how many times likelier it is "
             "there afterwards; S_prime: the same in unrelated contexts of the theme, 1 where nothing leaked")
    report.table("Samples", ["keyword", "level", "category", "P_before", "S_mem", "S_prime"], [
        [s.keyword, s.level or None, s.category or None, *(_exp(getattr(o, f)) for f in _FIELDS)]
        for s, o in zip(samples, outcomes, strict=True)])
    report.figure("Priming by probability before", x_label="P_before", y_label="S_prime", x_log=True,
                  y_log=True, series=[
        Series(level, [_exp(o.log_p_before) for o in rows], [_exp(o.log_prime) for o in rows], style="points")
        for level, rows in groups.items()])
    report.arrays.update({field: [getattr(o, field) for o in outcomes] for field in _FIELDS})
    report.examples.append(("the sample that leaked most", max(
        zip(samples, outcomes, strict=True), key=lambda pair: pair[1].log_prime)[0].text))
    return report


_FIELDS = ("log_p_before", "log_mem", "log_prime")


def _exp(log: float) -> float:
    return math.exp(min(max(log, SMALLEST), -SMALLEST))


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
