"""The command line: output for people and machines, exit codes, helpful errors."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from looseleaf.cli.main import build_parser, main

Install = Callable[..., Path]


def test_list_names_the_broken_and_the_ambiguous(
        distribution: Install, good_source: str, capsys: pytest.CaptureFixture[str]) -> None:
    distribution("looseleaf-one", "same", good_source)
    distribution("other-two", "same", good_source)
    distribution("looseleaf-bad", "bad", "raise RuntimeError('no such luck')")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "broken: looseleaf-bad:bad (probes): RuntimeError: no such luck" in out
    assert "looseleaf-one:same, other-two:same" in out


def test_list_json(distribution: Install, good_source: str, capsys: pytest.CaptureFixture[str]) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    assert main(["list", "--json", "--kind", "probes"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["made-up"]["version"] == "0.3.0"
    assert rows["made-up"]["broken"] is None


def test_list_available_shows_what_this_project_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--available"]) == 0
    assert "looseleaf-gram" in capsys.readouterr().out
    assert main(["list", "--available", "--json", "--kind", "attention"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} == {"attention"} and "flexprefill" in {row["plugin"] for row in rows}


def test_info_shows_parameters_and_citation(
        distribution: Install, good_source: str, capsys: pytest.CaptureFixture[str]) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    assert main(["info", "made-up"]) == 0
    out = capsys.readouterr().out
    assert "size: int = 3" in out and "how large; at least 1." in out and "@misc{lovelace2026" in out
    assert main(["info", "made-up", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"][0]["default"] == 3


@pytest.mark.parametrize(("argv", "code", "says"), [
    (["info", "nothing-like-it"], 3, "looseleaf list --available"),
    (["reproduce", "nothing-like-it"], 3, "looseleaf list --available"),
    (["new", "probes", "Not A Name"], 2, "lower-case"),
    (["check", "bad"], 3, "no such luck"),
])
def test_errors_and_exit_codes(distribution: Install, capsys: pytest.CaptureFixture[str],
                               argv: list[str], code: int, says: str) -> None:
    distribution("looseleaf-bad", "bad", "raise RuntimeError('no such luck')")
    assert main(argv) == code
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_unwritable_output_is_found_before_the_work(
        distribution: Install, good_source: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    assert main(["run", "made-up", "--out", str(tmp_path / "no" / "such" / "r.html")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_every_command_has_json_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    assert commands is not None
    wanted = {"list", "info", "run", "compare", "reproduce", "new", "check", "doctor"}
    assert set(commands) >= wanted
    for name in commands:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["run", "some-plugin", "--k", "3"], ["compare", "probes", "--json"],
                                  ["reproduce", "some-plugin"]])
def test_commands_of_the_lab_without_it(argv: list[str], monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])
    assert main(argv) == 4
    assert capsys.readouterr().err == (f"looseleaf: `looseleaf {argv[0]}` needs looseleaf_lab: "
                                       "pip install 'looseleaf-lab[models,data]'\n")
    assert argv[0] in build_parser().format_help()


def test_commands_of_somebody_else(distribution: Install, capsys: pytest.CaptureFixture[str]) -> None:
    distribution("looseleaf-odd", "odd", "raise RuntimeError('no such luck')", kind="commands")
    distribution("looseleaf-twice", "twice", """
        from looseleaf.cli.main import add_command

        def add(commands):
            add_command(commands, "double", "print it twice", "looseleaf_twice:run").add_argument("word")

        def run(arguments):
            print(arguments.word * 2, arguments.json)
    """, kind="commands", attribute="add")
    assert main(["double", "ab", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == "abab True\n" and "left out the commands odd of looseleaf_odd:Method: no such luck" in err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    tables = {t["title"]: t for t in json.loads(capsys.readouterr().out)["tables"]}
    assert ["torch", metadata.version("torch")] in tables["Packages"]["rows"]


def test_completion_knows_plugin_names(distribution: Install, good_source: str, tmp_path: Path) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    line, out = "looseleaf info made", tmp_path / "completions"
    subprocess.run(
        [sys.executable, "-c", "from looseleaf.cli.main import main; main([])"], capture_output=True,
        env={**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
             "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_IFS": "\n"})
    assert "made-up" in out.read_text()


def test_help_and_list_import_no_torch() -> None:
    code = ("import sys\nfrom looseleaf.cli.main import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "sys.exit('torch' in sys.modules or 'tyro' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
