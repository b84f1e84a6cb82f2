"""What an attached model computes is what the model does: caches, masks, keys of its own, and what is repeated."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from recording_backends import Takes
from torch import nn
from torch.utils.checkpoint import checkpoint

from looseleaf import AttentionCall, attach, register_attention
from looseleaf.testing.models import seeded, tiny_gemma3, tiny_llama


@dataclasses.dataclass
class Halved(Takes):
    """Another result than exact attention: half of it."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return super().attend(call) / 2


@dataclasses.dataclass
class HalvedPrefill(Halved):
    """As Halved, in prefill alone."""

    phases = frozenset({"prefill"})


def ids_of(batch: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def padded(left: bool = False) -> torch.Tensor:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, slice(8) if left else slice(12, None)] = 0
    return mask


# ---------------------------------------------------------------------- after a cache
def llama4() -> Any:
    return seeded(lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=12,
        no_rope_layer_interval=2))).eval()


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("model", [tiny_llama, tiny_gemma3, llama4], ids=lambda f: f.__name__)
def test_several_queries_after_a_cache_are_exact(model: Any, cache: str) -> None:
    """A conversation that goes on: windows, chunks, caches of fixed size, left padding."""
    model, ids = model(), ids_of(2, 46)
    left = torch.ones_like(ids)
    left[1, :9] = 0

    def run(mask: Any, first: Any, later: Any) -> torch.Tensor:
        size = {"max_cache_len": 64} if cache == "StaticCache" else {}
        past, at, logits = getattr(transformers, cache)(config=model.config, **size), 0, []
        for n in (20, 1, 5, 12, 1, 7):
            given = {} if mask is None else {"attention_mask": mask[:, :at + n]}
            backend = later if at else first
            with attach(model, backend) if backend else nullcontext(), torch.no_grad():
                logits.append(model(ids[:, at:at + n], past_key_values=past, **given).logits)
            at += n
        return torch.cat(logits, 1) if mask is None else torch.cat(logits, 1)[mask.bool()]

    for mask in (None, left):
        expected, only = run(mask, None, None), HalvedPrefill()
        close(run(mask, Takes(), Takes()), expected)
        close(run(mask, None, only), expected)
        assert not only.calls
        close(run(mask, HalvedPrefill(), HalvedPrefill()), run(mask, HalvedPrefill(), None))


def mllama() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
              "attention_heads": 4, "image_size": 16, "patch_size": 8, "max_num_tiles": 1,
              "intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "supported_aspect_ratios": [[1, 1]]}
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
            "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=98)
    model = seeded(lambda: transformers.MllamaForConditionalGeneration(config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # the gates of cross attention are 0 at first
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("registered", [False, True])
def test_cross_attention_to_a_cache_alone(registered: bool) -> None:
    """Mllama's cross attention is given no other sequence after the picture; here it has as many keys as queries."""
    model, ids = mllama(), ids_of(1)
    ids[0, 0] = 98
    picture = {"pixel_values": torch.randn(1, 1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
               "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
               "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
               "cross_attention_mask": torch.ones(1, 20, 1, 1, dtype=torch.long)}
    with torch.no_grad():
        past = model(ids, **picture).past_key_values
        expected = model(ids_of(1, 5), past_key_values=copy.deepcopy(past)).logits
        for backend in (Takes(), HalvedPrefill()):
            if registered:
                with register_attention("after-a-picture", backend):
                    model.set_attn_implementation("after-a-picture")
                    got = model(ids_of(1, 5), past_key_values=copy.deepcopy(past)).logits
                    model.set_attn_implementation("sdpa")
            else:
                with attach(model, backend) as attached:
                    got = model(ids_of(1, 5), past_key_values=copy.deepcopy(past)).logits
                assert sum("fallback" in record for record in attached.records)
            close(got, expected)


# ---------------------------------------------------------------------- masks and keys
class Writing(nn.Module):
    """A decoder layer that writes to the mask it is given: key 2 is hidden."""

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner, self.way, self.attention_type = inner, way, "full_attention"

    def forward(self, hidden: torch.Tensor, attention_mask: Any = None, **given: Any) -> Any:
        hidden_value = False if attention_mask.dtype == torch.bool else -1e9
        if self.way == "item":
            attention_mask[:, :, :, 2] = hidden_value
        elif self.way == "view":
            attention_mask[..., :5][..., 2] = hidden_value
        else:
            attention_mask.masked_fill_(torch.arange(attention_mask.shape[-1]) == 2, hidden_value)
        return self.inner(hidden, attention_mask=attention_mask, **given)


@pytest.mark.parametrize("way", ["item", "view", "masked_fill_"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_that_a_model_writes_to(implementation: str, way: str, mode: Any) -> None:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    model.model.layers[0] = Writing(model.model.layers[0], way)
    with mode():
        expected = model(ids_of(), attention_mask=padded()).logits[padded().bool()]
        with attach(model, Takes()):
            close(model(ids_of(), attention_mask=padded()).logits[padded().bool()], expected)


def with_memory(first: bool, extends: bool) -> Any:
    """A Llama whose attention has three keys of its own, before or after the others; ``extends``: the mask too."""
    from transformers.models.llama import modeling_llama

    class Memory(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None,
                    past_key_values: Any = None, **kwargs: Any) -> Any:
            batch, length, _ = hidden_states.shape
            query, key, value = (layer(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
                                 for layer in (self.q_proj, self.k_proj, self.v_proj))
            own = torch.randn(2, *key.shape[:2], 3, self.head_dim, generator=torch.Generator().manual_seed(5))
            key, value = (torch.cat([y, x] if first else [x, y], 2) for x, y in zip((key, value), own, strict=True))
            if extends and attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (3, 0) if first else (0, 3),
                                                   value=attention_mask.dtype == torch.bool)
            attention: Any = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, modeling_llama.eager_attention_forward)
            out, weights = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0,
                                     **kwargs)
            return self.o_proj(out.reshape(batch, length, -1).contiguous()), weights

    Memory.__module__ = modeling_llama.__name__
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Memory
    return model


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("extends", [False, True])
def test_keys_that_a_module_adds(first: bool, extends: bool, registered: bool) -> None:
    model = with_memory(first, extends)
    if registered:  # which always has a mask, as eager attention has
        model.set_attn_implementation("eager")

    def run(mask: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids_of(), attention_mask=mask, use_cache=False).logits

    for mask in (torch.ones_like(padded()), padded(left=True)):
        fails = not extends and (registered or not bool(mask.all()))  # the model does by itself: its mask is short
        expected = None if fails else run(mask)[mask.bool()]
        with register_attention("with-memory", Takes()) if registered else attach(model, Takes()):
            if registered:
                model.set_attn_implementation("with-memory")
            if fails:
                with pytest.raises(RuntimeError):
                    run(mask)
            else:
                close(run(mask)[mask.bool()], expected)
            if registered:
                model.set_attn_implementation("eager")


@pytest.mark.parametrize("registered", [False, True])
def test_masks_that_are_added_to_scores(registered: bool) -> None:
    """BigBird-Pegasus has an encoder of its own, which adds the mask; its decoder goes through the interface."""
    config = transformers.BigBirdPegasusConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, init_std=0.3,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        attention_type="original_full")
    model = seeded(lambda: transformers.AutoModelForSeq2SeqLM.from_config(config)).eval()
    given = {"input_ids": ids_of(), "attention_mask": padded(), "decoder_input_ids": ids_of(seed=2)}
    with torch.no_grad():
        expected = model(**given).logits
        with register_attention("added", Takes()) if registered else attach(model, Takes()):
            if registered:
                model.set_attn_implementation("added")
            close(model(**given).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_weights_are_given_where_the_model_gives_them(implementation: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = model(ids_of(), output_attentions=True).attentions
        with attach(model, Takes()) as attached:
            got = model(ids_of(), output_attentions=True).attentions
    assert len(got) == len(expected) == (2 if implementation == "eager" else 0)
    for one, other in zip(got, expected, strict=True):
        close(one, other)
    assert [r.get("fallback") for r in attached.records] == (
        ["attention weights are asked for"] * 2 if implementation == "eager" else [None] * 2)


# ---------------------------------------------------------------------- repeated in the backward pass
def gradients(*models: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for m in models for p in m.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["before", "before and inside", "nested", "another model"])
def test_what_is_repeated_is_what_was(way: str, reentrant: bool) -> None:
    """A forward made without a backend is repeated without it, and one made with it with it."""
    one, two = tiny_llama(0).train(), tiny_llama(1).train()

    def run(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=hidden, use_cache=False).logits.square().mean()

    def both(hidden: torch.Tensor) -> torch.Tensor:
        return run(one, hidden) + run(two, hidden)

    def gradients_of(repeated: bool) -> torch.Tensor:
        def part(function: Any, *args: Any) -> torch.Tensor:
            return checkpoint(function, *args, use_reentrant=reentrant) if repeated else function(*args)

        one.zero_grad()
        two.zero_grad()
        hidden = one.get_input_embeddings()(ids_of())
        if way == "nested":
            with attach(one, Halved()):
                loss = part(lambda h: part(run, one, h) * 1, hidden)
            loss.backward()
        elif way == "another model":
            with attach(one, Halved()):
                loss = part(both, hidden)
            with attach(two, Halved()):
                loss.backward()
        else:
            loss = part(run, one, hidden)
            with attach(one, Halved()):
                if way == "before and inside":
                    loss = loss + part(run, one, hidden)
                loss.backward()
        return gradients(one, two)

    expected = gradients_of(False)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradients_of(True), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_registered_backend_repeats_without_recording(reentrant: bool) -> None:
    model = tiny_llama().train()
    with register_attention("repeated", Halved()) as registered:
        model.set_attn_implementation("repeated")
        model(ids_of(), labels=ids_of(), use_cache=False).loss.backward()
        expected = gradients(model)
        model.zero_grad()
        hidden = model.get_input_embeddings()(ids_of())
        checkpoint(lambda h: model(inputs_embeds=h, labels=ids_of(), use_cache=False).loss, hidden,
                   use_reentrant=reentrant).backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)
    assert len(registered.records) == 4, "two layers, two forwards"


# ---------------------------------------------------------------------- compiled parts
@pytest.mark.parametrize("part", ["in place", "layers", "attention", "wrapped layers"])
def test_compiled_parts(part: str) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    with torch.no_grad():
        expected = model(ids_of()).logits
        with attach(model, Halved()):
            halved = model(ids_of()).logits
        if part == "in place":
            model.compile(backend="eager")
        for i, layer in enumerate(list(model.model.layers) if part != "in place" else ()):
            if part == "wrapped layers":
                model.model.layers[i] = torch.compile(layer, backend="eager")
            else:
                (layer if part == "layers" else layer.self_attn).compile(backend="eager")
        close(model(ids_of()).logits, expected)
        for _ in range(2):
            with attach(model, Halved()) as attached:
                close(model(ids_of()).logits, halved)
            assert len(attached.records) == 2
            close(model(ids_of()).logits, expected)
