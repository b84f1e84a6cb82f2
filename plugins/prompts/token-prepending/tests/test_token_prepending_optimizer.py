"""Choosing prompt and layers, and what the choice is judged by."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import Budget, Example, Prompt, UnsupportedModelError
from looseleaf.testing.models import tiny_tokenizer
from looseleaf_text import LanguageModel, LocalModel, TextPrompt, TextTask
from looseleaf_text.testing import ToyLanguageModel, toy_task
from looseleaf_token_prepending import EmbeddingPrompt, TokenPrepending, nearest_neighbour, pairs_task, similarity
from looseleaf_token_prepending.quality import Development, cosines, weighted_spearman

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

PAIRS = [("A cat sleeps.", "The cat is asleep.", 5), ("Rain falls.", "It is raining.", 4.5),
         ("A cat sleeps.", "Rain.", 1), ("He sings a song.", "It is raining.", 0),
         ("She runs.", "He sings a song.", 2), ("Rain.", "Rain falls.", 4)]


def local(layers: int = 6) -> LocalModel:
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2)).eval()
    return LocalModel(network, tiny_tokenizer())


def run(model: LanguageModel, task: TextTask | None = None, plugin: TokenPrepending | None = None,
        **options: Any) -> EmbeddingPrompt:
    return (plugin or TokenPrepending()).optimize(task or toy_task(size=6), model, progress=False, **options)


# -- on a model with layers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", [toy_task(size=6), pairs_task("pairs", PAIRS)], ids=["labels", "pairs"])
def test_the_choice_is_the_best_of_what_was_tried(task: TextTask) -> None:
    model = local()
    prompt = run(model, task)
    info = prompt.info
    data = Development.of([*task.train, *task.dev])
    assert info["measure"] == data.measure and info["stopped"] == "done"
    # six layers: end layers 2 (a quarter, and the least), 3 (a half) and none, then two more prompts at the best
    assert [row[1] for row in info["explored"]][:3] == [2, 3, 0] and info["evaluations"] == 5
    assert info["fitness"] == max(row[3] for row in info["explored"])
    encoder = prompt.encoder(model.model, model.tokenizer)
    assert data.quality(encoder.encode(data.texts)) == pytest.approx(info["fitness"])
    assert 3 <= encoder.settings.exit_layer <= 6
    assert [h[0] for h in info["history"]] == [len(data.texts) * (n + 1) for n in range(5)]
    for end in (2, 3, 0):
        for leave in range(3, 7):
            rival = TokenPrepending(end_layer=end, exit_layer=leave).encoder(model.model, model.tokenizer)
            assert data.quality(rival.encode(data.texts)) <= info["fitness"] + 1e-9


def test_what_was_found_is_stored(tmp_path: Path) -> None:
    model = local()
    prompt = run(model, pairs_task("pairs", PAIRS))
    prompt.save(tmp_path / "prompt")
    again = Prompt.load(tmp_path / "prompt")
    assert isinstance(again, EmbeddingPrompt) and again.settings == prompt.settings
    assert again.encoder(model.model, model.tokenizer).settings == prompt.encoder(model.model, model.tokenizer).settings
    said = again.render(Example({"text": "A cat."}))
    assert all("<PST>" not in text and "A cat." in text for text in said)


def test_what_was_found_predicts() -> None:
    model, task = local(), pairs_task("pairs", PAIRS, test=PAIRS[:4])
    prompt = run(model, task)
    made = prompt.on(model).predict(task.test)
    assert [m.shape for m in made] == [(2, 32)] * 4
    one, two = (prompt.encoder(model.model, model.tokenizer).encode([p[k] for p in PAIRS[:4]]) for k in (0, 1))
    np.testing.assert_allclose(np.stack(made)[:, 0], one, atol=1e-5)
    expected = float(weighted_spearman((one * two).sum(1), [p[2] for p in PAIRS[:4]]))
    assert task.evaluate(prompt.on(model), "test").score == pytest.approx(expected)


def test_fixed_layers_stay() -> None:
    prompt = run(local(), plugin=TokenPrepending(end_layer=4, exit_layer=-2, alternatives=("knowledge",)))
    assert [row[1:3] for row in prompt.info["explored"]] == [[4, 5], [4, 5]]
    settings = prompt.info["settings"]
    assert settings["end_layer"] == 4 and settings["exit_layer"] == 5


def test_cost_is_booked_and_kept() -> None:
    model = local()
    texts = len(Development.of([*toy_task(size=6).train, *toy_task(size=6).dev]).texts)
    for calls in (1, texts, 2 * texts + 1):
        model.calls, model.tokens = 0, 0
        budget = Budget(calls=calls)
        prompt = run(model, budget=budget)
        assert prompt.info["evaluations"] == calls // texts and prompt.info["stopped"] == "budget: calls"
        assert budget.used["calls"] == model.calls == calls // texts * texts and budget.used["tokens"] == model.tokens
    nothing = run(model, budget=Budget(tokens=5))
    assert nothing.info["fitness"] == 0.0 and nothing.info["stopped"] == "budget: tokens"
    # what comes back then are the defaults
    default = TokenPrepending().encoder(model.model, model.tokenizer)
    assert nothing.encoder(model.model, model.tokenizer).settings == default.settings
    assert run(model, budget=Budget(seconds=1e-9)).info["stopped"] == "budget: seconds"


def test_a_stopped_search_goes_on(tmp_path: Path) -> None:
    whole = run(local())
    first = run(local(), budget=Budget(calls=25), state_dir=tmp_path)
    assert 0 < first.info["evaluations"] < whole.info["evaluations"]
    model = local()
    again = run(model, budget=Budget(calls=1000), state_dir=tmp_path)
    assert again.settings == whole.settings and again.info["explored"] == whole.info["explored"]
    assert 0 < model.calls < whole.info["history"][-1][0]


def test_a_start_takes_the_place_of_the_prompt() -> None:
    start = TextPrompt('The gist of "{text}" is:')
    prompt = run(local(), plugin=TokenPrepending(alternatives=()), start=start)
    assert {row[0] for row in prompt.info["explored"]} == {start.text}
    assert prompt.render(Example({"text": "A cat."})) == ['The gist of "A cat." is:']
    assert '<PST>{text}' in prompt.info["settings"]["templates"][0] or prompt.info["settings"]["end_layer"] == 0
    with pytest.raises(ValueError, match="one slot"):
        run(local(), start=TextPrompt("{text} and {other}"))


def test_labelled_texts_under_another_name() -> None:
    task = toy_task(size=6)

    def renamed(examples: Any) -> list[Example]:
        return [Example({"review": e.inputs["text"]}, e.target) for e in examples]

    task = dataclasses.replace(task, train=renamed(task.train), dev=renamed(task.dev), test=[], template="{review}")
    prompt = run(ToyLanguageModel(), task)
    assert task.train[0].inputs["review"] in prompt.render(task.train[0])[0]


def test_the_seed_draws_the_placeholder() -> None:
    assert run(local(), seed=4).info["settings"]["seed"] == 4


# -- on a model of texts only -------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", [toy_task(), pairs_task("pairs", PAIRS)], ids=["labels", "pairs"])
def test_without_layers_the_prompt_is_chosen(task: TextTask) -> None:
    model = ToyLanguageModel()
    prompt = run(model, task)
    info = prompt.info
    assert {row[0] for row in info["explored"]} == {
        "prompteol", "pretended-cot", "knowledge", "{text}"}
    data = Development.of([*task.train, *task.dev])
    assert data.quality(prompt.on(model).embed(data.texts)) == pytest.approx(info["fitness"])


def test_without_embeddings() -> None:
    class Mute(ToyLanguageModel):
        def embed(self, texts: list[str]) -> np.ndarray:
            return LanguageModel.embed(self, texts)

    with pytest.raises(UnsupportedModelError, match=r"Mute.*has no embeddings.*LocalModel"):
        run(Mute())


# -- bad tasks and budgets ----------------------------------------------------------------------------------------

def test_bad_tasks() -> None:
    good = pairs_task("pairs", PAIRS)
    for task, match in (
            (pairs_task("pairs", []), "expected training examples, got none"),
            (pairs_task("pairs", [(a, b, 1) for a, b, _ in PAIRS]), "one grade"),
            (dataclasses.replace(good, train=[Example({"first": "a", "second": "b"}, "much")]),
             "expected a number as target.*'much'"),
            (dataclasses.replace(good, train=[Example({"first": "a", "second": "b"}, "nan")]),
             "expected a number as target.*'nan'")):
        with pytest.raises(ValueError, match=match):
            run(local(), task)
    with pytest.raises(ValueError, match="expected texts with a target each"):
        Development.of([Example({"a": "x", "b": "y", "c": "z"}, 1.0)])
    with pytest.raises(ValueError, match="3 texts and 2 labels"):
        Development.of([Example({"text": "a"}, "x"), Example({"text": "b"}, "y")])
    with pytest.raises(ValueError, match="no examples"):
        Development.of([])


def test_bad_metrics_and_grades() -> None:
    assert similarity([np.ones((2, 3))] * 2, pairs_task("pairs", PAIRS).train[:2]) == -1, "all alike"


# -- measures -----------------------------------------------------------------------------------------------------

def test_spearman() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.integers(0, 5, 50).astype(float)
    stats = pytest.importorskip("scipy.stats")
    assert float(weighted_spearman(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert float(weighted_spearman([1, 2, 3], [10, 20, 30])) == pytest.approx(1)
    assert float(weighted_spearman([1, 2, 3], [3, 2, 1])) == pytest.approx(-1)
    assert np.isnan(weighted_spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="equal length"):
        weighted_spearman([1, 2], [1, 2, 3])


def test_weights_are_repetitions() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 9, 30).astype(float), rng.normal(size=30)
    weights = rng.integers(0, 3, (4, 30))
    expected = [float(weighted_spearman(np.repeat(x, w), np.repeat(y, w))) for w in weights]
    np.testing.assert_allclose(weighted_spearman(x, y, weights), expected)


def test_nearest_neighbours() -> None:
    vectors = np.array([[1, 0], [2, 0.1], [0, 1], [0.1, 3], [0.2, 1]])
    assert nearest_neighbour(vectors, ["a", "a", "b", "b", "a"]).tolist() == [1, 1, 1, 1, 0]
    assert cosines(np.array([[1.0, 0], [0, 0]]), np.array([[2.0, 0], [1, 1]])).tolist() == [1, 0]
