"""A reproduction as data: claims with their rules, and how one seed is measured.

```python
study = Study("my-method: the paper's claims", measure, claims=[...], show=show, full=Scale(), quick=Scale(steps=40))
```

``measure(seed, scale)`` gives plain data. The study runs the seeds, in parallel processes where asked, keeps each
finished one so that a killed run goes on, and makes claims, tables and figures of all of them. An instance is what the
entry point ``looseleaf.reproductions`` names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import numpy as np

from looseleaf import progress as progress_
from looseleaf.errors import LooseleafError
from looseleaf.files import cache_dir
from looseleaf.report import Cell, Claim, Report, Series, Table
from looseleaf.resume import as_plain, digest
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab.results import ResultCache

Row = dict[str, Any]
Decision = tuple["bool | None", str]
"""Whether a claim holds (None: not shown at this scale), and what was measured, in words."""


class LostProcessError(LooseleafError, RuntimeError):
    """A process that measured a seed died, most often because the memory was full."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What all seeds gave.

    Attributes:
        rows: what ``measure`` returned for each seed, in their order.
        once: what ``once`` returned; empty without it.
        seeds: the seeds.
        scale: how much was measured.
        quick: whether this is the quick run, which decides nothing that needs the full scale.
    """

    rows: list[Row]
    once: Row
    seeds: list[int]
    scale: Any
    quick: bool

    def values(self, *path: str | int) -> list[Any]:
        """The entry at ``path`` of every row: ``values("accuracy", "dense")`` is ``row["accuracy"]["dense"]`` of each.

        Raises:
            KeyError: no such entry; the message names what there is.
        """
        return [_at(row, path) for row in self.rows]

    def interval(self, *path: str | int, minus: Sequence[str | int] | None = None, times: float = 1.0,
                 statistic: Callable[[Any], Any] | None = None) -> Interval:
        """The mean over seeds of the number at ``path``, with its 95 % bootstrap interval.

        Args:
            path: see :meth:`values`.
            minus: path of what is subtracted in each seed, so that the difference is paired.
            times: factor, such as 100 for points.
            statistic: instead of the mean, see :func:`looseleaf.statistics.bootstrap`.
        """
        values = self.values(*path)
        if minus is not None:
            values = [a - b for a, b in zip(values, self.values(*minus), strict=True)]
        return bootstrap([times * v for v in values], statistic=statistic)

    def mean(self, *path: str | int) -> float:
        """The mean over seeds of the number at ``path``, see :meth:`values`."""
        return float(np.asarray(self.values(*path), dtype=np.float64).mean())

    def joined(self, *path: str | int) -> list[Any]:
        """The lists at ``path`` of all seeds, one behind the other, see :meth:`values`."""
        return [entry for entries in self.values(*path) for entry in entries]

    def claim(self, statement: str, source: str, paper: str, rule: str, holds: bool | None, measured: str, *,
              any_scale: bool = False, count: str = "") -> Claim:
        """A claim whose verdict is at hand, see :class:`looseleaf.Claim`.

        Args:
            statement, source, paper, rule, measured: in words.
            holds: whether it does; None: not shown.
            any_scale: the quick run decides it as well; else that run shows nothing.
            count: what a seed is, such as ``"seeds"``: their number goes behind ``measured``.
        """
        return Claim.decide(None if self.quick and not any_scale else holds, statement=statement, source=source,
                            paper=paper, measured=measured + (f"; {len(self.seeds)} {count}" if count else ""),
                            rule=rule)

    def unmeasured(self, source: str, paper: str, needs: Mapping[str, str], rule: str = "none set") -> Iterator[Claim]:
        """Claims that are not measured.

        Args:
            source, paper, rule: of all of them, see :class:`looseleaf.Claim`.
            needs: statement -> what measuring it needs.
        """
        for statement, need in needs.items():
            yield self.claim(statement, source, paper, rule, None, f"not measured: needs {need}")


@dataclasses.dataclass(frozen=True)
class StudyClaim:
    """A statement of the paper and the rule that decides it, fixed before measuring.

    Attributes:
        statement: what the paper says, in one sentence.
        source: where it says it, or that the rule is this project's.
        paper: the paper's own figure as text.
        rule: the rule, in words; or made from the scale.
        decide: results -> whether it holds, and what was measured in words. None: nothing is measured.
        unmeasured: why not, where ``decide`` is None.
    """

    statement: str
    source: str
    paper: str
    rule: str | Callable[[Any], str]
    decide: Callable[[Results], Decision] | None = None
    unmeasured: str = ""

    def on(self, results: Results) -> Claim:
        """The claim with its verdict."""
        holds, measured = (None, self.unmeasured) if self.decide is None else self.decide(results)
        rule = self.rule if isinstance(self.rule, str) else self.rule(results.scale)
        return Claim.decide(holds, statement=self.statement, source=self.source, paper=self.paper, measured=measured,
                            rule=rule)


@dataclasses.dataclass(frozen=True)
class Study:
    """A reproduction.

    Args:
        title: headline of the report, such as ``"my-method: the paper's claims"``.
        measure: ``measure(seed, scale)`` gives plain data for one seed: numbers, text, lists, dictionaries. It must be
            a function of an importable module, and depend on its arguments alone.
        claims: the claims, in the order of the report; or a function of the results that gives them, such as a
            generator of :meth:`Results.claim`.
        show: ``show(report, results)`` adds tables, figures and strips, before the claims.
        once: ``once(scale)`` gives what is measured a single time, such as speed; always in this process, alone.
        full, quick: what ``measure`` is given as ``scale``, any plain dataclass.
        facts: results -> facts of the report.
        quick_seeds: most seeds under ``quick``.
    """

    title: str
    measure: Callable[[int, Any], Row] | None
    claims: Iterable[StudyClaim] | Callable[[Results], Iterable[StudyClaim | Claim]]
    show: Callable[[Report, Results], None] | None = None
    once: Callable[[Any], Row] | None = None
    full: Any = None
    quick: Any = None
    facts: Callable[[Results], dict[str, Any]] | None = None
    quick_seeds: int = 2

    def __call__(self, *, seeds: int = 5, quick: bool = False, jobs: int = 1,
                 state: str | os.PathLike[str] | None = None, progress: bool | None = None) -> Report:
        """Measure every claim.

        Args:
            seeds: how many, from 0 on.
            quick: minutes instead of thoroughness; shows that everything runs.
            jobs: seeds measured at the same time, each in a process of its own with its part of the threads; sums over
                another number of threads may differ in their last digits.
            state: folder for finished seeds, kept afterwards. None: they are kept in the cache until the run is
                complete, so that a killed run goes on. What other code measured is not taken.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: ``seeds`` or ``jobs`` below 1.
            LostProcessError: a process died; what is finished is kept.
        """
        for name, value in (("seeds", seeds), ("jobs", jobs)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        began = time.perf_counter()
        scale = self.quick if quick else self.full
        numbers = list(range(min(seeds, self.quick_seeds) if quick else seeds)) if self.measure else []
        folder = Path(state) if state is not None else cache_dir() / "studies" / digest(self._key(scale))
        cells = ResultCache(folder)
        rows: dict[int, Row] = {}
        with progress_.bar("seeds", len(numbers) + (self.once is not None), progress) as progress_bar:
            for seed, row in self._rows(numbers, scale, cells, jobs):
                rows[seed] = row
                progress_bar.update()
            once: Row = {}
            if self.once is not None:
                once = cells.do({**self._key(scale), "once": True}, lambda: self.once(scale))  # type: ignore[misc]
                progress_bar.update()
        results = Results([rows[seed] for seed in numbers], once, numbers, scale, quick)
        report = self.report(results)
        report.facts["seconds"] = time.perf_counter() - began
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)
        return report

    def report(self, results: Results) -> Report:
        """The report on results that are there."""
        import torch

        facts = self.facts(results) if self.facts else {}
        report = Report(self.title, facts={"seeds": len(results.seeds), "quick": results.quick, **facts,
                                           "torch": torch.__version__})
        if self.show is not None:
            self.show(report, results)
        claims = self.claims(results) if callable(self.claims) else self.claims
        report.claims.extend(claim.on(results) if isinstance(claim, StudyClaim) else claim for claim in claims)
        return report

    def _key(self, scale: Any) -> Row:
        package = (self.measure or self.once or self.show).__module__.partition(".")[0]  # type: ignore[union-attr]
        return {"study": self.title, "package": package, "code": _code(package), "scale": repr(scale)}

    def _rows(self, seeds: Sequence[int], scale: Any, cells: ResultCache, jobs: int) -> Iterator[tuple[int, Row]]:
        """Seed and row, in the order in which they are finished; those kept come first."""
        keys = {seed: {**self._key(scale), "seed": seed} for seed in seeds}
        todo = []
        for seed in seeds:
            kept = cells.get(keys[seed])
            if kept is None:
                todo.append(seed)
            else:
                yield seed, kept
        if not todo:
            return
        assert self.measure is not None
        if jobs == 1 or len(todo) == 1:
            for seed in todo:
                row = as_plain(self.measure(seed, scale))
                cells.put(keys[seed], row)
                yield seed, row
            return
        # spawned: torch must not be forked once it has started threads
        import torch

        threads = max(1, min((os.cpu_count() or 1) // jobs, torch.get_num_threads()))  # OMP_NUM_THREADS is heeded
        with ProcessPoolExecutor(min(jobs, len(todo)), multiprocessing.get_context("spawn"), _quiet_worker,
                                 (threads,)) as pool:
            futures = {pool.submit(self.measure, seed, scale): seed for seed in todo}
            try:
                for future in as_completed(futures):
                    row = as_plain(future.result())
                    cells.put(keys[futures[future]], row)
                    yield futures[future], row
            except BrokenProcessPool as error:
                raise LostProcessError(
                    f"a process that measured a seed died: expected {jobs} at the same time, got too little memory for "
                    f"them, most likely. Measure fewer at once (--jobs); {cells.folder} has what is finished, which is "
                    "kept and taken by the same command") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def above(interval: Sequence[float], limit: float = 0.0, *, touching: bool | None = None) -> bool | None:
    """Whether an interval lies above ``limit``; False: below it; None: ``limit`` is inside.

    ``touching`` is the verdict where the highest number of the interval is ``limit``.
    """
    low, high = interval[1], interval[2]
    return True if low > limit else False if high < limit else touching if high == limit else None


def below(interval: Sequence[float], limit: float = 0.0, *, touching: bool | None = None) -> bool | None:
    """Whether an interval lies below ``limit``; False: above it; None: ``limit`` is inside.

    ``touching`` is the verdict where the lowest number of the interval is ``limit``.
    """
    low, high = interval[1], interval[2]
    return True if high < limit else False if low > limit else touching if low == limit else None


def every(*verdicts: bool | None) -> bool | None:
    """False where one is False, None where one is None, else True."""
    return False if False in verdicts else None if None in verdicts else True


def resampled(count: int, statistic: Callable[[np.ndarray], np.ndarray], *, samples: int = 2000) -> Interval:
    """A statistic of several numbers of each unit, with its 95 % bootstrap interval over units.

    Args:
        count: of the units.
        statistic: maps the numbers of the units drawn, (samples, count) integers from 0 on, to (samples,) float.
        samples: number of resamples.
    """
    return bootstrap(range(count), samples=samples, statistic=lambda units: statistic(units.astype(int)))


def add_table(report: Report, title: str, rows: Iterable[Mapping[str, Cell | Interval]], note: str = "") -> Table:
    """Add a table whose rows name their own columns.

    Args:
        report: goes on.
        title, note: of the table.
        rows: column -> cell, the same columns in each. An interval takes three: its value under its own name, and its
            ends under ``low`` and ``high``, which have that name in front from the second interval on.

    Raises:
        ValueError: rows of other columns than the first.
    """
    table = report.table(title, [], note=note)
    for row in rows:
        cells: dict[str, Cell] = {}
        intervals = 0
        for name, cell in row.items():
            if isinstance(cell, Interval):
                prefix = f"{name} " if intervals else ""
                cells |= {name: cell.value, f"{prefix}low": cell.low, f"{prefix}high": cell.high}
                intervals += 1
            else:
                cells[name] = cell
        table.columns = table.columns or list(cells)
        if list(cells) != table.columns:
            raise ValueError(f"table {title!r}: expected the columns {table.columns} in each row, got {list(cells)}")
        table.add(*cells.values())
    return table


def curve(name: str, x: Iterable[float], values: Iterable[float | Interval],
          style: Literal["line", "points", "both"] = "both") -> Series:
    """A line of a figure through numbers, or through intervals, which are drawn around it."""
    values = list(values)
    low, high = ([float(v[n]) for v in values if isinstance(v, Interval)] or None for n in (1, 2))
    y = [float(v.value if isinstance(v, Interval) else v) for v in values]
    return Series(name, [float(v) for v in x], y, low, high, style)


def _at(row: Any, path: Sequence[str | int]) -> Any:
    for n, step in enumerate(path):
        # keys of dictionaries are text once they have been JSON
        step = str(step) if isinstance(row, dict) else step
        try:
            row = row[step]
        except (KeyError, IndexError, TypeError) as error:
            there = ", ".join(row) if isinstance(row, dict) else f"{len(row)} entries" if isinstance(row, list) else row
            raise KeyError(f"no {step!r} at {list(path[:n])}: there is {there}") from error
    return row


def _code(package: str) -> str:
    """A digest of the Python files of a package or module, so that what other code measured is not taken."""
    spec = importlib.util.find_spec(package) if package != "__main__" else None
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    if not files and spec is not None and spec.has_location:
        files = [Path(str(spec.origin))]
    return digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in files]) if files else ""


class _Log(io.TextIOWrapper):
    """A stream on which nothing draws a progress bar: those of several processes would overwrite each other."""

    def isatty(self) -> bool:
        return False


def _quiet_worker(threads: int) -> None:
    sys.stderr = _Log(os.fdopen(2, "wb", closefd=False), line_buffering=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


__all__ = ["LostProcessError", "Results", "Study", "StudyClaim", "above", "add_table", "below", "curve", "every",
           "resampled"]
