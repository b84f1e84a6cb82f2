"""Numbers that are none, weights that are elsewhere, and modes and gradients that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looseleaf import Example, UnsupportedModelError
from looseleaf.fingerprint import fingerprint
from looseleaf.unwrap import unwrapped
from looseleaf_text import LocalModel, LogitLens, MaskedModel, TextPrompt, TextTask, decoder_layers
from looseleaf_text.soft import keys_and_values, soft_prefix
from looseleaf_text.testing import ToyLanguageModel, toy_task

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
from decoder_families import Letters, alone, deviation, rows, small_model  # noqa: E402


def broken(value: float) -> Any:
    model = small_model("llama")
    model.lm_head.weight.data[40] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_texts_and_vectors_of_broken_weights_are_errors(value: float) -> None:
    local = LocalModel(broken(value), Letters())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM-\d+: expected finite log-probabilities.*for example 0"):
        local.score(["a film", "a play"], [["x", "y"]] * 2)
    with pytest.raises(ValueError, match=r"expected finite logits.*for example 0"):
        local.generate(["a film"], 3)
    local.model.model.embed_tokens.weight.data[:] = value
    with pytest.raises(ValueError, match=r"expected finite hidden states.*example 0, 'a film'"):
        local.embed(["a film"])


def test_the_example_is_named_where_one_alone_is_broken() -> None:
    model = small_model("llama")
    model.model.embed_tokens.weight.data[ord("!") % 60 + 20] = float("nan")
    with pytest.raises(ValueError, match="for example 1"):
        LocalModel(model, Letters()).score(["a film", "a film!"], [["x", "y"]] * 2)
    with pytest.raises(ValueError, match="row 1"):
        ids = torch.tensor([[30, 31], [30, ord("!") % 60 + 20]])
        LogitLens(model).log_probs({"input_ids": ids}, torch.tensor([[1], [1]]))


def test_any_model_that_gives_no_numbers_is_named() -> None:
    class Odd(ToyLanguageModel):
        name = "odd"

        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            return [[-float("inf")] * len(row) for row in continuations]

    task = toy_task()
    with pytest.raises(ValueError, match="odd: expected finite scores of answers"):
        task.evaluate(TextPrompt.for_task(task).on(Odd()))


def test_a_task_of_a_broken_model_has_no_accuracy() -> None:
    task = TextTask("films", [Example({"text": "a"}, "yes"), Example({"text": "b"}, "no")],
                    test=[Example({"text": "c"}, "yes")], labels={"yes": "y", "no": "n"})
    with pytest.raises(ValueError, match="for example 0, "):
        task.evaluate(TextPrompt.for_task(task).on(LocalModel(broken(float("nan")), Letters())))


# ---------------------------------------------------------------------- weights elsewhere
def test_an_offloaded_model_is_scored_embedded_and_then_trained() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = small_model("llama"), small_model("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    local, reference = LocalModel(model, Letters()), LocalModel(plain, Letters())
    heads, tails = rows()
    assert deviation(local.score_ids(heads, tails), reference.score_ids(heads, tails)) < 1e-5
    np.testing.assert_allclose(local.embed(["ab"]), reference.embed(["ab"]), atol=1e-5)
    model.requires_grad_(True)
    assert all(p.is_meta for p in model.parameters()), "the weights are offloaded as before"


def test_offloaded_weights_are_told_apart(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    prints = []
    for change in (0.0, 1.0):
        model = small_model("llama")
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0, 0] += change
        plain = fingerprint(model)
        folder = tmp_path / f"offloaded {change}"
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        prints.append(fingerprint(model))
        assert prints[-1] == plain
    assert prints[0] != prints[1]


def test_nothing_that_scoring_leaves_behind_hinders_a_training() -> None:
    """What a model keeps of a forward, such as tables of positions, must not be tensors of inference mode."""
    for family in ("llama", "gpt_neox", "mpt", "biogpt"):
        model = small_model(family)
        local = LocalModel(model, Letters())
        local.score_ids([[30, 31, 32], [33]], [[[34, 35], [36]]] * 2)
        local.embed(["a film"])
        model.train()(torch.tensor([[30, 31, 32]])).logits.square().mean().backward()


# ---------------------------------------------------------------------- modes
def test_parts_in_training_mode_are_scored_without_their_dropout_and_stay_in_it() -> None:
    model = small_model("gpt2")
    right = alone(model, *rows())
    dropout = model.transformer.h[0].mlp.dropout
    dropout.p = 0.5
    dropout.train()
    assert deviation(LocalModel(model, Letters()).score_ids(*rows()), right) < 1e-4
    assert dropout.training and not model.training


def test_a_soft_prompt_leaves_frozen_parts_frozen() -> None:
    model = small_model("llama").train()
    model.model.layers[0].eval()
    keys_and_values(model, torch.randn(3, 32))
    assert not model.model.layers[0].training and model.training


# ---------------------------------------------------------------------- wrappers
def wrapped(name: str, model: Any) -> Any:
    if name == "compile":
        return torch.compile(model, backend="eager")
    if name == "parallel":
        return torch.nn.DataParallel(model)
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).eval()


@pytest.mark.parametrize("name", ["compile", "parallel", "peft"])
def test_wrappers_are_looked_through(name: str) -> None:
    plain, model = small_model("gpt2"), wrapped(name, small_model("gpt2"))
    local, heads, tails = LocalModel(model, Letters()), *rows()
    right = LocalModel(plain, Letters())
    assert deviation(local.score_ids(heads, tails), right.score_ids(heads, tails)) < 1e-4
    assert local.generate(["abc", "a"], 4) == right.generate(["abc", "a"], 4)
    np.testing.assert_allclose(local.embed(["abc"]), right.embed(["abc"]), atol=1e-4)
    assert list(decoder_layers(model)) == list(decoder_layers(plain))
    assert LogitLens(model).head is unwrapped(model).lm_head
    soft = torch.randn(3, 32)
    with soft_prefix(local, soft), soft_prefix(right, soft):
        assert deviation(local.score_ids(heads, tails), right.score_ids(heads, tails)) < 1e-4


# ---------------------------------------------------------------------- soft prompts
@pytest.mark.parametrize("family", ["llama", "roberta", "gpt_neo", "mistral"])
def test_a_soft_prompt_is_no_matter_of_the_batch(family: str) -> None:
    model = small_model(family)
    local, heads, tails = LocalModel(model, Letters()), *rows()
    with soft_prefix(local, torch.randn(3, 32, generator=torch.Generator().manual_seed(0))):
        together = local.score_ids(heads, tails)
        single = [local.score_ids([h], [t])[0] for h, t in zip(heads, tails, strict=True)]
        assert deviation(together, single) < 1e-4
        with pytest.raises(ValueError, match="at most"):
            local.score_ids([[30] * (local._limit or 0)], [[[31]]])


def test_a_soft_prompt_needs_keys_and_values() -> None:
    for family in ("mamba", "jamba"):
        with pytest.raises(UnsupportedModelError, match="keep keys and values"):
            keys_and_values(small_model(family), torch.randn(3, 32))


# ---------------------------------------------------------------------- masked models
@pytest.mark.parametrize("family", ["bert", "roberta", "fnet", "convbert"])
def test_masked_scores_do_not_depend_on_the_batch(family: str) -> None:
    """FNet mixes all positions and ConvBERT convolves, so padding changes what the other tokens get."""
    model = small_model(family, transformers.AutoModelForMaskedLM, **({} if family == "fnet" else {
        "is_decoder": False}))

    class Masked(Letters):
        mask_token_id, pad_token_id = 3, 0

    masked = MaskedModel(model, Masked())
    befores, answers, afters = ["a", "a long text", "some"], [["x", "yy"]] * 3, ["b", "", "more after it"]
    together = masked.score_cloze(befores, answers, afters)
    single = [masked.score_cloze([b], [r], [a])[0] for b, r, a in zip(befores, answers, afters, strict=True)]
    assert deviation(together, single) < 1e-4
    longest = masked._measured[0]
    assert longest is not None and np.isfinite(masked.score(["a" * (longest - 1)], [["x"]])).all()
    with pytest.raises(ValueError, match=f"at most {longest} positions"):
        masked.score(["a" * longest], [["x"]])
