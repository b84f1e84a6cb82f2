"""The conformance kit for prompt optimisers, whatever their prompts and models are made of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
import shutil
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from looseleaf.budget import Budget, Cost, watched
from looseleaf.errors import EndpointError
from looseleaf.fingerprint import content_fingerprint
from looseleaf.plugin import Plugin
from looseleaf.prompts.optimizer import PromptOptimizer
from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Task
from looseleaf.testing.common import Kit, assert_refused, needs, reloaded, same_random_state
from looseleaf.testing.models import seeded

STOPPED = ("done", "budget: calls", "budget: tokens", "budget: seconds")


class PictureClassifier(nn.Sequential):
    """A small image classifier with random weights: (B, 8, 8) pictures -> (B, 2) logits. The same each time."""

    def __init__(self) -> None:
        super().__init__(seeded(lambda: OrderedDict(
            first=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), relu=nn.ReLU(), flat=nn.Flatten(),
            hidden=nn.Linear(4 * 36, 8), tanh=nn.Tanh(), last=nn.Linear(8, 2))))

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 8, 8) -> (B, 2)."""
        out: Tensor = super().forward(pictures[:, None])
        return out


def picture_task() -> Task:
    """Pictures ("picture": (8, 8) float32) whose left or right half is brighter."""
    draw = torch.Generator().manual_seed(0)

    def picture(n: int) -> Example:
        pixels = 0.5 * torch.randn(8, 8, generator=draw)
        pixels[:, 4 * (n % 2):4 * (n % 2) + 4] += 1
        return Example({"picture": pixels}, "right" if n % 2 else "left")

    train, dev, test = ([picture(n) for n in range(12)] for _ in range(3))
    return Task("halves", train, dev, test, classes=("left", "right"))


class Watch:
    """A model that counts what it is asked, and may be slow or fail.

    Args:
        model: who does the work.
        on_request: called with the number of each request and its cost in calls, before it is made; may raise.

    Attributes:
        model: to be given to the optimiser.
        requests: costly methods called, and torch modules inside the model called by themselves.
        calls: what the former cost, as declared by :func:`looseleaf.costs`.
        direct: requests of the latter kind, whose cost is not known.
        modules: torch modules of the model.
    """

    def __init__(self, model: Any, on_request: Callable[[int, int], None] = lambda number, calls: None) -> None:
        self.requests = self.calls = self.direct = self._depth = 0
        self.on_request = on_request
        self.model = watched(model, self._around)
        self.modules = [m for m in (model, *getattr(model, "__dict__", {}).values()) if isinstance(m, nn.Module)]
        for module in self.modules:  # a plain function, which a copy of the model would share
            module.register_forward_pre_hook(lambda *_: self._direct())

    def _request(self, calls: int) -> None:
        self.requests += 1
        self.on_request(self.requests, calls)
        self.calls += calls

    def _direct(self) -> None:
        if not self._depth:
            self._request(0)
            self.direct += 1

    @contextlib.contextmanager
    def _around(self, model: Any, cost: Cost, arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterator[None]:
        if not self._depth:
            self._request(cost.calls(model, *arguments, **options))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


class PromptKit(Kit):
    """The contract of :class:`looseleaf.PromptOptimizer`, checked on a small task and model.

    Args:
        cls: the plugin.
        make: makes an instance for the runs; None: ``cls``. Defaults are always constructed, too.
        task: makes a task, the same each time, that the found prompt can be evaluated on. None: small pictures, where
            the plugin accepts any torch module; text optimisers get theirs from ``looseleaf_text.TextOptimizer``.
        model: makes a model that the plugin accepts, in evaluation mode.
        calls: budget of the runs in calls; more where a method needs more to get going.
    """

    interface: ClassVar[type[Plugin]] = PromptOptimizer
    refusals = (ValueError,)

    def __init__(self, cls: type[Plugin], make: Callable[[], Any] | None = None, task: Callable[[], Task] | None = None,
                 model: Callable[[], Any] | None = None, calls: int = 600) -> None:
        super().__init__(cls, make)
        self.given = {name: given for name, given in (("task", task), ("model", model)) if given is not None}
        self.accepts, self.calls = getattr(cls, "accepts", object), calls
        self.subjects = {"": self.watch}

    def _toy(self, name: str, default: Callable[[], Any]) -> Any:
        assert len(self.given) == 2 or (not self.given and isinstance(PictureClassifier(), self.accepts)), \
            "conformance(): expected task= and model=, functions that make a small task and a " \
            f"{self.accepts.__name__}; got {list(self.given) or 'neither'}"
        return self.given.get(name, default)()

    def task(self) -> Task:
        """A new task."""
        task: Task = self._toy("task", picture_task)
        return task

    def model(self) -> Any:
        """A new model, in evaluation mode."""
        model = self._toy("model", PictureClassifier)
        return model.eval() if isinstance(model, nn.Module) else model

    def watch(self, *given: Any) -> Watch:
        """A new model that is watched."""
        return Watch(self.model(), *given)

    def use(self, watch: Watch, *, task: Task | None = None, budget: Budget | None = None, **options: Any) -> Any:
        return self.make().optimize(task or self.task(), watch.model, budget=budget or Budget(calls=self.calls),
                                    progress=False, **{"seed": 0, **options})

    def parts(self, watch: Watch) -> Sequence[Any]:
        return watch.modules

    def compared(self, prompt: Any) -> dict[str, Any]:
        return {"fingerprint": prompt.fingerprint(),
                **{key: prompt.info.get(key) for key in ("fitness", "evaluations", "stopped")}}

    def check_is_at_work(self) -> None:
        """The model is asked, and another task gives another result."""
        watch, prompt = self.first(self.watch)[:2]
        assert isinstance(prompt, Prompt), f"optimize() returns a {type(prompt).__name__}, expected a looseleaf.Prompt"
        assert watch.requests > 0, "the model is never asked"
        # by chance one draw may change nothing
        others = (self.use(self.watch(), task=_with_other_targets(self.task(), n)) for n in range(3))
        assert any(other.fingerprint() != prompt.fingerprint() or
                   other.info.get("fitness") != prompt.info.get("fitness") for other in others), \
            "other targets of the training examples give the same prompt and the same fitness: the task is ignored"

    def check_declares_the_model_it_accepts(self) -> None:
        assert isinstance(self.accepts, type) and self.accepts is not object, \
            "set the class attribute `accepts` to the type of model it is for"
        assert isinstance(self.model(), self.accepts), f"conformance() gives a model that is no {self.accepts.__name__}"
        assert_refused(lambda: self.make().optimize(self.task(), object(), budget=Budget(calls=8), progress=False),
                       "a model that it does not accept", (TypeError, ValueError))

    def check_info_fields(self) -> None:
        info = self.first(self.watch).result.info
        fitness, evaluations = info.get("fitness"), info.get("evaluations")
        assert isinstance(fitness, (int, float)) and math.isfinite(fitness), f"info['fitness'] is {fitness!r}"
        assert isinstance(evaluations, int) and evaluations >= 1, \
            f"info['evaluations'] is {evaluations!r}: count the candidates or steps that were tried"
        assert info.get("stopped") in STOPPED, f"info['stopped'] is {info.get('stopped')!r}, expected one of {STOPPED}"
        try:
            json.dumps(info)
        except TypeError as error:
            raise AssertionError(f"info is not plain data: {error}") from None

    def check_prompt_predicts(self) -> None:
        """The prompt found can be put on the model and evaluated on the task, by a metered model too."""
        self._evaluate(self.first(self.watch).result)

    def check_saved_and_loaded_prompt_predicts_the_same(self) -> None:
        prompt = self.first(self.watch).result
        again = reloaded(prompt.save, Prompt.load)
        assert type(again) is type(prompt) and again.fingerprint() == prompt.fingerprint(), \
            "a prompt saved and loaded has other fields"
        assert json.dumps(again.info) == json.dumps(prompt.info), "a prompt saved and loaded has another info"
        assert self._evaluate(again) == self._evaluate(prompt), "a prompt saved and loaded predicts otherwise"

    def _evaluate(self, prompt: Any) -> str:
        task, budget = self.task(), Budget()
        with same_random_state():
            found = task.evaluate(prompt.on(budget.meter(self.model())), "dev" if len(task.dev) else "train")
        assert math.isfinite(found.score), f"the prompt's score on the task is {found.score}"
        assert budget.used["calls"] > 0, "the prompt predicts without asking the metered model"
        return content_fingerprint([found.predictions, found.class_scores])

    check_same_seed_same_result = Kit.same_result
    check_global_random_state_untouched = Kit.leaves_random_state

    def check_model_left_as_it_was(self) -> None:
        """After a stop half-way, too."""
        self.leaves_subject(self.watch)
        self.leaves_subject_after_exception(self.watch)

    def check_keeps_budget_of_calls(self) -> None:
        for limit in (1, 7, max(8, self.calls // 3)):
            watch, budget = self.watch(), Budget(calls=limit)
            prompt, booked = self.use(watch, budget=budget), budget.used["calls"]
            assert watch.calls <= limit, f"Budget(calls={limit}): {watch.calls} calls were made"
            assert booked <= limit and (booked >= watch.calls if watch.direct else booked == watch.calls), \
                f"Budget(calls={limit}): {watch.calls} calls were made, {booked} booked"
            _stopped(prompt, "calls", limit)

    def check_keeps_budget_of_tokens(self) -> None:
        watch = self.watch()
        needs(isinstance(getattr(watch.model, "tokens", None), int), "the model counts no tokens")
        prompt = self.use(watch, budget=Budget(tokens=3000))
        assert watch.model.tokens <= 3000, f"Budget(tokens=3000): {watch.model.tokens} tokens were used"
        _stopped(prompt, "tokens", 3000)

    def check_keeps_budget_of_seconds(self) -> None:
        self.first(self.watch)  # which imports whatever is needed
        began = time.monotonic()
        prompt = self.use(self.watch(lambda _, calls: time.sleep(0.002 * max(1, calls))), budget=Budget(seconds=0.3))
        took = time.monotonic() - began
        assert took < 5, f"Budget(seconds=0.3): took {took:.1f} s"
        _stopped(prompt, "seconds", 0.3)

    def check_resumes_after_a_kill(self) -> None:
        """Killed early, half-way and late: what is on disk leads to the same result, for less."""
        for fraction in (0.15, 0.5, 0.85):
            self._resume(fraction, KeyboardInterrupt)

    def check_resumes_after_a_failure_of_the_model(self) -> None:
        self._resume(0.5, EndpointError)

    def _resume(self, fraction: float, kind: type[BaseException]) -> None:
        whole = self.first(self.watch)
        expected, requests = self.compared(whole.result), whole.subject.requests
        last = min(max(1, int(requests * fraction)), requests - 1)
        late = fraction >= 0.5 and requests >= 8
        with tempfile.TemporaryDirectory() as folder:
            state, copy = Path(folder) / "state", Path(folder) / "copy"

            def stop(request: int, calls: int) -> None:
                if request > last:
                    if state.exists() and not copy.exists():
                        shutil.copytree(state, copy)  # what is on disk now is all that kill -9 would leave
                    raise kind("stopped by the kit")

            with contextlib.suppress(kind):
                self.use(self.watch(stop), state_dir=state)
                raise AssertionError("swallows KeyboardInterrupt and the like: a search could not be stopped"
                                     if kind is KeyboardInterrupt else
                                     "swallows errors of the model: they look like a result")
            assert not late or any(p.is_file() for p in copy.rglob("*")), \
                f"no state on disk after {last} of {requests} requests: save it as the search goes on"
            for name, used in (("kill", copy), ("Ctrl-C", state)):
                watch = self.watch()
                result = self.compared(self.use(watch, state_dir=used))
                assert result == expected, (f"stopped by {name} at {fraction:.0%} and resumed, the result is {result}, "
                                            f"uninterrupted it is {expected}")
                assert not late or watch.requests < requests, \
                    f"stopped by {name} at {fraction:.0%}, the search began from the beginning"
            final = self.compared(self.use(self.watch(), state_dir=state))
            assert final == expected, f"called again when done, the result is {final}, it was {expected}"

    def check_refuses_the_state_of_another_search(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.use(self.watch(), state_dir=folder)
            assert any(p.is_file() for p in Path(folder).rglob("*")), "writes nothing into state_dir"
            assert_refused(lambda: self.use(self.watch(), state_dir=folder, seed=99),
                           "a state_dir of a search with another seed")

    def check_refuses_a_damaged_state(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.use(self.watch(), state_dir=folder)
            for path in [p for p in Path(folder).rglob("*") if p.is_file()]:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            assert_refused(lambda: self.use(self.watch(), state_dir=folder), "a state file cut in half")

    def check_test_examples_are_never_read(self) -> None:
        test = MagicMock(spec=Sequence, **{"__len__.return_value": 16})
        try:
            self.use(self.watch(), task=dataclasses.replace(self.task(), test=test))
        finally:
            assert not {call[0] for call in test.mock_calls} - {"__len__", "__bool__"}, "reads task.test"

    def check_refuses_bad_tasks(self) -> None:
        task = self.task()
        bad: dict[str, list[Example]] = {"a task without examples": []}
        if task.classes is not None:
            bad["a task of one class"] = [e for e in task.train if e.target == task.train[0].target]
            bad["a task with a target that is no class"] = [*task.train, Example(task.train[0].inputs, "no such class")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for what, train in bad.items():
                other = dataclasses.replace(task, train=train)
                assert_refused(functools.partial(self.use, self.watch(), task=other), what)


def _with_other_targets(task: Task, seed: int) -> Task:
    """``task`` with the target of every training and dev example drawn from all of theirs."""
    rng = random.Random(seed)
    # with replacement: a model that says the same to everything is right another number of times
    train, dev = ([Example(e.inputs, rng.choice(part).target) for e in part] for part in (task.train, task.dev))
    if train == list(task.train):  # the same target for all, or none: fewer examples are another task, too
        train = train[:max(1, len(train) // 2)]
    return dataclasses.replace(task, train=train, dev=dev)


def _stopped(prompt: Any, name: str, limit: float) -> None:
    reason = prompt.info.get("stopped")
    assert reason in (f"budget: {name}", "done"), f"Budget({name}={limit}): info['stopped'] is {reason!r}"


__all__ = ["PictureClassifier", "PromptKit", "Watch", "picture_task"]
