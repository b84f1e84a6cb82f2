"""Plugins, papers and reports."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest

from looseleaf import Claim, Figure, Paper, Plugin, Report, Series
from looseleaf.files import write_text
from looseleaf.plugin import In, OneOf, docstring_arguments


@dataclasses.dataclass
class Method(Plugin):
    """A method.

    Args:
        gamma: share to keep,
            in (0, 1].
        steps: how many.
    """

    gamma: Annotated[float, In("(0, 1]")] = 0.9
    steps: int = 3
    paper: ClassVar[Paper] = Paper("A title of a paper", ("Grace Hopper", "Alan Turing"), 2024, arxiv="2401.00001",
                                   venue="ICML 2024")

    def validate(self) -> None:
        self.check("steps", self.steps < 10 or self.gamma < 1, "below 10 where gamma is 1")


def test_a_bad_value_names_field_value_and_range() -> None:
    with pytest.raises(ValueError, match=r"Method\.gamma: expected a number in \(0, 1\], got 1\.5"):
        Method(gamma=1.5)
    with pytest.raises(ValueError, match=r"Method\.steps: expected below 10 where gamma is 1, got 12"):
        Method(gamma=1, steps=12)


@dataclasses.dataclass
class Ranges(Plugin):
    """Fields of every type that is checked."""

    rate: Annotated[float, In("> 0")] = 1.0
    limit: Annotated[float, In("> 0", infinite=True)] = math.inf
    count: Annotated[int | None, In(">= 1")] = None
    sizes: Annotated[tuple[int, ...], In("[1, 9]")] = (1, 2)
    block: Annotated[int, OneOf(16, 32)] = 16
    mode: Literal["a", "b"] = "a"
    exact: bool = False
    paper: ClassVar[Paper] = Method.paper


@pytest.mark.parametrize(("field", "value", "expected"), [
    ("rate", math.nan, "a number > 0"), ("rate", math.inf, "a number > 0"), ("rate", "1", "a number > 0"),
    ("rate", True, "a number > 0"), ("limit", 0, "a number > 0"), ("count", 0, "None or an integer >= 1"),
    ("count", 1.5, "None or an integer >= 1"), ("sizes", (0,), r"a sequence of integers in \[1, 9\]"),
    ("sizes", 3, r"a sequence of integers in \[1, 9\]"), ("block", 17, "16 or 32"), ("mode", "c", "'a' or 'b'"),
    ("exact", 1, "True or False")])
def test_declared_ranges_are_checked(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"Ranges\.{field}: expected {expected}, got "):
        Ranges(**{field: value})  # type: ignore[arg-type]


def test_declared_ranges_take_what_they_should() -> None:
    Ranges(rate=np.float32(0.5), count=np.int64(3), sizes=[1, 9], block=32)  # type: ignore[arg-type]
    Ranges(rate=2, limit=3, count=None)
    with pytest.raises(ValueError, match="interval: expected text such as"):
        In("0 to 1")


def test_parameters_come_with_type_default_and_help() -> None:
    gamma, steps = Method.parameter_info()
    assert (gamma.name, gamma.type_name, gamma.default, gamma.help) == (
        "gamma", "float", 0.9, "share to keep, in (0, 1].")
    assert steps.help == "how many."
    assert Method(steps=5).hyperparameters() == {"gamma": 0.9, "steps": 5}


def test_docstring_section_ends_at_the_next_one() -> None:
    doc = "X.\n\n    Args:\n        a: one.\n        b: two\n            more.\n\n    Returns:\n        c: no."
    assert docstring_arguments(doc) == {"a": "one.", "b": "two more."}


def test_bibtex_holds_the_whole_reference() -> None:
    text = Method.paper.bibtex()
    assert text.startswith("@inproceedings{hopper2024title,")
    for part in ("Grace Hopper and Alan Turing", "2401.00001", "ICML 2024"):
        assert part in text


def test_paper_without_authors_is_refused() -> None:
    with pytest.raises(ValueError, match="author"):
        Paper("t", (), 2024)


def full_report() -> Report:
    report = Report("Everything", facts={"seed": 0, "loss": 0.5})
    report.table("t", ["a", "b"], [[1, "x"], [None, 2.5]], note="n")
    report.figure("f", series=[Series("s", [0, 1], [2, 3], low=[1, 2], high=[3, 4])])
    report.figures.append(Figure("map", image=[[0.0, 1.0], [1.0, 0.0]]))
    report.claims.append(Claim.decide(None, statement="s", source="Table 1", paper="2x [memory]", measured="1.5",
                                      rule="at least 2"))
    report.examples.append(("label", "text"))
    report.arrays["raw"] = [1, 2]
    return report


def test_strips() -> None:
    report = Report("x")
    strip = report.strip("tokens", ["a", " b", " c", " d"], [0.5, None, 1.0, 2.0], [True, True, False, True],
                         "low first")
    assert strip.text() == "[[a b]] c[[ d]]"
    assert "[[a b]] c[[ d]]\nlow first" in report.to_text()
    assert Report.from_dict(report.to_dict()).strips == report.strips
    both = Report("y")
    both.extend(report, "x: ")
    assert both.strips[0].title == "x: tokens" and report.strips[0].title == "tokens"
    with pytest.raises(ValueError, match="2 tokens, 1 values and 2 marks"):
        report.strip("t", ["a", "b"], [1.0], [True, False])
    old = report.to_dict()
    del old["strips"]
    assert Report.from_dict(old).strips == [], "reports of earlier versions have none"


def test_report_survives_json() -> None:
    report = full_report()
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert "not shown at this scale" in report.to_text()


def test_json_never_holds_nan() -> None:
    report = Report("x", facts={"a": math.nan, "b": [math.inf, 1.0]})
    assert json.loads(report.to_json())["facts"] == {"a": None, "b": [None, 1.0]}


def test_row_of_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 cells, as columns, got 1"):
        Report("x").table("t", ["a", "b"]).add(1)


def test_foreign_json_is_refused() -> None:
    with pytest.raises(ValueError, match="schema"):
        Report.from_dict({"title": "x"})


def test_a_failed_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
