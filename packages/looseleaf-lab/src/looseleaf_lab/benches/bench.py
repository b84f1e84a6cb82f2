"""What a bench is, and how plugins are compared on several."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from looseleaf.plugin import Plugin, check_fields
from looseleaf.report import Report
from looseleaf_lab.facts import reason

State = str | os.PathLike[str] | None


@dataclasses.dataclass
class Bench(ABC):
    """Compares the plugins of one interface on one kind of subject.

    Subclasses are dataclasses whose fields are options of ``looseleaf compare``, with the help that the docstring
    gives; their values are checked as those of plugins are. The entry point ``looseleaf.benches`` names the class. A
    library that should not need the lab may name any dataclass with the same attributes.

    Class attributes:
        interface: the type of plugin that it compares.
    """

    interface: ClassVar[type[Plugin]]

    def __post_init__(self) -> None:
        check_fields(self)
        self.validate()

    def validate(self) -> None:  # noqa: B027 (benches without such rules leave it out)
        """Raise ValueError for fields that do not go together; see :meth:`check`."""

    def check(self, field: str, ok: bool, expected: str) -> None:
        """Raise ValueError that names ``field``, what was ``expected`` and its value unless ``ok``."""
        if not ok:
            raise ValueError(f"{type(self).__name__}.{field}: expected {expected}, got {getattr(self, field)!r}")

    def suits(self, plugin: Any) -> str | None:
        """Why a plugin cannot be compared here, or None where it can.

        Args:
            plugin: a class or an instance.
        """
        cls = plugin if isinstance(plugin, type) else type(plugin)
        if issubclass(cls, self.interface):
            return None
        own = next((base for base in cls.__mro__ if base.__module__.startswith("looseleaf.")), cls)
        return f"expected a {self.interface.__name__}, got {own.__name__}"

    @abstractmethod
    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """The comparison, baselines included.

        Args:
            plugins: name -> class or instance of what suits. One that fails is listed under "Left out" and does not
                stop the others.
            state: folder for what is finished; the same call resumes.
            seed: the only source of randomness.
            progress: show a progress bar; None: only on a terminal.
        """


def compare(plugins: Mapping[str, Any], benches: Mapping[str, Bench], *, named: bool = False, state: State = None,
            seed: int = 0, progress: bool | None = None) -> Report:
    """Plugins side by side on every bench that suits one of them.

    Args:
        plugins: name -> class or instance.
        benches: name -> bench.
        named: the benches were asked for by name: run them with the baselines alone where no plugin suits.
        state, seed, progress: see :meth:`Bench.run`.

    Returns:
        All reports in one. The table "Left out" has the plugins that a bench could not measure, with the reason.

    Raises:
        ValueError: no bench has anything to compare.
        ModuleNotFoundError: no bench could be run because of packages that are missing.
    """
    reports: dict[str, Report] = {}
    absent: dict[str, list[tuple[str, str]]] = {}
    missing: ModuleNotFoundError | None = None
    for name, bench in benches.items():
        reasons = {plugin: bench.suits(cls) for plugin, cls in plugins.items()}
        absent[name] = [(plugin, why) for plugin, why in reasons.items() if why is not None]
        suited = {plugin: plugins[plugin] for plugin, why in reasons.items() if why is None}
        if not suited and not named:
            continue
        try:
            reports[name] = bench.run(suited, state=state, seed=seed, progress=progress)
        except ModuleNotFoundError as error:  # the other benches can do without that package
            missing = error
            absent[name] += [(plugin, reason(error)) for plugin in suited]
    if missing is not None and not reports:
        raise missing
    if not benches or not (reports or any(absent.values())):
        raise ValueError(f"compare: expected plugins and a bench for one of them, got {len(plugins)} plugins and the "
                         f"benches {', '.join(benches) or '(none)'}: `looseleaf list` shows what is installed")
    return _together(reports, absent)


def _together(reports: Mapping[str, Report], absent: Mapping[str, list[tuple[str, str]]]) -> Report:
    titles = [report.title for report in reports.values()]
    out = Report(titles[0] if len(titles) == 1 else "Plugins side by side")
    # what benches say alike stands once; what they say otherwise keeps the name of the bench
    values: dict[str, list[Any]] = {}
    for report in reports.values():
        for name, value in report.facts.items():
            values.setdefault(name, []).append(value)
    differs = {name for name, given in values.items() if any(value != given[0] for value in given)}
    rows: list[list[Any]] = []
    for name in absent:
        if name in reports:
            report = reports[name]
            rows += [[name, *row] for table in report.tables if table.title == "Left out" for row in table.rows]
            report.tables = [table for table in report.tables if table.title != "Left out"]
            report.facts = {f"{name}: {k}" if k in differs else k: v for k, v in report.facts.items()}
            out.extend(report)
        rows += [[name, *row] for row in absent[name]]
    if rows:
        out.table("Left out", ["bench", "plugin", "reason"], rows)
    return out


def ready(plugins: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Name -> instance of each plugin, classes with their defaults; and name -> why the others cannot be made."""
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, plugin in plugins.items():
        try:
            made[name] = plugin() if isinstance(plugin, type) else plugin
        except Exception as error:  # a plugin without defaults for all its fields
            failed[name] = reason(error)
    return made, failed


__all__ = ["Bench", "State", "compare", "ready"]
