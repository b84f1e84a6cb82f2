"""What README and the tutorials show, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def blocks(path: str, language: str = "python") -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), flags=re.S)


def test_readme_example_runs() -> None:
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    inputs = tokenizer("It was a dark and stormy night. " * 20, return_tensors="pt", return_token_type_ids=False)
    for block in blocks("README.md"):
        exec(block, {"model": tiny_text_llama(), "inputs": inputs})


def test_pruned_models_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import looseleaf
    from looseleaf.testing.models import tiny_text_llama

    monkeypatch.chdir(tmp_path)
    keep, learn, tie, compress = blocks("docs/how-to/pruned-models.md")
    exec(keep, {"model": tiny_text_llama(), "looseleaf": looseleaf})
    assert (tmp_path / "pruned" / "model.safetensors").exists()
    model = tiny_text_llama()
    exec(learn, {"model": model, "torch": torch})
    assert looseleaf.Masks.of(model)
    names: dict[str, Any] = {"model": tiny_text_llama()}
    exec(tie, names)
    assert names["masks"].sparsity() == pytest.approx(0.25, abs=0.02)
    if not torch.cuda.is_available():
        compress = compress.replace(".cuda()", "")
        with pytest.raises(looseleaf.UnsupportedModelError, match="expected a CUDA device"):
            exec(compress, {"model": tiny_text_llama(), "looseleaf": looseleaf})


@pytest.mark.slow
@pytest.mark.smollm2
def test_five_minutes_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("docs/tutorials/five-minutes.md"):
        exec(block, names)
    assert (tmp_path / "masks.safetensors").exists()


def test_claims_of_every_plugin_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    claims: Any = pytest.importorskip("claims")
    readme = "| claim | paper | here | |\n|---|---|---|---|\n| a \\| b | - | 3 | **does not hold** |\n\n| x | y |"
    assert claims.rows(readme) == [("a \\| b", "-", "3", "**does not hold**")]
    assert claims.verdict("holds by its rule") == "holds" and claims.verdict("**does not hold**") == "does not hold"
    for path in ROOT.glob("plugins/*/*/README.md"):
        assert claims.rows(path.read_text(encoding="utf-8")), f"{path}: no table with the headings claim, paper"
    assert "| verdict |" in claims.page()


def test_every_command_shown_exists() -> None:
    from looseleaf.cli.main import build_parser

    known = set(next(a for a in build_parser()._actions if a.dest == "command").choices or ())
    assert "list" in known
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*/README.md")]:
        for command in re.findall(r"^looseleaf ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.M):
            assert command in known, f"{page.name} shows 'looseleaf {command}'"


def test_the_two_commands_of_readme_are_what_ci_calls() -> None:
    assert ".nox/ci/bin/nox" in (ROOT / ".ci" / "run").read_text()
    first = blocks("README.md", "")[0]
    assert "pip install nox && nox -s demo" in first and "pip install nox && nox " in first
