"""Finding installed plugins through their entry points.

Listing reads the metadata of installed distributions only: no plugin and no torch is imported. Whether a plugin can be
imported is tried once per installation, in a process of its own, and remembered (see :func:`check_imports`), so that a
listing can say what is broken and still answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from looseleaf import __version__
from looseleaf.errors import AmbiguousPluginError, BrokenPluginError, UnknownPluginError, did_you_mean
from looseleaf.files import cache_dir, write_text
from looseleaf.moved import advice
from looseleaf.plugin import KINDS, Plugin


@dataclass(frozen=True)
class Installed:
    """One entry point of one distribution.

    Attributes:
        name: how users call the plugin.
        kind: one of :data:`looseleaf.plugin.KINDS`, ``"reproductions"`` or ``"benches"``.
        dist, version: of the distribution.
        value: ``module:attribute``.
        paper: URL of the paper from the distribution's metadata, or None.
        summary: one line from the metadata.
        broken: why it cannot be used, or None.
        stamp: changes whenever the distribution, or the core, is installed anew.
    """

    name: str
    kind: str
    dist: str
    version: str
    value: str
    paper: str | None = None
    summary: str = ""
    broken: str | None = None
    stamp: str = ""

    @property
    def qualified(self) -> str:
        """The name that is never ambiguous, ``dist:name``."""
        return f"{self.dist}:{self.name}"

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.dist} {self.version}"


def entries(*kinds: str) -> list[Installed]:
    """What installed distributions offer under these entry-point groups, by kind and name, from metadata alone."""
    points = metadata.entry_points()
    found = [_describe(kind, point, point.dist) for kind in kinds for point in points.select(group=f"looseleaf.{kind}")
             if point.dist is not None and point.dist.name]  # a damaged installation has none
    return sorted(found, key=lambda e: (kinds.index(e.kind), e.name, e.dist))


def plugins(kind: str | None = None) -> list[Installed]:
    """All installed plugins by kind and name; those made for another core are marked as broken.

    Args:
        kind: only this kind (one of ``attention``, ``pruners``, ``prompts``, ``probes``).

    Raises:
        ValueError: unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected {', '.join(KINDS)}, got {kind!r}.{did_you_mean(kind, KINDS)}")
    return entries(*((kind,) if kind else KINDS))


@functools.cache
def papers() -> list[dict[str, str]]:
    """The plugins of this project, installed or not: no other name may be suggested to whoever mistypes one."""
    return list(json.loads((resources.files("looseleaf") / "papers.json").read_text(encoding="utf-8")))


def find(name: str, kind: str | None = None) -> Installed:
    """The one installed plugin called ``name`` (or ``dist:name``).

    Args:
        name: of the plugin.
        kind: only this kind; ``"reproductions"`` and ``"benches"`` are looked for only if named here.

    Raises:
        UnknownPluginError: nothing of that name; the message has near names, or the pip command where it is ours.
        AmbiguousPluginError: several distributions or kinds claim the name.
    """
    kinds = (kind,) if kind else KINDS
    installed = entries(*kinds)
    dist, _, bare = name.rpartition(":")
    matches = [e for e in installed if e.name == bare and _plain(dist) in ("", _plain(e.dist))]
    if not matches:
        ours = {row["plugin"]: row["package"] for row in papers()}
        raise UnknownPluginError(
            f"no plugin called {name!r} ({' or '.join(kinds)}) is installed."
            + (f" This installs it: pip install {ours[name]}." if name in ours else
               did_you_mean(bare, sorted({*ours, *(e.name for e in installed)})))
            + " `looseleaf list` shows what is installed, `looseleaf list --available` what this project has")
    if len({e.dist for e in matches}) > 1:
        raise AmbiguousPluginError(
            f"{name!r} is claimed by {' and '.join(f'{e.dist} {e.version}' for e in matches)}: use "
            f"{' or '.join(repr(e.qualified) for e in matches)}, or uninstall one of them")
    if len(matches) > 1:
        raise AmbiguousPluginError(f"{name!r} names plugins of the kinds {' and '.join(e.kind for e in matches)}: pass "
                                   "kind= (--kind) to pick one")
    return matches[0]


def load(name: str | Installed, kind: str | None = None) -> Any:
    """The plugin class called ``name``; the plugin's package is imported now.

    Raises:
        BrokenPluginError: its import fails, or it was made for another major version of the core.
        UnknownPluginError, AmbiguousPluginError: as :func:`find`.
    """
    entry = find(name, kind) if isinstance(name, str) else name
    if entry.broken:
        raise BrokenPluginError(f"{entry} cannot be used: {entry.broken}")
    try:
        loaded = metadata.EntryPoint(entry.name, entry.value, f"looseleaf.{entry.kind}").load()
    except Exception as error:  # a third party's module may raise anything
        remedy = advice(error) or f"Reinstall it (pip install --force-reinstall {entry.dist}) or tell the authors"
        raise BrokenPluginError(f"{entry} cannot be imported: {type(error).__name__}: {error}. {remedy}") from error
    if entry.kind in KINDS and not (isinstance(loaded, type) and issubclass(loaded, Plugin)
                                    and loaded.kind == entry.kind):
        raise BrokenPluginError(
            f"{entry}: {entry.value} is not a subclass of the interface for kind {entry.kind!r}. Its authors can see "
            f"why with `looseleaf check {entry.name}`")
    return loaded


def get(name: str, kind: str | None = None, **parameters: Any) -> Any:
    """An instance of the plugin called ``name`` with these hyper-parameters.

    Raises:
        TypeError: a parameter that the plugin does not have; near names are offered.
        ValueError: a value out of range.
        UnknownPluginError, AmbiguousPluginError, BrokenPluginError: as :func:`load`.
    """
    cls = load(name, kind)
    known = [p.name for p in cls.parameter_info()]
    for parameter in parameters:
        if parameter not in known:
            raise TypeError(f"{name} has no parameter {parameter!r}: expected {', '.join(known) or 'none'}."
                            f"{did_you_mean(parameter, known)}")
    return cls(**parameters)


def check_imports(installed: Iterable[Installed]) -> list[Installed]:
    """``installed`` with ``broken`` filled in; those not seen before are imported in another process, which is said."""
    installed = list(installed)
    memory, verdicts = cache_dir() / "imports.json", dict[str, str]()
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none yet, or a damaged one
        verdicts = dict(json.loads(memory.read_text(encoding="utf-8")))
    new = [e for e in installed if not e.broken and e.stamp not in verdicts]
    if new:
        print(f"checking {len(new)} newly installed plugin{'s' if len(new) > 1 else ''} once ...", file=sys.stderr)
        verdicts.update(_try_imports(new))
        with contextlib.suppress(OSError):  # an unwritable cache only costs the next listing its speed
            write_text(memory, json.dumps(verdicts))
    return [replace(e, broken=e.broken or verdicts.get(e.stamp) or None) for e in installed]


_TRY = """
import faulthandler, importlib.metadata, json, sys
for stamp, *point in json.loads(sys.argv[1]):
    faulthandler.dump_traceback_later(120, exit=True)
    try:
        importlib.metadata.EntryPoint(*point).load()
        reason = ""
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
    print("\\n@verdict " + json.dumps([stamp, reason]), flush=True)
"""


def _try_imports(new: list[Installed]) -> dict[str, str]:
    """Stamp -> why the import fails, or "". After one that ends or hangs the process, the rest goes on in another."""
    verdicts: dict[str, str] = {}
    while waiting := [e for e in new if e.stamp not in verdicts]:
        points = json.dumps([(e.stamp, e.name, e.value, f"looseleaf.{e.kind}") for e in waiting])
        child = subprocess.run([sys.executable, "-c", _TRY, points], capture_output=True, text=True, errors="replace",
                               stdin=subprocess.DEVNULL)
        verdicts.update(json.loads(line[9:]) for line in child.stdout.splitlines() if line.startswith("@verdict "))
        culprit = next((e for e in waiting if e.stamp not in verdicts), None)
        if culprit is not None:
            verdicts[culprit.stamp] = (f"its import ended the Python process with exit code {child.returncode}, or "
                                       "took more than 120 seconds")
    return verdicts


def _describe(kind: str, point: metadata.EntryPoint, dist: metadata.Distribution) -> Installed:
    fields = dist.metadata
    urls = dict(u.split(", ", 1) for u in fields.get_all("Project-URL") or [] if ", " in u)
    time = 0
    with contextlib.suppress(OSError):
        time = os.stat(getattr(dist, "_path", "")).st_mtime_ns
    stamp = f"{sys.prefix}|{dist.name}|{dist.version}|{point.value}|{time}|{__version__}"
    return Installed(point.name, kind, dist.name, dist.version, point.value, paper=urls.get("Paper"),
                     summary=fields["Summary"] or "", broken=_core_mismatch(dist), stamp=stamp)


def _core_mismatch(dist: metadata.Distribution) -> str | None:
    """Why the distribution's requirement on the core is not met, or None."""
    for text in dist.requires or []:
        if "extra ==" in text or not re.match(r"looseleaf(?![-_.\w])", text, re.I):
            continue
        from packaging.requirements import InvalidRequirement, Requirement

        with contextlib.suppress(InvalidRequirement):
            wanted = Requirement(text).specifier
            if not wanted.contains(__version__, prereleases=True):
                return (f"{dist.name} {dist.version} was made for looseleaf{wanted}, but looseleaf {__version__} is "
                        "installed: upgrade one of the two")
    return None


def _plain(dist: str) -> str:
    return dist.lower().replace("_", "-")


__all__ = ["Installed", "check_imports", "entries", "find", "get", "load", "papers", "plugins"]
