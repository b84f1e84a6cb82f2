"""The reproduction runs on made-up pictures, and its controls decide what they should."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("looseleaf_lab", reason="needs looseleaf-lab")
pytest.importorskip("looseleaf_models", reason="needs looseleaf-models")

from looseleaf_lab.study import Results
from looseleaf_mocoop import reproduction
from looseleaf_mocoop.data import CLASSES, INKS, by_class, drawn_in, information, made_up, styled
from looseleaf_vision.testing import toy_clip, toy_processor

SCALE = reproduction.Scale(shots=(1,), epochs=1, made_up=True)


def pictures(name):
    return styled(name, made_up())


def test_information() -> None:
    assert information([1, 1, 2, 2], "aabb") == pytest.approx(1)
    assert information([1, 2, 1, 2], "aabb") == pytest.approx(0)
    assert information([1, 1, 1, 1], "aabb") == pytest.approx(0)


def test_inks() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 255
    drawn = drawn_in(image, "yellow")
    assert (drawn[0] == 255).all() and drawn[1, 0].tolist() == [round(255 * c) for c in INKS["yellow"]]


def test_tasks_have_every_class_in_every_style() -> None:
    for name, styles in (("styles", 3), ("inks", 4)):
        task = pictures(name).task(4, 0)
        assert len(task.train) == 4 * 4 and list(task.classes) == list(CLASSES)[:4]
        assert len({(e.target, e.inputs["style"]) for e in task.test}) == styles * 4
    alone = pictures("styles").task(4, 0, without="stamps")
    assert {e.inputs["style"] for e in alone.test} == {"stamps"}
    assert "stamps" not in {e.inputs["style"] for e in alone.train}


def test_pictures_are_found_by_their_folders() -> None:
    rows = {"emoji": {"label": "Food", "sublabel": "food-fruit"}, "clip-art": {"label": "tools", "sublabel": ""},
            "stamps": {"label": "food", "sublabel": "fruit/cartoon"}}
    sets = {name: SimpleNamespace(rows=[{"key": "1", **row}, {"key": "0", "label": "tools", "sublabel": "weapons"}],
                                  images=np.zeros((2, 96, 96, 4), np.uint8)) for name, row in rows.items()}
    found = {cell: len(images) for cell, images in by_class(sets).items() if images}
    assert found == {("fruit", "emoji"): 1, ("fruit", "stamps"): 1, ("tools", "clip-art"): 1}
    assert by_class(sets)["fruit", "stamps"][0].shape == (64, 64, 3)


def test_one_seed_and_its_report(monkeypatch) -> None:
    clip = toy_clip(layers=1)
    pair = reproduction.Remembering(clip.model, toy_processor(clip.tokenizer)), clip
    monkeypatch.setattr(reproduction, "encoders", lambda: pair)
    from looseleaf.resume import as_plain

    results = Results([as_plain(reproduction.measure(0, SCALE))], as_plain(reproduction.once(SCALE)), [0], SCALE, True)
    text = str(reproduction.study.report(results))
    assert "Routing follows style (inks)" in text and "pictures and the experts they got" in text
    assert text.count("[not shown at this scale]") == 7 and text.count("[holds]") == 1  # the control alone
    cost = results.once["cost"]
    assert cost["CoOp"]["texts a step"] == 4 and cost["MoCoOp"]["texts a step"] == 4 * 4
