"""Every installed prompt optimiser, unchanged, against a real OpenAI-compatible server: ``transformers serve``.

The server gives no log-probabilities, so tasks are scored by what it generates; what is found must be what the same
search finds on the same model in this process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import looseleaf
from looseleaf import Budget, Example, Task
from looseleaf_text import EndpointModel, LanguageModel, LocalModel, TextTask
from looseleaf_text.testing import ToyLanguageModel, toy_task
from looseleaf_text.testing.models import letters_model
from looseleaf_text.testing.servers import toy_server, transformers_server

pytest.importorskip("transformers", reason="transformers is not installed")

ELSEWHERE = {"layoutprompter", "pragmatic-examples", "sa-icl"}
"""Methods whose tasks are not a text and its answer: their own tests have a server or say why there is none."""
OPTIMIZERS = [e.name for e in looseleaf.plugins("prompts") if e.name not in ELSEWHERE
              and issubclass(LanguageModel, looseleaf.load(e.name, kind="prompts").accepts)]
SMALLER: dict[str, dict[str, Any]] = {
    "ease": {"k": 2, "total_iterations": 4, "n_init": 2, "domain": 50, "keep": 4, "hidden": 8, "train_steps": 10,
             "encoder": ToyLanguageModel().embed},
    "promptquine": {"population_size": 3, "reproduction_size": 4, "max_prompts": 8, "min_prompt_length": 2}}
"""Parameters that make a search short; all others have their defaults."""
NO_GENERATION = {"prompting-survey", "template-search", "token-prepending"}
"""Methods for classification, or for embeddings."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, LocalModel]]:
    """URL, name of the model at the server, and the same model here."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("served"), letters_model()
    try:
        with transformers_server(model, tokenizer, folder) as url:
            yield url, str(folder), LocalModel(model, tokenizer)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def short_task() -> TextTask:
    """Texts to be continued; a model with random weights says no word, so letters are counted."""
    return dataclasses.replace(toy_task(size=3, generation=True), max_tokens=6, template="{text}", metric=letters)


def task_of(name: str) -> Task:
    """What the conformance kit checks the method on, smaller: labelled reviews, or embeddings of them."""
    task: Task = looseleaf.load(name, kind="prompts").conformance()["task"]()
    return dataclasses.replace(task, train=task.train[:4], dev=task.dev[:4], test=task.test[:4])


def letters(prediction: str, example: Example) -> float:
    """The fraction of the target's different letters that stand in the prediction."""
    wanted = set(str(example.target))
    return len(wanted & set(prediction)) / len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_real_server_as_in_this_process(name: str, both: tuple[str, str, LocalModel], tmp_path: Path) -> None:
    url, served, local = both
    remote = EndpointModel(url, served, concurrency=2, scoring="generate")
    optimizer = looseleaf.get(name, kind="prompts", **SMALLER.get(name, {}))
    if name == "token-prepending":
        with pytest.raises((looseleaf.UnsupportedModelError, looseleaf.EndpointError), match="embed"):
            optimizer.optimize(task_of(name), remote, budget=Budget(calls=60), progress=False)
        return
    if name in NO_GENERATION:
        task = dataclasses.replace(toy_task(size=3), template="{text}")
        found = optimizer.optimize(task, remote, budget=Budget(calls=60), progress=False)
        assert found.info["stopped"] in ("done", "budget: calls")
        assert remote.calls <= 60 + len(task.dev)
        return
    found = optimizer.optimize(short_task(), remote, budget=Budget(calls=60), progress=False)
    if name in ("promptquine", "tapruning"):
        # this server says nothing about its tokens, so words are pruned; in this process it would be tokens
        start = iter(found.info["start_text"].split())
        assert found.info["evaluations"] > 1 and all(
            word in start for word in found.text.replace("{text}", " {text} ").split())
        return
    here = optimizer.optimize(short_task(), local, budget=Budget(calls=60), progress=False)
    assert found.render(short_task().test[0]) == here.render(short_task().test[0])
    assert found.info["fitness"] == here.info["fitness"] > 0 and found.info["evaluations"] == here.info["evaluations"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_server_with_log_probabilities_as_without_one(name: str) -> None:
    optimizer = looseleaf.get(name, kind="prompts", **SMALLER.get(name, {}))
    task = task_of(name)
    with toy_server() as url:
        found = optimizer.optimize(task, EndpointModel(url, "toy"), budget=Budget(calls=200), progress=False)
    here = optimizer.optimize(task, ToyLanguageModel(), budget=Budget(calls=200), progress=False)
    assert found.fingerprint() == here.fingerprint()
    assert found.info["fitness"] == pytest.approx(here.info["fitness"])
