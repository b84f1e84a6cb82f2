"""The base of every plugin: a dataclass whose fields are the paper's hyper-parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from looseleaf.moved import refuse_former
from looseleaf.paper import Paper

KINDS = ("attention", "pruners", "prompts", "probes")
"""The four kinds of plugin; the entry-point group of a kind is ``looseleaf.<kind>``."""


class In:
    """The interval that a number must lie in, as an annotation of a field.

    ``gamma: Annotated[float, In("(0, 1]")] = 0.95`` is checked when the plugin is made, as is the type of the field:
    ``gamma: expected a number in (0, 1], got 3``. Fields that may be None and sequences of numbers work alike.

    Args:
        interval: such as ``"[0, 1)"``, ``">= 1"`` or ``"> 0"``; integers where the field is an ``int``.
        infinite: accept infinity, where the interval is open to it.
    """

    def __init__(self, interval: str, *, infinite: bool = False) -> None:
        self.text, self.infinite = interval, infinite
        one = re.fullmatch(r"(>=?)\s*(\S+)", interval)
        two = re.fullmatch(r"([\[(])\s*(\S+)\s*,\s*(\S+)\s*([\])])", interval)
        if one:
            self.low, self.high, self.low_in, self.high_in = float(one[2]), math.inf, one[1] == ">=", True
        elif two:
            self.low, self.high = float(two[2]), float(two[3])
            self.low_in, self.high_in = two[1] == "[", two[4] == "]"
        else:
            raise ValueError(f"interval: expected text such as '[0, 1)' or '>= 1', got {interval!r}")

    def __contains__(self, value: float) -> bool:
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return False
        return (self.low < value or (self.low_in and value == self.low)) and \
            (value < self.high or (self.high_in and value == self.high))

    def __str__(self) -> str:
        return self.text if self.text.startswith(">") else f"in {self.text}"


class OneOf:
    """The values that a field may have, as an annotation of it: ``Annotated[int, OneOf(16, 32, 64)]``."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __contains__(self, value: Any) -> bool:
        return any(value is v or (type(value) is type(v) and value == v) for v in self.values)

    def __str__(self) -> str:
        shown = [repr(v) for v in self.values]
        return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


@dataclasses.dataclass
class Plugin:
    """A method of a paper.

    Subclasses are dataclasses. Their fields carry the paper's names and defaults, and are checked when an instance is
    made: numbers against their declared range (:class:`In`), choices against ``Literal`` or :class:`OneOf`. What
    depends on several fields goes into :meth:`validate`.

    Class attributes:
        paper: the :class:`looseleaf.Paper`.
        kind: one of :data:`KINDS`; set by the interface, not by the plugin.
    """

    paper: ClassVar[Paper]
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_former(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for fields that do not go together; see :meth:`check`."""

    def check(self, field: str, ok: bool, expected: str) -> None:
        """Raise ValueError that names ``field``, what was ``expected`` and its value unless ``ok``."""
        if not ok:
            raise ValueError(f"{type(self).__name__}.{field}: expected {expected}, got {getattr(self, field)!r}")

    def hyperparameters(self) -> dict[str, Any]:
        """The hyper-parameters as a dictionary of field name to value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """What the conformance kit should be given where its defaults will not do, by name.

        ``make`` (all kinds) makes an instance whose method is at work on the kit's small inputs; the other names are
        those that :mod:`looseleaf.testing` documents for each kind.
        """
        return {}

    @classmethod
    def parameter_info(cls) -> list[ParameterInfo]:
        """Name, type, default and help of every hyper-parameter, help taken from the class docstring."""
        hints, helps = typing.get_type_hints(cls), docstring_arguments(cls.__doc__ or "")
        out = []
        for f in dataclasses.fields(cls):
            if f.init:
                made: Any = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
                default = None if made is dataclasses.MISSING else made
                hint = hints[f.name]
                type_name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                out.append(ParameterInfo(f.name, type_name, default, helps.get(f.name, "")))
        return out


def check_fields(instance: Any) -> None:
    """Raise ValueError for the first field of a dataclass whose value is not what its annotation asks for."""
    hints = _hints(instance.__class__)
    for field in dataclasses.fields(instance):
        if field.init and field.name in hints:
            problem = _problem(hints[field.name], getattr(instance, field.name))
            if problem is not None:
                raise ValueError(f"{type(instance).__name__}.{field.name}: expected {problem}, "
                                 f"got {getattr(instance, field.name)!r}")


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """One hyper-parameter as shown by ``looseleaf info``."""

    name: str
    type_name: str
    default: Any
    help: str


def docstring_arguments(doc: str) -> dict[str, str]:
    """The ``Args:`` (or ``Attributes:``) section of a Google-style docstring as name -> text."""
    from docstring_parser import google

    return {each.arg_name: " ".join((each.description or "").split()) for each in google.parse(doc).params}


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _problem(hint: Any, value: Any, limit: In | OneOf | None = None) -> str | None:
    """What a field of this type should have been, or None where ``value`` is it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _problem(arguments[0], value, next((e for e in arguments if isinstance(e, (In, OneOf))), None))
    if origin in (typing.Union, types.UnionType):
        problems = [_problem(option, value, limit) for option in arguments]
        words = list(dict.fromkeys(text for text in problems if text is not None))
        return " or ".join(sorted(words, key="None".__ne__)) if None not in problems else None
    if hint is type(None):
        return None if value is None else "None"
    if isinstance(limit, OneOf) or origin is Literal:
        allowed = limit if isinstance(limit, OneOf) else OneOf(*arguments)
        return None if value in allowed else str(allowed)
    within = f" {limit}" if limit is not None else ""
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real  # numpy's are numbers, too
        good = isinstance(value, number) and not isinstance(value, bool) and not math.isnan(value)
        if good and (limit is None or value in limit):
            return None
        return f"{'an integer' if hint is int else 'a number'}{within}"
    if origin in (tuple, list, Sequence) and limit is not None:
        plural = {int: "integers", float: "numbers"}.get(arguments[0], "values")
        good = isinstance(value, (tuple, list)) and all(_problem(arguments[0], v, limit) is None for v in value)
        return None if good else f"a sequence of {plural}{within}"
    return None  # other types are the plugin's own to check, in validate
