"""A stranger's plugin of each kind: made by `looseleaf new`, built, installed in a fresh layer, listed and checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

NAMES = {"attention": "made-up-window", "pruners": "made-up-magnitude", "prompts": "made-up-search",
         "probes": "made-up-norms"}


def sh(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_new_build_install_list_check(kind: str, tmp_path: Path) -> None:
    name = NAMES[kind]
    made = sh(sys.executable, "-m", "looseleaf.cli.main", "new", kind, name, "--into", str(tmp_path))
    assert made.returncode == 0, made.stderr
    folder = tmp_path / f"looseleaf-{name}"
    built = sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(folder))
    assert built.returncode == 0, built.stdout + built.stderr
    wheel = next(tmp_path.glob("*.whl"))

    # A layer of its own above this environment, which holds torch and the core.
    layer = tmp_path / "layer"
    assert sh(sys.executable, "-m", "venv", str(layer)).returncode == 0
    python = str(layer / ("Scripts" if os.name == "nt" else "bin") / "python")
    own = Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (own / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    installed = sh(python, "-m", "pip", "install", "-q", "--no-deps", str(wheel))
    assert installed.returncode == 0, installed.stderr

    cache = {"LOOSELEAF_CACHE": str(tmp_path / "cache")}
    listed = sh(python, "-m", "looseleaf.cli.main", "list", "--json", **cache)
    assert listed.returncode == 0, listed.stderr
    assert [e for e in json.loads(listed.stdout) if e["name"] == name and e["kind"] == kind]
    checked = sh(python, "-m", "looseleaf.cli.main", "check", name, **cache)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = sh(python, "-m", "pytest", "-q", str(folder / "tests"), **cache)
    assert tested.returncode == 0, tested.stdout + tested.stderr
