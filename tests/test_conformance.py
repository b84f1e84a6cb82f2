"""``looseleaf check`` passes for every plugin of this repository."""

from __future__ import annotations

import json

import pytest

from looseleaf import plugins
from looseleaf.cli.main import main

OURS = [(p.kind, p.name) for p in plugins() if p.dist.startswith("looseleaf")]


def test_there_are_plugins() -> None:
    assert len(OURS) >= 18, "install the plugins of the repository: nox does"


@pytest.mark.parametrize(("kind", "name"), OURS, ids=[f"{kind}-{name}" for kind, name in OURS])
def test_check(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", name, "--kind", kind, "--json"])
    outcome = json.loads(capsys.readouterr().out)
    failed = [f"{c['name']}: {c['problem']}" for c in outcome["checks"] if c["problem"]]
    assert code == 0 and outcome["passes"] and not failed, "\n".join(failed)
    assert all(c["skipped"] is None or c["skipped"] for c in outcome["checks"]), "skipped without a reason"
