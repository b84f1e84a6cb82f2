"""Janus, Emu3, Chameleon, a Llama and a pipeline of diffusers, built small with random weights."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf.testing.models import seeded, tiny_llama
from looseleaf_unified_sparsity import (
    Calibration,
    Components,
    UnifiedSparsity,
    count_parameters,
    experts_of,
    shrink,
    survey,
    to_experts,
)

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
IDS = torch.arange(1, 9)[None]
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0}


def janus() -> Any:
    """0.8 million weights, pictures of 16 tokens of 20."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
              "mlp_ratio": 2, "projection_dim": 32, "num_image_tokens": 16, "depth": 2}
    vq = {"embed_dim": 8, "num_embeddings": 20, "double_latent": False, "latent_channels": 8, "base_channels": 32,
          "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
          "num_patches": 4, "hidden_size": 32, "num_hidden_layers": 2}
    config = transformers.JanusConfig(text_config={"model_type": "llama", **TEXT}, vision_config=vision, vq_config=vq,
                                      image_token_id=63)
    model = seeded(lambda: transformers.JanusForConditionalGeneration(config)).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = 0, 1
    return model


def chameleon() -> Any:
    """0.1 million weights; it has a norm for each head, and cannot draw."""
    names = {"<image>": 8, **{f"IMGIMG{chr(65 + n)}Z": 40 + n for n in range(8)}}
    vq = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
          "num_res_blocks": 1, "resolution": 16}
    config = transformers.ChameleonConfig(**TEXT, vocabulary_map=names, vq_config=vq)
    model = seeded(lambda: transformers.ChameleonForConditionalGeneration(config)).eval()
    for layer in model.model.layers:  # different heads, or their order would not matter
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    return model


def emu3() -> Any:
    """0.3 million weights; pictures are words 40 to 47."""
    names = {"<image>": 8, "<|extra_200|>": 9, **{f"<|visual token {n:06}|>": 40 + n for n in range(8)}}
    vq = {"codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
          "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 1,
          "temporal_downsample_factor": 1}
    config = transformers.Emu3Config(text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 2}, vq_config=vq,
                                     vocabulary_map=names)
    return seeded(lambda: transformers.Emu3ForConditionalGeneration(config)).eval()


def gemma() -> Any:
    """With a sliding window in every other layer."""
    config = transformers.Gemma3TextConfig(**{**TEXT, "head_dim": 8}, sliding_window=4, layer_types=[
        "sliding_attention", "full_attention"] * 2)
    return seeded(lambda: transformers.Gemma3ForCausalLM(config)).eval()


def llama() -> Any:
    """With biases in attention and MLP."""
    model = tiny_llama(num_hidden_layers=4, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return model


MODELS = {"Janus": janus, "Chameleon": chameleon, "Emu3": emu3, "Llama": llama}
CASES = [("Janus", "heads", "block"), ("Chameleon", "heads", "block"), ("Emu3", "width", "block"),
         ("Emu3", "depth", "block"), ("Chameleon", "depth", "mlp"), ("Janus", "depth", "attention"),
         *(("Llama", what, unit) for what, unit in (("width", "block"), ("heads", "block"), ("depth", "block"),
                                                   ("depth", "attention"), ("depth", "mlp")))]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a few words, and for Janus of a picture among them."""
    if model.config.model_type != "janus":
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]
    ids = torch.cat([torch.full((1, 16), 63), IDS], 1)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits  # type: ignore[no-any-return]


def draw(model: Any, **options: Any) -> torch.Tensor:
    """Picture tokens of Janus."""
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), generation_mode="image",  # type: ignore[no-any-return]
                          guidance_scale=2.0, do_sample=False, **options)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """To 1e-6 of the size of the numbers."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max().clamp(min=1)) * 4)


@pytest.mark.parametrize("name, what, unit", [*CASES, ("Janus", "width", "block"), ("Chameleon", "width", "block")])
def test_shrunken_models_compute_what_the_masks_do(name: str, what: Any, unit: Any) -> None:
    model = MODELS[name]()
    masks = UnifiedSparsity(0.5, what, unit=unit).prune(model, {"understanding": [logits]})
    assert 0 < masks.removed() < masks.total()
    small = shrink(copy.deepcopy(model), masks)
    assert count_parameters(small)["total"] < count_parameters(model)["total"]
    dense = logits(model)
    masks.apply(model)
    close(logits(small), logits(model))
    assert not torch.allclose(logits(small), dense, atol=1e-3)


@pytest.mark.parametrize("name, unit", [(name, unit) for name, what, unit in CASES if what == "depth"])
def test_dropped_layers_and_the_cache(name: str, unit: Any) -> None:
    """Decoding with a cache gives what whole forwards give, also where the first layer is gone."""
    model = MODELS[name]()
    masks = UnifiedSparsity(0.5, "depth", unit=unit, criterion="first").prune(model)
    small = shrink(model, masks)
    words = small.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False,
                           eos_token_id=None, min_new_tokens=6)
    with torch.no_grad():
        for n in range(8, words.shape[1]):
            scores = small(input_ids=words[:, :n]).logits[0, -1]
            assert int(scores.argmax()) == int(words[0, n])
    left = Components.of(small)["understanding"]
    assert len(left) == (2 if unit == "block" else 4), "what is left is known as before"
    assert sum(part.attention is not None for part in left) == (4 if unit == "mlp" else 2)
    again = UnifiedSparsity(0.5).prune(small, {"understanding": [logits]})
    close(logits(shrink(copy.deepcopy(small), again)), masked(small, again))


def masked(model: Any, masks: Any) -> torch.Tensor:
    """Logits under masks."""
    masks.apply(model)
    try:
        return logits(model)
    finally:
        masks.remove(model)


def test_layers_of_several_kinds() -> None:
    """Gemma 3 has sliding windows in some layers, and norms behind attention and MLP."""
    model = gemma()
    masks = UnifiedSparsity(0.75, "depth").prune(model, {"understanding": [IDS]})
    small = shrink(copy.deepcopy(model), masks)
    assert len(small.config.layer_types) == len(small.model.layers) == small.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]
    close(logits(small), masked(model, masks))
    words = small.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(small(words).logits[0, 7:-1].argmax(-1), words[0, 8:])
    with pytest.raises(TypeError, match="expected attentions of one kind in all layers, got several"):
        shrink(model, UnifiedSparsity(0.5, "depth", unit="attention", criterion="last").prune(model))
    with pytest.raises(TypeError, match=r"expected layers that are h \+ attention \+ MLP, got Gemma3"):
        UnifiedSparsity(0.5, "depth", unit="mlp").prune(model, {"understanding": [IDS]})


def test_janus_draws_what_the_masks_draw() -> None:
    model = janus()
    for what in ("width", "heads", "depth"):
        one, two = copy.deepcopy(model), copy.deepcopy(model)
        masks = UnifiedSparsity(0.75, what, "generation").prune(model, {"generation": [draw]})
        masks.apply(one)
        assert torch.equal(draw(shrink(two, masks)), draw(one))


def test_phases_of_a_shared_decoder() -> None:
    """While drawing, the prompt is text, and what comes after it are picture tokens."""
    model, seen = janus(), []
    down = model.model.language_model.layers[3].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    draw(model)
    handle.remove()
    assert [tuple(x.shape[:2]) for x in seen] == [(2, 8)] + [(2, 1)] * 15, "both halves of guidance"
    norm, name = down.weight.detach().norm(dim=0), "model.language_model.layers.3.mlp.down_proj.weight"
    tokens = {"understanding": seen[0].flatten(0, 1), "generation": torch.cat(seen[1:]).flatten(0, 1)}
    for component, rows in tokens.items():
        scores = UnifiedSparsity(component=component).score(model, {"generation": [draw]})
        torch.testing.assert_close(scores[name].sum(0) * 3, rows.abs().mean(0) * norm, rtol=1e-4, atol=1e-6)

    def conditional(inputs: Any) -> torch.Tensor:
        drawing = inputs["past_key_values"].get_seq_length(inputs["layer_idx"]) > 0
        which = torch.zeros(inputs["hidden_states"].shape[:2], dtype=torch.bool)
        which[:1] = bool(drawing)
        return which

    scores = UnifiedSparsity(component="generation").score(model, Calibration({"generation": [draw]}, conditional))
    rows = torch.cat([x[:1] for x in seen[1:]]).flatten(0, 1)
    torch.testing.assert_close(scores[name].sum(0) * 3, rows.abs().mean(0) * norm, rtol=1e-4, atol=1e-6)


def test_survey_of_janus() -> None:
    report = survey(janus(), {"understanding": [logits], "generation": [draw]})
    table = report.tables[0]
    assert {(row[0], row[1]) for row in table.rows} == {
        ("understanding", "understanding"), ("understanding", "generation"), ("generation", "generation")}
    assert all(-1 <= row[3] <= 1 for row in table.rows) and len(table.rows) == 12
    assert report.facts["generation, understanding"] == "no such tokens"


def test_a_phase_that_is_never_seen() -> None:
    with pytest.raises(ValueError, match="expected tokens of generation while the task understanding runs, got those "
                       "of understanding"):
        UnifiedSparsity(component="generation").prune(janus(), {"understanding": [logits]})
    with pytest.raises(ValueError, match=r"it is not known whose the tokens are.*phase=\.\.\."):
        UnifiedSparsity(component="generation").prune(chameleon(), {"generation": [{"input_ids": IDS,
                                                                                   "use_cache": False}]})


def test_padding_does_not_count() -> None:
    model = llama()
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 5:] = 0
    padded = UnifiedSparsity().score(model, {"understanding": [{"input_ids": IDS, "attention_mask": mask}]})
    short = UnifiedSparsity().score(model, {"understanding": [IDS[:, :5]]})
    for name in short:
        torch.testing.assert_close(padded[name], short[name], rtol=1e-4, atol=1e-6)
    same = UnifiedSparsity().score(model, [IDS[:, :5]])  # as the command line gives them
    assert all(torch.equal(same[name], short[name]) for name in short)


@pytest.mark.parametrize("make", [janus, emu3], ids=["Janus", "Emu3"])
def test_experts_of_a_shared_decoder(make: Callable[[], Any]) -> None:
    model = make()
    scores = UnifiedSparsity(component="understanding").score(model, {"understanding": [logits]})
    before = logits(model)
    assert len(to_experts(model, scores, 8, 8, component="generation")) == len(experts_of(model)) == 2
    close(logits(model), before)


def test_adapters_and_compiled_models() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(janus(), peft.LoraConfig(r=2, target_modules=["down_proj"]))
    plain = UnifiedSparsity().prune(janus(), {"understanding": [logits]})
    masks = UnifiedSparsity().prune(model, {"understanding": [lambda m: logits(m)]})
    assert masks.removed() == plain.removed() and not any("lora" in name for name in masks)
    with pytest.raises(ValueError, match="merge them first"):
        shrink(model, masks)
    small = shrink(model.merge_and_unload(), masks)
    assert small.model.language_model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    compiled = torch.compile(llama(), backend="eager")
    masks = UnifiedSparsity().prune(compiled, {"understanding": [IDS]})
    plain = UnifiedSparsity().prune(llama(), {"understanding": [IDS]})
    assert all(torch.equal(masks[f"_orig_mod.{name}"], plain[name]) for name in plain)
    masks.apply(llama())


# ------------------------------------------------------------------------------------------ a pipeline of diffusers
@functools.cache
def _pipeline() -> Any:
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4))
    vae = diffusers.AutoencoderKLQwenImage(base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
                                           temperal_downsample=[False, True], latents_mean=[0.0] * 4,
                                           latents_std=[1.0] * 4)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "rope_theta": 1e6, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2,
             "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    text = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=sizes, vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                                          "out_hidden_size": 16}))
    pipe = diffusers.QwenImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, text, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline() -> Any:
    """Qwen-Image with 4 blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = seeded(_pipeline)
    return pipe


def latents(pipe: Any, *_: Any) -> torch.Tensor:
    """What the pipeline draws in two steps."""
    given = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    return pipe(prompt_embeds=given, prompt_embeds_mask=torch.ones(1, 7, dtype=torch.long), height=32, width=32,  # type: ignore[no-any-return]
                num_inference_steps=2, true_cfg_scale=1.0, output_type="latent",
                generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("what", ["width", "depth"])
def test_a_pipeline(what: Any) -> None:
    pipe = pipeline()
    found = Components.of(pipe)
    assert found.kind == "pipeline" and [len(found[name]) for name in ("understanding", "generation")] == [2, 4]
    masks = UnifiedSparsity(0.5, what, "generation").prune(pipe, {"generation": [lambda _: latents(pipe)]})
    dense = pipe.transformer
    small = shrink(copy.deepcopy(dense), masks)
    try:
        masks.apply(dense)
        masked = latents(pipe)
        pipe.transformer = small
        close(latents(pipe), masked)
    finally:
        pipe.transformer = dense
        masks.remove(dense)
    if what == "depth":
        assert len(small.transformer_blocks) == 2
    with pytest.raises(ValueError, match=r"such as pipeline\.transformer"):
        shrink(pipe, masks)


def test_the_other_half_of_a_pipeline() -> None:
    pipe = pipeline()
    masks = UnifiedSparsity(0.5).prune(pipe, {"generation": [lambda encoder: encoder(input_ids=IDS)]})
    masks.apply(pipe.text_encoder)
    masks.remove(pipe.text_encoder)
    with pytest.raises(TypeError, match="heads are not scored here"):
        UnifiedSparsity(what="heads", component="generation", criterion="random").prune(pipe)
    with pytest.raises(TypeError, match="take 'block'"):
        UnifiedSparsity(0.5, "depth", "generation", "mlp").prune(pipe, {"generation": [lambda _: latents(pipe)]})
    pipe = copy.copy(pipe)
    survey_of = survey(pipe, {"generation": [lambda _: latents(pipe)]})
    assert {row[0] for row in survey_of.tables[0].rows} == {"generation"}
