"""The paper's claims on SmolLM2-135M: acronyms and counting, with looking up a word as the task without a prior."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from looseleaf import Claim, Report, Series
from looseleaf_text import LocalModel, LogitLens
from looseleaf import progress as progress_
from looseleaf.statistics import bootstrap
from looseleaf_prior_distribution.answers import Behaviour, behaviour
from looseleaf_prior_distribution.controls import planted
from looseleaf_prior_distribution.generators import acronym, counting, middle_word
from looseleaf_prior_distribution.localisation import Layers, Scaled, locate, observe, scaling
from looseleaf_prior_distribution.scoring import priors
from looseleaf_prior_distribution.statistics import Slope, bins, slope
from looseleaf_prior_distribution.tasks import PriorTask, split_by_answer
from looseleaf_prior_distribution.tuning import mitigate

LOCATED, ALPHA, BINS = 4, 0.5, 5
EPOCHS, LR = 2, 2e-4
GAIN_LIMIT, PROMPT_LIMIT = 0.20, 0.10
"""Points of accuracy that tuning, and the instruction, must bring; set before measuring."""
TUNED: dict[str, Callable[..., PriorTask]] = {"acronym": acronym, "middle word": middle_word}
"""Tasks that layers are tuned on: one dominated by the prior, one that is not."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured for each seed."""

    questions: int = 192
    answers: int = 96
    counting: int = 48
    observed: int = 64
    scaled: int = 24


QUICK = Sizes(questions=64, answers=32, counting=20, observed=24, scaled=4)


@dataclasses.dataclass
class Seed:
    """What one seed gave, by task.

    Attributes:
        plain, careful: answers to the plain prompt and with the instruction; of the held-out answers where layers are
            tuned.
        layers: the logit lens, on training questions where layers are tuned.
        located, control: the layers located, and as many others drawn at random.
        tuned, tuned_control: answers after tuning the one and the other; the other on acronyms only.
        loss: of the located layers, by epoch.
        scaled: what turning down each layer changes, on acronyms; of the first seed only.
    """

    plain: dict[str, Behaviour] = dataclasses.field(default_factory=dict)
    careful: dict[str, Behaviour] = dataclasses.field(default_factory=dict)
    layers: dict[str, Layers] = dataclasses.field(default_factory=dict)
    located: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    control: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    tuned: dict[str, Behaviour] = dataclasses.field(default_factory=dict)
    tuned_control: dict[str, Behaviour] = dataclasses.field(default_factory=dict)
    loss: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    scaled: Scaled | None = None


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure what the paper claims, at the scale of a 135M model.

    Args:
        seeds: draws of answers, questions, demonstrations and of the split.
        quick: one draw and a third of the questions; its claims are not decided.
        progress: show a progress bar; None: only on a terminal.
    """
    from looseleaf_lab import models

    model, tokenizer = models.load("smollm2")
    sizes = QUICK if quick else Sizes()
    measured = [measure(model, tokenizer, seed, sizes)
                for seed in progress_.track(range(1 if quick else seeds), "seeds", show=progress)]
    report = summarise(measured, decided=not quick)
    report.facts = {"model": "SmolLM2-135M-Instruct, float32", **report.facts}
    return report


def measure(model: Any, tokenizer: Any, seed: int, sizes: Sizes = Sizes()) -> Seed:
    """Everything for one seed.

    Args:
        model, tokenizer: a causal language model of transformers.
        seed: the only source of randomness.
        sizes: how much.
    """
    local, lens = LocalModel(model, tokenizer), LogitLens(model)
    out = Seed()
    task = counting(sizes.counting, seed=seed)
    out.plain["counting"] = plain = behaviour(local, task)
    out.careful["counting"] = behaviour(local, task, plain.prior, careful=True)
    out.layers["counting"] = observe(local, lens, task, plain.prior, plain.responses)
    for name, make in TUNED.items():
        whole = make(sizes.questions, seed=seed, answers=sizes.answers)
        prior = priors(local, whole)
        train, test = split_by_answer(whole, prior, seed=seed)
        out.plain[name] = behaviour(local, test, prior)
        out.careful[name] = behaviour(local, test, prior, careful=True)
        seen = train.part(train.instances[:sizes.observed])
        # the right answers stand for the responses: asking for the model's own among all training answers is costly
        out.layers[name] = found = observe(local, lens, seen, prior, [i.answer for i in seen.instances])
        count = min(LOCATED, len(lens.names) // 2)
        out.located[name] = locate(found.correlation.tolist(), count)
        others = [n for n in range(len(lens.names)) if n not in out.located[name]]
        out.control[name] = sorted(random.Random(seed).sample(others, count))
        both = [(out.located[name], out.tuned), (out.control[name], out.tuned_control)]
        for chosen, into in both if name == "acronym" else both[:1]:
            tuned = mitigate(model, tokenizer, train, chosen, epochs=EPOCHS, lr=LR, seed=seed, progress=False)
            if into is out.tuned:
                out.loss[name] = tuned.info["loss"]
            with tuned.apply(model):
                into[name] = behaviour(local, test, prior)
        if name == "acronym" and seed == 0:
            part = test.part(test.instances[:sizes.scaled])
            out.scaled = scaling(local, part, prior, ALPHA, progress=False)
    return out


def summarise(measured: Sequence[Seed], decided: bool = True) -> Report:
    """The report on what :func:`measure` gave for each seed; ``decided=False`` leaves every claim open."""
    report = Report("Influence of the prior on SmolLM2-135M-Instruct", {
        "seeds": len(measured), "layers tuned": LOCATED, "epochs": EPOCHS, "learning rate": LR,
        "questions for each seed": ", ".join(
            f"{name} {len(found.task.instances)} of {len(found.task.answers)} answers"
            for name, found in measured[0].plain.items())})
    slopes = {name: _pooled([s.plain[name] for s in measured]) for name in measured[0].plain}
    _accuracy(report, measured, slopes)
    _lens(report, measured)
    _tuning(report, measured)
    _claims(report, measured, slopes, decided)
    return report


def _pooled(found: Sequence[Behaviour], equal_size: bool = False) -> Slope:
    """The slope over the questions of all seeds; an answer that several seeds ask for is one answer."""
    rows = [(f.prior[i.answer], mark, i.answer, i.size)
            for f in found for i, mark in zip(f.task.instances, f.correct.tolist(), strict=True)]
    prior, marks, answers, size = zip(*rows, strict=True)
    return slope(prior, marks, answers, size if equal_size else None)


def _mean(found: Sequence[float], signed: bool = False) -> str:
    mean, low, high = bootstrap(found)
    return f"{mean:+.1%} ({low:+.1%} to {high:+.1%})" if signed else f"{mean:.1%} ({low:.1%} to {high:.1%})"


def _accuracy(report: Report, measured: Sequence[Seed], slopes: dict[str, Slope]) -> None:
    table = report.table("Accuracy and slope on the prior", [
        "task", "prompt", "accuracy", "low", "high", "slope", "low", "high", "slope at equal size", "low", "high",
        "pull"],
        note="accuracy: mean over seeds, 95 % bootstrap over seeds; slope: logistic, per nat of log prior a token, "
             "over the questions of all seeds, 95 % bootstrap over answers; pull: log prior of wrong answers given "
             "less that of the right ones")
    for name in slopes:
        for label, seeds in (("plain", [s.plain[name] for s in measured]),
                             ("with the instruction", [s.careful[name] for s in measured])):
            one, two = _pooled(seeds), _pooled(seeds, equal_size=True)
            pulls = [f.pull for f in seeds if f.pull is not None]
            table.add(name, label, *bootstrap([f.accuracy for f in seeds]), one.value, one.low, one.high, two.value,
                      two.low, two.high, float(np.mean(pulls)) if pulls else None)
        plain, careful = ([b for s in measured for b in getattr(s, kind)[name].correct.tolist()]
                          for kind in ("plain", "careful"))
        prior = [p for s in measured for p in s.plain[name].gold_prior]
        groups = bins(prior, [plain, careful], BINS)
        xs = [x for x, _, _ in groups]
        report.figure(f"{name}: accuracy over the prior", x_label="log prior of the right answer, nats a token",
                      y_label="accuracy", series=[Series("plain prompt", xs, [m[0] for _, _, m in groups]),
                                                  Series("with the instruction", xs, [m[1] for _, _, m in groups])])
        report.table(f"{name}: gain of the instruction by prior",
                     ["log prior", "questions", "plain", "instruction", "gain"],
                     [[x, n, *m, m[1] - m[0]] for x, n, m in groups])


def _lens(report: Report, measured: Sequence[Seed]) -> None:
    count = len(next(iter(measured[0].layers.values())).correlation)
    xs = [float(n) for n in range(count)]
    lines = []
    for name in measured[0].layers:
        rows = [bootstrap([float(s.layers[name].correlation[n]) for s in measured]) for n in range(count)]
        lines.append(Series(name, xs, [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], style="line"))
        report.figure(f"{name}: logit lens", x_label="layer", y_label="log-likelihood, nats a token", series=[
            Series(label, xs, np.mean([getattr(s.layers[name], kind).mean(1) for s in measured], 0).tolist(),
                   style="line") for label, kind in (("right answer", "gold"), ("favoured wrong answer", "favoured"))])
    report.figure("Correlation of the logit lens with the prior", x_label="layer", y_label="correlation over questions",
                  series=lines, note="right answers; mean over seeds, 95 % bootstrap")
    report.table("Located layers", ["seed", "task", "located", "control"],
                 [[n, name, ", ".join(map(str, s.located[name])),
                   ", ".join(map(str, s.control[name])) if name in s.tuned_control else None]
                  for n, s in enumerate(measured) for name in s.located])
    scaled = measured[0].scaled
    if scaled is not None:
        for title, found in (("correlation with the prior", scaled.correlation), ("accuracy", scaled.accuracy)):
            report.figure(f"acronym: {title} with one layer turned down", x_label="layer", y_label=title, series=[
                Series(f"contribution times {ALPHA:g}", xs, [found[n] for n in range(count)], style="line"),
                Series("as it is", [0.0, xs[-1]], [found[-1], found[-1]], style="line")], note="seed 0")
        located = measured[0].located["acronym"]
        table = report.table(
            "acronym: layers turned down", ["layers", "correlation", "accuracy"],
            [["none", scaled.correlation[-1], scaled.accuracy[-1]]],
            note=f"contribution times {ALPHA:g}, one layer at a time, means; accuracy against the 5 wrong answers with "
                 "the highest prior; seed 0")
        for label, chosen in (("one of the located", located),
                              ("one of the others", [n for n in range(count) if n not in located])):
            table.add(label, float(np.mean([scaled.correlation[n] for n in chosen])),
                      float(np.mean([scaled.accuracy[n] for n in chosen])))


def _tuning(report: Report, measured: Sequence[Seed]) -> None:
    table = report.table("Tuning four layers, answers never trained on", [
        "task", "layers", "accuracy", "low", "high", "slope", "low", "high", "surprise"],
        note="accuracy: mean over seeds, 95 % bootstrap over seeds; slope over the questions of all seeds, 95 % "
             "bootstrap over answers; the prior is that of the model before tuning; surprise: mean negative "
             "log-probability of the right answer among the answers, nats")
    for name in measured[0].tuned:
        for label, kind in (("none", "plain"), ("located", "tuned"), ("control", "tuned_control")):
            seeds = [getattr(s, kind)[name] for s in measured if name in getattr(s, kind)]
            if seeds:
                found = _pooled(seeds)
                table.add(name, label, *bootstrap([f.accuracy for f in seeds]), found.value, found.low, found.high,
                          float(np.mean([f.surprise.mean() for f in seeds])))


def _gain(measured: Sequence[Seed], kind: str, name: str) -> list[float]:
    return [getattr(s, kind)[name].accuracy - s.plain[name].accuracy for s in measured]


def _claims(report: Report, measured: Sequence[Seed], slopes: dict[str, Slope], decided: bool) -> None:
    draws = f"{len(measured)} seeds"

    def claim(holds: bool | None, **fields: str) -> None:
        report.claims.append(Claim.decide(holds if decided else None, **fields))

    control = run_control()
    claim(all(control.values()), statement="On a model with a planted prior and a copying circuit the probe finds both",
          source="this project's rule", paper="-", measured=", ".join(f"{k}: {v}" for k, v in control.items()),
          rule="prior within 1e-4 nats; located layer the planted one; all right without it, one in 16 without copying")
    hard = {name: found for name, found in slopes.items() if name != "middle word"}
    claim(any(found.positive for found in hard.values()),
          statement="On some tasks the model is right more often where the right answer is likely beforehand",
          source="paper, abstract; this project's rule", paper="prior-dominated tasks exist [abstract]",
          measured="slope " + ", ".join(f"{name} {found}" for name, found in hard.items()) + f"; {draws}",
          rule="95 % interval of the slope above 0 on counting or acronyms")
    gains = {name: [s.careful[name].accuracy - s.plain[name].accuracy for s in measured] for name in hard}
    better = any(bootstrap(g)[0] >= PROMPT_LIMIT and bootstrap(g)[1] > 0 for g in gains.values())
    claim(True if better else None,
          statement="Telling the model not to rely on prior knowledge gives dramatic improvements",
          source="paper, abstract", paper="dramatic improvements on prior-dominated tasks [abstract]",
          measured=", ".join(f"{name} {_mean(g, True)}" for name, g in gains.items()) + f"; {draws}",
          rule="10 points or more with the interval above 0, on counting or acronyms; else not shown at this scale, "
               "as a model of 135M parameters may not follow the instruction")
    peaks = _peaks(measured, "acronym")
    claim(bootstrap(peaks)[1] > 0 if len(measured) > 1 else None,
          statement="There are layers whose activity correlates with the prior of the response",
          source="paper, abstract", paper="such layers exist [abstract]",
          measured=f"correlation {bootstrap(peaks)[0]:.2f} ({bootstrap(peaks)[1]:.2f} to {bootstrap(peaks)[2]:.2f}) at "
                   f"the layer that the other seeds point to; {draws}",
          rule="acronyms: interval over seeds above 0 at the layer with the highest mean correlation over other seeds")
    tuned, other, easy = (_gain(measured, *which) for which in (
        ("tuned", "acronym"), ("tuned_control", "acronym"), ("tuned", "middle word")))
    claim(bootstrap(tuned)[0] >= GAIN_LIMIT,
          statement="Tuning the located layers reaches high held-out accuracy",
          source="paper, abstract; this project's rule", paper="high accuracy on answers not trained on [abstract]",
          measured=f"acronyms {_mean(tuned, True)}, to {_mean([s.tuned['acronym'].accuracy for s in measured])}; "
                   f"{draws}",
          rule="held-out accuracy up by 20 points or more, mean over seeds")
    after = _pooled([s.tuned["acronym"] for s in measured])
    claim(after.covers_zero, statement="After tuning, errors no longer go with the prior",
          source="paper, abstract", paper="no longer correlated with the prior [abstract]",
          measured=f"slope {after}, before {slopes['acronym']}; {draws}", rule="95 % interval of the slope has 0 in it")
    for statement, source, paper, rival, what in (
            ("Tuning the located layers does more than tuning as many others", "this project's rule", "-", other,
             "control layers"),
            ("Tuning helps far more on tasks dominated by the prior", "paper, abstract", "far more [abstract]", easy,
             "looking up the middle word")):
        gap = [a - b for a, b in zip(tuned, rival, strict=True)]
        claim(bootstrap(gap)[1] > 0 if len(measured) > 1 else None, statement=statement, source=source, paper=paper,
              measured=f"acronyms {_mean(tuned, True)}, {what} {_mean(rival, True)}, difference {_mean(gap, True)}; "
                       f"{draws}",
              rule="interval over seeds of the difference in gains above 0")


def _peaks(measured: Sequence[Seed], name: str) -> list[float]:
    """Each seed's correlation at the layer where the mean of the other seeds is highest: the choice of the layer does
    not see the seed it is measured on."""
    curves = np.stack([s.layers[name].correlation for s in measured])
    if len(curves) == 1:
        return [float(curves.max())]
    return [float(curves[n, np.delete(curves, n, 0).mean(0).argmax()]) for n in range(len(curves))]


def run_control() -> dict[str, bool]:
    """What the probe must find on :func:`controls.planted`, by name."""
    model, tokenizer, task, known = planted()
    local = LocalModel(model, tokenizer)
    made = behaviour(local, task)
    layers = observe(local, LogitLens(model), task, made.prior, made.responses)
    down = scaling(local, task, made.prior, 0.0, rivals=len(task.answers) - 1, progress=False)
    return {"prior": all(abs(made.prior[a] - value) < 1e-4 for a, value in known.items()),
            "slope above 0": made.slope().positive, "located": locate(layers.correlation.tolist(), 1) == [3],
            "right without the prior": down.accuracy[3] == 1.0,
            "wrong without copying": abs(down.accuracy[0] - 1 / len(task.answers)) < 1e-9}
