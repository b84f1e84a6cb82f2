"""How results leave a plugin: tables, figures, arrays and claims, to console, JSON and HTML."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from looseleaf.files import write_text

Verdict = Literal["holds", "does not hold", "not shown at this scale"]
Cell = str | int | float | bool | None


@dataclass
class Claim:
    """A statement of a paper next to what was measured here.

    Attributes:
        statement: what the paper says, in one sentence.
        source: where it says it (section, table, figure), or where this project says what "works" means.
        paper: the paper's own figure as text; mark figures that were not read in the paper with ``[memory]``.
        measured: our figure as text, with interval, seeds and units.
        rule: the rule that decides, fixed before measuring.
        verdict: ``holds``, ``does not hold`` or ``not shown at this scale``.
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
        verdicts: dict[bool | None, Verdict] = {
            True: "holds", False: "does not hold", None: "not shown at this scale"}
        return cls(**fields, verdict=verdicts[None if holds is None else bool(holds)])


@dataclass
class Table:
    """Rows under named columns. Cells are text, numbers or None (shown as a dash)."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: Cell) -> None:
        """Add a row; ValueError when the number of cells is not that of the columns."""
        if len(cells) != len(self.columns):
            raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, got {len(cells)} cells")
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
    """A text whose tokens are shaded by a value each; some may be marked, as removed for instance.

    ``values`` are numbers or None (not shaded); ``marked`` and ``values`` are as long as ``tokens``.
    """

    title: str
    tokens: list[str]
    values: list[float | None]
    marked: list[bool]
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.values) == len(self.marked):
            raise ValueError(f"strip {self.title!r} has {len(self.tokens)} tokens, {len(self.values)} values and "
                             f"{len(self.marked)} marks: allowed is as many of each")

    def text(self) -> str:
        """The text with what is marked in double brackets."""
        out, before = "", False
        for token, mark in zip(self.tokens, self.marked, strict=True):
            out += ("[[" if mark and not before else "]]" if before and not mark else "") + token
            before = mark
        return out + ("]]" if before else "")


@dataclass
class Report:
    """What a run measured.

    Attributes:
        title: headline.
        facts: single values by name (seeds, versions, model, seconds ...).
        tables, figures, claims: see the classes.
        arrays: name -> nested lists of numbers; raw data a reader may want to plot again.
        examples: texts worth reading, as (label, text).
        strips: texts with shaded tokens.
    """

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    arrays: dict[str, list[Any]] = field(default_factory=dict)
    examples: list[tuple[str, str]] = field(default_factory=list)
    strips: list[TokenStrip] = field(default_factory=list)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]] = (),
              note: str = "") -> Table:
        """Add a table and return it."""
        made = Table(title, list(columns), note=note)
        for row in rows:
            made.add(*row)
        self.tables.append(made)
        return made

    def figure(self, title: str, **fields: Any) -> Figure:
        """Add a figure and return it."""
        made = Figure(title, **fields)
        self.figures.append(made)
        return made

    def strip(self, title: str, tokens: Sequence[str], values: Sequence[float | None], marked: Sequence[bool],
              note: str = "") -> TokenStrip:
        """Add a text with shaded tokens and return it; ValueError when the lengths differ."""
        made = TokenStrip(title, list(tokens), list(values), list(marked), note)
        self.strips.append(made)
        return made

    def extend(self, other: Report, prefix: str = "") -> None:
        """Take everything of ``other`` in; titles and names get ``prefix``."""
        self.facts.update({prefix + k: v for k, v in other.facts.items()})
        for table in other.tables:
            self.tables.append(Table(prefix + table.title, table.columns, table.rows, table.note))
        for figure in other.figures:
            self.figures.append(Figure(**{**vars(figure), "title": prefix + figure.title}))
        self.claims.extend(other.claims)
        self.arrays.update({prefix + k: v for k, v in other.arrays.items()})
        self.examples.extend((prefix + label, text) for label, text in other.examples)
        self.strips.extend(replace(strip, title=prefix + strip.title) for strip in other.strips)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; NaN and infinities become None so that any JSON reader takes it."""
        return {"schema": "looseleaf.report/1", **plain(asdict(self))}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; also written to ``path`` (whole or not at all) when given."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        if data.get("schema") != "looseleaf.report/1":
            raise ValueError(f"not a looseleaf report: schema is {data.get('schema')!r}, "
                             "allowed is 'looseleaf.report/1'")
        return cls(
            title=data["title"], facts=dict(data["facts"]),
            tables=[Table(**t) for t in data["tables"]],
            figures=[Figure(**{**f, "series": [Series(**s) for s in f["series"]]}) for f in data["figures"]],
            claims=[Claim(**c) for c in data["claims"]], arrays=dict(data["arrays"]),
            examples=[(label, text) for label, text in data["examples"]],
            strips=[TokenStrip(**s) for s in data.get("strips", [])])

    def to_text(self) -> str:
        """The report for a terminal, without colours."""
        parts = [self.title, "=" * len(self.title)]
        parts += [f"{name}: {format_cell(value)}" for name, value in self.facts.items()]
        for table in self.tables:
            parts += ["", table_text(table)]
        for claim in self.claims:
            parts += ["", f"[{claim.verdict}] {claim.statement}", f"  source:   {claim.source}",
                      f"  paper:    {claim.paper}", f"  measured: {claim.measured}", f"  rule:     {claim.rule}"]
        for strip in self.strips:
            parts += ["", f"-- {strip.title}", strip.text(), *([strip.note] if strip.note else [])]
        for label, text in self.examples:
            parts += ["", f"-- {label}", text]
        return "\n".join(parts)

    __str__ = to_text


def format_cell(value: Any) -> str:
    """A cell as text: four significant digits for floats, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return f"{value:.4g}"
    return str(value)


def table_text(table: Table) -> str:
    """A table in aligned columns."""
    cells = [table.columns, *[[format_cell(c) for c in row] for row in table.rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    numeric = [all(isinstance(row[i], (int, float)) or row[i] is None for row in table.rows)
               for i in range(len(table.columns))]
    lines = [table.title]
    for n, row in enumerate(cells):
        lines.append("  ".join(c.rjust(w) if num else c.ljust(w)
                               for c, w, num in zip(row, widths, numeric, strict=True)).rstrip())
        if n == 0:
            lines.append("  ".join("-" * w for w in widths))
    if table.note:
        lines.append(table.note)
    return "\n".join(lines)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
