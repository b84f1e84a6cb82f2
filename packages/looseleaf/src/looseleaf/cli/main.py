"""The command line. Every command answers ``--help``; every command that prints results takes ``--json``.

Exit codes:
    0    done
    1    the answer is no: a conformance check failed, or a claim does not hold under ``--strict``
    2    bad input: an unknown option, a value out of range, a file that cannot be read or written
    3    the plugin is unknown, broken or ambiguous
    4    an optional package is missing
    5    a language-model server failed
    130  interrupted; what was done is kept and the same command resumes
LOOSELEAF_TRACEBACK=1 shows the whole traceback of an error.
Tab completion: eval "$(register-python-argcomplete looseleaf)"

Packages add commands of their own by an entry point in the group ``looseleaf.commands``: a function that is called with
the commands so far, for :func:`add_command`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata as metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

from looseleaf import __version__, errors
from looseleaf.plugin import KINDS

OF_THE_LAB = {"run": "run a plugin on a model", "compare": "plugins side by side, and against the unmodified model",
              "reproduce": "measure the paper's claims at small real scale", "data": "sets and models in packages"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by argcomplete's own hook, so it is installed
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_plugin_options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    module, _, function = arguments.run.partition(":")
    try:
        return int(getattr(importlib.import_module(module), function)(arguments) or 0)
    except KeyboardInterrupt:
        print("\ninterrupted: what was done is kept; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `looseleaf list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, errors.LooseleafError) as error:
        if os.environ.get("LOOSELEAF_TRACEBACK"):
            raise
        print(f"looseleaf: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="looseleaf", description="Try research papers on your own PyTorch models.",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--version", action="version", version=f"looseleaf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = add_command(commands, "list", "what is installed: name, kind, version, paper; broken plugins with the reason",
                      "looseleaf.cli.listing:list_plugins")
    one.add_argument("--kind", choices=KINDS, help="only this kind")
    one.add_argument("--available", action="store_true", help="the plugins of this project, installed or not")
    one = add_command(commands, "info", "paper, parameters with defaults and citation of a plugin",
                      "looseleaf.cli.listing:info")
    add_plugin_name(one)
    one.add_argument("--bibtex", action="store_true", help="print the citation only")
    one.add_argument("--table", action="store_true", help="print the table of data that some plugins bring")
    one.add_argument("--where", nargs="+", action="extend", metavar="FIELD=VALUE",
                     help="with --table: only rows where the column FIELD has VALUE; all conditions must hold")
    for point in metadata.entry_points(group="looseleaf.commands"):
        try:
            point.load()(commands)
        except Exception as error:  # a third party's module may raise anything
            print(f"looseleaf: left out the commands {point.name} of {point.value}: {error}", file=sys.stderr)
    for name, help in OF_THE_LAB.items():
        if name not in commands.choices:
            add_command(commands, name, f"{help}; needs looseleaf-lab", "looseleaf.cli.main:needs_the_lab",
                        takes_plugin_options=True)
    one = add_command(commands, "new", "write a third-party plugin package, ready to install and check",
                      "looseleaf.cli.making:new")
    one.add_argument("kind", choices=KINDS)
    one.add_argument("name", help="name of the plugin: lower case, digits and dashes")
    one.add_argument("--into", metavar="DIR", default=".", help="where the package's folder is made (default .)")
    add_plugin_name(add_command(commands, "check", "run the conformance kit on a plugin", "looseleaf.cli.making:check"))
    add_command(commands, "doctor", "versions, devices, caches, and which kernel implementation is chosen for what, "
                "and why", "looseleaf.cli.listing:doctor")
    return parser


def add_command(commands: Any, name: str, help: str, run: str, *, takes_plugin_options: bool = False,
                ) -> argparse.ArgumentParser:
    """Add a command, which has ``--json`` already.

    Args:
        commands: what an entry point's function was called with.
        name, help: what ``looseleaf --help`` shows.
        run: ``module:function``, imported when the command is called; from the parsed arguments to the exit code, None
            for 0.
        takes_plugin_options: unknown options are no error, but handed over as ``arguments.rest``.
    """
    # options of plugins must not be taken for the beginning of ours: --k is not --kind
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.set_defaults(run=run, takes_plugin_options=takes_plugin_options)
    return parser


def add_plugin_name(parser: argparse.ArgumentParser, kind: bool = True) -> None:
    """Add the argument ``name``, with completion, and the option ``--kind`` that goes with it."""
    parser.add_argument("name", help="name of the plugin, or dist:name").completer = _names  # type: ignore[attr-defined]
    if kind:
        parser.add_argument("--kind", choices=KINDS, help="where one name is claimed by plugins of several kinds")


def _names(**_: object) -> list[str]:
    from looseleaf.discovery import plugins

    return sorted({p.name for p in plugins()})


def needs_the_lab(arguments: argparse.Namespace) -> int:
    """Say how to get a command of the lab."""
    raise errors.MissingPackageError(f"`looseleaf {arguments.command}` needs looseleaf_lab: pip install "
                                     "'looseleaf-lab[models,data]'")


if __name__ == "__main__":
    sys.exit(main())
