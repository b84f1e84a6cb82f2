"""PragmaticExamples on tasks of text: functions, instructions, the model's own readings, starts and bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from looseleaf import Budget, Example, Prompt
from looseleaf.resume import StateError
from looseleaf_pragmatic_examples import MatchesRegex, PragmaticExamples, strings, which_examples
from looseleaf_text import TextPrompt, TextTask
from looseleaf_text.testing import ToyLanguageModel, toy_task

LABELS = ("yes", "no")


def words(pattern: str = "a+b?", **options: Any) -> TextTask:
    rule = MatchesRegex(pattern, labels=LABELS)
    return TextTask("words", [Example({"text": s}, rule(s)) for s in strings("ab", 3)],
                    labels={"yes": " yes", "no": " no"}, **options)


def rules(*patterns: str) -> tuple[Any, ...]:
    return tuple(MatchesRegex(p, labels=LABELS) for p in patterns)


def test_functions_choose_without_asking_the_model() -> None:
    others, task, model = rules("a*", "[ab]+", "a{2}", "a+b"), words(), ToyLanguageModel()
    prompt = PragmaticExamples(k=3, hypotheses=others).optimize(task, model)
    pool = task.in_turn(task.train)
    expected = which_examples(MatchesRegex("a+b?", labels=LABELS), others, [e.inputs["text"] for e in pool], k=3)
    assert [(e.inputs["text"], e.target) for e in prompt.exemplars] == expected.examples
    assert model.calls == 0 and prompt.info["remaining"] == expected.remaining
    assert prompt.info["fitness"] == expected.literal[-1] and prompt.info["pragmatic"] == expected.pragmatic[-1]
    assert [task.train[prompt.info["pool"][n]] for n in prompt.info["chosen"]] == list(prompt.exemplars)
    assert prompt.render(task.train[0]).count("yes") + prompt.render(task.train[0]).count("no") == 3


def test_instructions_are_tried_on_the_model() -> None:
    class Obeys(ToyLanguageModel):
        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            self._request(prefixes)
            out = []
            for prefix in prefixes:
                text = prefix.split()[-1]
                yes = text.startswith("a") if "first" in prefix else text.endswith("a")
                out.append([0.0, -9.0] if yes else [-9.0, 0.0])
            return out

    task, model = words("a[ab]*"), Obeys()
    prompt = PragmaticExamples(k=2, hypotheses=("Look at the first letter.", "Look at the last letter.",
                                                *rules("b[ab]*"))).optimize(task, model)
    assert model.calls == 2 * len(task.train)
    first = prompt.exemplars[0]
    assert (first.inputs["text"][-1] == "a") != (first.target == "yes")  # what tells the first from the last letter
    assert prompt.info["remaining"] == [1, 1] and prompt.text == ""  # the instruction that is right is no alternative


def test_resumed_with_other_functions_it_says_so(tmp_path: Path) -> None:
    task, model = words(), ToyLanguageModel()
    options: dict[str, Any] = {"k": 2, "hypotheses": (lambda x: "yes", "Say yes.")}
    one = PragmaticExamples(**options).optimize(task, model, state_dir=tmp_path)
    calls = model.calls
    again = PragmaticExamples(**options).optimize(task, model, state_dir=tmp_path)
    assert again.fingerprint() == one.fingerprint() and model.calls == calls
    with pytest.raises(StateError):
        PragmaticExamples(k=2, hypotheses=(lambda x: "no", "Say yes.")).optimize(task, model, state_dir=tmp_path)


def test_readings_of_the_model_and_budgets() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = PragmaticExamples(readings=3).optimize(task, model)
    assert model.calls == 3 * 16 and prompt.info["evaluations"] == 4 and len(prompt.exemplars) == 4
    short = PragmaticExamples(readings=3).optimize(task, ToyLanguageModel(), budget=Budget(calls=20))
    assert short.info["stopped"] == "budget: calls" and short.info["evaluations"] == 2


def test_start_gives_all_but_the_exemplars(tmp_path: Path) -> None:
    task = words()
    start = TextPrompt.for_task(task, "Judge the word.", exemplars=task.train[:1], separator="\n--\n")
    prompt = PragmaticExamples(k=2, hypotheses=rules("b*")).optimize(task, ToyLanguageModel(), start=start)
    assert prompt.text == "Judge the word." and prompt.separator == "\n--\n" and len(prompt.exemplars) == 2
    prompt.save(tmp_path / "prompt.json")
    loaded = Prompt.load(tmp_path / "prompt.json")
    assert isinstance(loaded, TextPrompt) and list(loaded.exemplars) == list(prompt.exemplars)


def test_generation_tasks_count_what_the_metric_counts() -> None:
    task = TextTask("upper", [Example({"text": t}, t.upper()) for t in ("a", "ab", "B")], metric="exact_match")
    prompt = PragmaticExamples(k=1, hypotheses=(lambda x: x["text"], lambda x: x["text"][0])).optimize(
        task, ToyLanguageModel())
    assert prompt.exemplars[0].target == "AB"  # exact_match ignores case: only "ab" tells the second from the target


@pytest.mark.parametrize(("change", "task", "options", "message"), [
    ({"k": 20}, words(), {}, "expected 20 training examples or more, as k, got 14: lower k"),
    ({}, dataclasses.replace(words(), train=[]), {}, "expected training examples, got none"),
    ({"hypotheses": (MatchesRegex("a", name="word"),)}, words(), {},
     "expected a text or inputs with 'word'"),
    ({}, words(), {"start": TextPrompt(text="{text} is", labels={"yes": " y", "no": " n"})},
     "expected a prompt with a place for demonstrations"),
])
def test_bad_tasks(change: dict[str, Any], task: TextTask, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PragmaticExamples(**change).optimize(task, ToyLanguageModel(), **options)


@pytest.mark.parametrize(("change", "message"), [
    ({"hypotheses": "abc"}, "hypotheses: expected a sequence of functions"), ({"hypotheses": (" ",)}, "hypotheses"),
    ({"k": 0}, r"k: expected an integer >= 1, got 0"), ({"alpha": -1.0}, "alpha: expected a number >= 0"),
])
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PragmaticExamples(**change)


def test_from_the_command_line() -> None:
    tyro = pytest.importorskip("tyro")
    made = tyro.cli(PragmaticExamples, args=["--k", "2", "--hypotheses", "Say yes.", "Say no."])
    assert (made.k, made.hypotheses) == (2, ("Say yes.", "Say no."))
