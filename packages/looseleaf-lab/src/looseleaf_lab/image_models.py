"""Real models of pictures whose weights ship in packages: EfficientNet-Lite0, and a DINOv2 trained for saliency.

Loaded by :func:`looseleaf_lab.models.load` as ``efficientnet-lite0`` and ``vit-saliency``. Their weights are converted
once to safetensors; pickles and ONNX graphs are read for that only, and never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf_lab.cache import MissingModelError


@dataclass(frozen=True)
class Preprocessor:
    """Pictures to the input of a model.

    Attributes:
        size: height and width of the input.
        mean, std: subtracted from, and divided through, values between 0 and 1.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 (B, height, width, 3 or 4) to fp32 (B, 3, size, size); transparent parts become white.

        Raises:
            ValueError: no batch of pictures in uint8.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (3, 4):
            raise ValueError("expected pictures as uint8 (batch, height, width, 3 or 4), got "
                             f"{images.dtype} {images.shape}")
        x = torch.from_numpy(images.copy()).float().permute(0, 3, 1, 2) / 255
        if x.shape[1] == 4:
            x = x[:, :3] * x[:, 3:] + (1 - x[:, 3:])
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


# ------------------------------------------------------------------------------------------------------- EfficientNet
BLOCKS = ((1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
          (6, 320, 1, 3, 1))
"""Of EfficientNet-Lite0: expansion, channels, repeats, kernel, stride of each stage."""


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the output has ceil(size / stride) rows, the odd one at the end."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1]):
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return self._conv_forward(F.pad(input, pads), self.weight, self.bias)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, if wanted, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1,
                 relu: bool = True) -> None:
        super().__init__(SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01), nn.ReLU6() if relu else nn.Identity())


class Bottleneck(nn.Module):
    """Inverted residual block without squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, outputs, 1, relu=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0, a classifier of 1,000 ImageNet classes: 4.65 million weights.

    Source: Tan and Le, 2019, arXiv 1905.11946, in the variant without squeeze and excitation and with ReLU6.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem, blocks, inputs = ConvNorm(3, 32, 3, 2), list[nn.Module](), 32
        for expansion, outputs, repeats, kernel, stride in BLOCKS:
            for number in range(repeats):
                blocks.append(Bottleneck(inputs, outputs, expansion, kernel, stride if number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, 1280, 1)
        self.classifier = nn.Linear(1280, classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, 224, 224) to pooled features (B, 1280)."""
        return self.head(self.blocks(self.stem(pixels))).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, 224, 224) to logits (B, classes)."""
        return self.classifier(self.features(pixels))


def efficientnet_weights(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the published checkpoint under the names of :class:`EfficientNetLite`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in given.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            layers = {"_expand_conv": "expand.0", "_depthwise_conv": "depthwise.0", "_project_conv": "project.0",
                      "_bn0": "expand.1", "_bn1": "depthwise.1", "_bn2": "project.1"}
            renamed[".".join(["blocks", parts[1], layers[parts[2]], *parts[3:]])] = tensor
        else:
            layer = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1",
                     "_fc": "classifier"}[parts[0]]
            renamed[".".join([layer, *parts[1:]])] = tensor
    return renamed


# ------------------------------------------------------------------------------------------------- ViT for saliency
class SaliencyDecoder(nn.Module):
    """Patch features to a map of saliency, by three transposed convolutions."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(((width, 256), (256, 128), (128, 64)), start=1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(inputs, outputs, 4, 2, 1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) to probabilities (B, 1, *size)."""
        x = patches
        for number in (1, 2, 3):
            x = F.relu(self.get_submodule(f"bn{number}")(self.get_submodule(f"upconv{number}")(x)))
        return torch.sigmoid(F.interpolate(self.final_conv(x), size, mode="bilinear", align_corners=False))


class SaliencyViT(nn.Module):
    """DINOv2 ViT-S/14 (transformers' ``Dinov2Model``) fine-tuned for saliency, with its decoder.

    Mind: the saliency training changed the backbone. Its last class token is a weak feature of what is to be seen
    (use ``efficientnet-lite0`` for that); what it is good for is saliency itself and trained attention maps.
    """

    def __init__(self) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        self.backbone = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
                                                 mlp_ratio=4, image_size=518, patch_size=14, layerscale_value=1.0))
        self.decoder = SaliencyDecoder()

    @property
    def config(self) -> Any:
        """Of the backbone."""
        return self.backbone.config

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), H and W multiples of 14, to probabilities of saliency (B, 1, H, W)."""
        tokens = self.backbone(pixels).last_hidden_state[:, 1:]
        rows, columns = pixels.shape[-2] // 14, pixels.shape[-1] // 14
        patches = tokens.transpose(1, 2).reshape(len(pixels), -1, rows, columns)
        return self.decoder(patches, pixels.shape[-2:])


def saliency_weights(path: Path) -> dict[str, Tensor]:
    """The weights in an ONNX graph of the saliency model under the names of :class:`SaliencyViT`.

    The matrices of linear layers have no names of their own in the graph: each is found by the bias added to its
    product.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise MissingModelError("reading the weights of vit-saliency needs onnx, once: pip install "
                                "'looseleaf-lab[saliency]'") from error

    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {name: t for name, t in tensors.items() if name.startswith(("backbone.", "decoder."))}
    biases: dict[str, str] = {}  # output of a product -> name of the bias added to it
    for node in graph.node:
        bias = [i for i in node.input if i in tensors and i.startswith("backbone.") and i.endswith(".bias")]
        if node.op_type == "Add" and bias:
            biases[next(i for i in node.input if i != bias[0])] = bias[0]
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] in biases:
            matrix = tensors[next(i for i in node.input if i in tensors)]
            weights[biases[node.output[0]].replace(".bias", ".weight")] = matrix.T.contiguous()
    shaped = {tuple(t.shape): t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3}
    weights["backbone.embeddings.position_embeddings"] = torch.cat([shaped[1, 1, 384], shaped[1, 1369, 384]], 1)
    for old, new in (("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
                     ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj")):
        weights = {name.replace(old, new): t for name, t in weights.items()}
    return weights


# ---------------------------------------------------------------------------------------------------- convert and load
@dataclass(frozen=True)
class _ImageModel:
    make: Callable[[], nn.Module]
    weights: Callable[[Path], dict[str, Tensor]]
    preprocessor: Preprocessor
    optional: tuple[str, ...] = ()


IMAGE_MODELS = {
    "efficientnet-lite0": _ImageModel(
        EfficientNetLite, lambda path: efficientnet_weights(torch.load(path, map_location="cpu", weights_only=True)),
        Preprocessor(224, (127 / 255,) * 3, (128 / 255,) * 3)),
    "vit-saliency": _ImageModel(
        SaliencyViT, saliency_weights, Preprocessor(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("backbone.embeddings.mask_token",)),
}


def convert(name: str, source: Path, folder: Path) -> None:
    """Write the weights of a model as ``model.safetensors`` in ``folder``.

    Raises:
        ValueError: the file does not hold the weights of this model.
    """
    from safetensors.torch import save_file

    found = IMAGE_MODELS[name]
    weights = found.weights(source)
    missing, unexpected = found.make().load_state_dict(weights, strict=False)
    lost = [m for m in missing if m not in found.optional and not m.endswith("num_batches_tracked")]
    if lost or unexpected:
        raise ValueError(f"{source.name}: expected the weights of {name}, got none for {lost[:3]} and unknown "
                         f"{unexpected[:3]}")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"looseleaf_image_model": name}))


def load(name: str, folder: str, dtype: torch.dtype) -> tuple[nn.Module, Preprocessor]:
    """A model in evaluation mode and what makes its input."""
    from safetensors.torch import load_file

    found = IMAGE_MODELS[name]
    model = found.make()
    model.load_state_dict(load_file(str(Path(folder) / "model.safetensors")), strict=False)
    return model.to(dtype).eval(), found.preprocessor
