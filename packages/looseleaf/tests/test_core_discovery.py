"""Finding plugins: broken ones, ambiguous ones, unknown ones, and what a listing imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import looseleaf
from looseleaf import discovery
from looseleaf.errors import AmbiguousPluginError, BrokenPluginError, UnknownPluginError

Install = Callable[..., Path]


def test_get_makes_an_instance_by_name(distribution: Install, good_source: str) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    assert looseleaf.get("made-up", size=4).size == 4
    entry = discovery.find("made-up")
    assert (entry.kind, entry.version, entry.paper) == ("probes", "0.3.0", "https://arxiv.org/abs/2601.00001")


def test_a_parameter_it_does_not_have(distribution: Install, good_source: str) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    with pytest.raises(TypeError, match=r"no parameter 'sise': expected size. Did you mean 'size'\?"):
        looseleaf.get("made-up", sise=4)


def test_an_unknown_plugin_offers_near_names_and_never_a_package_that_is_not_ours(
        distribution: Install, good_source: str) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    for typed, near in (("made-pu", "made-up"), ("flexprefil", "flexprefill")):
        with pytest.raises(UnknownPluginError, match=f"Did you mean '{near}'.*list --available") as caught:
            looseleaf.get(typed)
        assert "pip install" not in str(caught.value)


def test_what_this_project_has_and_is_not_installed_gets_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "entries", lambda *kinds: [])
    with pytest.raises(UnknownPluginError, match="pip install looseleaf-gram"):
        discovery.find("gram")


def test_a_plugin_that_raises_on_import_is_broken_and_harms_no_other(
        distribution: Install, good_source: str) -> None:
    distribution("looseleaf-made-up", "made-up", good_source)
    distribution("looseleaf-bad", "bad", "raise RuntimeError('no such luck')")
    found = {p.name: p for p in discovery.check_imports(discovery.plugins())}
    assert found["bad"].broken == "RuntimeError: no such luck"
    assert found["made-up"].broken is None
    with pytest.raises(BrokenPluginError, match="no such luck"):
        looseleaf.get("bad")
    assert looseleaf.get("made-up").size == 3


@pytest.mark.parametrize("source", ["import os; os._exit(9)", "import sys; sys.exit(3)"])
def test_a_plugin_that_ends_the_process_on_import(distribution: Install, good_source: str, source: str) -> None:
    distribution("looseleaf-bad", "aaa", source)
    distribution("looseleaf-made-up", "made-up", good_source)
    found = {p.name: p for p in discovery.check_imports(discovery.plugins("probes"))}
    assert found["aaa"].broken
    assert found["made-up"].broken is None


def test_verdicts_are_remembered(distribution: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution("looseleaf-bad", "bad", "raise RuntimeError('once')")
    discovery.check_imports(discovery.plugins())
    monkeypatch.setattr(discovery, "_try_imports", lambda entries: pytest.fail("tried again"))
    assert discovery.check_imports([p for p in discovery.plugins() if p.name == "bad"])[0].broken


def test_one_name_from_two_distributions(distribution: Install, good_source: str) -> None:
    distribution("looseleaf-one", "same", good_source)
    distribution("other-two", "same", good_source.replace("= 3", "= 7"))
    with pytest.raises(AmbiguousPluginError, match=r"looseleaf-one 0\.3\.0 and other-two 0\.3\.0.*other-two:same"):
        looseleaf.get("same")
    assert looseleaf.get("other-two:same").size == 7


def test_another_major_version_of_the_core_is_refused(distribution: Install, good_source: str) -> None:
    distribution("looseleaf-later", "later", good_source, requires="looseleaf>=2,<3")
    with pytest.raises(BrokenPluginError, match=rf"made for looseleaf<3,>=2, but looseleaf {looseleaf.__version__}"):
        looseleaf.get("later")


def test_an_entry_point_that_is_no_plugin(distribution: Install) -> None:
    distribution("looseleaf-odd", "odd", "Method = 3")
    with pytest.raises(BrokenPluginError, match="not a subclass"):
        looseleaf.get("odd")


def test_listing_imports_neither_plugin_nor_torch(distribution: Install) -> None:
    distribution("looseleaf-loud", "loud", "print('imported')")
    code = ("import sys, looseleaf; names = [p.name for p in looseleaf.plugins()]; "
            "print('loud' in names, 'torch' in sys.modules, 'looseleaf_loud' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False", "False"]


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="Did you mean 'pruners'"):
        looseleaf.plugins("pruner")
