"""The paper's claims at small real scale: SmolLM2-135M on real texts that ship in packages."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from looseleaf import BudgetExhausted, Claim, Prompt, Report
from looseleaf.budget import reason
from looseleaf.statistics import bootstrap, paired
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, curve
from looseleaf_lab.timing import interleave
from looseleaf_promptquine.optimizer import PAPER, PromptQuine
from looseleaf_promptquine.prompt_tokens import PromptTokens, without
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
        full, stopped = search.prompt_tokens.full, "done"
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
    network, tokenizer = models.load("smollm2", dtype=models.fast_dtype())
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
    prompt_tokens = PromptTokens.of(start.as_template(), set(examples[0].inputs), model.token_texts)
    rng = random.Random(0)
    parent = without(prompt_tokens.full, rng.sample(range(len(prompt_tokens.full)), len(prompt_tokens.full) // 4))
    places = [n for n, bit in enumerate(parent) if bit == "1"]
    masks = [without(parent, rng.sample(places, rng.randint(1, 4))) for _ in range(8)]
    labels = list((task.labels or {}).values())
    texts = [fill(prompt_tokens.text(m), e.inputs) for m in masks for e in examples]

    def batched() -> list[list[float]]:
        return model.score(texts, [labels] * len(texts))

    @torch.inference_mode()
    def naive() -> list[list[float]]:
        out = []
        for text in texts:
            last = network(**tokenizer(text, return_tensors="pt")).logits[0, -1].float().log_softmax(-1)
            out.append([float(last[tokenizer(label, add_special_tokens=False)["input_ids"][0]]) for label in labels])
        return out

    worst = max(abs(x - y) for p, q in zip(batched(), naive(), strict=True) for x, y in zip(p, q, strict=True))
    timing = interleave({"batched": batched, "naive": naive}, scale.rounds, warmup=0)
    return {"per second": {way: len(masks) / min(seconds) for way, seconds in timing.seconds.items()}, "worst": worst,
            "threads": torch.get_num_threads(), "dtype": str(network.dtype).split(".")[-1]}


def pooled(results: Results, method: str) -> list[float]:
    """Accuracies of a kind of prompt over tasks and seeds."""
    return [row[task]["accuracy"][method] for task in TASKS for row in results.rows]


def show(report: Report, results: Results) -> None:
    """Accuracies, every prompt explored, the generations, and the throughput."""
    spent = [row[task]["seconds"] for row in results.rows for task in TASKS]
    report.facts |= {
        "model": "SmolLM2-135M-Instruct", "dtype": results.once["dtype"], "threads": results.once["threads"],
        "prompts per search": results.scale.prompts, "search seconds": round(sum(sum(s.values()) for s in spent), 1),
        "seconds per promptquine search": round(sum(s["promptquine"] for s in spent) / len(spent), 1)}
    prompts = ("zero-shot", "one-shot", *METHODS)
    accuracies = {(task, prompt): results.values(task, "accuracy", prompt) for task in TASKS for prompt in prompts}
    add_table(report, "Test accuracy: mean over seeds and 95 % bootstrap interval", (
        {"task": task, "prompt": prompt, "accuracy": bootstrap(values)}
        for (task, prompt), values in [*accuracies.items(), *((("all", p), pooled(results, p)) for p in prompts)]))
    report.arrays.update({f"accuracy {task} {prompt}": values for (task, prompt), values in accuracies.items()})
    for task, first in results.rows[0].items():
        lengths, _, fitness, *_ = zip(*first["info"]["explored"], strict=True)
        prompts_seen, tokens, best, mean, so_far, *_ = zip(*first["info"]["generations"], strict=True)
        report.figure(f"{task}: length and accuracy of every prompt explored", x_label="tokens kept",
                      y_label="accuracy on the fitness examples", series=[curve("prompts", lengths, fitness, "points")])
        report.figure(f"{task}: generations", x_label="prompts explored", y_label="mean tokens kept",
                      series=[curve("mean length", prompts_seen, tokens)])
        report.figure(f"{task}: fitness by generation", x_label="prompts explored", y_label="reward", series=[
            curve("best so far", prompts_seen, so_far), curve("best of the population", prompts_seen, best),
            curve("mean of the population", prompts_seen, mean)])
        report.examples += [(f"{task}, start", first["info"]["start_text"]), (f"{task}, found", first["text"])]
    report.table("Prompts evaluated per second (16 examples each)", ["way", "prompts per second"],
                 results.once["per second"].items(),
                 note=f"largest difference of a log-probability: {results.once['worst']:.2g}")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project; the quick run decides them too."""
    claim, several = functools.partial(results.claim, any_scale=True), len(results.seeds) >= 3
    gaps = {other: paired(pooled(results, "promptquine"), pooled(results, other))
            for other in ("one-shot", "tapruning", "random")}
    measured = {other: f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] accuracy, mean paired difference and 95 % "
                       f"interval over {len(TASKS) * len(results.seeds)} runs ({len(TASKS)} tasks, "
                       f"{len(results.seeds)} seeds)" for other, gap in gaps.items()}
    yield claim("The pruned prompt is better than the one-shot prompt it was cut from", f"abstract; {SOURCE} (1)",
                "better on nearly all tasks of its tables [memory]",
                "holds where the interval of the paired difference lies above 0, does not hold where it lies at or "
                "below 0; not shown otherwise or with fewer than 3 seeds",
                above(gaps["one-shot"], touching=False) if several else None, measured["one-shot"])
    as_good = True if gaps["tapruning"].value >= 0 else False if gaps["tapruning"].high < 0 else None
    yield claim("Evolution finds prompts at least as good as hill climbing with as many prompts tried",
                f"section on PromptQuine; {SOURCE} (1)", "PromptQuine above TAPruning on average [memory]",
                "holds where the mean difference is at least 0, does not hold where its interval lies below 0; not "
                "shown otherwise or with fewer than 3 seeds", as_good if several else None, measured["tapruning"])
    yield claim("Evolution finds better prompts than random pruning with as many prompts tried", f"{SOURCE} (1)",
                "not a figure of the paper", "as for the one-shot prompt",
                above(gaps["random"], touching=False) if several else None, measured["random"])
    infos = [row[task]["info"] for task in TASKS for row in results.rows]
    runs = [info["generations"] for info in infos]
    falls = sum(run[-1][1] < run[0][1] for run in runs)
    kept = sum(info["tokens"] / info["start_tokens"] for info in infos) / len(infos)
    yield claim("Prompts get shorter as the search goes on", f"method; {SOURCE} (2)",
                "prompts shrink until about 15 tokens are left [memory]",
                "mean length of the population falls in every run", falls == len(runs),
                f"mean length fell in {falls} of {len(runs)} runs; the prompts returned keep {kept:.0%} of the tokens "
                "of their start")
    never = sum(all(b[4] >= a[4] for a, b in itertools.pairwise(run)) for run in runs)
    steps = [b[2] >= a[2] for run in runs for a, b in itertools.pairwise(run)]
    yield claim("The fitness of the elite never falls", f"method; {SOURCE} (2)", "not a figure of the paper",
                "best fitness so far is non-decreasing over the generations of every run", never == len(runs),
                f"best so far never fell in {never} of {len(runs)} runs (so by construction); the best of the "
                f"population, whose parents age out, did not fall in {sum(steps)} of {len(steps)} generations")
    ratio = results.once["per second"]["batched"] / results.once["per second"]["naive"]
    yield claim("Batches that share what prompts have in common make evaluation at least 3 times faster",
                f"{SOURCE} (3)", "minutes per task on one GPU [memory]", "holds where the ratio is at least 3",
                ratio >= 3, f"{ratio:.1f} times the prompts per second of one forward per (prompt, example), fastest "
                f"of {results.scale.rounds} alternating rounds, {results.once['threads']} threads")


study = Study("PromptQuine: shorter and better prompts by deleting tokens", measure, claims, show, once=throughput,
              full=Scale(), quick=Scale(prompts=40, test_divisor=2, rounds=2))
