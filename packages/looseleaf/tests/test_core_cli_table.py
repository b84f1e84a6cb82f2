"""``looseleaf info NAME --table``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from looseleaf import Table
from looseleaf.cli.listing import select
from looseleaf.cli.main import main

Install = Callable[..., Path]

TABLE = '''
    @classmethod
    def table(cls):
        from looseleaf import Table
        return Table("Works", ["name", "year", "shape"], [
            ["one", 2020, "cloze"], ["two", 2021, "prefix; cloze"], ["three", 2021, None]], note="made up")
'''


@pytest.fixture
def installed(distribution: Install, good_source: str) -> None:
    distribution("looseleaf-tabled", "tabled", good_source + TABLE)
    distribution("looseleaf-made-up", "made-up", good_source)


@pytest.mark.usefixtures("installed")
def test_tables_are_shown_and_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tabled", "--table"]) == 0
    out = capsys.readouterr().out
    assert "Works" in out and "prefix; cloze" in out and "made up" in out and out.endswith("3 rows\n")
    assert main(["info", "tabled", "--table", "--where", "shape=Cloze", "--where", "year=2021", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "two", "year": 2021, "shape": "prefix; cloze"}]
    assert main(["info", "tabled", "--table", "--where", "shape=prefix", "year=2020"]) == 0
    assert capsys.readouterr().out.endswith("0 rows\n")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("argv", "says"), [
    (["made-up", "--table"], "'made-up' has no table"),
    (["tabled", "--table", "--where", "shap=cloze"], "'shap'; it has name, year, shape. Did you mean 'shape'?"),
    (["tabled", "--table", "--where", "shape=closed"], "there is cloze, prefix. Did you mean 'cloze'?"),
    (["tabled", "--table", "--where", "cloze"], "expected FIELD=VALUE"),
    (["tabled", "--where", "shape=cloze"], "needs --table"),
])
def test_bad_questions(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert main(["info", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_select_leaves_the_table_as_it_is() -> None:
    table = Table("t", ["a"], [["x; y"], ["y"], [None]])
    assert select(table, {"a": "X"}).rows == [["x; y"]] and len(table.rows) == 3
    assert select(table, {}).rows == table.rows
