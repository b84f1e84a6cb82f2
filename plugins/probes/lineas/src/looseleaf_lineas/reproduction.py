"""LinEAS's claims on SmolLM2-135M: from negative to positive sentences, judged by a sentiment lexicon."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from looseleaf import Claim, Report, Series
from looseleaf import progress as progress_
from looseleaf_lineas import examples
from looseleaf_lineas.baselines import difference_in_means, lin_act
from looseleaf_lineas.probe import STRENGTHS, LinEAS, continuations
from looseleaf_lineas.steering import Steering

SENTENCES = 32
LAMBDAS = (1e-5, 3e-5, 1e-4)
LOSS_LIMIT, LAYERS_LIMIT, SPARSITY_LIMIT, EFFECT_LIMIT = 0.30, 0.90, 0.80, 0.70
BEGINNINGS = [
    *examples.PROMPTS, "In the kitchen there was", "The man at the counter told me that", "Yesterday the weather",
    "My new colleague is", "The book is about", "When she opened the door", "Our trip to the city", "I think that life"]


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure what the paper claims, at the scale of a 135M model.

    Args:
        seeds: draws of 32 + 32 sentences.
        quick: one seed, 40 steps, three strengths, one sparse fit; what that cannot show is said so.
        progress: show progress bars; None: only on a terminal.
    """
    from looseleaf_lab import data, models
    from looseleaf_lab.metrics import bootstrap

    model, tokenizer = models.load("smollm2")
    judge = importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    seeds = 1 if quick else seeds
    strengths = (0.0, 0.5, 1.0) if quick else STRENGTHS
    prompts = BEGINNINGS[:8] if quick else BEGINNINGS
    plugin = LinEAS(steps=40 if quick else 100)
    ids = data.prose_ids(tokenizer, 1024, "evaluation").flatten()
    report = Report("LinEAS on SmolLM2-135M-Instruct", {
        "model": "SmolLM2-135M-Instruct, float32", "sentences": f"{SENTENCES} + {SENTENCES}", "seeds": seeds,
        **plugin.parameters(), "judge": "VADER compound score of greedy continuations, -1 to 1",
        "continuations": len(prompts)})

    def measure(steering: Steering, strength: float) -> tuple[float, float]:
        from looseleaf_lab.metrics import perplexity

        with steering.apply(model, strength):
            texts = continuations(model, tokenizer, prompts, 24)
            ppl = perplexity(model, ids, 512, progress=False).value
        scores = [judge.polarity_scores(t[len(p):])["compound"] for t, p in zip(texts, prompts, strict=True)]
        return sum(scores) / len(scores), ppl

    curves: dict[str, list[list[tuple[float, float]]]] = {"LinEAS": [], "difference in means": [], "Lin-AcT": []}
    fits: list[Steering] = []
    sparse: list[list[tuple[float, float, float, float]]] = []
    for seed in progress_.track(range(seeds), "seeds", show=progress):
        source = data.sentences("negative", SENTENCES, seed)
        target = data.sentences("positive", SENTENCES, seed)
        fitted = plugin.fit(model, source, target, tokenizer, progress=progress)
        fits.append(fitted)
        makers: dict[str, Callable[[], Steering]] = {
            "LinEAS": lambda fitted=fitted: fitted,  # type: ignore[misc]
            "difference in means": lambda s=source, t=target: difference_in_means(model, s, t, tokenizer),  # type: ignore[misc]
            "Lin-AcT": lambda s=source, t=target: lin_act(model, s, t, tokenizer)}  # type: ignore[misc]
        for name, make in makers.items():
            steering = make()
            curves[name].append([measure(steering, strength) for strength in strengths])
        base = curves["LinEAS"][-1][0][0]
        row = []
        for weight in LAMBDAS[1:2] if quick else LAMBDAS:
            made = LinEAS(steps=plugin.steps, lambda_1=weight).fit(model, source, target, tokenizer, progress=progress)
            score, ppl = measure(made, 1.0)
            row.append((weight, made.sparsity(), score - base, ppl))
        sparse.append(row)

    _curves(report, curves, strengths, bootstrap)
    _claims(report, curves, fits, sparse, strengths, quick, bootstrap)
    report.claims.append(Claim.decide(
        None, statement="On three models of 1.5B to 7B, 32 + 32 sentences mitigate toxicity better than ITI-c, CAA and "
        "Lin-AcT", source="paper, tables", paper="tables of the paper; figures not copied here",
        measured="not measured: needs models of 1.5B and more", rule="toxicity below each rival's"))
    return report


def _curves(report: Report, curves: dict[str, list[list[tuple[float, float]]]], strengths: Sequence[float],
            bootstrap: Any) -> None:
    table = report.table("Effect of strength", ["method", "strength", "sentiment", "low", "high", "perplexity"],
                         note="means over seeds, 95 % bootstrap; perplexity on 1024 tokens of neutral prose")
    lines = []
    for name, seeds in curves.items():
        rows = [bootstrap([seed[i][0] for seed in seeds]) for i in range(len(strengths))]
        for strength, (mean, low, high), i in zip(strengths, rows, range(len(strengths)), strict=True):
            table.add(name, strength, mean, low, high, sum(seed[i][1] for seed in seeds) / len(seeds))
        lines.append(Series(name, list(strengths), [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]))
    report.figure("Sentiment of continuations", x_label="strength", y_label="VADER compound", series=lines)


def _claims(report: Report, curves: dict[str, list[list[tuple[float, float]]]], fits: list[Steering],
            sparse: list[list[tuple[float, float, float, float]]], strengths: Sequence[float], quick: bool,
            bootstrap: Any) -> None:
    ours = curves["LinEAS"]
    means = [sum(seed[i][0] for seed in ours) / len(ours) for i in range(len(strengths))]
    report.claims.append(Claim.decide(
        None if quick else all(a < b for a, b in itertools.pairwise(means)),
        statement="The effect grows with the strength", source="paper, section 3.4; this project's rule", paper="-",
        measured=", ".join(f"{s:g}: {m:+.3f}" for s, m in zip(strengths, means, strict=True)),
        rule="mean sentiment over seeds rises at each step of strength 0, 0.25, 0.5, 0.75, 1"))
    for rival in ("difference in means", "Lin-AcT"):
        gaps = []
        for mine, theirs in zip(ours, curves[rival], strict=True):
            limit = mine[-1][1]  # the rival may spend as much perplexity as LinEAS at strength 1
            allowed = [score for score, ppl in theirs if ppl <= limit] or [theirs[0][0]]
            gaps.append(mine[-1][0] - max(allowed))
        mean, low, high = bootstrap(gaps)
        report.claims.append(Claim.decide(
            None if quick else mean >= 0,
            statement=f"LinEAS does at least as well as {rival} at equal or lower perplexity",
            source="paper, tables", paper="better than CAA and Lin-AcT [abstract]",
            measured=f"sentiment {mean:+.3f} ({low:+.3f} to {high:+.3f}) above the rival's, {len(gaps)} seeds",
            rule="mean difference 0 or more, the rival at its best strength among those with no more perplexity"))
    ratio = bootstrap([f.info["loss"][-1] / f.info["loss"][0] for f in fits])
    nearer = [sum(b < a for a, b in f.info["w2"].values()) / len(f.info["w2"]) for f in fits]
    report.claims.append(Claim.decide(
        None if quick else ratio[0] < LOSS_LIMIT and min(nearer) >= LAYERS_LIMIT,
        statement="The distributions of the activations are brought together", source="this project's rule", paper="-",
        measured=f"loss {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f}) of its start; nearer at {min(nearer):.1%} of "
                 f"layers in the worst seed; {len(fits)} seeds, {len(fits[0].info['loss']) - 1} steps",
        rule="loss below 30 % of its start, and squared W2 smaller than before at 90 % of layers or more"))
    full = sum(seed[-1][0] - seed[0][0] for seed in ours) / len(ours)
    table = report.table("Sparse steering", ["lambda_1", "at identity", "effect", "share of the full effect",
                                             "perplexity"], note="means over seeds")
    best: tuple[float, float] | None = None
    for rows in zip(*sparse, strict=True):
        at, effect, ppl = (sum(r[i] for r in rows) / len(rows) for i in (1, 2, 3))
        share = effect / full if full > 0 else float("nan")
        table.add(rows[0][0], at, effect, share, ppl)
        if at >= SPARSITY_LIMIT and (best is None or share > best[1]):
            best = (at, share)
    report.claims.append(Claim.decide(
        None if quick or not full > 0 else best is not None and best[1] >= EFFECT_LIMIT,
        statement="Sparse regularisation leaves most neurons alone with little loss of effect",
        source="paper, abstract", paper="few neurons, better utility", measured=f"{best[0]:.1%} at identity with {best[1]:.1%} of the effect"
        if best else "no lambda_1 tried left 80 % of the coordinates at the identity",
        rule="some lambda_1 of 1e-5, 3e-5, 1e-4 leaves 80 % or more at the identity with 70 % or more of the effect"))
