"""Comparisons on a tiny random model: figures that must come out, failures that stay where they are, resuming."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import looseleaf
import looseleaf_text
from looseleaf import AttentionBackend, Paper, Probe, PromptOptimizer, Pruner, Report
from looseleaf_text import Example, Prompt, Task
from looseleaf.attention.call import Phase
from looseleaf_lab import commands, compare, html
from looseleaf_lab.compare import attention as attention_
from looseleaf_lab.compare import patterns
from looseleaf_lab.compare import prompts as prompts_
from looseleaf_lab.compare import pruners as pruners_

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch.set_num_threads(1)
PAPER = Paper("A paper", ("Some One",), 2020)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def rows(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@dataclasses.dataclass
class Exact(AttentionBackend):
    """Exact attention."""

    paper: ClassVar[Paper] = PAPER

    def attend(self, call: Any) -> Any:
        call.record(density=0.5)
        return call.dense()


@dataclasses.dataclass
class Zero(AttentionBackend):
    """No attention at all."""

    paper: ClassVar[Paper] = PAPER

    def attend(self, call: Any) -> Any:
        call.record(density=[0.0, 0.2])
        return torch.zeros_like(call.query)


@dataclasses.dataclass
class Broken(AttentionBackend):
    """Fails."""

    paper: ClassVar[Paper] = PAPER

    def attend(self, call: Any) -> Any:
        raise RuntimeError("out of ideas")


@dataclasses.dataclass
class Learner(Exact):
    """Needs calibration."""

    seen: int = 0

    def calibrate(self, model: Any, batches: Any) -> None:
        self.seen = sum(b["input_ids"].numel() for b in batches)


def test_attention(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    learner = Learner()
    backends = {"exact": Exact(), "zero": Zero(), "broken": Broken(), "learner": learner}
    report = compare.compare_attention(model, tokenizer, backends, [64, 128], rounds=1, last=16, passkeys=1,
                                       state=tmp_path)
    assert learner.seen == 2 * 512, "two texts, of as many tokens as the model takes"
    found = {(r["backend"], r["tokens"]): r for r in rows(report, "Prefill")}
    assert set(found) == {(n, c) for n in ("(exact)", "exact", "zero", "learner") for c in (64, 128)}
    assert found["exact", 64]["pass key"] is None and found["exact", 128]["pass key"] == 0
    exact, zero = found["exact", 128], found["zero", 128]
    assert exact["attention error"] < 1e-5 and zero["attention error"] == pytest.approx(1)
    assert exact["density"] == 0.5 and zero["density"] == pytest.approx(0.1)
    assert exact["loss added"] == pytest.approx(0, abs=1e-5) and zero["loss added"] != 0
    assert found["(exact)", 64]["speed-up"] == 1 and exact["speed-up"] > 0
    deep = {r["backend"]: r["50%"] for r in rows(report, "Pass keys by depth at 128 tokens")}
    assert set(deep) == {"(exact)", "exact", "zero", "learner"} and 0 <= deep["exact"] == deep["(exact)"] <= 1
    front = next(f for f in report.figures if f.title == "What speed costs at 128 tokens")
    assert [s.name for s in front.series] == ["(exact)", "exact", "zero", "learner"]
    drawn = {f.title: f.panels for f in report.figures if f.panels}
    assert set(drawn) == {f"Attention of {n}, layer 1, 128 tokens" for n in ("(exact)", "exact", "zero", "learner")}
    left = rows(report, "Left out")
    assert {r["plugin"] for r in left} == {"broken at 64", "broken at 128"}
    assert all("out of ideas" in r["reason"] for r in left)
    again = compare.compare_attention(model, tokenizer, backends, [64, 128], rounds=1, last=16, passkeys=1,
                                      state=tmp_path)
    assert rows(again, "Prefill") == rows(report, "Prefill"), "a resumed run shows what was kept"
    html.write(report, tmp_path / "r.html")


def test_attention_leaves_the_model_as_it_was(model: Any, tokenizer: Any) -> None:
    ids = torch.arange(40)[None]
    before = model(ids).logits
    kind = model.config._attn_implementation
    compare.compare_attention(model, tokenizer, {"zero": Zero(), "broken": Broken()}, [32], rounds=1, last=4)
    assert model.config._attn_implementation == kind
    torch.testing.assert_close(model(ids).logits, before)


def test_side_by_side_counts_fallbacks(model: Any) -> None:
    backend = looseleaf.SlidingWindow(sink=2, window=1000)
    both = attention_.SideBySide(inner={"window": backend})
    with torch.no_grad(), looseleaf.attach(model, both):
        model(torch.arange(40)[None], use_cache=False)
    found = attention_.density_of(both.found["window"])
    assert found["density"] == 1.0 and found["fallbacks"] == 2 and found["error"] == 0


def test_pareto_front() -> None:
    points = {"fast": (0.1, 3.0), "good": (0.9, 0.1), "both": (0.5, 0.2), "beaten": (0.5, 0.3), "twin": (0.1, 3.0)}
    assert attention_._front(points) == ["fast", "good", "both", "twin"]


def test_attention_maps_say_what_is_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 64, 8, generator=g) for h in (4, 2, 2))
    call = looseleaf.AttentionCall(query, key, value, 8 ** -0.5, True)
    exact = patterns.attention_map(None, call, 16)
    assert exact.shape == (4, 8, 8), "no more cells than the heads have channels"
    scores = torch.einsum("hqd,hkd->hqk", query[0], key[0].repeat_interleave(2, 0)) * 8 ** -0.5
    p = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(exact, p.view(4, 8, 8, 8, 8).sum(4).mean(2), atol=1e-6, rtol=1e-5)
    window = patterns.attention_map(looseleaf.SlidingWindow(sink=8, window=8), call)
    near = torch.arange(8)[:, None] - torch.arange(8)
    seen = ((near >= 0) & (near <= 1)) | ((near > 0) & (torch.arange(8) == 0))
    assert torch.equal(window > 0, seen.expand(4, 8, 8))
    assert not vars(call.state)


@pytest.mark.parametrize("contexts", [[8], [513], []])
def test_attention_refuses_contexts(model: Any, tokenizer: Any, contexts: list[int]) -> None:
    with pytest.raises(ValueError, match="allowed is"):
        compare.compare_attention(model, tokenizer, {}, contexts)


@dataclasses.dataclass
class Smallest(Pruner):
    """Smallest magnitude, all layers together."""

    sparsity: float = 0.5
    paper: ClassVar[Paper] = PAPER

    def score(self, model: Any, data: Any = None) -> dict[str, Any]:
        assert data[0]["input_ids"].shape == (1, 64)
        return {n: w.detach().abs() for n, w in looseleaf.prunable_parameters(model).items()}

    def selection(self) -> Any:
        return looseleaf.Unstructured(self.sparsity)


@dataclasses.dataclass
class Half(Pruner):
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


def test_pruners(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments: dict[str, Any] = {"context": 64, "windows": 2, "state": tmp_path, "tasks": [small_task()]}
    report = compare.compare_pruners(model, tokenizer, {"smallest": Smallest, "half": Half, "refuses": Refuses},
                                     [0.2, 0.6], **arguments)
    found = {(r["pruner"], r["asked for"]): r for r in rows(report, "Pruning without retraining")}
    assert found["smallest", 0.6]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert found["half", None]["sparsity"] == 0.5
    for sparsity in (0.2, 0.6):
        assert found["smallest", sparsity]["perplexity"] == found["(magnitude)", sparsity]["perplexity"]
        assert found["(random)", sparsity]["perplexity"] != found["(magnitude)", sparsity]["perplexity"]
    assert found["(magnitude, by layer)", 0.6]["sparsity"] == pytest.approx(0.6, abs=1e-2)
    assert found["(magnitude, 2:4)", None]["sparsity"] == found["(magnitude, 4:8)", None]["sparsity"] == 0.5
    assert found["(whole model)", None]["sparsity"] == 0
    name = small_task().name
    assert all(row[f"{name}: from"] <= row[f"accuracy, {name}"] <= row[f"{name}: to"] for row in found.values())
    knees = {r["pruner"]: r for r in rows(report, "Essential sparsity")}
    assert set(knees) == {"smallest", "(magnitude)", "(magnitude, by layer)", "(random)"}, "only what was swept"
    assert {f.title for f in report.figures} == {"Perplexity after pruning", f"Accuracy after pruning, {name}"}
    assert "not this model" in rows(report, "Left out")[0]["reason"]
    assert set(before) == {n for n, _ in model.named_parameters()}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    again = compare.compare_pruners(model, tokenizer, {"smallest": Smallest, "half": Half, "refuses": Refuses},
                                    [0.2, 0.6], **arguments)
    assert [t.rows for t in again.tables] == [t.rows for t in report.tables]
    with pytest.raises(ValueError, match="sparsity=1"):
        compare.compare_pruners(model, tokenizer, {}, [1.0])


def test_the_model_is_put_back_when_measuring_fails(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruners_.metrics, "perplexity", fail)
    names = {n for n, _ in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        pruners_.measure(model, Half(), torch.arange(64), 64)
    assert {n for n, _ in model.named_parameters()} == names


@dataclasses.dataclass
class First(PromptOptimizer):
    """Shows the first training examples."""

    paper: ClassVar[Paper] = PAPER

    def optimize(self, task: Any, model: Any, budget: Any = None, *, start: Any = None, seed: int = 0,
                 state_dir: Any = None, progress: Any = None) -> Prompt:
        budget.spend(calls=len(task.dev))
        prompt = Prompt.for_task(task, exemplars=list(task.train)[:2])
        value = task.evaluate(prompt, model, list(task.dev)).score
        prompt.info.update(fitness=value, evaluations=1, stopped="done", history=[{"calls": 4, "fitness": value}])
        return prompt


def small_task(name: str = "letters") -> Task:
    def some(start: int, count: int) -> list[Example]:
        return [Example(f"{'a' if i % 2 else 'b'} {i}", label="odd" if i % 2 else "even")
                for i in range(start, start + count)]

    return Task(name, some(0, 8), some(8, 8), some(16, 8), {"odd": " a", "even": " b"}, template="{text}",
                answer_prefix=" =")


def test_prompts(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    local = looseleaf_text.LocalModel(model, tokenizer)
    report = compare.compare_prompts(local, {"first": First()}, [small_task()], calls=40, seeds=(0, 1), published=False,
                                     state=tmp_path)
    found = rows(report, "Prompts found")
    assert [(r["optimiser"], r["seed"]) for r in found] == [
        (n, s) for n in ("(plain)", "(few-shot)", "(random search)", "first") for s in (0, 1)]
    for r in found:
        assert 0 <= r["from"] <= r["test"] <= r["to"] <= 1 and r["calls"] <= 40
    by = {r["optimiser"]: r for r in found}
    assert by["(plain)"]["calls"] == 0 and by["(random search)"]["calls"] > 30 and by["first"]["calls"] == 8
    assert by["(plain)"]["prompt tokens"] == 2 < by["(few-shot)"]["prompt tokens"]
    summary = {r["optimiser"]: r for r in rows(report, "Test accuracy over seeds")}
    assert summary["(few-shot)"]["against few-shot"] == 0 and summary["first"]["seeds"] == 2
    assert any(f.title.startswith("Learning curves") for f in report.figures)
    calls = local.calls
    again = compare.compare_prompts(local, {"first": First()}, [small_task()], calls=40, seeds=(0, 1), state=tmp_path,
                                    published=False)
    assert local.calls == calls and again.tables == report.tables


def test_accuracy_grows_with_the_budget_in_a_figure(model: Any, tokenizer: Any) -> None:
    local = looseleaf_text.LocalModel(model, tokenizer)
    report = compare.compare_prompts(local, {"first": First()}, [small_task()], calls=[40, 10], published=False)
    figure = next(f for f in report.figures if f.title.startswith("Test accuracy by budget"))
    assert [(s.name, s.x) for s in figure.series] == [("(random search)", [10, 40]), ("first", [10, 40])]
    assert [r["budget"] for r in rows(report, "Prompts found")] == [None, None, 10, 40, 10, 40]
    assert len(rows(report, "Test accuracy over seeds")) == 4
    with pytest.raises(ValueError, match="calls="):
        compare.compare_prompts(local, {}, [small_task()], calls=[])


def test_random_search_never_spends_more_than_its_budget(model: Any, tokenizer: Any) -> None:
    import random

    local = looseleaf_text.LocalModel(model, tokenizer)
    task = small_task()
    for calls in (1, 7, 30):
        before = local.calls
        budget = looseleaf.Budget(calls=calls)
        prompts_.rival(prompts_.SEARCH, task, local, budget, 0, 2)
        assert local.calls - before == budget.used["calls"] <= calls
    labels = [e.label for e in prompts_.few_shot(task, random.Random(0), 2).exemplars]
    assert sorted(map(str, labels)) == ["even", "even", "odd", "odd"]


def test_prompts_refuse_a_task_without_test(model: Any, tokenizer: Any) -> None:
    task = dataclasses.replace(small_task(), test=())
    with pytest.raises(ValueError, match="needs dev and test"):
        compare.compare_prompts(looseleaf_text.LocalModel(model, tokenizer), {}, [task])


@dataclasses.dataclass
class Count(Probe):
    """Counts parameters."""

    paper: ClassVar[Paper] = PAPER
    fail: bool = False

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        if self.fail:
            raise RuntimeError("no")
        report = Report("count", {"parameters": sum(p.numel() for p in model.parameters())})
        report.table("t", ["a"], [[math.nan]])
        return report


@dataclasses.dataclass
class Norm(Count):
    """Norms of weights."""

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        if self.fail:
            raise RuntimeError("no")
        norms = [float(p.detach().norm()) for p in model.parameters()]
        report = Report("norm", {"first": norms[0]})
        report.table("norms", ["place", "norm"], [["first", norms[0]], ["all", sum(norms)]])
        if norms[0]:
            report.table("only the dense", ["norm"], [[norms[0]]])
        report.figure("norms", x_label="weight", y_label="norm",
                      series=[looseleaf.Series("norm", [float(n) for n in range(len(norms))], norms)])
        report.figure("picture", image=[norms])
        report.claims.append(looseleaf.Claim.decide(True, statement="norms are norms", source="s", paper="p",
                                                    measured="m", rule="r"))
        return report


def test_probes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    report = compare.compare_probes({"tiny": (model, tokenizer)}, {"count": Count(), "fails": Count(fail=True)},
                                    state=tmp_path)
    assert report.facts["count on tiny: parameters"] == sum(p.numel() for p in model.parameters())
    assert rows(report, "Left out")[0]["plugin"] == "fails on tiny"
    again = compare.compare_probes({"tiny": (model, tokenizer)}, {"count": Count()}, state=tmp_path)
    assert again.tables[0].rows == report.tables[0].rows


def test_probes_side_by_side(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Rows of the same place below each other, curves in one figure; a kept cell is of one set of weights."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).zero_()
    both = {"dense": (model, tokenizer), "pruned": (other, tokenizer)}
    report = compare.compare_probes(both, {"norm": Norm(), "count": Count()}, state=tmp_path)
    table = next(t for t in report.tables if t.title == "norm: norms")
    assert table.columns == ["model", "place", "norm"]
    assert [r[:2] for r in table.rows] == [["dense", "first"], ["pruned", "first"], ["dense", "all"], ["pruned", "all"]]
    assert table.rows[0][2] != 0 == table.rows[1][2]
    assert [t.title for t in report.tables if "only" in t.title] == ["norm: only the dense"]
    assert [[s.name for s in f.series] for f in report.figures[:1]] == [["norm, dense", "norm, pruned"]]
    assert [f.title for f in report.figures[1:]] == ["norm: picture, dense", "norm: picture, pruned"]
    assert [c.statement for c in report.claims] == ["dense: norms are norms", "pruned: norms are norms"]
    assert report.facts["count: parameters"] == sum(p.numel() for p in model.parameters())
    assert report.facts["norm: dense: first"] > report.facts["norm: pruned: first"] == 0
    again = compare.compare_probes({"x": (other, tokenizer)}, {"norm": Norm(fail=True)}, state=tmp_path)
    assert rows(again, "Left out"), "other parameters, so nothing kept is taken"
    again = compare.compare_probes({"x": (other, tokenizer)}, {"norm": Norm()}, state=tmp_path)
    assert again.facts["norm on x: first"] == 0


@pytest.fixture
def loaded(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.models, "load", lambda name, dtype=None, device=None: (model, tokenizer))
    monkeypatch.setattr(commands, "_device", lambda: "cpu")
    monkeypatch.setattr(commands.data, "classification_task", lambda *_, **__: small_task())


@pytest.mark.usefixtures("loaded")
def test_commands_run(tmp_path: Path) -> None:
    report = commands.run("attention", "window", looseleaf.SlidingWindow(window=16), context=128)
    assert report.facts["plugin"] == "window" and rows(report, "Layers")
    with pytest.raises(ValueError, match="nothing to save"):
        commands.run("attention", "window", looseleaf.SlidingWindow(window=16), context=64, save=tmp_path / "x")
    path = tmp_path / "masks.safetensors"
    report = commands.run("pruners", "half", Half(), context=64, save=path)
    assert looseleaf.Masks.load(path).sparsity() == 0.5 == report.facts["sparsity reached"]
    with pytest.raises(ValueError, match="--save-model is for pruners"):
        commands.run("probes", "count", Count(), save_model=tmp_path / "no")
    path = tmp_path / "prompt.json"
    report = commands.run("prompts", "first", First(), calls=40, save=path)
    assert Prompt.load(path).exemplars and report.facts["calls used"] == 8
    report = commands.run("probes", "count", Count(), save=tmp_path / "probe.json")
    assert "parameters" in (tmp_path / "probe.json").read_text()
    text = tmp_path / "text.txt"
    text.write_text("These are some words that are there to be read. " * 40, encoding="utf-8")
    commands.run("attention", "window", looseleaf.SlidingWindow(window=16), context=64, text=str(text))
    commands.run("pruners", "half", Half(), context=64, text=str(text))


@pytest.mark.usefixtures("loaded")
def test_commands_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind='bank'"):
        commands.run("bank", "x", None)
    with pytest.raises(ValueError, match="kind='bank'"):
        commands.compare("bank", [])
    with pytest.raises(ValueError, match="Give a text file"):
        commands.run("attention", "x", None, text=str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="task 'x' is unknown"):
        commands.run("prompts", "x", None, task="x")
    with pytest.raises(ValueError, match="task 'x' is unknown"):
        commands.compare("prompts", [], tasks=["x"])
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(ValueError, match="--task"):
        commands.run("prompts", "first", First(), text=str(tmp_path / "t.txt"))
    with pytest.raises(ValueError, match="pass a longer text"):
        commands.run("attention", "w", looseleaf.SlidingWindow(), text=str(tmp_path / "t.txt"), context=64)


@dataclasses.dataclass
class Needy(Count):
    """Has no default."""

    what: int = dataclasses.field(default=None)  # type: ignore[assignment]

    def validate(self) -> None:
        self.check("what", self.what is not None, "a number")


@dataclasses.dataclass
class Denoising(Exact):
    """Exact attention, for bidirectional calls."""

    changes: ClassVar[Phase] = "encode"


@pytest.mark.usefixtures("loaded")
def test_methods_for_denoising_are_compared_where_they_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def denoise(backends: Any, models: Any, **given: Any) -> Report:
        asked.append((list(backends), list(models)))
        made = Report("denoising")
        made.table("Denoising", ["backend"], [["x"]])
        return made

    monkeypatch.setattr(compare, "compare_denoising", denoise)
    ready = [("exact", Exact), ("denoising", Denoising)]
    report = commands.compare("attention", ready, contexts=[32], passkeys=0)
    assert {r["backend"] for r in rows(report, "Prefill")} == {"(exact)", "exact", "(window)"}
    assert asked == [(["denoising"], ["text", "video"])] and rows(report, "Denoising") == [{"backend": "x"}]
    commands.compare("attention", ready[:1], contexts=[32], passkeys=0)
    assert len(asked) == 1, "no method for denoising, no denoising model"
    without = commands.compare("attention", ready, contexts=[32], passkeys=0, denoising=())
    assert len(asked) == 1 and rows(without, "Left out") == [
        {"plugin": "denoising", "reason": "for denoising models: --denoising text video"}]


@pytest.mark.usefixtures("loaded")
def test_commands_compare(tmp_path: Path) -> None:
    state = tmp_path / "state"
    report = commands.compare("attention", [("window", looseleaf.SlidingWindow)], contexts=[32], state=state)
    assert rows(report, "Prefill") and list(state.iterdir())
    assert rows(commands.compare("pruners", [("half", Half)], sparsities=[0.1], state=state),
                "Pruning without retraining")
    assert rows(commands.compare("prompts", [("first", First)], tasks=["topics"], calls=20, state=state),
                "Prompts found")
    report = commands.compare("prompts", [("vectors", Vectors)], tasks=["topics"], calls=20, state=state)
    assert {"plugin": "vectors", "reason": "improves embeddings, not answers"} in rows(report, "Left out")
    report = commands.compare("probes", [("count", Count), ("needy", Needy)], state=state)
    assert rows(report, "Probes")
    assert rows(report, "Left out")[0]["plugin"] == "needy"
    report = commands.compare("probes", [("count", Count)], model=["a", "b", "a"])
    assert [r["model"] for r in rows(report, "Probes")] == ["a", "b"] and report.facts["model"].startswith("a (Llama")
    with pytest.raises(ValueError, match="compare attention takes one model, got a, b"):
        commands.compare("attention", [], model=["a", "b"])
    report = commands.compare("pruners", [("half", Half), ("updates", Updates)], sparsities=[0.1], state=state)
    assert {"plugin": "updates", "reason": "removes updates, not weights"} in rows(report, "Left out")


@dataclasses.dataclass
class Vectors(First):
    """Accuracy says nothing of it."""

    improves: ClassVar[Any] = "embeddings"


@dataclasses.dataclass
class Updates(Half):
    """Masks of updates, which are not for a comparison of models."""

    removes: ClassVar[Any] = "updates"


def test_a_pruned_model_is_saved_for_transformers(model: Any, tokenizer: Any, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    monkeypatch.setattr(commands.models, "load",
                        lambda name, dtype=None, device=None: (copy.deepcopy(model), tokenizer))
    target = tmp_path / "pruned"
    report = commands.run("pruners", "half", Half(), context=64, save_model=target)
    plain = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert transformers.AutoTokenizer.from_pretrained(target)("a")["input_ids"] == tokenizer("a")["input_ids"]
    zeros = {n: float((p == 0).float().mean()) for n, p in plain.named_parameters() if "proj" in n}
    assert report.facts["sparsity reached"] == 0.5 and set(zeros.values()) == {0.5}
    with pytest.raises(ValueError, match="there is something already"):
        commands.run("pruners", "half", Half(), context=64, save_model=target)
    with pytest.raises(ValueError, match="does not exist"):
        commands.run("pruners", "half", Half(), context=64, save_model=tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="removes updates, not weights"):
        commands.run("pruners", "updates", Updates(), context=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruned"], "nothing half-written is left"
