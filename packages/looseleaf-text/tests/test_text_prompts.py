"""Task, Budget, Prompt, search state, and the conformance kit itself."""

from __future__ import annotations

import dataclasses
import json
import random
import string
import subprocess
import sys
import time
import types
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import pytest

from looseleaf import Budget, BudgetExhausted, Paper, PromptOptimizer
from looseleaf_text import Example, Prompt, Task
from looseleaf.budget import reason
from looseleaf_text.model import MeteredModel, words
from looseleaf.resume import SearchState, StateError, restore_rng, rng_state
from looseleaf_text.task import fill, slots
from looseleaf.testing import check_prompt_optimizer
from looseleaf_text.testing import ToyLanguageModel, toy_task

LABELS = {"good": " good", "bad": " bad"}
TRAIN = [Example("fine", "good"), Example("awful", "bad")]


# -- Task ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "message"), [
    ({"train": []}, "no training examples"),
    ({"labels": {"good": " good"}}, "needs at least two"),
    ({"labels": {"good": " ", "bad": " bad"}}, "has no tokens"),
    ({"labels": {"good": " x", "bad": " x"}}, "share the verbalizer"),
    ({"train": TRAIN[:1]}, "all training examples have the label 'good'"),
    ({"train": [*TRAIN, Example("x", "goood")]}, r"train\[2\] has label 'goood'.*Did you mean 'good'"),
    ({"dev": [Example("x")]}, r"dev\[0\] has label None"),
    ({"template": "{sentence}"}, r"lacks \['sentence'\]"),
    ({"template": "no slot"}, "without a slot"),
    ({"metric": "exact_match"}, "allowed is 'accuracy'"),
    ({"labels": None}, "metric='accuracy' and no labels"),
    ({"labels": None, "metric": "exact_match"}, "has no reference"),
])
def test_tasks_nobody_can_work_with(change: dict[str, Any], message: str) -> None:
    task = Task("t", **{"train": TRAIN, "labels": LABELS, **change})
    with pytest.raises(ValueError, match=message):
        task.validate()


def test_labels_without_tokens_under_this_model() -> None:
    class Mute(ToyLanguageModel):
        def tokenize(self, text: str) -> list[int]:
            return [] if text == " good" else super().tokenize(text)

    Task("t", TRAIN, labels=LABELS).validate(ToyLanguageModel())
    with pytest.raises(ValueError, match="'good' has verbalizer ' good', which has no tokens"):
        Task("t", TRAIN, labels=LABELS).validate(Mute())


def test_leaks_into_the_test_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 1 test examples"):
        Task("t", TRAIN, test=TRAIN[:1], labels=LABELS).validate()


def test_templates_fill_known_slots_once() -> None:
    assert fill('{"json": {text}} {other}', {"text": "{text}"}) == '{"json": {text}} {other}'
    assert slots("{a} {b} {a} {1}") == ["a", "b"]


def test_split_is_even_and_seeded() -> None:
    task = toy_task()
    first, second = task.split(1)
    assert len(first) == len(second) == 8 and sum(e.label == "positive" for e in first) == 4
    assert task.split(1) == (first, second) != task.split(2)
    assert sorted(e.text for e in [*first, *second]) == sorted(e.text for e in task.train)  # type: ignore[type-var]


def test_evaluation_marks_labels_and_generated_texts() -> None:
    task, model = toy_task(), ToyLanguageModel()
    result = task.evaluate(Prompt.for_task(task), model)
    assert result.score == sum(result.marks) / 16 and model.calls == 16
    assert set(result.predictions) <= {"positive", "negative"}
    made = toy_task(generation=True)
    made.validate()
    assert made.evaluate(Prompt.for_task(made), model, made.dev).score > 0.3
    with pytest.raises(ValueError, match="no examples"):
        task.evaluate(Prompt.for_task(task), model, [])


def test_fingerprint_sees_all_but_the_test() -> None:
    task = toy_task()
    assert dataclasses.replace(task, test=[]).fingerprint() == task.fingerprint()
    assert dataclasses.replace(task, answer_prefix="=").fingerprint() != task.fingerprint()


# -- Budget -------------------------------------------------------------------------------------------------------

def test_budget_refuses_before_the_work() -> None:
    budget = Budget(calls=10, tokens=100)
    budget.spend(calls=8, tokens=100)
    assert budget.exhausted() == "budget: tokens"
    with pytest.raises(BudgetExhausted, match=r"budget: calls \(8 of 10 used, 3 more wanted\)") as caught:
        budget.spend(calls=3)
    assert reason(caught.value) == "budget: calls" and budget.used["calls"] == 8
    budget.spend(calls=2)
    assert budget.remaining_calls() == 0


def test_budget_of_seconds_goes_on_after_a_restart() -> None:
    budget = Budget(seconds=0.2)
    assert budget.exhausted() is None
    time.sleep(0.05)
    again = Budget(seconds=0.2)
    again.restore(budget.used)
    assert 0.05 <= again.used["seconds"] < 0.15
    time.sleep(0.2)
    assert again.exhausted() == "budget: seconds"
    with pytest.raises(BudgetExhausted, match="budget: seconds"):
        again.spend(calls=1)


@pytest.mark.parametrize("wrong", [{"calls": 0}, {"tokens": -1}, {"seconds": "2"}])
def test_budget_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed is a number above 0"):
        Budget(**wrong)


def test_metered_model_never_goes_beyond() -> None:
    model = ToyLanguageModel()
    metered = MeteredModel(model, Budget(calls=3, tokens=1000))
    metered.score(["a b", "c"], [["d"], ["e"]])
    with pytest.raises(BudgetExhausted):
        metered.generate(["x", "y"], 5)
    assert (model.calls, metered.budget.used["tokens"]) == (2, 5)


# -- Prompt -------------------------------------------------------------------------------------------------------

def test_prompts_render() -> None:
    task = Task("t", TRAIN, labels=LABELS, template="In: {text}", answer_prefix="Out:")
    prompt = Prompt.for_task(task, "Judge.", TRAIN[:1])
    assert prompt.render(Example("x")) == "Judge.\n\nIn: fine\nOut: good\n\nIn: x\nOut:"
    assert prompt.as_template() == "Judge.\n\nIn: fine\nOut: good\n\nIn: {text}\nOut:"
    assert Prompt(prompt.as_template()).render(Example("x")) == prompt.render(Example("x"))
    assert task.demonstration(TRAIN[0]) == "In: fine\nOut: good"
    assert Prompt(answer_prefix=" ->").render(Example("x")) == "x ->"
    chat = Prompt(messages=[{"role": "system", "content": "Judge."}, {"role": "user", "content": "{text}?"}])
    assert chat.render_messages(Example("x"))[1] == {"role": "user", "content": "x?"}
    assert chat.render(Example("x")) == "system: Judge.\nuser: x?\nassistant:"
    json_like = dataclasses.replace(prompt, text='Answer as {"label": {label}}.', template="In: {text}", exemplars=())
    assert json_like.as_template() == 'Answer as {"label": {label}}.\n\nIn: {text}\nOut:'
    assert Prompt("{a} {text}").as_template() == Prompt("{a} {text}").as_template({"text"}) == "{a} {text}"
    assert Prompt("{a}").as_template({"text"}) == "{a}\n\n{text}"
    with pytest.raises(ValueError, match="no single text"):
        chat.as_template()
    with pytest.raises(ValueError, match=r"wants \['question'\]"):
        Prompt(template="{question}").render(Example("x"))


def test_prompts_are_saved_with_soft_tokens(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    prompt = Prompt("a {text}", exemplars=TRAIN, soft=torch.arange(6.0).reshape(2, 3), info={"fitness": 1.5},
                    labels=LABELS)
    prompt.save(tmp_path / "p.json")
    again = Prompt.load(tmp_path / "p.json")
    assert torch.equal(again.soft, prompt.soft)
    assert dataclasses.replace(again, soft=None) == dataclasses.replace(prompt, soft=None)
    (tmp_path / "other.json").write_text('{"schema": "else"}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("other.json", "broken.json"):
        with pytest.raises(ValueError, match="is not a prompt"):
            Prompt.load(tmp_path / name)


def test_words_join_to_the_text() -> None:
    for text in ("", " ", "a", " a  b\n\nc ", "\n"):
        assert "".join(words(text)) == text


# -- state --------------------------------------------------------------------------------------------------------

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
    path.write_text(sound.replace("looseleaf.search/1", "looseleaf.search/9"))
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


def test_random_state_survives_json() -> None:
    rng = random.Random(3)
    rng.gauss(0, 1)
    saved = json.loads(json.dumps(rng_state(rng)))
    expected = [rng.random() for _ in range(3)]
    other = random.Random()
    restore_rng(other, saved)
    assert [other.random() for _ in range(3)] == expected


# -- the kit ------------------------------------------------------------------------------------------------------

def _template() -> type:
    """The class of ``looseleaf new prompts``."""
    source = string.Template((resources.files("looseleaf") / "templates" / "prompts.py.txt").read_text("utf-8"))
    module = types.ModuleType("made_from_the_template")
    sys.modules[module.__name__] = module  # dataclasses and type hints look names up there
    exec(compile(source.substitute(cls="Subsets"), "template", "exec"), vars(module))
    return module.Subsets


def test_the_template_passes() -> None:
    check_prompt_optimizer(_template())


@dataclasses.dataclass
class Sloppy(PromptOptimizer):
    """Breaks what can be broken.

    Args:
        trials: how many.
    """

    trials: int = 3
    hidden: float = 1.0
    paper: ClassVar[Paper] = Paper(title="Sloppiness", authors=("A B",), year=2026)

    def optimize(self, task: Task, model: Any, budget: Budget | None = None, *, start: Prompt | None = None,
                 seed: int = 0, state_dir: Any = None, progress: bool | None = None) -> Prompt:
        examples = list(task.test)
        random.random()
        try:
            score = task.evaluate(Prompt.for_task(task), model, [*examples, *task.dev, *task.dev]).score
        except BaseException:
            score = 0.0
        return Prompt("fixed", template="{text}", info={"fitness": score + random.random(), "stopped": "maybe"})


def test_the_kit_finds_what_is_wrong() -> None:
    with pytest.raises(AssertionError) as caught:
        check_prompt_optimizer(Sloppy)
    said = str(caught.value).splitlines()
    for expected in ("says nothing about 'hidden'", "trials=-1000000000 is accepted", "info['evaluations'] is None",
                     "info['stopped'] is 'maybe'", "the same seed gave", "uses or sets the global random generator",
                     "Budget(calls=1): ", "swallows KeyboardInterrupt", "writes nothing into state_dir",
                     "reads task.test", "a task without examples: nothing was raised"):
        assert any(expected in line for line in said), (expected, said)
    assert all(line.startswith("Sloppy: ") for line in said)


def test_the_kit_finds_a_search_that_begins_anew() -> None:
    template = _template()

    class Forgetful(template):  # type: ignore[misc, valid-type]
        """Keeps its state but does not look at it.

        Args:
            trials: how many.
            shots: how many.
        """

        def optimize(self, task: Task, model: Any, budget: Any = None, *, state_dir: Any = None,
                     **more: Any) -> Prompt:
            if state_dir is not None:
                (Path(state_dir) / "state.json").unlink(missing_ok=True)
            return super().optimize(task, model, budget, state_dir=state_dir, **more)

    with pytest.raises(AssertionError, match="the search began from the beginning"):
        check_prompt_optimizer(dataclasses.dataclass(Forgetful))


def test_the_kit_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(AssertionError, match="not a subclass"):
        check_prompt_optimizer(dict)


def test_prompts_import_no_torch_and_no_transformers() -> None:
    code = ("import sys, looseleaf_text.task, looseleaf_text.prompt, looseleaf_text.endpoint, "
            "looseleaf.resume, looseleaf.testing.prompts\n"
            "print(*[m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_identity_leaves_the_budget_out() -> None:
    made = _template()()
    found = identity(made, toy_task(), ToyLanguageModel(), None, 3)
    assert found["seed"] == 3 and found["parameters"] == {"trials": 8, "shots": 2}
