"""``looseleaf list``, ``info`` and ``doctor``: what is installed, and what is chosen on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import itertools
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict

from looseleaf import __version__, discovery
from looseleaf.errors import did_you_mean
from looseleaf.files import cache_dir
from looseleaf.report import Cell, Report, Table, format_cell, table_text

PACKAGES = ("torch", "triton", "transformers", "diffusers", "safetensors", "ray", "looseleaf-lab", "looseleaf-kernels")


def list_plugins(arguments: argparse.Namespace) -> None:
    """All installed plugins, new ones tried once so that broken ones can be named; or all of this project."""
    if arguments.available:
        rows = [row for row in discovery.papers() if arguments.kind in (None, row["kind"])]
        print(json.dumps(rows, indent=1) if arguments.json else
              table_text(Table("", list(rows[0]), [list(row.values()) for row in rows])).strip())
        return
    plugins = discovery.check_imports(discovery.plugins(arguments.kind))
    if arguments.json:
        keep = ("name", "kind", "version", "dist", "paper", "summary", "broken")
        print(json.dumps([{k: v for k, v in asdict(p).items() if k in keep} for p in plugins], indent=1))
        return
    if not plugins:
        print("no plugin is installed: pip install looseleaf-flexprefill, for one")
        return
    print(table_text(Table("", ["name", "kind", "version", "paper"],
                           [[p.name, p.kind, p.version, p.paper] for p in plugins])).strip())
    for plugin in plugins:
        if plugin.broken:
            print(f"\nbroken: {plugin.qualified} ({plugin.kind}): {plugin.broken}")
    for (kind, name), claims in itertools.groupby(plugins, lambda p: (p.kind, p.name)):
        if len(names := [p.qualified for p in claims]) > 1:
            print(f"\nambiguous: {name} ({kind}): say one of {', '.join(names)}")


def info(arguments: argparse.Namespace) -> None:
    """The paper behind a plugin, its parameters and its citation; or its table of data."""
    entry = discovery.find(arguments.name, arguments.kind)
    cls = discovery.load(entry)
    if arguments.where and not arguments.table:
        raise ValueError(f"--where {' '.join(arguments.where)} needs --table: it picks rows of a plugin's table")
    if arguments.table:
        if not callable(getattr(cls, "table", None)):
            raise ValueError(f"plugin {entry.name!r} has no table (no classmethod table()); "
                             f"`looseleaf info {entry.name}` shows what there is")
        _show_table(cls.table(), arguments)
        return
    paper = cls.paper
    if arguments.bibtex and not arguments.json:
        print(paper.bibtex())
        return
    can_reproduce = any(r.name == entry.name for r in discovery.entries("reproductions"))
    if arguments.json:
        plain = (str, int, float, bool, type(None))
        print(json.dumps({
            "name": entry.name, "kind": entry.kind, "dist": entry.dist, "version": entry.version,
            "class": f"{cls.__module__}.{cls.__qualname__}", "paper": asdict(paper),
            "parameters": [{"name": p.name, "type": p.type_name, "help": p.help,
                            "default": p.default if isinstance(p.default, plain) else repr(p.default)}
                           for p in cls.parameter_info()],
            "bibtex": paper.bibtex(), "reproduction": can_reproduce}, indent=1))
        return
    print(f"{entry.name} {entry.version} ({entry.kind}, from {entry.dist})\n")
    print(paper.title, ", ".join(paper.authors), sep="\n")
    print(" ".join(str(x) for x in (paper.venue or paper.year, paper.url or "")).strip())
    if paper.code:
        print(f"authors' code: {paper.code}")
    if paper.summary:
        print(f"\n{paper.summary}")
    print("\nparameters")
    for p in cls.parameter_info():
        print(f"  {p.name}: {p.type_name} = {p.default!r}" + (f"\n      {p.help}" if p.help else ""))
    if can_reproduce:
        print(f"\nclaims: `looseleaf reproduce {entry.name}` measures them")
    print(f"\n{paper.bibtex()}")


def _show_table(table: Table, arguments: argparse.Namespace) -> None:
    conditions = {}
    for text in arguments.where or []:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--where: expected FIELD=VALUE, such as year=2021, got {text!r}")
        conditions[field.strip()] = value.strip()
    table = select(table, conditions)
    if arguments.json:
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print(f"{table_text(table)}\n{len(table.rows)} rows")


def select(table: Table, conditions: Mapping[str, object]) -> Table:
    """The rows of ``table`` for which every condition holds.

    Args:
        table: cells may hold several values, separated by ``"; "``.
        conditions: column -> value; case is ignored, and of a cell with several values one must match.

    Raises:
        ValueError: no such column, or no row of the table has that value there.
    """
    rows = table.rows
    for field, value in conditions.items():
        if field not in table.columns:
            raise ValueError(f"the table has no column {field!r}; it has {', '.join(table.columns)}."
                             + did_you_mean(field, table.columns))
        place, wanted = table.columns.index(field), str(value).casefold()
        known = {word.casefold(): word for row in table.rows for word in _values(row[place])}
        if wanted not in known:
            raise ValueError(f"no row has {field}={str(value)!r}; there is {', '.join(sorted(known.values()))[:400]}."
                             + did_you_mean(str(value), known.values()))
        rows = [row for row in rows if wanted in (word.casefold() for word in _values(row[place]))]
    return Table(table.title, table.columns, list(rows), table.note)


def _values(cell: Cell) -> list[str]:
    return [] if cell is None else [part.strip() for part in format_cell(cell).split(";")]


def doctor(arguments: argparse.Namespace) -> None:
    """Print the state of the installation."""
    import torch

    report = Report("looseleaf doctor", facts={
        "looseleaf": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "cache": str(cache_dir()), "threads": torch.get_num_threads()})
    report.table("Packages", ["package", "version"], [
        [name, next((dist.version for dist in metadata.distributions(name=name)), None)] for name in PACKAGES])
    devices = report.table("Devices", ["device", "name", "capability", "memory GiB"])
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})  # not on Windows
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if known else None
    devices.add("cpu", platform.processor() or platform.machine(), None, memory)
    for n in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(n)
        devices.add(f"cuda:{n}", about.name, f"{about.major}.{about.minor}", about.total_memory / 2**30)
    _kernels(report)
    report.table("Plugins", ["plugin", "kind", "version", "state"], [
        [p.qualified, p.kind, p.version, p.broken or "ready"] for p in discovery.check_imports(discovery.plugins())])
    print(report.to_json() if arguments.json else report.to_text())


def _kernels(report: Report) -> None:
    import torch

    try:
        import looseleaf_kernels as kernels
    except ImportError as error:
        report.facts["kernels"] = f"not usable: {error}"
        return
    report.facts["kernels forced by LOOSELEAF_KERNELS"] = os.environ.get("LOOSELEAF_KERNELS") or "no"
    table = report.table("Kernels", ["operation", "device", "dtype", "implementation", "why"])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for operation in kernels.operations():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                chosen, why = kernels.implementation_for(operation.name, torch.device(device), dtype, 64)
                table.add(operation.name, device, str(dtype).removeprefix("torch."), chosen, why)
