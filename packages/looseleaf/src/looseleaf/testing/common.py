"""What the kits of all kinds check: construction, parameters, docstrings, paper."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from looseleaf.paper import Paper
from looseleaf.plugin import Plugin


class Findings:
    """Collects what failed, so that a plugin's author sees everything at once."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.failures: list[str] = []

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Run a check; an exception in it becomes one line of the result."""
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{name}: {error or 'assertion failed'}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.failures.append(f"{name}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")

    def finish(self) -> None:
        """Raise AssertionError with all failures, one a line."""
        if self.failures:
            lines = "\n".join(f"  - {' '.join(f.split())}" for f in self.failures)
            raise AssertionError(f"{self.subject} fails {len(self.failures)} conformance checks:\n{lines}")


def check_plugin(findings: Findings, cls: Any, base: type[Plugin], make: Callable[[], Any]) -> None:
    """Checks that do not depend on the kind."""
    plugin: Any = cls
    with findings.check("is a dataclass of its interface"):
        assert isinstance(cls, type) and issubclass(cls, base), f"allowed is a subclass of {base.__name__}"
        assert dataclasses.is_dataclass(cls) and "__dataclass_fields__" in cls.__dict__, \
            "decorate the class with @dataclasses.dataclass"
        assert not inspect.isabstract(cls) and not getattr(cls, "__abstractmethods__", None), \
            f"not implemented: {sorted(plugin.__abstractmethods__)}"
    with findings.check("constructs with defaults"):
        cls()
        assert isinstance(make(), cls), "make() gives another class"
    with findings.check("paper metadata"):
        paper = getattr(cls, "paper", None)
        assert isinstance(paper, Paper), "set the class attribute `paper` to a looseleaf.Paper"
        assert paper.summary, "Paper.summary is empty: say in one line what the method is good for"
        assert "@" in paper.bibtex()
    with findings.check("docstring"):
        assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "the class has no docstring"
        missing = [p.name for p in plugin.parameter_info() if not p.help]
        assert not missing, f"parameters without an entry in the docstring's Args section: {', '.join(missing)}"
    with findings.check("parameters are validated"):
        for name in make().parameters():
            _rejects_nonsense(make, name)


def _rejects_nonsense(make: Callable[[], Any], name: str) -> None:
    """A number that is not one, or a choice that does not exist, must raise ValueError that names the field."""
    value = getattr(make(), name)
    if isinstance(value, bool) or value is None or not isinstance(value, (int, float, str)):
        return
    nonsense: Any = "no such choice" if isinstance(value, str) else float("nan")
    try:
        dataclasses.replace(make(), **{name: nonsense})
    except ValueError as error:
        assert name in str(error), f"the error for {name}={nonsense!r} does not name the field: {error}"
        return
    except TypeError as error:
        raise AssertionError(f"{name}={nonsense!r} raises TypeError ({error}): use self.check") from None
    assert isinstance(value, str), f"{name}={nonsense!r} is accepted: check it in validate()"
