"""Rules of the repository that no general tool checks; prints what breaks them and exits with 1.

- a plugin has pyproject.toml, README.md, CHANGELOG.md, src/, tests/, an entry point of its kind and a reproduction;
- arrows point one way: plugins -> kernels and core, lab only from reproduction.py; kernels -> torch; lab -> core;
- the core imports no torch-heavy third party at import time; nothing loads pickles.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {"looseleaf"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level module, at import time?) of every import in a file; TYPE_CHECKING blocks are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.module.split(".")[0], top))
        inside = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, True)
    return found


def loads_pickle(path: Path) -> bool:
    """Whether a file calls pickle.load(s), or torch.load without weights_only=True."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if name in ("pickle.load", "pickle.loads"):
                return True
            if name == "torch.load" and not any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords):
                return True
    return False


def check_plugin(folder: Path, own: str) -> list[str]:
    """What is wrong with one plugin's folder."""
    wrong = []
    kind = folder.parent.name
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project.get("entry-points", {})
    for group in (f"looseleaf.{kind}", "looseleaf.reproductions"):
        if not groups.get(group):
            wrong.append(f"{folder}: no entry point in {group}")
    if "Paper" not in project.get("urls", {}):
        wrong.append(f"{folder}: no Project-URL 'Paper'")
    for need in ("README.md", "CHANGELOG.md", "src", "tests"):
        if not (folder / need).exists():
            wrong.append(f"{folder}: no {need}")
    for path in (folder / "src").rglob("*.py"):
        for module, _ in imports(path):
            if module == "looseleaf_lab" and path.name != "reproduction.py":
                wrong.append(f"{path}: imports the lab; only reproduction.py may")
            elif module.startswith("looseleaf_") and module not in (own, "looseleaf_kernels", "looseleaf_lab"):
                wrong.append(f"{path}: imports another plugin, {module}")
    return wrong


def main() -> int:
    """Check the repository."""
    wrong: list[str] = []
    for pyproject in sorted(ROOT.glob("plugins/*/*/pyproject.toml")):
        folder = pyproject.parent
        wrong += check_plugin(folder, "looseleaf_" + folder.name.replace("-", "_"))
    for path in (ROOT / "packages/looseleaf/src").rglob("*.py"):
        for module, top in imports(path):
            if module.startswith("looseleaf_") and (top or module not in ("looseleaf_lab", "looseleaf_kernels")):
                wrong.append(f"{path}: the core imports {module}")
            if top and module in ("transformers", "diffusers", "ray"):
                wrong.append(f"{path}: the core imports {module} at import time")
    for path in (ROOT / "kernels/src").rglob("*.py"):
        wrong += [f"{path}: the kernels import {m}" for m, _ in imports(path)
                  if m == "looseleaf" or (m.startswith("looseleaf_") and m != "looseleaf_kernels")]
    for path in (ROOT / "packages/looseleaf-lab/src").rglob("*.py"):
        wrong += [f"{path}: the lab imports {m}" for m, _ in imports(path)
                  if m.startswith("looseleaf_") and m not in ("looseleaf_lab", "looseleaf_kernels")]
    for path in [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("kernels/src/**/*.py"),
                 *ROOT.glob("plugins/*/*/src/**/*.py")]:
        if loads_pickle(path):
            wrong.append(f"{path}: loads pickles; store tensors as safetensors")
        if len(path.read_text(encoding="utf-8").splitlines()) > 600:
            wrong.append(f"{path}: more than 600 lines: more than one idea?")
    for line in wrong:
        print(line.replace(str(ROOT) + "/", ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
