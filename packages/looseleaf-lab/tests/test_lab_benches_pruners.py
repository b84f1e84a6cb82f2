"""Pruners side by side: a language model without retraining, and small networks with it, lotteries included."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import looseleaf
from looseleaf import Paper, Report, WeightPruner
from looseleaf_lab.benches import Lotteries, PrunedWeights, compare_lotteries, compare_pruners, pruned_weights
from looseleaf_text import TextTask
from looseleaf_tickets import IterativePruner

PAPER = Paper("A paper", ("Some One",), 2020)


def rows(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@dataclasses.dataclass
class Smallest(WeightPruner):
    """Smallest magnitude, all layers together."""

    sparsity: float = 0.5
    paper: ClassVar[Paper] = PAPER
    seen: ClassVar[list[Any]] = []

    def score(self, model: Any, data: Any = None) -> dict[str, Any]:
        self.seen.append(data)
        return {n: w.detach().abs() for n, w in looseleaf.prunable_parameters(model).items()}

    def selection(self) -> Any:
        return looseleaf.Unstructured(self.sparsity)


@dataclasses.dataclass
class Half(WeightPruner):
    """Two of four, whatever is asked."""

    paper: ClassVar[Paper] = PAPER

    def score(self, model: Any, data: Any = None) -> dict[str, Any]:
        return {n: w.detach().abs() for n, w in looseleaf.prunable_parameters(model).items()}

    def selection(self) -> Any:
        return looseleaf.NM(2, 4)


@dataclasses.dataclass
class Refuses(Half):
    """Fails."""

    def score(self, model: Any, data: Any = None) -> dict[str, Any]:
        raise ValueError("not this model")


@dataclasses.dataclass
class Tickets(IterativePruner):
    """From the initial weights."""

    paper: ClassVar[Paper] = PAPER

    def rewinding(self) -> int:
        return 0


@dataclasses.dataclass
class Tokens(looseleaf.TokenPruner):
    """Masks of tokens."""

    paper: ClassVar[Paper] = PAPER

    def keep(self, model: Any, batch: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass
class Updates(looseleaf.UpdatePruner):
    """Masks of updates."""

    paper: ClassVar[Paper] = PAPER

    def keep(self, before: Any, after: Any) -> Any:
        raise NotImplementedError


def small_task() -> TextTask:
    def some(start: int, count: int) -> list[looseleaf.Example]:
        return [looseleaf.Example({"text": f"{'a' if i % 2 else 'b'} {i}"}, "odd" if i % 2 else "even")
                for i in range(start, start + count)]

    return TextTask("letters", some(0, 8), some(8, 8), some(16, 8), labels={"odd": " a", "even": " b"},
                    answer_prefix=" =")


def test_pruners(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments: dict[str, Any] = {"context": 64, "windows": 2, "state": tmp_path, "tasks": [small_task()]}
    pruners: Any = {"smallest": Smallest, "half": Half(), "refuses": Refuses, "instance": Smallest(0.1)}
    report = compare_pruners(model, tokenizer, pruners, [0.2, 0.6], **arguments)
    assert all(data[0]["input_ids"].shape == (1, 64) for data in Smallest.seen)
    found = {(r["pruner"], r["asked for"]): r for r in rows(report, "Pruning without retraining")}
    assert found["smallest", 0.6]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert found["half", None]["sparsity"] == 0.5
    for sparsity in (0.2, 0.6):
        assert found["smallest", sparsity]["perplexity"] == found["(magnitude)", sparsity]["perplexity"]
        assert found["instance", sparsity]["perplexity"] == found["(magnitude)", sparsity]["perplexity"]
        assert found["(random)", sparsity]["perplexity"] != found["(magnitude)", sparsity]["perplexity"]
    assert found["(magnitude, by layer)", 0.6]["sparsity"] == pytest.approx(0.6, abs=1e-2)
    assert found["(magnitude, 2:4)", None]["sparsity"] == found["(magnitude, 4:8)", None]["sparsity"] == 0.5
    assert found["(dense)", None]["sparsity"] == 0
    name = small_task().name
    assert all(row[f"{name}: low"] <= row[f"accuracy, {name}"] <= row[f"{name}: high"] for row in found.values())
    assert all(row["low"] <= row["perplexity"] <= row["high"] for row in found.values())
    knees = {r["pruner"]: r for r in rows(report, "Essential sparsity")}
    assert set(knees) == {"smallest", "instance", "(magnitude)", "(magnitude, by layer)", "(random)"}, "what was swept"
    assert {f.title for f in report.figures} == {"Perplexity after pruning", f"Accuracy after pruning, {name}"}
    assert "not this model" in rows(report, "Left out")[0]["reason"]
    assert set(before) == {n for n, _ in model.named_parameters()}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    again = compare_pruners(model, tokenizer, pruners, [0.2, 0.6], **arguments)
    assert [t.rows for t in again.tables] == [t.rows for t in report.tables]
    with pytest.raises(ValueError, match=r"sparsities: expected numbers in \[0, 1\), got 1.0"):
        compare_pruners(model, tokenizer, {}, [1.0])
    nearest = dataclasses.replace(small_task(), labels=None, metric=looseleaf.SetMetric(lambda p, e: 0.0))
    with pytest.raises(ValueError, match="expected a metric of single predictions"):
        compare_pruners(model, tokenizer, {}, [0.5], tasks=[nearest])


def test_the_model_is_put_back_when_measuring_fails(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruned_weights.metrics, "perplexity", fail)
    names = {n for n, _ in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        pruned_weights.measure(model, Half(), torch.arange(64), 64)
    assert {n for n, _ in model.named_parameters()} == names


def test_who_is_compared_where() -> None:
    weights, lotteries = PrunedWeights(), Lotteries()
    for plugin in (Half, Half(), Smallest):
        assert weights.suits(plugin) is lotteries.suits(plugin) is None
    for plugin in (Tickets, Tickets()):
        assert lotteries.suits(plugin) is None
        assert weights.suits(plugin) == "trains between its rounds: compared on small networks"
    for bench in (weights, lotteries):
        assert bench.suits(Tokens) == "expected a WeightPruner, got TokenPruner"
        assert bench.suits(Updates()) == "expected a WeightPruner, got UpdatePruner"


def test_the_bench(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruned_weights.models, "load", lambda name, dtype=None, device=None: (model, tokenizer))
    report = PrunedWeights(sparsity=(0.5,), task=(), windows=1).run({"half": Half})
    assert {r["pruner"] for r in rows(report, "Pruning without retraining")} >= {"half", "(dense)", "(magnitude)"}
    with pytest.raises(ValueError, match="Did you mean 'topics'"):
        PrunedWeights(task=("topic",))
    with pytest.raises(ValueError, match=r"PrunedWeights.sparsity: expected a sequence of numbers in \[0, 1\)"):
        PrunedWeights(sparsity=(1.0,))


def test_lotteries_beside_one_shot_methods(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    Smallest.seen.clear()
    pruners: Any = {"smallest": Smallest, "half": Half, "tickets": Tickets, "refuses": Refuses}
    arguments: dict[str, Any] = {"seeds": (0, 1), "steps": 30, "state": tmp_path}
    report = compare_lotteries(pruners, [0.2, 0.9], **arguments)
    found = {(r["pruner"], r["asked for"]): r for r in rows(report, "Pruning with training")}
    assert set(found) == {("(dense)", None), ("half", None), *(
        (n, s) for n in ("(random)", "(magnitude)", "smallest", "tickets") for s in (0.2, 0.9))}
    for (name, asked), row in found.items():
        assert row["low"] <= row["accuracy"] <= row["high"] <= 1, name
        assert row["accuracy"] > (0.15 if name == "(random)" else 0.5), name
        if asked is not None:
            assert row["sparsity"] == pytest.approx(asked, abs=1e-3)
    assert found["half", None]["sparsity"] == 0.5 and found["(dense)", None]["against dense"] == 0
    assert found["smallest", 0.9]["accuracy"] == found["(magnitude)", 0.9]["accuracy"]
    assert found["(magnitude)", 0.9]["accuracy when pruned"] < found["(magnitude)", 0.9]["accuracy"]
    assert found["(magnitude)", 0.2]["trainings"] == 2 and found["(dense)", None]["trainings"] == 1
    assert found["tickets", 0.2]["trainings"] == 2 and found["tickets", 0.9]["trainings"] == 12
    assert found["tickets", 0.9]["accuracy when pruned"] is None
    images, classes = Smallest.seen[0][0]
    assert images.shape == (60, 1, 8, 8) and classes.shape == (60,)
    figure = next(f for f in report.figures if f.title == "Test accuracy over sparsity")
    assert {s.name for s in figure.series} == {"(dense)", "(random)", "(magnitude)", "smallest", "half", "tickets"}
    assert [r["plugin"] for r in rows(report, "Left out")] == ["refuses"]
    again = compare_lotteries(pruners, [0.2, 0.9], **arguments)
    assert [t.rows for t in again.tables] == [t.rows for t in report.tables]


def test_lotteries_refuse() -> None:
    with pytest.raises(ValueError, match=r"Lotteries.network: expected 'mlp' or 'resnet', got 'vgg'"):
        Lotteries(network="vgg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a network among mlp, resnet"):
        compare_lotteries({}, network="vgg")
    with pytest.raises(ValueError, match=r"sparsities=\[1.5\]"):
        compare_lotteries({}, [1.5])


@pytest.mark.slow
def test_lotteries_on_a_residual_network() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    report = Lotteries(network="resnet", sparsity=(0.5,), seeds=1, steps=60).run({"tickets": Tickets})
    assert {r["pruner"] for r in rows(report, "Pruning with training")} == {
        "(dense)", "(random)", "(magnitude)", "tickets"}
