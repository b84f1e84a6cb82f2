"""Layouts: labelled boxes on a canvas, how alike two are, how tidy one is, and how it looks."""

from __future__ import annotations

import dataclasses
import html
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np

from looseleaf.prompts.prompt import storable

Box: TypeAlias = tuple[float, float, float, float]
Relation: TypeAlias = "tuple[int, str, int | str]"
"""(place of B, relation, place of A or ``"canvas"``): B is ``smaller``, ``left``, ... than or of A."""
TaskName = Literal["gent", "gents", "genr", "completion", "refinement", "content", "text"]
SIZES, PLACES = ("smaller", "larger", "equal"), ("top", "bottom", "left", "right", "center")
BY_POSITION = ("completion", "text")
"""Tasks whose elements are in order of position alone; those of all others go by the name of their label, too."""
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6", "#79706e")


@storable
@dataclasses.dataclass(frozen=True)
class Canvas:
    """What layouts are made on.

    Attributes:
        width, height: in pixels.
        domain: the word for its layouts in the prompt.
    """

    width: int = 120
    height: int = 160
    domain: str = "document"

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Canvas.{name}: expected an integer >= 1 in pixels, got {value!r}")

    @property
    def scale(self) -> np.ndarray:
        """(4,): what fractions are multiplied by to get pixels."""
        return np.array([self.width, self.height, self.width, self.height], dtype=float)


CANVASES = {"rico": Canvas(90, 160, "android"), "publaynet": Canvas(120, 160, "document"),
            "posterlayout": Canvas(102, 150, "poster"), "webui": Canvas(120, 120, "web")}
"""Those of the paper, by the name of the data set."""


@storable
@dataclasses.dataclass(frozen=True)
class Layout:
    """Labelled boxes.

    Attributes:
        labels: one of each element; any words without quotes, ``<``, ``>``, ``|`` or line ends.
        boxes: (N, 4) left, top, width and height as fractions of the canvas.

    Raises:
        ValueError: no elements, another number of boxes than labels, numbers that are NaN or outside [0, 1].
    """

    labels: tuple[str, ...]
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        rows = checked_boxes(self.boxes, "Layout.boxes")
        check_labels(self.labels, "Layout.labels")
        if len(rows) != len(self.labels):
            raise ValueError(f"Layout.boxes: expected a box for each of {len(self.labels)} labels, got {len(rows)}")
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "boxes", tuple(map(tuple, rows.tolist())))

    @classmethod
    def from_pixels(cls, labels: Sequence[str], boxes: Any, canvas: Canvas) -> Layout:
        """One whose ``boxes`` are in pixels; what lies outside the canvas is clipped, number by number.

        Raises:
            ValueError: as for the class.
        """
        rows = np.asarray(boxes, dtype=float).reshape(-1, 4) / canvas.scale
        return cls(tuple(labels), np.clip(rows, 0, 1).tolist())

    @property
    def array(self) -> np.ndarray:
        """The boxes, float64 (N, 4)."""
        return np.array(self.boxes, dtype=float).reshape(-1, 4)

    def pixels(self, canvas: Canvas) -> np.ndarray:
        """The boxes in whole pixels, int64 (N, 4), rounded down."""
        return floored(self.array, canvas.scale)

    def take(self, places: Sequence[int]) -> Layout:
        """The elements at ``places``, in their order."""
        return Layout(tuple(self.labels[n] for n in places), tuple(self.boxes[n] for n in places))

    def __len__(self) -> int:
        return len(self.labels)


def floored(fractions: Any, scale: Any) -> np.ndarray:
    """Fractions in whole pixels, rounded down; what is a whole number up to rounding error stays that number."""
    return np.floor(np.asarray(fractions, dtype=float) * scale + 1e-9).astype(int)


def checked_boxes(boxes: Any, where: str, columns: int = 4) -> np.ndarray:
    """``boxes`` as float64 (N, columns).

    Raises:
        ValueError: they begin with ``where``: another shape, NaN, or numbers outside [0, 1].
    """
    try:
        rows = np.asarray(boxes, dtype=float)
        rows = rows.reshape(-1, columns) if rows.size == 0 else rows
    except (TypeError, ValueError):
        rows = np.zeros(0)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"{where}: expected {columns} numbers for each element, got {boxes!r:.100}")
    for n, row in enumerate(rows):
        if not (np.isfinite(row).all() and (row >= -1e-6).all() and (row <= 1 + 1e-6).all()):
            raise ValueError(f"{where}: expected fractions of the canvas in [0, 1], got {row.tolist()} for element "
                             f"{n}: divide pixels by the canvas (Layout.from_pixels), or clip them")
    return np.clip(rows, 0, 1)


def check_labels(labels: Any, where: str) -> None:
    """Raise ValueError that begins with ``where`` unless these are labels, one or more, that a prompt can show."""
    if isinstance(labels, str) or not len(labels):
        raise ValueError(f"{where}: expected one label or more, got {labels!r}")
    for label in labels:
        if not isinstance(label, str) or label.strip() != label or not label or set(label) & set('"<>|\n\r') \
                or label == "canvas":
            raise ValueError(f"{where}: expected words without quotes, <, >, | and line ends, other than 'canvas', "
                             f"got {label!r}: rename the label")


# ------------------------------------------------------------------------------------------- elements and relations
def arranged(layout: Layout, task: str, rng: random.Random) -> Layout:
    """The elements in the order of a task: by (top, left), then by name; sizes: shuffled, then by name."""
    places = sorted(range(len(layout)), key=lambda n: (layout.boxes[n][1], layout.boxes[n][0]))
    if task == "gents":
        rng.shuffle(places)
    if task not in BY_POSITION:
        places.sort(key=lambda n: layout.labels[n])
    return layout.take(places)


def size_relation(b: Box, a: Box) -> str:
    """B is smaller, larger or equal: its area is at most 0.9, at least 1.1 times that of A, or between."""
    of_b, of_a = b[2] * b[3], a[2] * a[3]
    return "smaller" if of_b <= 0.9 * of_a else "larger" if of_b >= 1.1 * of_a else "equal"


def place_relation(b: Box, a: Box | None) -> str:
    """Where B is as seen from A; from the canvas (None) in which third of its height the centre of B is."""
    if a is None:
        middle = b[1] + b[3] / 2
        return "top" if middle < 1 / 3 else "center" if middle < 2 / 3 else "bottom"
    slack = 1e-9  # of fractions that are whole pixels
    if b[1] + b[3] <= a[1] + slack:
        return "top"
    if b[1] + slack >= a[1] + a[3]:
        return "bottom"
    return "left" if b[0] + b[2] <= a[0] + slack else "right" if b[0] + slack >= a[0] + a[2] else "center"


def relations(layout: Layout, rng: random.Random, fraction: float = 0.1) -> tuple[Relation, ...]:
    """A random ``fraction`` of all relations of size and place between elements, and of elements to the canvas.

    Of two elements, A is the one that comes first and B the other (ours: the paper does not say).
    """
    pairs = list(combinations([-1, *range(len(layout))], 2))  # -1: the canvas
    every = [(kind, a, b) for kind in ("size", "place") for a, b in pairs]
    out: list[Relation] = []
    for kind, a, b in sorted(rng.sample(every, int(fraction * len(every))), key=lambda r: (r[1], r[2], r[0])):
        first = None if a < 0 else layout.boxes[a]
        relation = size_relation(layout.boxes[b], first or (0.0, 0.0, 1.0, 1.0)) if kind == "size" else \
            place_relation(layout.boxes[b], first)
        out.append((b, relation, "canvas" if a < 0 else a))
    return tuple(out)


def saliency_boxes(saliency: Any, *, threshold: int = 100, side: int = 80, area: int = 6000) -> tuple[Box, ...]:
    """The salient parts of a picture as boxes, sorted by (top, left).

    Args:
        saliency: (height, width) numbers in [0, 255].
        threshold: what is above it is salient.
        side, area: in pixels; boxes with both sides at most ``side`` or less than ``area`` are left out.

    Returns:
        Fractions of the picture.
    """
    from scipy import ndimage

    values = np.asarray(saliency)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"saliency: expected numbers of shape (height, width), got shape {values.shape}")
    # the outer contours alone: what lies in a hole of another part belongs to it
    parts, _ = ndimage.label(ndimage.binary_fill_holes(values > threshold), structure=np.ones((3, 3)))
    height, width = values.shape
    out = []
    for rows, columns in ndimage.find_objects(parts):
        h, w = rows.stop - rows.start, columns.stop - columns.start
        if max(h, w) > side and h * w >= area:
            out.append((columns.start / width, rows.start / height, w / width, h / height))
    return tuple(sorted(out, key=lambda box: (box[1], box[0])))


# ------------------------------------------------------------------------------------------------------ likeness
def label_similarity(a: Sequence[str], b: Sequence[str]) -> float:
    """Twice the size of the intersection of two multisets over the sum of their sizes, in [0, 1]."""
    return 2 * _common(a, b) / (len(a) + len(b))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def box_similarity(labels_a: Sequence[str], boxes_a: Any, labels_b: Sequence[str], boxes_b: Any) -> float:
    """Sum of ``2 ** (-2 d)`` over the best matching of boxes, over the smaller number of them, in [0, 1].

    Args:
        labels_a, labels_b: boxes of different labels add 0.
        boxes_a, boxes_b: (N, columns) and (M, columns); d is the Euclidean distance of rows.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = np.asarray(boxes_a, dtype=float), np.asarray(boxes_b, dtype=float)
    alike = 0.25 ** np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    alike = alike * (np.asarray(labels_a, dtype=object)[:, None] == np.asarray(labels_b, dtype=object)[None])
    rows, columns = linear_sum_assignment(-alike)
    return float(alike[rows, columns].sum() / len(rows))


def likeness(a: Layout, b: Layout) -> float:
    """0.2 of the similarity of labels and 0.8 of that of boxes, in [0, 1]; the paper calls it mIoU, but it is none."""
    return 0.2 * label_similarity(a.labels, b.labels) + 0.8 * box_similarity(a.labels, a.array, b.labels, b.array)


def greatest_likeness(layout: Layout, others: Sequence[Layout]) -> float:
    """The greatest likeness of ``layout`` to one of the others, one or more."""
    bounds = []
    for n, other in enumerate(others):
        common = _common(layout.labels, other.labels)
        # boxes can at most be equal where labels are, so most others need no matching
        bounds.append((0.4 * common / (len(layout) + len(other)) + 0.8 * common / min(len(layout), len(other)), n))
    best = -math.inf
    for bound, n in sorted(bounds, reverse=True):
        if bound <= best:
            break
        best = max(best, likeness(layout, others[n]))
    return best


def coverage_similarity(a: Any, b: Any, canvas: Canvas) -> float:
    """(intersection + 1) / (union + 1) of what two sets of boxes cover, in pixels of the canvas."""
    masks = []
    for boxes in (a, b):
        mask = np.zeros((canvas.height, canvas.width), dtype=bool)
        for left, top, width, height in floored(np.asarray(boxes, dtype=float).reshape(-1, 4), canvas.scale):
            mask[top:top + height, left:left + width] = True
        masks.append(mask)
    return float((masks[0] & masks[1]).sum() + 1) / float((masks[0] | masks[1]).sum() + 1)


# ------------------------------------------------------------------------------------------------------- tidiness
def overlap(layout: Layout) -> float:
    """Mean over elements of the fraction of the element that others cover, summed over the others; lower is better.

    Elements without area are covered by nothing.
    """
    left, top, width, height = layout.array.T
    across = np.minimum.outer(left + width, left + width) - np.maximum.outer(left, left)
    down = np.minimum.outer(top + height, top + height) - np.maximum.outer(top, top)
    shared = np.clip(across, 0, None) * np.clip(down, 0, None)
    np.fill_diagonal(shared, 0)
    area = (width * height)[:, None]
    covered = np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)
    return float(covered.sum() / len(layout))


def alignment(layout: Layout) -> float:
    """Mean over elements of -log(1 - how far the nearest edge or centre line of another is off); lower is better.

    A single element has 0.
    """
    if len(layout) < 2:
        return 0.0
    left, top, width, height = layout.array.T
    lines = np.stack([left, left + width / 2, left + width, top, top + height / 2, top + height])
    off = np.abs(lines[:, :, None] - lines[:, None, :])
    off[:, np.arange(len(layout)), np.arange(len(layout))] = np.inf
    nearest = off.min((0, 2))
    nearest[nearest >= 1] = 0.0  # as the authors do: it is what they mark absent elements with
    return float(-np.log1p(-nearest).mean())


def type_violation(layout: Layout, labels: Sequence[str]) -> float:
    """The fraction of elements that are not what ``labels`` ask for, missing ones included, in [0, 1]."""
    return 1 - _common(layout.labels, labels) / max(len(layout), len(labels))


# -------------------------------------------------------------------------------------------------------- pictures
def draw(layouts: Layout | Sequence[Layout], canvas: Canvas | None = None, *, titles: Sequence[str] = (),
         labels: Sequence[str] | None = None, height: int = 320) -> str:
    """Layouts as an SVG picture, side by side.

    Args:
        layouts: one or more.
        canvas: whose proportions are drawn; None: those of a document.
        titles: of each.
        labels: in the order of the colours; None: those of the layouts.
        height: of one layout, in pixels.
    """
    drawn = [layouts] if isinstance(layouts, Layout) else list(layouts)
    if not drawn:
        raise ValueError("draw: expected one layout or more, got none")
    canvas = canvas or Canvas()
    names = list(labels) if labels is not None else sorted({label for layout in drawn for label in layout.labels})
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    width = height * canvas.width / canvas.height
    head = 20 if titles else 0
    parts = []
    for n, layout in enumerate(drawn):
        x = 10 + n * (width + 10)
        if n < len(titles):
            parts.append(f'<text x="{x:.1f}" y="20" font-size="12">{html.escape(titles[n])}</text>')
        parts.append(f'<svg x="{x:.1f}" y="{10 + head}" width="{width:.1f}" height="{height}">'
                     '<rect width="100%" height="100%" fill="white" stroke="#888"/>')
        # the large ones first, so that they hide nothing
        for label, (left, top, w, h) in sorted(zip(layout.labels, layout.boxes, strict=True),
                                               key=lambda element: -element[1][2] * element[1][3]):
            x0, y0, colour = left * width, top * height, colours.get(label, "#000")
            parts.append(f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{w * width:.1f}" height="{h * height:.1f}" '
                         f'fill="{colour}" fill-opacity="0.35" stroke="{colour}"/>'
                         f'<text x="{x0 + 2:.1f}" y="{y0 + 9:.1f}" font-size="9">{html.escape(label)}</text>')
        parts.append("</svg>")
    whole = 10 + len(drawn) * (width + 10)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" width="{whole:.0f}" '
            f'height="{height + head + 20}">' + "".join(parts) + "</svg>\n")
