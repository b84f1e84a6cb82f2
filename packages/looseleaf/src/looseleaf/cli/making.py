"""``looseleaf new`` and ``looseleaf check``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import string
from importlib import resources
from pathlib import Path

from looseleaf import __version__, discovery

WORDS = {  # kind -> (base class, file of the method, word in a sentence)
    "attention": ("AttentionBackend", "backend", "attention backend"),
    "pruners": ("WeightPruner", "pruner", "pruner"),
    "prompts": ("PromptOptimizer", "optimizer", "prompt optimizer"),
    "probes": ("Probe", "probe", "probe"),
}


def new(arguments: argparse.Namespace) -> int:
    """Write the package and say what to do next."""
    folder = write_package(arguments.kind, arguments.name, Path(arguments.into))
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    if arguments.json:
        print(json.dumps({"folder": str(folder), "files": files}, indent=1))
    else:
        print(f"wrote {folder}:\n  " + "\n  ".join(files))
        print(f"next:\n  pip install -e {folder}\n  looseleaf list\n  looseleaf check {arguments.name}")
    return 0


def write_package(kind: str, name: str, into: Path) -> Path:
    """Write the third-party package ``looseleaf-<name>`` into a new folder of ``into``.

    Raises:
        ValueError: the name is not lower case letters, digits and dashes, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError("name: expected lower-case letters, digits and single dashes, beginning with a letter, such "
                         f"as 'my-method', got {name!r}")
    folder, package = into / f"looseleaf-{name}", "looseleaf_" + name.replace("-", "_")
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it, or choose another name or --into")
    base, module, word = WORDS[kind]
    values = {
        "name": name, "package": package, "kind": kind, "module": module, "base": base, "word": word,
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "core": __version__, "next_major": str(int(__version__.split(".")[0]) + 1),
        "needs": ', "looseleaf-text>=0.2,<1"' if kind == "prompts" else "",
    }
    root = resources.files("looseleaf") / "templates"
    targets = {
        "pyproject.toml": "pyproject.toml", "README.md": "README.md", "CHANGELOG.md": "CHANGELOG.md",
        "init.py": f"src/{package}/__init__.py", f"{kind}.py": f"src/{package}/{module}.py",
        "reproduction.py": f"src/{package}/reproduction.py", "test.py": f"tests/test_{package}.py",
    }
    for source, target in targets.items():
        text = (root / f"{source}.txt").read_text(encoding="utf-8")
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(string.Template(text).substitute(values), encoding="utf-8")
    (folder / "src" / package / "py.typed").touch()
    return folder


def check(arguments: argparse.Namespace) -> int:
    """Run the kit and print what came out of each check."""
    from looseleaf import progress, testing
    from looseleaf.testing.common import run

    entry = discovery.find(arguments.name, arguments.kind)
    checks = testing.checks(discovery.load(entry))
    outcomes = [run([one])[0] for one in progress.track(checks, f"checks of {entry.name}")]
    failed = [o for o in outcomes if o.problem is not None]
    skipped = [o for o in outcomes if o.skipped is not None]
    if arguments.json:
        print(json.dumps({"name": entry.name, "kind": entry.kind, "version": entry.version, "passes": not failed,
                          "checks": [dataclasses.asdict(o) for o in outcomes]}, indent=1))
        return 1 if failed else 0
    counts = f"{len(outcomes) - len(failed) - len(skipped)} checks pass" + "".join(
        f", {len(some)} {word}" for some, word in ((skipped, "skipped"), (failed, "fail")) if some)
    print(f"{entry.name} {entry.version} ({entry.kind}) {'fails' if failed else 'passes'} the kit: {counts}")
    for o in (*skipped, *failed):
        print(f"  skipped: {o.name}: {o.skipped}" if o.problem is None else f"  FAILS: {o.name}: {o.problem}")
    return 1 if failed else 0
