"""LinEAS's claims on SmolLM2-135M: from gloomy to cheerful sentences, judged by a sentiment lexicon."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from looseleaf import Claim, Report
from looseleaf_lab import models
from looseleaf_lab.data import prose_ids
from looseleaf_lab.metrics import perplexity
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_lineas import data
from looseleaf_lineas.baselines import difference_in_means, lin_act
from looseleaf_lineas.probe import STRENGTHS, LinEAS, continuations
from looseleaf_lineas.steering import Steering

smollm2 = functools.cache(functools.partial(models.load, "smollm2"))
SENTENCES, PERPLEXITY_TOKENS, NEW_TOKENS = 32, 256, 20
OURS = "this project's rule"
LAMBDA_1 = 1e-3
"""Of the sparse fit, set before the seeds were measured."""
BEGINNINGS = [
    *data.PROMPTS, "In the kitchen there was", "The man at the counter told me that", "Yesterday the weather",
    "My new colleague is", "The book is about", "When she opened the door", "Our trip to the city", "I think that life"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: gradient steps of a fit, strengths of the steering, and continued beginnings."""

    steps: int = LinEAS.steps
    strengths: tuple[float, ...] = STRENGTHS
    beginnings: int = len(BEGINNINGS)


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One draw of sentences: fit LinEAS, a sparse LinEAS and the baselines, and continue the neutral beginnings.

    Curves and the sparse fit are (sentiment, perplexity) at each strength; ``strength`` is that at which a baseline
    costs as much perplexity as LinEAS at strength 1, and ``lead`` how much more sentiment LinEAS has than it there.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    model, tokenizer = smollm2()
    judge, draw = SentimentIntensityAnalyzer(), random.Random(seed)
    source = draw.sample(data.SOURCE + data.MORE_SOURCE, SENTENCES)
    target = draw.sample(data.TARGET + data.MORE_TARGET, SENTENCES)
    prompts, ids = BEGINNINGS[:scale.beginnings], prose_ids(tokenizer, PERPLEXITY_TOKENS, "evaluation").flatten()

    def cost(steering: Steering, strength: float) -> float:
        with steering.apply(model, strength):
            return perplexity(model, ids, PERPLEXITY_TOKENS, progress=False).value

    def point(steering: Steering, strength: float) -> tuple[float, float]:
        with steering.apply(model, strength):
            texts = continuations(model, tokenizer, prompts, NEW_TOKENS)
        scores = [judge.polarity_scores(t[len(p):])["compound"] for t, p in zip(texts, prompts, strict=True)]
        return sum(scores) / len(scores), cost(steering, strength)

    plugin = LinEAS(steps=scale.steps)
    fitted = plugin.fit(model, source, target, tokenizer, progress=False)
    baselines = {"difference in means": difference_in_means(model, source, target, tokenizer),
                 "Lin-AcT": lin_act(model, source, target, tokenizer)}
    plain = point(fitted, 0.0)  # strength 0 is the plain model, whatever the method
    curves = {name: [plain, *(point(steering, strength) for strength in scale.strengths[1:])]
              for name, steering in {"LinEAS": fitted, **baselines}.items()}
    sentiment, limit = curves["LinEAS"][-1]
    strengths = {name: as_dear(functools.partial(cost, steering), limit) for name, steering in baselines.items()}
    sparse = dataclasses.replace(plugin, lambda_1=LAMBDA_1).fit(model, source, target, tokenizer, progress=False)
    loss, distances = fitted.info["loss"], fitted.info["w2"].values()
    return {"curves": curves, "strength": strengths,
            "lead": {name: sentiment - point(baselines[name], strengths[name])[0] for name in baselines},
            "loss": loss, "falls to": loss[-1] / loss[0],
            "nearer": sum(after < before for before, after in distances) / len(distances),
            "sparse": (sparse.sparsity(), *point(sparse, 1.0))}


def as_dear(cost: Callable[[float], float], limit: float, halvings: int = 7) -> float:
    """The largest strength up to 1 whose cost is at most ``limit``, by bisection; costs rise with the strength."""
    if cost(1.0) <= limit:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def show(report: Report, results: Results) -> None:
    """The curves of every method, the losses, and the sparse fit."""
    report.facts |= {
        "model": "SmolLM2-135M-Instruct, float32", "sentences": f"{SENTENCES} + {SENTENCES}",
        **LinEAS(steps=results.scale.steps).hyperparameters(), "sparse fit, lambda_1": LAMBDA_1,
        "judge": "VADER compound score of greedy continuations, -1 to 1",
        "continuations": f"{results.scale.beginnings} of {NEW_TOKENS} tokens"}
    strengths = results.scale.strengths
    sentiment = {name: [results.interval("curves", name, i, 0) for i in range(len(strengths))]
                 for name in results.rows[0]["curves"]}
    add_table(report, "Effect of strength", (
        {"method": name, "strength": strength, "sentiment": sentiment[name][i],
         "perplexity": statistics.median(results.values("curves", name, i, 1))}
        for name in sentiment for i, strength in enumerate(strengths)),
        f"means over seeds, 95 % bootstrap; perplexity on {PERPLEXITY_TOKENS} tokens of technical prose, median over "
        "seeds")
    report.figure("Sentiment of continuations", x_label="strength", y_label="VADER compound",
                  series=[curve(name, strengths, values) for name, values in sentiment.items()])
    report.figure("Loss of LinEAS", x_label="step", y_label="squared W2, sum over layers", y_log=True, series=[
        curve(f"seed {seed}", range(len(loss)), loss, "line")
        for seed, loss in zip(results.seeds, results.values("loss"), strict=True)])
    report.table("Sparse steering", ["lambda_1", "at identity", "effect", "fraction of the full effect", "perplexity"],
                 [[LAMBDA_1, *_sparse(results)]], note="strength 1, means over seeds")


def _sentiment(results: Results) -> list[float]:
    """Mean over seeds at each strength of LinEAS."""
    return [results.mean("curves", "LinEAS", i, 0) for i in range(len(results.scale.strengths))]


def _sparse(results: Results) -> tuple[float, float, float, float]:
    """Of the sparse fit: fraction at the identity, effect, fraction of the full effect (NaN: there is none), cost."""
    plain, *_, full = _sentiment(results)
    at_identity, sentiment, perplexity = (results.mean("sparse", i) for i in range(3))
    effect = sentiment - plain
    return at_identity, effect, effect / (full - plain) if full > plain else float("nan"), perplexity


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, scale, means = functools.partial(results.claim, count="seeds"), results.scale, _sentiment(results)
    yield claim("The effect grows with the strength", f"paper, strength of the steering; {OURS}", "-",
                "mean sentiment over seeds rises at each step of strength 0, 0.25, 0.5, 0.75, 1",
                all(a < b for a, b in itertools.pairwise(means)),
                ", ".join(f"{s:g}: {m:+.3f}" for s, m in zip(scale.strengths, means, strict=True)))
    for name in ("difference in means", "Lin-AcT"):
        lead = results.interval("lead", name)
        yield claim(f"LinEAS does at least as well as {name} at equal or lower perplexity", "paper, tables",
                    "better than CAA and Lin-AcT on toxicity [abstract]", "mean difference 0 or more, the baseline at "
                    "the largest strength that costs no more perplexity than LinEAS at strength 1", lead.value >= 0,
                    f"sentiment {lead:+.3f} against the baseline at strength {results.mean('strength', name):.2f}")
    ratio, nearer = results.interval("falls to"), min(results.values("nearer"))
    yield claim("The loss falls far", OURS, "-", "mean loss below 30 % of its start", ratio.value < 0.30,
                f"to {ratio:.3f} of its start in {scale.steps} steps")
    yield claim("The distributions come nearer in every layer", OURS, "-", "squared W2 smaller at 90 % of layers",
                nearer >= 0.90, f"nearer at {nearer:.1%} of layers in the worst seed, {scale.steps} steps")
    at_identity, _, fraction, _ = _sparse(results)
    yield claim("Sparse regularisation leaves most coordinates alone with little loss of effect", "paper, abstract",
                "few neurons, little loss of effect [abstract]",
                "80 % or more at the identity with 70 % or more of the effect",
                None if fraction != fraction else at_identity >= 0.80 and fraction >= 0.70,
                f"{at_identity:.1%} at the identity with {fraction:.1%} of the effect at lambda_1 {LAMBDA_1:g}")
    yield from results.unmeasured("paper, abstract and tables", "figures not copied here", {
        "On three models of 1.5B to 7B, 32 + 32 sentences mitigate toxicity better than ITI-c, CAA and Lin-AcT":
            "models of 1.5B and more", "The method carries over to text-to-image models": "a text-to-image model"})


study = Study("LinEAS on SmolLM2-135M-Instruct", measure, claims, show=show, full=Scale(), quick_seeds=1,
              quick=Scale(steps=8, strengths=(0.0, 0.5, 1.0), beginnings=8))
