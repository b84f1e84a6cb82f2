"""What a language model answers, read as a layout, whatever it is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from looseleaf_layoutprompter.layout import Canvas, Layout
from looseleaf_layoutprompter.serializer import Output

_PIXELS = r"(-?\d+(?:\.\d+)?)"
_SIDES = ("left", "top", "width", "height")


class Parsed(NamedTuple):
    """A layout, or why an answer is none.

    Attributes:
        layout: None where there is none.
        problem: what is wrong with the answer; empty where nothing is.
    """

    layout: Layout | None
    problem: str = ""


class _Malformed(ValueError):
    pass


def parse(text: str, canvas: Canvas, labels: Sequence[str], output: Output = "html", *, index: bool = True) -> Parsed:
    """Read an answer; never raises.

    An answer is dropped where an element lacks a number, or its label is not among ``labels``. Ours: what follows the
    first layout is left out; negative and decimal pixels are read; numbers outside the canvas are clipped; the first
    element is taken for the canvas only where it is called so.

    Args:
        text: what the model generated.
        canvas, labels: of the layouts.
        output: how the layout should be written, see :class:`LayoutSerializer`.
        index: whether elements of a sequence should be numbered.
    """
    read = {"html": _read_html, "seq": _read_sequence, "json": _read_json}[output]
    try:
        names, numbers = read(text, tuple(labels), index)
        if not names:
            raise _Malformed("no elements")
        unknown = [name for name in names if name not in labels]
        if unknown:
            raise _Malformed(f"unknown label {unknown[0][:40]!r}")
        values = np.asarray(numbers, dtype=float)
        if not np.isfinite(values).all():
            raise _Malformed("a number that is not finite")
        return Parsed(Layout.from_pixels(names, values, canvas))
    except _Malformed as error:
        return Parsed(None, str(error))
    except (ValueError, OverflowError, RecursionError) as error:
        return Parsed(None, f"unreadable: {error}"[:200])


Elements = tuple[list[str], "list[list[float]]"]


def _read_html(text: str, labels: Sequence[str], index: bool) -> Elements:
    text = text.partition("</html>")[0]
    names = re.findall(r'<div class="(.*?)"', text)
    columns = [re.findall(rf"\b{side}: ?{_PIXELS}px", text) for side in _SIDES]
    if len({len(names), *map(len, columns)}) > 1:
        raise _Malformed(f"{len(names)} elements with " + ", ".join(
            f"{len(column)} numbers for {side}" for side, column in zip(_SIDES, columns, strict=True)))
    begin = int(names[:1] == ["canvas"])
    return names[begin:], [[float(v) for v in row] for row in zip(*columns, strict=True)][begin:]


def _read_sequence(text: str, labels: Sequence[str], index: bool) -> Elements:
    line = next((line for line in text.splitlines() if line.strip()), "").replace("|", " | ")
    known = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    element = re.compile(rf"(?<!\S)({known})" + r"\s+\d+" * index + rf"\s+{_PIXELS}" * 4 + r"(?!\S)")
    rest = element.sub("", line).replace("|", " ").split()
    if rest:
        raise _Malformed(f"no element of this form: {' '.join(rest)[:60]!r}")
    found = element.findall(line)
    return [row[0] for row in found], [[float(v) for v in row[1:]] for row in found]


def _read_json(text: str, labels: Sequence[str], index: bool) -> Elements:
    begin = text.find("{")
    if begin < 0:
        raise _Malformed("no JSON object")
    try:
        data, _ = json.JSONDecoder().raw_decode(text[begin:])
    except json.JSONDecodeError as error:
        raise _Malformed(f"no JSON object: {error}") from None
    elements = data.get("elements")
    if not isinstance(elements, list) or not all(isinstance(e, dict) for e in elements):
        raise _Malformed("no list of elements")
    for element in elements:
        for side in _SIDES:
            if isinstance(element.get(side), bool) or not isinstance(element.get(side), (int, float)):
                raise _Malformed(f"an element with {side} {element.get(side)!r:.40}")
    return [str(e.get("type")) for e in elements], [[float(e[side]) for side in _SIDES] for e in elements]


def layout_schema(canvas: Canvas, labels: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of layouts as ``output="json"`` writes them."""
    limits = dict(zip(_SIDES, map(int, canvas.scale), strict=True))
    sides = {side: {"type": "integer", "minimum": 0, "maximum": limit} for side, limit in limits.items()}
    return {"type": "object", "properties": {"elements": {"type": "array", "minItems": 1, "items": {
        "type": "object", "properties": {"type": {"type": "string", "enum": list(labels)}, **sides},
        "required": ["type", *_SIDES], "additionalProperties": False}}},
        "required": ["elements"], "additionalProperties": False}
