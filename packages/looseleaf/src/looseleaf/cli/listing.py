"""``looseleaf list``, ``info`` and ``doctor``: what is installed, and what is chosen on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from looseleaf import discovery
from looseleaf.errors import did_you_mean
from looseleaf.files import cache_dir
from looseleaf.report import Cell, Report, Table, format_cell, table_text

PACKAGES = ("torch", "triton", "transformers", "diffusers", "safetensors", "ray", "looseleaf-lab", "looseleaf-kernels")


def list_plugins(arguments: argparse.Namespace) -> int:
    """All installed plugins; new ones are tried once so that broken ones can be named."""
    found = discovery.check_imports(discovery.plugins(arguments.kind), say=lambda line: print(line, file=sys.stderr))
    if arguments.json:
        keep = ("name", "kind", "version", "dist", "paper", "summary", "broken")
        print(json.dumps([{k: v for k, v in asdict(p).items() if k in keep} for p in found], indent=1))
        return 0
    if not found:
        print("no plugin is installed: pip install looseleaf-flexprefill, for one")
        return 0
    table = Table("", ["name", "kind", "version", "paper"])
    for plugin in found:
        table.add(plugin.name, plugin.kind, plugin.version, plugin.paper)
    print(table_text(table).strip())
    for plugin in found:
        if plugin.broken:
            print(f"\nbroken: {plugin.qualified} ({plugin.kind}): {plugin.broken}")
    names = [(p.kind, p.name) for p in found]
    for kind, name in sorted({n for n in names if names.count(n) > 1}):
        dists = ", ".join(p.qualified for p in found if (p.kind, p.name) == (kind, name))
        print(f"\nambiguous: {name} ({kind}): say one of {dists}")
    return 0


def info(arguments: argparse.Namespace) -> int:
    """The paper behind a plugin, its parameters and its citation; or its table of data."""
    entry = discovery.find(arguments.name, arguments.kind)
    cls = discovery.load(entry)
    if arguments.table:
        return _table(entry, cls, arguments)
    if arguments.where:
        raise ValueError(f"--where {' '.join(arguments.where)} needs --table: it picks rows of a plugin's table")
    paper = cls.paper
    if arguments.bibtex and not arguments.json:
        print(paper.bibtex())
        return 0
    parameters = [{"name": p.name, "type": p.type_name, "default": _plain(p.default), "help": p.help}
                  for p in cls.parameter_info()]
    can_reproduce = any(r.name == entry.name for r in discovery.reproductions())
    if arguments.json:
        print(json.dumps({
            "name": entry.name, "kind": entry.kind, "dist": entry.dist, "version": entry.version,
            "class": f"{cls.__module__}.{cls.__qualname__}", "paper": asdict(paper), "parameters": parameters,
            "bibtex": paper.bibtex(), "reproduction": can_reproduce}, indent=1))
        return 0
    lines = [f"{entry.name} {entry.version} ({entry.kind}, from {entry.dist})", "", paper.title,
             ", ".join(paper.authors), " ".join(str(x) for x in (paper.venue or paper.year, paper.url or "")).strip()]
    if paper.code:
        lines.append(f"authors' code: {paper.code}")
    if paper.summary:
        lines += ["", paper.summary]
    lines += ["", "parameters"]
    for p in parameters:
        lines.append(f"  {p['name']}: {p['type']} = {p['default']!r}")
        if p["help"]:
            lines.append(f"      {p['help']}")
    if can_reproduce:
        lines += ["", f"claims: `looseleaf reproduce {entry.name}` measures them"]
    lines += ["", paper.bibtex()]
    print("\n".join(lines))
    return 0


def _table(entry: discovery.Installed, cls: Any, arguments: argparse.Namespace) -> int:
    make = getattr(cls, "table", None)
    if not callable(make):
        raise ValueError(f"plugin {entry.name!r} has no table (no classmethod table()); "
                         f"`looseleaf info {entry.name}` shows what there is")
    conditions = {}
    for text in arguments.where or []:
        field, found, value = text.partition("=")
        if not found:
            raise ValueError(f"--where: expected FIELD=VALUE, such as year=2021, got {text!r}")
        conditions[field.strip()] = value.strip()
    table = select(make(), conditions)
    if arguments.json:
        print(json.dumps([dict(zip(table.columns, row, strict=True)) for row in table.rows], indent=1,
                         ensure_ascii=False))
        return 0
    print(table_text(table))
    print(f"{len(table.rows)} rows")
    return 0


def select(table: Table, conditions: Mapping[str, object]) -> Table:
    """The rows of ``table`` for which every condition holds.

    Args:
        table: cells may hold several values, separated by ``"; "``.
        conditions: column -> value; case is ignored, and of a cell with several values one must match.

    Raises:
        ValueError: no such column, or no row of the table has that value there.
    """
    keep = list(table.rows)
    for field, wanted in conditions.items():
        if field not in table.columns:
            raise ValueError(f"the table has no column {field!r}; it has {', '.join(table.columns)}."
                             + did_you_mean(field, table.columns))
        place = table.columns.index(field)
        known = {value.casefold(): value for row in table.rows for value in _values(row[place])}
        if str(wanted).casefold() not in known:
            raise ValueError(f"no row has {field}={str(wanted)!r}; there is {', '.join(sorted(known.values()))[:400]}."
                             + did_you_mean(str(wanted), known.values()))
        keep = [row for row in keep if str(wanted).casefold() in (v.casefold() for v in _values(row[place]))]
    return Table(table.title, table.columns, keep, table.note)


def _values(cell: Cell) -> list[str]:
    return [] if cell is None else [part.strip() for part in format_cell(cell).split(";")]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)



def doctor(arguments: argparse.Namespace) -> int:
    """Print the state of the installation."""
    report = examine()
    print(report.to_json() if arguments.json else report.to_text())
    return 0


def examine() -> Report:
    """The state of the installation as a report."""
    import torch

    report = Report("looseleaf doctor", facts={
        "looseleaf": discovery.core_version(), "python": platform.python_version(),
        "platform": platform.platform(), "cache": str(cache_dir()),
        "threads": torch.get_num_threads()})
    versions = report.table("Packages", ["package", "version"])
    for name in PACKAGES:
        try:
            versions.add(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            versions.add(name, None)
    devices = report.table("Devices", ["device", "name", "capability", "memory GiB"])
    devices.add("cpu", platform.processor() or platform.machine(), None, _memory_gib())
    for n in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(n)
        devices.add(f"cuda:{n}", about.name, f"{about.major}.{about.minor}", about.total_memory / 2**30)
    _kernels(report)
    state = report.table("Plugins", ["plugin", "kind", "version", "state"])
    found = discovery.check_imports(discovery.plugins(), say=lambda line: print(line, file=sys.stderr))
    for plugin in found:
        state.add(plugin.qualified, plugin.kind, plugin.version, plugin.broken or "ready")
    return report


def _kernels(report: Report) -> None:
    import torch

    try:
        import looseleaf_kernels as kernels
    except ImportError as error:
        report.facts["kernels"] = f"not usable: {error}"
        return
    forced = os.environ.get("LOOSELEAF_KERNELS")
    report.facts["kernels forced by LOOSELEAF_KERNELS"] = forced or "no"
    table = report.table("Kernels", ["operation", "device", "dtype", "implementation", "why"])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for operation in kernels.operations():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                chosen, why = kernels.implementation_for(operation.name, torch.device(device), dtype, 64)
                table.add(operation.name, device, str(dtype).removeprefix("torch."), chosen, why)


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None
