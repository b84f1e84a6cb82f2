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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf.budget import Budget, Cost, watched
from looseleaf.errors import EndpointError
from looseleaf.fingerprint import content_fingerprint
from looseleaf.plugin import Plugin
from looseleaf.prompts.optimizer import PromptOptimizer
from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Task
from looseleaf.testing.common import Kit, Skip, assert_unchanged, mixed_modes, same_random_state, snapshot
from looseleaf.testing.models import seeded

STOPPED = ("done", "budget: calls", "budget: tokens", "budget: seconds")


class PictureClassifier(nn.Module):
    """A small image classifier with random weights: (B, 8, 8) pictures -> (B, 2) logits. The same each time."""

    def __init__(self) -> None:
        super().__init__()
        seeded(self._build)

    def _build(self) -> None:
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.hidden, self.last = nn.Linear(4 * 36, 8), nn.Linear(8, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 8, 8) -> (B, 2)."""
        x = torch.relu(self.norm(self.first(pictures[:, None])))
        out: Tensor = self.last(torch.tanh(self.hidden(x.flatten(1))))
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


class _Killed(BaseException):
    """What a run in the kit is stopped with; not an Exception, so that no ``except Exception`` swallows it."""


class _Tripwire(Sequence[Example]):
    """Test examples nobody may look at."""

    def __init__(self) -> None:
        self.touched = False

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: Any) -> Any:
        self.touched = True
        raise IndexError("the test examples were read")

    def __iter__(self) -> Iterator[Example]:
        self.touched = True
        return iter(())


class Watch:
    """A model that counts what it is asked, and may be slow or fail.

    Args:
        model: who does the work.
        on_request: called with the number of each request before it is made; may raise.
        delay: seconds slept for each call.

    Attributes:
        model: to be given to the optimiser.
        requests: costly methods called, and torch modules inside the model called by themselves.
        calls: what the former cost, as declared by :func:`looseleaf.costs`.
        direct: requests of the latter kind, whose cost is not known.
        modules: torch modules of the model.
    """

    def __init__(self, model: Any, on_request: Callable[[int], None] | None = None, delay: float = 0.0) -> None:
        self.requests = self.calls = self.direct = 0
        self.on_request, self.delay, self._depth = on_request, delay, 0
        self.model = watched(model, self._around)
        inside = list(vars(model).values()) if hasattr(model, "__dict__") else []
        self.modules = [model] if isinstance(model, nn.Module) else [m for m in inside if isinstance(m, nn.Module)]
        for module in self.modules:  # a plain function, which a copy of the model would share
            module.register_forward_pre_hook(lambda *_: self._direct())

    def _request(self, calls: int) -> None:
        self.requests += 1
        if self.on_request is not None:
            self.on_request(self.requests)
        self.calls += calls
        if self.delay:
            time.sleep(self.delay * max(1, calls))

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

    def __init__(self, cls: type[Plugin], make: Callable[[], Any] | None = None, task: Callable[[], Task] | None = None,
                 model: Callable[[], Any] | None = None, calls: int = 600) -> None:
        super().__init__(cls, make)
        self._task, self._model, self.calls = task, model, calls

    def task(self) -> Task:
        """A new task."""
        self._need_toys()
        return (self._task or picture_task)()

    def model(self) -> Any:
        """A new model, in evaluation mode."""
        self._need_toys()
        model = (self._model or PictureClassifier)()
        return model.eval() if isinstance(model, nn.Module) else model

    def _need_toys(self) -> None:
        accepts = getattr(self.cls, "accepts", object)
        fits = self._model is not None or isinstance(PictureClassifier(), accepts)
        assert fits and (self._task is None) == (self._model is None), (
            f"conformance(): expected task= and model=, functions that make a small task and a {accepts.__name__}; got "
            f"{[name for name in ('task', 'model') if getattr(self, f'_{name}') is not None] or 'neither'}")

    def optimize(self, watch: Watch | None = None, budget: Budget | None = None, *, task: Task | None = None,
                 seed: int = 0, state_dir: Path | None = None) -> Any:
        """One search."""
        watch = Watch(self.model()) if watch is None else watch
        return self.make().optimize(self.task() if task is None else task, watch.model,
                                    budget=budget or Budget(calls=self.calls), seed=seed, state_dir=state_dir,
                                    progress=False)

    @functools.cached_property
    def _whole(self) -> tuple[Any, Watch, Budget]:
        """A search with nothing in its way, its model and its budget."""
        watch, budget = Watch(self.model()), Budget(calls=self.calls)
        return self.optimize(watch, budget), watch, budget

    @staticmethod
    def summary(prompt: Any) -> tuple[Any, ...]:
        """What two equal searches agree in."""
        return (prompt.fingerprint(), *(prompt.info.get(key) for key in ("fitness", "evaluations", "stopped")))

    # -- at work ------------------------------------------------------------------------------------------------------

    def check_is_at_work(self) -> None:
        """The model is asked, and another task gives another result."""
        prompt, watch, _ = self._whole
        assert isinstance(prompt, Prompt), f"optimize() returns a {type(prompt).__name__}, expected a looseleaf.Prompt"
        assert watch.requests > 0, "the model is never asked"
        # by chance one draw may change nothing
        others = (self.optimize(task=_with_other_targets(self.task(), n)) for n in range(3))
        assert any(self.summary(other)[:2] != self.summary(prompt)[:2] for other in others), \
            "other targets of the training examples give the same prompt and the same fitness: the task is ignored"

    def check_declares_the_model_it_accepts(self) -> None:
        accepts = getattr(self.cls, "accepts", None)
        assert isinstance(accepts, type) and accepts is not object, \
            "set the class attribute `accepts` to the type of model it is for"
        assert isinstance(self.model(), accepts), f"conformance() gives a model that is no {accepts.__name__}"
        _raises(lambda: self.make().optimize(self.task(), object(), budget=Budget(calls=8), progress=False),
                "a model that it does not accept", (TypeError, ValueError))

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def check_info_fields(self) -> None:
        info = self._whole[0].info
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
        self._evaluate(self._whole[0])

    def check_saved_and_loaded_prompt_predicts_the_same(self) -> None:
        prompt = self._whole[0]
        with tempfile.TemporaryDirectory() as folder:
            prompt.save(Path(folder) / "prompt.json")
            again = Prompt.load(Path(folder) / "prompt.json")
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

    # -- randomness and state -----------------------------------------------------------------------------------------

    def check_same_seed_same_result(self) -> None:
        results = []
        for noise in (1, 2):
            former = torch.get_rng_state(), np.random.get_state(), random.getstate()
            torch.manual_seed(noise)
            np.random.seed(noise)
            random.seed(noise)
            try:
                results.append(self.summary(self.optimize(seed=3)))
            finally:
                torch.set_rng_state(former[0])
                np.random.set_state(former[1])
                random.setstate(former[2])
        assert results[0] == results[1], f"the same seed gave {results[0]} and {results[1]}"

    def check_global_random_state_untouched(self) -> None:
        with same_random_state():
            self.optimize(seed=3)

    def check_model_left_as_it_was(self) -> None:
        """Values, gradients, hooks, each submodule's mode and each requires_grad; after a stop half-way, too."""
        if not self._whole[1].modules:
            raise Skip("the model has no torch module")
        for stop in (None, max(1, self._whole[1].requests // 2)):
            watch = Watch(self.model(), None if stop is None else _stopper(stop, _Killed))
            for module in watch.modules:
                mixed_modes(module).training = False  # somebody fine-tuned a part of it
            before = [snapshot(module) for module in watch.modules]
            grad = torch.is_grad_enabled()
            with contextlib.suppress(_Killed):
                self.optimize(watch)
            assert torch.is_grad_enabled() == grad, "gradients stay switched off"
            for one, module in zip(before, watch.modules, strict=True):
                assert_unchanged(one, module)

    # -- budgets ------------------------------------------------------------------------------------------------------

    def check_keeps_budget_of_calls(self) -> None:
        for limit in (1, 7, max(8, self.calls // 3)):
            watch, budget = Watch(self.model()), Budget(calls=limit)
            prompt, booked = self.optimize(watch, budget), budget.used["calls"]
            assert watch.calls <= limit, f"Budget(calls={limit}): {watch.calls} calls were made"
            assert booked <= limit and (booked >= watch.calls if watch.direct else booked == watch.calls), \
                f"Budget(calls={limit}): {watch.calls} calls were made, {booked} booked"
            _stopped(prompt, "calls", limit)

    def check_keeps_budget_of_tokens(self) -> None:
        if not isinstance(getattr(self.model(), "tokens", None), int):
            raise Skip("the model counts no tokens")
        watch = Watch(self.model())
        prompt = self.optimize(watch, Budget(tokens=3000))
        assert watch.model.tokens <= 3000, f"Budget(tokens=3000): {watch.model.tokens} tokens were used"
        _stopped(prompt, "tokens", 3000)

    def check_keeps_budget_of_seconds(self) -> None:
        watch, _ = Watch(self.model(), delay=0.002), self._whole  # which imports whatever is needed
        began = time.monotonic()
        prompt = self.optimize(watch, Budget(seconds=0.3))
        took = time.monotonic() - began
        assert took < 5, f"Budget(seconds=0.3): took {took:.1f} s"
        _stopped(prompt, "seconds", 0.3)

    # -- resuming -----------------------------------------------------------------------------------------------------

    def check_resumes_after_a_kill(self) -> None:
        """Killed early, half-way and late: what is on disk leads to the same result, for less."""
        for fraction in (0.15, 0.5, 0.85):
            self._resume(fraction, _Killed)

    def check_resumes_after_a_failure_of_the_model(self) -> None:
        self._resume(0.5, EndpointError)

    def _resume(self, fraction: float, kind: type[BaseException]) -> None:
        expected, whole = self.summary(self._whole[0]), self._whole[1]
        last = min(max(1, int(whole.requests * fraction)), whole.requests - 1)
        late = fraction >= 0.5 and whole.requests >= 8
        with tempfile.TemporaryDirectory() as folder:
            state, copy = Path(folder) / "state", Path(folder) / "copy"

            def keep() -> None:
                if state.exists() and not copy.exists():
                    shutil.copytree(state, copy)  # what is on disk now is all that kill -9 would leave

            try:
                self.optimize(Watch(self.model(), _stopper(last, kind, keep)), state_dir=state)
            except kind:
                pass
            else:
                raise AssertionError("swallows KeyboardInterrupt and the like: a search could not be stopped"
                                     if kind is _Killed else "swallows errors of the model: they look like a result")
            assert not late or any(p.is_file() for p in copy.rglob("*")), \
                f"no state on disk after {last} of {whole.requests} requests: save it as the search goes on"
            for name, used in (("kill", copy), ("Ctrl-C", state)):
                watch = Watch(self.model())
                result = self.summary(self.optimize(watch, state_dir=used))
                assert result == expected, (f"stopped by {name} at {fraction:.0%} and resumed, the result is {result}, "
                                            f"uninterrupted it is {expected}")
                assert not late or watch.requests < whole.requests, \
                    f"stopped by {name} at {fraction:.0%}, the search began from the beginning"
            final = self.summary(self.optimize(state_dir=state))
            assert final == expected, f"called again when done, the result is {final}, it was {expected}"

    def check_refuses_the_state_of_another_search(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.optimize(state_dir=Path(folder) / "state")
            assert any(p.is_file() for p in (Path(folder) / "state").rglob("*")), "writes nothing into state_dir"
            _raises(lambda: self.optimize(state_dir=Path(folder) / "state", seed=99),
                    "a state_dir of a search with another seed")

    def check_refuses_a_damaged_state(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state"
            self.optimize(state_dir=state)
            for path in [p for p in state.rglob("*") if p.is_file()]:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            _raises(lambda: self.optimize(state_dir=state), "a state file cut in half")

    # -- tasks --------------------------------------------------------------------------------------------------------

    def check_test_examples_are_never_read(self) -> None:
        wire = _Tripwire()
        try:
            self.optimize(task=dataclasses.replace(self.task(), test=wire))
        finally:
            assert not wire.touched, "reads task.test"

    def check_refuses_bad_tasks(self) -> None:
        task = self.task()
        bad: dict[str, list[Example]] = {"a task without examples": []}
        if task.classes is not None:
            bad["a task of one class"] = [e for e in task.train if e.target == task.train[0].target]
            bad["a task with a target that is no class"] = [
                *task.train, Example(task.train[0].inputs, "no such class")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for what, train in bad.items():
                _raises(functools.partial(self.optimize, task=dataclasses.replace(task, train=train)), what)


def _with_other_targets(task: Task, seed: int) -> Task:
    """``task`` with the target of every training and dev example drawn from all of theirs."""
    rng = random.Random(seed)

    def drawn(examples: Sequence[Example]) -> list[Example]:
        # with replacement: a model that says the same to everything is right another number of times
        return [Example(e.inputs, rng.choice(examples).target) for e in examples]

    train, dev = drawn(task.train), drawn(task.dev)
    if train == list(task.train):  # the same target for all, or none: fewer examples are another task, too
        train = train[:max(1, len(train) // 2)]
    return dataclasses.replace(task, train=train, dev=dev)


def _stopper(last: int, kind: type[BaseException], before: Callable[[], None] = lambda: None) -> Callable[[int], None]:
    """What fails every request after number ``last``."""
    def stop(request: int) -> None:
        if request > last:
            before()
            raise kind("stopped by the kit")
    return stop


def _stopped(prompt: Any, name: str, limit: float) -> None:
    reason = prompt.info.get("stopped")
    assert reason in (f"budget: {name}", "done"), f"Budget({name}={limit}): info['stopped'] is {reason!r}"


def _raises(action: Callable[[], Any], what: str, kinds: tuple[type[Exception], ...] = (ValueError,)) -> None:
    try:
        action()
    except kinds:
        return
    except Exception as error:
        raise AssertionError(f"{what}: expected {kinds[0].__name__}, got {type(error).__name__} ({error})") from None
    raise AssertionError(f"{what}: expected {kinds[0].__name__}, got nothing")


__all__ = ["PictureClassifier", "PromptKit", "Watch", "picture_task"]
