"""Effective KQ and OV of transformers layers against their weight matrices, and the probe's report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from looseleaf import UnsupportedModelError
from looseleaf.testing.models import tiny_text_llama
from looseleaf_icl_linear_regression import ICLRegressionProbe, probe_attention, probe_layers
from looseleaf_icl_linear_regression.reproduction import study

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2}


def randomised(cls: Any, config: Any) -> Any:
    """A model with random weights in all parameters, biases and gains of normalisations too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def from_weights(layer: Any, gain: tuple[torch.Tensor, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Query, key, value (H, 8, 32) and output (H, 32, 8) of four heads of eight, by the names of Llama."""
    out = []
    for name, by in (("q_proj", gain[0] if gain else 1), ("k_proj", gain[1] if gain else 1), ("v_proj", 1)):
        scale = by[None, :, None] if isinstance(by, torch.Tensor) else 1
        weight = getattr(layer, name).weight.view(-1, 8, 32) * scale
        out.append(weight.repeat_interleave(4 // len(weight), 0))
    projection = layer.o_proj if hasattr(layer, "o_proj") else layer.out_proj
    return [*out, projection.weight.view(32, 4, 8).transpose(0, 1)]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Starcoder2"])
def test_grouped_queries_rotary_positions_windows_and_biases(name: str) -> None:
    more = {"sliding_window": 16} if name in ("Mistral", "Starcoder2") else {}
    model = randomised(getattr(transformers, f"{name}ForCausalLM"),
                       getattr(transformers, f"{name}Config")(**SIZES, **more))
    for i, heads in enumerate(probe_layers(model, progress=False)):
        q, k, v, o = from_weights(model.get_submodule(heads.name))
        assert heads.name == f"model.layers.{i}.self_attn"
        torch.testing.assert_close(heads.kq(), k.mT @ q * 8 ** -0.5, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heads.ov(), o @ v, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heads.kq(3), heads.kq()[3])
        torch.testing.assert_close(heads.ov(3), heads.ov()[3])


@pytest.mark.parametrize("name", ["Qwen3", "Gemma3"])
def test_normalised_queries_and_keys_keep_their_gain(name: str) -> None:
    if name == "Qwen3":
        model = randomised(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES, head_dim=8))
        add, scale = 0, 8
    else:
        kinds = ["sliding_attention", "full_attention"]
        model = randomised(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(
            **SIZES, head_dim=8, layer_types=kinds, query_pre_attn_scalar=16))
        add, scale = 1, 16
    for heads in probe_layers(model, progress=False):
        layer = model.get_submodule(heads.name)
        q, k, v, o = from_weights(layer, (add + layer.q_norm.weight, add + layer.k_norm.weight))
        torch.testing.assert_close(heads.kq(), k.mT @ q * scale ** -0.5, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heads.ov(), o @ v, atol=1e-4, rtol=1e-4)


def test_fused_and_transposed_weights() -> None:
    model = randomised(transformers.GPT2LMHeadModel,
                       transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    layer, heads = model.transformer.h[1].attn, probe_attention(model, "transformer.h.1.attn")
    q, k, v = (w.T.reshape(4, 8, 32) for w in layer.c_attn.weight.split(32, 1))
    torch.testing.assert_close(heads.kq(), k.mT @ q * 8 ** -0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heads.ov(), layer.c_proj.weight.reshape(4, 8, 32).mT @ v, atol=1e-4, rtol=1e-4)
    neox = randomised(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    layer, heads = neox.gpt_neox.layers[0].attention, probe_attention(neox, 0)
    q, k, v = layer.query_key_value.weight.view(4, 3, 8, 32).unbind(1)
    torch.testing.assert_close(heads.kq(), k.mT @ q * 8 ** -0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heads.ov(), layer.dense.weight.view(32, 4, 8).transpose(0, 1) @ v, atol=1e-4, rtol=1e-4)


def test_the_maps_are_what_the_layer_does() -> None:
    """Two tokens, both at position 0 so that rotary positions are the identity: the module against the formula."""
    model = tiny_text_llama()
    heads = probe_attention(model, 1)
    layer = model.model.layers[1].self_attn
    z = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = torch.ones(1, 2, 16), torch.zeros(1, 2, 16)
    with torch.no_grad():
        expected = layer(z, position_embeddings=(cos, sin), attention_mask=None)[0][0, 1]
    found = torch.zeros(64)
    for h in range(4):
        shares = torch.softmax(z[0] @ heads.kq(h) @ z[0, 1], 0)
        found += heads.ov(h) @ z[0].T @ shares
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_half_precision_and_many_rows() -> None:
    exact = probe_attention(tiny_text_llama(), 0)
    half = probe_attention(tiny_text_llama().bfloat16(), 0)
    assert float((half.kq() - exact.kq()).norm() / exact.kq().norm()) < 0.02
    assert half.kq().dtype == torch.float32


def test_a_model_is_left_alone() -> None:
    model = tiny_text_llama()
    model.model.layers[0].train()
    ids = torch.arange(8)[None]
    modes = [m.training for m in model.modules()]
    before = model(ids).logits
    probe_layers(model, progress=False)
    assert torch.equal(model(ids).logits, before) and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model_is_read() -> None:
    exact, model = probe_layers(tiny_text_llama(), progress=False), tiny_text_llama()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(torch.arange(8)[None])
    for heads, same in zip(exact, probe_layers(model, progress=False), strict=True):
        assert torch.equal(heads.kq(), same.kq()) and torch.equal(heads.ov(), same.ov())


def test_models_that_cannot_be_read() -> None:
    with pytest.raises(UnsupportedModelError, match="call head_signature"):
        probe_layers(torch.nn.Linear(3, 3))
    bert = randomised(transformers.BertModel, transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        probe_layers(bert, progress=False)
    decoder = randomised(transformers.BertLMHeadModel, transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        is_decoder=True))
    with pytest.raises(UnsupportedModelError, match="output projection elsewhere"):
        probe_layers(decoder, progress=False)
    capped = randomised(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**SIZES, head_dim=8))
    with pytest.raises(UnsupportedModelError, match="scores changed by softcap"):
        probe_layers(capped, progress=False)
    with pytest.raises(ValueError, match="got 7"):
        probe_attention(tiny_text_llama(), 7)
    with pytest.raises(ValueError, match=r"[Nn]ear names"):
        probe_attention(tiny_text_llama(), "model.layer.0.self_attn")

    class Crooked(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 3

    model = tiny_text_llama()
    model.model.layers[0].self_attn.k_proj = Crooked(64, 32)
    with pytest.raises(UnsupportedModelError, match=r"key of model\.layers\.0\.self_attn is not linear"):
        probe_layers(model, progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --------------------------------------------------------------------------------------------------------- report
def test_report() -> None:
    report = ICLRegressionProbe(steps=24, batch=8, layers=(1,)).run(tiny_text_llama(), progress=False)
    assert [c.verdict for c in report.claims] == ["holds"] * 4
    coordinates, free = report.tables
    assert coordinates.rows[0][1:] == pytest.approx([0, 0, 1, 0], abs=1e-9)
    assert [row[0] for row in coordinates.rows[3:]] == ["model.layers.1.self_attn"]
    assert free.rows[0][1:6] == pytest.approx([1, 1, 1, 0, 1], abs=1e-6)
    assert free.rows[-1][0] == "model.layers.1.self_attn"
    images = [figure for figure in report.figures if figure.image]
    assert all(len({len(row) for row in figure.image or []}) == 1 for figure in images)
    assert max(len(figure.image or []) for figure in images) <= 32
    assert report.facts["training converged"] is False


def test_parameters_and_data_are_checked() -> None:
    with pytest.raises(ValueError, match=r"data: expected None, .* got str"):
        ICLRegressionProbe().run(tiny_text_llama(), "some text")
    for given in ({"d": 1}, {"L": 0}, {"sigma2": float("nan")}, {"H": 0}, {"steps": 1}, {"lr": 0.0}, {"batch": 0},
                  {"layers": ("a",)}):
        with pytest.raises(ValueError, match=rf"ICLRegressionProbe\.{next(iter(given))}: expected"):
            ICLRegressionProbe(**given)  # type: ignore[arg-type]


def test_reproduction_runs() -> None:
    report = study(seeds=2, quick=True, progress=False)
    assert len(report.claims) >= 16 and all(c.verdict == "not shown at this scale" for c in report.claims)
    assert {"Signature after training", "Test risk", "Longer contexts than in training", "Two tasks"} <= {
        table.title for table in report.tables}


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2() -> None:
    from looseleaf_lab import models

    model, _ = models.load("smollm2")
    layer = model.model.layers[3].self_attn
    heads = probe_attention(model, 3)
    q, k, v = (getattr(layer, f"{n}_proj").weight.detach().view(-1, 64, 576) for n in "qkv")
    k, v = k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)
    torch.testing.assert_close(heads.kq(4), k[4].T @ q[4] / 8, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(heads.ov(4), layer.o_proj.weight.detach()[:, 256:320] @ v[4], atol=1e-3, rtol=1e-3)
