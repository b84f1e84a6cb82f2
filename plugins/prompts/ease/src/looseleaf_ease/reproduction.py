"""The paper's claims at small real scale: SmolLM2-135M on real texts, with labels it cannot know and plain ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Report, Series
from looseleaf_text import LanguageModel, LocalModel, Task
from looseleaf import progress as progress_
from looseleaf_ease.arms import draw, generator, sets_of
from looseleaf_ease.bandit import NeuralUCB
from looseleaf_ease.encoder import sentence_encoder
from looseleaf_ease.optimizer import EASE, INITIAL_SHARE, KEEP
from looseleaf_ease.search import Search
from looseleaf_ease.transport import closest

SOURCE = "What counts as working here, fixed before measuring"
REMAPPED, PLAIN = "re-mapped labels", "plain labels"
EVALUATIONS = {REMAPPED: 80, PLAIN: 50}
"""Of each search; the paper has 165."""
POOL, VALIDATION, TEST = 60, 20, 150
ORDERS = 10
CORRELATION, SPREAD, SECONDS = 0.3, 0.1, 1.0
"""What the claims are decided by: rank correlation, range of scores over orders (two of twenty examples), time."""


@dataclasses.dataclass
class Seed:
    """What one split of the texts gave on one task.

    Attributes:
        found: method -> (score on validation, score on test) of its best prompt.
        curves: method -> best validation score after each evaluation.
        scores: method -> validation scores in the order tried.
        correlation: Spearman's, of the network's predictions with the scores of arms it never saw; NaN where one side
            is constant.
        orders: validation scores of one random set of exemplars in several random orders.
        seconds: method -> time of the search.
        prompt: the prompt EASE found, shown with the first test example.
    """

    found: dict[str, tuple[float, float]]
    curves: dict[str, list[float]]
    scores: dict[str, list[float]]
    correlation: float
    orders: list[float]
    seconds: dict[str, float]
    prompt: str


def task_of(name: str, seed: int) -> Task:
    """One of the two tasks, split by ``seed``.

    ``plain labels``: conversation about code, culture or emotion, to be labelled so. ``re-mapped labels``: about code
    or culture, to be labelled " A" or " B": what these stand for is in the exemplars alone.
    """
    from looseleaf_lab import data

    if name == PLAIN:
        return data.classification_task("topics", seed=seed, train=POOL, dev=VALIDATION + 1, test=TEST)
    three = data.classification_task("topics", seed=seed, train=POOL * 3 // 2, dev=VALIDATION * 3 // 2,
                                     test=TEST * 3 // 2)
    labels = {"coding": " A", "trivia": " B"}
    train, dev, test = ([e for e in part if e.label in labels] for part in (three.train, three.dev, three.test))
    return dataclasses.replace(three, name="topics, re-mapped", labels=labels, train=train, dev=dev, test=test)


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure each claim of the paper.

    Args:
        seeds: how many repetitions, each with its own split of the texts.
        quick: one seed, 16 evaluations in each search, 30 test examples; its claims are not decided.
        progress: show a progress bar; None: only on a terminal.
    """
    from looseleaf_lab import models

    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number from 1")
    fast = models.bfloat16_is_fast()
    dtype = "bfloat16" if fast else "float32"
    model = LocalModel(*models.load("smollm2", dtype=dtype))
    encoder = sentence_encoder("minilm", dtype)
    jobs = [(name, seed) for seed in range(1 if quick else seeds) for name in EVALUATIONS]
    measured: dict[str, list[Seed]] = {name: [] for name in EVALUATIONS}
    began = time.perf_counter()
    for name, seed in progress_.track(jobs, "ease", show=progress):
        measured[name].append(measure(task_of(name, seed), model, encoder, seed,
                                      16 if quick else EVALUATIONS[name], 30 if quick else TEST))
    report = summarise(measured, time_round(task_of(REMAPPED, 0), model, encoder), quick)
    report.facts.update({"dtype": dtype, "threads": torch.get_num_threads(),
                         "seconds": round(time.perf_counter() - began, 1)})
    return report


def measure(task: Task, model: LanguageModel, encoder: Callable[[list[str]], Any], seed: int, evaluations: int,
            test: int) -> Seed:
    """EASE and Best-of-N with equally many evaluations on the same validation examples.

    Best-of-N is the same search with nothing but random arms; its first are those EASE begins with.

    Args:
        task, model, encoder: what is measured.
        seed: of both searches.
        evaluations: of each.
        test: how many test examples are used.
    """
    from looseleaf.statistics import spearman

    ease = EASE(total_iterations=evaluations, n_init=round(INITIAL_SHARE * evaluations), encoder=encoder)
    methods = {"EASE": ease, "Best-of-N": dataclasses.replace(ease, n_init=evaluations)}
    prompts, seconds = {}, {}
    for name, method in methods.items():
        began = time.perf_counter()
        prompts[name] = method.optimize(task, model, seed=seed, progress=False)
        seconds[name] = time.perf_counter() - began
    tried = {name: prompt.info["tried"] for name, prompt in prompts.items()}
    examples = list(task.test)[:test]
    found = {name: (float(p.info["fitness"]), task.evaluate(p, model, examples).score) for name, p in prompts.items()}

    # The predictor as the search would have trained it next, on arms that only Best-of-N has tried.
    search = Search(ease, task, model, None, None, seed, None, False)
    search.find_instructions()
    mine, others = ({(t[2], tuple(t[3])): t[0] for t in tried[name]} for name in methods)
    unseen = [arm for arm in others if arm not in mine]
    vectors = torch.from_numpy(search.encode(list(mine)))
    bandit = NeuralUCB(vectors.shape[1], ease.hidden, ease.lam, ease.nu, ease.train_steps, seed)
    bandit.fit(vectors, torch.tensor(list(mine.values())))
    predicted = bandit.predict(torch.from_numpy(search.encode(unseen))).tolist()

    [(_, one_set)] = draw(generator(seed, "one set"), len(search.pool), ease.k, 1, 1)
    orders = [task.evaluate(search.prompt((0, tuple(generator(seed, "order", n).permutation(one_set)))), model,
                            search.validation).score for n in range(ORDERS)]
    return Seed(found, {n: [h[1] for h in p.info["history"]] for n, p in prompts.items()},
                {n: [t[0] for t in rows] for n, rows in tried.items()},
                spearman(predicted, [others[arm] for arm in unseen]) if len(unseen) > 1 else math.nan, orders, seconds,
                prompts["EASE"].render(examples[0]))


def time_round(task: Task, model: LanguageModel, encoder: Callable[[list[str]], Any], rounds: int = 5) -> list[float]:
    """Seconds of the parts of one round at the default ``domain`` and ``keep``, the fastest of ``rounds`` times, on at
    most two threads: drawing and optimal transport, embedding, bounds, training on 80 arms.

    Args:
        task, model: of the search.
        encoder: what embeds.
        rounds: how often it is done.
    """
    ease = EASE(encoder=encoder)
    search = Search(ease, task, model, None, None, 0, None, False)
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


def summarise(measured: dict[str, list[Seed]], parts: list[float], quick: bool = False) -> Report:
    """The report on what :func:`measure` gave for each task and seed, and :func:`time_round`."""
    seeds = len(measured[REMAPPED])
    report = Report("EASE: exemplars, their order and nothing else", {
        "model": "SmolLM2-135M-Instruct", "encoder": "all-MiniLM-L6-v2", "seeds": seeds, "pool": POOL,
        "validation examples": VALIDATION, "test examples": 30 if quick else TEST,
        **{k: v for k, v in EASE().hyperparameters().items() if k in ("k", "nu", "lam", "domain", "train_steps")},
        "keep": KEEP, "quick": quick})
    _scores(report, measured)
    _against(report, measured, quick)
    _predictor(report, measured, quick)
    _time(report, parts, quick)
    for statement, need in (
            ("EASE is best on most of the instruction-induction tasks against ten rivals at 165 evaluations",
             "gpt-3.5, 165 evaluations and the rivals other than Best-of-N"),
            ("Choosing the instruction jointly improves further", "a model that can follow and write instructions")):
        report.claims.append(Claim.decide(
            None, statement=statement, source="paper, abstract and tables", paper="figures not copied here",
            measured=f"not measured: needs {need}", rule="none set"))
    return report


def _scores(report: Report, measured: dict[str, list[Seed]]) -> None:
    from looseleaf.statistics import bootstrap

    table = report.table("Best prompt of each search", [
        "task", "method", "evaluations", "validation", "from", "to", "test", "from ", "to ", "seconds"],
        note="means over seeds and 95 % bootstrap intervals; both methods have the same validation examples")
    for name, runs in measured.items():
        for method in runs[0].found:
            rows = [bootstrap([run.found[method][i] for run in runs]) for i in range(2)]
            table.add(name, method, float(np.mean([len(run.scores[method]) for run in runs])), *rows[0], *rows[1],
                      float(np.mean([run.seconds[method] for run in runs])))
            report.arrays[f"{name}, {method}: validation scores in the order tried"] = [r.scores[method] for r in runs]
        drawn = [score for run in runs for score in run.scores["Best-of-N"]]
        report.facts[f"{name}: mean validation score of random arms"] = round(float(np.mean(drawn)), 3)
        # A search that reached the target stopped early: its best score stays what it was.
        longest = max(len(run.curves[m]) for run in runs for m in run.curves)
        report.figure(f"Best score so far, {name}", x_label="evaluations", y_label="validation score", series=[
            _curve(method, [run.curves[method] for run in runs], longest) for method in runs[0].curves])
        report.examples.append((f"{name}, seed 0: the prompt EASE found, with the first test example", runs[0].prompt))


def _curve(name: str, curves: Sequence[Sequence[float]], longest: int) -> Series:
    from looseleaf.statistics import bootstrap

    full = [[*c, *[c[-1]] * (longest - len(c))] for c in curves]
    points = [bootstrap([c[n] for c in full]) for n in range(longest)]
    mean, low, high = ([p[i] for p in points] for i in range(3))
    return Series(name, [n + 1.0 for n in range(longest)], mean, low, high, style="line")


def _against(report: Report, measured: dict[str, list[Seed]], quick: bool) -> None:
    from looseleaf.statistics import bootstrap

    table = report.table("EASE against Best-of-N", ["task", "scored on", "difference", "from", "to"],
                         note="paired by seed, 95 % bootstrap")
    gaps = {}
    for name, runs in measured.items():
        for i, scored in enumerate(("validation", "test")):
            gaps[name, scored] = bootstrap([r.found["EASE"][i] - r.found["Best-of-N"][i] for r in runs])
            table.add(name, scored, *gaps[name, scored])
    said = {key: f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for key, (mean, low, high) in gaps.items()}
    seeds = f"{len(measured[REMAPPED])} seeds"
    report.claims.append(Claim.decide(
        None if quick else all(mean >= 0 for mean, _, _ in gaps.values()),
        statement="At equal evaluations EASE's best prompt is at least as good as that of Best-of-N",
        source=f"paper, table of the instruction-induction tasks; {SOURCE} (1)", paper="better on most tasks [paper]",
        measured="; ".join(f"{name}, {scored}: {said[name, scored]}" for name, scored in gaps) + f"; {seeds}",
        rule="mean paired difference 0 or more on validation and test, on both tasks"))
    for scored in ("validation", "test"):
        _, low, high = gaps[REMAPPED, scored]
        report.claims.append(Claim.decide(
            None if quick else True if low > 0 else False if high <= 0 else None,
            statement=f"With re-mapped labels EASE beats Best-of-N at equal evaluations, on {scored} examples",
            source=f"paper, novel tasks; {SOURCE} (1)", paper="the gain grows on tasks the model cannot know [paper]",
            measured=f"{said[REMAPPED, scored]}; {seeds}, {EVALUATIONS[REMAPPED]} evaluations each",
            rule="holds where the interval of the paired difference lies above 0, does not hold where it lies at or "
                 "below 0; not shown otherwise"))


def _predictor(report: Report, measured: dict[str, list[Seed]], quick: bool) -> None:
    from looseleaf.statistics import bootstrap

    table = report.table("Order, and what the network knows", [
        "task", "range over orders", "from", "to", "rank correlation", "from ", "to "],
        note=f"range: highest less lowest validation score of {ORDERS} random orders of one random set; correlation: "
             "of predictions with scores of arms never seen, network trained on all arms of the search")
    for name, runs in measured.items():
        ranges = bootstrap([max(run.orders) - min(run.orders) for run in runs])
        # A network whose predictions are all alike knows nothing.
        correlations = bootstrap([0.0 if math.isnan(run.correlation) else run.correlation for run in runs])
        table.add(name, *ranges, *correlations)
        report.arrays[f"{name}: scores over orders of one set"] = [run.orders for run in runs]
        if name != REMAPPED:
            continue
        report.claims.append(Claim.decide(
            None if quick else ranges[0] >= SPREAD, statement="The order of one and the same exemplars matters",
            source=f"paper, motivation; {SOURCE} (2)", paper="order has a great impact [abstract]",
            measured=f"range {ranges[0]:.3f} ({ranges[1]:.3f} to {ranges[2]:.3f}) over {ORDERS} orders; "
                     f"{len(runs)} seeds", rule="mean range 0.1 or more, which is two of twenty examples"))
        report.claims.append(Claim.decide(
            None if quick else correlations[0] > CORRELATION,
            statement="After 80 evaluations the network ranks prompts it has not seen",
            source=f"{SOURCE} (2)", paper="not a figure of the paper",
            measured=f"rank correlation {correlations[0]:.3f} ({correlations[1]:.3f} to {correlations[2]:.3f}); "
                     f"{len(runs)} seeds", rule="mean rank correlation above 0.3"))


def _time(report: Report, parts: list[float], quick: bool) -> None:
    names = ("drawing and optimal transport", "embedding", "bounds", "training")
    report.table("One round", ["part", "seconds"], [[n, s] for n, s in zip(names, parts, strict=True)],
                 note=f"domain {EASE.domain}, {KEEP} arms embedded; fastest of five, on {min(2, os.cpu_count() or 1)} "
                      "threads")
    report.claims.append(Claim.decide(
        None if quick else sum(parts[:3]) < SECONDS, statement="Selecting an arm takes less than a second",
        source=f"{SOURCE} (3)", paper="not a figure of the paper",
        measured=f"{sum(parts[:3]):.2f} s, of which embedding {parts[1]:.2f} s; training the network takes another "
                 f"{parts[3]:.2f} s", rule="drawing 10,000 arms, optimal transport, embedding and bounds together "
                                           "below 1 s"))
