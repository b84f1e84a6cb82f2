"""``looseleaf run``, ``compare`` and ``reproduce``: the measuring itself lives in the lab."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from looseleaf import discovery
from looseleaf.cli.main import EXIT, need
from looseleaf.report import Report

LAB = "looseleaf-lab[models,data]"


def run(arguments: argparse.Namespace) -> int:
    """One plugin on one model."""
    entry = discovery.find(arguments.name, arguments.kind)
    cls = discovery.load(entry)
    plugin = plugin_from_options(cls, entry.name, ["--help"] if arguments.help_plugin else arguments.rest)
    _check_output(arguments.out)
    _check_output(arguments.save)
    commands: Any = need("looseleaf_lab.commands", LAB)
    with _messages_to_stderr(arguments.json):
        report = commands.run(
            entry.kind, entry.name, plugin, model=arguments.model, dtype=arguments.dtype, text=arguments.text,
            context=arguments.context, task=arguments.task, calls=arguments.calls, save=arguments.save,
            save_model=arguments.save_model, seed=arguments.seed)
    return _show(report, arguments)


def compare(arguments: argparse.Namespace) -> int:
    """Every installed plugin of a kind."""
    found = [e for e in discovery.plugins(arguments.kind) if not arguments.plugins or e.name in arguments.plugins
             or e.qualified in arguments.plugins]
    for name in arguments.plugins or []:
        discovery.find(name, arguments.kind)  # names what is unknown or ambiguous
    ready: list[tuple[str, Any]] = []
    for entry in found:
        try:
            ready.append((entry.name, discovery.load(entry)))
        except discovery.BrokenPluginError as error:  # one broken plugin must not stop the others
            print(f"left out: {error}", file=sys.stderr)
    _check_output(arguments.out)
    commands: Any = need("looseleaf_lab.commands", LAB)
    with _messages_to_stderr(arguments.json):
        report = commands.compare(
            arguments.kind, ready, model=arguments.model or ["smollm2"], dtype=arguments.dtype,
            contexts=arguments.context, sparsities=arguments.sparsity, tasks=arguments.task, calls=arguments.calls,
            seed=arguments.seed, seeds=arguments.seeds, passkeys=arguments.passkeys,
            denoising=arguments.denoising, state=arguments.state)
    return _show(report, arguments)


def reproduce(arguments: argparse.Namespace) -> int:
    """The paper's claims, measured."""
    function = discovery.load(discovery.find_reproduction(arguments.name))
    _check_output(arguments.out)
    try:
        with _messages_to_stderr(arguments.json):
            report = function(seeds=arguments.seeds, quick=arguments.quick)
    except ModuleNotFoundError as error:
        from looseleaf.cli.main import MissingPackage

        raise MissingPackage(f"the reproduction needs {error.name}: "
                             f"pip install 'looseleaf-{arguments.name}[reproduce]'") from error
    code = _show(report, arguments)
    failed = any(claim.verdict == "does not hold" for claim in report.claims)
    return EXIT["no"] if arguments.strict and failed else code


def plugin_from_options(cls: Any, name: str, options: list[str]) -> Any:
    """An instance of the plugin from command-line options made from its fields and docstring."""
    import tyro

    try:
        return tyro.cli(cls, args=options, prog=f"looseleaf run {name}", description=cls.paper.title)
    except ValueError:
        raise
    except SystemExit as stop:
        # tyro has said what is wrong, or printed the help that was asked for
        raise SystemExit(0 if stop.code in (0, None) else EXIT["input"]) from None


def _check_output(path: str | None) -> None:
    """Find out now, not after minutes of work, that the result cannot be written."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: the folder {folder} does not exist")
    probe = folder / f".{Path(path).name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}. Choose a folder you may write to") from error


def _messages_to_stderr(json: bool) -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()


def _show(report: Report, arguments: argparse.Namespace) -> int:
    if not dataclasses.is_dataclass(report):
        raise TypeError(f"expected a Report, got {type(report).__name__}")
    print(report.to_json() if arguments.json else report.to_text())
    if arguments.out:
        if arguments.out.endswith(".json"):
            report.to_json(arguments.out)
        else:
            html: Any = need("looseleaf_lab.html", LAB)
            html.write([report], arguments.out)
        print(f"wrote {arguments.out}", file=sys.stderr)
    return 0
