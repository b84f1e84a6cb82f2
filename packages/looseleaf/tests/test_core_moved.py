"""A plugin written for 0.1 gets an error that says what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import looseleaf
from looseleaf import BrokenPluginError, load

Install = Callable[..., Path]

HEAD = '''
import dataclasses
from typing import ClassVar
from looseleaf import AttentionBackend, Paper, Plugin, Probe, PromptOptimizer, Report
PAPER = Paper(title="A made-up paper", authors=("Ada Lovelace",), year=2026)
'''


def test_moved_names_say_where_they_are() -> None:
    for name, package in (("LocalModel", "looseleaf-text"), ("find_tickets", "looseleaf-tickets")):
        with pytest.raises(ImportError, match=rf"looseleaf\.{name} was part of looseleaf 0\.1.*pip install {package}"):
            getattr(looseleaf, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        looseleaf.nothing  # noqa: B018


@pytest.mark.parametrize(("kind", "source", "says"), [
    ("prompts", "from looseleaf import LanguageModel", "from looseleaf_text import LanguageModel"),
    ("prompts", "from looseleaf.prompts.model import MeteredModel", "its names are in looseleaf_text now"),
    ("prompts", "from looseleaf.prompts.state import SearchState", "its names are in looseleaf.resume now"),
    ("probes", "from looseleaf.testing import check_probe", "write conformance_tests"),
    ("attention", HEAD + '''
@dataclasses.dataclass
class Method(AttentionBackend):
    """Made up."""
    changes: ClassVar[str] = "encode"
''', "phases"),
    ("pruners", HEAD + '''
@dataclasses.dataclass
class Method(Plugin):
    """Made up."""
    removes: ClassVar[str] = "tokens"
''', "TokenPruner"),
    ("probes", HEAD + '''
@dataclasses.dataclass
class Method(Probe):
    """Made up."""
    def run(self, model, data=None, *, tokenizer=None, seed=0, progress=None):
        return Report("x")
''', r"write run\(subject"),
    ("prompts", HEAD + '''
@dataclasses.dataclass
class Method(PromptOptimizer):
    """Made up."""
    @classmethod
    def kit(cls):
        return {}
''', "call it conformance"),
])
def test_a_plugin_of_the_first_edition_is_told_what_to_change(distribution: Install, kind: str, source: str,
                                                              says: str) -> None:
    distribution("looseleaf-old", "old", source, kind=kind)
    with pytest.raises(BrokenPluginError, match=says):
        load("old", kind)
