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
from looseleaf_lab.compare import compare_denoising, denoising
from looseleaf_lab.window import BlockWindow


@dataclasses.dataclass
class Learner(AttentionBackend):
    """Exact from what it was told and taught; counts.

    Args:
        prompt_tokens: told.
    """

    prompt_tokens: int | None = None
    changes: ClassVar[Phase] = "encode"
    paper = looseleaf.SlidingWindow.paper
    learnt: ClassVar[list[tuple[int | None, int]]] = []

    def calibrate(self, model: torch.nn.Module, batches: Any) -> None:
        with looseleaf.attach(model, BlockWindow(density=1.0, block=16), steps=4) as attached:
            batches(attached)
        self.learnt.append((self.prompt_tokens, len(attached.records)))

    def attend(self, call: AttentionCall) -> torch.Tensor:
        call.record(density=1.0)
        return call.dense()


@dataclasses.dataclass
class Broken(AttentionBackend):
    """Fails."""

    changes: ClassVar[Phase] = "encode"
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
                              ("share", "nothing"))


def test_compare_denoising(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(denoising.MODELS, "text", small)
    Learner.learnt.clear()
    backends = {"learner": Learner(), "broken": Broken(), "causal": looseleaf.SlidingWindow()}
    report = compare_denoising(backends, ["text"], rounds=1, state=tmp_path)
    table = next(t for t in report.tables if t.title == "Denoising")
    rows = {r[0]: dict(zip(table.columns, r, strict=True)) for r in table.rows}
    assert set(rows) == {"(exact)", "learner", "causal", "(window)"}
    assert Learner.learnt == [(32, 12)], "told the prompt, and taught on one run of 4 steps in 3 layers"
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
    with pytest.raises(ValueError, match=r"models=\['song'\], rounds=3: allowed are text, video"):
        compare_denoising({}, ["song"])


def test_window_sees_the_nearest_blocks() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 70, 16, generator=g) for h in (4, 2, 2))
    call = AttentionCall(query, key, value, 0.25, False, phase="encode", step=0)
    blocks = torch.arange(70) // 16
    first = (torch.arange(5) - 1).clamp(0, 3)[blocks][:, None]
    mask = (blocks >= first) & (blocks < first + 2)
    exact = dataclasses.replace(call, mask=mask[None, None]).dense()
    said: dict[str, Any] = {}
    call.record = said.update
    torch.testing.assert_close(BlockWindow(density=0.4, block=16).attend(call), exact, atol=1e-5, rtol=1e-4)
    assert said == {"density": 0.4}
    assert torch.equal(BlockWindow(full_steps=1).attend(call), call.dense()) and said == {"density": 1.0}
    with pytest.raises(ValueError, match="density=0"):
        BlockWindow(density=0.0)
