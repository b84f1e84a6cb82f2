"""EASE through servers that speak the OpenAI protocol."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from looseleaf import EndpointError
from looseleaf_ease import EASE
from looseleaf_text import EndpointModel, LocalModel
from looseleaf_text.testing import ToyLanguageModel, toy_task
from looseleaf_text.testing.servers import toy_server

SMALL: dict[str, Any] = {"k": 2, "total_iterations": 6, "n_init": 3, "domain": 50, "keep": 4, "hidden": 8,
                         "train_steps": 10, "target": 2.0}


def test_through_a_server_as_without_one() -> None:
    task = toy_task(size=6)
    local = EASE(**SMALL, encoder="model").optimize(task, ToyLanguageModel(), progress=False)
    with toy_server() as url:
        remote = EASE(**SMALL, encoder="model").optimize(task, EndpointModel(url, "toy"), progress=False)
    assert remote.exemplars == local.exemplars
    for ours, theirs in zip(local.info["tried"], remote.info["tried"], strict=True):
        assert ours[2:] == theirs[2:] and ours[:2] == pytest.approx(theirs[:2])
    assert remote.info["fitness"] == local.info["fitness"]


def test_a_server_without_embeddings() -> None:
    with toy_server(embeddings=False) as url:
        model = EndpointModel(url, "toy", retries=0)
        with pytest.raises(EndpointError, match=r"(?s)status 404.*give EASE another encoder, such as encoder='minilm'"):
            EASE(**SMALL, encoder="model").optimize(toy_task(size=6), model, progress=False)
        prompt = EASE(**SMALL, encoder=ToyLanguageModel().embed).optimize(toy_task(size=6), model, progress=False)
    assert prompt.info["evaluations"] == 6


def test_a_server_without_log_probabilities() -> None:
    task = toy_task(size=6)
    with toy_server(log_probs=False) as url:
        with pytest.raises(EndpointError, match=r'returns no log-probabilities.*scoring="generate"'):
            EASE(**SMALL, encoder="model").optimize(task, EndpointModel(url, "toy"), progress=False)
        by_text = EASE(**SMALL, encoder="model").optimize(
            task, EndpointModel(url, "toy", scoring="generate"), progress=False)
    assert by_text.info["evaluations"] == 6 and 0 <= by_text.info["fitness"] <= 1


def test_on_a_local_model_that_embeds() -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    task = toy_task(size=6)
    task.template = "{text}"
    model = LocalModel(tiny_text_llama().eval(), tiny_tokenizer())
    prompt = EASE(**SMALL, encoder="model").optimize(task, model, progress=False)
    assert prompt.info["evaluations"] == 6 and task.evaluate(prompt.on(model), task.dev).score == prompt.info["fitness"]
    assert model.forwarded < model.tokens  # the exemplars are forwarded once for all validation examples
