"""What the kits of all kinds share: named checks, and those that every method must pass whatever it is for."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import random
import reprlib
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf.fingerprint import content_fingerprint
from looseleaf.modes import own_random_state
from looseleaf.paper import Paper
from looseleaf.plugin import Plugin


class Skip(Exception):
    """Raised by a check that has nothing to look at; the message says why."""


def needs(condition: Any, reason: str) -> None:
    """Skip the check for ``reason`` unless ``condition`` holds."""
    if not condition:
        raise Skip(reason)


@dataclasses.dataclass(frozen=True)
class Check:
    """One named check of one plugin; AssertionError where it fails, :class:`Skip` where there is nothing to check."""

    name: str
    function: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of a check: ``problem`` where it failed, ``skipped`` where it had nothing to look at."""

    name: str
    problem: str | None = None
    skipped: str | None = None


class Run(NamedTuple):
    """One use of a method: on what, its result, what was printed, and the calls of modules without children."""

    subject: Any
    result: Any
    printed: io.StringIO
    calls: list[None]


class Kit:
    """The checks of one kind. Every attribute ``check_some_words`` is the check "some words", in the order written.

    A check that takes ``build`` is repeated for each of :attr:`subjects`. Those without ``check_`` in their name are
    for kits to take over under a name of their own; what they work with, a kit says by :attr:`subjects`, :meth:`use`,
    :meth:`parts` and :meth:`compared`.

    Args:
        cls: the plugin class.
        make: makes an instance whose method is at work on the kit's small inputs; None: ``cls``.
    """

    interface: ClassVar[type[Plugin]] = Plugin
    subjects: Mapping[str, Callable[[], Any]] = {}
    """What the method is used on, by name: functions that make the same each time."""
    use: Callable[..., Any]
    """The result of the method on a subject."""
    refusals: ClassVar[tuple[type[Exception], ...]] = ()
    """What a method may raise for a model of which a part is frozen or in training mode."""

    def __init__(self, cls: type[Plugin], make: Callable[[], Any] | None = None) -> None:
        self.cls = cls
        self.make: Callable[[], Any] = make or cls

    def checks(self) -> list[Check]:
        """All checks, those of every kind first."""
        names = dict.fromkeys(n for base in reversed(type(self).__mro__) for n in vars(base) if n.startswith("check_"))
        return [Check(name.removeprefix("check_").replace("_", " "),
                      functools.partial(self._on_each_subject, getattr(self, name))) for name in names]

    def _on_each_subject(self, check: Callable[..., None]) -> None:
        if not inspect.signature(check).parameters:
            check()
            return
        for name, build in self.subjects.items():
            try:
                check(build)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}" if name else str(error)) from error

    def parts(self, subject: Any) -> Sequence[Any]:
        """The modules, and the mappings of tensors, that must be left as they were."""
        return subject if isinstance(subject, tuple) else [subject]

    def compared(self, result: Any) -> Mapping[str, Any]:
        """What two equal runs agree in, by name."""
        return dict(result)

    def check_is_a_dataclass_of_its_interface(self) -> None:
        cls: Any = self.cls
        assert isinstance(cls, type) and issubclass(cls, self.interface), \
            f"expected a subclass of {self.interface.__name__}"
        assert dataclasses.is_dataclass(cls) and "__dataclass_fields__" in cls.__dict__, \
            "decorate the class with @dataclasses.dataclass"
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        assert not missing, f"not implemented: {missing}"

    def check_constructs_with_defaults(self) -> None:
        self.cls()
        made = self.make()
        assert isinstance(made, self.cls), f"make() gives a {type(made).__name__}"

    def check_paper_metadata(self) -> None:
        paper = getattr(self.cls, "paper", None)
        assert isinstance(paper, Paper), "set the class attribute `paper` to a looseleaf.Paper"
        assert paper.summary, "Paper.summary is empty: say in one line what the method is good for"
        assert "@" in paper.bibtex()

    def check_docstring(self) -> None:
        cls = self.cls
        assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "the class has no docstring"
        missing = [p.name for p in cls.parameter_info() if not p.help]
        assert not missing, f"parameters without an entry in the docstring's Args section: {', '.join(missing)}"

    def check_parameters_are_validated(self) -> None:
        """A number that is not one, or a choice that does not exist, must raise ValueError that names the field."""
        made = self.make()
        for name, value in made.hyperparameters().items():
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                text = isinstance(value, str)  # which may also be free text
                bad: Any = "no such choice" if text else float("nan")
                assert_refused(functools.partial(dataclasses.replace, made, **{name: bad}), f"{name}={bad!r}",
                               names=name, remedy="declare its range with In", required=not text)

    def again(self, build: Callable[[], Any]) -> Run:
        """One run of the method with nothing in its way."""
        subject, printed = build(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), \
                self._calls(subject) as calls:
            return Run(subject, self.use(subject), printed, calls)

    first = functools.cache(again)
    """The first such run."""

    def same_result(self, build: Callable[[], Any]) -> None:
        """The same again, whatever the state of the global generators is."""
        one = self.compared(self.first(build).result)
        with own_random_state(12345):
            two = self.compared(self.again(build).result)
        for name in {**one, **two}:
            assert content_fingerprint(one.get(name)) == content_fingerprint(two.get(name)), \
                f"two runs differ in {name}: the same seed gave {reprlib.repr(one.get(name))} and " \
                f"{reprlib.repr(two.get(name))}: take randomness from an explicit seed only"

    def leaves_random_state(self, build: Callable[[], Any]) -> None:
        """The global generators are as they were."""
        self._use_within(same_random_state, build)

    def leaves_subject(self, build: Callable[[], Any]) -> None:
        """Values, modes of each submodule, what is frozen, gradients and hooks are as they were."""
        self._use_within(self.left_as_it_was, build)

    def leaves_subject_after_exception(self, build: Callable[[], Any]) -> None:
        """The same when the first call of a module, or one half-way, does not return."""
        calls = len(self.first(build).calls)
        needs(calls, "there is no model that is a torch module, or the method does not run it")
        for call in dict.fromkeys((1, (calls + 1) // 2)):
            subject = self.in_use(build)
            with self.left_as_it_was(subject), contextlib.suppress(KeyboardInterrupt, *self.refusals):
                with self._calls(subject, call):
                    self.use(subject)
                raise AssertionError("it goes on after KeyboardInterrupt: catch no more than Exception")

    def _use_within(self, guard: Callable[[Any], Any], build: Callable[[], Any]) -> None:
        for mixed in (True, False):
            subject = self.in_use(build, mixed)
            with guard(subject), contextlib.suppress(*self.refusals if mixed else ()):
                self.use(subject)
                return

    def in_use(self, build: Callable[[], Any], mixed: bool = True) -> Any:
        """A subject as somebody has it who trains a model: with gradients, a hook and mixed modes."""
        subject = build()
        for module in self._modules(subject):
            if mixed:
                mixed_modes(module)
            module.register_forward_hook(lambda *_: None)
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        return subject

    @contextlib.contextmanager
    def left_as_it_was(self, subject: Any) -> Iterator[None]:
        """AssertionError where a subject is another after the block."""
        parts, grad = self.parts(subject), torch.is_grad_enabled()
        needs(parts, "there is no model that is a torch module")
        before = [snapshot(part) for part in parts]
        yield
        assert torch.is_grad_enabled() == grad, "gradients stay switched on or off"
        for former, part in zip(before, parts, strict=True):
            assert_unchanged(former, part)

    def _modules(self, subject: Any) -> list[nn.Module]:
        return [part for part in self.parts(subject) if isinstance(part, nn.Module)]

    @contextlib.contextmanager
    def _calls(self, subject: Any, at: int | None = None) -> Iterator[list[None]]:
        """The calls of modules without children; number ``at``, counted from 1, does not return."""
        calls: list[None] = []

        def count(*_: Any) -> None:
            calls.append(None)
            if len(calls) == at:
                interrupt()

        with contextlib.ExitStack() as hooks:
            for leaf in (m for module in self._modules(subject) for m in module.modules() if not any(m.children())):
                hooks.enter_context(leaf.register_forward_hook(count))
            yield calls


def run(checks: list[Check]) -> list[Outcome]:
    """What comes out of each check; an exception in one does not hide the others."""
    out = []
    for check in checks:
        problem = skipped = None
        try:
            check.function()
        except Skip as reason:
            skipped = str(reason)
        except AssertionError as error:
            problem = str(error) or "assertion failed"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        out.append(Outcome(check.name, problem and " ".join(problem.split()), skipped))
    return out


def assert_refused(action: Callable[[], Any], what: str, kinds: tuple[type[Exception], ...] = (ValueError,), *,
                   names: str = "", remedy: str = "", required: bool = True) -> None:
    """AssertionError unless ``action`` raises one of ``kinds``, whose message has ``names`` in it.

    Args:
        what: what must be refused, in words.
        remedy: what the plugin's author should do.
        required: False: it may also be accepted.
    """
    try:
        action()
    except kinds as error:
        assert names in str(error), f"{what}: expected an error that says {names!r}, got: {error}"
    except Exception as error:
        raise AssertionError(f"{what}: expected {kinds[0].__name__}, got {type(error).__name__} ({error})"
                             f"{remedy and ': '}{remedy}") from None
    else:
        assert not required, f"{what} is accepted: {remedy}" if remedy else \
            f"{what}: expected {kinds[0].__name__}, got nothing"


def reloaded(save: Callable[[Path], Any], load: Callable[[Path], Any]) -> Any:
    """What ``load`` gives for a path, in a folder of its own, that ``save`` has written."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "saved")
        return load(Path(folder) / "saved")


# ---------------------------------------------------------------------- what must be as it was
def snapshot(model: nn.Module | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All that a plugin must leave as it was, by name: of a model values, gradients, modes, hooks and so on."""
    if not isinstance(model, nn.Module):
        return {"values": copy.deepcopy(dict(model))}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    return {
        "values": {n: p.detach().clone() for n, p in parameters.items()},
        "buffers": {n: b.detach().clone() for n, b in model.named_buffers()},
        "objects": {n: id(p) for n, p in parameters.items()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "requires_grad": {n: p.requires_grad for n, p in parameters.items()},
        "modes": {n: m.training for n, m in modules.items()},
        "hooks": {n: [len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
                  for n, m in modules.items()},
        "classes": {n: type(m).__name__ for n, m in modules.items()},
    }


def assert_unchanged(before: dict[str, dict[str, Any]], model: nn.Module | Mapping[str, Any]) -> None:
    """AssertionError that says what of ``before``, a :func:`snapshot`, is another now."""
    now = snapshot(model)
    for what, old in before.items():
        assert list(old) == list(now[what]), f"the {what} have other names or another order"
        odd = [repr(name) if name else "the model" for name in old if not _equal(old[name], now[what][name])]
        assert not odd, f"the {what} of {', '.join(odd[:3])} have changed"


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one.nan_to_num(), two.nan_to_num()) and torch.equal(one.isnan(), two.isnan())
    return bool(one == two)


def interrupt(*_: Any, **__: Any) -> None:
    """Raise KeyboardInterrupt, whatever this is called with: what must not be swallowed."""
    raise KeyboardInterrupt("by the kit")


@contextlib.contextmanager
def same_random_state(*_: Any) -> Iterator[None]:
    """AssertionError unless the global generators of torch, numpy and Python are left as they are."""
    states: dict[str, Any] = {"torch": torch.get_rng_state, "numpy": np.random.get_state, "Python": random.getstate}
    with own_random_state(12345):  # which no usual seed gives
        before = {name: content_fingerprint(get()) for name, get in states.items()}
        yield
        for name, get in states.items():
            assert content_fingerprint(get()) == before[name], f"the global generator of {name} was used or seeded"


def mixed_modes(model: nn.Module) -> nn.Module:
    """``model`` in training mode with every other submodule in evaluation mode and every third parameter frozen.

    So does somebody's model look who fine-tunes a part of it: a plugin that puts back one mode for all is found out.
    """
    model.train()
    for module in list(model.modules())[1::2]:
        module.training = False
    for n, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(n % 3 != 2)
    return model


__all__ = ["Check", "Kit", "Outcome", "Run", "Skip", "assert_refused", "assert_unchanged", "interrupt", "mixed_modes",
           "needs", "reloaded", "run", "same_random_state", "snapshot"]
