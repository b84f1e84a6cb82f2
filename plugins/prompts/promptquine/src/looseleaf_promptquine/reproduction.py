"""The paper's claims at small real scale: SmolLM2-135M on real texts that ship in packages."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from pathlib import Path
from typing import Any, ClassVar

from looseleaf import Budget, BudgetExhausted, Claim, Paper, PromptOptimizer, Report, Series
from looseleaf_text import Example, LanguageModel, LocalModel, Prompt, Task
from looseleaf.progress import bar
from looseleaf.budget import reason
from looseleaf_text.task import fill
from looseleaf_promptquine.optimizer import PAPER, PromptQuine
from looseleaf_promptquine.pieces import Pieces, without
from looseleaf_promptquine.search import Search
from looseleaf_promptquine.tapruning import TAPruning

TASKS = {  # name -> examples in (train, dev, test)
    "sentiment": (36, 36, 100),
    "question-topics": (51, 51, 60),
}
SOURCE = "What counts as working here, fixed before measuring"


@dataclasses.dataclass
class RandomPruning(PromptOptimizer):
    """The baseline: prompts with tokens left out at random, re-ranked like the others.

    Args:
        max_prompts: how many different prompts are tried.
    """

    max_prompts: int = 100
    paper: ClassVar[Paper] = PAPER

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """Try the start and random prunings of it, each length as likely as any other."""
        search = Search(self, task, model, budget, start, seed, state_dir, progress, shots=1, num_shots=16,
                        reward_driven=True, rerank_top=0.10, most=self.max_prompts)
        full, stopped = search.pieces.full, "done"
        masks = {full: None}
        for _ in range(20 * self.max_prompts):
            if len(masks) >= self.max_prompts:
                break
            masks[without(full, search.rng.sample(range(len(full)), search.rng.randint(1, len(full))))] = None
        try:
            search.evaluate(masks)
        except BudgetExhausted as end:
            stopped = reason(end)
        return search.finish(stopped, {})


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure each claim of the paper.

    Args:
        seeds: how many repetitions, each with its own split of the texts and its own demonstration.
        quick: two seeds at most, 40 prompts per search instead of 100, fewer test examples.
        progress: show a progress bar; None: only on a terminal.
    """
    import torch

    from looseleaf_lab import data, models

    if seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number from 1")
    seeds = min(seeds, 2) if quick else seeds
    prompts = 40 if quick else 100
    # Where the processor multiplies bfloat16 by itself it is several times as fast; elsewhere it would be slower.
    fast = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16"))
    dtype = torch.bfloat16 if fast else torch.float32
    network, tokenizer = models.load("smollm2", dtype=dtype)
    model = LocalModel(network, tokenizer)
    report = Report("PromptQuine: shorter and better prompts by deleting tokens", facts={
        "model": "SmolLM2-135M-Instruct", "dtype": str(dtype).split(".")[-1], "threads": torch.get_num_threads(),
        "seeds": seeds, "prompts per search": prompts, "quick": quick})
    methods: dict[str, PromptOptimizer] = {
        # The populations of the paper would see three generations within this number of prompts.
        "promptquine": PromptQuine(population_size=10, reproduction_size=15, max_prompts=prompts,
                                   min_prompt_length=3),
        "tapruning": TAPruning(max_prompts=prompts),
        "random": RandomPruning(max_prompts=prompts),
    }
    scores: dict[str, dict[str, list[float]]] = {}
    found: list[tuple[str, int, Prompt]] = []
    spent = {name: 0.0 for name in methods}
    began = time.perf_counter()
    with bar("promptquine", len(TASKS) * seeds * len(methods), progress) as moving:
        for name, (train, dev, test) in TASKS.items():
            rows = scores[name] = {m: [] for m in ("zero-shot", "one-shot", *methods)}
            for seed in range(seeds):
                task = data.classification_task(name, seed=seed, train=train, dev=dev,
                                                test=test // 2 if quick else test)
                rows["zero-shot"].append(task.evaluate(Prompt.for_task(task), model).score)
                for method, optimizer in methods.items():
                    started = time.perf_counter()
                    prompt = optimizer.optimize(task, model, seed=seed, progress=False)
                    spent[method] += time.perf_counter() - started
                    if method == "promptquine":
                        found.append((name, seed, prompt))
                        start = dataclasses.replace(prompt, text=prompt.info["start_text"])
                        rows["one-shot"].append(task.evaluate(start, model).score)
                    rows[method].append(task.evaluate(prompt, model).score)
                    moving.update()
    report.facts["search seconds"] = round(time.perf_counter() - began, 1)
    runs = len(TASKS) * seeds
    report.facts["seconds per promptquine search"] = round(spent["promptquine"] / runs, 1)
    _accuracy(report, scores, seeds)
    _generations(report, found, scores)
    _throughput(report, model, network, tokenizer, rounds=2 if quick else 4)
    return report


def _accuracy(report: Report, scores: dict[str, dict[str, list[float]]], seeds: int) -> None:
    from looseleaf.statistics import bootstrap

    table = report.table("Test accuracy: mean over seeds and 95 % bootstrap interval",
                         ["task", "prompt", "accuracy", "low", "high"])
    pooled: dict[str, list[float]] = {}
    for name, rows in scores.items():
        for method, values in rows.items():
            table.add(name, method, *bootstrap(values, 0))
            pooled.setdefault(method, []).extend(values)
    for method, values in pooled.items():
        table.add("all", method, *bootstrap(values, 0))
    report.arrays.update({f"accuracy {n} {m}": v for n, rows in scores.items() for m, v in rows.items()})

    def against(other: str) -> tuple[float, float, float, str]:
        pairs = [a - b for a, b in zip(pooled["promptquine"], pooled[other], strict=True)]
        mean, low, high = bootstrap(pairs, 0)
        return mean, low, high, (f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] accuracy, mean paired difference and 95 % "
                                 f"interval over {len(pairs)} runs ({len(scores)} tasks, {seeds} seeds)")

    enough = seeds >= 3
    _, low, high, text = against("one-shot")
    report.claims.append(Claim.decide(
        (True if low > 0 else False if high <= 0 else None) if enough else None,
        statement="The pruned prompt is better than the one-shot prompt it was cut from",
        source=f"abstract; {SOURCE} (1)", paper="better on nearly all tasks of its tables [memory]", measured=text,
        rule="holds where the interval of the paired difference lies above 0, does not hold where it lies at or "
             "below 0; not shown otherwise or with fewer than 3 seeds"))
    mean, _, high, text = against("tapruning")
    report.claims.append(Claim.decide(
        (True if mean >= 0 else False if high < 0 else None) if enough else None,
        statement="Evolution finds prompts at least as good as hill climbing with as many prompts tried",
        source=f"section on PromptQuine; {SOURCE} (1)", paper="PromptQuine above TAPruning on average [memory]",
        measured=text, rule="holds where the mean difference is at least 0, does not hold where its interval lies "
                            "below 0; not shown otherwise or with fewer than 3 seeds"))
    _, low, high, text = against("random")
    report.claims.append(Claim.decide(
        (True if low > 0 else False if high <= 0 else None) if enough else None,
        statement="Evolution finds better prompts than random pruning with as many prompts tried",
        source=SOURCE + " (1)", paper="not a figure of the paper", measured=text,
        rule="as for the one-shot prompt"))


def _generations(report: Report, found: list[tuple[str, int, Prompt]],
                 scores: dict[str, dict[str, list[float]]]) -> None:
    falls, elite, steps, kept = 0, 0, 0, 0
    for name, seed, prompt in found:
        lines = prompt.info["generations"]
        falls += lines[-1][1] < lines[0][1]
        elite += all(b[4] >= a[4] for a, b in itertools.pairwise(lines))
        steps += len(lines) - 1
        kept += sum(b[2] >= a[2] for a, b in itertools.pairwise(lines))
        if seed == 0:
            explored = prompt.info["explored"]
            report.figure(f"{name}: length and accuracy of every prompt explored", x_label="tokens kept",
                          y_label="accuracy on the fitness examples", series=[
                              Series("prompts", [e[0] for e in explored], [e[2] for e in explored], style="points")])
            report.figure(f"{name}: generations", x_label="prompts explored", y_label="mean tokens kept",
                          series=[Series("mean length", [g[0] for g in lines], [g[1] for g in lines])])
            report.figure(f"{name}: fitness by generation", x_label="prompts explored", y_label="reward",
                          series=[Series("best so far", [g[0] for g in lines], [g[4] for g in lines]),
                                  Series("best of the population", [g[0] for g in lines], [g[2] for g in lines]),
                                  Series("mean of the population", [g[0] for g in lines], [g[3] for g in lines])])
            report.examples += [(f"{name}, start", prompt.info["start_text"]), (f"{name}, found", prompt.text)]
    ratio = sum(p.info["tokens"] / p.info["start_tokens"] for _, _, p in found) / len(found)
    report.claims.append(Claim.decide(
        falls == len(found), statement="Prompts get shorter as the search goes on",
        source=f"method; {SOURCE} (2)", paper="prompts shrink until about 15 tokens are left [memory]",
        measured=f"mean length fell in {falls} of {len(found)} runs; the prompts returned keep {ratio:.0%} of the "
                 "tokens of their start", rule="mean length of the population falls in every run"))
    report.claims.append(Claim.decide(
        elite == len(found), statement="The fitness of the elite never falls",
        source=f"method; {SOURCE} (2)", paper="not a figure of the paper",
        measured=f"best so far never fell in {elite} of {len(found)} runs (so by construction); the best of the "
                 f"population, whose parents age out, did not fall in {kept} of {steps} generations",
        rule="best fitness so far is non-decreasing over the generations of every run"))


def _throughput(report: Report, model: LocalModel, network: Any, tokenizer: Any, rounds: int) -> None:
    """Prompts per second, batched with shared parts, and one (prompt, example) at a time."""
    import torch

    from looseleaf_lab import data

    task = data.classification_task("sentiment", seed=0, train=36, dev=36, test=20)
    examples = list(task.train)[:16]
    start = Prompt.for_task(task, exemplars=[task.train[-1]])
    pieces = Pieces.of(start.as_template(), set(examples[0].fields), model.token_texts)
    rng = random.Random(0)
    parent = without(pieces.full, rng.sample(range(len(pieces.full)), len(pieces.full) // 4))
    places = [n for n, bit in enumerate(parent) if bit == "1"]
    masks = [without(parent, rng.sample(places, rng.randint(1, 4))) for _ in range(8)]
    labels = list((task.labels or {}).values())

    def texts(chosen: list[str], some: list[Example]) -> list[str]:
        return [fill(pieces.text(m), e.fields) for m in chosen for e in some]

    def batched() -> list[list[float]]:
        rows = texts(masks, examples)
        return model.score(rows, [labels] * len(rows))

    @torch.inference_mode()
    def naive() -> list[list[float]]:
        out = []
        for text in texts(masks, examples):
            last = network(**tokenizer(text, return_tensors="pt")).logits[0, -1].float().log_softmax(-1)
            out.append([float(last[tokenizer(label, add_special_tokens=False)["input_ids"][0]]) for label in labels])
        return out

    batched()  # the first call pays for memory and caches
    seconds: dict[str, list[float]] = {"batched": [], "naive": []}
    worst = 0.0
    for _ in range(rounds):  # in turns, so that a busy machine slows both
        began = time.perf_counter()
        a = batched()
        middle = time.perf_counter()
        b = naive()
        seconds["batched"].append(middle - began)
        seconds["naive"].append(time.perf_counter() - middle)
        worst = max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    best = {k: min(v) for k, v in seconds.items()}
    ratio = best["naive"] / best["batched"]
    report.table("Prompts evaluated per second (16 examples each)", ["way", "prompts per second"],
                 [[k, len(masks) / v] for k, v in best.items()],
                 note=f"largest difference of a log-probability: {worst:.2g}")
    report.claims.append(Claim.decide(
        ratio >= 3, statement="Batches that share what prompts have in common make evaluation at least 3 times faster",
        source=SOURCE + " (3)", paper="minutes per task on one GPU [memory]",
        measured=f"{ratio:.1f} times the prompts per second of one forward per (prompt, example), fastest of "
                 f"{rounds} alternating rounds, {torch.get_num_threads()} threads",
        rule="holds where the ratio is at least 3"))
