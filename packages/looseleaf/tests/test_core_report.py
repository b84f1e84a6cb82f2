"""Images in reports, and reports in notebooks and files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import Claim, Report, Series
from looseleaf.report import png


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(data)))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4), (1, 1)])
def test_pngs_hold_the_pixels(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(pixels(png(array)), array)
    assert np.array_equal(pixels(png(torch.from_numpy(array))), array)
    floats = array / 255
    for same in (floats, floats.astype(np.float32), torch.from_numpy(floats), torch.tensor(floats, requires_grad=True)):
        assert np.array_equal(pixels(png(same)), array)
    coarse = pixels(png(torch.from_numpy(floats).to(torch.bfloat16))).astype(int)
    assert abs(coarse - array).max() <= 1


def test_masks_and_rounding_are_images_too() -> None:
    assert pixels(png(np.array([[True, False]]))).tolist() == [[255, 0]]
    assert pixels(png(np.array([[1.0001, -0.0001]]))).tolist() == [[255, 0]]


@pytest.mark.parametrize(("array", "words"), [
    (np.zeros((3, 5, 7)), r"got \(3, 5, 7\): move the channels to the end"),
    (np.zeros((2, 5, 7, 3)), r"got \(2, 5, 7, 3\): pass a list of images"),
    (np.zeros(5), r"expected \(H, W\), \(H, W, 3\) or \(H, W, 4\), got \(5,\)"),
    (np.zeros((0, 3)), r"got \(0, 3\)"),
    (np.array([[0.0, 1.5]]), r"expected numbers in \[0, 1\] or uint8, got 0 to 1\.5"),
    (np.array([[0.0, np.nan]]), "got nan to nan"),
    (np.zeros((2, 2), dtype=np.int64), "expected numbers in .* got int64"),
    ("a.png", "got str"),
])
def test_what_is_no_image(array: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Report("x").image("picture", array)


def example() -> Report:
    report = Report("Everything <here>", facts={"seed": 0})
    report.image("one", np.zeros((4, 6)), "a note")
    report.image("pair", [torch.ones(2, 3, 3), np.zeros((8, 8, 4), dtype=np.uint8)], captions=["before", "after"])
    return report


def test_images_side_by_side_and_in_text() -> None:
    report = example()
    one, pair = report.images
    assert one.sizes == [(6, 4)] and pair.sizes == [(3, 2), (8, 8)] and pair.captions == ["before", "after"]
    assert one.captions == [""] and one.note == "a note"
    text = report.to_text()
    assert "[image] one: 6 x 4 pixels" in text and "[image] pair: before 3 x 2, after 8 x 8 pixels" in text
    with pytest.raises(ValueError, match="captions: expected one for each of 2 images, got 1"):
        report.image("x", [np.zeros((2, 2))] * 2, captions=["a"])
    with pytest.raises(ValueError, match="expected one image or more"):
        report.image("x", [])
    both = Report("y")
    both.extend(report, "a: ")
    assert [i.title for i in both.images] == ["a: one", "a: pair"] and both.images[0].pngs == one.pngs
    assert report.images[0].title == "one"


def test_images_survive_json(tmp_path: Path) -> None:
    report = example()
    assert Report.from_dict(json.loads(report.to_json())) == report
    report.to_json(tmp_path / "r.json")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert Report.load(tmp_path / "r.json") == report


def test_reports_of_the_first_edition_load(tmp_path: Path) -> None:
    old = {"schema": "looseleaf.report/1", "title": "old", "facts": {"seed": 1}, "tables": [
        {"title": "t", "columns": ["a", "from", "to"], "rows": [[1, 0, 2]], "note": ""}], "figures": [
        {"title": "f", "x_label": "", "y_label": "", "series": [
            {"name": "s", "x": [0], "y": [1], "low": None, "high": None, "style": "both"}], "image": None,
         "panels": None, "x_log": False, "y_log": False, "note": ""}], "claims": [],
        "arrays": {}, "examples": [["label", "text"]]}
    report = Report.from_dict(old)
    assert report.images == [] and report.strips == [] and report.tables[0].columns == ["a", "from", "to"]
    (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
    assert Report.load(tmp_path / "old.json") == report
    with pytest.raises(ValueError, match=r"schema: expected 'looseleaf\.report/1', got 'looseleaf\.report/9'"):
        Report.from_dict({**old, "schema": "looseleaf.report/9"})
    (tmp_path / "old.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a report"):
        Report.load(tmp_path / "old.json")


def test_notebooks_show_reports_by_themselves() -> None:
    report = example()
    report.table("Numbers & <words>", ["name", "value"], [["<b>", 1.23456], ["none", None]], note="n&n")
    report.claims.append(Claim.decide(True, statement="s<s", source="x", paper="p", measured="m", rule="r"))
    report.strip("tokens", ["a", "<b>"], [1.0, None], [False, True])
    report.examples.append(("label", "</pre><script>"))
    report.figure("curve", series=[Series("s", [0, 1], [2, 3])])
    text = report._repr_html_()
    assert text.count('src="data:image/png;base64,') == 3 and report.images[0].pngs[0] in text
    for word in ("Everything &lt;here&gt;", "Numbers &amp; &lt;words&gt;", "&lt;b&gt;", "1.235", "n&amp;n", "s&lt;s",
                 "holds", "before", "a note", "&lt;/pre&gt;&lt;script&gt;", "curve"):
        assert word in text, word
    for word in ("http://", "https://", "<script>"):
        assert word not in text.replace("&lt;script&gt;", ""), word


def test_notebooks_without_the_lab_say_what_draws_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "looseleaf_lab.html", None)
    monkeypatch.setitem(sys.modules, "looseleaf_lab", None)
    report = Report("x")
    report.figure("curve", series=[Series("s", [0, 1], [2, 3])])
    assert "pip install looseleaf-lab" in report._repr_html_() and "curve" in report._repr_html_()
    assert "pip install" not in Report("y")._repr_html_()


def test_pngs_are_what_json_holds() -> None:
    report = Report("x")
    report.image("a", np.eye(3))
    assert base64.b64decode(report.images[0].pngs[0]) == png(np.eye(3))
