"""The networks of the paper, and what is done to observations on the way into an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf.modes import training


def mlp(inputs: int, outputs: int, hidden: Sequence[int] = (256, 256), dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with GELU between them; none hidden: a linear map."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.GELU(), *([nn.Dropout(dropout)] if dropout else [])]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def spatial_softmax(maps: Tensor) -> Tensor:
    """Expected coordinates of each map (B, C, H, W), in [-1, 1]: x of all maps, then y of all, (B, 2 C)."""
    height, width = maps.shape[-2:]
    weights = maps.flatten(2).softmax(-1).unflatten(-1, (height, width))
    x = torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)
    y = torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
    return torch.cat([(weights.sum(-2) * x).sum(-1), (weights.sum(-1) * y).sum(-1)], -1)


class PictureEncoder(nn.Module):
    """Pictures (B, C, H, W) -> (B, k): 3 x 3 convolutions without padding, 1 x 1 to ``maps``, spatial softmax, linear,
    layer norm, tanh, as in the authors' code; smaller ``widths`` and ``strides`` are for a processor."""

    def __init__(self, channels: int, k: int = 64, widths: Sequence[int] = (32, 64, 128, 256),
                 strides: Sequence[int] = (2, 2, 1, 1), maps: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride), nn.GELU()]
            channels = width
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(channels, maps, 1))
        self.head = nn.Sequential(nn.Linear(2 * maps, k), nn.LayerNorm(k), nn.Tanh())

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, k)."""
        return self.head(spatial_softmax(self.convolutions(pictures - 0.5)))


class VectorEncoder(nn.Module):
    """Vectors (B, D) -> (B, k): an MLP, layer norm and tanh. This project's, for states."""

    def __init__(self, inputs: int, k: int = 64, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        self.layers = nn.Sequential(mlp(inputs, k, hidden), nn.LayerNorm(k), nn.Tanh())

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) -> (B, k)."""
        return self.layers(vectors)


def default_encoder(observation_shape: Sequence[int], k: int = 64) -> nn.Module:
    """The encoder of the paper for pictures (C, H, W), an MLP for vectors (D,).

    Raises:
        ValueError: another shape.
    """
    if len(observation_shape) == 3:
        return PictureEncoder(observation_shape[0], k)
    if len(observation_shape) == 1:
        return VectorEncoder(observation_shape[0], k)
    raise ValueError(f"observations: expected vectors (D,) or pictures (C, H, W), got {tuple(observation_shape)}: "
                     f"give an encoder of your own")


class PictureDecoder(nn.Module):
    """(B, inputs) -> pictures (B, C, H, W), which are around 0; H and W of at least 8. This project's."""

    def __init__(self, inputs: int, shape: Sequence[int], width: int = 32) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.low = (width, -(-self.height // 4), -(-self.width // 4))
        self.first = mlp(inputs, self.low[0] * self.low[1] * self.low[2], (256,))
        self.rest = nn.Sequential(nn.GELU(), nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.GELU(),
                                  nn.ConvTranspose2d(width // 2, channels, 4, 2, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, inputs) -> (B, C, H, W)."""
        out: Tensor = self.rest(self.first(features).unflatten(1, self.low))
        return out[..., :self.height, :self.width]


def represent(encoder: nn.Module, observations: Tensor) -> Tensor:
    """What an encoder makes of observations, (B, k).

    An encoder gives (B, k), maps (B, C, H, W) or tokens (B, L, k), which are averaged, or an output of transformers, of
    which ``pooler_output`` is taken where there is one, else ``last_hidden_state``.

    Raises:
        TypeError: it gives something else.
    """
    out: Any = encoder(observations)
    if not isinstance(out, Tensor):
        pooled = getattr(out, "pooler_output", None)
        out = pooled if pooled is not None else getattr(out, "last_hidden_state", None)
    if isinstance(out, Tensor) and out.dim() == 4:
        out = out.flatten(2).mean(-1)
    if isinstance(out, Tensor) and out.dim() == 3:
        out = out.mean(1)
    if not isinstance(out, Tensor) or out.dim() != 2 or not out.is_floating_point():
        got = tuple(out.shape) if isinstance(out, Tensor) else "no tensor"
        raise TypeError(f"encoder: expected a float tensor (batch, k) of {tuple(observations.shape)} observations, "
                        f"got {got}: wrap it in a module that gives one vector for each")
    return out


def random_crop(pictures: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to ``padding`` pixels, its edge repeated; vectors are left as they are."""
    if pictures.dim() != 4 or not padding:
        return pictures
    batch, _, height, width = pictures.shape
    padded = functional.pad(pictures, (padding,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator).to(pictures.device)
    rows = (top + torch.arange(height, device=pictures.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=pictures.device))[:, None, None, :]
    channels = torch.arange(pictures.shape[1], device=pictures.device)[None, :, None, None]
    return padded[torch.arange(batch, device=pictures.device)[:, None, None, None], channels, rows, columns]


@contextmanager
def learning(module: nn.Module) -> Iterator[None]:
    """Training mode for the block, but for parts of which every parameter is frozen: their statistics must not
    drift."""
    with training(module):
        for part in module.modules():
            own = list(part.parameters())
            if own and not any(p.requires_grad for p in own):
                part.eval()
        yield


__all__ = ["PictureDecoder", "PictureEncoder", "VectorEncoder", "default_encoder", "learning", "mlp", "random_crop",
           "represent", "spatial_softmax"]
