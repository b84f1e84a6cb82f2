"""Fixtures of the core's tests: made-up distributions on the path, and a cache of their own."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache of import checks."""
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a made-up distribution: metadata, entry points and one module, on sys.path and PYTHONPATH."""
    site = tmp_path / "made-up-site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))

    def install(dist: str, name: str, source: str, *, kind: str = "probes", attribute: str = "Method",
                requires: str = "looseleaf>=0.1,<1", version: str = "0.3.0") -> Path:
        module = dist.replace("-", "_")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\nSummary: made up\n"
            f"Requires-Dist: {requires}\nProject-URL: Paper, https://arxiv.org/abs/2601.00001\n")
        (info / "entry_points.txt").write_text(f"[looseleaf.{kind}]\n{name} = {module}:{attribute}\n")
        (info / "RECORD").write_text("")
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        sys.modules.pop(module, None)
        return site

    return install


GOOD = '''
import dataclasses
from typing import Annotated, ClassVar
from looseleaf import Paper, Probe, Report
from looseleaf.plugin import In

@dataclasses.dataclass
class Method(Probe):
    """Made up.

    Args:
        size: how large; at least 1.
    """
    size: Annotated[int, In(">= 1")] = 3
    paper: ClassVar[Paper] = Paper(title="A made-up paper", authors=("Ada Lovelace",), year=2026)

    def run(self, subject, data=None, *, seed=0, progress=None):
        return Report("made up")
'''


@pytest.fixture
def good_source() -> str:
    """Source of a module with one sound probe."""
    return GOOD
