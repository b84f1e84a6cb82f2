"""Tasks of text, text and chat prompts, what language models cost, and the kit's toys."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from looseleaf import Budget, BudgetExhausted, Example, Paper, Prompt
from looseleaf.prompts.optimizer import Search
from looseleaf.testing import checks
from looseleaf.testing.common import run
from looseleaf_text import ChatPrompt, LanguageModel, TextOptimizer, TextPrompt, TextTask
from looseleaf_text.model import words
from looseleaf_text.slots import fill, slots
from looseleaf_text.testing import ToyLanguageModel, toy_task

LABELS = {"good": " good", "bad": " bad"}
TRAIN = [Example({"text": "fine"}, "good"), Example({"text": "awful"}, "bad")]
X = Example({"text": "x"})


# -- tasks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "message"), [
    ({"train": []}, "expected training examples, got none"),
    ({"labels": {"good": " good"}}, "expected two different classes or more"),
    ({"labels": {"good": " ", "bad": " bad"}}, "has no tokens"),
    ({"labels": {"good": " x", "bad": " x"}}, "share the verbalizer"),
    ({"train": TRAIN[:1]}, "of two classes or more, got only 'good'"),
    ({"train": [*TRAIN, Example({"text": "x"}, "goood")]},
     r"train\[2\]: expected a target among .*, got 'goood'.*Did you mean 'good'"),
    ({"dev": [X]}, r"dev\[0\]: expected a target among .*, got None"),
    ({"template": "{sentence}"}, r"train\[0\]: expected the inputs \['sentence'\] of the template"),
    ({"template": "no slot"}, "expected a template with a slot"),
    ({"metric": "exact_mach"}, "got 'exact_mach'. Did you mean 'exact_match'"),
    ({"metric": "exact_match"}, "expected metric='accuracy' or a ScoreMetric with classes"),
    ({"labels": None}, "got metric='accuracy' and classes=None"),
    ({"labels": None, "metric": "exact_match", "train": [X]}, "expected a target, which metric 'exact_match' needs"),
])
def test_tasks_nobody_can_work_with(change: dict[str, Any], message: str) -> None:
    task = TextTask("t", **{"train": TRAIN, "labels": LABELS, **change})
    with pytest.raises(ValueError, match=message):
        task.validate()


def test_labels_without_tokens_under_this_model() -> None:
    class Mute(ToyLanguageModel):
        def tokenize(self, text: str) -> list[int]:
            return [] if text == " good" else super().tokenize(text)

    TextTask("t", TRAIN, labels=LABELS).validate(ToyLanguageModel())
    with pytest.raises(ValueError, match="'good' has verbalizer ' good', which has no tokens"):
        TextTask("t", TRAIN, labels=LABELS).validate(Mute())


def test_classes_are_the_labels() -> None:
    task = TextTask("t", TRAIN, labels=LABELS)
    assert task.classes == ("good", "bad") and TextTask("t", TRAIN, metric="contains").classes is None
    assert dataclasses.replace(task, labels={"a": "a", "b": "b"}).classes == ("a", "b")
    with pytest.raises(TypeError, match="classes"):
        TextTask("t", TRAIN, classes=("a", "b"))  # type: ignore[call-arg]


def test_metrics_of_texts() -> None:
    task = TextTask("t", [], metric="exact_match")
    examples = [Example({"text": "x"}, "Rome"), Example({"text": "y"}, "Paris")]
    assert task.rate([" rome ", "in Paris"], examples).scores == [1.0, 0.0]
    assert dataclasses.replace(task, metric="contains").rate([" rome ", "in Paris"], examples).score == 1.0


def test_leaks_into_the_test_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 1 test examples"):
        TextTask("t", TRAIN, test=TRAIN[:1], labels=LABELS).validate()
    with pytest.warns(UserWarning, match="1 of 1 test examples"):  # it is shown alike, whatever else differs
        TextTask("t", TRAIN, test=[Example({"text": "fine", "source": "b"}, "bad")], labels=LABELS).validate()


def test_templates_fill_known_slots_once() -> None:
    assert fill('{"json": {text}} {other}', {"text": "{text}"}) == '{"json": {text}} {other}'
    assert fill("{n} of {m}", {"n": 3}) == "3 of {m}"
    assert slots("{a} {b} {a} {1}") == ["a", "b"]


def test_split_is_even_and_seeded() -> None:
    task = toy_task()
    first, second = task.split(1)
    assert len(first) == len(second) == 8 and sum(e.target == "positive" for e in first) == 4
    assert task.split(1) == (first, second) != task.split(2)
    assert sorted(e.inputs["text"] for e in [*first, *second]) == sorted(e.inputs["text"] for e in task.train)
    free = TextTask("t", [Example({"text": str(n)}, n) for n in range(7)], metric="contains")
    assert [len(half) for half in free.split(0)] == [4, 3]


def test_classes_take_turns() -> None:
    task = TextTask("t", [Example({"n": n}, c) for n, c in enumerate("aaabca")], labels={c: c for c in "abc"})
    assert [e.inputs["n"] for e in task.in_turn(task.train)] == [0, 3, 4, 1, 2, 5]
    assert [e.inputs["n"] for e in task.in_turn(task.train, 4)] == [0, 3, 4, 1]
    assert [e.inputs["n"] for e in task.first_of_each(task.train, 2)] == [0, 1, 3, 4]
    free = dataclasses.replace(task, labels=None)
    assert [e.inputs["n"] for e in free.in_turn(task.train, 4)] == [0, 1, 2, 3]
    assert [e.inputs["n"] for e in free.first_of_each(task.train, 2)] == [0, 1]


def test_evaluation_scores_labels_and_generated_texts() -> None:
    task, model = toy_task(), ToyLanguageModel()
    result = task.evaluate(TextPrompt.for_task(task).on(model))
    assert result.scores is not None and result.score == sum(result.scores) / 16 and model.calls == 16
    assert set(result.predictions) <= {"positive", "negative"}
    free = toy_task(generation=True)
    free.validate()
    assert free.evaluate(TextPrompt.for_task(free).on(model), "dev").score > 0.3
    with pytest.raises(ValueError, match="expected examples to evaluate on"):
        task.evaluate(TextPrompt.for_task(task).on(model), [])


def test_fingerprint_sees_all_but_the_test() -> None:
    task = toy_task()
    assert dataclasses.replace(task, test=[]).fingerprint() == task.fingerprint()
    assert dataclasses.replace(task, answer_prefix="=").fingerprint() != task.fingerprint()


# -- what language models cost ------------------------------------------------------------------------------------

def test_metered_model_never_goes_beyond() -> None:
    model, budget = ToyLanguageModel(), Budget(calls=3, tokens=1000)
    metered = budget.meter(model)
    assert isinstance(metered, LanguageModel)
    metered.score(["a b", "c"], [["d"], ["e"]])
    with pytest.raises(BudgetExhausted):
        metered.generate(["x", "y"], 5)
    assert (model.calls, budget.used["tokens"]) == (2, 5)


def test_tokens_are_booked_before_or_after() -> None:
    model = ToyLanguageModel()
    for budget in (Budget(), Budget(tokens=100)):
        metered = budget.meter(model)
        metered.score(["a b c"], [[" d", " e f"]])
        metered.embed(["a b"])
        metered.generate(prompts=["a b"], max_tokens=5)
        assert metered.token_texts("a b") == ["a", " b"] and metered.count_tokens("a b") == 2  # free
        # before: the longest continuation and answer; after: what the toy says it used
        assert budget.used["calls"] == 3
        assert budget.used["tokens"] == (3 + 2 + 2 + 2 + 5 if budget.tokens else 3 + 2 + 3)


# -- prompts ------------------------------------------------------------------------------------------------------

def test_prompts_render() -> None:
    task = TextTask("t", TRAIN, labels=LABELS, template="In: {text}", answer_prefix="Out:")
    prompt = TextPrompt.for_task(task, "Judge.", TRAIN[:1])
    assert prompt.render(X) == "Judge.\n\nIn: fine\nOut: good\n\nIn: x\nOut:"
    assert prompt.as_template() == "Judge.\n\nIn: fine\nOut: good\n\nIn: {text}\nOut:"
    assert TextPrompt(prompt.as_template()).render(X) == prompt.render(X)
    assert task.demonstration(TRAIN[0]) == "In: fine\nOut: good" == prompt.demonstration(TRAIN[0])
    assert TextPrompt(answer_prefix=" ->").render(X) == "x ->"
    json_like = dataclasses.replace(prompt, text='Answer as {"label": {label}}.', template="In: {text}", exemplars=())
    assert json_like.as_template() == 'Answer as {"label": {label}}.\n\nIn: {text}\nOut:'
    assert TextPrompt("{a} {text}").as_template() == TextPrompt("{a} {text}").as_template({"text"}) == "{a} {text}"
    assert TextPrompt("{a}").as_template({"text"}) == "{a}\n\n{text}"
    with pytest.raises(ValueError, match=r"expected the inputs \['question'\], got an example with \['text'\]"):
        TextPrompt(template="{question}").render(X)


def test_prompts_take_what_they_need_from_the_task() -> None:
    task = dataclasses.replace(toy_task(generation=True), max_tokens=3, stop=("!",))
    prompt = TextPrompt.for_task(task, separator=" ")
    assert (prompt.max_tokens, prompt.stop, prompt.labels, prompt.separator) == (3, ("!",), None, " ")
    asked: list[tuple[Any, ...]] = []

    class Asked(ToyLanguageModel):
        def generate(self, *arguments: Any, **options: Any) -> list[str]:
            asked.append(arguments[1:])
            return super().generate(*arguments, **options)

    prompt.on(Asked()).predict(task.dev)
    dataclasses.replace(prompt, stop=()).on(Asked()).predict(task.dev)
    assert asked == [(3, ["!"]), (3, None)]


def test_chats_render() -> None:
    chat = ChatPrompt([{"role": "system", "content": "Judge."}, {"role": "user", "content": "{text}?"}], labels=LABELS)
    assert chat.render_messages(X)[1] == {"role": "user", "content": "x?"}
    assert chat.render(X) == "system: Judge.\nuser: x?\nassistant:"
    model = ToyLanguageModel()
    assert chat.on(model).scores([X]) == model.score([chat.render(X)], [list(LABELS.values())])
    assert chat.on(model).predict([X])[0] in LABELS


def test_prompts_are_saved(tmp_path: Path) -> None:
    for prompt in (TextPrompt("a {text}", exemplars=TRAIN, info={"fitness": 1.5}, labels=LABELS),
                   ChatPrompt([{"role": "user", "content": "{text}?"}])):
        prompt.save(tmp_path / "p.json")
        assert Prompt.load(tmp_path / "p.json") == prompt == type(prompt).load(tmp_path / "p.json")
    with pytest.raises(ValueError, match="expected a TextPrompt, got a ChatPrompt"):
        TextPrompt.load(tmp_path / "p.json")


def test_a_prompt_is_read_where_nothing_was_imported(tmp_path: Path) -> None:
    TextPrompt("a {text}").save(tmp_path / "p.json")
    code = "import sys, looseleaf; print(looseleaf.Prompt.load(sys.argv[1]).text, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.json")], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "a {text} False"


def test_words_join_to_the_text() -> None:
    for text in ("", " ", "a", " a  b\n\nc ", "\n"):
        assert "".join(words(text)) == text


def test_prompts_import_no_torch_and_no_transformers() -> None:
    code = ("import sys, looseleaf_text.task, looseleaf_text.prompts, looseleaf_text.ensemble, "
            "looseleaf_text.calibration, looseleaf_text.template, looseleaf_text.endpoint, "
            "looseleaf_text.testing.servers\n"
            "print(*[m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- optimisers of text in the kit --------------------------------------------------------------------------------

@dataclasses.dataclass
class FirstShots(TextOptimizer):
    """Tries one to five of the first examples as demonstrations."""

    paper: ClassVar[Paper] = Paper(title="Shots", authors=("A B",), year=2026, summary="A few shots.")

    def optimize(self, task: TextTask, model: LanguageModel, **options: Any) -> TextPrompt:
        search = Search(self, task, model, **options)
        task.validate(model)
        scores = search.state.setdefault("scores", [])
        with search:
            for n in search.steps(5):
                scores.append(task.evaluate(self.prompt(task, n).on(search.model), "dev").score)
        best = max(range(len(scores)), key=scores.__getitem__, default=0)
        return dataclasses.replace(self.prompt(task, best), info=search.info(max(scores, default=0.0), len(scores)))

    def prompt(self, task: TextTask, n: int) -> TextPrompt:
        return TextPrompt.for_task(task, exemplars=task.train[:n + 1])


@dataclasses.dataclass
class Careless(FirstShots):
    """Books a part of what it asks."""

    def optimize(self, task: TextTask, model: LanguageModel, **options: Any) -> TextPrompt:
        model.score(["x"], [[" y"]])
        return super().optimize(task, model, **options)


def test_text_optimisers_are_checked_on_a_toy_language_model() -> None:
    outcomes = {o.name: o.problem or o.skipped or "passes" for o in run(checks(FirstShots))}
    assert set(outcomes.values()) == {"passes", "there is no model that is a torch module"}, outcomes
    careless = next(c for c in checks(Careless) if c.name == "keeps budget of calls")
    assert "calls were made" in (run([careless])[0].problem or "")


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, {})
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["5", "11", "13"]
    assert TextPrompt.load(tmp_path / "prompt.json").text == "Say what you think of the film."
