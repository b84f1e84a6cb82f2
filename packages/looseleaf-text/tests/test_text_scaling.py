"""Scaling of contributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf import capture
from looseleaf.errors import UnsupportedModelError
from looseleaf.testing.models import tiny_llama
from looseleaf_text import LogitLens, decoder_layers, scale_layers
from looseleaf_text.layers import contribution

IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def tiny(family: str) -> Any:
    import transformers

    changes: dict[str, Any] = {"Gemma3": {"head_dim": 8}, "Gemma2": {"head_dim": 8},
                               "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48},
                               "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48}}
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    sizes = changes[family] if family in ("GPT2", "Bloom") else {**SIZES, **changes.get(family, {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
        return getattr(transformers, name)(config(**sizes)).eval()


def compile_whole(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compile_outside(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compile_parts(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.layers[1].mlp.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_", [compile_whole, compile_outside, compile_parts])
def test_a_compiled_model_that_was_run_is_scaled_and_read(compile_: Any) -> None:
    positions = torch.tensor([[1], [2]])
    with torch.no_grad():
        plain, model = tiny_llama(), compile_(tiny_llama())
        model(IDS)
        with scale_layers(plain, {0: 0.0, 1: 0.5}):
            wanted = plain(IDS).logits
        with scale_layers(model, {0: 0.0, 1: 0.5}):
            torch.testing.assert_close(model(IDS).logits, wanted)
        torch.testing.assert_close(LogitLens(model).log_probs({"input_ids": IDS}, positions),
                                   LogitLens(plain).log_probs({"input_ids": IDS}, positions))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2", "Gemma3", "GPTNeoX", "Olmo2", "Phi", "Cohere", "Qwen3"])
def test_nothing_added_leaves_the_residual_stream(family: str) -> None:
    model = tiny(family)
    layers = list(decoder_layers(model))
    with torch.no_grad():
        plain = model(IDS).logits
        with capture(model, layers) as seen, scale_layers(model, {1: 0.0}):
            model(IDS)
        torch.testing.assert_close(seen[layers[1]][0], seen[layers[0]][0], rtol=0, atol=0)
        with scale_layers(model, {0: 1.0, 1: 1}):
            assert torch.equal(model(IDS).logits, plain)
        for part in ("attention", "mlp"):
            with scale_layers(model, {0: 0.5}, part):  # type: ignore[arg-type]
                assert not torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, plain)


def test_half_of_a_contribution_by_hand() -> None:
    model = tiny_llama()
    layer = model.model.layers[1]
    with torch.no_grad(), capture(model, ["model.layers.0", "model.layers.1", "model.layers.1.self_attn"]) as seen, \
            scale_layers(model, {-1: 0.5}, "attention"):
        model(IDS)
    middle = seen["model.layers.0"][0] + seen["model.layers.1.self_attn"][0] * 0.5
    wanted = middle + layer.mlp(layer.post_attention_layernorm(middle))
    # the capture stands before the scaling, as hooks run in the order they were made
    torch.testing.assert_close(seen["model.layers.1"][0], wanted, atol=1e-5, rtol=1e-5)


def test_bad_scaling() -> None:
    model = tiny_llama()
    for alphas, words in (({2: 0.5}, r"layer: expected an integer in \[-2, 1\], .*got 2"),
                          ({0: float("nan")}, "alphas: expected a finite number .*got nan for layer 0"),
                          ({1: 0.5, -1: 0.5}, "expected one factor for each layer, got two for layer")):
        with pytest.raises(ValueError, match=words), scale_layers(model, alphas):
            pass
    with pytest.raises(ValueError, match="part: expected 'attention' or 'mlp', got 'attn'"), \
            scale_layers(model, {0: 0.5}, "attn"):  # type: ignore[arg-type]
        pass
    with pytest.raises(UnsupportedModelError, match="adds the residual stream itself"), \
            scale_layers(tiny("Bloom"), {0: 0.5}):
        pass
    with pytest.raises(UnsupportedModelError, match=r"the mlp of x .* could not be found"):
        contribution("x", torch.nn.Linear(2, 2), "mlp")
    with pytest.raises(ZeroDivisionError), scale_layers(model, {0: 0.5}):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())
