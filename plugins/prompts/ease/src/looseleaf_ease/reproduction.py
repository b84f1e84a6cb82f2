"""The paper's claims at small real scale: SmolLM2-135M on real texts, with labels it cannot know and plain ones."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Report
from looseleaf.statistics import Interval, bootstrap, spearman
from looseleaf_ease import sentence_encoder
from looseleaf_ease.bandit import NeuralUCB
from looseleaf_ease.optimizer import EASE, INITIAL_FRACTION, KEEP
from looseleaf_ease.search import draw, generator, sets_of
from looseleaf_ease.transport import closest
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, curve
from looseleaf_text import LanguageModel, LocalModel, TextTask

SOURCE = "What counts as working here, fixed before measuring"
REMAPPED, PLAIN = "re-mapped labels", "plain labels"
METHODS = ("EASE", "Best-of-N")
SCORED = ("validation", "test")
POOL, VALIDATION, ORDERS = 60, 20, 10
CORRELATION, SPREAD, SECONDS = 0.3, 0.1, 1.0
"""What the claims are decided by: rank correlation, range of scores over orders (two of twenty examples), time."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Evaluations of each search (the paper has 165) on the two tasks, and test examples used."""

    evaluations: dict[str, int] = dataclasses.field(default_factory=lambda: {REMAPPED: 80, PLAIN: 50})
    test: int = 150


def task_of(name: str, seed: int, test: int = 150) -> TextTask:
    """One of the two tasks, split by ``seed``.

    ``plain labels``: conversation about code, culture or emotion, to be labelled so. ``re-mapped labels``: about code
    or culture, to be labelled " A" or " B": what these stand for is in the exemplars alone.
    """
    if name == PLAIN:
        return data.classification_task("topics", seed=seed, train=POOL, dev=VALIDATION + 1, test=test)
    three = data.classification_task("topics", seed=seed, train=POOL * 3 // 2, dev=VALIDATION * 3 // 2,
                                     test=test * 3 // 2)
    labels = {"coding": " A", "trivia": " B"}
    train, dev, rest = ([e for e in part if e.target in labels] for part in (three.train, three.dev, three.test))
    return dataclasses.replace(three, name="topics, re-mapped", labels=labels, train=train, dev=dev, test=rest)


@functools.cache
def _tools() -> tuple[LanguageModel, Callable[[list[str]], Any], str]:
    dtype = models.fast_dtype()
    return LocalModel(*models.load("smollm2", dtype=dtype)), sentence_encoder("minilm", dtype), dtype


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Task -> what EASE and Best-of-N gave, see :func:`measure_task`."""
    model, encoder, _ = _tools()
    return {name: measure_task(task_of(name, seed), model, encoder, seed, evaluations, scale.test)
            for name, evaluations in scale.evaluations.items()}


def measure_task(task: TextTask, model: LanguageModel, encoder: Callable[[list[str]], Any], seed: int,
                 evaluations: int, test: int) -> dict[str, Any]:
    """EASE and Best-of-N (nothing but random arms, the first of them EASE's) with equally many evaluations on the same
    validation examples.

    Returns:
        ``found``: method -> scores of its best prompt on validation and test; ``curves``, ``scores``: method -> best
        validation score after each evaluation, and every score in the order tried; ``correlation``: Spearman's, of the
        network's predictions with the scores of arms it never saw, 0 where they are all alike; ``orders``: validation
        scores of one random set of exemplars in several orders; ``seconds``; ``prompt``: around the first test example.
    """
    ease = EASE(total_iterations=evaluations, n_init=round(INITIAL_FRACTION * evaluations), encoder=encoder)
    methods = dict(zip(METHODS, (ease, dataclasses.replace(ease, n_init=evaluations)), strict=True))
    prompts, seconds = {}, {}
    for name, method in methods.items():
        began = time.perf_counter()
        prompts[name] = method.optimize(task, model, seed=seed, progress=False)
        seconds[name] = time.perf_counter() - began
    examples = list(task.test)[:test]
    # The predictor as the search would have trained it next, on arms that only Best-of-N has tried.
    search = ease.search(task, model, seed=seed, progress=False)
    search.find_instructions()
    tried, others = ({(t[2], tuple(t[3])): t[0] for t in prompts[name].info["tried"]} for name in METHODS)
    unseen = [arm for arm in others if arm not in tried]
    vectors = torch.from_numpy(search.encode(list(tried)))
    bandit = NeuralUCB(vectors.shape[1], ease.hidden, ease.lam, ease.nu, ease.train_steps, seed)
    bandit.fit(vectors, torch.tensor(list(tried.values())))
    predicted = bandit.predict(torch.from_numpy(search.encode(unseen))).tolist()
    correlation = spearman(predicted, [others[arm] for arm in unseen]) if len(unseen) > 1 else math.nan
    [(_, one_set)] = draw(generator(seed, "one set"), len(search.pool), ease.k, 1, 1)
    orders = [task.evaluate(search.prompt((0, tuple(generator(seed, "order", n).permutation(one_set)))).on(model),
                            search.validation).score for n in range(ORDERS)]
    return {"found": {name: {"validation": float(p.info["fitness"]), "test": task.evaluate(p.on(model), examples).score}
                      for name, p in prompts.items()},
            "curves": {name: [h[1] for h in p.info["history"]] for name, p in prompts.items()},
            "scores": {name: [t[0] for t in p.info["tried"]] for name, p in prompts.items()},
            # a network whose predictions are all alike knows nothing
            "correlation": 0.0 if math.isnan(correlation) else correlation, "orders": orders, "seconds": seconds,
            "prompt": prompts["EASE"].render(examples[0])}


def time_round(scale: Scale) -> dict[str, Any]:
    """Seconds of the parts of one round at the default ``domain`` and ``keep``, see :func:`round_parts`."""
    model, encoder, dtype = _tools()
    return {"parts": round_parts(task_of(REMAPPED, 0), model, encoder), "dtype": dtype,
            "threads": torch.get_num_threads()}


def round_parts(task: TextTask, model: LanguageModel, encoder: Callable[[list[str]], Any],
                rounds: int = 5) -> list[float]:
    """Seconds of drawing and optimal transport, embedding, bounds, and training on 80 arms: the fastest of ``rounds``
    times, on at most two threads."""
    ease = EASE(encoder=encoder)
    search = ease.search(task, model, progress=False)
    search.find_instructions()
    seen = draw(generator(0, "seen"), len(search.pool), ease.k, 1, 80)
    vectors, scores = torch.from_numpy(search.encode(seen)), torch.linspace(0, 1, len(seen))
    bandit = NeuralUCB(vectors.shape[1])
    search.transport_cost()  # once in a search
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    parts = []
    try:
        for n in range(rounds):
            clock = [time.perf_counter()]
            arms = draw(generator(n), len(search.pool), ease.k, 1, ease.domain)
            kept = [arms[i] for i in closest(search.transport_cost(), sets_of(arms), KEEP)]
            clock.append(time.perf_counter())
            embedded = torch.from_numpy(search.encode(kept))
            clock.append(time.perf_counter())
            bandit.select(embedded)
            clock.append(time.perf_counter())
            bandit.fit(vectors, scores)
            clock.append(time.perf_counter())
            parts.append([b - a for a, b in itertools.pairwise(clock)])
    finally:
        torch.set_num_threads(threads)
    return min(parts, key=lambda row: sum(row[:3]))


def gap(results: Results, name: str, scored: str) -> Interval:
    """How much better EASE's prompt is than that of Best-of-N, paired by seed."""
    return results.interval(name, "found", "EASE", scored, minus=(name, "found", "Best-of-N", scored))


def ranges(results: Results, name: str) -> Interval:
    """Highest less lowest score over orders of one set."""
    return bootstrap([max(orders) - min(orders) for orders in results.values(name, "orders")])


def show(report: Report, results: Results) -> None:
    """What each search found, how the two compare, what the network knows, and what a round costs."""
    report.facts |= {
        "model": "SmolLM2-135M-Instruct", "encoder": "all-MiniLM-L6-v2", "pool": POOL,
        "validation examples": VALIDATION, "test examples": results.scale.test,
        **{k: v for k, v in EASE().hyperparameters().items() if k in ("k", "nu", "lam", "domain", "train_steps")},
        "keep": KEEP, "dtype": results.once["dtype"], "threads": results.once["threads"],
        **{f"{name}: mean validation score of random arms":
           round(float(np.mean(results.joined(name, "scores", "Best-of-N"))), 3) for name in results.scale.evaluations}}
    tasks = list(results.scale.evaluations)
    add_table(report, "Best prompt of each search", (
        {"task": name, "method": method,
         "evaluations": float(np.mean([len(s) for s in results.values(name, "scores", method)])),
         **{scored: results.interval(name, "found", method, scored) for scored in SCORED},
         "seconds": results.mean(name, "seconds", method)} for name in tasks for method in METHODS),
        "means over seeds and 95 % bootstrap intervals; both methods have the same validation examples")
    for name in tasks:
        # A search that reached the target stopped early: its best score stays what it was.
        curves = {method: results.values(name, "curves", method) for method in METHODS}
        longest = max(len(scores) for of in curves.values() for scores in of)
        full = {method: [[*scores, *[scores[-1]] * (longest - len(scores))] for scores in of]
                for method, of in curves.items()}
        report.figure(f"Best score so far, {name}", x_label="evaluations", y_label="validation score", series=[
            curve(method, range(1, longest + 1), map(bootstrap, zip(*of, strict=True)), "line")
            for method, of in full.items()])
        report.arrays.update({f"{name}, {method}: validation scores in the order tried":
                              results.values(name, "scores", method) for method in METHODS})
        report.arrays[f"{name}: scores over orders of one set"] = results.values(name, "orders")
        report.examples.append((f"{name}, seed 0: the prompt EASE found, with the first test example",
                                results.rows[0][name]["prompt"]))
    add_table(report, "EASE against Best-of-N", (
        {"task": name, "scored on": scored, "difference": gap(results, name, scored)}
        for name in tasks for scored in SCORED), "paired by seed, 95 % bootstrap")
    add_table(report, "Order, and what the network knows", (
        {"task": name, "range over orders": ranges(results, name),
         "rank correlation": results.interval(name, "correlation")} for name in tasks),
        f"range: highest less lowest validation score of {ORDERS} random orders of one random set; correlation: of "
        "predictions with scores of arms never seen, network trained on all arms of the search")
    names = ("drawing and optimal transport", "embedding", "bounds", "training")
    report.table("One round", ["part", "seconds"], zip(names, results.once["parts"], strict=True),
                 note=f"domain {EASE.domain}, {KEEP} arms embedded; fastest of five, on {min(2, os.cpu_count() or 1)} "
                      "threads")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, evaluations = functools.partial(results.claim, count="seeds"), results.scale.evaluations
    gaps = {(name, scored): gap(results, name, scored) for name in evaluations for scored in SCORED}
    yield claim("At equal evaluations EASE's best prompt is at least as good as that of Best-of-N",
                f"paper, table of the instruction-induction tasks; {SOURCE} (1)", "better on most tasks [paper]",
                "mean paired difference 0 or more on validation and test, on both tasks",
                all(g.value >= 0 for g in gaps.values()),
                "; ".join(f"{name}, {scored}: {g:+.3f}" for (name, scored), g in gaps.items()))
    for scored in SCORED:
        better = gaps[REMAPPED, scored]
        yield results.claim(
            f"With re-mapped labels EASE beats Best-of-N at equal evaluations, on {scored} examples",
            f"paper, novel tasks; {SOURCE} (1)", "the gain grows on tasks the model cannot know [paper]",
            "holds where the interval of the paired difference lies above 0, does not hold where it lies at or below "
            "0; not shown otherwise", above(better, touching=False),
            f"{better:+.3f}; {len(results.seeds)} seeds, {evaluations[REMAPPED]} evaluations each")
    spread, correlation = ranges(results, REMAPPED), results.interval(REMAPPED, "correlation")
    yield claim("The order of one and the same exemplars matters", f"paper, motivation; {SOURCE} (2)",
                "order has a great impact [abstract]", "mean range 0.1 or more, which is two of twenty examples",
                spread.value >= SPREAD, f"range {spread:.3f} over {ORDERS} orders")
    yield claim("After 80 evaluations the network ranks prompts it has not seen", f"{SOURCE} (2)",
                "not a figure of the paper", "mean rank correlation above 0.3", correlation.value > CORRELATION,
                f"rank correlation {correlation:.3f}")
    parts = results.once["parts"]
    yield results.claim("Selecting an arm takes less than a second", f"{SOURCE} (3)", "not a figure of the paper",
                        "drawing 10,000 arms, optimal transport, embedding and bounds together below 1 s",
                        sum(parts[:3]) < SECONDS, f"{sum(parts[:3]):.2f} s, of which embedding {parts[1]:.2f} s; "
                        f"training the network takes another {parts[3]:.2f} s")
    yield from results.unmeasured("paper, abstract and tables", "figures not copied here", {
        "EASE is best on most of the instruction-induction tasks against ten other methods at 165 evaluations":
            "gpt-3.5, 165 evaluations and the methods other than Best-of-N",
        "Choosing the instruction jointly improves further": "a model that can follow and write instructions"})


study = Study("EASE: exemplars, their order and nothing else", measure, claims, show, once=time_round, full=Scale(),
              quick=Scale({REMAPPED: 16, PLAIN: 16}, 30), quick_seeds=1)
