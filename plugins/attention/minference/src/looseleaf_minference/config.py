"""Which head has which pattern: one file format of our own, and the one of the authors' code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looseleaf.errors import did_you_mean
from looseleaf.files import write_text

NAMES = ("a_shape", "vertical_slash", "block_sparse")
OFFICIAL_NAMES = {"stream_llm": "a_shape", "vertical_and_slash": "vertical_slash", "block_sparse": "block_sparse"}
OFFICIAL_BLOCKS = 100
"""The authors' code gives every block-sparse head 100 blocks, whatever its file says."""


@dataclass(frozen=True)
class Pattern:
    """The pattern of one head, in tokens (``block_sparse``: in blocks).

    Attributes:
        name: ``a_shape``, ``vertical_slash`` or ``block_sparse``.
        first: first keys that all queries see; or columns; or key blocks of each query block.
        second: the window; or diagonals; 0 for ``block_sparse``.
        score: what the search found, the smaller the better (in the authors' files it may be a recall); only kept.
    """

    name: str
    first: int
    second: int = 0
    score: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"pattern {self.name!r}: allowed is {', '.join(NAMES)}."
                             f"{did_you_mean(str(self.name), NAMES)}")
        smallest = {"a_shape": (0, 1), "vertical_slash": (0, 0), "block_sparse": (1, 0)}[self.name]
        for value, low in zip((self.first, self.second), smallest, strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"pattern {self.name} with {self.first!r} and {self.second!r}: allowed is whole "
                                 f"numbers from {smallest[0]} and {smallest[1]}")


Assignment = list[list[Pattern]]
"""``assignment[layer][head]``."""

CANDIDATES = (
    Pattern("a_shape", 100, 800), Pattern("vertical_slash", 30, 800), Pattern("vertical_slash", 100, 800),
    Pattern("vertical_slash", 100, 750), Pattern("vertical_slash", 500, 700), Pattern("vertical_slash", 3500, 100),
    Pattern("vertical_slash", 1000, 4096), Pattern("block_sparse", 100))
"""What the authors' search tries, all three patterns of the paper."""

VERTICAL_SLASH = tuple(p for p in CANDIDATES if p.name == "vertical_slash")
"""Those of them that are vertical-slash, the only pattern in the files that the authors publish.

The error of the search is that of all queries of a text. The few that look for something far away hardly count in it:
of equally costly patterns a window wins in heads that find things, and then the model no longer finds them. The indices
of a vertical-slash head come from the last queries, which write the answer, and make a window where the head is one.
The authors' search, too, turns every A-shape winner into a vertical-slash head.
"""

DEFAULT = Pattern("vertical_slash", 1000, 6096)
"""What the authors' code gives a head that no search has seen."""


def read(source: str | Path | Mapping[Any, Any] | Sequence[Any]) -> Assignment:
    """An assignment from a file, or from what such a file holds.

    Args:
        source: a path; ``{layer: {head: [pattern, n_v, n_s, score]}}``, the format of :func:`write`; or a list over
            layers of ``{head: [type, n_v, n_s, score]}``, the format of the authors' code. A list may also hold
            lists, of rows in our format or of :class:`Pattern`.

    Raises:
        ValueError: the first layer and head that cannot be read, and why.
    """
    where = ""
    if isinstance(source, (str, Path)):
        where = f"{source}: "
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"config={str(source)!r}: there is no such file. Make one with calibrate() and save(), or "
                             "leave config=None") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}is not JSON ({error})") from None
    if not isinstance(source, (Mapping, Sequence)) or not len(source):
        raise ValueError(f"{where}config is {type(source).__name__}, empty or of a wrong type: allowed is "
                         "{layer: {head: [pattern, n_v, n_s, score]}} or a list over layers of {head: [...]}")
    listed = not isinstance(source, Mapping)
    layers = _in_order(source, f"{where}config", "layer") if isinstance(source, Mapping) else list(source)
    assignment: Assignment = []
    for number, heads in enumerate(layers):
        place = f"{where}layer {number}"
        if not isinstance(heads, (Mapping, Sequence)) or isinstance(heads, str) or not len(heads):
            raise ValueError(f"{place} is {heads!r}: allowed is {{head: [pattern, n_v, n_s, score]}}")
        rows = _in_order(heads, place, "head") if isinstance(heads, Mapping) else list(heads)
        official = listed and isinstance(heads, Mapping)
        assignment.append([_pattern(row, f"{place}, head {h}", official) for h, row in enumerate(rows)])
    return assignment


def write(assignment: Assignment, path: str | Path) -> None:
    """Write ``{layer: {head: [pattern, first, second, score]}}`` as JSON, whole or not at all."""
    made = {str(layer): {str(h): [p.name, p.first, p.second, p.score] for h, p in enumerate(heads)}
            for layer, heads in enumerate(assignment)}
    write_text(path, json.dumps(made, indent=1) + "\n")


def _in_order(given: Mapping[Any, Any], place: str, what: str) -> list[Any]:
    """The values by the numbers 0, 1, 2 ... that are their keys."""
    numbered: dict[int, Any] = {}
    for key, value in given.items():
        try:
            numbered[int(key)] = value
        except (TypeError, ValueError):
            raise ValueError(f"{place} names {what} {key!r}: allowed is a number from 0") from None
    missing = [i for i in range(len(numbered)) if i not in numbered]
    if missing:
        raise ValueError(f"{place} has {len(numbered)} {what}s but no {what} {missing[0]}: allowed is all from 0")
    return [numbered[i] for i in range(len(numbered))]


def _pattern(row: Any, place: str, official: bool) -> Pattern:
    if isinstance(row, Pattern):
        return row
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (3, 4):
        raise ValueError(f"{place} is {row!r}: allowed is [pattern, n_v, n_s, score]")
    name, first, second, score = (*row, 0.0)[:4]
    known = {**OFFICIAL_NAMES, **{n: n for n in NAMES}}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{place} has the unknown pattern {name!r}: allowed is {', '.join(known)}."
                         f"{did_you_mean(str(name), known)}")
    name = known[name]
    if official and name == "block_sparse":
        first, second = OFFICIAL_BLOCKS, 0
    try:
        return Pattern(name, first, second, float(score))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
