"""The tensors that attention was given, kept."""

from __future__ import annotations

import pytest
import torch

from looseleaf import AttentionCall, attach
from looseleaf.testing.attention import tensors
from looseleaf.testing.models import tiny_llama
from looseleaf_lab.activations import KeepAttention


def test_keeps_what_attention_sees_and_changes_nothing() -> None:
    model = tiny_llama().eval()
    ids = torch.arange(24)[None]
    keep = KeepAttention(layers=(1,))
    with torch.inference_mode():
        exact = model(ids).logits
        with attach(model, keep):
            kept = model(ids).logits
    assert torch.allclose(kept, exact, atol=1e-5)
    assert list(keep.found) == [1] and all(x.is_contiguous() for x in keep.found[1])
    query, key, value = keep.found[1]
    assert query.shape == (1, 4, 24, query.shape[-1]) and key.shape == value.shape == (1, 2, 24, query.shape[-1])
    # enough to compute the layer again: the output projection of it gives what the module gave
    seen: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.inference_mode():
        model(ids)
        handle.remove()
        again = AttentionCall(query, key, value, attention.scaling).dense()
        assert torch.allclose(attention.o_proj(again.transpose(1, 2).flatten(2)), seen[0], atol=1e-5)


def test_decode_steps_do_not_replace_the_prompt() -> None:
    model = tiny_llama().eval()
    keep = KeepAttention(layers=(0, 1))
    with torch.inference_mode(), attach(model, keep):
        model.generate(torch.arange(12)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert {layer: q.shape[2] for layer, (q, _, _) in keep.found.items()} == {0: 12, 1: 12}


def test_others_are_not_kept() -> None:
    keep = KeepAttention(layers=(7,))
    keep.attend(AttentionCall(*tensors(8), 0.2, layer=3))
    assert keep.found == {}
    assert keep.parameters() == {"layers": (7,)}


@pytest.mark.parametrize("layers", [(), (-1,), ("3",)])
def test_layers_that_cannot_be(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"KeepAttention\.layers=.*allowed is one layer or more, counted from 0"):
        KeepAttention(layers=layers)
