"""The paper's claims on SmolLM2-135M: acronyms and counting, with looking up a word as the task without a prior."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from looseleaf import Claim, Report
from looseleaf.statistics import bootstrap
from looseleaf_lab import models
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_prior_distribution.answers import Behaviour, Slope, behaviour, bins, priors, slope
from looseleaf_prior_distribution.controls import planted
from looseleaf_prior_distribution.localisation import locate, observe, scaling
from looseleaf_prior_distribution.tasks import PriorTask, acronym, counting, middle_word, split_by_answer
from looseleaf_prior_distribution.tuning import mitigate
from looseleaf_text import LocalModel, LogitLens

LOCATED, ALPHA, BINS = 4, 0.5, 5
EPOCHS, LR = 2, 2e-4
GAIN_LIMIT, PROMPT_LIMIT = 0.20, 0.10
"""Accuracy that tuning, and the instruction, must bring; set before measuring."""
TUNED: dict[str, Callable[..., PriorTask]] = {"acronym": acronym, "middle word": middle_word}
"""Tasks that layers are tuned on: one dominated by the prior, one that is not."""
TASKS = ("counting", *TUNED)
RULE = "this project's rule"
smollm2 = functools.cache(functools.partial(models.load, "smollm2"))


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured for each seed."""

    questions: int = 192
    answers: int = 96
    counting: int = 48
    observed: int = 64
    scaled: int = 24


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One draw of answers, questions, demonstrations and of the split.

    By kind and task: ``plain``, ``instructed``, ``tuned`` and ``tuned_control`` (as many other layers) hold
    :func:`summary` of the answers, held-out ones where layers are tuned; ``layers`` the logit lens, on training
    questions where layers are tuned; ``located`` and ``control`` the layers. ``scaled``: what turning down each layer
    changes, on acronyms; of the first seed only.
    """
    model, tokenizer = smollm2()
    local, lens = LocalModel(model, tokenizer), LogitLens(model)
    out: dict[str, Any] = {kind: {} for kind in (
        "plain", "instructed", "layers", "located", "control", "tuned", "tuned_control")}

    def ask(name: str, task: PriorTask, prior: dict[str, float] | None = None) -> Behaviour:
        plain = behaviour(local, task, prior)
        out["plain"][name] = summary(plain)
        out["instructed"][name] = summary(behaviour(local, task, plain.prior, instructed=True))
        return plain

    def look(name: str, task: PriorTask, prior: dict[str, float], responses: Sequence[str]) -> list[float]:
        found = observe(local, lens, task, prior, responses)
        out["layers"][name] = {"correlation": found.correlation, "right answer": found.gold.mean(1),
                               "favoured wrong answer": found.favoured.mean(1)}
        curve: list[float] = found.correlation.tolist()
        return curve

    task = counting(scale.counting, seed=seed)
    plain = ask("counting", task)
    look("counting", task, plain.prior, plain.responses)
    for name, make in TUNED.items():
        whole = make(scale.questions, seed=seed, answers=scale.answers)
        prior = priors(local, whole)
        train, test = split_by_answer(whole, prior, seed=seed)
        ask(name, test, prior)
        seen = train.part(train.instances[:scale.observed])
        # the right answers stand for the responses: asking for the model's own among all training answers is costly
        curve = look(name, seen, prior, [i.answer for i in seen.instances])
        count = min(LOCATED, len(lens.names) // 2)
        out["located"][name] = located = locate(curve, count)
        others = [n for n in range(len(lens.names)) if n not in located]
        out["control"][name] = control = sorted(random.Random(seed).sample(others, count))
        both = [("tuned", located), ("tuned_control", control)]
        for kind, chosen in both if name == "acronym" else both[:1]:
            tuned = mitigate(model, tokenizer, train, chosen, epochs=EPOCHS, lr=LR, seed=seed, progress=False)
            with tuned.apply(model):
                out[kind][name] = summary(behaviour(local, test, prior))
        if name == "acronym" and seed == 0:
            down = scaling(local, test.part(test.instances[:scale.scaled]), prior, ALPHA, progress=False)
            out["scaled"] = {"correlation with the prior": down.correlation, "accuracy": down.accuracy}
    return out


def summary(found: Behaviour) -> dict[str, Any]:
    """What the report needs of answers: ``rows`` of prior, mark, answer and size, and means over the questions."""
    return {"rows": [[found.prior[i.answer], mark, i.answer, i.size]
                     for i, mark in zip(found.task.instances, found.correct.tolist(), strict=True)],
            "accuracy": found.accuracy, "prior gap": found.prior_gap, "surprisal": found.surprisal.mean(),
            "answers": len(found.task.answers)}


def control(scale: Scale) -> dict[str, bool]:
    """What the probe must find on :func:`controls.planted`, by name."""
    model, tokenizer, task, known = planted()
    local = LocalModel(model, tokenizer)
    made = behaviour(local, task)
    layers = observe(local, LogitLens(model), task, made.prior, made.responses)
    down = scaling(local, task, made.prior, 0.0, alternatives=len(task.answers) - 1, progress=False)
    return {"prior": all(abs(made.prior[a] - value) < 1e-4 for a, value in known.items()),
            "slope above 0": made.slope().positive, "located": locate(layers.correlation.tolist(), 1) == [3],
            "right without the prior": down.accuracy[3] == 1.0,
            "wrong without copying": abs(down.accuracy[0] - 1 / len(task.answers)) < 1e-9}


def pooled(results: Results, kind: str, name: str, equal_size: bool = False) -> Slope:
    """The slope over the questions of all seeds; an answer that several seeds ask for is one answer."""
    prior, correct, answers, size = zip(*results.joined(kind, name, "rows"), strict=True)
    return slope(prior, correct, answers, size if equal_size else None)


def gain(results: Results, kind: str, name: str) -> list[float]:
    """Accuracy above that of the plain model, for each seed."""
    return [a - b for a, b in zip(results.values(kind, name, "accuracy"), results.values("plain", name, "accuracy"),
                                  strict=True)]


def peaks(curves: Sequence[Sequence[float]]) -> list[float]:
    """Each seed's correlation at the layer where the mean of the other seeds is highest: the choice of the layer does
    not see the seed it is measured on."""
    rows = np.asarray(curves)
    if len(rows) == 1:
        return [float(rows.max())]
    return [float(rows[n, np.delete(rows, n, 0).mean(0).argmax()]) for n in range(len(rows))]


def show(report: Report, results: Results) -> None:
    """Accuracy over the prior, the logit lens, layers turned down, and tuning."""
    report.facts |= {
        "model": "SmolLM2-135M-Instruct, float32", "layers tuned": LOCATED, "epochs": EPOCHS, "learning rate": LR,
        "questions for each seed": ", ".join(f"{name} {len(found['rows'])} of {found['answers']} answers"
                                             for name, found in results.rows[0]["plain"].items())}
    prompts = {"plain": "plain", "with the instruction": "instructed"}
    gaps = {(name, kind): [gap for gap in results.values(kind, name, "prior gap") if gap is not None]
            for name in TASKS for kind in prompts.values()}
    add_table(report, "Accuracy and slope on the prior", (
        {"task": name, "prompt": label, "accuracy": results.interval(kind, name, "accuracy"),
         "slope": pooled(results, kind, name), "slope at equal size": pooled(results, kind, name, equal_size=True),
         "prior gap": float(np.mean(gaps[name, kind])) if gaps[name, kind] else None}
        for name in TASKS for label, kind in prompts.items()),
        "accuracy: mean over seeds, 95 % bootstrap over seeds; slope: logistic, per nat of log prior a token, over the "
        "questions of all seeds, 95 % bootstrap over answers; prior gap: log prior of wrong answers given less that of "
        "the right ones")
    for name in TASKS:
        plain, instructed = (results.joined(kind, name, "rows") for kind in prompts.values())
        groups = bins([row[0] for row in plain], [[row[1] for row in rows] for rows in (plain, instructed)], BINS)
        report.figure(f"{name}: accuracy over the prior", x_label="log prior of the right answer, nats per token",
                      y_label="accuracy", series=[
                          curve(label, [x for x, _, _ in groups], [means[k] for _, _, means in groups])
                          for k, label in enumerate(("plain prompt", "with the instruction"))])
        add_table(report, f"{name}: gain of the instruction by prior", (
            {"log prior": x, "questions": n, "plain": without, "instruction": given, "gain": given - without}
            for x, n, (without, given) in groups))
    first, layers = results.rows[0], range(len(results.rows[0]["layers"]["acronym"]["correlation"]))
    for name in TASKS:
        report.figure(f"{name}: logit lens", x_label="layer", y_label="log-likelihood, nats per token", series=[
            curve(label, layers, np.mean(results.values("layers", name, label), 0), "line")
            for label in ("right answer", "favoured wrong answer")])
    report.figure("Correlation of the logit lens with the prior", x_label="layer", y_label="correlation over questions",
                  series=[curve(name, layers, [results.interval("layers", name, "correlation", n) for n in layers],
                                "line") for name in TASKS], note="right answers; mean over seeds, 95 % bootstrap")
    add_table(report, "Located layers", (
        {"seed": seed, "task": name, "located": ", ".join(map(str, row["located"][name])),
         "control": ", ".join(map(str, row["control"][name])) if name in row["tuned_control"] else None}
        for seed, row in zip(results.seeds, results.rows, strict=True) for name in TUNED))
    scaled = {title: {int(n): value for n, value in values.items()} for title, values in first["scaled"].items()}
    for title, values in scaled.items():
        report.figure(f"acronym: {title} with one layer turned down", x_label="layer", y_label=title, series=[
            curve(f"contribution times {ALPHA:g}", layers, [values[n] for n in layers], "line"),
            curve("as it is", [0, layers[-1]], [values[-1]] * 2, "line")], note="seed 0")
    located = first["located"]["acronym"]
    report.table("acronym: layers turned down", ["layers", "correlation", "accuracy"],
                 [[label, *(float(np.mean([values[n] for n in chosen])) for values in scaled.values())]
                  for label, chosen in (("none", [-1]), ("one of the located", located),
                                        ("one of the others", [n for n in layers if n not in located]))],
                 note=f"contribution times {ALPHA:g}, one layer at a time, means; accuracy against the 5 wrong answers "
                      "with the highest prior; seed 0")
    add_table(report, "Tuning four layers, answers never trained on", (
        {"task": name, "layers": label, "accuracy": results.interval(kind, name, "accuracy"),
         "slope": pooled(results, kind, name), "surprisal": results.mean(kind, name, "surprisal")}
        for name in TUNED for label, kind in (("none", "plain"), ("located", "tuned"), ("control", "tuned_control"))
        if name in first[kind]),
        "accuracy: mean over seeds, 95 % bootstrap over seeds; slope over the questions of all seeds, 95 % bootstrap "
        "over answers; the prior is that of the model before tuning; surprisal: mean negative log-probability of the "
        "right answer among the answers, nats")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, several = functools.partial(results.claim, count="seeds"), len(results.seeds) > 1
    yield results.claim("On a model with a planted prior and a copying circuit the probe finds both", RULE, "-",
                        "prior within 1e-4 nats; located layer the planted one; all right without it, one in 16 "
                        "without copying", all(results.once.values()),
                        ", ".join(f"{k}: {v}" for k, v in results.once.items()))
    slopes = {name: pooled(results, "plain", name) for name in ("counting", "acronym")}
    yield claim("On some tasks the model is right more often where the right answer is likely beforehand",
                f"paper, abstract; {RULE}", "prior-dominated tasks exist [abstract]",
                "95 % interval of the slope above 0 on counting or acronyms", any(s.positive for s in slopes.values()),
                "slope " + ", ".join(f"{name} {found:+.3f}" for name, found in slopes.items()))
    gains = {name: bootstrap(gain(results, "instructed", name)) for name in ("counting", "acronym")}
    better = any(g.value >= PROMPT_LIMIT and g.low > 0 for g in gains.values())
    yield claim("Telling the model not to rely on prior knowledge gives dramatic improvements", "paper, abstract",
                "dramatic improvements on prior-dominated tasks [abstract]",
                "10 points or more with the interval above 0, on counting or acronyms; else not shown at this scale, "
                "as a model of 135M parameters may not follow the instruction", better or None,
                ", ".join(f"{name} {g:+.1%}" for name, g in gains.items()))
    found = bootstrap(peaks(results.values("layers", "acronym", "correlation")))
    yield claim("There are layers whose activity correlates with the prior of the response", "paper, abstract",
                "such layers exist [abstract]", "acronyms: interval over seeds above 0 at the layer with the highest "
                "mean correlation over other seeds", found.low > 0 if several else None,
                f"correlation {found:.2f} at the layer that the other seeds point to")
    ours = gain(results, "tuned", "acronym")
    up = bootstrap(ours)
    yield claim("Tuning the located layers reaches high held-out accuracy", f"paper, abstract; {RULE}",
                "high accuracy on answers not trained on [abstract]",
                "held-out accuracy up by 20 points or more, mean over seeds", up.value >= GAIN_LIMIT,
                f"acronyms {up:+.1%}, to {results.interval('tuned', 'acronym', 'accuracy'):.1%}")
    after = pooled(results, "tuned", "acronym")
    yield claim("After tuning, errors are no longer correlated with the prior", "paper, abstract",
                "no longer correlated with the prior [abstract]", "95 % interval of the slope has 0 in it",
                after.covers_zero, f"slope {after:+.3f}, before {slopes['acronym']:+.3f}")
    for statement, source, paper, kind, name, what in (
            ("Tuning the located layers does more than tuning as many others", RULE, "-", "tuned_control", "acronym",
             "control layers"),
            ("Tuning helps far more on tasks dominated by the prior", "paper, abstract", "far more [abstract]", "tuned",
             "middle word", "looking up the middle word")):
        theirs = gain(results, kind, name)
        gap = bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])
        yield claim(statement, source, paper, "interval over seeds of the difference in gains above 0",
                    gap.low > 0 if several else None,
                    f"acronyms {up:+.1%}, {what} {bootstrap(theirs):+.1%}, difference {gap:+.1%}")


study = Study("Influence of the prior on SmolLM2-135M-Instruct", measure, claims, show, once=control, full=Scale(),
              quick=Scale(questions=64, answers=32, counting=20, observed=24, scaled=4), quick_seeds=1)
