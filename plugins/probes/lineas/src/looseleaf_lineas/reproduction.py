"""LinEAS's claims on SmolLM2-135M: from gloomy to cheerful sentences, judged by a sentiment lexicon."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import statistics
from collections.abc import Callable
from typing import Any

from looseleaf import Report, Series
from looseleaf_lab import models
from looseleaf_lab.data import prose_ids
from looseleaf_lab.metrics import perplexity
from looseleaf_lab.study import Decision, Results, Study, StudyClaim
from looseleaf_lineas import data
from looseleaf_lineas.baselines import difference_in_means, lin_act
from looseleaf_lineas.probe import STRENGTHS, LinEAS, continuations
from looseleaf_lineas.steering import Steering

smollm2 = functools.cache(functools.partial(models.load, "smollm2"))
SENTENCES, PERPLEXITY_TOKENS, NEW_TOKENS = 32, 256, 20
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
    table = report.table("Effect of strength", ["method", "strength", "sentiment", "low", "high", "perplexity"],
                         note=f"means over seeds, 95 % bootstrap; perplexity on {PERPLEXITY_TOKENS} tokens of "
                              "technical prose, median over seeds")
    curves = report.figure("Sentiment of continuations", x_label="strength", y_label="VADER compound")
    for name in results.rows[0]["curves"]:
        sentiment = [results.interval("curves", name, i, 0) for i in range(len(strengths))]
        for i, strength in enumerate(strengths):
            table.add(name, strength, *sentiment[i], statistics.median(results.values("curves", name, i, 1)))
        curves.series.append(Series(name, list(strengths), *([s[k] for s in sentiment] for k in range(3))))  # type: ignore[arg-type]
    report.figure("Loss of LinEAS", x_label="step", y_label="squared W2, sum over layers", y_log=True, series=[
        Series(f"seed {seed}", [float(n) for n in range(len(loss))], loss, style="line")
        for seed, loss in zip(results.seeds, results.values("loss"), strict=True)])
    report.table("Sparse steering", ["lambda_1", "at identity", "effect", "fraction of the full effect", "perplexity"],
                 [[LAMBDA_1, *_sparse(results)]], note="strength 1, means over seeds")


def _sentiment(results: Results) -> list[float]:
    """Mean over seeds at each strength of LinEAS."""
    return [results.interval("curves", "LinEAS", i, 0).value for i in range(len(results.scale.strengths))]


def _sparse(results: Results) -> tuple[float, float, float, float]:
    """Of the sparse fit: fraction at the identity, effect, fraction of the full effect (NaN: there is none), cost."""
    plain, *_, full = _sentiment(results)
    at_identity, sentiment, perplexity = (results.interval("sparse", i).value for i in range(3))
    effect = sentiment - plain
    return at_identity, effect, effect / (full - plain) if full > plain else float("nan"), perplexity


def _grows(results: Results) -> Decision:
    means = _sentiment(results)
    return (all(a < b for a, b in itertools.pairwise(means)),
            ", ".join(f"{s:g}: {m:+.3f}" for s, m in zip(results.scale.strengths, means, strict=True)))


def _leads(baseline: str, results: Results) -> Decision:
    lead, strength = results.interval("lead", baseline), results.interval("strength", baseline).value
    return lead.value >= 0, f"sentiment {lead:+.3f} against the baseline at strength {strength:.2f}"


def _falls(results: Results) -> Decision:
    ratio = results.interval("falls to")
    return ratio.value < 0.30, f"to {ratio:.3f} of its start in {results.scale.steps} steps"


def _nears(results: Results) -> Decision:
    nearer = min(results.values("nearer"))
    return nearer >= 0.90, f"nearer at {nearer:.1%} of layers in the worst seed, {results.scale.steps} steps"


def _spares(results: Results) -> Decision:
    at_identity, _, fraction, _ = _sparse(results)
    return (None if fraction != fraction else at_identity >= 0.80 and fraction >= 0.70,
            f"{at_identity:.1%} at the identity with {fraction:.1%} of the effect at lambda_1 {LAMBDA_1:g}")


def _claim(statement: str, source: str, paper: str, rule: str, decide: Callable[[Results], Decision]) -> StudyClaim:
    """A claim that the quick run does not decide, with the number of seeds behind what was measured."""
    def decided(results: Results) -> Decision:
        holds, measured = decide(results)
        return None if results.quick else holds, f"{measured}; {len(results.seeds)} seeds"

    return StudyClaim(statement, source, paper, rule, decided)


OURS, TABLES = "this project's rule", "paper, abstract and tables"
study = Study(
    "LinEAS on SmolLM2-135M-Instruct", measure, show=show, full=Scale(),
    quick=Scale(steps=8, strengths=(0.0, 0.5, 1.0), beginnings=8), quick_seeds=1, claims=[
        _claim("The effect grows with the strength", f"paper, strength of the steering; {OURS}", "-",
               "mean sentiment over seeds rises at each step of strength 0, 0.25, 0.5, 0.75, 1", _grows),
        *(_claim(f"LinEAS does at least as well as {name} at equal or lower perplexity", "paper, tables",
                 "better than CAA and Lin-AcT on toxicity [abstract]",
                 "mean difference 0 or more, the baseline at the largest strength that costs no more perplexity than "
                 "LinEAS at strength 1", functools.partial(_leads, name))
          for name in ("difference in means", "Lin-AcT")),
        _claim("The loss falls far", OURS, "-", "mean loss below 30 % of its start", _falls),
        _claim("The distributions come nearer in every layer", OURS, "-", "squared W2 smaller at 90 % of layers",
               _nears),
        _claim("Sparse regularisation leaves most coordinates alone with little loss of effect", "paper, abstract",
               "few neurons, little loss of effect [abstract]",
               "80 % or more at the identity with 70 % or more of the effect", _spares),
        StudyClaim("On three models of 1.5B to 7B, 32 + 32 sentences mitigate toxicity better than ITI-c, CAA and "
                   "Lin-AcT", TABLES, "figures not copied here", "none set",
                   unmeasured="not measured: needs models of 1.5B and more"),
        StudyClaim("The method carries over to text-to-image models", TABLES, "figures not copied here", "none set",
                   unmeasured="not measured: needs a text-to-image model")])
