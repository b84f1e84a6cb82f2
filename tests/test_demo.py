"""The main job, made short, on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.smollm2
def test_demo_writes_its_report(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "demo.py"), "--quick", "--out", str(tmp_path)],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = json.loads((tmp_path / "report.json").read_text())
    assert [r["title"].split()[0] for r in reports] == ["Attention", "Pruning", "Prompt", "Steering"]
    assert all(r["tables"] for r in reports)
    assert not [t for r in reports for t in r["tables"] if t["title"] == "Left out"], "a plugin could not be run"
    page = (tmp_path / "looseleaf-report.html").read_text()
    assert "<svg" in page and "flexprefill" in page and "essential-sparsity" in page
