"""The conformance kit for prompt optimisers, and a toy model and task to try one on without torch."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from looseleaf.errors import EndpointError
from looseleaf.paper import Paper
from looseleaf.budget import Budget
from looseleaf_text.model import LanguageModel
from looseleaf.prompts.optimizer import PromptOptimizer
from looseleaf_text.prompt import Prompt
from looseleaf_text.task import Example, Task
from looseleaf_text.testing import ToyLanguageModel, toy_task

STOPPED = ("done", "budget: calls", "budget: tokens", "budget: seconds")


def check_prompt_optimizer(cls: type, make: Callable[[], Any] | None = None, *, calls: int = 600) -> None:
    """Check that ``cls`` keeps the contract of :class:`looseleaf.PromptOptimizer` on a toy model and task.

    Args:
        cls: the plugin.
        make: makes an instance for the runs; None: ``cls()``. Defaults are always tried, too.
        calls: budget of the runs in model calls; more where a method needs more to get going.

    Raises:
        AssertionError: with everything that failed, one a line.
    """
    _Kit(cls, make or cls, calls).run()


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


class _WatchedTask(Task):
    """Its own validation may look at the test examples; nothing else may."""

    def validate(self, model: LanguageModel | None = None) -> None:
        kept, self.test = self.test, ()
        try:
            super().validate(model)
        finally:
            self.test = kept


class _Kit:
    def __init__(self, cls: type, make: Callable[[], Any], calls: int) -> None:
        self.cls, self.make, self.calls = cls, make, calls
        self.failures: list[str] = []

    def run(self) -> None:
        checks = [self.declares, self.validates, self.answers, self.is_deterministic, self.keeps_budgets,
                  self.resumes, self.refuses_bad_states, self.leaves_test_alone, self.refuses_bad_tasks]
        if not self.is_optimizer():
            checks = []
        for check in checks:
            try:
                check()
            except Exception as error:  # a crash of one check must not hide what the others find
                self.fail(f"{check.__name__.replace('_', ' ')}: {type(error).__name__}: {error}")
        if self.failures:
            raise AssertionError("\n".join(f"{self.cls.__name__}: {f}" for f in self.failures))

    def fail(self, text: str) -> None:
        self.failures.append(" ".join(text.split()))

    def want(self, ok: bool, text: str) -> bool:
        if not ok:
            self.fail(text)
        return bool(ok)

    def optimize(self, model: LanguageModel | None = None, budget: Budget | None = None, *, task: Task | None = None,
                 seed: int = 0, state_dir: Path | None = None) -> Prompt:
        return self.make().optimize(task or toy_task(), model or ToyLanguageModel(),
                                    budget or Budget(calls=self.calls), seed=seed, state_dir=state_dir,
                                    progress=False)

    # -- checks ---------------------------------------------------------------------------------------------------

    def is_optimizer(self) -> bool:
        if not (isinstance(self.cls, type) and issubclass(self.cls, PromptOptimizer)):
            self.fail("is not a subclass of looseleaf.PromptOptimizer")
            return False
        return self.want("__dataclass_params__" in vars(self.cls), "is not decorated with @dataclasses.dataclass")

    def declares(self) -> None:
        self.want(isinstance(getattr(self.cls, "paper", None), Paper), "has no paper: ClassVar[Paper]")
        # A dataclass without a docstring gets one that is its signature.
        doc = vars(self.cls).get("__doc__") or ""
        self.want(bool(doc) and not doc.startswith(f"{self.cls.__name__}("), "has no docstring")
        for info in self.cls.parameter_info():  # type: ignore[attr-defined]
            self.want(bool(info.help), f"the docstring's Args section says nothing about {info.name!r}")
        self.cls()

    def validates(self) -> None:
        made = self.cls()
        for field in dataclasses.fields(made):
            value = getattr(made, field.name, None)
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not field.init or not numeric or field.name == "seed":
                continue
            bad: list[Any] = [-10**9] if isinstance(value, int) else [-1e9, math.nan]
            for wrong in bad:
                try:
                    dataclasses.replace(made, **{field.name: wrong})
                except ValueError as error:
                    self.want(field.name in str(error), f"{field.name}={wrong!r}: the error does not name the field")
                else:
                    self.fail(f"{field.name}={wrong!r} is accepted; check it in validate()")

    def answers(self) -> None:
        model, budget = ToyLanguageModel(), Budget(calls=self.calls)
        prompt = self.optimize(model, budget)
        if not self.want(isinstance(prompt, Prompt), f"optimize() returned {type(prompt).__name__}, not a Prompt"):
            return
        info = prompt.info
        for key, kinds in (("fitness", (int, float)), ("evaluations", int), ("stopped", str)):
            self.want(isinstance(info.get(key), kinds), f"info[{key!r}] is {info.get(key)!r}")
        self.want(info.get("stopped") in STOPPED, f"info['stopped'] is {info.get('stopped')!r}, allowed are {STOPPED}")
        self.want(isinstance(info.get("evaluations"), int) and info["evaluations"] >= 1,
                  "info['evaluations'] must count the prompts that were tried")
        try:
            json.dumps(info)
        except TypeError as error:
            self.fail(f"info is not plain data: {error}")
        example = toy_task().dev[0]
        self.want(str(example.text) in prompt.render(example), "the example's text is not in the rendered prompt")
        with tempfile.TemporaryDirectory() as folder:
            prompt.save(Path(folder) / "prompt.json")
            again = Prompt.load(Path(folder) / "prompt.json")
        self.want(again.render(example) == prompt.render(example), "a prompt saved and loaded renders otherwise")

    def is_deterministic(self) -> None:
        results = []
        for noise in (1, 2):
            random.seed(noise)
            before = random.getstate()
            results.append(self.summary(self.optimize(seed=3)))
            self.want(random.getstate() == before, "uses or sets the global random generator; make your own from seed")
        self.want(results[0] == results[1], f"the same seed gave {results[0]} and {results[1]}")

    def keeps_budgets(self) -> None:
        for limit in (1, 7, max(8, self.calls // 3)):
            model, budget = ToyLanguageModel(), Budget(calls=limit)
            prompt = self.optimize(model, budget)
            self.want(model.calls <= limit, f"Budget(calls={limit}): {model.calls} calls were made")
            self.want(budget.used["calls"] == model.calls,
                      f"Budget(calls={limit}): {model.calls} calls were made, {budget.used['calls']} booked")
            self.want(prompt.info.get("stopped") in ("budget: calls", "done"),
                      f"Budget(calls={limit}): info['stopped'] is {prompt.info.get('stopped')!r}")
        model, budget = ToyLanguageModel(), Budget(tokens=3000)
        prompt = self.optimize(model, budget)
        self.want(model.tokens <= 3000, f"Budget(tokens=3000): {model.tokens} tokens were used")
        self.want(prompt.info.get("stopped") in ("budget: tokens", "done"),
                  f"Budget(tokens=3000): info['stopped'] is {prompt.info.get('stopped')!r}")
        began = time.monotonic()
        prompt = self.optimize(ToyLanguageModel(delay=0.002), Budget(seconds=0.3))
        took = time.monotonic() - began
        self.want(took < 5, f"Budget(seconds=0.3): took {took:.1f} s")
        self.want(prompt.info.get("stopped") in ("budget: seconds", "done"),
                  f"Budget(seconds=0.3): info['stopped'] is {prompt.info.get('stopped')!r}")

    def resumes(self) -> None:
        whole = ToyLanguageModel()
        expected = self.summary(self.optimize(whole))
        for share, kind in ((0.15, _Killed), (0.5, _Killed), (0.85, _Killed), (0.5, EndpointError)):
            kill = min(max(1, int(whole.requests * share)), whole.requests - 1)
            with tempfile.TemporaryDirectory() as folder:
                state, copy = Path(folder) / "state", Path(folder) / "copy"

                def stop(request: int, kill: int = kill, state: Path = state, copy: Path = copy,
                         kind: type[BaseException] = kind) -> None:
                    if request > kill:
                        if state.exists() and not copy.exists():
                            # What is on disk at this moment is all that kill -9 would leave.
                            shutil.copytree(state, copy)
                        raise kind("stopped by the kit")

                try:
                    self.optimize(ToyLanguageModel(on_request=stop), state_dir=state)
                except kind:
                    pass
                else:
                    self.fail("swallows KeyboardInterrupt and the like: a search could not be stopped"
                              if kind is _Killed else "swallows EndpointError: a dead server would look like a result")
                    continue
                found = list(copy.rglob("*.json")) if copy.exists() else []
                if share >= 0.5 and kill and not self.want(
                        bool(found), f"no state on disk after {kill} of {whole.requests} requests: save it as the "
                                     "search goes on"):
                    continue
                for name, folder_used in (("kill", copy), ("Ctrl-C", state)):
                    again = ToyLanguageModel()
                    got = self.summary(self.optimize(again, state_dir=folder_used))
                    self.want(got == expected, f"stopped by {name} at {share:.0%} and resumed, the result is {got}, "
                                               f"uninterrupted it is {expected}")
                    self.want(share < 0.5 or not kill or again.calls < whole.calls,
                              f"stopped by {name} at {share:.0%}, the search began from the beginning")
                final = self.summary(self.optimize(ToyLanguageModel(), state_dir=state))
                self.want(final == expected, f"called again when done, the result is {final}, it was {expected}")

    def refuses_bad_states(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state"
            self.optimize(state_dir=state)
            files = sorted(p for p in state.rglob("*") if p.is_file())
            if not self.want(bool(files), "writes nothing into state_dir"):
                return
            self.raises(lambda: self.optimize(state_dir=state, seed=99), "a state_dir of a search with another seed")
            for path in files:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            self.raises(lambda: self.optimize(state_dir=state), "a state file cut in half")

    def leaves_test_alone(self) -> None:
        source, wire = toy_task(), _Tripwire()
        task = _WatchedTask(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source)})
        task.test = wire
        try:
            self.optimize(task=task)
        finally:
            self.want(not wire.touched, "reads task.test")

    def refuses_bad_tasks(self) -> None:
        good = toy_task()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.raises(lambda: self.optimize(task=dataclasses.replace(good, train=[])), "a task without examples")
            one = [e for e in good.train if e.label == "positive"]
            self.raises(lambda: self.optimize(task=dataclasses.replace(good, train=one)), "a task of one class")
            self.raises(lambda: self.optimize(task=dataclasses.replace(good, labels={"positive": " positive"})),
                        "a task whose labels lack one of the examples'")

    # -- helpers --------------------------------------------------------------------------------------------------

    def raises(self, action: Callable[[], Any], what: str) -> None:
        try:
            action()
        except ValueError:
            return
        except Exception as error:
            self.fail(f"{what}: raised {type(error).__name__} ({error}), expected ValueError")
            return
        self.fail(f"{what}: nothing was raised, expected ValueError")

    def summary(self, prompt: Prompt) -> tuple[str, Any, Any, Any]:
        rendered = prompt.render(toy_task().dev[0])
        return rendered, prompt.info.get("fitness"), prompt.info.get("evaluations"), prompt.info.get("stopped")
