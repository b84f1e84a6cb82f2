"""Constraints and layouts as text (section 3.1 of the paper), and the prompt made of them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from looseleaf import Example
from looseleaf.plugin import check_fields
from looseleaf.prompts.prompt import storable
from looseleaf_layoutprompter.layout import (
    PLACES,
    SIZES,
    Canvas,
    Layout,
    TaskName,
    arranged,
    check_labels,
    checked_boxes,
    floored,
    relations,
)

Output = Literal["html", "seq", "json"]
PREAMBLE = ("Please generate a layout based on the given information. You need to ensure that the generated layout "
            "looks realistic, with elements well aligned and avoiding unnecessary overlap.")
DESCRIPTIONS = {
    "gent": "generation conditioned on given element types",
    "gents": "generation conditioned on given element types and sizes",
    "genr": ("generation conditioned on given element relationships\n'A left B' means that A is to the left of B. "
             "'A right B' means that A is to the right of B. 'A top B' means that A is above B. 'A bottom B' means "
             "that A is below B. 'A center B' means that A and B overlap or, for the canvas, that A is in its middle "
             "third. 'A smaller B' means that the area of A is smaller than that of B. 'A larger B' means that the "
             "area of A is larger than that of B. 'A equal B' means that their areas are about equal."),
    "completion": "layout completion",
    "refinement": "layout refinement",
    "content": ("content-aware layout generation\nPlease place the following elements to avoid salient content, and "
                "underlay must be the background of text or logo."),
    "text": ("text-to-layout\nThere are these optional element types: {labels}. Please do not exceed the boundaries of "
             "the canvas. Besides, do not generate elements at the edge of the canvas, that is, reduce top: 0px and "
             "left: 0px predictions as much as possible."),
}
"""What is asked for; worded by us after the paper's, ``{labels}`` is filled in."""
HEADS = {"gent": "Element Type Constraint", "gents": "Element Type and Size Constraint",
         "genr": "Element Type Constraint", "completion": "Partial Layout", "refinement": "Noise Layout",
         "content": "Element Type Constraint", "text": "Text"}
INPUTS = {"gent": ("labels",), "gents": ("labels", "sizes"), "genr": ("labels", "relations"),
          "completion": ("partial",), "refinement": ("noisy",), "content": ("labels", "saliency"), "text": ("text",)}
"""The inputs of an example of each task, see :func:`layout_example`."""


def layout_example(layout: Layout, task: TaskName = "gent", *, seed: int | str = 0, noise: float = 0.01,
                   fraction: float = 0.1, **inputs: Any) -> Example:
    """An example of a task made of a real layout: its constraint, and the layout as the target.

    What can be read off the layout is: the labels, sizes, relations, the first element, a noisy copy. An example to be
    answered needs no layout: write ``Example({"labels": ["title", "text"]})``, with the inputs of :data:`INPUTS`.

    Args:
        layout: the target; its elements are put in the order of the task.
        task: see :class:`LayoutSerializer`.
        seed: of the shuffling (``gents``), the relations drawn (``genr``) and the noise (``refinement``).
        noise: standard deviation of what is added to all numbers of a noisy layout, as a fraction of the canvas.
        fraction: of all relations, how many are drawn.
        inputs: what cannot be read off: ``saliency``, boxes as fractions, (M, 4), none to many; ``text``, and if there
            is one its ``embedding``.

    Raises:
        ValueError: an unknown task, or inputs that are missing or of another task.
    """
    if task not in INPUTS:
        raise ValueError(f"task: expected one of {', '.join(INPUTS)}, got {task!r}")
    rng = random.Random(f"{seed}")
    layout = arranged(layout, task, rng)
    read: dict[str, Any] = {"labels": layout.labels}
    if task == "gents":
        read["sizes"] = tuple(box[2:] for box in layout.boxes)
    elif task == "genr":
        read["relations"] = relations(layout, rng, fraction)
    elif task == "completion":
        read["partial"] = layout.take([0])
    elif task == "refinement":
        moved = [[v + rng.gauss(0, noise) for v in box] for box in layout.boxes]
        read["noisy"] = Layout(layout.labels, np.clip(moved, 0, 1).tolist())
    wanted = {*INPUTS[task], *(["embedding"] if task == "text" else [])}
    example = Example({name: value for name, value in {**read, **inputs}.items() if name in wanted or name in inputs},
                      layout)
    check_inputs(example.inputs, task, f"layout_example(task={task!r})")
    if set(example.inputs) - wanted:
        raise ValueError(f"layout_example(task={task!r}): expected the inputs {', '.join(sorted(wanted))}, got "
                         f"{', '.join(sorted(set(example.inputs) - wanted))} too")
    return example


def check_inputs(inputs: Mapping[str, Any], task: str, where: str) -> None:
    """Raise ValueError that begins with ``where`` unless a query of ``task`` can be made of ``inputs``."""
    missing = [name for name in INPUTS[task] if inputs.get(name) is None]
    if missing:
        raise ValueError(f"{where}: expected the input{'s' * (len(missing) > 1)} {' and '.join(missing)} of the task "
                         f"{task!r}, got {', '.join(map(repr, inputs)) or 'none'}")
    for name in ("partial", "noisy"):
        if name in INPUTS[task] and not isinstance(inputs[name], Layout):
            raise ValueError(f"{where}: {name}: expected a Layout, got {type(inputs[name]).__name__}")
    if task == "text" and (not isinstance(inputs["text"], str) or not inputs["text"].strip()):
        raise ValueError(f"{where}: text: expected words, got {inputs['text']!r}")
    if "labels" in INPUTS[task]:
        check_labels(inputs["labels"], f"{where}: labels")
    count = len(inputs.get("labels") or ())
    if task == "content":
        checked_boxes(inputs["saliency"], f"{where}: saliency")
    if task == "gents" and len(checked_boxes(inputs["sizes"], f"{where}: sizes", 2)) != count:
        raise ValueError(f"{where}: sizes: expected a width and height for each of {count} labels, got "
                         f"{len(inputs['sizes'])}")
    if task == "genr":
        for relation in inputs["relations"]:
            good = len(relation) == 3 and relation[0] in range(count) and relation[1] in (*SIZES, *PLACES) \
                and (relation[2] == "canvas" or relation[2] in range(count)) and relation[0] != relation[2]
            if not good:
                raise ValueError(f"{where}: relations: expected (place, one of {', '.join((*SIZES, *PLACES))}, another "
                                 f"place or 'canvas') with places from 0 to {count - 1}, got {relation!r}")


@storable
@dataclasses.dataclass(frozen=True)
class LayoutSerializer:
    """How constraints and layouts are written.

    Attributes:
        task: ``"gent"``: layouts from element types; ``"gents"``: from types and sizes; ``"genr"``: from types and
            relations; ``"completion"`` of a partial layout; ``"refinement"`` of a noisy one; ``"content"``: from types
            and salient parts of a picture; ``"text"``: from text.
        canvas: whose pixels are written.
        labels: all there are; the text task names them, and no other is accepted in an answer. Empty: any.
        output: how layouts are written: ``"html"``, ``"seq"``, or ``"json"`` (ours).
        input: how constraints are written.
        index: elements are numbered.
        separator: elements of a sequence are separated by a bar.
        unknown: numbers that are not given are written as ``<unk>``.
        description: of the task; empty: that of :data:`DESCRIPTIONS`.
    """

    task: TaskName = "gent"
    canvas: Canvas = dataclasses.field(default_factory=Canvas)
    labels: tuple[str, ...] = ()
    output: Output = "html"
    input: Literal["seq", "html"] = "seq"
    index: bool = True
    separator: bool = True
    unknown: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.labels:
            check_labels(self.labels, "LayoutSerializer.labels")
        object.__setattr__(self, "labels", tuple(self.labels))

    # -- the parts of a prompt ------------------------------------------------------------------------------------
    def preamble(self) -> str:
        """What comes first: the request, the task, the domain and the size of the canvas."""
        description = self.description or DESCRIPTIONS[self.task]
        return (f"{PREAMBLE}\nTask Description: {description.replace('{labels}', ', '.join(self.labels))}\n"
                f"Layout Domain: {self.canvas.domain} layout\nCanvas Size: canvas width is {self.canvas.width}px, "
                f"canvas height is {self.canvas.height}px")

    def constraint(self, inputs: Mapping[str, Any]) -> str:
        """The inputs of an example as text.

        Raises:
            ValueError: they are not those of the task, or a label is not among :attr:`labels`.
        """
        check_inputs(inputs, self.task, f"the example of the task {self.task!r}")
        if self.task == "text":
            return f"{HEADS['text']}: {' '.join(inputs['text'].split())}"  # a blank line would end it
        lines = []
        if self.task in ("completion", "refinement"):
            layout = inputs["partial" if self.task == "completion" else "noisy"]
            labels, numbers = layout.labels, [dict(zip(_NUMBERS, row, strict=True)) for row in
                                              layout.pixels(self.canvas).tolist()]
        else:
            order = sorted(range(len(inputs["labels"])), key=lambda n: inputs["labels"][n])
            labels, numbers = tuple(inputs["labels"][n] for n in order), [{} for _ in order]
            if self.task == "gents":
                sizes = floored(np.asarray(inputs["sizes"], dtype=float), self.canvas.scale[2:]).tolist()
                numbers = [dict(zip(_NUMBERS[2:], sizes[n], strict=True)) for n in order]
        self._known(labels)
        if self.task == "content":
            boxes = floored(checked_boxes(inputs["saliency"], "saliency"), self.canvas.scale).tolist()
            lines.append("Content Constraint: " + self._joined(
                [", ".join(f"{name} {value}px" for name, value in zip(_NUMBERS, box, strict=True)) for box in boxes]))
        lines.append(f"{HEADS[self.task]}: " + (self._html(labels, numbers) if self.input == "html" else self._sequence(
            labels, numbers)))
        if self.task == "genr" and inputs["relations"]:
            at = {n: place for place, n in enumerate(order)}
            shown: dict[int | str, str] = {"canvas": "canvas", **{n: self._named(labels, at[n]) for n in order}}
            lines.append("Element Relationship Constraint: " + self._joined(
                [f"{shown[b]} {relation} {shown[a]}" for b, relation, a in inputs["relations"]]))
        return "\n".join(lines)

    def layout(self, layout: Layout) -> str:
        """A layout as text, its elements in their order."""
        self._known(layout.labels)
        rows = [dict(zip(_NUMBERS, row, strict=True)) for row in layout.pixels(self.canvas).tolist()]
        if self.output == "json":
            return json.dumps({"elements": [{"type": label, **row} for label, row in
                                            zip(layout.labels, rows, strict=True)]})
        return self._html(layout.labels, rows) if self.output == "html" else self._sequence(layout.labels, rows)

    def exemplar(self, example: Example) -> str:
        """Constraint and layout of an example."""
        return f"{self.constraint(example.inputs)}\n{self.layout(example.target)}"

    def prompt(self, example: Example, exemplars: Sequence[Example], max_chars: int = 8000) -> str:
        """The whole prompt: exemplars are added in their order until it would exceed ``max_chars`` characters."""
        query = f"{self.constraint(example.inputs)}\n"
        parts = [self.preamble()]
        size = len(parts[0]) + 2 + len(query)
        for part in map(self.exemplar, exemplars):
            size += len(part) + 2
            if size > max_chars:
                break
            parts.append(part)
        return "\n\n".join([*parts, query])

    # -- elements ---------------------------------------------------------------------------------------------------
    def _known(self, labels: Sequence[str]) -> None:
        unknown = [label for label in labels if self.labels and label not in self.labels]
        if unknown:
            raise ValueError(f"expected labels among {', '.join(self.labels)}, got {unknown[0]!r}: rename it, or give "
                             "exemplars that have it")

    def _joined(self, parts: Sequence[str]) -> str:
        return (" | " if self.separator else " ").join(parts)

    def _named(self, labels: Sequence[str], n: int) -> str:
        return f"{labels[n]} {n}" if self.index else labels[n]

    def _numbers(self, row: Mapping[str, int]) -> dict[str, Any]:
        return {name: row.get(name, "<unk>") for name in _NUMBERS if name in row or self.unknown}

    def _sequence(self, labels: Sequence[str], rows: Sequence[Mapping[str, int]]) -> str:
        return self._joined([" ".join([self._named(labels, n), *map(str, self._numbers(row).values())])
                             for n, row in enumerate(rows)])

    def _html(self, labels: Sequence[str], rows: Sequence[Mapping[str, int]]) -> str:
        size = f"left: 0px; top: 0px; width: {self.canvas.width}px; height: {self.canvas.height}px"
        lines = ["<html>", "<body>", f'<div class="canvas" style="{size}"></div>']
        for n, (label, row) in enumerate(zip(labels, rows, strict=True)):
            style = [f"index: {n}"] if self.index else []
            style += [f"{name}: {value}px" for name, value in self._numbers(row).items()]
            lines.append(f'<div class="{label}" style="{"; ".join(style)}"></div>')
        return "\n".join([*lines, "</body>", "</html>"])


_NUMBERS = ("left", "top", "width", "height")
