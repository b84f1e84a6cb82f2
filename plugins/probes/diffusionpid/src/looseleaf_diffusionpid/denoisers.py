"""Text-to-image pipelines of diffusers as denoisers: what they predict, how they take text, and their noise levels."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf.modes import evaluating, own_random_state
from looseleaf.unwrap import unwrapped

NETWORKS = {"UNet2DConditionModel": "unet", "SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux",
            "PixArtTransformer2DModel": "pixart"}
"""How a network takes its inputs, by its class."""
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


class PipelineDenoiser:
    """A text-to-image pipeline of diffusers as a denoiser, without guidance.

    Networks: UNets (Stable Diffusion 1, 2, XL, DeepFloyd IF), and the transformers of Stable Diffusion 3, Flux and
    PixArt. They may predict the noise, v, the clean picture, or the velocity of a rectified flow. Distilled guidance
    (Flux dev) is given as 1.

    Args:
        pipeline: the pipeline; it is left as it was found.
        num_inference_steps, guidance_scale: of :meth:`generate`; None: the pipeline's own.

    Raises:
        TypeError: no text-to-image pipeline, or one with another network.
        ValueError: a scheduler whose prediction is unknown.
    """

    def __init__(self, pipeline: Any, *, num_inference_steps: int | None = None,
                 guidance_scale: float | None = None) -> None:
        self.pipeline = pipeline
        self.options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        parts = [getattr(pipeline, name, None) for name in ("unet", "transformer")]
        self.network: Any = next((part for part in parts if part is not None), None)
        own = unwrapped(self.network)
        kind = next((NETWORKS[base.__name__] for base in type(own).__mro__ if base.__name__ in NETWORKS), None)
        if self.network is None or not hasattr(pipeline, "scheduler") or not hasattr(pipeline, "encode_prompt"):
            raise TypeError("subject: expected a text-to-image pipeline of diffusers with encode_prompt, a network and "
                            f"a scheduler, or an object with eps(z, log_snr, condition), got {type(pipeline).__name__}")
        if kind is None:
            raise TypeError(f"subject: expected a pipeline with one of {', '.join(NETWORKS)}, got "
                            f"{type(own).__name__}: wrap it in an object with eps(z, log_snr, condition)")
        self.kind, self.config = kind, own.config
        self.vae: Any = getattr(pipeline, "vae", None)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1
        scheduler = pipeline.scheduler
        settings = dict(scheduler.config)
        flow = "FlowMatch" in type(scheduler).__name__ or settings.get("use_flow_sigmas")
        self.prediction: str = "flow_prediction" if flow else settings.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"scheduler: expected a prediction_type of {', '.join(PREDICTIONS)}, got "
                             f"{self.prediction!r}")
        self._embeddings: dict[str, dict[str, Tensor]] = {}
        self._table = self._timesteps = torch.zeros(0, dtype=torch.float64)
        if self.prediction != "flow_prediction":
            kept = getattr(scheduler, "alphas_cumprod", None)
            if kept is None:
                raise ValueError(f"scheduler: expected one with alphas_cumprod, or of flow matching, got "
                                 f"{type(scheduler).__name__}: put a DDPMScheduler in its place")
            snr = torch.logit(torch.as_tensor(kept).double().cpu())  # log(abar / (1 - abar))
            self._timesteps = torch.nonzero(torch.isfinite(snr)).flatten().flip(0)
            self._table = snr[self._timesteps].contiguous()  # ascending
        channels = getattr(getattr(self.vae, "config", None), "latent_channels", None)
        if kind == "unet" and channels and self.config.in_channels != channels:
            raise TypeError(f"subject: expected a text-to-image pipeline, whose UNet takes the {channels} channels of "
                            f"its VAE, got one that takes {self.config.in_channels}, as for inpainting")

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Lowest and highest log-SNR of the noise schedule; flows know them all."""
        return (float(self._table[0]), float(self._table[-1])) if len(self._table) else (-math.inf, math.inf)

    def nearest(self, log_snr: Tensor) -> Tensor:
        """The log-SNRs of the timesteps that come nearest, float64; of a flow those asked for."""
        return log_snr if not len(self._table) else self._table[self._index(log_snr)]

    def _index(self, log_snr: Tensor) -> Tensor:
        a = log_snr.double().cpu().contiguous()
        above = torch.searchsorted(self._table, a).clamp(1, len(self._table) - 1)
        lower = (a - self._table[above - 1]) <= (self._table[above] - a)
        return above - lower.long()

    @property
    def device(self) -> torch.device:
        """Where the network runs, also where parts are offloaded in between."""
        return torch.device(getattr(self.pipeline, "_execution_device", None) or self.pipeline.device)

    # -------------------------------------------------------------------------------------------------------- texts
    def _encoded(self, text: str) -> dict[str, Tensor]:
        """What the network is given of a text, by the names of its arguments, each with a batch of one."""
        if text not in self._embeddings:
            encode = self.pipeline.encode_prompt
            options = {"prompt": text, "prompt_2": None, "prompt_3": None, "device": self.device,
                       "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            known = inspect.signature(encode).parameters
            out = encode(**{name: value for name, value in options.items() if name in known})
            if self.kind == "flux":
                found = {"encoder_hidden_states": out[0], "pooled_projections": out[1]}
            elif self.kind == "pixart":
                found = {"encoder_hidden_states": out[0], "encoder_attention_mask": out[1]}
            elif self.kind == "sd3":
                found = {"encoder_hidden_states": out[0], "pooled_projections": out[2]}
            elif getattr(self.config, "addition_embed_type", None) == "text_time":
                found = {"encoder_hidden_states": out[0], "text_embeds": out[2]}
            else:
                found = {"encoder_hidden_states": out[0]}
            if not text and getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
                found = {name: torch.zeros_like(value) for name, value in found.items()}  # as it was trained
            self._embeddings[text] = found
        return self._embeddings[text]

    def padding(self, text: str) -> str:
        """As many padding tokens as ``text`` has, as text, so that what stands behind keeps its place."""
        tokenizer = self.pipeline.tokenizer
        count = len(tokenizer(text, add_special_tokens=False).input_ids)
        return " ".join([tokenizer.pad_token or tokenizer.eos_token] * count)

    # ---------------------------------------------------------------------------------------------------- predictions
    def eps(self, z: Tensor, log_snr: Tensor, condition: Sequence[str]) -> Tensor:
        """The noise in ``z``, float32, see :class:`looseleaf_diffusionpid.Denoiser`."""
        a = log_snr.double().cpu()
        flow = self.prediction == "flow_prediction"
        t = torch.sigmoid(-a / 2)  # x_t = (1 - t) x + t e has the log-SNR 2 log((1 - t) / t)
        length = ((1 - t).square() + t.square()).sqrt()
        signal, noise = (torch.sigmoid(s * a).sqrt().float().to(z.device).view(-1, 1, 1, 1) for s in (1, -1))
        count = self.pipeline.scheduler.config.num_train_timesteps
        times = t.float() * count if flow else self._timesteps[self._index(a)]
        given = z.float() * length.float().to(z.device).view(-1, 1, 1, 1) if flow else z
        encoded = [self._encoded(text) for text in condition]
        kept = {name: torch.cat([e[name] for e in encoded]) for name in encoded[0]}
        out = self._run(given.to(self._dtype), times.to(z.device), kept).float()
        if flow:  # v = e - x
            t = t.float().to(z.device).view(-1, 1, 1, 1)
            return given.float() + (1 - t) * out
        if self.prediction == "v_prediction":
            return signal * out + noise * z.float()
        if self.prediction == "sample":
            return (z.float() - signal * out) / noise
        return out

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def _run(self, z: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        n, channels, height, width = z.shape
        options: dict[str, Any] = dict(text)
        float_options: Any = {"device": z.device, "dtype": z.dtype}
        if self.kind == "flux":
            packed = z.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
            places = torch.zeros(height // 2, width // 2, 3, **float_options)
            places[..., 1] = torch.arange(height // 2, **float_options)[:, None]
            places[..., 2] = torch.arange(width // 2, **float_options)
            options["txt_ids"] = torch.zeros(options["encoder_hidden_states"].shape[1], 3, **float_options)
            options["guidance"] = torch.ones(n, **float_options) if self.config.guidance_embeds else None
            count = self.pipeline.scheduler.config.num_train_timesteps
            out = self.network(hidden_states=packed.reshape(n, -1, channels * 4), timestep=(times / count).to(z.dtype),
                               img_ids=places.view(-1, 3), return_dict=False, **options)[0]
            squares = out.view(n, height // 2, width // 2, channels, 2, 2)
            return squares.permute(0, 3, 1, 4, 2, 5).reshape(z.shape)  # type: ignore[no-any-return]
        if self.kind == "sd3":
            out = self.network(hidden_states=z, timestep=times.to(z.dtype), return_dict=False, **options)[0]
        elif self.kind == "pixart":
            size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
            if getattr(self.config, "sample_size", 0) == 128 and getattr(self.config, "use_additional_conditions", 1):
                pixels = torch.tensor([height * self.factor, width * self.factor], **float_options)
                size = {"resolution": pixels.repeat(n, 1),
                        "aspect_ratio": torch.tensor([[height / width]] * n, **float_options)}
            out = self.network(z, timestep=times, added_cond_kwargs=size, return_dict=False, **options)[0]
        else:
            if "text_embeds" in options:
                sides = [height * self.factor, width * self.factor]
                options["added_cond_kwargs"] = {"text_embeds": options.pop("text_embeds"), "time_ids": torch.tensor(
                    [[*sides, 0, 0, *sides]] * n, **float_options)}
            out = self.network(z, times, return_dict=False, **options)[0]
        return out[:, :channels]  # type: ignore[no-any-return]  # variances may stand behind

    # ------------------------------------------------------------------------------------------------------- pictures
    @torch.no_grad()
    def latent(self, picture: Tensor) -> Tensor:
        """The latent (C, h, w) of a picture (3, H, W) in [0, 1]: the VAE's mean, scaled; float32.

        Raises:
            ValueError: sides that the VAE and network do not divide.
        """
        x = picture.to(self.device)[None] * 2 - 1
        factor = 2 ** (len(getattr(self.config, "block_out_channels", (0,))) - 1) if self.kind == "unet" else int(
            getattr(self.config, "patch_size", 1) if self.kind != "flux" else 2)
        factor *= self.factor
        if picture.shape[1] % factor or picture.shape[2] % factor:
            raise ValueError(f"picture: expected a height and width divisible by {factor}, got {picture.shape[1]} x "
                             f"{picture.shape[2]}: resize or crop it")
        if self.vae is None:
            return x[0].float()
        encoded = self.vae.encode(x.to(next(self.vae.parameters()).dtype))
        latent = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()
        config = self.vae.config
        return ((latent - (getattr(config, "shift_factor", None) or 0)) *  # type: ignore[no-any-return]
                getattr(config, "scaling_factor", 1.0))[0]

    def generate(self, prompt: str, seed: int = 0) -> Tensor:
        """A picture (3, H, W) in [0, 1] that the pipeline draws; its scheduler and progress bar are left as found."""
        scheduler = self.pipeline.scheduler
        bar = getattr(self.pipeline, "_progress_bar_config", None)
        self.pipeline.scheduler = copy.deepcopy(scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            options = {name: value for name, value in self.options.items() if value is not None}
            if "clean_caption" in inspect.signature(self.pipeline.__call__).parameters:
                options["clean_caption"] = False  # the texts that are compared are not cleaned either
            with own_random_state(seed):
                out = self.pipeline(prompt, generator=torch.Generator().manual_seed(seed), output_type="pil", **options)
            return as_picture(out.images[0])
        finally:
            self.pipeline.scheduler = scheduler
            if bar is None:
                del self.pipeline._progress_bar_config
            else:
                self.pipeline._progress_bar_config = bar

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode for network, encoders and VAE; each submodule's own comes back."""
        modules = torch.nn.ModuleList()
        for part in (getattr(self.pipeline, "components", None) or {}).values():
            if isinstance(part, torch.nn.Module):
                modules.append(part)
        with evaluating(modules), torch.no_grad():
            yield


def as_picture(picture: Any) -> Tensor:
    """A picture as float32 (C, H, W) in [0, 1].

    Args:
        picture: of PIL; an array or tensor, uint8 (H, W, 3), or floats (C, H, W), which are taken as they are.

    Raises:
        ValueError: another shape.
    """
    if hasattr(picture, "convert"):
        picture = np.asarray(picture.convert("RGB"))
    values = torch.as_tensor(np.array(picture) if isinstance(picture, np.ndarray) else picture)
    if values.dtype == torch.uint8 and values.ndim == 3 and values.shape[2] == 3:
        return values.permute(2, 0, 1).float() / 255
    if values.is_floating_point() and values.ndim == 3:
        return values
    raise ValueError("picture: expected one of PIL, uint8 (height, width, 3), or floats (channels, height, width), got "
                     f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}")
