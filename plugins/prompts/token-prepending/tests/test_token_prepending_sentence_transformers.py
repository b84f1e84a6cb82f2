"""Inside sentence-transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_token_prepending import SentenceEncoder, TokenPrepending

pytest.importorskip("transformers")
torch.set_num_threads(1)
TEXTS = ["A cat sleeps.", "Rain is expected in the north.", "no", "The cat is asleep now."]


def encoder(**fields: Any) -> SentenceEncoder:
    return TokenPrepending(**fields).encoder(tiny_text_llama(), tiny_tokenizer())


def module(made: SentenceEncoder) -> Any:
    from looseleaf_token_prepending.module import TokenPrependingModule

    return TokenPrependingModule(made)


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize("fields", [{}, {"prompt": "metaeol", "exit_layer": -1}, {"end_layer": 0, "normalize": False}])
def test_encodes_as_the_encoder_does(library: Any, fields: dict[str, Any]) -> None:
    ours = encoder(**fields)
    theirs = library.SentenceTransformer(modules=[module(ours)], device="cpu")
    made = theirs.encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(made, ours.encode(TEXTS), atol=1e-5)
    assert made.dtype == np.float32 and theirs.get_embedding_dimension() == ours.dimension == made.shape[1]
    np.testing.assert_allclose(theirs.encode(TEXTS[0]), made[0], atol=1e-5)
    prompted = theirs.encode(TEXTS, prompt="query: ")
    np.testing.assert_allclose(prompted, ours.encode(["query: " + t for t in TEXTS]), atol=1e-5)


def test_retrieval_code_runs(library: Any) -> None:
    model = library.SentenceTransformer(modules=[module(encoder(exit_layer=-1))], device="cpu")
    hits = library.util.semantic_search(model.encode_query(TEXTS[:1]), model.encode_document(TEXTS), top_k=2)
    assert hits[0][0]["corpus_id"] == 0
    assert model.similarity(model.encode(TEXTS), model.encode(TEXTS)).shape == (4, 4)


def test_saved_and_loaded(library: Any, tmp_path: Path) -> None:
    model = library.SentenceTransformer(modules=[module(encoder(prompt="knowledge", exit_layer=-1))], device="cpu")
    model.save(str(tmp_path / "model"))
    assert not list((tmp_path / "model").rglob("*.bin"))
    again = library.SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True,
                                        local_files_only=True)
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    assert again[0].encoder.settings == model[0].encoder.settings


def test_length_can_be_set(library: Any) -> None:
    model = library.SentenceTransformer(modules=[module(encoder())], device="cpu")
    assert model.max_seq_length == 2048
    model.max_seq_length = 60
    with pytest.warns(UserWarning, match="fit into 60 tokens"):
        model.encode(["word " * 50])


def test_the_model_can_be_moved(library: Any) -> None:
    ours = encoder()
    expected = ours.encode(TEXTS)
    model = library.SentenceTransformer(modules=[module(ours)], device="cpu").bfloat16()
    made = model.encode(TEXTS, convert_to_tensor=True)
    assert made.dtype == torch.bfloat16 and float((made.float() * torch.tensor(expected)).sum(1).min()) > 0.98


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modules", None)
    monkeypatch.delitem(sys.modules, "looseleaf_token_prepending.module", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'looseleaf-token-prepending\[sentence-transformers\]'"):
        module(encoder())
