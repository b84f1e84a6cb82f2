"""Finding installed plugins through their entry points.

Listing reads the metadata of installed distributions only: no plugin and no torch is imported. Whether a plugin
can be imported at all is tried once per installed version, in a process of its own, and remembered
(see :func:`check_imports`), so that a listing can say what is broken and still answer at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from looseleaf.errors import AmbiguousPluginError, BrokenPluginError, UnknownPluginError, did_you_mean
from looseleaf.files import cache_dir, write_text
from looseleaf.moved import advice
from looseleaf.plugin import KINDS

REPRODUCTIONS, BENCHES = "reproductions", "benches"
CHECK_SECONDS = 120.0


@dataclass(frozen=True)
class Installed:
    """One entry point of one distribution.

    Attributes:
        name: how users call the plugin.
        kind: one of :data:`looseleaf.plugin.KINDS`, ``"reproductions"`` or ``"benches"``.
        dist: name of the distribution.
        version: its version.
        value: ``module:attribute``.
        paper: URL of the paper from the distribution's metadata, or None.
        summary: one line from the metadata.
        broken: why it cannot be used, or None.
        stamp: changes whenever the distribution is installed anew.
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


def core_version() -> str:
    """The version of the running core."""
    from looseleaf import __version__

    return __version__


def plugins(kind: str | None = None) -> list[Installed]:
    """All installed plugins by kind and name, from metadata and remembered import checks.

    Args:
        kind: only this kind (one of ``attention``, ``pruners``, ``prompts``, ``probes``).

    Raises:
        ValueError: unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected {', '.join(KINDS)}, got {kind!r}.{did_you_mean(kind, KINDS)}")
    remembered = _read_verdicts()
    found = []
    for each in _entries((kind,) if kind else KINDS):
        reason = each.broken or remembered.get(_verdict_key(each))
        found.append(replace(each, broken=reason or None))
    return found


def reproductions() -> list[Installed]:
    """The installed ``looseleaf reproduce`` functions."""
    return _entries((REPRODUCTIONS,))


def benches() -> list[Installed]:
    """What ``looseleaf compare`` can compare plugins on; a bench is described in :mod:`looseleaf_lab.benches`."""
    return _entries((BENCHES,))


def find(name: str, kind: str | None = None) -> Installed:
    """The one installed plugin called ``name`` (or ``dist:name``).

    Raises:
        UnknownPluginError: nothing of that name; the message has near names and the pip command.
        AmbiguousPluginError: several distributions or kinds claim the name.
    """
    kinds = (kind,) if kind else KINDS
    return _pick(name, _entries(kinds), " or ".join(kinds))


def find_reproduction(name: str) -> Installed:
    """The installed reproduction called ``name``; errors as :func:`find`."""
    return _pick(name, reproductions(), "reproduction")


def load(name: str | Installed, kind: str | None = None) -> Any:
    """The plugin class called ``name``; the plugin's package is imported now.

    Raises:
        BrokenPluginError: its import fails, or it was made for another major version of the core.
        UnknownPluginError, AmbiguousPluginError: as :func:`find`.
    """
    entry = find(name, kind) if isinstance(name, str) else name
    if entry.broken:
        raise BrokenPluginError(f"plugin {entry.name!r} of {entry.dist} {entry.version} cannot be used: {entry.broken}")
    point = metadata.EntryPoint(name=entry.name, value=entry.value, group=f"looseleaf.{entry.kind}")
    try:
        loaded = point.load()
    except Exception as error:  # a third party's module may raise anything
        reason = f"{type(error).__name__}: {error}"
        _remember({_verdict_key(entry): reason})
        raise BrokenPluginError(
            f"plugin {entry.name!r} of {entry.dist} {entry.version} cannot be imported: {reason}. "
            + (advice(error) or f"Reinstall it (pip install --force-reinstall {entry.dist}) or tell the authors")
        ) from error
    if entry.kind in KINDS:
        _require_plugin_class(entry, loaded)
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


def check_imports(entries: Iterable[Installed], say: Callable[[str], None] | None = None) -> list[Installed]:
    """``entries`` with ``broken`` filled in by importing, in another process, those not tried before.

    Args:
        entries: from :func:`plugins`.
        say: called with a line when a check is about to take time.
    """
    entries = list(entries)
    remembered = _read_verdicts()
    new = [e for e in entries if not e.broken and _verdict_key(e) not in remembered]
    if new:
        if say is not None:
            say(f"checking {len(new)} newly installed plugin{'s' if len(new) > 1 else ''} once ...")
        verdicts = _try_imports(new)
        _remember(verdicts)
        remembered.update(verdicts)
    return [replace(e, broken=e.broken or remembered.get(_verdict_key(e)) or None) for e in entries]


def _entries(kinds: Iterable[str]) -> list[Installed]:
    groups = {f"looseleaf.{kind}": kind for kind in kinds}
    found: dict[tuple[str, str, str, str], Installed] = {}
    for dist in metadata.distributions():
        points = [p for p in dist.entry_points if p.group in groups]
        if not points:
            continue
        # A distribution can stand twice on the path (an editable install next to a wheel): the first one counts.
        for point in points:
            kind = groups[point.group]
            key = (kind, point.name, dist.name, point.value)
            if key not in found:
                found[key] = _describe(dist, point, kind)
    return sorted(found.values(), key=lambda e: (KINDS.index(e.kind) if e.kind in KINDS else 9, e.name, e.dist))


def _describe(dist: metadata.Distribution, point: metadata.EntryPoint, kind: str) -> Installed:
    fields = dist.metadata
    urls = dict(u.split(", ", 1) for u in fields.get_all("Project-URL") or [] if ", " in u)
    return Installed(
        name=point.name, kind=kind, dist=dist.name, version=dist.version, value=point.value,
        paper=urls.get("Paper"), summary=fields["Summary"] or "", broken=_core_mismatch(dist), stamp=_stamp(dist))


def _stamp(dist: metadata.Distribution) -> str:
    try:
        return str(os.stat(str(dist.locate_file(getattr(dist, "_path", "")))).st_mtime_ns)
    except OSError:
        return ""


def _core_mismatch(dist: metadata.Distribution) -> str | None:
    """Why the distribution's requirement on the core is not met, or None."""
    for text in dist.requires or []:
        if not text.lower().startswith("looseleaf") or "extra ==" in text:
            continue
        from packaging.requirements import InvalidRequirement, Requirement

        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.name.lower() == "looseleaf" and not requirement.specifier.contains(
                core_version(), prereleases=True):
            return (f"{dist.name} {dist.version} was made for looseleaf{requirement.specifier}, "
                    f"but looseleaf {core_version()} is installed: upgrade one of the two")
    return None


def _pick(name: str, entries: list[Installed], what: str) -> Installed:
    wanted_dist, colon, bare = name.rpartition(":")
    matches = [e for e in entries if e.name == bare and (not colon or _same(e.dist, wanted_dist))]
    if not matches:
        raise UnknownPluginError(
            f"no plugin called {name!r} ({what}) is installed."
            f"{did_you_mean(bare, sorted({e.name for e in entries}))} "
            f"If it exists, this installs it: pip install looseleaf-{bare}. "
            "`looseleaf list` shows what is installed")
    if len({e.dist for e in matches}) > 1:
        names = " and ".join(f"{e.dist} {e.version}" for e in matches)
        ways = " or ".join(repr(e.qualified) for e in matches)
        raise AmbiguousPluginError(f"{name!r} is claimed by {names}: use {ways}, or uninstall one of them")
    if len(matches) > 1:
        kinds = " and ".join(e.kind for e in matches)
        raise AmbiguousPluginError(f"{name!r} names plugins of the kinds {kinds}: pass kind= (--kind) to pick one")
    return matches[0]


def _same(one: str, other: str) -> bool:
    return one.lower().replace("_", "-") == other.lower().replace("_", "-")


def _require_plugin_class(entry: Installed, loaded: Any) -> None:
    from looseleaf.plugin import Plugin

    if not (isinstance(loaded, type) and issubclass(loaded, Plugin) and loaded.kind == entry.kind):
        raise BrokenPluginError(
            f"plugin {entry.name!r} of {entry.dist} {entry.version}: {entry.value} is not a subclass of the "
            f"interface for kind {entry.kind!r}. Its authors can see why with `looseleaf check {entry.name}`")


# -- remembered import checks ---------------------------------------------------------------------------------

def _verdict_key(entry: Installed) -> str:
    return "|".join((sys.prefix, entry.dist, entry.version, entry.value, entry.stamp, core_version()))


def _read_verdicts() -> dict[str, str]:
    try:
        data = json.loads((cache_dir() / "imports.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(verdicts: dict[str, str]) -> None:
    with contextlib.suppress(OSError):  # an unwritable cache only costs the next listing its speed
        write_text(cache_dir() / "imports.json", json.dumps({**_read_verdicts(), **verdicts}))


_TRY = """
import importlib.metadata, json, sys
for kind, name, value in json.loads(sys.argv[1]):
    try:
        importlib.metadata.EntryPoint(name=name, value=value, group="looseleaf." + kind).load()
        reason = ""
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}" or type(error).__name__
    print("\\n@verdict " + json.dumps(reason), flush=True)
"""


def _try_imports(entries: list[Installed]) -> dict[str, str]:
    """Import each entry in one other process; a crash there is the verdict of the entry it happened in."""
    verdicts: dict[str, str] = {}
    waiting = list(entries)
    while waiting:
        todo = json.dumps([(e.kind, e.name, e.value) for e in waiting])
        try:
            done = subprocess.run([sys.executable, "-c", _TRY, todo], capture_output=True, text=True,
                                  timeout=CHECK_SECONDS, stdin=subprocess.DEVNULL)
            output, died = done.stdout, f"the Python process died with exit code {done.returncode}"
        except subprocess.TimeoutExpired as late:
            raw = late.stdout or b""
            output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            died = f"the import took more than {CHECK_SECONDS:.0f} seconds"
        verdicts_read = [json.loads(line[9:]) for line in output.splitlines() if line.startswith("@verdict ")]
        for entry, reason in zip(waiting, verdicts_read):
            verdicts[_verdict_key(entry)] = reason
        if len(verdicts_read) < len(waiting):
            verdicts[_verdict_key(waiting[len(verdicts_read)])] = died
            verdicts_read.append(died)
        waiting = waiting[len(verdicts_read):]
    return verdicts
