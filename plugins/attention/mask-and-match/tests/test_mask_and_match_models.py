"""The prior in other people's image-to-text models, and the recognizer of one's own."""

import pytest
import torch
from transformers import (
    DonutSwinConfig,
    DonutSwinModel,
    MBartConfig,
    MBartForCausalLM,
    PPFormulaNetConfig,
    PPFormulaNetForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

import looseleaf
from looseleaf_mask_and_match import FormulaRecognizer, LatexVocabulary, MaskAndMatch, draw_map, normalise, stack
from looseleaf_mask_and_match.recognizer import FormulaEncoder, FormulaEncoderConfig, positions


def pictures(count: int = 4, channels: int = 3, height: int = 32, width: int = 64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    images = torch.zeros(count, channels, height, width)
    for image in images:
        for _ in range(4):
            y, x = (int(torch.randint(2, n - 12, (), generator=draw)) for n in (height, width))
            image[:, y:y + 2, x:x + 10] = image[:, y:y + 10, x:x + 2] = 1
    return 1 - 2 * images


def decoder(size: int = 32):
    return MBartForCausalLM(MBartConfig(
        vocab_size=20, d_model=size, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, is_decoder=True,
        max_position_embeddings=40, add_cross_attention=True, is_encoder_decoder=False, forced_eos_token_id=None))


def nougat_like():
    encoder = DonutSwinModel(DonutSwinConfig(image_size=(32, 64), patch_size=4, embed_dim=16, depths=[1, 1],
                                             num_heads=[2, 2], window_size=4))
    return VisionEncoderDecoderModel(encoder=encoder, decoder=decoder())


def vit_like():
    encoder = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                 image_size=(32, 64), patch_size=8), add_pooling_layer=False)
    return VisionEncoderDecoderModel(encoder=encoder, decoder=decoder())


def formula_net():
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "window_size": 4, "image_size": 64, "patch_size": 4, "global_attn_indexes": [1], "mlp_dim": 32,
              "post_conv_in_channels": 16,
              "post_conv_mid_channels": 16, "post_conv_out_channels": 32, "decoder_hidden_size": 32}
    text = {"vocab_size": 20, "max_position_embeddings": 40, "decoder_layers": 2, "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}
    return PPFormulaNetForConditionalGeneration(PPFormulaNetConfig(text_config=text, vision_config=vision))


FAMILIES = {"DonutSwin and mBART": (nougat_like, 32, 32), "ViT and mBART": (vit_like, 33, 32),
            "PP-FormulaNet": (formula_net, 16, 64)}
"""How a model is made, how many keys its decoder has, and the height of its images, which are 64 wide."""


def made(family: str):
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_decoder_looks_where_the_map_says(family: str) -> None:
    model, images = made(family), pictures(height=FAMILIES[family][2])
    ids = torch.randint(3, 20, (4, 6))
    plain = model(pixel_values=images, decoder_input_ids=ids).logits
    plugin = MaskAndMatch()
    plugin.calibrate(model, [{"pixel_values": images}] * 5, lr=0.05)
    maps = plugin.maps(model, images).detach()
    assert maps.shape == (4, FAMILIES[family][1])
    torch.testing.assert_close(maps.sum(1), torch.ones(4))
    with torch.no_grad(), looseleaf.attach(model, plugin) as attached:
        exact = model(pixel_values=images, decoder_input_ids=ids).logits
        torch.testing.assert_close(exact, plain)
        assert all("fallback" in r for r in attached.records) and len(plugin.modules) == 2
        attached.reset()
        attached.context["map"] = maps
        guided = model(pixel_values=images, decoder_input_ids=ids).logits
        assert [r["layer"] for r in attached.records if "fallback" not in r] == sorted(plugin.modules)
        attached.context["map"] = torch.eye(maps.shape[1])[torch.full((4,), 5)] + 1e-9
        for module in plugin.modules.values():
            module.value.fill_(60.0)
        at_one = model(pixel_values=images, decoder_input_ids=ids).logits
        # with all attention at one key, other keys are of no concern
        memory = model.get_encoder()(images)
        name = "pooler_output" if family == "PP-FormulaNet" else "last_hidden_state"
        memory[name] = memory[name] + (torch.arange(maps.shape[1]) != 5)[:, None]
        again = model(encoder_outputs=memory, decoder_input_ids=ids).logits
        torch.testing.assert_close(again, at_one, atol=1e-5, rtol=1e-5)
    assert (guided - plain).abs().max() > 1e-4
    assert torch.equal(model(pixel_values=images, decoder_input_ids=ids).logits, plain)


def test_beams_repeat_the_map() -> None:
    model, images = made("DonutSwin and mBART"), pictures(2)
    plugin = MaskAndMatch(beta=3.0)
    plugin.calibrate(model, [images])
    options = {"max_length": 8, "do_sample": False}
    with looseleaf.attach(model, plugin) as attached:
        attached.context["map"] = plugin.maps(model, images).detach()
        both = model.generate(images, num_beams=3, **options)
        assert not any("fallback" in r for r in attached.records if r["layer"] in plugin.modules)
        for n in range(2):
            attached.context["map"] = plugin.maps(model, images[n:n + 1]).detach()
            alone = model.generate(images[n:n + 1], num_beams=3, **options)[0]
            assert both[n, :len(alone)].tolist()[:8] == alone.tolist()


def test_betas_and_adapters_train_and_reload(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model, images = made("DonutSwin and mBART"), pictures()
    plugin = MaskAndMatch()
    plugin.calibrate(model, [images] * 3)
    maps = plugin.maps(model, images).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(plugin.maps(adapted, images).detach(), maps)
    labels, modes = torch.randint(3, 20, (4, 5)), [m.training for m in adapted.modules()]
    with looseleaf.attach(adapted, plugin) as attached:
        attached.context["map"] = maps
        adapted(pixel_values=images, labels=labels).loss.backward()
        assert all(m.value.grad.abs() > 0 for m in plugin.modules.values())
        with torch.no_grad():
            plugin.modules[max(plugin.modules)].value.fill_(0.25)
    plugin.save(tmp_path / "map.safetensors")
    again = MaskAndMatch()
    again.load(tmp_path / "map.safetensors")
    assert torch.equal(again.maps(model, images).detach(), maps)
    with looseleaf.attach(model, again):
        assert again.modules[max(plugin.modules)].value.item() == 0.25
    assert [m.training for m in adapted.modules()] == modes


def test_a_compiled_encoder_and_pixel_masks() -> None:
    encoder, images = made("ViT and mBART").encoder, pictures()
    plugin = MaskAndMatch()
    plugin.calibrate(torch.compile(encoder, backend="eager"), [images])
    mask = torch.ones(4, 32, 64)
    mask[1, :, 40:] = 0
    maps = plugin.grid_maps(encoder, {"pixel_values": images, "pixel_mask": mask})
    assert maps.shape == (4, 4, 8) and not maps[1, :, 5:].any() and maps[0, :, 5:].all()


def test_a_decoder_of_its_own_kind_is_refused() -> None:
    config = TrOCRConfig(vocab_size=20, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
                         is_decoder=True, add_cross_attention=True)
    model = VisionEncoderDecoderModel(encoder=vit_like().encoder, decoder=TrOCRForCausalLM(config))
    with pytest.raises(looseleaf.UnsupportedModelError, match=r"expected .*AttentionInterface, got"):
        looseleaf.attach(model, MaskAndMatch())


def test_heat_maps(tmp_path) -> None:
    model, images = made("ViT and mBART"), pictures()
    plugin = MaskAndMatch()
    plugin.calibrate(model, [images])
    report = plugin.heat_map(model, images)
    assert len(report.images[0].pngs) == 4 and report.images[0].captions[0].startswith("entropy")
    drawn = draw_map(torch.zeros(8, 8), torch.eye(2))
    assert drawn.shape == (8, 8, 3) and drawn[0, 0, 1] < 0.3 and drawn[0, -1, 1] == 1
    with pytest.raises(ValueError, match=r"encoder: expected features of 32 channels, .*, got 16"):
        plugin.maps(FormulaEncoder(FormulaEncoderConfig((8, 16))), pictures(2, 1))


# ----------------------------------------------------------------------------------------------------------- recognizer
LABELS = ["x^2", r"\frac{1}{2}", "1+x", r"\sqrt{2}"]
SIZES = {"size": 32, "layers": 1, "heads": 2, "inner": 64, "dropout": 0.0, "length": 16}


def test_stage_three_learns_a_few_formulas_with_the_map() -> None:
    torch.manual_seed(0)
    images, mask = stack([(1 - picture[0]) / 2 for picture in pictures(4, 1)])
    encoder = FormulaEncoder(FormulaEncoderConfig((8, 8, 16, 32)))
    plugin = MaskAndMatch()
    plugin.calibrate(encoder, [images] * 3)
    model = FormulaRecognizer(LatexVocabulary.of(LABELS), plugin, encoder, **SIZES)
    optimizer = torch.optim.AdamW(model.groups(5e-3))
    before, network = encoder.cnn[0].weight.detach().clone(), plugin.network[0].weight.detach().clone()
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in model.parameters()} and {id(m.value) for m in plugin.modules.values()} <= known
    for _ in range(100):
        loss = model(images, LABELS, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.recognize(images, mask, beams=3) == [normalise(label) for label in LABELS]
    assert not torch.equal(before, encoder.cnn[0].weight) and not torch.equal(network, plugin.network[0].weight)
    assert all(m.value.item() != 1 for m in plugin.modules.values())


def test_positions_tell_rows_from_columns() -> None:
    found = positions(3, 5, 16)
    assert found.shape == (15, 16) and len({tuple(row.tolist()) for row in found}) == 15
    assert torch.equal(found[0, :8], found[4, :8]) and torch.equal(found[0, 8:], found[10, 8:])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"images\[1\]: expected \(H, W\) of at least 16 x 16 pixels, got \(8, 40\)"):
        stack([torch.zeros(20, 40), torch.zeros(8, 40)])
    with pytest.raises(ValueError, match=r"images\[0\]: expected values in \[0, 1\], ink 1 on 0"):
        stack([torch.full((20, 40), 255.0)])
    images, mask = stack([torch.zeros(20, 40), torch.zeros(33, 16)])
    assert images.shape == (2, 1, 48, 48) and mask.sum((1, 2)).tolist() == [800, 528]
    model = FormulaRecognizer(LatexVocabulary.of(LABELS), **{**SIZES, "length": 3}, channels=(8, 8, 16, 32))
    with pytest.raises(ValueError, match="labels: expected at most 3 tokens, got 8"):
        model(images, LABELS[1:3])
