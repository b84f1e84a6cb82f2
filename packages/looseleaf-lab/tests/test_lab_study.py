"""A reproduction as data: seeds in processes, kept one by one, and claims decided by their rules."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looseleaf.report import Claim, Report, Series
from looseleaf.statistics import Interval
from looseleaf_lab.study import Results, Study, StudyClaim, above, add_table, below, curve, every, resampled


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a run takes."""

    offset: float = 0.0
    folder: str = ""
    fail: tuple[int, ...] = ()


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """A module-level function, as processes need it."""
    if scale.folder:
        (Path(scale.folder) / f"{seed}-{os.getpid()}-{time.time_ns()}").touch()
    if seed in scale.fail:
        raise RuntimeError(f"seed {seed} fails")
    return {"gain": {2: seed + scale.offset, "base": 1.0}, "threads": os.environ.get("OMP_NUM_THREADS")}


def die(seed: int, scale: Scale) -> dict[str, Any]:
    """As a process that the system kills for its memory."""
    if seed == 1 and not list(Path(scale.folder).iterdir()):
        (Path(scale.folder) / "died").touch()
        time.sleep(0.5)  # the other seed is finished by then
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seed": seed}


def speed(scale: Scale) -> dict[str, Any]:
    """Measured once."""
    return {"speed": 3.0}


def claims() -> list[StudyClaim]:
    def gains(results: Results) -> tuple[bool | None, str]:
        gain = results.interval("gain", 2, minus=("gain", "base"), times=100)
        return above(gain, 50), f"{gain:.0f} points"

    return [StudyClaim("It gains", "abstract", "+1", lambda scale: f"above {scale.offset}", gains),
            StudyClaim("It is huge", "section 9", "7B", "none set", unmeasured="not measured: too large")]


def study(**changes: Any) -> Study:
    def show(report: Report, results: Results) -> None:
        report.table("Gains", ["gain"], [[v] for v in results.values("gain", 2)])
        report.facts["speed"] = results.once["speed"]

    settings: dict[str, Any] = {"once": speed, "full": Scale(2.0), "quick": Scale(1.0), "show": show, **changes}
    return Study("a-method: the paper's claims", measure, claims(), **settings)


def test_a_report_of_all_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    report = study()(seeds=3)
    assert report.tables[0].rows == [[2.0], [3.0], [4.0]] and report.facts["speed"] == 3.0
    assert [c.verdict for c in report.claims] == ["holds", "not shown at this scale"]
    assert report.claims[0].measured == "200 (100 to 300) points" and report.claims[0].rule == "above 2.0"
    assert report.claims[1].measured == "not measured: too large"
    assert report.facts["seeds"] == 3 and report.facts["quick"] is False and report.facts["seconds"] >= 0
    assert not list((tmp_path / "studies").iterdir()), "nothing is kept of a complete run"
    quick = study()(seeds=5, quick=True)
    assert quick.tables[0].rows == [[1.0], [2.0]] and quick.facts["quick"] is True


def test_the_same_in_processes(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    scale = Scale(2.0, str(marks))
    one, two = (study(full=scale)(seeds=3, jobs=jobs, state=tmp_path / str(jobs)) for jobs in (1, 2))
    assert one.tables == two.tables and one.claims == two.claims
    pids = {p.name.split("-")[1] for p in marks.iterdir()}
    assert len(pids) >= 2 and str(os.getpid()) in pids


def test_finished_seeds_are_kept_when_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "cache"))
    marks = tmp_path / "marks"
    marks.mkdir()
    state = tmp_path / "state"
    with pytest.raises(RuntimeError, match="seed 2 fails"):
        Study("s", fails_once, [], full=Scale(0.0, str(marks)))(seeds=4, state=state)
    report = Study("s", fails_once, [], full=Scale(0.0, str(marks)))(seeds=4, state=state)
    counts = [sum(p.name.startswith(f"{seed}-") for p in marks.iterdir()) for seed in range(4)]
    assert counts == [1, 1, 2, 1] and report.facts["seeds"] == 4
    assert len(list(state.glob("*.json"))) == 4, "a folder of the caller's own is kept"
    Study("s", fails_once, [], full=Scale(1.0, str(marks)))(seeds=1, state=state)
    assert sum(p.name.startswith("0-") for p in marks.iterdir()) == 2, "another scale is another measurement"


def fails_once(seed: int, scale: Scale) -> dict[str, Any]:
    """Fails for seed 2 the first time."""
    first = not [p for p in Path(scale.folder).iterdir() if p.name.startswith("2-")]
    (Path(scale.folder) / f"{seed}-{time.time_ns()}").touch()
    if seed == 2 and first:
        raise RuntimeError("seed 2 fails")
    return {"seed": seed}


def test_a_process_that_dies_is_reported_and_costs_only_its_seed(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    mortal = Study("s", die, [], full=Scale(0.0, str(marks)))
    with pytest.raises(RuntimeError, match=r"died.*--jobs.*kept"):
        mortal(seeds=2, jobs=2, state=tmp_path / "state")
    assert len(list((tmp_path / "state").glob("*.json"))) == 1
    assert mortal(seeds=2, jobs=2, state=tmp_path / "state").facts["seeds"] == 2


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Without a folder of one's own: what is finished waits in the cache until the run is complete."""
    (tmp_path / "slow_study.py").write_text(textwrap.dedent("""
        import pathlib, time
        from looseleaf_lab.study import Study

        def measure(seed, scale):
            pathlib.Path(f"seed-{seed}-{time.time_ns()}").touch()
            time.sleep(60 if seed == 2 and len(list(pathlib.Path().glob("seed-2-*"))) == 1 else 0)
            return {"seed": seed}

        study = Study("slow", measure, [])
        if __name__ == "__main__":
            import slow_study
            print(slow_study.study(seeds=4).facts["seeds"])
    """))
    environment = {**os.environ, "LOOSELEAF_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "slow_study.py"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("seed-2-*")) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"
    assert [len(list(tmp_path.glob(f"seed-{n}-*"))) for n in range(4)] == [1, 1, 2, 1]


def test_what_was_measured_by_other_code_is_not_taken(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        from looseleaf_lab.study import Study

        def measure(seed, scale):
            return {"value": VALUE}

        study = Study("changing", measure, [], facts=lambda results: {"values": results.values("value")})
    """)
    run = "import changing, json; print(json.dumps(changing.study(seeds=1, state='state').facts['values']))"
    found = []
    for value in (1, 2, 2):
        (tmp_path / "changing.py").write_text(code.replace("VALUE", str(value)) + f"# {value}\n")
        done = subprocess.run([sys.executable, "-B", "-c", run], cwd=tmp_path, capture_output=True, text=True,
                              check=True)
        found.append(json.loads(done.stdout))
    assert found == [[1], [2], [2]]
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_claims_made_from_the_results_and_a_study_without_seeds(tmp_path: Path) -> None:
    def decided(results: Results) -> list[StudyClaim]:
        return [StudyClaim(f"claim {n}", "s", "p", "r", lambda r: (None, "m")) for n in range(len(results.once))]

    made = Study("once", None, decided, once=speed)(state=tmp_path)
    assert [c.statement for c in made.claims] == ["claim 0"] and made.facts["seeds"] == 0


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"seeds": 1.5}, {"jobs": 0}, {"seeds": True}])
def test_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(seeds|jobs): expected an integer >= 1, got"):
        study()(**wrong)


def test_results() -> None:
    results = Results([{"a": {"1": 2.0}, "b": [1, 2]}, {"a": {"1": 4.0}, "b": [3, 4]}], {}, [0, 1], None, False)
    assert results.values("a", 1) == [2.0, 4.0] and results.values("b", 0) == [1, 3]
    assert isinstance(results.interval("a", "1"), Interval) and results.interval("a", 1).value == 3.0
    assert results.mean("a", 1) == 3.0 and results.joined("b") == [1, 2, 3, 4]
    with pytest.raises(KeyError, match=r"no 'c' at .'a'.: there is 1"):
        results.values("a", "c")
    with pytest.raises(KeyError, match="there is 2 entries"):
        results.values("b", 7)


def test_verdicts_of_intervals() -> None:
    assert above((2, 1, 3)) is True and above((0, -1, 1)) is None and above((-2, -3, -1)) is False
    assert below((2, 1, 3), 5) is True and below((2, 1, 3), 2) is None and below((2, 1, 3), 0) is False
    assert every(True, None) is None and every(True, False, None) is False and every() is True
    assert above((-1, -2, 0)) is None and above((-1, -2, 0), touching=False) is False
    assert above((0, 0, 1), touching=False) is None and above((1, 0.1, 2), touching=False) is True
    assert below((1, 0, 2)) is None and below((1, 0, 2), touching=False) is False


@pytest.mark.parametrize("quick", [True, False])
def test_claims_whose_verdict_is_at_hand(quick: bool) -> None:
    def claimed(results: Results) -> Iterator[Claim | StudyClaim]:
        yield results.claim("s", "source", "p", "r", True, "m", count="splits")
        yield results.claim("s", "source", "p", "r", False, "m", any_scale=True)
        yield StudyClaim("s", "source", "p", "r", unmeasured="not measured")
        yield from results.unmeasured("source", "p", {"s": "a GPU"})

    report = Study("s", measure, claimed).report(Results([{}, {}], {}, [0, 1], None, quick))
    assert [c.verdict for c in report.claims] == [
        "not shown at this scale" if quick else "holds", "does not hold", *["not shown at this scale"] * 2]
    assert [c.measured for c in report.claims] == ["m; 2 splits", "m", "not measured", "not measured: needs a GPU"]
    assert report.claims[-1].rule == "none set"


def test_rows_name_their_columns() -> None:
    report = Report("r")
    table = add_table(report, "t", ({"seed": n, "gain": Interval(n, n - 1, n + 1), "cost": Interval(0, -1, 1)}
                                    for n in (1, 2)), note="n")
    assert table.columns == ["seed", "gain", "low", "high", "cost", "cost low", "cost high"] and table.note == "n"
    assert table.rows == [[1, 1, 0, 2, 0, -1, 1], [2, 2, 1, 3, 0, -1, 1]] and report.tables == [table]
    with pytest.raises(ValueError, match=r"'t': expected the columns \['a'\] in each row, got \['b'\]"):
        add_table(report, "t", [{"a": 1}, {"b": 1}])


def test_a_statistic_of_pairs_is_resampled_by_pairs() -> None:
    above, under = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])
    assert resampled(3, lambda i: above[i].sum(-1) / under[i].sum(-1), samples=50) == (2.0, 2.0, 2.0)
    mean = resampled(3, lambda i: above[i].mean(-1))
    assert mean == Results([{"x": x} for x in above], {}, [0, 1, 2], None, False).interval("x")


def test_curves() -> None:
    plain, around = curve("p", range(2), [1, 2.5], "line"), curve("a", (1, 2), [Interval(1, 0, 2), Interval(2, 1, 3)])
    assert plain == Series("p", [0.0, 1.0], [1.0, 2.5], style="line")
    assert around == Series("a", [1.0, 2.0], [1.0, 2.0], [0.0, 1.0], [2.0, 3.0])
