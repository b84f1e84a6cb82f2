"""Scaling of contributions, activation patching, and captures that go to disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf import capture, patch
from looseleaf_text import decoder_layers, scale_layers
from looseleaf.errors import UnsupportedModelError
from looseleaf.probes.hooks import CaptureLimitError
from looseleaf_text.layers import contribution
from looseleaf.testing.models import tiny_llama

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
    for alphas, words in (({2: 0.5}, "layer 2: allowed is -2 to 1"), ({0: float("nan")}, "alpha=nan for layer 0"),
                          ({1: 0.5, -1: 0.5}, "named twice")):
        with pytest.raises(ValueError, match=words), scale_layers(model, alphas):
            pass
    with pytest.raises(ValueError, match="part='attn': allowed are"), \
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


def test_patching_everything_gives_the_other_run() -> None:
    model = tiny_llama()
    other = IDS.flip(1)
    with torch.no_grad():
        with capture(model, "model.layers.1") as clean:
            wanted = model(IDS).logits
        with patch(model, clean):
            torch.testing.assert_close(model(other).logits, wanted)
        with patch(model, {"model.layers.1": clean["model.layers.1"][0][:1]}, positions=-1):
            found = model(other).logits
        torch.testing.assert_close(found[:, -1], wanted[:1, -1].expand(2, -1))
        torch.testing.assert_close(found[:, :-1], model(other).logits[:, :-1])


def test_patching_places_of_other_lengths() -> None:
    model = tiny_llama()
    longer = torch.arange(20, 36).view(2, 8)
    with torch.no_grad():
        with capture(model, "model.layers.1") as clean:
            wanted = model(IDS).logits
        places = torch.tensor([[7, 6], [1, 0]])
        with patch(model, clean, places, source_positions=[5, 2]):
            found = model(longer).logits
    torch.testing.assert_close(found[0, [7, 6]], wanted[0, [5, 2]])
    torch.testing.assert_close(found[1, [1, 0]], wanted[1, [5, 2]])


def test_patching_several_calls_and_bad_input() -> None:
    model = tiny_llama()
    with torch.no_grad():
        with capture(model, "*.mlp") as clean:
            first, second = model(IDS).logits, model(IDS + 1).logits
        with patch(model, clean):
            model(IDS)
            model(IDS)
            with pytest.raises(ValueError, match=r"called for the 3\. time, but the other run called it 2 times"):
                model(IDS)
        assert not torch.equal(first, second)
        for source, arguments, words in (
                ({}, {}, "source is empty"), ({"model.layers.7": torch.ones(1)}, {}, "near names are"),
                (clean, {"source_positions": 1}, "source_positions without positions"),
                (clean, {"positions": 0.5}, "allowed is a whole number")):
            with pytest.raises(ValueError, match=words), patch(model, source, **arguments):  # type: ignore[arg-type]
                pass
        for arguments, words in (({}, "lengths 6 and 4: pass positions"), ({"positions": 5}, "places from -4 to 3"),
                                 ({"positions": [1, 2], "source_positions": 1}, "1 source_positions for 2 positions")):
            with pytest.raises(ValueError, match=words), patch(model, clean, **arguments):  # type: ignore[arg-type]
                model(IDS[:, :4])
        with pytest.raises(ValueError, match="has shape"), patch(model, {"model.layers.1.mlp": torch.ones(3, 6, 64)}):
            model(IDS)
    assert not any(m._forward_hooks for m in model.modules())


def test_captures_spill_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        with capture(model, ["*.mlp", "model.layers.0"]) as whole:
            for step in range(5):
                model(IDS + step)
        one = whole["model.layers.0"][0]
        for limit in (10, one.numel() * 2 * 4):  # below one tensor; four tensors
            with capture(model, ["*.mlp", "model.layers.0"], lambda x: x.transpose(0, 1), max_bytes=limit,
                         spill=True) as seen:
                for step in range(5):
                    model(IDS + step)
                assert list(seen) == list(whole) and len(list(tmp_path.glob("*/*.safetensors"))) >= 3
                for name in whole:
                    assert len(seen[name]) == 5
                    assert all(torch.equal(a.transpose(0, 1), b) and b.dtype == torch.bfloat16
                               for a, b in zip(seen[name], whole[name], strict=True))
                    assert len(seen[name][1:3]) == 2 and torch.equal(seen[name][-1].transpose(0, 1), whole[name][-1])
            assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="inside its with-block"):
        seen["model.layers.0"][0]


def test_spilling_leaves_nothing_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError), capture(model, "*.mlp", max_bytes=10, spill=True):
        model(IDS)
        assert list(tmp_path.iterdir())
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()) and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(CaptureLimitError, match="or pass spill=True"), capture(model, "*.mlp", max_bytes=10):
        model(IDS)


def test_spilling_to_a_folder_of_ones_own(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad(), capture(model, "*.mlp", max_bytes=10, spill=tmp_path) as seen:
        model(IDS)
    assert len(list(tmp_path.glob("capture-*.safetensors"))) == 2
    assert seen["model.layers.0.mlp"][0].shape == (2, 6, 64)
    with pytest.raises(ValueError, match="holds an earlier capture"), capture(model, "*.mlp", spill=tmp_path):
        pass
    with pytest.raises(ValueError, match="a folder that exists"), capture(model, "*.mlp", spill=tmp_path / "no"):
        pass
