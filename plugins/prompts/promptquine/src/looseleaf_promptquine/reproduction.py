"""The paper's claims at small real scale: SmolLM2-135M on real texts that ship in packages."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from typing import Any

import torch

from looseleaf import BudgetExhausted, Prompt, Report, Series
from looseleaf.budget import reason
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_lab import data, models
from looseleaf_lab.study import Decision, Results, Study, StudyClaim
from looseleaf_promptquine.optimizer import PAPER, PromptQuine
from looseleaf_promptquine.pieces import Pieces, without
from looseleaf_promptquine.search import Search
from looseleaf_promptquine.tapruning import TAPruning
from looseleaf_text import LocalModel, TextOptimizer, TextPrompt
from looseleaf_text.slots import fill

TASKS = {"sentiment": (36, 36, 100), "question-topics": (51, 51, 60)}
"""Name -> examples in train, dev and test."""
SOURCE = "What counts as working here, fixed before measuring"
METHODS = ("promptquine", "tapruning", "random")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is searched: prompts of each search, the divisor of the test examples, timed rounds."""

    prompts: int = 100
    test_divisor: int = 1
    rounds: int = 4


@dataclasses.dataclass
class RandomPruning(TextOptimizer):
    """The baseline: prompts with tokens left out at random, ranked again like the others.

    Args:
        max_prompts: how many different prompts are tried.
    """

    max_prompts: int = 100
    paper = PAPER

    def optimize(self, task: Any, model: Any, **options: Any) -> Prompt:  # type: ignore[override]
        """Try the start and random prunings of it, each length as likely as any other."""
        search = Search(self, task, model, shots=1, num_shots=16, reward_driven=True, rerank_top=0.10,
                        most=self.max_prompts, **options)
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


@functools.cache
def _model() -> tuple[LocalModel, Any, Any]:
    # bfloat16 where the processor multiplies it by itself and is several times as fast; elsewhere it would be slower
    dtype = torch.bfloat16 if models.bfloat16_is_fast() else torch.float32
    network, tokenizer = models.load("smollm2", dtype=dtype)
    return LocalModel(network, tokenizer), network, tokenizer


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Task -> accuracy of every prompt on the test examples, what PromptQuine found, and seconds."""
    model, _, _ = _model()
    methods: dict[str, TextOptimizer] = {
        # The populations of the paper would see three generations within this number of prompts.
        "promptquine": PromptQuine(population_size=10, reproduction_size=15, max_prompts=scale.prompts,
                                   min_prompt_length=3),
        "tapruning": TAPruning(max_prompts=scale.prompts), "random": RandomPruning(max_prompts=scale.prompts)}
    out: dict[str, Any] = {}
    for name, (train, dev, test) in TASKS.items():
        task = data.classification_task(name, seed=seed, train=train, dev=dev, test=test // scale.test_divisor)
        row: dict[str, Any] = {"accuracy": {"zero-shot": task.evaluate(TextPrompt.for_task(task).on(model)).score},
                               "seconds": {}}
        for method, optimizer in methods.items():
            started = time.perf_counter()
            prompt: Any = optimizer.optimize(task, model, seed=seed, progress=False)
            row["seconds"][method] = time.perf_counter() - started
            if method == "promptquine":
                row["info"], row["text"] = prompt.info, prompt.text
                start = dataclasses.replace(prompt, text=prompt.info["start_text"])
                row["accuracy"]["one-shot"] = task.evaluate(start.on(model)).score
            row["accuracy"][method] = task.evaluate(prompt.on(model)).score
        out[name] = row
    return out


def throughput(scale: Scale) -> dict[str, Any]:
    """Prompts per second, batched with shared parts, and one (prompt, example) at a time."""
    model, network, tokenizer = _model()
    task = data.classification_task("sentiment", seed=0, train=36, dev=36, test=20)
    examples = list(task.train)[:16]
    start = TextPrompt.for_task(task, exemplars=[task.train[-1]])
    pieces = Pieces.of(start.as_template(), set(examples[0].inputs), model.token_texts)
    rng = random.Random(0)
    parent = without(pieces.full, rng.sample(range(len(pieces.full)), len(pieces.full) // 4))
    places = [n for n, bit in enumerate(parent) if bit == "1"]
    masks = [without(parent, rng.sample(places, rng.randint(1, 4))) for _ in range(8)]
    labels = list((task.labels or {}).values())
    texts = [fill(pieces.text(m), e.inputs) for m in masks for e in examples]

    def batched() -> list[list[float]]:
        return model.score(texts, [labels] * len(texts))

    @torch.inference_mode()
    def naive() -> list[list[float]]:
        out = []
        for text in texts:
            last = network(**tokenizer(text, return_tensors="pt")).logits[0, -1].float().log_softmax(-1)
            out.append([float(last[tokenizer(label, add_special_tokens=False)["input_ids"][0]]) for label in labels])
        return out

    batched()  # the first call pays for memory and caches
    seconds: dict[str, list[float]] = {"batched": [], "naive": []}
    worst = 0.0
    for _ in range(scale.rounds):  # in turns, so that a busy machine slows both
        began = time.perf_counter()
        a = batched()
        middle = time.perf_counter()
        b = naive()
        seconds["batched"].append(middle - began)
        seconds["naive"].append(time.perf_counter() - middle)
        worst = max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    return {"per second": {way: len(masks) / min(took) for way, took in seconds.items()}, "worst": worst,
            "threads": torch.get_num_threads(), "dtype": str(network.dtype).split(".")[-1]}


def pooled(results: Results, method: str) -> list[float]:
    """Accuracies of a kind of prompt over tasks and seeds."""
    return [row[task]["accuracy"][method] for task in TASKS for row in results.rows]


def facts(results: Results) -> dict[str, Any]:
    """Model, size of the searches, and what they cost."""
    spent = [row[task]["seconds"] for row in results.rows for task in TASKS]
    return {"model": "SmolLM2-135M-Instruct", "dtype": results.once["dtype"], "threads": results.once["threads"],
            "prompts per search": results.scale.prompts,
            "search seconds": round(sum(sum(s.values()) for s in spent), 1),
            "seconds per promptquine search": round(sum(s["promptquine"] for s in spent) / len(spent), 1)}


def show(report: Report, results: Results) -> None:
    """Accuracies, every prompt explored, the generations, and the throughput."""
    table = report.table("Test accuracy: mean over seeds and 95 % bootstrap interval",
                         ["task", "prompt", "accuracy", "low", "high"])
    ways = ("zero-shot", "one-shot", *METHODS)
    for task in TASKS:
        for method in ways:
            values = results.values(task, "accuracy", method)
            table.add(task, method, *bootstrap(values))
            report.arrays[f"accuracy {task} {method}"] = values
    for method in ways:
        table.add("all", method, *bootstrap(pooled(results, method)))
    for task, first in results.rows[0].items():
        explored, lines = first["info"]["explored"], first["info"]["generations"]
        report.figure(f"{task}: length and accuracy of every prompt explored", x_label="tokens kept",
                      y_label="accuracy on the fitness examples", series=[
                          Series("prompts", [e[0] for e in explored], [e[2] for e in explored], style="points")])
        report.figure(f"{task}: generations", x_label="prompts explored", y_label="mean tokens kept",
                      series=[Series("mean length", [g[0] for g in lines], [g[1] for g in lines])])
        report.figure(f"{task}: fitness by generation", x_label="prompts explored", y_label="reward", series=[
            Series(label, [g[0] for g in lines], [g[n] for g in lines]) for label, n in (
                ("best so far", 4), ("best of the population", 2), ("mean of the population", 3))])
        report.examples += [(f"{task}, start", first["info"]["start_text"]), (f"{task}, found", first["text"])]
    report.table("Prompts evaluated per second (16 examples each)", ["way", "prompts per second"],
                 list(map(list, results.once["per second"].items())),
                 note=f"largest difference of a log-probability: {results.once['worst']:.2g}")


def _against(results: Results, other: str) -> tuple[Interval, str]:
    gap = paired(pooled(results, "promptquine"), pooled(results, other))
    seeds = len(results.seeds)
    return gap, (f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] accuracy, mean paired difference and 95 % "
                 f"interval over {len(TASKS) * seeds} runs ({len(TASKS)} tasks, {seeds} seeds)")


def better_than(other: str, results: Results) -> Decision:
    """Whether PromptQuine's prompts are better than those of another kind."""
    gap, text = _against(results, other)
    return (True if gap.low > 0 else False if gap.high <= 0 else None) if len(results.seeds) >= 3 else None, text


def as_good_as_tapruning(results: Results) -> Decision:
    """Whether evolution is at least as good as hill climbing."""
    gap, text = _against(results, "tapruning")
    return (True if gap.value >= 0 else False if gap.high < 0 else None) if len(results.seeds) >= 3 else None, text


def _infos(results: Results) -> list[dict[str, Any]]:
    return [row[task]["info"] for task in TASKS for row in results.rows]


def shorter(results: Results) -> Decision:
    """Whether populations shrink."""
    infos = _infos(results)
    falls = sum(i["generations"][-1][1] < i["generations"][0][1] for i in infos)
    ratio = sum(i["tokens"] / i["start_tokens"] for i in infos) / len(infos)
    return falls == len(infos), (f"mean length fell in {falls} of {len(infos)} runs; the prompts returned keep "
                                 f"{ratio:.0%} of the tokens of their start")


def elite(results: Results) -> Decision:
    """Whether the best so far never falls."""
    lines = [i["generations"] for i in _infos(results)]
    never = sum(all(b[4] >= a[4] for a, b in itertools.pairwise(run)) for run in lines)
    kept = sum(b[2] >= a[2] for run in lines for a, b in itertools.pairwise(run))
    return never == len(lines), (
        f"best so far never fell in {never} of {len(lines)} runs (so by construction); the best of the population, "
        f"whose parents age out, did not fall in {kept} of {sum(len(run) - 1 for run in lines)} generations")


def faster(results: Results) -> Decision:
    """Whether batches are worth their while."""
    ratio = results.once["per second"]["batched"] / results.once["per second"]["naive"]
    return ratio >= 3, (f"{ratio:.1f} times the prompts per second of one forward per (prompt, example), fastest of "
                        f"{results.scale.rounds} alternating rounds, {results.once['threads']} threads")


CLAIMS = [
    StudyClaim("The pruned prompt is better than the one-shot prompt it was cut from", f"abstract; {SOURCE} (1)",
               "better on nearly all tasks of its tables [memory]",
               "holds where the interval of the paired difference lies above 0, does not hold where it lies at or "
               "below 0; not shown otherwise or with fewer than 3 seeds", functools.partial(better_than, "one-shot")),
    StudyClaim("Evolution finds prompts at least as good as hill climbing with as many prompts tried",
               f"section on PromptQuine; {SOURCE} (1)", "PromptQuine above TAPruning on average [memory]",
               "holds where the mean difference is at least 0, does not hold where its interval lies below 0; not "
               "shown otherwise or with fewer than 3 seeds", as_good_as_tapruning),
    StudyClaim("Evolution finds better prompts than random pruning with as many prompts tried", f"{SOURCE} (1)",
               "not a figure of the paper", "as for the one-shot prompt", functools.partial(better_than, "random")),
    StudyClaim("Prompts get shorter as the search goes on", f"method; {SOURCE} (2)",
               "prompts shrink until about 15 tokens are left [memory]",
               "mean length of the population falls in every run", shorter),
    StudyClaim("The fitness of the elite never falls", f"method; {SOURCE} (2)", "not a figure of the paper",
               "best fitness so far is non-decreasing over the generations of every run", elite),
    StudyClaim("Batches that share what prompts have in common make evaluation at least 3 times faster",
               f"{SOURCE} (3)", "minutes per task on one GPU [memory]", "holds where the ratio is at least 3", faster)]

study = Study("PromptQuine: shorter and better prompts by deleting tokens", measure, CLAIMS, show, once=throughput,
              full=Scale(), quick=Scale(prompts=40, test_divisor=2, rounds=2), facts=facts)
