"""The command line from end to end: real processes, installed plugins, a tiny model in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "looseleaf.cli.main"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer in ``tiny``."""
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("command-line")
    tiny_text_llama().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    return folder


def looseleaf(place: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=place, env=_environment(place))
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done


def _environment(place: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LOOSELEAF_CACHE": str(place / "cache")}


def rows(report: dict[str, Any], title: str) -> list[dict[str, Any]]:
    table = next(t for t in report["tables"] if t["title"] == title)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


LEFT_OUT = {
    "attention": {*(("prefill", name) for name in ("sparsed", "paroattention", "sparsifiner", "mask-and-match",
                                                   "theme-transformer")), *(
        ("denoising", name) for name in ("flexprefill", "minference", "sliding-window", "sparsed", "paroattention",
                                         "sparsifiner", "mask-and-match", "theme-transformer"))},
    "pruners": {("pruned-weights", "lottery-ticket"), ("pruned-weights", "lottery-rewinding"),
                ("pruned-weights", "(Wanda), (SparseGPT)"), ("pruned-weights", "rmask-tuning"),
                ("lotteries", "rmask-tuning"), ("lotteries", "unified-sparsity"), *(
        (bench, name) for bench in ("pruned-weights", "lotteries")
        for name in ("outlandish", "leaf", "colormae", "lemo"))},
    "prompts": {("picture-prompts", "tapruning")}, "probes": set()}
"""(bench, plugin): methods for other phases of attention, or that train or need pictures with classes, or that remove
something else, or are for another kind of model; with
``--denoising`` and no name none is compared in denoising."""


def test_list_and_info(place: Path) -> None:
    listed = {(e["name"], e["kind"]): e for e in json.loads(looseleaf(place, "list", "--json").stdout)}
    for name in (("flexprefill", "attention"), ("essential-sparsity", "pruners"), ("promptquine", "prompts"),
                 ("tapruning", "prompts"), ("lineas", "probes"), ("sliding-window", "attention")):
        assert listed[name]["broken"] is None
    for name, kind in listed:
        about = json.loads(looseleaf(place, "info", name, "--kind", kind, "--json").stdout)
        assert about["paper"]["title"] and about["bibtex"].startswith("@")


def test_run_an_attention_backend(place: Path) -> None:
    (place / "book.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    done = looseleaf(place, "run", "flexprefill", "--model", "tiny", "--text", "book.txt", "--context", "1200",
                     "--gamma", "0.9", "--min-budget", "128", "--json", "--out", "run.html")
    report = json.loads(done.stdout)
    row = {r["backend"]: r for r in rows(report, "Prefill")}["flexprefill"]
    assert row["tokens"] == 1200 and row["fallbacks"] == 0 and 0 < row["density"] < 1
    assert "<svg" in (place / "run.html").read_text()
    assert "gamma" in looseleaf(place, "run", "flexprefill", "--gamma", "1.5", code=2).stderr
    assert "--gamma" in looseleaf(place, "run", "flexprefill", "--help-plugin").stdout
    assert "cannot read" in looseleaf(place, "run", "flexprefill", "--text", "none.txt", code=2).stderr
    assert "Did you mean 'smollm2'" in looseleaf(place, "run", "flexprefill", "--model", "smolm2", code=2).stderr


def test_run_a_pruner_and_use_its_masks(place: Path) -> None:
    looseleaf(place, "run", "essential-sparsity", "--model", "tiny", "--sparsity", "0.25", "--context", "128",
              "--save", "masks.safetensors", "--json")
    from looseleaf import Masks

    masks = Masks.load(place / "masks.safetensors")
    assert masks.metadata["plugin"] == "essential-sparsity" and masks.sparsity() == pytest.approx(0.25, abs=1e-4)
    assert "sparsity" in looseleaf(place, "run", "essential-sparsity", "--sparsity", "1.0", code=2).stderr


def test_run_an_optimiser_and_load_its_prompt(place: Path) -> None:
    looseleaf(place, "run", "tapruning", "--model", "tiny", "--task", "sentiment", "--calls", "120",
              "--save", "prompt.json", "--json")
    from looseleaf_text import TextPrompt

    assert "{text}" in TextPrompt.load(place / "prompt.json").text
    assert "Did you mean" in looseleaf(place, "run", "tapruning", "--task", "sentimant", code=2).stderr


def test_run_a_probe(place: Path) -> None:
    report = json.loads(looseleaf(place, "run", "lineas", "--model", "tiny", "--steps", "2", "--json").stdout)
    assert rows(report, "Effect on held-out sentences")


@pytest.mark.parametrize(("kind", "options", "titles"), [
    # the denoising models would be trained here for ten minutes
    ("attention", ["--context", "256", "512", "--denoising"], ["Prefill"]),
    ("pruners", ["--sparsity", "0.5", "--steps", "40", "--seeds", "1"],
     ["Pruning without retraining", "Pruning with training"]),
    ("prompts", ["--plugins", "tapruning", "--task", "subjects", "--calls", "100"], ["Prompts found"]),
    ("probes", ["--plugins", "lineas"], ["Probes"])])
def test_compare(place: Path, kind: str, options: list[str], titles: list[str]) -> None:
    done = looseleaf(place, "compare", kind, "--model", "tiny", *options, "--json", "--out", f"{kind}.html",
                     "--state", f"state-{kind}")
    report = json.loads(done.stdout)
    left_out = {(row[0], row[1]) for t in report["tables"] if t["title"] == "Left out" for row in t["rows"]}
    assert left_out <= LEFT_OUT[kind], report["tables"][-1]
    assert {t["title"] for t in report["tables"]} >= set(titles)
    assert (place / f"{kind}.html").stat().st_size > 5000 and list((place / f"state-{kind}").glob("*.json"))


def test_every_weight_pruner_is_compared_somewhere(place: Path) -> None:
    """A continuation of the comparison above: what is finished is taken from its folder."""
    done = looseleaf(place, "compare", "pruners", "--model", "tiny", "--sparsity", "0.5", "--steps", "40", "--seeds",
                     "1", "--state", "state-pruners", "--json")
    report = json.loads(done.stdout)
    compared = {r["pruner"] for title in ("Pruning without retraining", "Pruning with training")
                for r in rows(report, title)}
    assert compared >= {"essential-sparsity", "lottery-ticket", "lottery-rewinding"}
    reasons = {row[1]: row[2] for t in report["tables"] if t["title"] == "Left out" for row in t["rows"]}
    assert reasons["leaf"] == "expected a WeightPruner, got TokenPruner"
    assert reasons["outlandish"] == "expected a WeightPruner, got UpdatePruner"


def test_benches_and_their_options(place: Path) -> None:
    shown = looseleaf(place, "compare", "pruners", "--help-benches").stdout
    assert all(text in shown for text in ("--bench pruned-weights", "--bench lotteries", "--sparsity", "--network",
                                          "fractions of the weights to remove"))
    only = looseleaf(place, "compare", "pruners", "--bench", "lotteries", "--help-benches").stdout
    assert "--network" in only and "--windows" not in only
    for options, message in ((["--bench", "lotery"], "Did you mean 'lotteries'"), (["--sparsty", "1"], "'sparsity'"),
                             (["--sparsity", "1.5"], "[0, 1)"), (["--task", "topic"], "Did you mean 'topics'")):
        refused = looseleaf(place, "compare", "pruners", *options, code=2).stderr
        assert message in " ".join(refused.replace("│", " ").split()), refused
    refused = looseleaf(place, "compare", "attention", "--model", "a", "--model", "b", code=2).stderr
    assert "--model: expected one value for the bench prefill, got a b" in refused


@pytest.fixture
def third_party(place: Path, tmp_path: Path) -> dict[str, str]:
    """The environment with a package of somebody else: a bench, and two reproductions, a function and a study."""
    (tmp_path / "somebody.py").write_text("""
import dataclasses
from looseleaf import Probe, Report
from looseleaf_lab.study import Study, StudyClaim


@dataclasses.dataclass
class Loudness:
    '''How loud.

    Args:
        volume: from 0 on.
    '''

    volume: int = 3
    interface = Probe

    def suits(self, plugin):
        return None if plugin.__name__ == "LinEAS" else "too quiet"

    def run(self, plugins, *, state=None, seed=0, progress=None):
        return Report("Loudness", {"plugins": ", ".join(plugins), "volume": self.volume, "state": str(state)})


def plain(*, seeds=5, quick=False):
    return Report("plain", {"seeds": seeds, "quick": quick})


def measure(seed, scale):
    return {"value": seed}


study = Study("study", measure, [StudyClaim("It grows", "abstract", "up", "above 9", lambda r: (False, "less"))],
              facts=lambda results: {"values": results.values("value")})
""")
    folder = tmp_path / "looseleaf_somebody-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: looseleaf-somebody\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[looseleaf.benches]\nloudness = somebody:Loudness\n"
        "[looseleaf.reproductions]\nplain = somebody:plain\ngrows = somebody:study\n")
    return {**_environment(place), "PYTHONPATH": str(tmp_path)}


def test_a_bench_and_reproductions_of_somebody_else(place: Path, third_party: dict[str, str]) -> None:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=place, env=third_party)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-2000:]
        return done

    report = json.loads(run("compare", "probes", "--bench", "loudness", "--volume", "7", "--state", "s",
                            "--json").stdout)
    assert report["facts"] == {"plugins": "lineas", "volume": 7, "state": "s"}
    assert "too quiet" in json.dumps(report["tables"])
    assert json.loads(run("reproduce", "plain", "--quick", "--seeds", "2", "--json").stdout)["facts"] == {
        "seeds": 2, "quick": True}
    assert "--jobs: expected a reproduction that takes jobs" in run("reproduce", "plain", "--jobs", "2", code=2).stderr
    done = run("reproduce", "grows", "--seeds", "3", "--jobs", "2", "--state", "grown", "--json", "--strict", code=1)
    assert json.loads(done.stdout)["facts"]["values"] == [0, 1, 2] and len(list((place / "grown").iterdir())) == 3
    assert run("reproduce", "grows", "--jobs", "0", code=2).stderr == (
        "looseleaf: jobs: expected an integer >= 1, got 0\n")


def test_an_interrupted_comparison_keeps_what_it_has_and_resumes(place: Path) -> None:
    state = place / "interrupted"
    # in a group of its own, and hearing SIGINT even where this process was started in the background, deaf to it
    process = subprocess.Popen(
        [*COMMAND, "compare", "pruners", "--bench", "pruned-weights", "--task", "--model", "tiny",
         "--sparsity", *(str(n / 20) for n in range(1, 19)), "--state", str(state), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place, env=_environment(place),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    until = time.monotonic() + 120
    while len(list(state.glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "resumes" in said, said[-2000:]
    kept = {p: p.stat().st_mtime_ns for p in state.glob("*.json")}
    assert len(kept) >= 3
    done = looseleaf(place, "compare", "pruners", "--bench", "pruned-weights", "--task", "--model", "tiny",
                     "--sparsity", *(str(n / 20) for n in range(1, 19)), "--state", str(state), "--json")
    found = rows(json.loads(done.stdout), "Pruning without retraining")
    assert len({(r["pruner"], r["asked for"]) for r in found}) == len(found) >= 1 + 3 * 18
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "finished cells were measured again"


def test_a_full_disk_is_reported_and_leaves_the_former_file(place: Path) -> None:
    report = place / "kept.json"
    code = ("import errno, os, sys\nfrom looseleaf.cli.main import main\n"
            "def full(*given): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
            "os.replace = full\nsys.exit(main(sys.argv[1:]))")
    report.write_text("former")
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "essential-sparsity", "--model", "tiny", "--context", "64",
         "--out", str(report)], capture_output=True, text=True, cwd=place, env=_environment(place))
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert report.read_text() == "former" and not list(place.glob("kept.json*.part"))


def test_check_and_doctor(place: Path) -> None:
    checked = json.loads(looseleaf(place, "check", "sliding-window", "--json").stdout)
    assert checked["passes"] and len(checked["checks"]) > 5
    assert all(c["problem"] is None for c in checked["checks"])
    doctor = json.loads(looseleaf(place, "doctor", "--json").stdout)
    chosen = {(r["operation"], r["device"]): r for r in rows(doctor, "Kernels")}
    assert chosen["block_sparse_attention", "cpu"]["implementation"] == "cpu"
    assert all(r["state"] == "ready" for r in rows(doctor, "Plugins"))


@pytest.mark.slow
@pytest.mark.smollm2
def test_reproduce_prints_every_claim(place: Path) -> None:
    done = subprocess.run([*COMMAND, "reproduce", "lineas", "--quick", "--json"], capture_output=True, text=True,
                          cwd=place, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    claims = json.loads(done.stdout)["claims"]
    assert len(claims) >= 5 and all(c["paper"] and c["measured"] and c["rule"] for c in claims)
    assert {c["verdict"] for c in claims} <= {"holds", "does not hold", "not shown at this scale"}
