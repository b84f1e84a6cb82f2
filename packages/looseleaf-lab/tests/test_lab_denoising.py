"""Backends for denoising models side by side, on models of a few thousand parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import looseleaf
from looseleaf import AttentionBackend, AttentionCall
from looseleaf.attention.call import Phase
from looseleaf.errors import LooseleafError
from looseleaf_lab import masked_diffusion
from looseleaf_lab.attention import BlockWindow
from looseleaf_lab.benches import Denoising, compare_denoising, denoising


@dataclasses.dataclass
class Learner(AttentionBackend):
    """Exact, given the prompt and calibrated; counts.

    Args:
        prompt_tokens: given by the bench.
    """

    prompt_tokens: int | None = None
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
    paper = looseleaf.SlidingWindow.paper
    calibrations: ClassVar[list[tuple[int | None, int]]] = []

    def calibrate(self, model: torch.nn.Module, batches: Any) -> None:
        with looseleaf.attach(model, BlockWindow(density=1.0, block=16), steps=4) as attached:
            batches(attached)
        self.calibrations.append((self.prompt_tokens, len(attached.records)))

    def attend(self, call: AttentionCall) -> torch.Tensor:
        call.record(density=1.0)
        return call.dense()


@dataclasses.dataclass
class Broken(AttentionBackend):
    """Fails."""

    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
    paper = looseleaf.SlidingWindow.paper

    def attend(self, call: AttentionCall) -> torch.Tensor:
        raise RuntimeError("out of ideas")


def small(*, progress: bool | None = None) -> denoising.Denoiser:
    model = masked_diffusion.new_model(20, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                                       num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5)

    def run(attached: Any, seed: int) -> Any:
        prompts = torch.randint(0, 19, (2, 32), generator=torch.Generator().manual_seed(seed))
        return masked_diffusion.generate(model, prompts, length=96, steps=4, mask_id=19, attached=attached,
                                         progress=False)

    return denoising.Denoiser("tiny", model, {"prompt_tokens": 32}, 4, run,
                              lambda one, two: float((one != two).double().mean()), lambda found: 1.5,
                              ("fraction", "nothing"))


def test_compare_denoising(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(denoising.MODELS, "text", small)
    Learner.calibrations.clear()
    backends = {"learner": Learner(), "broken": Broken(), "causal": looseleaf.SlidingWindow()}
    report = compare_denoising(backends, ["text"], rounds=1, state=tmp_path)
    table = next(t for t in report.tables if t.title == "Denoising")
    rows = {r[0]: dict(zip(table.columns, r, strict=True)) for r in table.rows}
    assert set(rows) == {"(exact)", "learner", "causal", "(window)"}
    assert Learner.calibrations == [(32, 12)], "given the prompt, and calibrated on one run of 4 steps in 3 layers"
    assert rows["learner"]["output differs"] == rows["(exact)"]["output differs"] == 0
    assert rows["learner"]["attention error"] == 0 < rows["(window)"]["attention error"]
    assert rows["causal"]["fallbacks"] == 12 and rows["(window)"]["density"] == pytest.approx(0.5)
    assert rows["(exact)"]["quality"] == 1.5 and "nothing" in table.note
    assert [t.rows for t in report.tables if t.title == "Left out"] == [
        [["broken on tiny", "RuntimeError: out of ideas"]]]
    drawn = {f.title.split(":")[0]: f.panels for f in report.figures if f.panels}
    assert set(drawn) == {"Attention of (exact)", "Attention of learner", "Attention of (window)"}
    seen = torch.tensor(drawn["Attention of (window)"]["head 0"]) > 0
    assert seen.float().mean() == 0.5
    again = compare_denoising(backends, ["text"], rounds=1, state=tmp_path)
    assert [t.rows for t in again.tables] == [t.rows for t in report.tables], "a resumed run shows what was kept"


def test_a_model_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*, progress: bool | None = None) -> denoising.Denoiser:
        raise LooseleafError("needs diffusers, which is not installed: pip install diffusers")

    monkeypatch.setitem(denoising.MODELS, "text", small)
    monkeypatch.setitem(denoising.MODELS, "video", missing)
    report = compare_denoising({}, ["video", "text"], rounds=1)
    assert [r[0] for t in report.tables if t.title == "Denoising" for r in t.rows] == ["(exact)", "(window)"]
    assert [t.rows for t in report.tables if t.title == "Left out"] == [
        [["all, on video", "LooseleafError: needs diffusers, which is not installed: pip install diffusers"]]]


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"expected models among text, video .* got models=\['song'\], rounds=3"):
        compare_denoising({}, ["song"])


def test_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(denoising.MODELS, "text", small)
    report = Denoising(denoising=("text",), rounds=1).run({"learner": Learner, "broken": Broken})
    assert [r[0] for t in report.tables if t.title == "Denoising" for r in t.rows] == ["(exact)", "learner", "(window)"]
    with pytest.raises(ValueError, match="rounds: expected an integer >= 1, got 0"):
        Denoising(rounds=0)
