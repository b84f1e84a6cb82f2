"""Stage 3 for who has no model: a small encoder, a decoder like mBART's, and the map between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    MBartConfig,
    MBartForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from looseleaf import attach
from looseleaf.modes import evaluating
from looseleaf_mask_and_match.backend import MaskAndMatch
from looseleaf_mask_and_match.latex import LatexVocabulary

STRIDE = 16


def stack(images: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Grey images (H, W) of any sizes, ink 1 on 0, as one batch (B, 1, H, W) and its pixel mask (B, H, W).

    Sizes are padded with paper to multiples of the encoder's stride, 16.

    Raises:
        ValueError: another shape, values outside [0, 1], or an image smaller than 16 x 16.
    """
    tensors = [torch.as_tensor(image, dtype=torch.float32) for image in images]
    for n, image in enumerate(tensors):
        if image.dim() != 2 or min(image.shape) < STRIDE:
            raise ValueError(f"images[{n}]: expected (H, W) of at least {STRIDE} x {STRIDE} pixels, got "
                             f"{tuple(image.shape)}")
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(f"images[{n}]: expected values in [0, 1], ink 1 on 0, got {float(image.min()):.3g} to "
                             f"{float(image.max()):.3g}")
    height, width = (STRIDE * max(-(-image.shape[d] // STRIDE) for image in tensors) for d in (0, 1))
    pad = [(0, width - image.shape[1], 0, height - image.shape[0]) for image in tensors]
    return (torch.stack([F.pad(image, p) for image, p in zip(tensors, pad)])[:, None],
            torch.stack([F.pad(torch.ones_like(image), p) for image, p in zip(tensors, pad)]))


def positions(rows: int, columns: int, size: int, device: Any = None) -> Tensor:
    """Sinusoids of rows in the first half of ``size`` and of columns in the second, (rows * columns, size)."""
    def line(count: int) -> Tensor:
        rates = torch.exp(-math.log(1e4) * torch.arange(0, size // 2, 2, device=device) / (size // 2))
        angles = torch.arange(count, device=device)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    down = line(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([down, line(columns).expand(rows, -1, -1)], -1).flatten(0, 1)


class FormulaEncoderConfig(PreTrainedConfig):
    """Channels of the four halvings of an image."""

    model_type = "looseleaf-formula-encoder"

    def __init__(self, channels: Sequence[int] = (32, 64, 128, 256), **kwargs: Any) -> None:
        self.channels, self.hidden_size = list(channels), channels[-1]
        super().__init__(**kwargs)


class FormulaEncoder(PreTrainedModel):
    """Images (B, 1, H, W) to memory (B, H/16 * W/16, C): features and positions.

    Args:
        config: sizes.
        cnn: another module that gives (B, C, H/s, W/s), such as one of timm's with ``features_only`` taken apart.
    """

    config_class = FormulaEncoderConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"

    def __init__(self, config: FormulaEncoderConfig, cnn: nn.Module | None = None) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        for before, after in zip([1, *config.channels], config.channels):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8 if after % 8 == 0 else 1, after), nn.ReLU()]
        self.cnn = nn.Sequential(*layers) if cnn is None else cnn
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own."""

    def feature_map(self, pixel_values: Tensor) -> Tensor:
        """Features alone, (B, C, rows, columns): what stages 1 and 2 learn on."""
        out: Tensor = self.cnn(pixel_values)
        return out

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """The memory of a decoder."""
        features = self.feature_map(pixel_values)
        where = positions(features.shape[2], features.shape[3], features.shape[1], features.device)
        return BaseModelOutput(last_hidden_state=features.flatten(2).mT + where.to(features))  # type: ignore[arg-type]


AutoConfig.register(FormulaEncoderConfig.model_type, FormulaEncoderConfig, exist_ok=True)
AutoModel.register(FormulaEncoderConfig, FormulaEncoder, exist_ok=True)


class FormulaRecognizer(nn.Module):
    """Images of formulas to LaTeX: an encoder, a decoder, and the map as a prior between them [choice: sizes].

    Args:
        vocabulary: tokens.
        prior: a calibrated :class:`MaskAndMatch`; None: a plain decoder. It stays attached.
        encoder: the :class:`FormulaEncoder` that ``prior`` was calibrated on, or a pre-trained one; None: a new one.
        size, layers, heads, inner, dropout: of the decoder.
        length: most tokens of a formula.
        channels: of a new encoder.
    """

    def __init__(self, vocabulary: LatexVocabulary, prior: MaskAndMatch | None = None,
                 encoder: FormulaEncoder | None = None, *, size: int = 256, layers: int = 3, heads: int = 8,
                 inner: int = 1024, dropout: float = 0.3, length: int = 128,
                 channels: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        encoder = FormulaEncoder(FormulaEncoderConfig(channels)) if encoder is None else encoder
        sizes: dict[str, Any] = dict(
            vocab_size=len(vocabulary), d_model=size, decoder_layers=layers, decoder_attention_heads=heads,
            decoder_ffn_dim=inner, dropout=dropout, max_position_embeddings=length + 2, is_decoder=True,
            add_cross_attention=True, scale_embedding=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            forced_eos_token_id=None, is_encoder_decoder=False)
        decoder = MBartForCausalLM(MBartConfig(**sizes))
        self.vocabulary, self.prior, self.length = vocabulary, prior, length
        self.model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
        for config in (self.model.config, self.model.generation_config):
            config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
        self.network = prior.network if prior is not None else None
        self.attached = attach(self.model, prior) if prior is not None else None

    def guide(self, images: Tensor, pixel_mask: Tensor | None = None) -> None:
        """Make the map of these images the prior of what comes next."""
        if self.attached is not None and self.prior is not None:
            self.attached.reset()
            self.attached.context["map"] = self.prior.maps(self.model.encoder, images, pixel_mask)

    def forward(self, images: Tensor, labels: Sequence[str] | Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """The cross-entropy of labels.

        Args:
            images: (B, 1, H, W).
            labels: LaTeX, or token numbers (B, L) with -100 behind the end.
            pixel_mask: (B, H, W), 0 where an image is padded.
        """
        self.guide(images, pixel_mask)
        numbers = labels if isinstance(labels, Tensor) else self.numbers(labels)
        loss: Tensor = self.model(pixel_values=images, labels=numbers.to(images.device)).loss
        return loss

    def numbers(self, labels: Sequence[str]) -> Tensor:
        """Token numbers of formulas, (B, L), -100 behind their ends."""
        rows = [torch.tensor(self.vocabulary.encode(latex)) for latex in labels]
        if (longest := max(map(len, rows))) > self.length:
            raise ValueError(f"labels: expected at most {self.length} tokens, got {longest}: make the recognizer with "
                             f"length={longest}")
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    @torch.no_grad()
    def recognize(self, images: Tensor, pixel_mask: Tensor | None = None, *, beams: int = 10) -> list[str]:
        """The LaTeX of images (B, 1, H, W), by beam search; normalised as :func:`normalise` does."""
        with evaluating(self):
            self.guide(images, pixel_mask)
            model: Any = self.model
            out = model.generate(pixel_values=images, num_beams=beams, max_length=self.length, do_sample=False)
        return [self.vocabulary.decode(row[1:].tolist()) for row in out]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: encoder and map learn at a tenth of the rate."""
        slow = [*self.model.encoder.parameters(), *(self.network.parameters() if self.network is not None else ())]
        known = {id(p) for p in slow}
        return [{"params": slow, "lr": lr / 10},
                {"params": [p for p in self.parameters() if id(p) not in known], "lr": lr}]


__all__ = ["FormulaEncoder", "FormulaEncoderConfig", "FormulaRecognizer", "positions", "stack"]
