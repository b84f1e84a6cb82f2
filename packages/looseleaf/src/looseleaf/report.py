"""How results leave a plugin: tables, figures, images, arrays and claims, to console, JSON, HTML and notebooks."""

from __future__ import annotations

import base64
import html
import importlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, TypeVar

from looseleaf.files import read_text, write_text
from looseleaf.resume import as_plain

SCHEMA = "looseleaf.report/1"
Verdict = Literal["holds", "does not hold", "not shown at this scale"]
Cell = str | int | float | bool | None
T = TypeVar("T")


@dataclass
class Claim:
    """A statement of a paper next to what was measured here.

    Attributes:
        statement: what the paper says, in one sentence.
        source: where it says it (section, table, figure), or where this project says what "works" means.
        paper: the paper's own figure as text; figures that were not read in the paper end in ``[memory]``.
        measured: our figure as text, with interval, seeds and units.
        rule: the rule that decides, fixed before measuring.
        verdict: what it decided.
    """

    statement: str
    source: str
    paper: str
    measured: str
    rule: str
    verdict: Verdict

    @classmethod
    def decide(cls, holds: bool | None, **fields: str) -> Claim:
        """A claim with the verdict of ``holds`` (None: not shown at this scale)."""
        verdict: Verdict = "not shown at this scale" if holds is None else "holds" if holds else "does not hold"
        return cls(**fields, verdict=verdict)


@dataclass
class Table:
    """Rows under named columns. Cells are text, numbers or None (shown as a dash)."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: Cell) -> None:
        """Add a row of one cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"table {self.title!r}: expected {len(self.columns)} cells, as columns, got {len(cells)}")
        self.rows.append(list(cells))


@dataclass
class Series:
    """One line or set of points of a figure; ``low``/``high`` draw an interval around ``y``."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    style: Literal["line", "points", "both"] = "both"


@dataclass
class Figure:
    """A figure as data; drawn by the HTML report.

    Attributes:
        series: lines and points.
        image: a matrix for a heat map, rows top to bottom.
        panels: name -> matrix: small heat maps side by side, on one scale. Zero is drawn as empty.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    series: list[Series] = field(default_factory=list)
    image: list[list[float]] | None = None
    panels: dict[str, list[list[float]]] | None = None
    x_log: bool = False
    y_log: bool = False
    note: str = ""


@dataclass
class TokenStrip:
    """A text whose tokens are shaded by a value each (None: not shaded), and may be marked, as removed for instance."""

    title: str
    tokens: list[str]
    values: list[float | None]
    marked: list[bool]
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.values) == len(self.marked):
            raise ValueError(f"strip {self.title!r}: expected as many values and marks as tokens, got "
                             f"{len(self.tokens)} tokens, {len(self.values)} values and {len(self.marked)} marks")

    def text(self) -> str:
        """The text with marked tokens in double brackets."""
        runs = groupby(zip(self.tokens, self.marked, strict=True), key=itemgetter(1))
        texts = ((mark, "".join(token for token, _ in run)) for mark, run in runs)
        return "".join(f"[[{text}]]" if mark else text for mark, text in texts)


@dataclass
class Images:
    """Images side by side, each a PNG in base64, and as many captions (may be empty)."""

    title: str
    pngs: list[str]
    captions: list[str]
    note: str = ""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image in pixels."""
        return [struct.unpack(">II", base64.b64decode(data[:32])[16:24]) for data in self.pngs]  # type: ignore[misc]

    def text(self) -> str:
        """Title, captions and sizes."""
        shown = [f"{caption} {w} x {h}".strip() for caption, (w, h) in zip(self.captions, self.sizes, strict=True)]
        return f"[image] {self.title}: {', '.join(shown)} pixels" + (f"\n{self.note}" if self.note else "")


@dataclass
class Report:
    """What a run measured.

    Attributes:
        title: headline.
        facts: single values by name (seeds, versions, model, seconds ...).
        tables, figures, claims, strips, images: see the classes.
        arrays: name -> nested lists of numbers; raw data a reader may want to plot again.
        examples: texts worth reading, as (label, text).
    """

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    arrays: dict[str, list[Any]] = field(default_factory=dict)
    examples: list[tuple[str, str]] = field(default_factory=list)
    strips: list[TokenStrip] = field(default_factory=list)
    images: list[Images] = field(default_factory=list)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]] = (), note: str = "") -> Table:
        """Add a table and return it."""
        table = _added(self.tables, Table(title, list(columns), note=note))
        for row in rows:
            table.add(*row)
        return table

    def figure(self, title: str, **fields: Any) -> Figure:
        """Add a figure and return it."""
        return _added(self.figures, Figure(title, **fields))

    def strip(self, title: str, tokens: Sequence[str], values: Sequence[float | None], marked: Sequence[bool],
              note: str = "") -> TokenStrip:
        """Add a text with shaded tokens and return it; one value and one mark for each token."""
        return _added(self.strips, TokenStrip(title, list(tokens), list(values), list(marked), note))

    def image(self, title: str, array: Any, note: str = "", *, captions: Sequence[str] = ()) -> Images:
        """Add an image, or several side by side, and return them.

        Args:
            array: numpy array or tensor (H, W), (H, W, 3) or (H, W, 4), of floats in [0, 1], bool or uint8; or a list
                of them, of any sizes.
            captions: one for each image of a list.

        Raises:
            ValueError: another shape, type or range; or another number of captions.
        """
        arrays = list(array) if isinstance(array, (list, tuple)) else [array]
        if not arrays:
            raise ValueError(f"image {title!r}: expected one image or more, got none")
        if captions and len(captions) != len(arrays):
            raise ValueError(f"captions: expected one for each of {len(arrays)} images, got {len(captions)}")
        pngs = [base64.b64encode(png(a)).decode() for a in arrays]
        return _added(self.images, Images(title, pngs, list(captions) or [""] * len(arrays), note))

    def extend(self, other: Report, prefix: str = "") -> None:
        """Add everything of ``other``; titles and names get ``prefix``."""
        self.facts.update({prefix + k: v for k, v in other.facts.items()})
        for name in ("tables", "figures", "strips", "images"):
            getattr(self, name).extend(replace(item, title=prefix + item.title) for item in getattr(other, name))
        self.claims.extend(other.claims)
        self.arrays.update({prefix + k: v for k, v in other.arrays.items()})
        self.examples.extend((prefix + label, text) for label, text in other.examples)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; NaN and infinities become None so that any JSON reader takes it."""
        return {"schema": SCHEMA, **as_plain(asdict(self))}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, its images inside; also written to ``path``, atomically, when given."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report from plain data, of this version or an earlier one."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"a report's schema: expected {SCHEMA!r}, got {data.get('schema')!r}")
        lists: dict[str, type] = {"tables": Table, "figures": Figure, "claims": Claim, "strips": TokenStrip,
                                  "images": Images}
        report = cls(data["title"], facts=dict(data["facts"]), arrays=dict(data["arrays"]),
                     examples=[(label, text) for label, text in data["examples"]],
                     **{name: [kind(**entry) for entry in data.get(name, [])] for name, kind in lists.items()})
        for figure in report.figures:
            figure.series = [Series(**series) for series in figure.series]  # type: ignore[arg-type]
        return report

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(read_text(path))
        if not isinstance(data, dict):
            raise ValueError(f"{path}: expected a report, got {type(data).__name__}")
        return cls.from_dict(data)

    def to_text(self) -> str:
        """The report for a terminal, without colours."""
        facts = [f"{name}: {format_cell(value)}" for name, value in self.facts.items()]
        parts = ["\n".join([self.title, "=" * len(self.title), *facts])]
        parts += map(table_text, self.tables)
        parts += [f"[{c.verdict}] {c.statement}\n  source:   {c.source}\n  paper:    {c.paper}\n"
                  f"  measured: {c.measured}\n  rule:     {c.rule}" for c in self.claims]
        parts += [f"-- {s.title}\n{s.text()}" + (f"\n{s.note}" if s.note else "") for s in self.strips]
        parts += [images.text() for images in self.images]
        parts += [f"-- {label}\n{text}" for label, text in self.examples]
        return "\n\n".join(parts)

    __str__ = to_text

    def _repr_html_(self) -> str:
        """The report in a notebook, without anything outside it; the lab draws the figures where it is installed."""
        e = html.escape
        parts = [f"<h3>{e(self.title)}</h3>"]
        facts = Table("", ["fact", "value"], [[name, format_cell(value)] for name, value in self.facts.items()])
        claims = Table("Claims", ["verdict", "statement", "paper", "measured", "rule"],
                       [[c.verdict, c.statement, c.paper, c.measured, c.rule] for c in self.claims])
        for table in (facts, *self.tables, claims):
            head = "".join(f"<th>{e(column)}</th>" for column in table.columns)
            rows = ["".join(f"<td>{e(format_cell(cell))}</td>" for cell in row) for row in table.rows]
            if rows:
                body = "".join(f"<tr>{row}</tr>" for row in [head, *rows])
                parts.append(f"<table><caption>{e(table.title)}</caption>{body}</table>{e(table.note)}")
        if self.figures:
            try:
                page = importlib.import_module("looseleaf_lab.html").page([Report(self.title, figures=self.figures)])
                parts.append(f'<iframe style="width:100%;height:32rem;border:0" srcdoc="{e(page)}"></iframe>')
            except ImportError:
                names = ", ".join(figure.title for figure in self.figures)
                parts.append(f"<p>Figures: {e(names)} (pip install looseleaf-lab draws them)</p>")
        for images in self.images:
            shown = "".join(f'<figure style="display:inline-block"><img src="data:image/png;base64,{data}" alt="">'
                            f"<figcaption>{e(caption)}</figcaption></figure>"
                            for data, caption in zip(images.pngs, images.captions, strict=True))
            parts.append(f"<p><b>{e(images.title)}</b></p>{shown}<p>{e(images.note)}</p>")
        texts = [(strip.title, strip.text()) for strip in self.strips] + self.examples
        parts += [f"<details><summary>{e(label)}</summary><pre>{e(text)}</pre></details>" for label, text in texts]
        return "\n".join(parts)


def _added(items: list[T], item: T) -> T:
    items.append(item)
    return item


def png(array: Any) -> bytes:
    """An image as a PNG file, 8 bits a channel; one ``array`` as for :meth:`Report.image`, and the same errors."""
    import numpy as np

    if hasattr(array, "detach"):  # a tensor, without importing torch; numpy has no bfloat16
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    pixels = np.asarray(array)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype.kind not in "fbui" or pixels.ndim not in (2, 3) or not pixels.size or (
            pixels.ndim == 3 and channels not in (3, 4)):
        hint = ": move the channels to the end" if pixels.ndim == 3 and len(pixels) in (1, 3, 4) else \
            ": pass a list of images" if pixels.ndim == 4 else ""
        got = pixels.shape if pixels.ndim else type(array).__name__
        raise ValueError(f"an image: expected (H, W), (H, W, 3) or (H, W, 4), got {got}{hint}")
    if pixels.dtype.kind in "fb":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # rounding may leave the interval
            raise ValueError(f"an image: expected numbers in [0, 1] or uint8, got {low:.4g} to {high:.4g}")
        pixels = np.rint(pixels.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image: expected numbers in [0, 1] or uint8, got {pixels.dtype}")
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each row begins with its filter: 0, none

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes()))
            + chunk(b"IEND", b""))


def format_cell(value: Any) -> str:
    """A cell as text: four significant digits for floats, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_text(table: Table) -> str:
    """A table in aligned columns, numbers to the right."""
    columns = []
    for name, *cells in zip(table.columns, *table.rows, strict=True):
        texts = [name, *map(format_cell, cells)]
        width = max(map(len, texts))
        texts.insert(1, "-" * width)
        numeric = all(cell is None or isinstance(cell, (int, float)) for cell in cells)
        columns.append([text.rjust(width) if numeric else text.ljust(width) for text in texts])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join([table.title, *lines, *([table.note] if table.note else [])])


__all__ = ["SCHEMA", "Cell", "Claim", "Figure", "Images", "Report", "Series", "Table", "TokenStrip", "Verdict",
           "format_cell", "png", "table_text"]
