"""One self-contained HTML file for any number of reports; it opens offline and asks nobody for anything."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Iterable, Sequence
from importlib import resources

import numpy as np

from looseleaf.files import write_text
from looseleaf.report import Cell, Claim, Figure, Images, Report, Series, Table, TokenStrip, format_cell, png

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 14, 52
COLOURS = 8  # classes c0 .. c7 of the style sheet
SMALL = ' class="small"'  # images whose pixels are shown large
VERDICTS = {"holds": ("holds", "✓"), "does not hold": ("fails", "✗"), "not shown at this scale": ("open", "?")}


def write(reports: Report | Iterable[Report], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Write ``reports`` to ``path``, atomically.

    Args:
        reports: one report or several; several get a table of contents.
        path: the file to write; an existing one is replaced.
        title: of the page; None: the first report's.

    Raises:
        ValueError: no report.
    """
    write_text(path, page([reports] if isinstance(reports, Report) else list(reports), title))


def page(reports: Sequence[Report], title: str | None = None) -> str:
    """The HTML of the page."""
    if not reports:
        raise ValueError("reports: expected one or more, got none")
    files = resources.files("looseleaf_lab")
    style = files.joinpath("report.css").read_text(encoding="utf-8")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    title = title or reports[0].title
    contents = ""
    if len(reports) > 1:
        items = "".join(f'<li><a href="#r{i}">{_e(r.title)}</a></li>' for i, r in enumerate(reports))
        contents = f'<nav aria-label="Reports"><ol>{items}</ol></nav>'
    body = "".join(_report(r, i, alone=len(reports) == 1) for i, r in enumerate(reports))
    head = f"<h1>{_e(title)}</h1>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="looseleaf-lab">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{_e(title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>{head}<button id="theme" type="button" hidden>Dark mode</button></header>
<main id="main">
{contents}{body}</main>
<script>
{script}</script>
</body>
</html>
"""


def _report(report: Report, number: int, alone: bool) -> str:
    parts = [] if alone else [f'<h2 class="report">{_e(report.title)}</h2>']
    if report.claims:
        parts.append(_claims(report.claims))
    if report.facts:
        rows = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(format_cell(v))}</dd></div>" for k, v in report.facts.items())
        parts.append(f'<h3>Facts</h3><dl class="facts">{rows}</dl>')
    parts += [_table(t) for t in report.tables]
    if report.figures:
        parts.append('<div class="figures">' + "".join(
            figure(f, f"f{number}-{i}") for i, f in enumerate(report.figures)) + "</div>")
    if report.images:
        parts.append('<div class="figures">' + "".join(_images(images) for images in report.images) + "</div>")
    parts += [_strip(s) for s in report.strips]
    for label, text in report.examples:
        parts.append(f"<details><summary>{_e(label)}</summary><pre>{_e(text)}</pre></details>")
    return f'<section id="r{number}" aria-label="{_e(report.title)}">' + "\n".join(parts) + "</section>\n"


def _claims(claims: Sequence[Claim]) -> str:
    counts = {v: sum(c.verdict == v for c in claims) for v in VERDICTS}
    summary = " ".join(f'<span class="badge {VERDICTS[v][0]}">{VERDICTS[v][1]} {n} {v}</span>'
                       for v, n in counts.items() if n)
    cards = []
    for claim in claims:
        name, sign = VERDICTS[claim.verdict]
        rows = "".join(f"<div><dt>{label}</dt><dd>{_e(value)}</dd></div>" for label, value in (
            ("Source", claim.source), ("Paper", claim.paper), ("Measured", claim.measured), ("Rule", claim.rule)))
        cards.append(f'<article class="claim {name}"><h4>{_e(claim.statement)}</h4>'
                     f'<p class="badge {name}">{sign} {claim.verdict}</p><dl>{rows}</dl></article>')
    return f'<h3>Claims</h3><p class="summary">{summary}</p>' + "".join(cards)


def _table(table: Table) -> str:
    numeric = [all(_is_number(r[i]) or r[i] is None for r in table.rows) and bool(table.rows)
               for i in range(len(table.columns))]
    head = "".join(f'<th scope="col"{_right(n)}><button type="button">{_e(c)}</button></th>'
                   for c, n in zip(table.columns, numeric, strict=True))
    rows = []
    for row in table.rows:
        cells = []
        for i, (cell, is_number) in enumerate(zip(row, numeric, strict=True)):
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            cells.append(f'<{tag}{scope}{_right(is_number)}{_sort_key(cell)}>{_e(_cell(cell))}</{tag}>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{_e(table.note)}</p>' if table.note else ""
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(table.title)}"><table>'
            f"<caption>{_e(table.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>{note}")


def _strip(strip: TokenStrip) -> str:
    known = [v for v in strip.values if v is not None and math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    out = []
    for token, value, mark in zip(strip.tokens, strip.values, strip.marked, strict=True):
        style, tip = "", "not scored"
        if value is not None and math.isfinite(value):
            colour = _colour((value - low) / (high - low) if high > low else 0.5)
            style, tip = f' style="background:{colour};color:{_ink(colour)}"', format_cell(value)
        tag = "del" if mark else "span"
        out.append(f'<{tag}{style} title="{_e(tip)}{", marked" if mark else ""}">{_e(token)}</{tag}>')
    note = f'<p class="note">{_e(strip.note)}</p>' if strip.note else ""
    scale = f'<p class="note">from {_tick3(low)} (dark) to {_tick3(high)} (light); struck out: marked</p>'
    return f'<section class="strip"><h3>{_e(strip.title)}</h3><p>{"".join(out)}</p>{scale}{note}</section>'


def _images(images: Images) -> str:
    shown = "".join(
        f'<div><img{SMALL if width < 96 else ""} src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{_e(caption or images.title)}">{f"<span>{_e(caption)}</span>" if caption else ""}</div>'
        for data, caption, (width, height) in zip(images.pngs, images.captions, images.sizes, strict=True))
    note = f'<p class="note">{_e(images.note)}</p>' if images.note else ""
    several = ' class="wide"' if len(images.pngs) > 1 else ""
    return (f'<figure{several}><figcaption>{_e(images.title)}</figcaption><div class="images">{shown}</div>{note}'
            "</figure>")


def _ink(colour: str) -> str:
    """Black or white, whichever can be read on ``#rrggbb``."""
    red, green, blue = (int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"


def _cell(cell: Cell) -> str:
    return "–" if cell is None else format_cell(cell)


def _sort_key(cell: Cell) -> str:
    return f' data-v="{cell!r}"' if _is_number(cell) and math.isfinite(float(cell or 0)) else ""


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


# ------------------------------------------------------------------------------------------------- figures

def figure(fig: Figure, name: str = "figure") -> str:
    """A figure as a ``<figure>`` element with inline SVG and, for readers who cannot see it, its numbers."""
    drawn = _panels(fig) if fig.panels is not None else _heat_map(fig, name) if fig.image is not None \
        else _plot(fig, name)
    note = f'<p class="note">{_e(fig.note)}</p>' if fig.note else ""
    wide = ' class="wide"' if fig.panels is not None else ""
    return f"<figure{wide}><figcaption>{_e(fig.title)}</figcaption>{drawn}{_numbers(fig)}{note}</figure>"


def _plot(fig: Figure, name: str) -> str:
    shown = [_clean(s, fig.x_log, fig.y_log) for s in fig.series]
    xs = [x for s in shown for x in s.x]
    ys = [y for s in shown for y in [*s.y, *(s.low or []), *(s.high or [])]
          if math.isfinite(y) and (y > 0 or not fig.y_log)]
    if not xs or not ys:
        return '<p class="note">There is nothing to draw: no finite value.</p>'
    x_axis, y_axis = _Axis(xs, LEFT, WIDTH - RIGHT, fig.x_log), _Axis(ys, HEIGHT - BOTTOM, TOP, fig.y_log)
    if fig.x_log and len(set(xs)) <= 8:  # a sweep over 512, 1024 ... is read best at its own values
        x_axis.ticks = sorted(set(xs))
    parts = [_grid(x_axis, y_axis, fig)]
    for i, series in enumerate(shown):
        parts.append(_series(series, i, x_axis, y_axis))
    legend = "".join(f'<li><svg width="26" height="12" aria-hidden="true" class="c{i % COLOURS}">'
                     f"{_swatch(s, i)}</svg>{_e(s.name)}</li>" for i, s in enumerate(shown) if s.name)
    lines = ", ".join(s.name for s in shown if s.name)
    label = f"{fig.title}: {fig.y_label or 'y'} against {fig.x_label or 'x'}" + (f", for {lines}" if lines else "")
    return (f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}">'
            f'<title id="{name}">{_e(label)}</title>{"".join(parts)}</svg>'
            + (f'<ul class="legend">{legend}</ul>' if legend else ""))


def _clean(series: Series, x_log: bool, y_log: bool) -> Series:
    """Without the points that cannot be drawn: not finite, or not positive on a log axis."""
    keep = [i for i, (x, y) in enumerate(zip(series.x, series.y)) if _fits(x, x_log) and _fits(y, y_log)]

    def take(values: list[float] | None) -> list[float] | None:
        return None if values is None else [
            float(values[i]) if _fits(values[i], y_log) else float(series.y[i]) for i in keep]

    return Series(series.name, [float(series.x[i]) for i in keep], [float(series.y[i]) for i in keep],
                  take(series.low), take(series.high), series.style)


def _fits(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


class _Axis:
    """Maps values to pixels, and chooses ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.log10(low), math.log10(high)
            room = (self.high - self.low) * 0.05 or 0.3
        else:
            self.low, self.high = float(low), float(high)
            room = (self.high - self.low) * 0.05 or abs(self.low) * 0.1 or 1.0
        # an axis of fractions or counts should not run below zero for the sake of a margin
        floor = 0.0 if not log and low >= 0 and self.low - room < 0 else self.low - room
        self.low, self.high = floor, self.high + room
        self.ticks = self._log_ticks() if log else _nice(self.low, self.high)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def _log_ticks(self) -> list[float]:
        first, last = math.floor(self.low), math.ceil(self.high)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            ticks = [m * 10.0 ** p for p in range(first, last + 1) for m in steps
                     if self.low <= math.log10(m * 10.0 ** p) <= self.high]
            if len(ticks) >= 4:
                break
        else:
            ticks = [t for t in _nice(10 ** self.low, 10 ** self.high) if t > 0] or ticks
        return ticks[::-(-len(ticks) // 8)] if len(ticks) > 8 else ticks


def _nice(low: float, high: float, count: int = 6) -> list[float]:
    """Round values from low to high."""
    raw = (high - low) / count
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis, fig: Figure) -> str:
    out = []
    for t in x_axis.ticks:
        x = x_axis(t)
        out.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
                   f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_tick(t)}</text>')
    for t in y_axis.ticks:
        y = y_axis(t)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
                   f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(t)}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    out.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
               f"{_e(fig.x_label)}{' (log)' if fig.x_log else ''}</text>")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<text class="label" x="15" y="{middle}" text-anchor="middle" transform="rotate(-90 15 {middle})">'
               f"{_e(fig.y_label)}{' (log)' if fig.y_log else ''}</text>")
    return "".join(out)


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _series(series: Series, index: int, x_axis: _Axis, y_axis: _Axis) -> str:
    if not series.x:
        return ""
    out = []
    points = [(x_axis(x), y_axis(y)) for x, y in zip(series.x, series.y)]
    if series.low is not None and series.high is not None:
        low, high = [y_axis(v) for v in series.low], [y_axis(v) for v in series.high]
        if series.style == "points" or len(points) == 1:
            out += [f'<path class="whisker" d="M{x:.1f} {a:.1f}V{b:.1f}M{x - 4:.1f} {a:.1f}h8M{x - 4:.1f} {b:.1f}h8"/>'
                    for (x, _), a, b in zip(points, low, high)]
        else:
            there = [f"{x:.1f} {b:.1f}" for (x, _), b in zip(points, high)]
            back = [f"{x:.1f} {a:.1f}" for (x, _), a in zip(points, low)]
            out.append(f'<path class="band" d="M{"L".join(there + back[::-1])}Z"/>')
    if series.style != "points" and len(points) > 1:
        out.append(f'<path class="line d{index % 4}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
    if series.style != "line" or len(points) == 1:
        for (x, y), a, b in zip(points, series.x, series.y):
            label = f"{series.name}: {format_cell(a)}, {format_cell(b)}"
            out.append(f'<g class="point"><title>{_e(label)}</title>{_marker(x, y, index)}</g>')
    return f'<g class="c{index % COLOURS}">{"".join(out)}</g>'


def _marker(x: float, y: float, index: int) -> str:
    """Shapes differ as well as colours, for those who see few colours and for print."""
    shape = index % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if shape == 1:
        return f'<rect x="{x - 3.7:.1f}" y="{y - 3.7:.1f}" width="7.4" height="7.4"/>'
    if shape == 2:
        return f'<path d="M{x:.1f} {y - 5:.1f}l4.6 8.4h-9.2z"/>'
    return f'<path d="M{x:.1f} {y - 5.2:.1f}l5.2 5.2l-5.2 5.2l-5.2 -5.2z"/>'


def _swatch(series: Series, index: int) -> str:
    line = f'<path class="line d{index % 4}" d="M1 6H25"/>' if series.style != "points" else ""
    return line + (f'<g class="point">{_marker(13, 6, index)}</g>' if series.style != "line" else "")


def _heat_map(fig: Figure, name: str) -> str:
    rows = fig.image or []
    values = [v for row in rows for v in row if v is not None and math.isfinite(v)]
    if not values:
        return '<p class="note">There is nothing to draw: no finite value.</p>'
    low, high = min(values), max(values)
    columns = max(len(r) for r in rows)
    bar = 58
    left, top, bottom = 56, 10, 44
    size = min((WIDTH - left - bar - 20) / columns, 440 / len(rows))
    # narrow maps are stretched sideways: a strip a few pixels wide shows nothing
    wide = min(size * 3, (WIDTH - left - bar - 20) / columns)
    tall = max(size, min(18.0, 440 / len(rows)))
    w, h = wide * columns, tall * len(rows)
    height = top + h + bottom
    cells = []
    for i, row in enumerate(rows):
        for j, v in enumerate(row):
            colour = _colour((v - low) / (high - low) if high > low else 0.5) if v is not None and math.isfinite(v) \
                else "none"
            tip = f"<title>{i}, {j}: {_e(format_cell(v))}</title>" if len(values) <= 4096 else ""
            cells.append(f'<rect x="{left + j * wide:.2f}" y="{top + i * tall:.2f}" width="{wide + 0.3:.2f}" '
                         f'height="{tall + 0.3:.2f}" fill="{colour}">{tip}</rect>')
    ticks = [f'<text x="{left - 6}" y="{top + (i + 0.5) * tall + 4:.1f}" text-anchor="end">{i}</text>'
             for i in _some(len(rows), max(2, int(h / 22)))]
    ticks += [f'<text x="{left + (j + 0.5) * wide:.1f}" y="{top + h + 15:.1f}" text-anchor="middle">{j}</text>'
              for j in _some(columns, max(2, int(w / 40)))]
    stops = "".join(f'<stop offset="{t / 8}" stop-color="{_colour(1 - t / 8)}"/>' for t in range(9))
    x = left + w + 16
    legend = (f'<defs><linearGradient id="{name}-g" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient></defs>'
              f'<rect x="{x:.1f}" y="{top}" width="12" height="{h:.1f}" fill="url(#{name}-g)"/>'
              f'<text x="{x + 17:.1f}" y="{top + 10}">{_tick3(high)}</text>'
              f'<text x="{x + 17:.1f}" y="{top + h:.1f}">{_tick3(low)}</text>')
    middle = top + h / 2
    labels = (f'<text class="label" x="{left + w / 2:.1f}" y="{height - 8:.1f}" text-anchor="middle">{_e(fig.x_label)}'
              f'</text><text class="label" x="13" y="{middle:.1f}" text-anchor="middle" '
              f'transform="rotate(-90 13 {middle:.1f})">{_e(fig.y_label)}</text>')
    label = f"{fig.title}: heat map of {len(rows)} rows and {columns} columns, {_tick3(low)} to {_tick3(high)}"
    return (f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}">'
            f'<title id="{name}">{_e(label)}</title><g shape-rendering="crispEdges">{"".join(cells)}</g>'
            f'{"".join(ticks)}{legend}{labels}</svg>')


def _panels(fig: Figure) -> str:
    """Small heat maps as pictures: as SVG, a hundred of them would be a hundred thousand elements."""
    panels = fig.panels or {}
    positive = [v for rows in panels.values() for row in rows for v in row if v > 0 and math.isfinite(v)]
    if not positive:
        return '<p class="note">There is nothing to draw: no positive value.</p>'
    low, high = math.log(min(positive)), math.log(max(positive))
    pictures = "".join(
        f'<div><img class="cells" src="{_png(rows, low, high)}" alt="{_e(name)}"><span>{_e(name)}</span></div>'
        for name, rows in panels.items())
    return (f'<div class="panels">{pictures}</div><p class="note">from {_tick3(math.exp(low))} (dark) to '
            f"{_tick3(math.exp(high))} (light), logarithmic; empty: exactly zero</p>")


def _png(rows: Sequence[Sequence[float]], low: float, high: float) -> str:
    """A matrix as the data address of a PNG, one pixel a cell, in the colours of the heat maps."""
    def pixel(value: float) -> tuple[int, ...]:
        if not (value > 0 and math.isfinite(value)):
            return 0, 0, 0, 0
        return *bytes.fromhex(_colour((math.log(value) - low) / (high - low) if high > low else 1.0)[1:]), 255

    pixels = np.array([[pixel(value) for value in row] for row in rows], np.uint8)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _tick3(value: float) -> str:
    return f"{value:.3g}"


def _some(count: int, most: int) -> list[int]:
    step = max(1, -(-count // most))
    return list(range(0, count, step))


# Anchors of a perceptually even map from dark blue over green to yellow: reads the same in grey.
_ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _colour(fraction: float) -> str:
    at = min(max(fraction, 0.0), 1.0) * (len(_ANCHORS) - 1)
    i = min(int(at), len(_ANCHORS) - 2)
    mixed = (round(a + (b - a) * (at - i)) for a, b in zip(_ANCHORS[i], _ANCHORS[i + 1], strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _numbers(fig: Figure) -> str:
    """The figure's numbers, folded away."""
    if fig.panels is not None:
        return ""
    if fig.image is not None:
        if sum(len(r) for r in fig.image) > 2000:
            return ""
        rows = "".join("<tr>" + "".join(f'<td class="n">{_e(format_cell(v))}</td>' for v in r) + "</tr>"
                       for r in fig.image)
        return ('<details><summary>Numbers</summary><div class="scroll" tabindex="0">'
                f"<table>{rows}</table></div></details>")
    count = sum(len(s.x) for s in fig.series)
    if not count or count > 2000:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_e(s.name)}</th>' + "".join(f'<td class="n">{_e(format_cell(v))}</td>' for v in (
            x, y, s.low[i] if s.low else None, s.high[i] if s.high else None)) + "</tr>"
        for s in fig.series for i, (x, y) in enumerate(zip(s.x, s.y)))
    return ('<details><summary>Numbers</summary><div class="scroll" tabindex="0"><table><thead><tr>'
            f'<th scope="col">series</th><th scope="col" class="n">{_e(fig.x_label or "x")}</th>'
            f'<th scope="col" class="n">{_e(fig.y_label or "y")}</th><th scope="col" class="n">low</th>'
            f'<th scope="col" class="n">high</th></tr></thead><tbody>{rows}</tbody></table></div></details>')


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)
