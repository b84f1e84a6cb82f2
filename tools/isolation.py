"""Install each wheel alone in a clean layer and prove that it stands alone.

A base environment holds torch and what torch needs, nothing else. Each wheel gets a layer of its own on top of it.
In the layer: the package imports; no other plugin can be imported or is listed; everything importable from the
index was asked for by the package's own metadata; the Python blocks of its README run.

What a package asks for is not installed again for each: its metadata say what goes into the layer, as links to the
files that pip installed in the shared environment, in versions that the metadata allow. With --pip it is installed
anew, which takes several times as long.

usage: isolation.py [--pip] [NAME ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".nox" / "torch-only"
BIN = "Scripts" if os.name == "nt" else "bin"
PACKAGES = [p.parent for p in (*sorted(ROOT.glob("packages/*/pyproject.toml")), ROOT / "kernels/pyproject.toml",
                               *sorted(ROOT.glob("plugins/*/*/pyproject.toml"))) if (p.parent / "src").is_dir()]
PAPERS = ROOT / "packages" / "looseleaf-papers"

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


def needs(name: str, installed: Mapping[str, metadata.Distribution], extras: Iterable[str] = ()) -> set[str]:
    """The closure of what a distribution asks for, extras left out unless they are asked for by name.

    Raises:
        SystemExit: something is asked for that is not there, or not in the version that is asked for.
    """
    found: set[str] = set()
    todo = [(name, frozenset(extras))]
    seen = set(todo)
    while todo:
        current, wanted = todo.pop()
        for text in installed[current].requires or ():
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (*wanted, "")):
                continue
            other = canonicalize_name(requirement.name)
            if other not in installed or not requirement.specifier.contains(installed[other].version, prereleases=True):
                there = installed[other].version if other in installed else "nothing"
                raise SystemExit(f"{current} asks for {text}: expected it in the shared environment, got {there}")
            found.add(other)
            if (entry := (other, frozenset(requirement.extras))) not in seen:
                seen.add(entry)
                todo.append(entry)
    return found


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Put the files of a distribution into another site-packages, as links."""
    for file in distribution.files or ():
        place = site / file
        if ".." in file.parts or place.exists():  # scripts, and files that two distributions share
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(Path(str(distribution.locate_file(file))))


class Layer:
    """An environment with Python, torch and what is put into it."""

    def __init__(self, home: Path, base_site: Path, wheels: Path, real: bool) -> None:
        self.wheels, self.real = wheels, real
        sh(sys.executable, "-m", "venv", *([] if real else ["--without-pip"]), str(home))
        self.python = str(home / BIN / "python")
        self.site = Path(sh(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "torch-only.pth").write_text(str(base_site) + "\n")
        self.there = {canonicalize_name(d.name) for d in metadata.distributions(path=[str(base_site)])}

    def add(self, name: str) -> None:
        """Install a distribution and all that it asks for: by pip, or as links to what pip put elsewhere."""
        if self.real:
            sh(self.python, "-m", "pip", "install", "-q", "--find-links", str(self.wheels), name)
            return
        ours = {canonicalize_name(d.name): d for d in metadata.distributions(path=[str(self.wheels / "unpacked")])}
        every = {**{canonicalize_name(d.name): d for d in metadata.distributions()}, **ours}
        for one in {name, *needs(name, every)} - self.there:
            link(every[one], self.site)
            self.there.add(one)


LOOK = """
import importlib.util, sys
for name in sys.argv[1:]:
    if importlib.util.find_spec(name) is not None:
        raise SystemExit(f"expected no {name} in a clean layer, found {importlib.util.find_spec(name).origin}")
"""


def check(package: Path, layer: Layer, work: Path) -> None:
    """Everything that one wheel has to show."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["name"]
    layer.add(name)
    others = ["looseleaf_" + p.name.replace("-", "_") for p in PACKAGES
              if p.parent.parent.name == "plugins" and p != package]
    unasked = [m for m in ("transformers", "diffusers", "ray", "sklearn", "matplotlib") if not _asked_for(project, m)]
    if name == "looseleaf":  # servers are the affair of looseleaf-text
        unasked.append("httpx")
    sh(layer.python, "-c", f"import {name.replace('-', '_')}\n{LOOK}", *others, *unasked)
    if name == "looseleaf" or _asked_for(project, "looseleaf>"):
        listed = sh(layer.python, "-m", "looseleaf.cli.main", "list", "--json", LOOSELEAF_CACHE=str(work / "cache"))
        for other in others:
            if f'"{other.replace("_", "-")}"' in listed:
                raise SystemExit(f"{name}: the plugin {other} is listed in its clean layer")
        # The user's own model brings transformers; from here on it is there.
        layer.add("transformers")
    blocks = readme_blocks((package / "README.md").read_text(encoding="utf-8"))
    code = PRELUDE + "\n".join(blocks)
    sh(layer.python, "-c", code, LOOSELEAF_CACHE=str(work / "cache"))
    print(f"{name}: alone, {len(others)} other plugins absent, {len(blocks)} README blocks run", flush=True)


def umbrella(home: Path, base_site: Path, wheels: Path) -> None:
    """README's two ways to install several papers: extras of the core, and all through looseleaf-papers."""
    layer = Layer(home, base_site, wheels, True)
    layer.add("looseleaf[flexprefill]")
    listed = sh(layer.python, "-m", "looseleaf.cli.main", "list", "--json", LOOSELEAF_CACHE=str(home / "cache"))
    if '"looseleaf-flexprefill"' not in listed:
        raise SystemExit(f"looseleaf[flexprefill]: expected the plugin in the list, got {listed}")
    every = {tomllib.loads((p / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] for p in PACKAGES
             if p.parent.parent.name == "plugins"}
    sh(layer.python, "-m", "pip", "install", "-q", "--no-deps", "--find-links", str(wheels), "looseleaf-papers")
    asked = sh(layer.python, "-c", "import importlib.metadata as m; print(*m.requires('looseleaf-papers'), sep='\\n')")
    if {Requirement(text).name for text in asked.split()} != every:
        raise SystemExit(f"looseleaf-papers: expected {sorted(every)}, got {asked.split()}")
    print("looseleaf[flexprefill] brings the plugin, looseleaf-papers asks for all of them", flush=True)


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
    names = set(argv) - {"--pip"}
    unknown = names - {package.name for package in PACKAGES}
    if unknown:
        raise SystemExit(f"expected names of {', '.join(sorted(p.name for p in PACKAGES))}, got {', '.join(unknown)}")
    wanted = [p for p in PACKAGES if not names or p.name in names]
    site = base()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        wheels, work = Path(folder) / "wheels", Path(folder) / "layers"
        for package in PACKAGES:
            if package in wanted or package.parent.parent.name != "plugins":
                sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(package))
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(wheels / "unpacked")
        for package in wanted:
            work.mkdir()
            check(package, Layer(work / package.name, site, wheels, "--pip" in argv), work)
            shutil.rmtree(work, ignore_errors=True)
        if not names:
            sh(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(PAPERS))
            umbrella(work, site, wheels)
    print(f"{len(wanted)} wheels stand alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
