"""A stranger's plugin of each kind: made by `looseleaf new`, built, installed in a fresh layer, listed and checked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

NAMES = {"attention": "made-up-window", "pruners": "made-up-magnitude", "prompts": "made-up-search",
         "probes": "made-up-norms"}


def sh(*command: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


def layer(folder: Path) -> Path:
    """The Python of a new environment above this one, which holds torch and the core."""
    home = folder / "layer"
    assert sh(sys.executable, "-m", "venv", str(home)).returncode == 0
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = Path(sh(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (own / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


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

    python = str(layer(tmp_path))
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


@pytest.mark.slow
def test_the_tutorial_as_it_stands(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "tutorials" / "write-a-plugin.md").read_text(encoding="utf-8")
    commands = re.findall(r"```\n(looseleaf new .*?)```", page, flags=re.S)[0].splitlines()
    python = str(layer(tmp_path))
    bin_ = Path(python).parent
    # the layer sees the core below it, but not the core's script
    (bin_ / "looseleaf").write_text(f'#!/bin/sh\nexec {python} -m looseleaf.cli.main "$@"\n')
    (bin_ / "looseleaf").chmod(0o755)
    env = {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "LOOSELEAF_CACHE": str(tmp_path / "cache"),
           "PIP_NO_BUILD_ISOLATION": "0"}  # pip reads 0 as: without isolation, with the hatchling that is there
    outputs = {}
    for command in commands:
        done = sh(*command.split(), cwd=tmp_path, **env)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs[command] = done.stdout
    assert "head-norms" in outputs["looseleaf list"] and "passes" in outputs["looseleaf check head-norms"]
    folder = tmp_path / "looseleaf-head-norms"
    shown = re.findall(r"```\n(looseleaf-head-norms/.*?)```", page, flags=re.S)[0]
    tree = re.findall(r"^ +([^\s,]+(?:, [^\s,]+)*)", shown, flags=re.M)
    for name in (n for line in tree for n in line.split(", ")):
        assert list(folder.rglob(Path(name).name)), f"the tutorial shows {name}, which `looseleaf new` did not write"
    own = re.findall(r"```python\n(from looseleaf\.testing .*?)```", page, flags=re.S)[0]
    (tmp_path / "test_mine.py").write_text(own)
    tested = sh(python, "-m", "pytest", "-q", str(tmp_path / "test_mine.py"), **env)
    assert tested.returncode == 0, tested.stdout + tested.stderr
