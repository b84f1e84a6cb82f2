"""Benches: what a bench is, how several are run, and their options on the command line; probes side by side."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch

import looseleaf
from looseleaf import Paper, Plugin, Probe, Report
from looseleaf.discovery import entries, load
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf_lab.benches import Bench, Probes, compare, compare_probes, probes
from looseleaf_lab.command_line import benches_from_options, plugin_from_options

PAPER = Paper("A paper", ("Some One",), 2020)


def rows(report: Report, title: str) -> list[dict[str, Any]]:
    table = next(t for t in report.tables if t.title == title)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@dataclasses.dataclass
class Count(Probe):
    """Counts parameters."""

    paper: ClassVar[Paper] = PAPER
    fail: bool = False

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        if self.fail:
            raise RuntimeError("no")
        report = Report("count", {"parameters": sum(p.numel() for p in parts(subject)[0].parameters())})
        report.table("t", ["a"], [[math.nan]])
        return report


@dataclasses.dataclass
class Norm(Count):
    """Norms of weights."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        if self.fail:
            raise RuntimeError("no")
        norms = [float(p.detach().norm()) for p in parts(subject)[0].parameters()]
        report = Report("norm", {"first": norms[0]})
        report.table("norms", ["place", "norm"], [["first", norms[0]], ["all", sum(norms)]])
        if norms[0]:
            report.table("only the dense", ["norm"], [[norms[0]]])
        report.figure("norms", x_label="weight", y_label="norm",
                      series=[looseleaf.Series("norm", [float(n) for n in range(len(norms))], norms)])
        report.figure("picture", image=[norms])
        report.claims.append(looseleaf.Claim.decide(True, statement="norms are norms", source="s", paper="p",
                                                    measured="m", rule="r"))
        return report


@dataclasses.dataclass
class Needy(Count):
    """Has no default."""

    what: int = dataclasses.field(default=None)  # type: ignore[assignment]

    def validate(self) -> None:
        self.check("what", self.what is not None, "a number")


# ------------------------------------------------------------------------------------------------- several benches

@dataclasses.dataclass
class Long(Bench):
    """A bench.

    Args:
        model: what to load.
        context: how long.
        size: small or large.
    """

    model: str = "a"
    context: Annotated[tuple[int, ...], In(">= 16")] = (64,)
    size: Literal["small", "large"] = "small"
    interface: ClassVar[type[Plugin]] = Probe

    def run(self, plugins: Mapping[str, Any], *, state: Any = None, seed: int = 0, progress: Any = None) -> Report:
        report = Report("Long", {"plugins": ", ".join(plugins), "seed": seed, "size": self.size})
        report.table("Lengths", ["n"], [[n] for n in self.context])
        report.table("Left out", ["plugin", "reason"], [["odd", "failed"]])
        return report


@dataclasses.dataclass
class Wide:
    """A bench that does not use the base class.

    Args:
        model: several.
        verbose: much.
    """

    model: tuple[str, ...] = ("b",)
    verbose: bool = False
    interface: ClassVar[type[Plugin]] = Probe

    def suits(self, plugin: Any) -> str | None:
        return None if issubclass(plugin, Norm) else "has no norm"

    def run(self, plugins: Mapping[str, Any], *, state: Any = None, seed: int = 0, progress: Any = None) -> Report:
        return Report("Wide", {"plugins": ", ".join(plugins), "seed": seed})


@dataclasses.dataclass
class Missing(Long):
    """Needs what is not there."""

    def run(self, plugins: Mapping[str, Any], **options: Any) -> Report:
        raise ModuleNotFoundError("pip install it")


def test_every_bench_that_suits_a_plugin_is_run() -> None:
    report = compare({"count": Count, "norm": Norm}, {"long": Long(), "wide": Wide()}, seed=3)
    assert report.title == "Plugins side by side" and report.facts == {
        "long: plugins": "count, norm", "seed": 3, "size": "small", "wide: plugins": "norm"}
    assert rows(report, "Lengths") == [{"n": 64}]
    assert rows(report, "Left out") == [{"bench": "long", "plugin": "odd", "reason": "failed"},
                                        {"bench": "wide", "plugin": "count", "reason": "has no norm"}]


def test_a_bench_without_plugins_is_run_only_when_named() -> None:
    report = compare({"count": Count}, {"long": Long(), "wide": Wide()})
    assert report.title == "Long" and report.facts["plugins"] == "count"
    report = compare({"count": Count}, {"wide": Wide()}, named=True)
    assert report.facts == {"plugins": "", "seed": 0}
    report = compare({"count": Count}, {"wide": Wide()})
    assert rows(report, "Left out") == [{"bench": "wide", "plugin": "count", "reason": "has no norm"}]
    with pytest.raises(ValueError, match="expected plugins and a bench for one of them, got 0 plugins"):
        compare({}, {"long": Long()})


def test_missing_packages_cost_one_bench_only() -> None:
    report = compare({"norm": Norm}, {"missing": Missing(), "wide": Wide()})
    assert report.title == "Wide"
    assert rows(report, "Left out") == [
        {"bench": "missing", "plugin": "norm", "reason": "ModuleNotFoundError: pip install it"}]
    with pytest.raises(ModuleNotFoundError, match="pip install it"):
        compare({"norm": Norm}, {"missing": Missing()})


def test_options_make_benches() -> None:
    classes = {"long": Long, "wide": Wide}
    assert benches_from_options(classes, "probes", []) == {"long": Long(), "wide": Wide()}
    made = benches_from_options(classes, "probes", ["--context", "16", "32", "--model", "x", "--verbose"])
    assert made == {"long": Long("x", (16, 32)), "wide": Wide(("x",), True)}
    made = benches_from_options({"wide": Wide}, "probes", ["--model", "x", "--no-verbose", "--model=y"])
    assert made == {"wide": Wide(("x", "y"))}
    assert benches_from_options({"long": Long}, "probes", ["--context"])["long"].context == ()


def test_plugin_options_come_from_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert plugin_from_options(looseleaf.SlidingWindow, "sliding-window", ["--window", "9"]).window == 9
    for options, code in ((["--window", "many"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            plugin_from_options(looseleaf.SlidingWindow, "sliding-window", options)
        assert stop.value.code == code
    assert "--window INT" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("options", "message"), [
    (["--contxt", "16"], "--contxt: expected an option of long, wide.*Did you mean 'context'"),
    (["16"], "expected options such as --model, got '16'"),
    (["--model", "x", "--model", "y"], "--model: expected one value for the bench long, got x y"),
    (["--model"], "got none")])
def test_options_that_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benches_from_options({"long": Long, "wide": Wide}, "probes", options)


@pytest.mark.parametrize(("options", "message"), [
    (["--size", "huge"], "small"), (["--context", "8"], "Long.context: expected a sequence of integers >= 16")])
def test_values_that_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benches_from_options({"long": Long}, "probes", options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_installed_benches_cover_every_kind_and_explain_their_options() -> None:
    classes = {entry.name: load(entry) for entry in entries("benches")}
    assert {cls.interface.kind for cls in classes.values()} == {"attention", "pruners", "prompts", "probes"}
    for cls in classes.values():
        cls()
        from looseleaf.plugin import docstring_arguments

        helps = docstring_arguments(cls.__doc__)
        assert all(helps.get(f.name) for f in dataclasses.fields(cls)), cls


# ------------------------------------------------------------------------------------------------- probes

def test_probes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    report = compare_probes({"tiny": (model, tokenizer)}, {"count": Count(), "fails": Count(fail=True)}, state=tmp_path)
    assert report.facts["count on tiny: parameters"] == sum(p.numel() for p in model.parameters())
    assert rows(report, "Left out")[0]["plugin"] == "fails on tiny"
    again = compare_probes({"tiny": (model, tokenizer)}, {"count": Count()}, state=tmp_path)
    assert again.tables[0].rows == report.tables[0].rows


def test_probes_side_by_side(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Rows of the same place below each other, curves in one figure; a kept cell is of one set of weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).zero_()
    both = {"dense": (model, tokenizer), "pruned": other}
    report = compare_probes(both, {"norm": Norm(), "count": Count()}, state=tmp_path)
    table = next(t for t in report.tables if t.title == "norm: norms")
    assert table.columns == ["model", "place", "norm"]
    assert [r[:2] for r in table.rows] == [["dense", "first"], ["pruned", "first"], ["dense", "all"], ["pruned", "all"]]
    assert table.rows[0][2] != 0 == table.rows[1][2]
    assert [t.title for t in report.tables if "only" in t.title] == ["norm: only the dense"]
    assert [[s.name for s in f.series] for f in report.figures[:1]] == [["norm, dense", "norm, pruned"]]
    assert [f.title for f in report.figures[1:]] == ["norm: picture, dense", "norm: picture, pruned"]
    assert [c.statement for c in report.claims] == ["dense: norms are norms", "pruned: norms are norms"]
    assert report.facts["count: parameters"] == sum(p.numel() for p in model.parameters())
    assert report.facts["norm: dense: first"] > report.facts["norm: pruned: first"] == 0
    again = compare_probes({"x": (other, tokenizer)}, {"norm": Norm(fail=True)}, state=tmp_path)
    assert rows(again, "Left out"), "other parameters, so nothing kept is taken"
    again = compare_probes({"x": (other, tokenizer)}, {"norm": Norm()}, state=tmp_path)
    assert again.facts["norm on x: first"] == 0


def test_a_subject_that_is_no_model(tmp_path: Path) -> None:
    class Rules:
        parameters = staticmethod(list)

    @dataclasses.dataclass
    class Asks(Count):
        def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
            return Report("asks", {"rules": len(subject.parameters())})

    report = compare_probes({"game": Rules()}, {"asks": Asks()}, state=tmp_path)
    assert report.facts["asks on game: rules"] == 0 and not list(tmp_path.iterdir()), "nothing tells it from others"


def test_the_bench_of_probes(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.models, "load", lambda name, dtype=None, device=None: (model, tokenizer))
    report = Probes(model=("a", "b", "a")).run({"count": Count, "needy": Needy})
    assert [r["model"] for r in rows(report, "Probes")] == ["a", "b"] and report.facts["model"].startswith("a (Llama")
    assert rows(report, "Left out")[0]["plugin"] == "needy"
    with pytest.raises(ValueError, match=r"Probes.model: expected one model or more"):
        Probes(model=())
