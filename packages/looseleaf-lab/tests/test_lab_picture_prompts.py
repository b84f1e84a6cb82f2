"""Prompts for pictures side by side: figures, new classes, resuming, what is left out, and the command line's view."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from looseleaf import Report

pytest.importorskip("looseleaf_vision")

from looseleaf_lab.benches.picture_prompts import BASELINES, PicturePrompts, compare_picture_prompts
from looseleaf_vision import CoOp, LinearProbe, ZeroShot, from_arrays
from looseleaf_vision.testing import toy_clip, toy_pictures


def task(seed: int) -> Any:
    data = [e for part in ("train", "dev", "test") for e in getattr(toy_pictures(4, each=6), part)]
    return from_arrays([e.inputs["image"] for e in data], [e.target for e in data], 2, seed, name="colours", test=4)


@dataclasses.dataclass
class Broken(ZeroShot):
    """Fails.

    Args:
        templates: texts.
    """

    def optimize(self, *arguments: Any, **options: Any) -> Any:
        """See :class:`ZeroShot`."""
        raise ValueError("no such thing")


def test_a_comparison(tmp_path) -> None:
    pytest.importorskip("looseleaf_lab")
    methods = {"zero": ZeroShot(), "probe": LinearProbe(halvings=1, iterations=20),
               "coop": CoOp(n_ctx=2, epochs=3, crop=None), "broken": Broken()}
    tasks = {"colours": {seed: task(seed) for seed in (0, 1)}}
    report = compare_picture_prompts(toy_clip(), methods, tasks, state=tmp_path, progress=False)
    table = report.tables[0]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["zero", "probe", "coop"] and all(row["seeds"] == 2 for row in rows.values())
    assert rows["zero"]["learned numbers"] == 0 and rows["coop"]["learned numbers"] == 2 * 24
    assert rows["probe"]["new"] is None and rows["probe"]["learned numbers"] == 4 * 17
    assert 0 <= rows["coop"]["harmonic"] <= 1 and rows["coop"]["calls"] > 0
    assert [row[0] for row in report.tables[-1].rows] == [f"broken on colours, seed {s}" for s in (0, 1)]
    assert len(report.images[0].pngs) == 8 and "right: " in report.images[0].captions[0]
    assert Report.from_dict(report.to_dict()).to_text()
    again = compare_picture_prompts(toy_clip(), methods, tasks, state=tmp_path, progress=False)
    assert again.tables[0].rows == table.rows  # seconds included: nothing was computed again


def test_the_bench_as_the_command_line_sees_it() -> None:
    benches = pytest.importorskip("looseleaf_lab.benches")
    from looseleaf_text import TextOptimizer

    bench = PicturePrompts()
    assert bench.suits(CoOp) is None and "not for dual encoders" in str(bench.suits(TextOptimizer))
    assert bench.suits(str) == "expected a PromptOptimizer, got str"
    assert set(BASELINES) == {"(zero-shot)", "(template ensemble)", "(linear probe)", "(CoOp)", "(CoCoOp)", "(KgCoOp)",
                              "(MaPLe)"}
    assert hasattr(benches, "TextPrompts")
    with pytest.raises(ValueError, match="stamps"):
        PicturePrompts(pictures=("stamp",))
    with pytest.raises(ValueError, match="one data set"):
        PicturePrompts(pictures=())


def test_a_whole_run_on_stand_ins(monkeypatch, tmp_path) -> None:
    data, models = pytest.importorskip("looseleaf_lab.data"), pytest.importorskip("looseleaf_lab.models")
    clip = toy_clip()

    class Processor:
        tokenizer, image_processor = clip.tokenizer, clip.preprocess.processor

    monkeypatch.setattr(data, "pictures", lambda name: data.stand_in(name, 96))
    monkeypatch.setattr(models, "own", lambda: {"mini-clip": tmp_path})
    monkeypatch.setattr(models, "load", lambda name: (clip.model, Processor()))
    bench = PicturePrompts(shots=2, seeds=1, epochs=2, baselines=False)
    report = bench.run({"coop": CoOp, "probe": LinearProbe(iterations=10)}, state=tmp_path, progress=False)
    assert [row[0] for row in report.tables[0].rows] == ["coop", "probe"]
    assert report.facts["model"] == "mini-clip (self-trained, CLIPModel)"
    assert report.facts["crops"] == "none: whole pictures" and report.facts["shots"] == 2
