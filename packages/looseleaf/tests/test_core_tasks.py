"""Examples, tasks and how predictions are scored; budgets and the models that they meter; states on disk."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf import (
    Budget,
    BudgetExhausted,
    Example,
    Predictor,
    ScoreMetric,
    SetMetric,
    Task,
    costs,
)
from looseleaf.budget import reason
from looseleaf.fingerprint import content_fingerprint
from looseleaf.resume import SearchState, StateError
from looseleaf.tasks import as_rows
from looseleaf.testing.prompts import PictureClassifier, picture_task

TRAIN = [Example({"text": "fine"}, "good"), Example({"text": "awful"}, "bad"), Example({"text": "well"}, "good")]
CLASSES = ("good", "bad")


# -- examples -----------------------------------------------------------------------------------------------------

def test_a_text_alone_is_no_example() -> None:
    with pytest.raises(TypeError, match=r"""expected inputs by name, got str: write Example\(\{"text": 'fine'\}, """):
        Example("fine", "good")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected inputs by name, got Tensor"):
        Example(torch.zeros(3))  # type: ignore[arg-type]


def test_examples_are_equal_by_their_content() -> None:
    one, same = (Example({"picture": torch.ones(2, 2), "box": np.array([1, 2])}, "a") for _ in range(2))
    other = Example({"picture": torch.ones(2, 2) * 2, "box": np.array([1, 2])}, "a")
    assert one == same != other and len({one, same, other}) == 2 and one in [other, same]
    assert one != "a" and Example({"x": 1}) != Example({"x": True}) and Example({"x": 1}, "1") != Example({"x": 1}, 1)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.target = "b"  # type: ignore[misc]


@dataclasses.dataclass
class Layout:
    labels: list[str]
    boxes: np.ndarray


class Graph:
    def __init__(self, edges: list[int]) -> None:
        self.edges, self.again = edges, self  # refers to itself, as music and graphs do


class Points:
    __slots__ = ("values",)


def metric(prediction: Any, example: Example) -> float:
    return 1.0


def images() -> list[Any]:
    from PIL import Image

    plain = Image.new("RGB", (3, 2), (1, 2, 3))
    return [plain, plain.convert("L"), Image.new("RGB", (3, 2), (1, 2, 4)), Image.new("RGB", (2, 3), (1, 2, 3)),
            plain.quantize(2)]


def test_every_change_of_content_changes_the_fingerprint() -> None:
    ones = torch.ones(2, 3)
    values: list[Any] = [
        None, True, 1, 1.0, 1j, "1", b"1", "", [], [1], [[1]], [1, 1], {}, {"a": 1}, {"a": 2}, {"b": 1}, {1: 1},
        {"a": {"b": 1}}, frozenset({1, 2}), ones, ones.double(), ones.bfloat16(), ones.bool(), ones.T.contiguous(),
        ones[0], torch.tensor(1.0), torch.empty(0), torch.empty(0, 2), ones.to(torch.complex64), np.ones(2),
        np.ones(2, dtype=np.float32), np.array(["a"], dtype=object), Layout(["a"], np.ones(2)),
        Layout(["a"], np.zeros(2)), Graph([1]), Graph([2]), Path("a"), metric, print, "a".upper, Graph,
        partial(metric, 1), partial(metric, 2), math.inf, math.nan, *images()]
    assert len({content_fingerprint(v) for v in values}) == len(values)
    assert content_fingerprint((1, 2)) == content_fingerprint([1, 2])
    assert content_fingerprint({"a": 1, "b": 2}) == content_fingerprint({"b": 2, "a": 1})
    assert content_fingerprint({1, 2, 3}) == content_fingerprint({3, 2, 1})
    assert content_fingerprint(ones.T.contiguous().T) == content_fingerprint(ones)
    assert content_fingerprint(ones.to_sparse()) == content_fingerprint(ones)
    with pytest.raises(TypeError, match=r"expected a value whose content can be read, got .*Points.*fingerprint"):
        content_fingerprint([Points()])


def test_fingerprints_are_those_of_another_process() -> None:
    value = "{'a': [1, 2.5, None], 'b': frozenset({'x', 'y'}), 'c': torch.arange(3)}"
    code = f"import torch; from looseleaf.fingerprint import content_fingerprint as f; print(f({value}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == content_fingerprint(
        {"a": [1, 2.5, None], "b": frozenset({"y", "x"}), "c": torch.arange(3)})


# -- tasks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "message"), [
    ({"train": []}, "expected training examples, got none"),
    ({"classes": ("good",)}, "expected two different classes or more"),
    ({"classes": ("good", "bad", "bad")}, "expected two different classes or more"),
    ({"train": TRAIN[:1]}, "expected training examples of two classes or more, got only 'good'"),
    ({"train": [*TRAIN, Example({"text": "x"}, "goood")]},
     r"train\[3\]: expected a target among \['good', 'bad'\], got 'goood'. Did you mean 'good'"),
    ({"dev": [Example({"text": "x"})]}, r"dev\[0\]: expected a target among .*, got None"),
    ({"train": [*TRAIN, "fine"]}, r"train\[3\]: expected a looseleaf.Example, got str"),
    ({"metric": "acuracy"}, "got 'acuracy'. Did you mean 'accuracy'"),
    ({"classes": None}, "with classes and another metric without, got metric='accuracy' and classes=None"),
    ({"classes": None, "metric": ScoreMetric(lambda s, e: 0.0)}, "or a ScoreMetric with classes and another metric"),
])
def test_tasks_nobody_can_work_with(change: dict[str, Any], message: str) -> None:
    task = Task("t", **{"train": TRAIN, "classes": CLASSES, **change})
    with pytest.raises(ValueError, match=message):
        task.validate()


def test_classes_that_are_no_text_and_targets_that_are_no_class() -> None:
    Task("t", [Example({"x": 1}, 0), Example({"x": 2}, 1)], classes=(0, 1)).validate()
    Task("t", [Example({"x": 1}, torch.ones(2, 2))], metric=lambda p, e: 0.0).validate()
    Task("t", [Example({"x": 1})], metric=SetMetric(lambda p, e: 0.0)).validate()


def test_leaks_into_the_test_are_warned_of() -> None:
    same = Example({"picture": torch.zeros(2)}, "a")
    train = [Example({"picture": torch.zeros(2)}, "b"), Example({"picture": torch.ones(2)}, "a")]
    with pytest.warns(UserWarning, match="1 of 1 test examples"):
        Task("t", train, test=[same], classes=("a", "b")).validate()


class FromDisk(Sequence[Example]):
    """Pictures that are read when asked for."""

    reads = 0

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: Any) -> Any:
        type(self).reads += 1
        return TRAIN[0]


def test_test_examples_on_disk_are_left_there() -> None:
    task = Task("t", TRAIN, test=FromDisk(), classes=CLASSES)
    task.validate()
    task.fingerprint()
    assert FromDisk.reads == 0


def test_fingerprint_sees_all_but_the_test() -> None:
    task = picture_task()
    assert dataclasses.replace(task, test=[]).fingerprint() == task.fingerprint() == picture_task().fingerprint()
    changed = [*task.train[:-1], Example({"picture": task.train[-1].inputs["picture"] + 1e-6}, "right")]
    for other in ({"train": changed}, {"dev": changed}, {"classes": ("right", "left")}, {"name": "x"},
                  {"metric": metric}):
        assert dataclasses.replace(task, **other).fingerprint() != task.fingerprint()


# -- evaluation ---------------------------------------------------------------------------------------------------

class Fixed(Predictor):
    def __init__(self, rows: Any, classes: Sequence[str] | None = CLASSES) -> None:
        self.rows, self.classes = rows, classes

    def scores(self, examples: Sequence[Example]) -> Any:
        return self.rows


ROWS = [[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0]]


@pytest.mark.parametrize("rows", [ROWS, np.array(ROWS), torch.tensor(ROWS)])
def test_evaluation_of_scores(rows: Any) -> None:
    task = Task("t", TRAIN, classes=CLASSES)
    found = task.evaluate(Fixed(rows), "train")
    assert found.predictions == ["good", "bad", "good"] == Fixed(rows).predict(TRAIN)  # the first of equals
    assert found.score == 1.0 and found.scores == [1.0] * 3 and found.class_scores == ROWS
    # the columns are put into the order of the task
    swapped = task.evaluate(Fixed(rows, CLASSES[::-1]), TRAIN)
    assert swapped.class_scores == [row[::-1] for row in ROWS] and swapped.predictions == ["bad", "good", "good"]


@pytest.mark.parametrize(("predictor", "message"), [
    (Fixed(ROWS, None), r"expected a predictor of exactly the classes \['good', 'bad'\], got one of None"),
    (Fixed(ROWS, ("good", "other")), "expected a predictor of exactly the classes"),
    (Fixed(ROWS[:2]), r"expected \(3, 2\) numbers, got \(2, 2\)"),
    (Fixed([[0.0]] * 3), r"expected \(3, 2\) numbers, got \(3, 1\)"),
    (Fixed([*ROWS[:2], [math.nan, 0.0]]), "expected numbers, got .* for example 2"),
])
def test_scores_that_cannot_be(predictor: Predictor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task("t", TRAIN, classes=CLASSES).evaluate(predictor, "train")


class Says(Predictor):
    def __init__(self, answers: list[Any], classes: Any = None) -> None:
        self.answers, self.classes = answers, classes

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        return self.answers


def test_evaluation_of_predictions() -> None:
    classified = Task("t", TRAIN, classes=CLASSES).evaluate(Says(["good", "good", "bad"], CLASSES), TRAIN)
    assert classified.score == 1 / 3 and classified.class_scores is None
    task = Task("t", [], test=[Example({"x": 1}, "Rome"), Example({"x": 2}, "Paris")],
                metric=lambda p, e: -float(p["overlap"]))
    assert task.evaluate(Says([{"overlap": 1}, {"overlap": 2}])).score == -1.5
    for split, message in ((task.train, "got none"), ("tset", "expected 'train', 'dev', 'test' or a list")):
        with pytest.raises(ValueError, match=message):
            task.evaluate(Says([]), split)
    with pytest.raises(ValueError, match="expected a prediction for each of 2 examples, got 1"):
        task.evaluate(Says(["Rome"]))
    with pytest.raises(NotImplementedError, match="expected classes and scores"):
        task.evaluate(Predictor())
    with pytest.raises(NotImplementedError, match="no scores of classes"):
        Predictor().scores([])


def test_metrics_of_a_whole_set() -> None:
    def middle(predictions: list[Any], examples: list[Example]) -> float:
        return sorted(abs(p - e.target) for p, e in zip(predictions, examples, strict=True))[len(examples) // 2]

    task = Task("t", [], test=[Example({"x": n}, n) for n in range(3)], metric=SetMetric(middle))
    found = task.evaluate(Says([0, 2, 5]))
    assert found.score == 1.0 and found.scores is None
    with pytest.raises(ValueError, match="expected a metric of single predictions, got a SetMetric"):
        task.score(1, task.test[0])
    likelihood = ScoreMetric(lambda rows, examples: sum(
        row[CLASSES.index(e.target)] for row, e in zip(rows, examples, strict=True)))
    scored = Task("t", TRAIN, classes=CLASSES, metric=likelihood)
    scored.validate()
    assert scored.evaluate(Fixed(ROWS), "train").score == -4.0
    with pytest.raises(ValueError, match="expected a predictor with scores"):
        scored.evaluate(Says(["good"] * 3, CLASSES), "train")


def test_rows_become_plain_numbers() -> None:
    rows = as_rows([[np.float32(0.5), 1], torch.ones(2)])
    assert rows == [[0.5, 1.0], [1.0, 1.0]] and all(type(v) is float for row in rows for v in row)


# -- budgets ------------------------------------------------------------------------------------------------------

def test_budget_refuses_before_the_work() -> None:
    budget = Budget(calls=10, tokens=100)
    budget.spend(calls=8, tokens=100)
    with pytest.raises(BudgetExhausted, match="budget: tokens"):
        budget.check(tokens=1)
    with pytest.raises(BudgetExhausted, match=r"budget: calls \(8 of 10 used, 3 more requested\)") as caught:
        budget.spend(calls=3)
    assert reason(caught.value) == "budget: calls" and budget.used["calls"] == 8
    budget.spend(calls=2)


def test_budget_of_seconds_goes_on_after_a_restart() -> None:
    budget = Budget(seconds=0.2)
    budget.check(calls=1)
    time.sleep(0.05)
    again = Budget(seconds=0.2)
    again.restore(budget.used)
    assert 0.05 <= again.used["seconds"] < 0.15
    time.sleep(0.2)
    for charge in (again.check, again.spend):
        with pytest.raises(BudgetExhausted, match="budget: seconds"):
            charge()


@pytest.mark.parametrize("wrong", [{"calls": 0}, {"tokens": -1}, {"seconds": "2"}])
def test_budget_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected None or a number > 0, got"):
        Budget(**wrong)


# -- metering -----------------------------------------------------------------------------------------------------

class Describer:
    """A model of another kind: its own methods, its own count of tokens."""

    name = "describer"

    def __init__(self) -> None:
        self.tokens = self.made = 0
        self.scale = 1.0

    @costs(calls=lambda self, pictures, words=2: len(pictures), tokens=lambda self, pictures, words=2:
           words * len(pictures))
    def describe(self, pictures: list[str], words: int = 2) -> list[str]:
        """What is on each picture."""
        self.made += len(pictures)
        self.tokens += len(pictures)
        return [p.upper() for p in pictures]

    @costs(calls=lambda self, pictures: len(pictures))
    def compare(self, pictures: list[str]) -> list[str]:
        return self.describe(pictures)

    def free(self) -> str:
        return "nothing"


class Louder(Describer):
    def describe(self, pictures: list[str], words: int = 2) -> list[str]:
        return [p + "!" for p in super().describe(pictures, words)]


def test_declared_methods_are_booked_before_they_run() -> None:
    model, budget = Louder(), Budget(calls=5)
    metered = budget.meter(model)
    assert isinstance(metered, Louder) and isinstance(metered, Describer) and not callable(metered)
    assert metered.describe(["a", "b"]) == ["A!", "B!"] and metered.free() == "nothing"
    assert metered.compare(pictures=["c"]) == ["C!"]  # what it does inside is not booked again
    with pytest.raises(BudgetExhausted, match=r"budget: calls \(3 of 5 used, 3 more requested\)"):
        metered.describe(["a", "b", "c"])
    assert model.made == 3 and budget.used["calls"] == 3
    assert budget.used["tokens"] == 3  # without a limit, as many as the model says it used
    limited = Budget(tokens=5)
    limited.meter(model).describe(["a", "b"])
    assert limited.used["tokens"] == 4  # with one, the most it can come to
    with pytest.raises(BudgetExhausted, match="budget: tokens"):
        limited.meter(model).describe(["a"], words=2)


def test_a_metered_model_passes_for_the_model() -> None:
    model, budget = Louder(), Budget()
    metered = budget.meter(model)
    metered.scale = 3.0
    assert model.scale == 3.0 and metered.name == "describer" and repr(metered) == repr(model)
    assert metered.__class__ is Louder and metered.describe.__name__ == "describe" and not hasattr(metered, "nothing")
    assert budget.meter(metered) is metered  # not twice for one budget
    other = Budget()
    other.meter(metered).describe(["a"])
    assert other.used["calls"] == budget.used["calls"] == 1
    copied = copy.deepcopy(metered)
    copied.describe(["a"])
    assert copied.made == 2 and model.made == 1 and budget.used["calls"] == 2


def test_a_module_without_declarations_is_booked_when_called() -> None:
    model, budget = PictureClassifier().eval(), Budget(calls=10)
    metered = budget.meter(model)
    pictures = torch.zeros(4, 8, 8)
    assert isinstance(metered, nn.Module) and torch.equal(metered(pictures), model(pictures))
    metered(pictures=pictures)
    assert len(list(metered.parameters())) == len(list(model.parameters()))
    with pytest.raises(BudgetExhausted):
        metered(pictures)
    assert budget.used["calls"] == 8
    batch = Budget()
    batch.meter(lambda batch, flag=None: None)({"mask": None, "ids": torch.zeros(3, 7)})
    batch.meter(lambda texts: None)(["a", "b"])
    batch.meter(lambda seed: None)(1)
    assert batch.used["calls"] == 3 + 2 + 1


def test_methods_of_other_libraries_are_booked_by_name() -> None:
    class Clip(nn.Module):
        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values.mean(1)

    budget = Budget()
    metered = budget.meter(Clip(), methods=["get_image_features"])
    metered.get_image_features(pixel_values=torch.zeros(5, 2))
    assert budget.used["calls"] == 5


class Forward(nn.Module):
    @costs(calls=lambda self, x: 2 * len(x))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_declared_forward_counts_for_calls_of_the_module() -> None:
    budget = Budget()
    budget.meter(Forward())(torch.zeros(3))
    assert budget.used["calls"] == 6


# -- states on disk -----------------------------------------------------------------------------------------------

def test_state_round_trip_and_refusals(tmp_path: Path) -> None:
    state = SearchState(tmp_path / "s", {"seed": 1})
    assert state.load() is None
    state.save({"a": [1, 2.5, None]})
    assert state.load() == {"a": [1, 2.5, None]}
    with pytest.raises(StateError, match=r"belongs to another search \(seed was 1, is 2\).*remove"):
        SearchState(tmp_path / "s", {"seed": 2}).load()
    path = tmp_path / "s" / "state.json"
    sound = path.read_text()
    path.write_text(sound.replace("2.5", "3.5"))
    with pytest.raises(StateError, match="changed or damaged"):
        state.load()
    for broken in (sound[:-9], "[]", '{"schema": 1}', ""):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"cannot be read.*remove .* to begin again"):
            state.load()
    path.write_text(sound.replace("looseleaf.search/2", "looseleaf.search/9"))
    with pytest.raises(StateError, match="schema"):
        state.load()
    assert SearchState(None, {}).load() is None


def test_state_is_whole_or_not_there(tmp_path: Path) -> None:
    state = SearchState(tmp_path, {})
    state.save({"n": 1})
    with pytest.raises(TypeError):
        state.save({"n": object()})
    assert state.load() == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_tasks_and_prompts_import_no_torch_and_no_transformers() -> None:
    code = ("import sys, looseleaf.tasks, looseleaf.budget, looseleaf.prompts.prompt, looseleaf.prompts.optimizer\n"
            "print(*[m for m in ('torch', 'transformers', 'httpx', 'looseleaf_text') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
