"""A function over a grid of settings, on this machine or on a Ray cluster; results are kept one by one."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from looseleaf import progress as progress_
from looseleaf.errors import LooseleafError
from looseleaf.resume import digest
from looseleaf_lab.results import ResultCache


class MissingRayError(LooseleafError, ModuleNotFoundError):
    """A cluster or workers were asked for, and Ray is not installed."""


class SweepError(LooseleafError):
    """Some settings failed; the results of the others are kept. ``results`` has all that there is."""

    def __init__(self, message: str, results: list[Result]) -> None:
        super().__init__(message)
        self.results = results


@dataclasses.dataclass
class Result:
    """One setting of a sweep.

    Attributes:
        setting: the arguments given to the function.
        value: what it returned, as plain data; None if it failed.
        error: why it failed, or None.
        resumed: kept from an earlier run.
    """

    setting: dict[str, Any]
    value: Any = None
    error: str | None = None
    resumed: bool = False


def settings(grid: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of a grid: all combinations of a mapping name -> values, the last name fastest; or the list itself.

    Raises:
        ValueError: a name without values, or a setting given twice.
    """
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, (str, bytes)) or not len(values):
                raise ValueError(f"grid[{name!r}]: expected a list of one value or more, got {values!r}")
        out = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    else:
        out = [dict(setting) for setting in grid]
    seen: set[str] = set()
    for setting in out:
        key = digest(setting)
        if key in seen:
            raise ValueError(f"grid: expected different settings, got {setting} twice")
        seen.add(key)
    return out


def sweep(function: Callable[..., Any], grid: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]],
          state_dir: str | os.PathLike[str], *, address: str | None = None, workers: int | None = None,
          cpus: float = 1.0, gpus: float = 0.0, retries: int = 3, raise_errors: bool = True,
          progress: bool | None = None) -> list[Result]:
    """``function(**setting)`` for every setting of the grid; each result is written as soon as it is there.

    What is in ``state_dir`` already is not computed again, so a run that was stopped resumes, and a grid may grow.
    A worker process that dies (out of memory, a lost machine) costs only the setting it was at, which is done again.

    Args:
        function: takes the names of the grid as keyword arguments and returns plain data (numbers, texts, lists,
            dictionaries). With Ray it must be picklable: a function of an importable module, or a closure over
            plain data.
        grid: name -> values, or the settings themselves.
        state_dir: where results are kept, one JSON file each. One folder is for one function.
        address: of a Ray cluster, such as ``"auto"`` or ``"ray://host:10001"``; None: this machine.
        workers: processes at once on this machine, through Ray; None without ``address``: this process, no Ray.
        cpus, gpus: what one setting needs (Ray only).
        retries: how often a setting whose worker died is tried again (Ray only).
        raise_errors: raise after everything has run if a setting failed; False: leave it to ``Result.error``.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        One result per setting, in the order of the grid. Failed settings are tried again by the next call.

    Raises:
        MissingRayError: Ray is needed and absent; the message has the pip command.
        SweepError: a setting failed.
        ValueError: a bad grid, or no worker.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected None (this process) or an integer >= 1, got {workers}")
    if retries < 0:
        raise ValueError(f"retries: expected an integer >= 0, got {retries}")
    todo = settings(grid)
    cells = ResultCache(Path(state_dir))
    results = [_kept(cells, setting) for setting in todo]
    open_ = [i for i, result in enumerate(results) if not result.resumed]
    with progress_.bar("sweep", len(todo), progress) as progress_bar:
        progress_bar.update(len(todo) - len(open_))
        if address is None and workers is None:
            for i in open_:
                results[i] = _keep(cells, todo[i], *_attempt(function, todo[i]))
                progress_bar.update()
        elif open_:
            _on_ray(function, todo, open_, results, cells, address, workers, cpus, gpus, retries, progress_bar)
    failed = [r for r in results if r.error is not None]
    if failed and raise_errors:
        raise SweepError(f"{len(failed)} of {len(results)} settings failed; the first, {failed[0].setting}: "
                         f"{failed[0].error}. The other results are kept in {state_dir}; the same call tries the "
                         "failed ones again", results)
    return results


def _kept(cells: ResultCache, setting: dict[str, Any]) -> Result:
    found = cells.get(setting)
    # the value is in a dictionary of its own so that a function may return None
    return Result(setting) if found is None else Result(setting, found["value"], resumed=True)


def _attempt(function: Callable[..., Any], setting: dict[str, Any]) -> tuple[Any, str | None]:
    try:
        return function(**setting), None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def _keep(cells: ResultCache, setting: dict[str, Any], value: Any, error: str | None) -> Result:
    if error is not None:
        return Result(setting, error=error)
    cells.put(setting, {"value": value})
    kept = cells.get(setting)
    return Result(setting, kept["value"])


def _on_ray(function: Callable[..., Any], todo: list[dict[str, Any]], open_: list[int], results: list[Result],
            cells: ResultCache, address: str | None, workers: int | None, cpus: float, gpus: float, retries: int,
            progress_bar: Any) -> None:
    try:
        import ray
    except ModuleNotFoundError as missing:
        raise MissingRayError("a sweep with workers or a cluster needs Ray: "
                              "pip install 'looseleaf-lab[ray]'") from missing
    started_here = not ray.is_initialized()
    if started_here:
        if address is None:
            ray.init(num_cpus=int((workers or 1) * max(1.0, cpus)), include_dashboard=False, log_to_driver=False,
                     logging_level=logging.ERROR)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_attempt)
        shared = ray.put(function)
        running: dict[Any, int] = {}
        waiting = list(reversed(open_))
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1) / max(cpus, 0.01))) * 2
        while waiting or running:
            # no more than the cluster can use: a stopped sweep must not leave thousands of tasks behind
            while waiting and len(running) < most:
                i = waiting.pop()
                running[remote.remote(shared, todo[i])] = i
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                i = running.pop(reference)
                try:
                    value, error = ray.get(reference)
                except ray.exceptions.RayError as lost:
                    value, error = None, f"{type(lost).__name__}: {str(lost).strip().splitlines()[0]}"
                results[i] = _keep(cells, todo[i], value, error)
                progress_bar.update()
    finally:
        if started_here:
            ray.shutdown()
