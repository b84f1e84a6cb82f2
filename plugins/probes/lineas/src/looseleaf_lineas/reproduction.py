"""LinEAS's claims on SmolLM2-135M: from gloomy to cheerful sentences, judged by a sentiment lexicon."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from looseleaf import Claim, Report, Series
from looseleaf import progress as progress_
from looseleaf_lineas import examples
from looseleaf_lineas.baselines import difference_in_means, lin_act
from looseleaf_lineas.probe import STRENGTHS, LinEAS, continuations
from looseleaf_lineas.steering import Steering

SENTENCES, PERPLEXITY_TOKENS, NEW_TOKENS = 32, 256, 20
QUICK_STEPS = 8
LAMBDA_1 = 1e-3
"""Of the sparse fit, set before the seeds were measured."""
LOSS_LIMIT, LAYERS_LIMIT, SPARSITY_LIMIT, EFFECT_LIMIT = 0.30, 0.90, 0.80, 0.70
BEGINNINGS = [
    *examples.PROMPTS, "In the kitchen there was", "The man at the counter told me that", "Yesterday the weather",
    "My new colleague is", "The book is about", "When she opened the door", "Our trip to the city", "I think that life"]


Point = tuple[float, float]
"""Sentiment of the continuations, and perplexity."""


@dataclasses.dataclass
class Seed:
    """What one draw of sentences gave.

    Attributes:
        curves: method -> one point for each strength.
        loss: LinEAS's loss at each step.
        nearer: share of the layers whose distance is smaller after than before.
        matched: rival -> strength at which it costs as much perplexity as LinEAS at strength 1, and its point there.
        sparse: of the sparse fit: share of coordinates at the identity, sentiment and perplexity at strength 1.
    """

    curves: dict[str, list[Point]]
    matched: dict[str, tuple[float, Point]]
    loss: list[float]
    nearer: float
    sparse: tuple[float, float, float]


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure what the paper claims, at the scale of a 135M model.

    Args:
        seeds: draws of 32 + 32 sentences.
        quick: one draw, 8 steps, strengths 0, 0.5 and 1, half the continuations; its claims are not decided.
        progress: show a progress bar; None: only on a terminal.
    """
    from looseleaf_lab import models

    model, tokenizer = models.load("smollm2")
    measured = [measure(model, tokenizer, seed, quick)
                for seed in progress_.track(range(1 if quick else seeds), "seeds", show=progress)]
    return summarise(measured, quick)


def measure(model: Any, tokenizer: Any, seed: int, quick: bool = False) -> Seed:
    """One draw of sentences: fit LinEAS, a sparse LinEAS and the rivals, and continue the neutral beginnings.

    Args:
        model, tokenizer: SmolLM2.
        seed: of the draw; nothing else is random.
        quick: as for :func:`reproduce`.
    """
    from looseleaf_lab import data
    from looseleaf_lab.metrics import perplexity

    judge = importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    draw = random.Random(seed)
    source = draw.sample(examples.SOURCE + examples.MORE_SOURCE, SENTENCES)
    target = draw.sample(examples.TARGET + examples.MORE_TARGET, SENTENCES)
    prompts = BEGINNINGS[:8] if quick else BEGINNINGS
    ids = data.prose_ids(tokenizer, PERPLEXITY_TOKENS, "evaluation").flatten()

    def cost(steering: Steering, strength: float) -> float:
        with steering.apply(model, strength):
            return perplexity(model, ids, PERPLEXITY_TOKENS, progress=False).value

    def point(steering: Steering, strength: float) -> Point:
        with steering.apply(model, strength):
            texts = continuations(model, tokenizer, prompts, NEW_TOKENS)
        scores = [judge.polarity_scores(t[len(p):])["compound"] for t, p in zip(texts, prompts, strict=True)]
        return sum(scores) / len(scores), cost(steering, strength)

    plugin = LinEAS(steps=QUICK_STEPS) if quick else LinEAS()
    fitted = plugin.fit(model, source, target, tokenizer, progress=False)
    methods = {"LinEAS": fitted, "difference in means": difference_in_means(model, source, target, tokenizer),
               "Lin-AcT": lin_act(model, source, target, tokenizer)}
    plain = point(fitted, 0.0)  # strength 0 is the plain model, whatever the method
    curves = {name: [plain, *(point(made, strength) for strength in _strengths(quick)[1:])]
              for name, made in methods.items()}
    matched = {}
    for name in methods.keys() - {"LinEAS"}:
        strength = as_dear(lambda s, made=methods[name]: cost(made, s), curves["LinEAS"][-1][1])  # type: ignore[misc]
        matched[name] = (strength, point(methods[name], strength))
    sparse = dataclasses.replace(plugin, lambda_1=LAMBDA_1).fit(model, source, target, tokenizer, progress=False)
    distances = fitted.info["w2"].values()
    nearer = sum(after < before for before, after in distances) / len(distances)
    return Seed(curves, matched, fitted.info["loss"], nearer, (sparse.sparsity(), *point(sparse, 1.0)))


def as_dear(cost: Callable[[float], float], limit: float, halvings: int = 7) -> float:
    """The largest strength up to 1 whose cost is at most ``limit``, by bisection; costs rise with the strength."""
    if cost(1.0) <= limit:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def summarise(measured: Sequence[Seed], quick: bool = False) -> Report:
    """The report on what :func:`measure` gave for each draw."""
    plugin = LinEAS(steps=QUICK_STEPS) if quick else LinEAS()
    report = Report("LinEAS on SmolLM2-135M-Instruct", {
        "model": "SmolLM2-135M-Instruct, float32", "sentences": f"{SENTENCES} + {SENTENCES}", "seeds": len(measured),
        **plugin.hyperparameters(), "sparse fit, lambda_1": LAMBDA_1,
        "judge": "VADER compound score of greedy continuations, -1 to 1",
        "continuations": f"{8 if quick else len(BEGINNINGS)} of {NEW_TOKENS} tokens"})
    _curves(report, measured, quick)
    _claims(report, measured, quick)
    return report


def _strengths(quick: bool) -> tuple[float, ...]:
    return (0.0, 0.5, 1.0) if quick else STRENGTHS


def _curves(report: Report, measured: Sequence[Seed], quick: bool) -> None:
    from looseleaf.statistics import bootstrap

    strengths = _strengths(quick)
    table = report.table("Effect of strength", ["method", "strength", "sentiment", "low", "high", "perplexity"],
                         note=f"means over seeds, 95 % bootstrap; perplexity on {PERPLEXITY_TOKENS} tokens of "
                              "technical prose, median over seeds")
    lines = []
    for name in measured[0].curves:
        rows = [bootstrap([seed.curves[name][i][0] for seed in measured]) for i in range(len(strengths))]
        for i, strength in enumerate(strengths):
            table.add(name, strength, *rows[i], statistics.median(seed.curves[name][i][1] for seed in measured))
        lines.append(Series(name, list(strengths), [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
    report.figure("Sentiment of continuations", x_label="strength", y_label="VADER compound", series=lines)
    report.figure("Loss of LinEAS", x_label="step", y_label="squared W2, sum over layers", y_log=True, series=[
        Series(f"seed {i}", [float(n) for n in range(len(seed.loss))], seed.loss, style="line")
        for i, seed in enumerate(measured)])


def _claims(report: Report, measured: Sequence[Seed], quick: bool) -> None:
    from looseleaf.statistics import bootstrap

    ours = [seed.curves["LinEAS"] for seed in measured]
    strengths, draws = _strengths(quick), f"{len(measured)} seeds"
    means = [sum(points[i][0] for points in ours) / len(ours) for i in range(len(strengths))]
    report.claims.append(Claim.decide(
        None if quick else all(a < b for a, b in itertools.pairwise(means)),
        statement="The effect grows with the strength", source="paper, strength of the steering; this project's rule",
        paper="-", measured=", ".join(f"{s:g}: {m:+.3f}" for s, m in zip(strengths, means, strict=True)) + f"; {draws}",
        rule="mean sentiment over seeds rises at each step of strength 0, 0.25, 0.5, 0.75, 1"))
    for rival in ("difference in means", "Lin-AcT"):
        gaps = [seed.curves["LinEAS"][-1][0] - seed.matched[rival][1][0] for seed in measured]
        strength = sum(seed.matched[rival][0] for seed in measured) / len(measured)
        mean, low, high = bootstrap(gaps)
        report.claims.append(Claim.decide(
            None if quick else mean >= 0,
            statement=f"LinEAS does at least as well as {rival} at equal or lower perplexity",
            source="paper, tables", paper="better than CAA and Lin-AcT on toxicity [abstract]",
            measured=f"sentiment {mean:+.3f} ({low:+.3f} to {high:+.3f}) against the rival at strength "
                     f"{strength:.2f}; {draws}",
            rule="mean difference 0 or more, the rival at the largest strength that costs no more perplexity than "
                 "LinEAS at strength 1"))
    ratio, low, high = bootstrap([seed.loss[-1] / seed.loss[0] for seed in measured])
    nearer = min(seed.nearer for seed in measured)
    for holds, statement, found, rule in (
            (ratio < LOSS_LIMIT, "The loss falls far", f"to {ratio:.3f} ({low:.3f} to {high:.3f}) of its start",
             "mean loss below 30 % of its start"),
            (nearer >= LAYERS_LIMIT, "The distributions come nearer in every layer",
             f"nearer at {nearer:.1%} of layers in the worst seed", "squared W2 smaller at 90 % of layers")):
        report.claims.append(Claim.decide(
            None if quick else holds, statement=statement, source="this project's rule", paper="-",
            measured=f"{found}; {draws}, {len(measured[0].loss) - 1} steps", rule=rule))
    full = means[-1] - means[0]
    at, score, ppl = (sum(seed.sparse[i] for seed in measured) / len(measured) for i in range(3))
    share = (score - means[0]) / full if full > 0 else float("nan")
    report.table("Sparse steering", ["lambda_1", "at identity", "effect", "share of the full effect", "perplexity"],
                 [[LAMBDA_1, at, score - means[0], share, ppl]], note="strength 1, means over seeds")
    report.claims.append(Claim.decide(
        None if quick or not full > 0 else at >= SPARSITY_LIMIT and share >= EFFECT_LIMIT,
        statement="Sparse regularisation leaves most coordinates alone with little loss of effect",
        source="paper, abstract", paper="few neurons, little loss of effect [abstract]",
        measured=f"{at:.1%} at the identity with {share:.1%} of the effect at lambda_1 {LAMBDA_1:g}; {draws}",
        rule="80 % or more at the identity with 70 % or more of the effect"))
    for statement, need in (
            ("On three models of 1.5B to 7B, 32 + 32 sentences mitigate toxicity better than ITI-c, CAA and Lin-AcT",
             "models of 1.5B and more"), ("The method carries over to text-to-image models", "a text-to-image model")):
        report.claims.append(Claim.decide(
            None, statement=statement, source="paper, abstract and tables", paper="figures not copied here",
            measured=f"not measured: needs {need}", rule="none set"))
