"""Name patterns of modules and parameters; they mean the same everywhere.

A pattern is a dotted path. ``*`` stands for any characters within one part of it, ``**`` for any number of parts, and
a pattern may begin at any depth: ``layers.*.mlp`` names the MLPs of a model and of the same model inside another, and
``q_proj`` every module of that name. A pattern that is the whole name of something names that alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache

_GLOBS = {"**.": r"(?:[^.]+\.)*", "**": r".+", "*": r"[^.]*", "?": r"[^.]"}
_TOKEN = re.compile(r"(?<![^.])\*\*(?:\.|$)|\[[^\]]+\]|.")


def match(names: Iterable[str], patterns: str | Sequence[str], *, what: str = "module") -> list[str]:
    """The names that match any of the patterns, in the order of ``names``.

    Args:
        names: dotted names.
        patterns: one pattern or several.
        what: what the names name, for the message.

    Raises:
        ValueError: no pattern, or one that matches nothing; near names are given.
    """
    known = list(names)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted or not all(isinstance(p, str) and p for p in wanted):
        raise ValueError("patterns: expected a name pattern such as 'layers.*.mlp' or a list of them, got "
                         f"{patterns!r}")
    found: set[str] = set()
    for pattern in wanted:
        hits = [pattern] if pattern in known else [name for name in known if matches(name, pattern)]
        if not hits:
            raise ValueError(f"no {what} matches {pattern!r}. Near names are {', '.join(near(pattern, known))}")
        found.update(hits)
    return [name for name in known if name in found]


def matches(name: str, pattern: str) -> bool:
    """Whether ``name``, or the end of it from some depth on, matches ``pattern``."""
    return _compiled(pattern).fullmatch(name) is not None


def near(pattern: str, names: Sequence[str], limit: int = 3) -> list[str]:
    """Names like ``pattern``, best first; the first names where none is like it."""
    plain = pattern.replace("*", "").strip(".")
    tails = {name.rpartition(".")[2]: name for name in reversed(names)}
    found = get_close_matches(plain, names, limit, 0.5) + [
        tails[tail] for tail in get_close_matches(plain.rpartition(".")[2], list(tails), limit, 0.6)]
    return list(dict.fromkeys(found))[:limit] or list(names[:limit])


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    regex = [_GLOBS.get(token) or (re.escape(token) if len(token) == 1 else token.replace("[!", "[^"))
             for token in _TOKEN.findall(pattern)]
    return re.compile(r"(?:.+\.)?" + "".join(regex))  # it may begin at any depth


__all__ = ["match", "matches", "near"]
