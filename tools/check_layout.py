"""Rules of the repository that no general tool checks; prints what breaks them and exits with 1.

- a plugin has pyproject.toml, README.md, CHANGELOG.md, src/, tests/, an entry point of its kind and a reproduction;
- arrows point one way: plugins -> text, tickets, vision, models -> core; plugins -> kernels -> torch; only a plugin's
  reproduction.py imports the lab; no plugin imports another; the core imports none of them;
- no import circle among the files of a package: imports inside functions count, those for type checkers do not;
- across packages only documented names are imported: no underscore, and a docstring where there is code;
- a file under 80 lines has two importers, or is merged;
- the core does not grow (the goal is 6,000 lines, docs/decisions/008-size-of-the-core.md);
- the core imports no heavy third party at import time, and nothing loads pickles;
- errors say what was expected and what was given.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
CORE, LAB, KERNELS = "looseleaf", "looseleaf_lab", "looseleaf_kernels"
LIBRARIES = ("looseleaf_text", "looseleaf_vision", "looseleaf_tickets", "looseleaf_models")
MAY_IMPORT = {CORE: set(), KERNELS: set(), LAB: {CORE, KERNELS, *LIBRARIES}, **{name: {CORE} for name in LIBRARIES}}
HEAVY = ("transformers", "diffusers", "ray", "httpx", "timm", "torchvision", "scipy", "sklearn")
SMALL, LARGE = 80, 600
CORE_LINES = 8000
"""Most lines the core may have: lowered with every line taken out, never raised (docs/decisions/008)."""
OF_TORCH = ("_parameters", "_buffers", "_modules", "_version")
"""Attributes of torch's own objects, which a package of ours may happen to have, too."""
METHOD = {"attention": "backend.py", "pruners": "pruner.py", "prompts": "optimizer.py", "probes": "probe.py"}
"""The file of the method: it is there whatever its length."""


@dataclass
class Import:
    """One name imported from one module, or a module imported whole (``name`` is None)."""

    module: str
    name: str | None
    at_import_time: bool
    line: int


@dataclass
class Package:
    """The Python files of one distribution."""

    folder: Path
    name: str
    kind: str | None = None
    files: dict[str, Path] = field(default_factory=dict)  # module -> file
    imports: dict[str, list[Import]] = field(default_factory=dict)
    points: set[str] = field(default_factory=set)  # modules that entry points name


def packages() -> list[Package]:
    """All distributions of the repository."""
    found = []
    for pyproject in sorted([*ROOT.glob("packages/*/pyproject.toml"), ROOT / "kernels/pyproject.toml",
                             *ROOT.glob("plugins/*/*/pyproject.toml")]):
        folder = pyproject.parent
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        kind = folder.parent.name if folder.parent.parent.name == "plugins" else None
        package = Package(folder, project["name"].replace("-", "_"), kind)
        package.points = {value.partition(":")[0] for group in project.get("entry-points", {}).values()
                          for value in group.values()}
        package.points |= {value.partition(":")[0] for value in project.get("scripts", {}).values()}
        source = folder / "src"  # looseleaf-papers has none
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            package.files[module] = path
            package.imports[module] = list(imports_of(path))
        found.append(package)
    return found


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, those for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def visit(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, top)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, top, node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield Import(node.module, alias.name, top, node.lineno)
        inside = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, True)


def edges(package: Package) -> dict[str, set[str]]:
    """File -> files of the same package that it imports, by module name."""
    out: dict[str, set[str]] = {module: set() for module in package.files}
    for module, found in package.imports.items():
        for each in found:
            target = f"{each.module}.{each.name}" if each.name and f"{each.module}.{each.name}" in package.files \
                else each.module
            if target in package.files and target != module:
                out[module].add(target)
    return out


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, directly or through others (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                out.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return out


def check_arrows(package: Package) -> Iterator[str]:
    """Imports that point the wrong way."""
    for module, found in package.imports.items():
        path = package.files[module]
        for each in found:
            top = each.module.partition(".")[0]
            if package.name == CORE and each.at_import_time and top in HEAVY:
                yield f"{path}:{each.line}: the core imports {top} at import time"
            if top == package.name or not (top == CORE or top.startswith("looseleaf_")):
                continue
            if package.kind is None:
                # the command line asks for the lab and the kernels where they are installed
                asked = package.name == CORE and not each.at_import_time and top in (LAB, KERNELS)
                if top not in MAY_IMPORT.get(package.name, set()) and not asked:
                    yield f"{path}:{each.line}: {package.name} imports {top}"
            elif top == LAB:
                if path.name != "reproduction.py":
                    yield f"{path}:{each.line}: imports the lab; only reproduction.py may"
            elif top not in (CORE, KERNELS, *LIBRARIES):
                yield f"{path}:{each.line}: imports another plugin, {top}"


def documented(path: Path) -> dict[str, bool]:
    """Top-level names of a file -> whether they have a docstring; what is no code (constants, aliases) has one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    out: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.col_offset == 0:
            overload = any("overload" in ast.unparse(d) for d in node.decorator_list)
            out[node.name] = out.get(node.name, False) or overload or ast.get_docstring(node) is not None
    return out


def check_names(package: Package, everything: dict[str, Package]) -> Iterator[str]:
    """Private or undocumented names taken from other packages."""
    private = {name: owner for owner, other in everything.items() if owner != package.name
               and owner in (CORE, KERNELS, LAB, *LIBRARIES) for path in other.files.values()
               for name in re.findall(r"(?:def |self\.|^)(_[a-z][a-z_]+)\b", path.read_text(encoding="utf-8"), re.M)
               if name not in OF_TORCH}
    for module, found in package.imports.items():
        path = package.files[module]
        for each in found:
            owner = everything.get(each.module.partition(".")[0])
            if owner is None or owner is package or each.name is None:
                continue
            if each.name.startswith("_") or any(part.startswith("_") for part in each.module.split(".")):
                yield f"{path}:{each.line}: imports the private name {each.name} of {each.module}"
            elif each.module in owner.files and not documented(owner.files[each.module]).get(each.name, True):
                yield f"{path}:{each.line}: {each.module}.{each.name} has no docstring"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = "\n".join(p.read_text(encoding="utf-8") for p in package.files.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in private and not node.attr.startswith("__") \
                    and not re.search(rf"(?:def |self\.|^){node.attr}\b", own, re.M):
                yield f"{path}:{node.lineno}: uses {node.attr}, which is private to {private[node.attr]}"


def check_sizes(package: Package) -> Iterator[str]:
    """Files that are too short to stand alone, or too long for one idea."""
    graph = edges(package)
    for module, path in package.files.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LARGE:
            yield f"{path}: {lines} lines: more than one idea?"
        usual = path.name in ("__init__.py", "__main__.py", "reproduction.py", METHOD.get(package.kind or ""))
        if lines >= SMALL or usual:
            continue
        importers = sum(module in targets for targets in graph.values()) + (module in package.points)
        importers += sum(any(module in {e.module for e in found} for found in other.imports.values())
                         for other in ALL.values() if other is not package)
        importers += named_in_text(package, module)
        if importers < 2:
            yield f"{path}: {lines} lines and {importers} importer{'' if importers == 1 else 's'}: merge it"


def named_in_text(package: Package, module: str) -> int:
    """How many files of the package load a module by a name in quotes, as lazy packages do."""
    tails = {module.removeprefix(f"{package.name}."), module.rpartition(".")[2]}
    words = re.compile("|".join(rf'"{re.escape(tail)}[":]' for tail in tails))
    return sum(bool(words.search(path.read_text(encoding="utf-8"))) for name, path in package.files.items()
               if name != module)


def check_plugin(package: Package) -> Iterator[str]:
    """What every plugin's folder has."""
    folder = package.folder
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project.get("entry-points", {})
    for group in (f"looseleaf.{package.kind}", "looseleaf.reproductions"):
        if not groups.get(group):
            yield f"{folder}: no entry point in {group}"
    if "Paper" not in project.get("urls", {}):
        yield f"{folder}: no Project-URL 'Paper'"
    for need in ("README.md", "CHANGELOG.md", "src", "tests"):
        if not (folder / need).exists():
            yield f"{folder}: no {need}"


def check_attributes(path: Path) -> Iterator[str]:
    """Class attributes that changed what an argument means in the first edition."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for each in node.body if isinstance(node, ast.ClassDef) else []:
            targets = [each.target] if isinstance(each, ast.AnnAssign) else each.targets if isinstance(
                each, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Name) and target.id in ("removes", "improves", "changes"):
                    yield f"{path}:{each.lineno}: {target.id}: a class attribute that changes what an argument means"


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


def check_words() -> Iterator[str]:
    """Words that the style does without, in all tracked text."""
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.txt"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    for name in tracked:
        if name == "tools/check_layout.py" or not (ROOT / name).is_file():
            continue
        for n, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\ballowed (is|are)\b", line):
                yield f"{name}:{n}: say 'expected ..., got ...', not 'allowed is'"


ALL: dict[str, Package] = {}


def main() -> int:
    """Check the repository."""
    found = packages()
    ALL.update({package.name: package for package in found})
    wrong: list[str] = list(check_words())
    for package in found:
        wrong += check_arrows(package)
        wrong += check_names(package, ALL)
        wrong += check_sizes(package)
        wrong += [f"{package.name}: import circle: {', '.join(group)}" for group in circles(edges(package))]
        if package.kind is not None:
            wrong += check_plugin(package)
        wrong += [line for path in package.files.values() for line in check_attributes(path)]
        wrong += [f"{path}: loads pickles; store tensors as safetensors" for path in package.files.values()
                  if loads_pickle(path)]
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in ALL[CORE].files.values())
    if lines > CORE_LINES:
        wrong.append(f"the core has {lines} lines: at most {CORE_LINES}")
    print(f"the core has {lines} lines of {CORE_LINES}")
    for line in wrong:
        print(line.replace(f"{ROOT}/", ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
