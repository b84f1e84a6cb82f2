"""The logit lens on the families of transformers: at the last layer it is the model's own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import looseleaf_text
from looseleaf.errors import UnsupportedModelError
from looseleaf.testing.models import tiny_llama
from looseleaf_text import LogitLens, decoder_layers

IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                         "pad_token_id": 0, "initializer_range": 0.2}
OTHER: dict[str, dict[str, Any]] = {
    "GPT2": {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "OPT": {"vocab_size": 48, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "Falcon": {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "Gemma2": {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "Gemma3": {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Cohere": {**SIZES, "logit_scale": 0.25},
    "Granite": {**SIZES, "logits_scaling": 3.0, "residual_multiplier": 0.5},
}
FAMILIES = ["Llama", "GPT2", "OPT", "GPTNeoX", "Gemma2", "Gemma3", "Cohere", "Granite", "Qwen2", "Olmo2", "Phi",
            "Falcon"]


def tiny(family: str, **changes: Any) -> Any:
    """A random decoder of three layers."""
    import transformers

    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(config_class(**{**OTHER.get(family, SIZES), **changes})).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_is_the_models_own_output(family: str) -> None:
    model = tiny(family)
    lens = LogitLens(model)
    with torch.no_grad():
        own = torch.log_softmax(model(IDS).logits, -1)
    positions = torch.tensor([[1, 4], [-1, 0]])
    found = lens.log_probs({"input_ids": IDS}, positions)
    assert found.shape == (3, 2, 2, 48)
    torch.testing.assert_close(found[-1], own[torch.arange(2)[:, None], positions], atol=1e-5, rtol=1e-5)
    tokens = torch.tensor([[3, 4], [5, 6]])
    torch.testing.assert_close(lens.log_probs({"input_ids": IDS}, positions, tokens),
                               found.gather(-1, tokens.expand(3, 2, 2)[..., None])[..., 0])
    assert not any(m._forward_hooks for m in model.modules())


def test_lens_is_norm_and_head_by_hand() -> None:
    model = tiny_llama()
    lens = LogitLens(model)
    assert lens.names == ["model.layers.0", "model.layers.1"] and lens.norm is model.model.norm
    with torch.no_grad():
        streams = model(IDS, output_hidden_states=True).hidden_states
        wanted = torch.log_softmax(model.lm_head(model.model.norm(streams[1])), -1)
        found = lens.log_probs({"input_ids": IDS}, torch.arange(6).expand(2, 6))
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)


def test_padded_rows_read_as_alone() -> None:
    model = tiny_llama()
    lens = LogitLens(model)
    ids = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    found = lens.log_probs(inputs, torch.tensor([[-1], [-1]]))
    alone = lens.log_probs({"input_ids": ids[:1, 2:]}, torch.tensor([[-1]]))
    torch.testing.assert_close(found[:, :1], alone, atol=1e-4, rtol=1e-4)


def test_softcapping_is_respected() -> None:
    model = tiny("Gemma2")
    lens = LogitLens(model)
    assert float(lens(torch.randn(4, 32) * 1e4).detach().abs().max()) <= 2.0


def test_by_name() -> None:
    model = tiny_llama()
    lens = LogitLens(model, norm="model.norm", head="lm_head", layers="model.layers")
    assert lens.head is model.lm_head
    assert list(decoder_layers(model)) == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ValueError, match=r"norm: expected .*got 'model\.nrom'.*Did you mean 'model\.norm'"):
        LogitLens(model, norm="model.nrom")
    with pytest.raises(ValueError, match=r"head: expected .*got 'lm_heads'.*Did you mean 'lm_head'"):
        LogitLens(model, head="lm_heads")
    with pytest.raises(ValueError, match=r"layers: expected .*got 'model\.layer'.*Did you mean 'model\.layers'"):
        LogitLens(model, layers="model.layer")


def test_a_model_without_a_final_norm() -> None:
    model = tiny_llama()
    model.model.last_normalisation = model.model.norm
    model.model.norm = None
    with pytest.raises(ValueError, match=r"no final norm of LlamaForCausalLM could be found: looked for model\.norm.*"
                                         r"Near names are model\.last_normalisation.*norm='none'"):
        LogitLens(model)
    assert LogitLens(model, norm="model.last_normalisation").norm is model.model.last_normalisation
    post = tiny("OPT", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="no final norm of OPTForCausalLM"):
        LogitLens(post)
    found = LogitLens(post, norm="none").log_probs({"input_ids": IDS}, torch.tensor([[-1], [-1]]))
    torch.testing.assert_close(found[-1, :, 0], torch.log_softmax(post(IDS).logits[:, -1], -1), atol=1e-5, rtol=1e-5)


def test_a_lens_that_is_not_the_model_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(UnsupportedModelError, match="differs from the output of LlamaForCausalLM"):
        LogitLens(model, norm="none").log_probs({"input_ids": IDS}, torch.tensor([[-1], [-1]]))


def test_bad_input() -> None:
    model = tiny_llama()
    lens = LogitLens(model)
    with pytest.raises(ValueError, match="positions: expected the shape"):
        lens.log_probs({"input_ids": IDS}, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"places in \[-6, 5\]"):
        lens.log_probs({"input_ids": IDS}, torch.tensor([[6], [0]]))
    with pytest.raises(ValueError, match="tokens: expected the shape"):
        lens.log_probs({"input_ids": IDS}, torch.tensor([[1], [0]]), torch.tensor([1]))
    with pytest.raises(ValueError, match="has no output embeddings"):
        LogitLens(model.model)
    with pytest.raises(UnsupportedModelError, match="name the list of layers"):
        LogitLens(torch.nn.Linear(2, 2))
    assert looseleaf_text.LogitLens is LogitLens
