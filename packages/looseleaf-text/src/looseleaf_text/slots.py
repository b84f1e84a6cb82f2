"""Slots in a text: names in braces, filled without ``str.format``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")


def slots(template: str) -> list[str]:
    """The names in braces of ``template``, in order, each once: ``"{a} and {b}"`` has ``["a", "b"]``."""
    return list(dict.fromkeys(_SLOT.findall(template)))


def fill(template: str, inputs: Mapping[str, Any]) -> str:
    """``template`` with each ``{name}`` of ``inputs`` replaced; other braces stay as they are.

    Not ``str.format``: prompts hold JSON and code, and values that hold braces must not be filled again.
    """
    return _SLOT.sub(lambda match: str(inputs.get(match.group(1), match.group(0))), template)


def with_prefix(shown: str, answer_prefix: str) -> str:
    """``shown`` and then ``answer_prefix``, on a new line unless white space of its own stands between them."""
    between = "\n" if answer_prefix and not answer_prefix[0].isspace() and not shown[-1:].isspace() else ""
    return shown + between + answer_prefix
