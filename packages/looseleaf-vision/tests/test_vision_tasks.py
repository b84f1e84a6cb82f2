"""Few-shot tasks: seeded shots, base and new classes, datasets of torchvision, splits of CoOp, and figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from looseleaf import Evaluation, Example
from looseleaf_vision import (
    TemplatePrompt,
    base_to_new,
    calibration_error,
    cross_domain,
    few_shot,
    few_shot_task,
    from_arrays,
    from_torchvision,
    harmonic_mean,
    read_split,
    scores_by_class,
)
from looseleaf_vision.testing import toy_clip, toy_pictures


def test_shots_are_drawn_by_class_and_seed() -> None:
    labels = ["a"] * 10 + ["b"] * 2 + ["c"] * 10
    train, rest = few_shot(labels, 3, 0, validation=2)
    assert [labels[n] for n in train] == ["a"] * 3 + ["b"] * 2 + ["c"] * 3
    assert [labels[n] for n in rest] == ["a"] * 2 + ["c"] * 2 and not {*train} & {*rest}
    assert few_shot(labels, 3, 0, 2) == (train, rest) and few_shot(labels, 3, 1)[0] != train
    assert few_shot(labels[:12], 3, 0)[0] == [n for n in train if n < 12]
    with pytest.raises(ValueError, match=">= 1"):
        few_shot(labels, 0, 0)


def test_few_shot_tasks_and_base_to_new() -> None:
    data = toy_pictures(5, each=6)
    task = few_shot_task("colours", data.train, data.test, shots=2, seed=0, classes=data.classes)
    assert len(task.train) == 10 and len(task.dev) == 10
    task.validate()
    parts = base_to_new(task)
    assert parts.base.classes == data.classes[:3] and parts.new.classes == data.classes[3:]
    assert {e.target for e in parts.whole.train} == set(data.classes[:3])
    assert len(parts.whole.test) == len(data.test)
    found = parts.evaluate(TemplatePrompt(data.classes), toy_clip())
    assert set(found) == {"base", "new", "whole", "harmonic"}
    assert found["harmonic"] == harmonic_mean(found["base"], found["new"])
    assert harmonic_mean(0.5, 0.5) == 0.5 and harmonic_mean(0.0, 0.0) == 0.0
    assert math.isclose(harmonic_mean(0.8269, 0.6322), 0.716558, rel_tol=1e-5)
    domains = cross_domain(TemplatePrompt(data.classes), toy_clip(), [parts.base, parts.new])
    assert {name: e.score for name, e in domains.items()} == {parts.base.name: found["base"],
                                                              parts.new.name: found["new"]}
    with pytest.raises(ValueError, match="three classes"):
        base_to_new(toy_pictures(2))


def test_arrays_have_the_same_test_examples_for_every_seed() -> None:
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1) + np.zeros((1, 4, 4), np.uint8)
    labels = ["a", "b", "c"] * 20
    one, two = (from_arrays(images, labels, 4, seed, name="t", test=6) for seed in (0, 1))
    assert one.test == two.test and one.train != two.train and len(one.test) == 18
    assert (len(one.train), len(one.dev), one.classes) == (12, 12, ["a", "b", "c"])
    one.validate()
    assert from_arrays(images, labels, 4, 0, name="t", classes=["c", "a"]).classes == ["c", "a"]
    with pytest.raises(ValueError, match="as many labels"):
        from_arrays(images, labels[1:], 1, 0, name="t")
    with pytest.raises(ValueError, match="two classes"):
        from_arrays(images, labels, 1, 0, name="t", least=30)


class Dataset:
    """As those of torchvision are."""

    def __init__(self, count: int, labels: bool) -> None:
        self.classes = [("red", "crimson"), "green", "blue"]
        self.count, self.read = count, 0
        if labels:
            self.targets = [n % 3 for n in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int):
        self.read += 1
        return Image.fromarray(np.full((8, 8, 3), place, np.uint8)), place % 3


@pytest.mark.parametrize("labels", [True, False])
def test_datasets_of_torchvision(labels) -> None:
    source, test = Dataset(30, labels), Dataset(9, labels)
    task = from_torchvision(source, 2, 0, test=test)
    task.validate()
    assert task.classes == ["red", "green", "blue"] and len(task.train) == 6 and len(task.dev) == 6
    assert source.read == 12 + 30 * (not labels) and test.read == 0 and len(task.test) == 9
    assert task.test[4].target == "green" and [e.target for e in task.test[:3]] == task.classes
    assert sum(1 for _ in task.test) == 9
    left = from_torchvision(source, 2, 0)
    assert len(left.test) == 18
    with pytest.raises(ValueError, match="with `classes`"):
        from_torchvision([(None, 0)], 1, 0)


def test_splits_of_coop(tmp_path) -> None:
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(tmp_path / "x.png")
    rows = [["x.png", n % 2, ["cat", "dog"][n % 2]] for n in range(8)]
    path = tmp_path / "split_zhou_Toys.json"
    path.write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    task = read_split(path, tmp_path, 3, 0)
    assert task.name == "Toys" and task.classes == ["cat", "dog"]
    assert (len(task.train), len(task.dev), len(task.test)) == (6, 6, 8)
    assert task.train[0].inputs["image"].size == (6, 6)
    path.write_text('{"train": []}')
    with pytest.raises(ValueError, match="train, val and test"):
        read_split(path, tmp_path, 1, 0)


def test_calibration_error_reads_probabilities_of_the_whole_set() -> None:
    """Six predictions of class 0, 15 bins: 0.375 (worked out by hand)."""
    p = [0.9, 0.92, 0.61, 0.3, 0.55, 0.19]
    examples = [Example({"n": n}, target) for n, target in enumerate([0, 1, 0, 1, 1, 1])]
    rows = [[math.log(x), math.log(1 - x)] for x in p]
    evaluation = Evaluation(0.0, [1.0] * 6, [], rows)
    assert math.isclose(calibration_error(evaluation, examples, [0, 1]), 0.375, abs_tol=1e-9)
    shifted = Evaluation(0.0, [1.0] * 6, [], [[a + 7, b + 7] for a, b in rows])
    assert math.isclose(calibration_error(shifted, examples, [0, 1]), 0.375, abs_tol=1e-9)
    assert scores_by_class(evaluation, examples) == {0: 1.0, 1: 1.0}
    with pytest.raises(ValueError, match="class scores"):
        calibration_error(Evaluation(0.0, None, []), examples, [0, 1])
