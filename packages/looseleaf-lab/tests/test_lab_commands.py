"""``looseleaf run``: one plugin of each kind on a tiny model, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest

import looseleaf
from looseleaf import Example, Paper, Probe, Prompt, Report, WeightPruner
from looseleaf.probes.subject import parts
from looseleaf_lab import commands
from looseleaf_text import TextOptimizer, TextPrompt, TextTask

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PAPER = Paper("A paper", ("Some One",), 2020)


def rows(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@dataclasses.dataclass
class Half(WeightPruner):
    """Two of four."""

    paper: ClassVar[Paper] = PAPER

    def score(self, model: Any, data: Any = None) -> dict[str, Any]:
        return {n: w.detach().abs() for n, w in looseleaf.prunable_parameters(model).items()}

    def selection(self) -> Any:
        return looseleaf.NM(2, 4)


@dataclasses.dataclass
class Tokens(looseleaf.TokenPruner):
    """Masks of tokens."""

    paper: ClassVar[Paper] = PAPER

    def keep(self, model: Any, batch: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass
class First(TextOptimizer):
    """Shows the first training examples."""

    paper: ClassVar[Paper] = PAPER

    def optimize(self, task: Any, model: Any, *, budget: Any = None, start: Any = None, seed: int = 0,
                 state_dir: Any = None, progress: Any = None) -> TextPrompt:
        prompt = TextPrompt.for_task(task, exemplars=list(task.train)[:2])
        prompt.info.update(fitness=task.evaluate(prompt.on(budget.meter(model)), "dev").score)
        return prompt


@dataclasses.dataclass
class Count(Probe):
    """Counts parameters and tokens."""

    paper: ClassVar[Paper] = PAPER

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        model, tokenizer = parts(subject, "tokenizer")
        return Report("count", {"parameters": sum(p.numel() for p in model.parameters()),
                                "tokens": len(tokenizer(data or "abc")["input_ids"])})


def small_task(name: str = "letters", *_: Any, **__: Any) -> TextTask:
    def some(start: int, count: int) -> list[Example]:
        return [Example({"text": f"{'a' if i % 2 else 'b'} {i}"}, "odd" if i % 2 else "even")
                for i in range(start, start + count)]

    return TextTask(name, some(0, 8), some(8, 8), some(16, 8), labels={"odd": " a", "even": " b"}, answer_prefix=" =")


@pytest.fixture
def loaded(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.models, "load",
                        lambda name, dtype=None, device=None: (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(commands.data, "task", small_task)


@pytest.mark.usefixtures("loaded")
def test_one_of_each_kind(tmp_path: Path) -> None:
    report = commands.run("window", looseleaf.SlidingWindow(window=16), context=128)
    assert report.facts["plugin"] == "window" and rows(report, "Layers")
    with pytest.raises(ValueError, match=r"SlidingWindow.save: expected something learned"):
        commands.run("window", looseleaf.SlidingWindow(window=16), context=64, save=tmp_path / "x")
    path = tmp_path / "masks.safetensors"
    report = commands.run("half", Half(), context=64, save=path)
    assert looseleaf.Masks.load(path).sparsity() == 0.5 == report.facts["sparsity reached"]
    assert [r["model"] for r in rows(report, "Perplexity")] == ["(dense)", "pruned"]
    path = tmp_path / "prompt.json"
    report = commands.run("first", First(), calls=40, save=path)
    found = Prompt.load(path)
    assert isinstance(found, TextPrompt) and found.exemplars and report.facts["calls used"] == 8
    assert [r["prompt"] for r in rows(report, "Scores")] == ["(plain)", "found"]
    report = commands.run("count", Count(), save=tmp_path / "probe.json")
    assert "parameters" in (tmp_path / "probe.json").read_text() and report.facts["tokens"] == 3
    text = tmp_path / "text.txt"
    text.write_text("These are some words that are there to be read. " * 40, encoding="utf-8")
    commands.run("window", looseleaf.SlidingWindow(window=16), context=64, text=str(text))
    commands.run("half", Half(), context=64, text=str(text))
    assert commands.run("count", Count(), text=str(text)).facts["tokens"] == 48 * 40


@pytest.mark.usefixtures("loaded")
def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: expected AttentionBackend, WeightPruner, PromptOptimizer, Probe.*got a "
                                         "TokenPruner: see its README.*looseleaf reproduce x"):
        commands.run("x", Tokens())
    with pytest.raises(ValueError, match="Give a text file"):
        commands.run("x", Half(), text=str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match=r"task: expected .* got 'x'"):
        commands.run("x", First(), task="x")
    with pytest.raises(ValueError, match="--save-model: expected a weight pruner, got count"):
        commands.run("count", Count(), save_model=tmp_path / "no")
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(ValueError, match="--text: expected data from --task"):
        commands.run("first", First(), text=str(tmp_path / "t.txt"))
    with pytest.raises(ValueError, match="pass a longer text"):
        commands.run("w", looseleaf.SlidingWindow(), text=str(tmp_path / "t.txt"), context=64)


@pytest.mark.usefixtures("loaded")
def test_a_pruned_model_is_saved_for_transformers(tokenizer: Any, tmp_path: Path) -> None:
    target = tmp_path / "pruned"
    report = commands.run("half", Half(), context=64, save_model=target)
    plain = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert transformers.AutoTokenizer.from_pretrained(target)("a")["input_ids"] == tokenizer("a")["input_ids"]
    zeros = {n: float((p == 0).float().mean()) for n, p in plain.named_parameters() if "proj" in n}
    assert report.facts["sparsity reached"] == 0.5 and set(zeros.values()) == {0.5}
    with pytest.raises(ValueError, match="there is something already"):
        commands.run("half", Half(), context=64, save_model=target)
    with pytest.raises(ValueError, match="does not exist"):
        commands.run("half", Half(), context=64, save_model=tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruned"], "nothing half-written is left"
