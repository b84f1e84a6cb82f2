"""The three models of transformers, small from their configurations, wrapped too, and the sources of words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf.testing.common import mixed_modes, snapshot
from looseleaf.testing.models import seeded
from looseleaf_gensam import (
    ChatNamer,
    FixedWords,
    GenSAM,
    PromptableModels,
    Segmenter,
    spatial_features,
    toy_mask_task,
    toy_models,
)

transformers = pytest.importorskip("transformers")
from looseleaf_vision.testing import toy_clip  # noqa: E402

SETTINGS: dict[str, Any] = {"depth": 2, "size": 32, "templates": ("a {}",), "recursive": 1}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
          "mlp_dim": 32, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8}
PROMPT = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
DECODER = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "iou_head_hidden_dim": 16}


def sam() -> tuple[Any, Any]:
    config = transformers.SamConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)
    return transformers.SamModel(config), transformers.SamProcessor(sam_pictures())


def sam_hq() -> tuple[Any, Any]:
    config = transformers.SamHQConfig(vision_config=VISION, prompt_encoder_config=PROMPT,
                                      mask_decoder_config={**DECODER, "vit_dim": 16})
    return transformers.SamHQModel(config), transformers.SamHQProcessor(sam_pictures())


def sam_pictures() -> Any:
    return transformers.SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})


def sam2() -> tuple[Any, Any]:
    if transformers.utils.is_torchvision_available() is False:
        pytest.skip("the processor of Sam2 needs torchvision")
    return sam2_model(), transformers.Sam2Processor(transformers.Sam2ImageProcessorFast(
        size={"height": 64, "width": 64}))


def sam2_model() -> Any:
    hiera = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
             "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
             "blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3],
             "window_positional_embedding_background_size": [4, 4], "image_size": [64, 64]}
    vision = {"backbone_config": hiera, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
              "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    return transformers.Sam2Model(transformers.Sam2Config(
        vision_config=vision, prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16,
                                                     "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16, "attention_downsample_rate": 2}))


class SquareProcessor:
    """What Sam2's processor does, without torchvision: squeezes pictures, and stretches masks to their size."""

    def __call__(self, images: Any, return_tensors: str) -> dict[str, Any]:
        array = np.asarray(images.resize((64, 64)), dtype=np.float32) / 255
        return {"pixel_values": torch.from_numpy(array).permute(2, 0, 1)[None] * 2 - 1}

    def post_process_masks(self, masks: Any, sizes: Any, binarize: bool = True, **_: Any) -> list[torch.Tensor]:
        return [torch.nn.functional.interpolate(m, s, mode="bilinear") for m, s in zip(masks, sizes, strict=True)]


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "SamModel": sam, "SamHQModel": sam_hq, "Sam2Model": sam2, "Sam2Model-own-processor": lambda: (
        sam2_model(), SquareProcessor())}


@pytest.fixture(params=FAMILIES)
def segmenter(request: Any) -> Segmenter:
    model, processor = seeded(FAMILIES[request.param])
    return Segmenter(model.eval(), processor)


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


def test_every_segmenter_gives_six_passes_at_the_size_of_the_picture(segmenter: Segmenter) -> None:
    models = PromptableModels(toy_clip(), segmenter, FixedWords("red square", "black disc"))
    before = [snapshot(network) for network in models.networks]
    found = GenSAM("red square", **{**SETTINGS, "recursive": 5}).on(models).segment(picture())
    assert len(found.passes) == 6 and found.mask.shape == (24, 40)
    assert all(bool(np.isfinite(one.score)) for one in found.passes)
    for former, network in zip(before, models.networks, strict=True):  # weights, modes and hooks
        now = snapshot(network)
        assert all(torch.equal(former["values"][n], now["values"][n]) for n in former["values"])
        assert former["hooks"] == now["hooks"] and former["modes"] == now["modes"]


@torch.no_grad()
def test_points_and_boxes_reach_the_model_where_its_own_processor_puts_them(segmenter: Segmenter) -> None:
    """One pass against the model asked in the usual way: pictures, points and boxes through its processor."""
    if isinstance(segmenter.processor, SquareProcessor):
        pytest.skip("not the model's own processor")
    from PIL import Image

    image, points, box = Image.fromarray(picture()), torch.tensor([[5, 20], [33, 3]]), torch.tensor([2, 1, 30, 22])
    labels = torch.tensor([1, 0])
    logits, scores = segmenter.masks(segmenter.embed(image), points, labels, box)
    inputs = segmenter.processor(images=image, input_points=[[points.tolist()]], input_labels=[[labels.tolist()]],
                                 input_boxes=[[box.tolist()]], return_tensors="pt")
    out = segmenter.model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items() if k in (
        "pixel_values", "input_points", "input_labels", "input_boxes")}, multimask_output=True)
    more = {"reshaped_input_sizes": inputs["reshaped_input_sizes"]} if "reshaped_input_sizes" in inputs else {}
    expected = segmenter.processor.post_process_masks(out.pred_masks, inputs["original_sizes"], binarize=False, **more)
    torch.testing.assert_close(logits, expected[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, out.iou_scores.flatten(), rtol=1e-4, atol=1e-5)
    assert logits.shape == (3, 24, 40)


@torch.no_grad()
def test_prompts_matter_and_may_be_left_out(segmenter: Segmenter) -> None:
    from PIL import Image

    embedded = segmenter.embed(Image.fromarray(picture()))
    points, labels, box = torch.tensor([[5, 5]]), torch.tensor([1]), torch.tensor([0, 0, 10, 10])
    found = [segmenter.masks(embedded, *given)[0] for given in (
        (points, labels, None), (None, None, box), (points, labels, box), (torch.zeros(0, 2), torch.zeros(0), box))]
    assert torch.equal(found[1], found[3])  # no points are none
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_half_precision_keeps_pixels_apart() -> None:
    """bfloat16 has 8 bits: points of a large picture would run together."""
    model, processor = seeded(sam)
    from PIL import Image

    segmenter = Segmenter(model.eval().to(torch.bfloat16), processor)
    models = PromptableModels(toy_clip(), segmenter, FixedWords("red square"))
    models.clip.model.to(torch.bfloat16)
    assert GenSAM("red square", **SETTINGS).on(models).segment(picture()).mask.shape == (24, 40)
    with torch.no_grad():
        embedded = segmenter.embed(Image.fromarray(picture(1000, 1000)))
        one, two = (segmenter.masks(embedded, torch.tensor([[x, 500]]), torch.tensor([1]), None)[0] for x in (960, 963))
    assert not torch.equal(one, two)


def test_one_picture_embedding_serves_all_passes() -> None:
    model, processor = seeded(sam)
    calls: list[int] = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    models = PromptableModels(toy_clip(), Segmenter(model.eval(), processor), FixedWords("red square"))
    GenSAM("red square", **{**SETTINGS, "recursive": 5}).on(models).segment(picture())
    assert len(calls) == 1


def test_training_modes_and_frozen_parts_come_back() -> None:
    model, processor = seeded(sam)
    clip = toy_clip()
    models = PromptableModels(clip, Segmenter(mixed_modes(model), processor), FixedWords("red square"))
    mixed_modes(clip.model)
    before = [snapshot(network) for network in models.networks]
    expected = GenSAM("red square", **SETTINGS).on(models).segment(picture())
    for former, network in zip(before, models.networks, strict=True):
        now = snapshot(network)
        for what in ("modes", "requires_grad", "gradients", "hooks"):
            assert former[what] == now[what]
    for network in models.networks:
        network.eval()
    assert torch.equal(GenSAM("red square", **SETTINGS).on(models).segment(picture()).mask, expected.mask)


def test_adapters_of_peft_take_part() -> None:
    peft = pytest.importorskip("peft")
    from looseleaf_vision import DualEncoder

    plain, clip = toy_clip(), toy_clip()
    tuned = seeded(lambda: peft.get_peft_model(clip.model, peft.LoraConfig(
        r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)))
    from looseleaf_vision.testing import toy_processor, toy_tokenizer

    wrapped = DualEncoder(tuned.eval(), toy_processor(toy_tokenizer()))
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        ours, expected = spatial_features(tuned, pixels, 2), spatial_features(plain.model, pixels, 2)
        assert not torch.allclose(ours, expected)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(spatial_features(merged, pixels, 2), ours, rtol=1e-4, atol=1e-4)
    models = PromptableModels(wrapped, toy_models().segmenter, FixedWords("red square"))
    assert GenSAM("red square", **SETTINGS).on(models).segment(picture()).mask.shape == (24, 40)


# ----------------------------------------------------------------------------------------------------- sources of words
def test_a_model_of_transformers_that_sees_pictures_gives_words() -> None:
    from looseleaf_text import LocalChat
    from looseleaf_text.testing.models import toy_llava

    model, processor = toy_llava()
    namer = ChatNamer(LocalChat(model, processor), max_tokens=4)
    models = PromptableModels(toy_clip(), toy_models().segmenter, namer)
    assert model in models.networks
    state = torch.get_rng_state()
    predictor = GenSAM("red square", **SETTINGS).on(models, seed=1)
    one, two = (predictor.segment(toy_mask_task().train[0].inputs["image"]) for _ in range(2))
    assert [p.words for p in one.passes] == [p.words for p in two.passes] and torch.equal(one.mask, two.mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(word for p in one.passes for word in (*p.words.foreground, *p.words.background))
    other = GenSAM("red square", **SETTINGS).on(models, seed=2).segment(toy_mask_task().train[0].inputs["image"])
    assert other.passes[0].words != one.passes[0].words  # temperature 0.2: another seed, other words
    with pytest.raises(ValueError, match=r"ChatNamer: expected a looseleaf_text.ChatModel, got Llava"):
        ChatNamer(model)


def test_an_openai_compatible_endpoint_is_shown_the_picture_once_per_dialogue() -> None:
    from looseleaf_text import ChatEndpoint
    from looseleaf_text.testing.servers import chat_server

    said = {1: "A red square on grey.", 3: 'It is a "square".', 5: "The environment is a grey field."}
    with chat_server(lambda body, number: (200, said[len(body["messages"])])) as (url, bodies), \
            ChatEndpoint(url, "some-vlm", retries=0) as endpoint:
        models = PromptableModels(toy_clip(), toy_models().segmenter, ChatNamer(endpoint))
        found = GenSAM("camouflaged square", **{**SETTINGS, "recursive": 0}).on(models).segment(picture())
        assert "some-vlm" in ChatNamer(endpoint).fingerprint() or ChatNamer(endpoint).fingerprint()
    words = found.passes[0].words
    assert words.foreground == ["square"] * 3 and words.background == ["grey field"] * 3
    assert words.captions == ["A red square on grey."] * 3 and len(bodies) == 9
    first, last = bodies[0]["messages"], bodies[2]["messages"]
    urls = [part["image_url"]["url"] for message in last for part in message["content"]
            if isinstance(message["content"], list) and part["type"] == "image_url"]
    assert len(urls) == 1 and urls[0].startswith("data:image/png;base64,")
    assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant", "user"] and len(first) == 1
    assert "camouflaged square" in json.dumps(first) and bodies[0]["temperature"] == 0.2
    assert len({body["seed"] for body in bodies}) == 9
