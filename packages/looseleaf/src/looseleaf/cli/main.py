"""The command line. Every command answers ``--help``; every command that prints results takes ``--json``.

Exit codes:
    0    done
    1    the answer is no: a conformance check failed, or a claim does not hold under ``--strict``
    2    bad input: an unknown option, a value out of range, a file that cannot be read or written
    3    the plugin is unknown, broken or ambiguous
    4    an optional package is missing
    5    a language-model server failed
    130  interrupted; what was done is kept and the same command resumes
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from looseleaf import errors
from looseleaf.plugin import KINDS

EXIT = {"no": 1, "input": 2, "plugin": 3, "missing": 4, "server": 5, "interrupted": 130}


class MissingPackage(errors.LooseleafError):
    """A command needs a package that is not installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    _complete(parser)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_plugin_options", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("\ninterrupted: what was done is kept; the same command resumes", file=sys.stderr)
        return EXIT["interrupted"]
    except BrokenPipeError:  # `looseleaf list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except errors.PluginError as error:
        return _fail(error, EXIT["plugin"])
    except MissingPackage as error:
        return _fail(error, EXIT["missing"])
    except errors.EndpointError as error:
        return _fail(error, EXIT["server"])
    except (ValueError, TypeError, OSError, errors.LooseleafError) as error:
        if os.environ.get("LOOSELEAF_TRACEBACK"):
            raise
        return _fail(error, EXIT["input"])


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from looseleaf import __version__

    parser = argparse.ArgumentParser(
        prog="looseleaf", description="Try research papers on your own PyTorch models.",
        epilog="Exit codes: 0 done; 1 the answer is no; 2 bad input; 3 plugin unknown or broken; "
               "4 optional package missing; 5 server failed; 130 interrupted. "
               "LOOSELEAF_TRACEBACK=1 shows the whole traceback of an error. "
               'Tab completion: eval "$(register-python-argcomplete looseleaf)"')
    parser.add_argument("--version", action="version", version=f"looseleaf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        # options of plugins must not be taken for the beginning of ours: --k is not --kind
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        made.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        made.set_defaults(run=run)
        return made

    def plugin_name(made: argparse.ArgumentParser) -> None:
        name = made.add_argument("name", help="name of the plugin, or dist:name")
        name.completer = _plugin_names  # type: ignore[attr-defined]
        made.add_argument("--kind", choices=KINDS, help="where one name is claimed by plugins of several kinds")

    def dtype(made: argparse.ArgumentParser) -> None:
        made.add_argument("--dtype", default="float32", help="of the model's weights, as bfloat16 (default float32)")

    def outputs(made: argparse.ArgumentParser) -> None:
        made.add_argument("--out", metavar="FILE", help="also write the report there (.html or .json)")
        made.add_argument("--seed", type=int, default=0, help="the only source of randomness (default 0)")

    made = command("list", "what is installed: name, kind, version, paper; broken plugins with the reason",
                   _lazy("listing", "list_plugins"))
    made.add_argument("--kind", choices=KINDS, help="only this kind")
    made = command("info", "paper, parameters with defaults and citation of a plugin", _lazy("listing", "info"))
    plugin_name(made)
    made.add_argument("--bibtex", action="store_true", help="print the citation only")
    made.add_argument("--table", action="store_true", help="print the table of data that some plugins bring")
    made.add_argument("--where", nargs="+", action="extend", metavar="FIELD=VALUE",
                      help="with --table: only rows where the column FIELD has VALUE; all conditions must hold")

    made = command("run", "run a plugin on a model; `looseleaf run NAME --help-plugin` lists its own options",
                   _lazy("running", "run"))
    plugin_name(made)
    made.add_argument("--model", default="smollm2", help="short name, folder or hub id (default smollm2)")
    dtype(made)
    made.add_argument("--text", metavar="FILE", help="text to run on (default: prose that ships with the lab)")
    made.add_argument("--context", type=int, default=2048, help="tokens of text for attention (default 2048)")
    made.add_argument("--task", help="task of a prompt optimiser (default: the lab's first)")
    made.add_argument("--calls", type=int, help="budget of a prompt optimiser in model calls")
    made.add_argument("--save", metavar="FILE", help="write what was found (masks, prompt)")
    made.add_argument("--save-model", metavar="DIR", help="pruners: write the pruned model there, for transformers")
    made.add_argument("--help-plugin", action="store_true", help="list the plugin's own options")
    made.set_defaults(takes_plugin_options=True)
    outputs(made)

    made = command("compare", "every installed plugin of a kind side by side, and against the unmodified model; "
                   "`looseleaf compare KIND --help-benches` lists what can be set", _lazy("running", "compare"))
    made.add_argument("kind", choices=KINDS)
    made.add_argument("--plugins", nargs="+", help="only these")
    made.add_argument("--bench", nargs="+", action="extend", help="only on these (default: all that suit a plugin)")
    made.add_argument("--help-benches", action="store_true", help="list the benches of KIND and their options")
    made.add_argument("--state", metavar="DIR", help="keep what is finished there; the same command resumes")
    made.set_defaults(takes_plugin_options=True)
    outputs(made)

    made = command("reproduce", "measure the paper's claims at small real scale", _lazy("running", "reproduce"))
    name = made.add_argument("name", help="name of the plugin, or dist:name")
    name.completer = _plugin_names  # type: ignore[attr-defined]
    made.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    made.add_argument("--quick", action="store_true", help="minutes instead of thoroughness")
    made.add_argument("--jobs", type=int, help="seeds measured at the same time (default 1)")
    made.add_argument("--state", metavar="DIR", help="keep finished seeds there (default: until the run is complete)")
    made.add_argument("--strict", action="store_true", help="exit with 1 if a claim does not hold")
    made.add_argument("--out", metavar="FILE", help="also write the report there (.html or .json)")

    made = command("new", "write a third-party plugin package, ready to install and check",
                   _lazy("making", "new"))
    made.add_argument("kind", choices=KINDS)
    made.add_argument("name", help="name of the plugin: lower case, digits and dashes")
    made.add_argument("--into", metavar="DIR", default=".", help="where the package's folder is made (default .)")
    made = command("check", "run the conformance kit on a plugin", _lazy("making", "check"))
    plugin_name(made)
    command("doctor", "versions, devices, caches, and which kernel implementation is chosen for what, and why",
            _lazy("listing", "doctor"))
    return parser


def need(module: str, package: str) -> object:
    """Import ``module``, or say which pip command brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this command needs {error.name}: pip install '{package}'") from error


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], int | None]:
    def call(arguments: argparse.Namespace) -> int | None:
        import importlib

        found: int | None = getattr(importlib.import_module(f"looseleaf.cli.{module}"), function)(arguments)
        return found

    return call


def _plugin_names(**_: object) -> list[str]:
    from looseleaf.discovery import plugins

    return sorted({p.name for p in plugins()})


def _complete(parser: argparse.ArgumentParser) -> None:
    if "_ARGCOMPLETE" in os.environ:  # set by argcomplete's own hook, so it is installed
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)


def _fail(error: BaseException, code: int) -> int:
    print(f"looseleaf: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
