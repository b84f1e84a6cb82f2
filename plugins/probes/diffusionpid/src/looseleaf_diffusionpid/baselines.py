"""What maps of words are compared with: cross-attention, after DAAM (Tang et al., arXiv 2210.04885)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from looseleaf import AttentionBackend, AttentionCall, attach
from looseleaf_diffusionpid.denoisers import PipelineDenoiser
from looseleaf_diffusionpid.probe import places


@dataclasses.dataclass
class _CrossAttention(AttentionBackend):
    """Exact attention that adds up the probabilities of cross-attention."""

    phases: ClassVar[frozenset] = frozenset({"bidirectional"})  # type: ignore[type-arg]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums: dict[int, Tensor] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """The output as it is; sums are over batch, heads and layers of as many queries."""
        if call.is_cross:
            scores = call.query.float() @ call.key.float().transpose(2, 3) * call.scale
            total = scores.softmax(3).mean(1).sum(0)
            self.sums[len(total)] = self.sums.get(len(total), 0) + total
        return call.dense()


@torch.no_grad()
def attention_maps(denoiser: PipelineDenoiser, x: Tensor, prompt: str, words: Sequence[str], *, log_snr: Tensor,
                   noise: Tensor, batch: int = 32) -> Tensor:
    """How much each place attends to each word, (words, h, w): mean over heads, layers and noisy pictures.

    Args:
        denoiser: a pipeline whose UNet has cross-attention, and one text encoder.
        x: (C, h, w) latent.
        prompt: the text.
        words: of the prompt; several tokens of a word are averaged.
        log_snr, noise: of the noisy pictures, see :func:`looseleaf_diffusionpid.observe`.
        batch: rows at a time.

    Raises:
        ValueError: a word that is not in the prompt, or a network without cross-attention.
    """
    tokenizer = denoiser.pipeline.tokenizer
    first = int(tokenizer(prompt).input_ids[0] == tokenizer.bos_token_id)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    tokens = [[first + n for a, b in places(prompt, word) for n in range(count(prompt[:a]), count(prompt[:b]))]
              for word in words]
    level, backend = denoiser.nearest(log_snr), _CrossAttention()
    with denoiser.ready(), attach(denoiser.network, backend):
        for begin in range(0, len(level), batch):
            a = level[begin:begin + batch].to(x.device).view(-1, 1, 1, 1)
            z = (torch.sigmoid(a).sqrt() * x + torch.sigmoid(-a).sqrt() * noise[begin:begin + batch].to(x.device))
            denoiser.eps(z.to(x.dtype), a.flatten(), [prompt] * len(a))
    if not backend.sums:
        raise ValueError(f"denoiser: expected a network with cross-attention, got {type(denoiser.network).__name__}")
    height, width = x.shape[1:]
    total = torch.zeros(len(words), height, width)
    for count_, sums in backend.sums.items():
        factor = round((height * width / count_) ** 0.5)
        small = torch.stack([sums[:, at].mean(1) for at in tokens]).cpu()
        total += functional.interpolate(small.view(1, -1, height // factor, width // factor), (height, width),
                                        mode="bilinear", align_corners=False)[0]
    return total / len(level)
