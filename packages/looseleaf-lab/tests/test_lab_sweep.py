"""Sweeps: resumable, atomic, and nothing lost when a worker dies."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from looseleaf_lab import sweep as sweep_
from looseleaf_lab.results import ResultCache
from looseleaf_lab.sweep import SweepError, settings, sweep


def test_cells(tmp_path: Path) -> None:
    cells, calls = ResultCache(tmp_path), []

    def work() -> dict[str, float]:
        calls.append(1)
        return {"loss": math.nan, "score": 0.5}

    assert cells.do({"seed": 1}, work) == {"loss": None, "score": 0.5} == cells.do({"seed": 1}, work)
    assert len(calls) == 1 and cells.get({"seed": 2}) is None
    path = cells.path({"seed": 1})
    assert path is not None and json.loads(path.read_text())["key"] == {"seed": 1}
    path.write_text("{")
    assert cells.do({"seed": 1}, work) and len(calls) == 2


def test_grid_is_all_combinations_or_a_list() -> None:
    assert settings({"a": [1, 2], "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert settings([{"a": 1}, {"a": 2, "b": 3}]) == [{"a": 1}, {"a": 2, "b": 3}]
    with pytest.raises(ValueError, match="twice"):
        settings([{"a": 1}, {"a": 1}])
    with pytest.raises(ValueError, match="expected a list of one value or more"):
        settings({"a": []})
    with pytest.raises(ValueError, match="expected a list of one value or more"):
        settings({"a": "text"})


def test_resumes_grows_and_retries_failures(tmp_path: Path) -> None:
    calls: list[int] = []
    broken = True

    def work(x: int) -> dict[str, Any]:
        calls.append(x)
        if x == 2 and broken:
            raise RuntimeError("no luck")
        return {"square": x * x, "none": None, "nan": math.nan}

    with pytest.raises(SweepError, match=r"1 of 3 settings failed.*no luck") as caught:
        sweep(work, {"x": [1, 2, 3]}, tmp_path)
    assert [r.value and r.value["square"] for r in caught.value.results] == [1, None, 9]
    broken = False
    results = sweep(work, {"x": [1, 2, 3, 4]}, tmp_path)
    assert calls == [1, 2, 3, 2, 4]
    assert [r.value["square"] for r in results] == [1, 4, 9, 16]
    assert [r.resumed for r in results] == [True, False, True, False]
    assert results[0].value["nan"] is None
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4 and all(json.loads(p.read_text())["schema"] == "looseleaf.cell/1" for p in kept)


def test_none_is_a_result_and_a_broken_file_is_not(tmp_path: Path) -> None:
    calls: list[int] = []

    def work(x: int) -> None:
        calls.append(x)

    sweep(work, {"x": [1, 2]}, tmp_path)
    sweep(work, {"x": [1, 2]}, tmp_path)
    assert calls == [1, 2]
    path = ResultCache(tmp_path).path({"x": 2})
    assert path is not None
    path.write_text("{ half")
    sweep(work, {"x": [1, 2]}, tmp_path)
    assert calls == [1, 2, 2]


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"workers: expected .* got 0"):
        sweep(lambda: None, {}, tmp_path, workers=0)
    with pytest.raises(ValueError, match=r"retries: expected .* got -1"):
        sweep(lambda: None, {}, tmp_path, retries=-1)


def test_says_how_to_install_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sweep_.MissingRayError, match=r"pip install 'looseleaf-lab\[ray\]'"):
        sweep(lambda x: x, {"x": [1]}, tmp_path, workers=1)


@pytest.mark.slow
def test_no_result_is_lost_when_a_ray_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    marks = tmp_path / "marks"
    marks.mkdir()
    folder = str(marks)

    def work(x: int) -> dict[str, int]:
        import os as os_
        import time

        with open(f"{folder}/{x}-{os_.getpid()}-{time.time_ns()}", "w"):
            pass
        time.sleep(0.1)
        first = len([n for n in os_.listdir(folder) if n.startswith(f"{x}-")]) == 1
        if x == 5 and first:
            os_.kill(os_.getpid(), signal.SIGKILL)
        if x == 7:
            raise ValueError("seven")
        return {"x": x, "pid": os_.getpid()}

    results = sweep(work, {"x": list(range(12))}, tmp_path / "state", workers=2, raise_errors=False)
    assert [r.value["x"] if r.value else None for r in results] == [*range(7), None, *range(8, 12)]
    assert "seven" in str(results[7].error)
    pids = {r.value["pid"] for r in results if r.value}
    assert len(pids) >= 2 and os.getpid() not in pids
    attempts = [n.split("-")[0] for n in os.listdir(marks)]
    assert attempts.count("5") == 2, "the killed setting is done again"
    assert all(attempts.count(str(x)) == 1 for x in range(12) if x != 5), "the others only once"
    again = sweep(work, {"x": list(range(7))}, tmp_path / "state", workers=2)
    assert all(r.resumed for r in again)


@pytest.mark.slow
def test_an_interrupted_ray_sweep_resumes_with_what_was_done(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")

    def work(x: int) -> int:
        import os as os_

        if x == 3:
            os_.kill(os_.getpid(), signal.SIGKILL)
        return x

    # without retries the loss of a worker is an error of that setting only
    results = sweep(work, {"x": [0, 1, 2, 3, 4]}, tmp_path, workers=2, retries=0, raise_errors=False)
    assert [r.value for r in results] == [0, 1, 2, None, 4]
    assert "WorkerCrashed" in str(results[3].error)
    assert not ray.is_initialized()
    results = sweep(lambda x: -x, {"x": [0, 1, 2, 3, 4]}, tmp_path)
    assert [r.value for r in results] == [0, 1, 2, -3, 4]
