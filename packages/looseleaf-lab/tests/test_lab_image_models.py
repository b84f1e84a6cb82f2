"""Models of pictures: what their weights are called, how pictures go in, and what comes out of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from looseleaf_lab import data, image_models, models


def published(model: image_models.EfficientNetLite) -> dict[str, torch.Tensor]:
    """A model's weights under the names of the published checkpoint."""
    layers = {"stem.0": "_conv_stem", "stem.1": "_bn0", "head.0": "_conv_head", "head.1": "_bn1", "classifier": "_fc",
              "expand.0": "_expand_conv", "depthwise.0": "_depthwise_conv", "project.0": "_project_conv",
              "expand.1": "_bn0", "depthwise.1": "_bn1", "project.1": "_bn2"}
    named = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        at = 2 if parts[0] == "blocks" else 0
        own = ".".join(parts[at:-1])
        named[".".join([*(["_blocks", parts[1]] if at else []), layers[own], parts[-1]])] = tensor
    return named


def test_efficientnet_weights_keep_every_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = image_models.EfficientNetLite(10)
    assert sum(p.numel() for p in image_models.EfficientNetLite().parameters()) == 4652008
    again = image_models.EfficientNetLite(10)
    again.load_state_dict(image_models.efficientnet_weights(published(model)))
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(pixels), again.eval()(pixels)) and model(pixels).shape == (2, 10)
    torch.save({"_fc.weight": torch.zeros(1000, 1280)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="expected the weights of efficientnet-lite0, got none for"):
        image_models.convert("efficientnet-lite0", tmp_path / "part.pth", tmp_path)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (7, 5, 1)])
def test_same_padding(size: int, kernel: int, stride: int) -> None:
    """As TensorFlow documents it: ceil(size / stride) rows, the odd row of padding at the end."""
    conv = image_models.SameConv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size + 1)
    out = conv(x)
    assert out.shape[-2:] == (-(-size // stride), -(-(size + 1) // stride))
    total = max((out.shape[-2] - 1) * stride + kernel - size, 0)
    wide = max((out.shape[-1] - 1) * stride + kernel - size - 1, 0)
    padded = F.pad(x, (wide // 2, wide - wide // 2, total // 2, total - total // 2))
    torch.testing.assert_close(out, F.conv2d(padded, conv.weight, stride=stride))


def test_preprocessing() -> None:
    preprocess = image_models.Preprocessor(8, (0.5,) * 3, (0.5,) * 3)
    white = np.full((1, 16, 16, 3), 255, np.uint8)
    assert torch.equal(preprocess(white), torch.ones(1, 3, 8, 8))
    transparent = np.zeros((1, 8, 8, 4), np.uint8)
    assert torch.equal(preprocess(transparent), torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected pictures as uint8"):
        preprocess(white.astype(np.float32))


def test_the_saliency_model_takes_other_sizes() -> None:
    pytest.importorskip("transformers")
    model = image_models.SaliencyViT().eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 28, 42))
    assert out.shape == (1, 1, 28, 42) and model.config.model_type == "dinov2"


@pytest.mark.sweep
def test_efficientnet_knows_what_emoji_show() -> None:
    """1-nearest neighbours on stamps it never saw: far above chance, and above the pixels."""
    if not models.available("efficientnet-lite0"):
        pytest.skip("the model could not be fetched")
    model, preprocess = models.load("efficientnet-lite0")
    stamps = data.pictures("stamps")
    labels = np.array(stamps.column("label"))
    with torch.no_grad():
        features = torch.cat([model.features(preprocess(stamps.images[i:i + 50])) for i in range(0, len(stamps), 50)])
    def accuracy(x: torch.Tensor) -> float:
        cosines = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
        cosines.fill_diagonal_(-1)
        return float((labels[cosines.argmax(1).numpy()] == labels).mean())

    pixels = preprocess(np.asarray(stamps.images)).flatten(1)[:, ::97]
    assert accuracy(features) > accuracy(pixels - pixels.mean(0)) + 0.1


@pytest.mark.sweep
@pytest.mark.data("stamps", "photos")
def test_saliency_finds_what_was_pasted() -> None:
    pytest.importorskip("onnx")
    if not models.available("vit-saliency"):
        pytest.skip("the model could not be fetched")
    from sklearn.metrics import roc_auc_score

    model, preprocess = models.load("vit-saliency")
    stamps, photos = data.pictures("stamps"), data.pictures("photos")
    textures = [i for i, name in enumerate(photos.column("name")) if name in ("grass", "gravel", "brick")]
    scores = []
    for number in range(12):
        stamp = stamps.images[number * 60].astype(float)
        inside = stamp[..., 3:] / 255
        image = photos.images[textures[number % 3]][:224, :224] * (1 - inside) + stamp[..., :3] * inside
        with torch.no_grad():
            found = model(preprocess(image.astype(np.uint8)[None]))[0, 0]
        if 0.02 < inside.mean() < 0.9:
            scores.append(roc_auc_score((inside[..., 0] > 0.5).ravel(), found.numpy().ravel()))
    assert len(scores) >= 8 and np.mean(scores) > 0.9, scores
