"""The base of every plugin: a dataclass whose fields are the paper's hyper-parameters."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, ClassVar

from looseleaf.paper import Paper

KINDS = ("attention", "pruners", "prompts", "probes")
"""The four kinds of plugin; the entry-point group of a kind is ``looseleaf.<kind>``."""


@dataclasses.dataclass
class Plugin:
    """A method of a paper.

    Subclasses are dataclasses. Their fields carry the paper's names and defaults, and are checked when an
    instance is made: implement :meth:`validate` and call :meth:`check` in it.

    Class attributes:
        paper: the :class:`looseleaf.Paper`.
        kind: one of :data:`KINDS`; set by the interface, not by the plugin.
    """

    paper: ClassVar[Paper]
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for a parameter out of range. The base class has nothing to check."""

    def check(self, field: str, ok: bool, allowed: str) -> None:
        """Raise ValueError naming ``field``, its value and what is ``allowed`` unless ``ok``."""
        if not ok:
            value = getattr(self, field)
            raise ValueError(f"{type(self).__name__}.{field}={value!r}: allowed is {allowed}")

    def parameters(self) -> dict[str, Any]:
        """The hyper-parameters as a dictionary of field name to value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def kit(cls) -> dict[str, Any]:
        """What the conformance kit should be given where its defaults will not do: its keyword arguments by name."""
        return {}

    @classmethod
    def parameter_info(cls) -> list[ParameterInfo]:
        """Name, type, default and help of every hyper-parameter, help taken from the class docstring."""
        hints = typing.get_type_hints(cls)
        helps = docstring_arguments(cls.__doc__ or "")
        out = []
        for f in dataclasses.fields(cls):
            if not f.init:
                continue
            default: Any = None if f.default is dataclasses.MISSING else f.default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            out.append(ParameterInfo(f.name, hints.get(f.name, Any), default, helps.get(f.name, "")))
        return out


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """One hyper-parameter as shown by ``looseleaf info``."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def type_name(self) -> str:
        """The type as a person writes it."""
        return self.type.__name__ if isinstance(self.type, type) else str(self.type).replace("typing.", "")


def docstring_arguments(doc: str) -> dict[str, str]:
    """The ``Args:`` (or ``Attributes:``) section of a Google-style docstring as name -> text."""
    out: dict[str, str] = {}
    inside, indent, current = False, 0, ""
    for line in doc.splitlines():
        text = line.strip()
        if text in ("Args:", "Attributes:", "Parameters:"):
            inside, indent, current = True, 0, ""
            continue
        if not inside or not text:
            continue
        depth = len(line) - len(line.lstrip())
        indent = indent or depth
        if depth < indent:
            inside = False
            continue
        name, colon, rest = text.partition(":")
        if depth == indent and colon and name.split(" ")[0].isidentifier():
            current = name.split(" ")[0]
            out[current] = rest.strip()
        elif current:
            out[current] += " " + text
    return out
