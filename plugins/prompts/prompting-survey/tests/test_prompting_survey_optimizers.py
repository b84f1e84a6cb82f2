"""The optimisers: what they find, what they refuse, and that a server is a model like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from looseleaf import Budget, EndpointError, Example
from looseleaf_prompting_survey import TemplateEnsemble, TemplateSearch, default_pool
from looseleaf_text import CalibratedPrompt, EndpointModel, EnsemblePrompt, Template, TextPrompt
from looseleaf_text.testing import ToyLanguageModel, toy_task
from looseleaf_text.testing.servers import toy_server

OTHER = ("[X]\nWell, that was[Z]", "Some say: {text} They felt it was [Z]", "[X] In short it is[Z]")


def run(optimizer: Any, task: Any = None, model: Any = None, **more: Any) -> Any:
    return optimizer.optimize(task or toy_task(), model or ToyLanguageModel(), progress=False, **more)


def test_the_ensemble_says_what_its_members_say() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = run(TemplateEnsemble(), task, model)
    assert len(prompt.members) == prompt.info["evaluations"] == len(default_pool(task))
    assert prompt.info["fitness"] == task.evaluate(prompt.on(model), "dev").score
    calls, best = zip(*prompt.info["history"], strict=True)
    assert list(calls) == [len(task.dev) * n for n in range(1, len(prompt.members) + 1)] and list(best) == sorted(best)
    assert sum(prompt.weights or []) == pytest.approx(1.0)
    for member, (name, right, _) in zip(prompt.members, prompt.info["candidates"], strict=True):
        assert right == task.evaluate(member.on(model), "dev").score
        assert Template(name).to_prompt().render(task.dev[0]) == member.render(task.dev[0])


@pytest.mark.parametrize("how", ["uniform", "accuracy", "likelihood"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_fitted_weights_are_at_least_as_likely(how: Any, calibrate: bool) -> None:
    best = run(TemplateEnsemble(calibrate=calibrate))
    other = run(TemplateEnsemble(weights=how, calibrate=calibrate))
    assert best.info["log_likelihood"] >= other.info["log_likelihood"] - 1e-9
    singles = [c[2] for c in best.info["candidates"]]
    assert best.info["log_likelihood"] >= max(singles) - 1e-9  # one template alone is an ensemble, too
    for member in other.members:
        assert isinstance(member, CalibratedPrompt) is calibrate


def test_calibration_found_is_calibration_respected() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = run(TemplateEnsemble(calibrate=True), task, model)
    assert task.evaluate(prompt.on(model), "dev").score == prompt.info["fitness"]
    prompt = run(TemplateSearch(calibrate=True), task, model)
    assert task.evaluate(prompt.on(model), "dev").score == prompt.info["fitness"]


def test_votes_and_templates_of_ones_own() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = run(TemplateEnsemble(OTHER, combine="vote", weights="uniform"), task, model)
    said = [task.evaluate(m.on(model), "dev").predictions for m in prompt.members]
    for votes, found in zip(zip(*said, strict=True), task.evaluate(prompt.on(model), "dev").predictions, strict=True):
        assert votes.count(found) >= 2
    assert prompt.members[1].render(Example({"text": "x"})) == "Some say: x They felt it was"


def test_a_start_is_a_candidate() -> None:
    task = toy_task()
    start = TextPrompt.for_task(task, "Honestly now.")
    prompt = run(TemplateEnsemble(OTHER), start=start)
    assert prompt.info["evaluations"] == 4 and prompt.members[0].render(X) == start.render(X)
    again = run(TemplateEnsemble(OTHER[:1]), start=prompt)
    assert again.info["evaluations"] == 5
    found = run(TemplateSearch(OTHER[:1], rounds=0), start=start)
    assert found.info["candidates"][0][0] == "start 0" and found.info["evaluations"] == 2


X = Example({"text": "x"})


def test_generation_tasks_are_voted_on() -> None:
    task, model = toy_task(generation=True), ToyLanguageModel()
    prompt = run(TemplateEnsemble(), task, model)
    assert prompt.info["fitness"] == task.evaluate(prompt.on(model), "dev").score
    assert prompt.weights == [c[1] for c in prompt.info["candidates"]]
    found = run(TemplateSearch(), task, model)
    assert found.info["fitness"] == max(c[1] for c in found.info["candidates"])


def test_the_search_improves_on_its_pool() -> None:
    # The toy model hears the words before the last eight: an instruction in front is what can be worded better.
    pool = ("Read the lines below and judge.\n[X] it is[Z]", "What did the writer feel?\n[X] so[Z]",
            "Here is a review.\n[X] hence[Z]")
    gains = []
    for seed in range(5):
        task = toy_task(seed)
        few = run(TemplateSearch(pool, rounds=0), task)
        more = run(TemplateSearch(pool, rounds=3), task)
        before, after = ((p.info["fitness"], p.info["log_likelihood"]) for p in (few, more))
        assert after >= before and more.info["evaluations"] > few.info["evaluations"] == 3
        gains.append(after > before)
    assert any(gains)


class Asked(ToyLanguageModel):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        self.texts += prefixes
        return super().score(prefixes, continuations)


def test_classes_take_turns_among_the_examples() -> None:
    few = [Example({"text": f"number {n}"}, "positive" if n < 90 else "negative") for n in range(100)]
    task = dataclasses.replace(toy_task(), dev=few)

    def numbers(seed: int) -> list[int]:
        model = Asked()
        run(TemplateEnsemble(("[X][Z]",), num_examples=10), task, model, seed=seed)
        return [int(text.split()[-1]) for text in model.texts]

    chosen = numbers(0)
    assert sum(n >= 90 for n in chosen) == 5 and chosen == numbers(0) != numbers(1)
    task = dataclasses.replace(toy_task(), dev=())
    assert run(TemplateEnsemble(num_examples=6), task).info["examples"] == 6


def test_fitness_is_the_task_s_metric() -> None:
    task = dataclasses.replace(toy_task(), metric=lambda prediction, example: 2.0 * (prediction == example.target))
    for cls in (TemplateEnsemble, TemplateSearch):
        prompt = run(cls(), task)
        assert prompt.info["fitness"] == task.evaluate(prompt.on(ToyLanguageModel()), "dev").score > 1


@pytest.mark.parametrize(("cls", "field", "wrong"), [
    (TemplateEnsemble, "weights", "best"), (TemplateEnsemble, "combine", "sum"), (TemplateEnsemble, "templates", "[X]"),
    (TemplateEnsemble, "num_examples", 0), (TemplateSearch, "rounds", -1), (TemplateSearch, "beam", 0),
    (TemplateSearch, "paraphrases", 0), (TemplateSearch, "temperature", 0.0)])
def test_bad_parameters(cls: Any, field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.{field}: expected .*, got "):
        cls(**{field: wrong})


@pytest.mark.parametrize(("templates", "message"), [
    (("[X] so",), "expected one answer slot here, got 0"),
    (("{premise} so[Z]",), r"expected slots for \['text'\].*got \['premise'\]"),
    (("[X] [Z] [Z:b]",), "expected one answer slot here, got 2")])
def test_templates_that_do_not_fit(templates: tuple[str, ...], message: str) -> None:
    for cls in (TemplateEnsemble, TemplateSearch):
        with pytest.raises(ValueError, match=message):
            run(cls(templates))


def test_bad_input() -> None:
    task = toy_task()
    with pytest.raises(ValueError, match=r"Budget\.calls: expected None or a number > 0, got 0"):
        run(TemplateEnsemble(), budget=Budget(calls=0))
    with pytest.warns(UserWarning, match="1 of 1 test examples are also in train or dev"):
        run(TemplateEnsemble(OTHER), dataclasses.replace(task, test=[task.train[0]]))

    class Mute(ToyLanguageModel):
        def tokenize(self, text: str) -> list[int]:
            return [] if text == " positive" else super().tokenize(text)

    with pytest.raises(ValueError, match="has no tokens"):
        run(TemplateEnsemble(), model=Mute())


def test_a_small_budget_still_gives_an_ensemble(tmp_path: Path) -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = run(TemplateEnsemble(), task, model, budget=Budget(calls=40), state_dir=tmp_path)
    assert prompt.info["stopped"] == "budget: calls" and len(prompt.members) == 2 and model.calls == 32
    more = ToyLanguageModel()
    whole = run(TemplateEnsemble(), task, more, state_dir=tmp_path)
    assert whole.info["stopped"] == "done" and more.calls == 16 * (len(default_pool(task)) - 2)
    plain = run(TemplateEnsemble(), budget=Budget(calls=3))
    assert isinstance(plain, TextPrompt) and plain.info["evaluations"] == 0


# -- servers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", [TemplateEnsemble(calibrate=True), TemplateSearch(OTHER, paraphrases=2)])
def test_through_a_server(optimizer: Any) -> None:
    task = toy_task(size=4)
    local = run(optimizer, task)
    with toy_server() as url:
        remote = run(optimizer, task, EndpointModel(url, "toy"))
    assert remote.render(X) == local.render(X) and type(remote) is type(local)
    assert remote.info["fitness"] == local.info["fitness"]
    if isinstance(local, EnsemblePrompt):
        assert remote.weights == pytest.approx(local.weights)


def test_a_server_without_log_probabilities() -> None:
    task = toy_task(size=4)
    with toy_server(log_probs=False) as url:
        with pytest.raises(EndpointError, match=r'returns no log-probabilities.*scoring="generate"'):
            run(TemplateEnsemble(), task, EndpointModel(url, "toy"))
        # accuracy alone is left to vote with
        made = run(TemplateEnsemble(combine="vote", weights="accuracy"), task,
                   EndpointModel(url, "toy", scoring="generate"))
    local = run(TemplateEnsemble(combine="vote", weights="accuracy"), task)
    assert [c[1] for c in made.info["candidates"]] == [c[1] for c in local.info["candidates"]]
