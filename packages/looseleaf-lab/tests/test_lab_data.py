"""Text and tasks: real, repeatable, and without leaks from one part to the other."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from looseleaf import Example
from looseleaf.tasks import Predictor
from looseleaf_lab import data
from looseleaf_lab.data import text

HAS_DATA = all(importlib.util.find_spec(m) for m in ("chatterbot_corpus", "vaderSentiment", "yaml"))
needs_data = pytest.mark.skipif(not HAS_DATA, reason="looseleaf-lab[data] is not installed")
NAMES = [pytest.param(n, marks=[] if n == "subjects" else needs_data) for n in text._CLASSES]


def test_prose_is_long_enough_repeatable_and_says_its_source() -> None:
    for part in ("calibration", "evaluation"):
        text = data.prose(100_000, part)  # type: ignore[arg-type]
        assert len(text) >= 100_000
        assert text == data.prose(100_000, part)  # type: ignore[arg-type]
        assert "Python" in text.source and part in text.source
        assert data.prose(2_000, part) == text[:len(data.prose(2_000, part))]  # type: ignore[arg-type]


def test_parts_share_no_paragraph() -> None:
    parts = [set(data.prose(600_000, p).split("\n\n")) for p in ("calibration", "evaluation")]  # type: ignore[arg-type]
    assert not parts[0] & parts[1]


def test_prose_refuses() -> None:
    with pytest.raises(ValueError, match=r"part: expected .* got 'test'"):
        data.prose(10, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_chars: expected an integer >= 1, got 0"):
        data.prose(0)
    with pytest.raises(ValueError, match="ask for less"):
        data.prose(10**9)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_balanced_disjoint_and_repeatable(name: str) -> None:
    labels = text._POOLS[name]()[0]
    each = min(map(len, labels.values())) // 4
    size = each * len(labels)
    task = data.classification_task(name, 3, train=size, dev=size, test=size)
    task.validate()
    parts: list[Any] = [task.train, task.dev, task.test]
    for part in parts:
        counts = {label: sum(e.target == label for e in part) for label in labels}
        assert set(counts.values()) == {each}
    texts = [{e.inputs["text"] for e in part} for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    again = data.classification_task(name, 3, train=size, dev=size, test=size)
    assert again.train == task.train and again.test == task.test
    assert data.classification_task(name, 4, train=size, dev=size, test=size).train != task.train


@pytest.mark.parametrize("name", NAMES)
def test_default_sizes_fit_or_say_why(name: str) -> None:
    sizes = {label: len(texts) for label, texts in text._POOLS[name]()[0].items()}
    if min(sizes.values()) * len(sizes) >= 192 and name != "question-topics":
        assert len(data.classification_task(name, train=48, dev=48, test=96).test) == 96
    with pytest.raises(ValueError, match="at most"):
        data.classification_task(name, train=10**6)
    with pytest.raises(ValueError, match=r"dev: expected one example or more .* got 1"):
        data.classification_task(name, dev=1)


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(ValueError, match="Did you mean 'sentiment'"):
        data.classification_task("sentimant")
    with pytest.raises(ValueError, match="Did you mean 'question'"):
        data.sentences("questions")


@needs_data
def test_sentences_have_their_style() -> None:
    questions = data.sentences("question", 50, seed=1)
    assert all(s.endswith("?") for s in questions) and len(set(questions)) == 50
    assert questions == data.sentences("question", 50, seed=1)
    judge = text._sentiment()
    assert min(judge(s) for s in data.sentences("positive", 30)) >= 0.4
    assert max(judge(s) for s in data.sentences("negative", 30)) <= -0.4
    first = set(data.sentences("everyday", 100, part="calibration"))
    assert not first & set(data.sentences("everyday", 100, part="evaluation"))
    with pytest.raises(ValueError, match="count: expected at most"):
        data.sentences("positive", 10**6)


def test_technical_sentences_need_no_package() -> None:
    for sentence in data.sentences("technical", 20, seed=random.Random(0).randrange(100)):
        assert sentence[0].isupper() and len(sentence.split()) >= 8


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    text._conversation.cache_clear()
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.MissingDataError, match=r"pip install 'looseleaf-lab\[data\]'"):
        data.classification_task("topics")
    text._conversation.cache_clear()


def test_ids_have_the_length_asked_for() -> None:
    class Letters:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 256 for c in text[::9]]}

    ids = data.prose_ids(Letters(), 5000)
    assert ids.shape == (1, 5000)
    with pytest.raises(ValueError, match="text: expected at least 5000 tokens"):
        data.token_ids(Letters(), "short", 5000)


def test_tasks_that_are_no_classification() -> None:
    words = data.task("last-word", 1, train=8, dev=8, test=40)
    words.validate()
    assert words.classes is None and [len(p) for p in (words.train, words.dev, words.test)] == [8, 8, 40]
    assert all(e.inputs["text"].rstrip(".!?,;:'\"").endswith(e.target) for e in words.test)
    near = data.task("neighbours", train=8, dev=8, test=40)
    near.validate()

    class Oracle(Predictor):
        """The place of the class, as a vector."""

        def predict(self, examples: Any) -> list[Any]:
            places = ["window", "mail", "file", "test"]
            return [[float(p == e.target) for p in places] for e in examples]

    assert near.evaluate(Oracle()).score == 1
    with pytest.raises(ValueError, match="expected a vector for each example, got 'mail'"):
        data.same_as_nearest(["mail", "file"], near.test[:2])
    assert data.same_as_nearest([[1, 0], [0.9, 0.1], [0, 1]], [Example({}, t) for t in "aab"]) == pytest.approx(2 / 3)


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "from looseleaf import Example, Task\n"
        "def make(seed):\n"
        "    return Task(f'mine {seed}', [Example({'n': 1}, 'a')], classes=['a', 'b'])\n"
        "nothing = str\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert data.task("my_tasks:make", 3).name == "mine 3"
    with pytest.raises(TypeError, match=r"my_tasks:nothing: expected a looseleaf.Task, got str"):
        data.task("my_tasks:nothing")
    for name in ("my_tasks:absent", "absent_module:make"):
        with pytest.raises(ValueError, match=f"expected a function that can be imported, got '{name}'"):
            data.task(name)
    with pytest.raises(ValueError, match="Did you mean 'neighbours'"):
        data.check_task("neighbors")
