"""Docstrings as the site shows them: roles become links, and ``key, value: text`` becomes two entries."""

from __future__ import annotations

import pkgutil
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:meth|class|func|data|mod|attr|exc|obj):`~?([\w.]+)`")
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)$", re.M)


def identifier(name: str, beside: str) -> str:
    """Where the site has what a docstring of ``beside`` calls ``name``: names are looked up as Python does."""
    parts = beside.split(".")
    for n in range(len(parts), -1, -1):
        full = ".".join([*parts[:n], name])
        try:
            found: Any = pkgutil.resolve_name(full)
        except (ImportError, AttributeError, ValueError):
            continue
        if isinstance(found, type) or callable(found):
            return f"{found.__module__}.{found.__qualname__}" if hasattr(found, "__qualname__") else full
        return str(getattr(found, "__name__", full))
    return name


def shown(text: str, beside: str) -> str:
    """The docstring of the object ``beside`` with links, and one entry for each parameter."""
    text = SEVERAL.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
    link = '<autoref optional identifier="{}"><code>{}</code></autoref>'
    return ROLE.sub(lambda m: link.format(identifier(m[1], beside), m[1]), text)


class Docstrings(griffe.Extension):
    """Changes docstrings before they are parsed."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value, obj.path)
