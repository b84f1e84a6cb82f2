"""Pipelines of diffusers, built small from their configurations: every prediction, and every network as its own
pipeline calls it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from looseleaf.modes import own_random_state
from looseleaf.testing import conformance_tests
from looseleaf_diffusionpid import DiffusionPID, Mixture, PipelineDenoiser, attention_maps
from looseleaf_diffusionpid.denoisers import as_picture

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
WORDS = 16


def tokenizer(length: int = WORDS) -> Any:
    """A CLIP tokenizer of single letters."""
    letters = [chr(n) for n in range(33, 127)]
    vocabulary = {t: n for n, t in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>",
                                              "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def clip(projection: bool = False) -> Any:
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(
        vocab_size=190, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=WORDS, projection_dim=8, bos_token_id=188, eos_token_id=189, pad_token_id=189)).eval()


def t5() -> Any:
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=190, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=189)).eval()


def vae(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, sample_size=16, **options).eval()


def unet(channels: int = 4, out: int = 4, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": channels, "out_channels": out, "block_out_channels": (8, 16),
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8, "attention_head_dim": 4,
        "norm_num_groups": 4, **options}).eval()


def stable_diffusion(prediction: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet(), safety_checker=None,
        scheduler=diffusers.DDIMScheduler(prediction_type=prediction, beta_schedule="scaled_linear", beta_start=0.00085,
                                          beta_end=0.012),
        feature_extractor=None, requires_safety_checker=False)


def stable_diffusion_xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(True), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        unet=unet(cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
                  projection_class_embeddings_input_dim=32), scheduler=diffusers.EulerDiscreteScheduler())


def deepfloyd_if() -> Any:
    return diffusers.IFPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), unet=unet(3, 6), scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2"), safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False)


def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=8, pooled_projection_dim=16,
            pos_embed_max_size=16).eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1), text_encoder=clip(True), tokenizer=tokenizer(), text_encoder_2=clip(True),
        tokenizer_2=tokenizer(), text_encoder_3=None, tokenizer_3=None)


def flux(guided: bool = True) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            joint_attention_dim=8, num_attention_heads=2, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
            guidance_embeds=guided).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4, shift_factor=0.1), text_encoder=clip(),
        tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer())


def pixart() -> Any:
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae(), scheduler=diffusers.DPMSolverMultistepScheduler(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
            cross_attention_dim=8, caption_channels=8, sample_size=8, patch_size=2).eval())


BUILD = {"Stable Diffusion": stable_diffusion, "XL": stable_diffusion_xl, "IF": deepfloyd_if,
         "Stable Diffusion 3": stable_diffusion_3, "Flux": flux, "PixArt": pixart}
OPTIONS: dict[str, dict[str, Any]] = {"Flux": {"height": 16, "width": 16, "guidance_scale": 1.0},
                                      "IF": {"guidance_scale": 1.0}, "PixArt": {"use_resolution_binning": False}}


def built(name: str) -> Any:
    with own_random_state(0):
        pipeline = BUILD[name]()
        for p in (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).parameters():
            p.data = torch.randn(p.shape) * 0.2  # some last layers begin with zeros
    return pipeline


@pytest.mark.parametrize("name", BUILD)
def test_the_network_is_run_as_its_pipeline_runs_it(name: str) -> None:
    pipeline = built(name)
    denoiser, calls = PipelineDenoiser(pipeline), []
    network = getattr(pipeline, "unet", None) or pipeline.transformer

    def seen(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        calls.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
                      kwargs["timestep"] if "timestep" in kwargs else args[1], out[0]))

    pipeline.set_progress_bar_config(disable=True)
    with network.register_forward_hook(seen, with_kwargs=True):
        size = {"height": 16, "width": 16} if name != "IF" else {"height": 8, "width": 8}
        pipeline("ab cd", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                 output_type="latent" if name != "IF" else "pt", **{"guidance_scale": 0.0, **size,
                                                                    **OPTIONS.get(name, {})})
    z, times, expected = calls[-1]
    if name == "Flux":  # packed, and times from 0 to 1
        z, expected = (t.view(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 8) for t in (z, expected))
        times = times * 1000
    with torch.no_grad():
        ours = denoiser._run(z, times.reshape(-1)[:1].expand(1), denoiser._encoded("ab cd"))
    torch.testing.assert_close(ours, expected[:, :z.shape[1]])
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    report = DiffusionPID(steps=4).run(pipeline, [(picture, "ab cd", "ab", "cd")], progress=False)
    assert all(np.isfinite(v) for row in report.tables[0].rows for v in row[4:])
    assert any(row[4] > 0 for row in report.tables[0].rows) and "cut" not in report.facts
    if name == "XL":  # its empty text is zeros, as its pipeline has it
        assert not any(value.any() for value in denoiser._encoded("").values())


class UNet2DConditionModel(nn.Module):
    """The exact network of a mixture, whatever it predicts; text embeddings are numbers of texts."""

    def __init__(self, mixture: Mixture, texts: list[str], prediction: str, levels: Tensor) -> None:
        super().__init__()
        self.mixture, self.texts, self.prediction, self.levels = mixture, texts, prediction, levels
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=2, block_out_channels=(1,), patch_size=1)

    def exact(self, z: Tensor, signal: Tensor, noise: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and clean picture of ``signal x + noise e``."""
        length = (signal ** 2 + noise ** 2).sqrt()
        eps = self.mixture.eps(z / length, 2 * (signal / noise).log().flatten(), [self.texts[int(t)] for t in text])
        return eps, (z - noise * eps) / signal

    def forward(self, z: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        level = self.levels[t].double().view(-1, 1, 1, 1)
        eps, x = self.exact(z.double(), level.sqrt(), (1 - level).sqrt(), encoder_hidden_states.flatten())
        out = {"epsilon": eps, "sample": x, "v_prediction": level.sqrt() * eps - (1 - level).sqrt() * x}
        return (out[self.prediction].float(),)


class SD3Transformer2DModel(UNet2DConditionModel):
    """Of a rectified flow."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,  # type: ignore[override]
                pooled_projections: Tensor, return_dict: bool) -> tuple[Tensor]:
        t = timestep.double().view(-1, 1, 1, 1) / 1000
        eps, x = self.exact(hidden_states.double(), 1 - t, t, encoder_hidden_states.flatten())
        return ((eps - x).float(),)


def exact_pipeline(prediction: str, mixture: Mixture) -> Any:
    texts = list(mixture.conditions)

    def encode_prompt(prompt: str) -> tuple[Tensor, ...]:
        return (torch.tensor([[float(texts.index(prompt))]]),) * 3

    if prediction == "flow_prediction":
        network = {"transformer": SD3Transformer2DModel(mixture, texts, prediction, torch.zeros(1))}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    else:
        scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
        network = {"unet": UNet2DConditionModel(mixture, texts, prediction, scheduler.alphas_cumprod)}
    return SimpleNamespace(scheduler=scheduler, encode_prompt=encode_prompt, config=None, device="cpu", **network)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_gives_the_same_noise(prediction: str) -> None:
    draw = torch.Generator().manual_seed(0)
    mixture = Mixture(torch.randn(3, 2, 2, 2, generator=draw), 0.5, {"": [0.3, 0.3, 0.4], "a": [1, 0, 0],
                                                                     "b": [0, 0.5, 0.5], "a b": [0, 1, 0]})
    denoiser = PipelineDenoiser(exact_pipeline(prediction, mixture))
    assert denoiser.prediction == prediction
    a = denoiser.nearest(torch.linspace(-4, 6, 24, dtype=torch.float64))
    z, texts = torch.randn(24, 2, 2, 2, generator=draw), ["", "a", "b", "a b"] * 6
    torch.testing.assert_close(denoiser.eps(z, a, texts), mixture.eps(z, a, texts), atol=2e-5, rtol=2e-4)
    picture = (mixture.means[1].float() + 1) / 2  # without a VAE the range is -1 to 1
    plugin = DiffusionPID(steps=20)
    one, two = (plugin.run(s, [(p, "a b", "a", "b")]).tables[0].rows for s, p in (
        (denoiser, picture), (mixture, mixture.means[1].float())))
    if prediction == "flow_prediction":  # at the very same levels, not at the nearest timesteps
        assert [v for row in one for v in row[4:]] == pytest.approx([v for row in two for v in row[4:]], rel=1e-3,
                                                                    abs=1e-3)


def test_levels_of_the_schedule() -> None:
    denoiser = PipelineDenoiser(stable_diffusion())
    low, high = denoiser.log_snr_range
    assert low == pytest.approx(-5.36, abs=0.01) and high == pytest.approx(7.07, abs=0.01)
    table = torch.logit(denoiser.pipeline.scheduler.alphas_cumprod.double())
    a = torch.linspace(low - 1, high + 1, 500, dtype=torch.float64)
    nearest = table[(table[None] - a[:, None]).abs().argmin(1)]
    torch.testing.assert_close(denoiser.nearest(a), nearest)
    report = DiffusionPID(steps=3, loc=5.0).run(denoiser, [(torch.rand(3, 16, 16), "", "a", "b")])
    assert report.facts["log-SNR"] == "-1.00 to 7.07" and "-1.00 to 11.00 asked for" in report.facts["cut"]


def subject() -> Any:
    return built("Stable Diffusion")


def test_the_pipeline_is_left_as_it_was() -> None:
    pipeline = subject()
    pipeline.unet.train()
    pipeline.vae.decoder.train()
    scheduler, before = pipeline.scheduler, copy.deepcopy(pipeline.unet.state_dict())
    plugin = DiffusionPID(steps=4, num_inference_steps=2, guidance_scale=3.0)
    data = [(None, "ab cd", "ab", "cd")]
    state = torch.get_rng_state()
    one = plugin.run(pipeline, data, seed=3).to_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert pipeline.unet.training and pipeline.vae.decoder.training and not pipeline.vae.encoder.training
    assert pipeline.scheduler is scheduler and scheduler.num_inference_steps is None
    assert not hasattr(pipeline, "_progress_bar_config")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), pipeline.unet.state_dict().values(), strict=True))
    assert plugin.run((pipeline, pipeline.tokenizer), data, seed=3).to_dict()["tables"] == one["tables"]
    assert plugin.run(pipeline, data, seed=4).to_dict()["tables"] != one["tables"]


def values(report: Any) -> list[float]:
    """Orthogonal terms, then standard ones."""
    return [row[column] for column in (4, 6) for row in report.tables[0].rows]


def test_compiled_lora_and_half_precision() -> None:
    peft = pytest.importorskip("peft")
    plugin, data = DiffusionPID(steps=4), [(torch.rand(3, 16, 16), "ab cd", "ab", "cd")]
    pipeline = subject()
    expected = values(plugin.run(pipeline, data))
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert values(plugin.run(pipeline, data)) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    pipeline = subject()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    assert values(plugin.run(pipeline, data)) != expected
    pipeline = subject().to(torch.bfloat16)
    assert values(plugin.run(pipeline, data))[:7] == pytest.approx(expected[:7], rel=0.2)  # orthogonal ones


def test_words_leave_the_prompt_by_padding() -> None:
    pipeline = subject()
    plugin = DiffusionPID(conditional=True, drop="padding")
    texts, _ = plugin.texts("ab cd e", "ab", "e", PipelineDenoiser(pipeline))
    end = "<|endoftext|>"
    assert texts == [f"{end} {end} cd {end}", f"ab cd {end}", f"{end} {end} cd e", "ab cd e"]
    lengths = {len(pipeline.tokenizer(text).input_ids) for text in texts}
    assert len(lengths) == 1
    with pytest.raises(ValueError, match=r"drop: expected 'text' for a denoiser without padding\(text\)"):
        plugin.texts("ab cd e", "ab", "e")


def test_attention_to_words() -> None:
    """Two tokens of a word, of one layer on 16 places and two on the other size; against attention that is uniform."""
    denoiser = PipelineDenoiser(subject())
    draw = torch.Generator().manual_seed(0)
    a, noise = torch.zeros(5, dtype=torch.float64), torch.randn(5, 4, 8, 8, generator=draw)
    maps = attention_maps(denoiser, noise[0], "ab cd e", ["ab", "e"], log_snr=a, noise=noise, batch=2)
    assert maps.shape == (2, 8, 8) and (maps > 0).all() and maps.std() > 0
    torch.testing.assert_close(maps, attention_maps(denoiser, noise[0], "ab cd e", ["ab", "e"], log_snr=a, noise=noise))
    for module in denoiser.network.modules():
        if hasattr(module, "to_q"):
            module.to_q.weight.data.zero_()
    flat = attention_maps(denoiser, noise[0], "ab cd e", ["ab"], log_snr=a, noise=noise)
    layers = sum(name.endswith("attn2") for name, _ in denoiser.network.named_modules())
    torch.testing.assert_close(flat, torch.full_like(flat, layers / WORDS))
    with pytest.raises(ValueError, match="expected a network with cross-attention, got Flux"):
        attention_maps(PipelineDenoiser(flux()), noise[0], "ab", ["ab"], log_snr=a, noise=noise)


test_conformance_of_a_pipeline = conformance_tests(
    DiffusionPID, make=lambda: DiffusionPID(steps=4), subject=subject, other=lambda: built("PixArt"),
    data=[(torch.linspace(0, 1, 768).view(3, 16, 16), "ab cd", "ab", "cd")])


def test_errors() -> None:
    plugin, row = DiffusionPID(steps=2), [(torch.rand(3, 16, 16), "ab cd", "ab", "cd")]
    with pytest.raises(TypeError, match=r"text-to-image pipeline of diffusers with encode_prompt.*got DDPMPipeline"):
        plugin.run(diffusers.DDPMPipeline(diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            norm_num_groups=4), diffusers.DDPMScheduler()), row)
    pipeline = subject()
    pipeline.unet = unet(9)
    with pytest.raises(TypeError, match="takes the 4 channels of its VAE, got one that takes 9, as for inpainting"):
        plugin.run(pipeline, row)
    pipeline = subject()
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="expected one with alphas_cumprod, or of flow matching"):
        plugin.run(pipeline, row)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    pipeline.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match=r"expected a prediction_type of epsilon, .* got 'score'"):
        plugin.run(pipeline, row)
    with pytest.raises(ValueError, match="height and width divisible by 4, got 15 x 16: resize"):
        plugin.run(subject(), [(torch.rand(3, 15, 16), "ab cd", "ab", "cd")])
    pipeline = subject()
    pipeline.vae.encoder.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"picture: expected finite numbers \(C, H, W\), got NaN"):
        plugin.run(pipeline, row)
    with pytest.raises(ValueError, match=r"picture: expected one of PIL, uint8 .*got uint8 \(16, 16\)"):
        as_picture(np.zeros((16, 16), np.uint8))
    pipeline = subject()
    pipeline.unet = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"expected a pipeline with one of UNet2DConditionModel.*got Linear: wrap it"):
        plugin.run(pipeline, row)
