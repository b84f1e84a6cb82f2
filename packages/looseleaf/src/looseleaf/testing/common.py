"""What the kits of all kinds share: named checks, and what must be as it was afterwards."""

from __future__ import annotations

import dataclasses
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from looseleaf.paper import Paper
from looseleaf.plugin import Plugin


class Skip(Exception):
    """Raised by a check that has nothing to look at; the message says why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One named check of one plugin.

    Attributes:
        name: in words.
        function: raises AssertionError where the plugin fails, :class:`Skip` where there is nothing to check.
    """

    name: str
    function: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of a check: ``problem`` where it failed, ``skipped`` where it had nothing to look at."""

    name: str
    problem: str | None = None
    skipped: str | None = None


class Kit:
    """The checks of one kind. Every method ``check_some_words`` is the check "some words", in the order written.

    Args:
        cls: the plugin class.
        make: makes an instance whose method is at work on the kit's small inputs; None: ``cls``.
    """

    interface: ClassVar[type[Plugin]] = Plugin

    def __init__(self, cls: type[Plugin], make: Callable[[], Any] | None = None) -> None:
        self.cls = cls
        self.make: Callable[[], Any] = make or cls

    def checks(self) -> list[Check]:
        """All checks, those of every kind first."""
        names: dict[str, None] = {}
        for base in reversed(type(self).__mro__):
            names.update(dict.fromkeys(n for n in vars(base) if n.startswith("check_")))
        return [Check(name.removeprefix("check_").replace("_", " "), getattr(self, name)) for name in names]

    # ------------------------------------------------------------------ what does not depend on the kind
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
            if isinstance(value, bool) or value is None or not isinstance(value, (int, float, str)):
                continue
            bad: Any = "no such choice" if isinstance(value, str) else float("nan")
            try:
                dataclasses.replace(made, **{name: bad})
            except ValueError as error:
                assert name in str(error), f"the error for {name}={bad!r} does not name the field: {error}"
            except TypeError as error:
                raise AssertionError(f"{name}={bad!r} raises TypeError ({error}): declare its range with In") from None
            else:
                assert isinstance(value, str), f"{name}={bad!r} is accepted: declare its range with In"


def run(checks: list[Check]) -> list[Outcome]:
    """Run checks one after the other; an exception in one is a line of the result and does not hide the others."""
    out = []
    for check in checks:
        try:
            check.function()
        except Skip as reason:
            out.append(Outcome(check.name, skipped=str(reason)))
        except AssertionError as error:
            out.append(Outcome(check.name, problem=" ".join(str(error or "assertion failed").split())))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            out.append(Outcome(check.name, problem=" ".join(text.split())))
        else:
            out.append(Outcome(check.name))
    return out


# ---------------------------------------------------------------------- what must be as it was
def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that a plugin must leave as it was: values, objects, gradients, modes, hooks, classes."""
    return {
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in model.named_buffers()},
        "objects": [id(p) for p in model.parameters()],
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                  for n, m in model.named_modules()},
        "classes": {n: type(m).__name__ for n, m in model.named_modules()},
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    """AssertionError that says what of ``before``, a :func:`snapshot`, is another now."""
    now = snapshot(model)
    for what, old in before.items():
        new = now[what]
        if what in ("values", "buffers", "gradients"):
            assert list(old) == list(new), f"the {what} have other names or another order"
            for name, tensor in old.items():
                assert _equal(tensor, new[name]), f"the {what} of {name!r} have changed"
        elif isinstance(old, dict):
            assert list(old) == list(new), f"the {what} have other names or another order"
            odd = [name or "the model" for name in old if old[name] != new[name]]
            assert not odd, f"the {what} of {', '.join(odd[:3])} have changed"
        else:
            assert old == new, f"the {what} of the model have changed"


def _equal(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return torch.equal(one.nan_to_num(), two.nan_to_num()) and torch.equal(one.isnan(), two.isnan())


@contextmanager
def same_random_state() -> Iterator[None]:
    """AssertionError unless the global generators of torch, numpy and Python are left as they were."""
    torch_, numpy_, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    assert torch.equal(torch_, torch.get_rng_state()), "the global generator of torch was used or seeded"
    assert repr(numpy_) == repr(np.random.get_state()), "the global generator of numpy was used or seeded"
    assert python == random.getstate(), "the global generator of Python was used or seeded"


def mixed_modes(model: nn.Module) -> nn.Module:
    """``model`` in training mode with every other submodule in evaluation mode and every third parameter frozen.

    So does somebody's model look who fine-tunes a part of it: a plugin that puts back one mode for all is found out.
    """
    model.train()
    for n, module in enumerate(model.modules()):
        if n % 2:
            module.training = False
    for n, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(n % 3 != 2)
    return model


__all__ = ["Check", "Kit", "Outcome", "Skip", "assert_unchanged", "mixed_modes", "run", "same_random_state", "snapshot"]
