"""Compare every number of every reproduction between two checkouts: did a change of structure change a method?

usage: same_numbers.py OLD NEW [--only NAME ...] [--python-old PYTHON] [--python-new PYTHON] [--keep DIR]

Runs `looseleaf reproduce NAME --quick --seeds 1 --json` for every plugin of both checkouts, each with the Python of its
own environment (CHECKOUT/.nox/shared unless given), one thread, and caches of their own. Numbers are taken from facts,
tables, figures, claims, arrays and strips in the order of the report; titles, names and words are left aside. Prints
one line a plugin and exits with 1 where a number differs. A number that is a time, a size in memory or a version is no
result and is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
NO_RESULT = ("second", "time", "speed", "ratio", "memory", " mb", "mib", "bytes", "torch", "version", "threads",
             "faster", "latency", "python", "cores", "device")


def names(checkout: Path) -> list[str]:
    """The plugins of a checkout."""
    return sorted(p.parent.name for p in checkout.glob("plugins/*/*/pyproject.toml"))


def report(checkout: Path, python: str, name: str, keep: Path) -> Any:
    """The report of a reproduction, from ``keep`` where it is there already.

    Raises:
        RuntimeError: the reproduction failed.
    """
    path = keep / f"{name}.json"
    if not path.exists():
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "LOOSELEAF_CACHE": str(keep / "cache")}
        done = subprocess.run([python, "-m", "looseleaf.cli.main", "reproduce", name, "--quick", "--seeds", "1",
                               "--json"], cwd=checkout, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{checkout}: {name}: {done.stderr.strip()[-500:]}")
        path.write_text(done.stdout, encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(value: Any, label: str = "") -> Iterator[float]:
    """Every number of a report that is a result, in order."""
    if any(word in label.lower() for word in NO_RESULT):
        return
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(n) for n in NUMBER.findall(value))
    elif isinstance(value, dict) and "columns" in value and "rows" in value:
        if not any(word in value["title"].lower() for word in NO_RESULT):
            for row in value["rows"]:
                for column, cell in zip(value["columns"], row, strict=True):
                    yield from numbers(cell, column)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in ("title", "note", "schema", "rule", "statement", "source", "paper", "x_label", "y_label"):
                continue
            yield from numbers(each, f"{value.get('title', '')} {value.get('statement', '')} {key}")
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each, label)


def rounded(values: Iterator[float]) -> Counter[str]:
    """How often each number appears, to twelve digits: the order of tables may change, their numbers may not."""
    return Counter(f"{value:.12g}" for value in values)


def main() -> int:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="+", help="these plugins alone")
    parser.add_argument("--python-old", help="default OLD/.nox/shared/bin/python")
    parser.add_argument("--python-new", help="default NEW/.nox/shared/bin/python")
    parser.add_argument("--keep", type=Path, help="keep reports in DIR/old and DIR/new, and use those that are there")
    given = parser.parse_args()
    keep = given.keep or Path(tempfile.mkdtemp())
    wrong = 0
    for name in given.only or [n for n in names(given.old) if n in names(given.new)]:
        found = []
        for side in ("old", "new"):
            checkout: Path = getattr(given, side).resolve()
            python = getattr(given, f"python_{side}") or str(checkout / ".nox/shared/bin/python")
            (keep / side).mkdir(parents=True, exist_ok=True)
            try:
                found.append(rounded(numbers(report(checkout, python, name, keep / side))))
            except RuntimeError as error:
                print(f"{name}: failed: {error}", flush=True)
                break
        if len(found) < 2:
            wrong += 1
            continue
        lost, gained = found[0] - found[1], found[1] - found[0]
        same = sum((found[0] & found[1]).values())
        print(f"{name}: {same} numbers the same"
              + (f", {sum(lost.values())} only in OLD: {_some(lost)}" if lost else "")
              + (f", {sum(gained.values())} only in NEW: {_some(gained)}" if gained else ""), flush=True)
        wrong += bool(lost)
    return 1 if wrong else 0


def _some(values: Counter[str]) -> str:
    return ", ".join(list(values)[:12]) + (" ..." if len(values) > 12 else "")


if __name__ == "__main__":
    sys.exit(main())
