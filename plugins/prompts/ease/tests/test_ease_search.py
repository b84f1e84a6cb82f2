"""What is special to EASE, on the toy model of the kit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import Budget, Example
from looseleaf_ease import EASE, NeuralUCB
from looseleaf_ease.search import context
from looseleaf_text import ChatPrompt, LanguageModel, SoftPrompt, TextPrompt, TextTask
from looseleaf_text.testing import ToyLanguageModel, toy_task

SMALL: dict[str, Any] = {"k": 3, "encoder": "model", "total_iterations": 20, "n_init": 6, "domain": 200, "keep": 8,
                         "hidden": 16, "train_steps": 20}


def run(optimizer: EASE | None = None, model: LanguageModel | None = None, task: TextTask | None = None,
        **more: Any) -> TextPrompt:
    return (optimizer or EASE(**SMALL)).optimize(task or toy_task(), model or ToyLanguageModel(), progress=False,
                                                 **more)


def small(**changes: Any) -> EASE:
    return EASE(**{**SMALL, **changes})


class Watching(ToyLanguageModel):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.scored: list[list[str]] = []
        self.embedded: list[list[str]] = []

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        self.scored.append(prefixes)
        return super().score(prefixes, continuations)

    def embed(self, texts: list[str]) -> np.ndarray:
        self.embedded.append(texts)
        return super().embed(texts)


# -- the search ---------------------------------------------------------------------------------------------------

def test_the_best_arm_is_returned_and_marked_as_the_task_marks_it() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = run(small(target=2.0), model, task)
    info = prompt.info
    assert info["evaluations"] == 20 == len(info["tried"]) == len(info["history"]) and info["stopped"] == "done"
    assert info["encoder"] == "model" and info["n_init"] == 6
    assert info["fitness"] == max(t[0] for t in info["tried"]) == info["history"][-1][1]
    assert task.evaluate(prompt.on(model), task.dev).score == info["fitness"]
    assert len(prompt.exemplars) == 3 and all(e in task.train for e in prompt.exemplars)
    arms = [(t[2], tuple(t[3])) for t in info["tried"]]
    assert len(set(arms)) == len(arms) and all(len(set(a)) == 3 for _, a in arms)


def test_ties_are_broken_by_likelihood() -> None:
    for seed in range(3):
        prompt = run(small(target=2.0), seed=seed)
        score, likelihood = max((t[0], t[1]) for t in prompt.info["tried"])
        assert (prompt.info["fitness"], prompt.info["log_likelihood"]) == (score, likelihood)


def test_no_prompt_is_scored_twice_and_calls_are_counted_once() -> None:
    model, budget = Watching(), Budget(calls=10_000)
    prompt = run(small(target=2.0), model, budget=budget)
    asked = [text for batch in model.scored for text in batch]
    assert len(asked) == len(set(asked)) == 20 * 16
    assert budget.used["calls"] == model.calls == len(asked) + sum(map(len, model.embedded))
    # At first the arms tried, then the exemplars and validation examples once, then 8 arms a round.
    assert [len(b) for b in model.embedded] == [6, 32, *[8] * 14]
    assert prompt.info["history"][-1][0] == model.calls


def test_identical_examples_are_one() -> None:
    task = toy_task(size=4)
    task = dataclasses.replace(task, train=[*task.train, *task.train])
    model = Watching()
    prompt = run(small(k=2, total_iterations=60, target=2.0), model, task)
    asked = [text for batch in model.scored for text in batch]
    assert len(asked) == len(set(asked)) and prompt.info["examples"]["pool"] == 4
    # All 4 x 3 arms there are were tried, and the search knows that it is done.
    assert prompt.info["evaluations"] == 12 and prompt.info["stopped"] == "done"


def test_embedded_is_the_whole_prompt_before_the_example_and_order_shows() -> None:
    model = Watching()
    run(model=model)
    text = model.embedded[0][0]
    assert text.count("Sentiment:") == 3 and not text.endswith("Sentiment:")
    assert all(prefix.startswith(text + "\n\n") for prefix in model.scored[0])
    search = small().search(toy_task(), ToyLanguageModel(), progress=False)
    assert context(search.prompt((0, (0, 1, 2)))) != context(search.prompt((0, (1, 0, 2))))
    single = model.embedded[1]
    assert len(single) == 32 and all(t.count("Sentiment:") == 1 for t in single)


def test_the_filter_looks_at_the_nearest_and_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import looseleaf_ease.optimizer as module

    seen: list[int] = []
    plain = module.closest

    def watch(cost: Any, sets: Any, keep: int) -> Any:
        seen.append(len(sets))
        return plain(cost, sets, keep)

    monkeypatch.setattr(module, "closest", watch)
    run(small(target=2.0))
    assert len(seen) == 14 and all(150 < n <= 200 for n in seen)
    model = Watching()
    run(small(ot=False, target=2.0), model)
    assert len(seen) == 14 and [len(b) for b in model.embedded] == [6, *[8] * 14]  # no single exemplars


def test_confidence_grows_once_per_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled: list[torch.Tensor] = []
    plain = NeuralUCB.update

    def watch(self: NeuralUCB, gradient: torch.Tensor) -> None:
        before = self.confidence.clone()
        plain(self, gradient)
        assert torch.equal(self.confidence, before + gradient * gradient)
        pulled.append(gradient)

    monkeypatch.setattr(NeuralUCB, "update", watch)
    run(small(target=2.0))
    assert len(pulled) == 20 - 6  # not for the random arms


def test_best_of_n_is_the_same_search_without_rounds() -> None:
    model = Watching()
    random = run(small(n_init=20, target=2.0), model)
    assert not model.embedded and random.info["evaluations"] == 20
    assert random.info["tried"][:6] == run(small(target=2.0)).info["tried"][:6]


def test_it_learns_where_there_is_something_to_learn() -> None:
    """Over seeds, what the bandit tries after the random arms is better than random arms."""
    gains = []
    for seed in range(6):
        task = toy_task(seed)
        tried = [t[1] for t in run(small(total_iterations=40, n_init=20, domain=1000, train_steps=60, hidden=32,
                                         target=2.0), task=task, seed=seed).info["tried"]]
        gains.append(np.mean(tried[20:]) - np.mean(tried[:20]))
    assert np.mean(gains) > 0


def test_the_target_ends_the_search() -> None:
    prompt = run(small(target=0.5))
    assert prompt.info["evaluations"] < 20 and prompt.info["stopped"] == "done" and prompt.info["fitness"] >= 0.5


def test_generation_tasks_take_the_metric() -> None:
    prompt = run(task=toy_task(generation=True))
    assert 0 <= prompt.info["fitness"] <= 1 and prompt.info["log_likelihood"] is None
    json.dumps(prompt.info)


def test_a_start_gives_the_instruction_and_the_first_arm() -> None:
    task = toy_task()
    stranger = Example({"text": "a lovely film that felt warm and bright"}, "positive")
    start = TextPrompt.for_task(task, "Judge the film.", [task.train[4], stranger])
    model = Watching()
    prompt = run(small(target=2.0), model, task, start=start)
    assert set(model.scored[0]) == {start.render(e) for e in task.dev}
    assert prompt.info["examples"]["pool"] == 17 and prompt.info["tried"][0][3][1] == 16
    assert prompt.text == "Judge the film." and prompt.info["evaluations"] == 20
    instruction_alone = run(small(total_iterations=6), start=TextPrompt.for_task(task, "Judge the film."))
    assert instruction_alone.text == "Judge the film." and len(instruction_alone.exemplars) == 3


@pytest.mark.parametrize(("start", "words"), [
    (TextPrompt("The film {text} is"), "no place for exemplars"),
    (ChatPrompt([{"role": "user", "content": "{text}"}]), "expected a TextPrompt"),
    (SoftPrompt(TextPrompt(), torch.zeros(1, 2)), "expected a TextPrompt")])
def test_bad_starts(start: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(start=start)


# -- instructions -------------------------------------------------------------------------------------------------

def test_instructions_are_part_of_the_arm() -> None:
    model = Watching()
    given = ("Say what was felt.", "Be brief.", "")
    prompt = run(small(instructions=given, target=2.0), model)
    assert prompt.info["instructions"] == ["", *given[:2]] and prompt.text in prompt.info["instructions"]
    used = {t[2] for t in prompt.info["tried"]}
    assert len(used) > 1
    texts = [t for batch in model.embedded[2:] for t in batch]
    assert {t.split("\n\n")[0] for t in texts} >= set(given[:2])


def test_the_model_proposes_instructions_once(tmp_path: Path) -> None:
    class Author(ToyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []

        def generate(self, prompts: list[str], *arguments: Any, **more: Any) -> list[str]:
            super().generate(prompts, *arguments, **more)
            self.asked += prompts
            return [f" call it what it is {n % 3}" if n else "  " for n, _ in enumerate(prompts)]

    first = Author()
    prompt = run(small(propose=5, target=2.0), first, state_dir=tmp_path)
    assert len(first.asked) == len(set(first.asked)) == 5
    assert all(t.endswith("\n\nThe instruction was to") and t.count("Sentiment:") == 10 for t in first.asked)
    assert prompt.info["instructions"] == ["", "Call it what it is 1", "Call it what it is 2", "Call it what it is 0"]
    again = Author()
    assert run(small(propose=5, target=2.0), again, state_dir=tmp_path).text == prompt.text and not again.asked


# -- budgets ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("calls", [1, 15, 16, 100, 333])
def test_budgets_are_kept(calls: int) -> None:
    model, budget = ToyLanguageModel(), Budget(calls=calls)
    prompt = run(model=model, budget=budget)
    assert model.calls == budget.used["calls"] <= calls and prompt.info["stopped"] == "budget: calls"
    assert prompt.info["evaluations"] >= min(calls // 16, 6) and len(prompt.exemplars) == 3


def test_the_paper_s_fraction_of_random_arms_where_the_budget_is_small() -> None:
    optimizer = EASE(encoder="model", train_steps=5)
    prompt = run(optimizer, budget=Budget(calls=600))
    assert prompt.info["n_init"] == round(40 / 165 * (600 // 16)) < prompt.info["evaluations"]
    assert prompt.info["embedded"] == 16  # each embedding is a call
    assert optimizer._initial_count(optimizer.search(toy_task(), ToyLanguageModel(), progress=False)) == 40
    with pytest.raises(ValueError, match=r"n_init: expected None or an integer in \[1, total_iterations=20\], got 30"):
        EASE(total_iterations=20, n_init=30)


def test_no_budget_at_all() -> None:
    with pytest.raises(ValueError, match=r"Budget\.calls: expected"):
        run(budget=Budget(calls=0))


def test_a_limit_on_time_ends_between_rounds() -> None:
    prompt = run(small(total_iterations=10_000, n_init=3, target=2.0), ToyLanguageModel(delay=0.001),
                 budget=Budget(seconds=0.3))
    assert prompt.info["stopped"] == "budget: seconds"


# -- bad input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("field", "wrong"), [
    ("k", 0), ("total_iterations", 0), ("n_init", 0), ("nu", -0.1), ("lam", 0.0), ("domain", 0), ("keep", 0),
    ("hidden", 0), ("train_steps", 0), ("encoder", ""), ("encoder", 3), ("pool", 0), ("validation", 0),
    ("instructions", "one text"), ("propose", -1), ("target", 0.0), ("nu", float("nan"))])
def test_bad_parameters(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"EASE\.{field}: expected .*, got"):
        EASE(**{field: wrong})


def test_more_exemplars_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"EASE\.k: expected an integer in \[1, 16\], the different examples"):
        run(small(k=17))
    with pytest.raises(ValueError, match=r"EASE\.k: expected an integer in \[1, 4\].*got 5"):
        run(small(k=5, pool=4))
    everyone = run(small(k=4, total_iterations=8, n_init=3), task=toy_task(size=4))
    assert len(everyone.exemplars) == 4  # only the order is left to choose


def test_no_validation_examples() -> None:
    with pytest.raises(ValueError, match="expected dev examples, got none: give some"):
        run(task=dataclasses.replace(toy_task(), dev=[]))


def test_labels_without_tokens() -> None:
    with pytest.raises(ValueError, match="which has no tokens"):
        run(task=dataclasses.replace(toy_task(), labels={"positive": " ", "negative": " bad"}))


def test_examples_in_two_places_are_warned_of() -> None:
    task = toy_task()
    with pytest.warns(UserWarning, match=r"2 of 16 test examples are also in train or dev"):
        run(task=dataclasses.replace(task, test=[*task.train[:2], *task.test[2:]]))
    with pytest.warns(UserWarning, match=r"1 of 16 validation examples are also among the exemplars"):
        run(task=dataclasses.replace(task, dev=[task.train[0], *task.dev[1:]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(task=task)


# -- stopping and resuming ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("encoder", ["model", lambda texts: ToyLanguageModel().embed(texts)])
def test_killed_at_any_request_and_resumed(encoder: Any, tmp_path: Path) -> None:
    class Kill(BaseException):
        pass

    def outcome(prompt: TextPrompt) -> tuple[Any, ...]:
        return prompt.render(toy_task().dev[0]), prompt.info["tried"], prompt.info["history"]

    optimizer = small(encoder=encoder, target=2.0, total_iterations=14)
    whole = ToyLanguageModel()
    expected = outcome(run(optimizer, whole))
    calls = 0
    for n in range(1, whole.requests, 3):
        def stop(request: int, n: int = n) -> None:
            if request > n:
                raise Kill

        model = ToyLanguageModel(on_request=stop)
        with pytest.raises(Kill):
            run(optimizer, model, state_dir=tmp_path / str(n))
        again, budget = ToyLanguageModel(), Budget()
        assert outcome(run(optimizer, again, state_dir=tmp_path / str(n), budget=budget)) == expected
        # An evaluation that was cut short is made again; nothing else is.
        assert budget.used["calls"] == whole.calls
        calls = again.calls
    assert calls < 100 < whole.calls


def test_another_encoder_is_another_search(tmp_path: Path) -> None:
    run(state_dir=tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another search .*encoder"):
        run(small(encoder=lambda texts: np.ones((len(texts), 2))), state_dir=tmp_path)


def test_a_search_with_more_budget_goes_on(tmp_path: Path) -> None:
    first = run(small(target=2.0), budget=Budget(calls=250), state_dir=tmp_path)
    assert first.info["stopped"] == "budget: calls"
    model, fresh = ToyLanguageModel(), ToyLanguageModel()
    more = run(small(target=2.0), model, budget=Budget(calls=5000), state_dir=tmp_path)
    assert more.info["stopped"] == "done" and more.info["tried"] == run(small(target=2.0), fresh).info["tried"]
    assert model.calls < fresh.calls


SCRIPT = """
    import sys
    from looseleaf_text.testing import ToyLanguageModel, toy_task
    from looseleaf_ease import EASE
    search = EASE(k=3, encoder="model", total_iterations=60, n_init=10, domain=200, keep=8, hidden=16, train_steps=20,
                  target=2.0)
    print("ready", flush=True)
    prompt = search.optimize(toy_task(), ToyLanguageModel(delay=float(sys.argv[2])), seed=5, state_dir=sys.argv[1],
                             progress=False)
    print(repr((prompt.render(toy_task().dev[0]), prompt.info["tried"])))
"""


def test_kill_9_and_resume(tmp_path: Path) -> None:
    def start(folder: str, delay: float) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / folder), str(delay)],
                                stdout=subprocess.PIPE, text=True, env={**os.environ})

    expected = start("whole", 0.0).communicate(timeout=120)[0].splitlines()[-1]
    slow = start("killed", 0.005)
    state = tmp_path / "killed" / "state.json"

    def tried() -> int:
        return len(json.loads(state.read_text())["payload"]["tried"]) if state.exists() else 0

    until = time.monotonic() + 100
    while time.monotonic() < until and tried() < 15:
        time.sleep(0.02)
    slow.send_signal(signal.SIGKILL)
    slow.communicate(timeout=30)
    assert slow.returncode == -signal.SIGKILL, "it should still have been at work"
    assert start("killed", 0.0).communicate(timeout=120)[0].splitlines()[-1] == expected


@pytest.mark.parametrize("damage", [lambda t: t[:-20], lambda t: t.replace('"score', '"scare', 1)[:100] + "x"])
def test_a_damaged_state_is_refused(damage: Callable[[str], str], tmp_path: Path) -> None:
    run(state_dir=tmp_path)
    path = tmp_path / "state.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"state\.json"):
        run(state_dir=tmp_path)
