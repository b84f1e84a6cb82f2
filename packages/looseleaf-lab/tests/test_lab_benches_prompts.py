"""Prompt optimisers side by side, on tasks of text, of embeddings, and of no text at all."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import looseleaf
from looseleaf import Example, Paper, Predictor, Prompt, PromptOptimizer, Report, SetMetric, Task
from looseleaf_lab.benches import TextPrompts, compare_prompts
from looseleaf_lab.benches import prompts as prompts_
from looseleaf_text import LocalModel, TextOptimizer, TextPrompt, TextTask

PAPER = Paper("A paper", ("Some One",), 2020)


def rows(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@dataclasses.dataclass
class First(TextOptimizer):
    """Shows the first training examples."""

    paper: ClassVar[Paper] = PAPER

    def optimize(self, task: Any, model: Any, *, budget: Any = None, start: Any = None, seed: int = 0,
                 state_dir: Any = None, progress: Any = None) -> TextPrompt:
        prompt = TextPrompt.for_task(task, exemplars=list(task.train)[:2])
        value = task.evaluate(prompt.on(budget.meter(model)), "dev").score
        prompt.info.update(fitness=value, evaluations=1, stopped="done", history=[{"calls": 4, "fitness": value}])
        return prompt


def small_task(name: str = "letters") -> TextTask:
    def some(start: int, count: int) -> list[Example]:
        return [Example({"text": f"{'a' if i % 2 else 'b'} {i}"}, "odd" if i % 2 else "even")
                for i in range(start, start + count)]

    return TextTask(name, some(0, 8), some(8, 8), some(16, 8), labels={"odd": " a", "even": " b"}, answer_prefix=" =")


@pytest.fixture
def local(model: Any, tokenizer: Any) -> LocalModel:
    return LocalModel(model, tokenizer)


def test_prompts(local: LocalModel, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"calls": 40, "seeds": (0, 1), "published": False, "state": tmp_path}
    report = compare_prompts(local, {"first": First()}, [small_task()], **arguments)
    found = rows(report, "Prompts found")
    assert [(r["optimiser"], r["seed"]) for r in found] == [
        (n, s) for n in ("(plain)", "(few-shot)", "(random search)", "first") for s in (0, 1)]
    for r in found:
        assert 0 <= r["low"] <= r["test"] <= r["high"] <= 1 and r["calls"] <= 40
    by = {r["optimiser"]: r for r in found}
    assert by["(plain)"]["calls"] == 0 and by["(random search)"]["calls"] > 30 and by["first"]["calls"] == 8
    assert by["(plain)"]["prompt tokens"] == 2 < by["(few-shot)"]["prompt tokens"]
    summary = {r["optimiser"]: r for r in rows(report, "Test score over seeds")}
    assert summary["(few-shot)"]["against few-shot"] == 0 and summary["first"]["seeds"] == 2
    assert any(f.title.startswith("Learning curves") for f in report.figures)
    assert [label for label, _ in report.examples if label.startswith("first on letters")]
    calls = local.calls
    again = compare_prompts(local, {"first": First()}, [small_task()], **arguments)
    assert local.calls == calls and again.tables == report.tables


def test_scores_grow_with_the_budget_in_a_figure(local: LocalModel) -> None:
    report = compare_prompts(local, {"first": First()}, [small_task()], calls=[40, 10], published=False)
    figure = next(f for f in report.figures if f.title.startswith("Test score by budget"))
    assert [(s.name, s.x) for s in figure.series] == [("(random search)", [10, 40]), ("first", [10, 40])]
    assert [r["budget"] for r in rows(report, "Prompts found")] == [None, None, 10, 40, 10, 40]
    assert len(rows(report, "Test score over seeds")) == 4
    with pytest.raises(ValueError, match="calls="):
        compare_prompts(local, {}, [small_task()], calls=[])


def test_random_search_never_spends_more_than_its_budget(local: LocalModel) -> None:
    task = small_task()
    for calls in (1, 7, 30):
        before = local.calls
        budget = looseleaf.Budget(calls=calls)
        prompts_.random_search(task, local, budget, 0, shots=2)
        assert local.calls - before == budget.used["calls"] <= calls
    targets = [e.target for e in prompts_.few_shot(task, random.Random(0), 2).exemplars]
    assert sorted(map(str, targets)) == ["even", "even", "odd", "odd"]


def test_refuses_a_task_without_test(local: LocalModel) -> None:
    with pytest.raises(ValueError, match="expected dev and test examples"):
        compare_prompts(local, {}, [dataclasses.replace(small_task(), test=())])
    with pytest.raises(ValueError, match="expected a task"):
        compare_prompts(local, {}, [])


def test_generation(local: LocalModel) -> None:
    task = dataclasses.replace(small_task("write"), labels=None, metric=lambda prediction, example: len(prediction) > 0,
                               max_tokens=2)
    report = compare_prompts(local, {"first": First()}, [task], calls=20, published=False)
    assert {r["optimiser"] for r in rows(report, "Prompts found")} == {
        "(plain)", "(few-shot)", "(random search)", "first"}
    assert "Left out" not in [t.title for t in report.tables]


# ------------------------------------------------------------------------------------------------- not of answers

@dataclasses.dataclass
class Prefixed(Prompt):
    """Embeddings of the text after a word."""

    word: str = "so"

    def on(self, model: Any) -> Predictor:
        return PrefixedPredictor(self.word, model)


class PrefixedPredictor(Predictor):
    """A vector for each example."""

    def __init__(self, word: str, model: Any) -> None:
        self.word, self.model = word, model

    def predict(self, examples: Any) -> list[Any]:
        return list(self.model.embed([f"{self.word} {e.inputs['text']}" for e in examples]))


@dataclasses.dataclass
class Embedder(First):
    """Of embeddings."""

    def optimize(self, task: Any, model: Any, **options: Any) -> Any:
        if not isinstance(task.metric, SetMetric):
            raise ValueError("expected a task of embeddings")
        return Prefixed()


def test_embeddings_with_a_metric_of_the_whole_set(local: LocalModel) -> None:
    from looseleaf_lab.data import same_as_nearest

    near = dataclasses.replace(small_task("near"), labels=None, metric=SetMetric(same_as_nearest))
    report = compare_prompts(local, {"first": First(), "embedder": Embedder()}, [near, small_task()], calls=20,
                             published=False)
    found = {(r["optimiser"], r["task"]): r for r in rows(report, "Prompts found")}
    own = found["(the model's own)", "near"]
    assert own["low"] <= own["test"] <= own["high"] and own["low"] < own["high"]
    assert ("embedder", "near") in found and ("first", "letters") in found
    left = {r["plugin"]: r["reason"] for r in rows(report, "Left out")}
    assert "expected a task of embeddings" in left["embedder on letters, seed 0"] and "first on near, seed 0" in left
    summary = {(r["optimiser"], r["task"]): r for r in rows(report, "Test score over seeds")}
    assert summary["embedder", "near"]["against few-shot"] is None
    assert summary["embedder", "near"]["test"] == found["embedder", "near"]["test"]


def test_the_interval_of_a_metric_of_the_whole_set_is_about_that_of_its_mean() -> None:
    targets = [float(n % 3 == 0) for n in range(90)]
    examples = [Example({"n": n}, t) for n, t in enumerate(targets)]
    mean = Task("mean", examples, examples, examples, metric=lambda p, e: float(p))
    whole = dataclasses.replace(mean, metric=SetMetric(lambda p, e: sum(p) / len(p)))
    one, two = (prompts_.interval(t, t.rate(targets, examples)) for t in (mean, whole))
    assert one.value == pytest.approx(two.value) and two.low < two.value < two.high
    assert two.low == pytest.approx(one.low, abs=0.04) and two.high == pytest.approx(one.high, abs=0.04)


@dataclasses.dataclass
class Border(Prompt):
    """Pixels added to pictures."""

    pixels: Any = None

    def on(self, model: Any) -> Predictor:
        return BorderPredictor(self.pixels, model)


class BorderPredictor(Predictor):
    """A classifier of pictures with something added."""

    classes = ("dark", "light")

    def __init__(self, pixels: Any, model: Any) -> None:
        self.pixels, self.model = pixels, model

    def scores(self, examples: Any) -> Any:
        return self.model(torch.stack([e.inputs["picture"] + self.pixels for e in examples]).flatten(1))


@dataclasses.dataclass
class Bordering(PromptOptimizer):
    """One of pictures."""

    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = torch.nn.Module

    def optimize(self, task: Any, model: Any, *, budget: Any = None, start: Any = None, seed: int = 0,
                 state_dir: Any = None, progress: Any = None) -> Border:
        prompt = Border(torch.full((4, 4), 0.1))
        prompt.info.update(fitness=task.evaluate(prompt.on(budget.meter(model)), "dev").score)
        return prompt


def test_pictures() -> None:
    pictures = [torch.full((4, 4), n / 15) for n in range(15)]
    examples = [Example({"picture": p}, "light" if n >= 7 else "dark") for n, p in enumerate(pictures)]
    task = Task("light", examples[::3], examples[1::3], examples[2::3], classes=("dark", "light"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = torch.nn.Linear(16, 2)
    nothing = {"(nothing added)": lambda task, model, budget, seed: Border(torch.zeros(4, 4))}
    for baselines, names in ((None, ["border"]), (nothing, ["(nothing added)", "border"])):
        report = compare_prompts(classifier, {"border": Bordering()}, [task], calls=20, baselines=baselines)
        found = rows(report, "Prompts found")
        assert [r["optimiser"] for r in found] == names and found[-1]["calls"] == 5
        assert found[-1]["prompt tokens"] is None
    assert TextPrompts().suits(Bordering) == "for a Module, not for language models"
    assert TextPrompts().suits(First) is TextPrompts().suits(First()) is None


def test_the_bench(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_.models, "load", lambda name, dtype=None, device=None: (model, tokenizer))
    monkeypatch.setattr(prompts_.data, "task", lambda *_, **__: small_task())
    report = TextPrompts(task=("topics",), calls=(20,)).run({"first": First})
    assert {r["optimiser"] for r in rows(report, "Prompts found")} >= {"first", "(plain)"}
    for wrong, message in (({"task": ("sentimant",)}, "Did you mean 'sentiment'"), ({"task": ()}, "one task"),
                           ({"calls": (0,)}, "TextPrompts.calls: expected a sequence of integers >= 1"),
                           ({"seeds": 0}, "seeds")):
        with pytest.raises(ValueError, match=message):
            TextPrompts(**wrong)
