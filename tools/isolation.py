"""Install each wheel alone in a clean layer and prove that it stands alone.

A base environment holds torch and what torch needs, nothing else. Each wheel gets a layer of its own on top of it.
In the layer: the package imports; no other plugin can be imported or is listed; everything importable from the
index was asked for by the package's own metadata; the Python blocks of its README run.

usage: isolation.py [NAME ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".nox" / "torch-only"
BIN = "Scripts" if os.name == "nt" else "bin"
PACKAGES = [p.parent for p in (*sorted(ROOT.glob("packages/*/pyproject.toml")), ROOT / "kernels/pyproject.toml",
                               *sorted(ROOT.glob("plugins/*/*/pyproject.toml")))]

PRELUDE = '''
import os, sys, tempfile
os.environ["HF_HUB_OFFLINE"] = "1"
os.chdir(tempfile.mkdtemp())
try:
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    inputs = tokenizer("It was a dark and stormy night. " * 20, return_tensors="pt", return_token_type_ids=False)
except ImportError:
    pass
'''


def sh(*command: str, **extra: str) -> str:
    """Run a command and return what it printed; its output is shown only when it fails."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_CONSTRAINT": str(ROOT / "constraints" / "cpu.txt"),
           "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)[:400]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def base() -> Path:
    """The site-packages of the base environment."""
    python = BASE / BIN / "python"
    if not (BASE / "made").exists():
        shutil.rmtree(BASE, ignore_errors=True)
        sh(sys.executable, "-m", "venv", str(BASE))
        sh(str(python), "-m", "pip", "install", "-q", "torch")
        (BASE / "made").touch()
    return Path(sh(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def readme_blocks(text: str) -> list[str]:
    """The Python blocks of a README, without those marked ``<!-- not run: reason -->``."""
    blocks = re.findall(r"(<!-- not run[^>]*-->\s*)?```python\n(.*?)```", text, flags=re.S)
    return [code for skipped, code in blocks if not skipped]


def check(package: Path, wheels: Path, site: Path, work: Path) -> None:
    """Everything that one wheel has to show."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["name"]
    layer = work / name
    sh(sys.executable, "-m", "venv", str(layer))
    python = str(layer / BIN / "python")
    own_site = Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own_site / "torch-only.pth").write_text(str(site) + "\n")
    sh(python, "-m", "pip", "install", "-q", "--find-links", str(wheels), name)
    module = name.replace("-", "_")
    sh(python, "-c", f"import {module}")
    others = ["looseleaf_" + p.name.replace("-", "_") for p in PACKAGES
              if p.parent.parent.name == "plugins" and p != package]
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is not None)"
    for other in others:
        sh(python, "-c", absent, other)
    of_core = name == "looseleaf" or _asked_for(project, "looseleaf>")
    listed = sh(python, "-m", "looseleaf.cli.main", "list", "--json", LOOSELEAF_CACHE=str(work / "cache")) \
        if of_core else "[]"
    for other in others:
        if f'"{other.replace("_", "-")}"' in listed:
            raise SystemExit(f"{name}: the plugin {other} is listed in its clean layer")
    unasked = [m for m in ("transformers", "diffusers", "ray", "sklearn", "matplotlib")
               if not _asked_for(project, m)]
    if name == "looseleaf":  # servers are the affair of looseleaf-text
        unasked.append("httpx")
    for extra in unasked:
        sh(python, "-c", absent, extra)
    if of_core:
        # The user's own model brings transformers; from here on it is there.
        sh(python, "-m", "pip", "install", "-q", "transformers")
    blocks = readme_blocks((package / "README.md").read_text(encoding="utf-8"))
    code = PRELUDE + "\n".join(blocks)
    sh(python, "-c", code, LOOSELEAF_CACHE=str(work / "cache"))
    print(f"{name}: alone, {len(others)} other plugins absent, {len(blocks)} README blocks run", flush=True)


def _asked_for(project: dict[str, object], module: str) -> bool:
    """Whether a package depends on a module, by itself or through a library of ours."""
    wanted = {"sklearn": "scikit-learn"}.get(module, module)
    needs = [str(d) for d in project.get("dependencies", [])]  # type: ignore[attr-defined]
    libraries = [p for p in PACKAGES if p.parent.name == "packages" and p.name != "looseleaf"
                 and any(re.match(rf"{p.name}\b(?!-)", d) for d in needs)]
    return any(wanted in d for d in needs) or any(
        _asked_for(tomllib.loads((p / "pyproject.toml").read_text(encoding="utf-8"))["project"], module)
        for p in libraries)


def main(argv: list[str]) -> int:
    """Check all wheels, or those named."""
    unknown = set(argv) - {package.name for package in PACKAGES}
    if unknown:
        raise SystemExit(f"expected names of {', '.join(sorted(p.name for p in PACKAGES))}, got {', '.join(unknown)}")
    site = base()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        wheels, work = Path(folder) / "wheels", Path(folder) / "layers"
        work.mkdir()
        for package in PACKAGES:
            sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(package))
        for package in PACKAGES:
            if not argv or package.name in argv:
                check(package, wheels, site, work)
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
    print(f"{len(PACKAGES) if not argv else len(argv)} wheels stand alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
