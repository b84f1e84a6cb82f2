"""On vision transformers of timm and torchvision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from looseleaf import attach
from looseleaf_sparsifiner import Outputs, Sparsifiner

torch.set_num_threads(1)


def test_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2,
                              num_classes=3).eval()
    works(model, "blocks.*.attn")


def test_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(64, 8, 2, 2, 32, 48, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    works(model, "encoder.layers.*.self_attention")


@pytest.fixture(scope="module", autouse=True)
def declared() -> Iterator[None]:
    """Operators that the wheel of torchvision lacks beside a torch for CPUs."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    if find_spec("torchvision") is not None:
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield


def works(model: nn.Module, layers: str) -> None:
    x: Tensor = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backend = Sparsifiner()
    backend.calibrate(model, x, layers=layers, epochs=2)
    assert len(backend.modules) == 2 and backend.losses[1] < backend.losses[0]
    with torch.no_grad():
        plain = model(x)
        with attach(model, backend, layers) as attached:
            out = model(x)
        assert len(attached.records) == 2 and all("fallback" not in r for r in attached.records)
        assert not torch.equal(out, plain) and torch.equal(model(x), plain)
        assert backend.masks(model, x, layers)[0].shape == (2, 2, 65, 65)
    teacher = copy.deepcopy(model)  # masks change a model of random weights by next to nothing: something to learn
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    losses = backend.finetune(model, [x], teacher, layers=layers, epochs=3, lr=(1e-4, 1e-4),
                              outputs=lambda m, batch: Outputs(logits=m(batch)))
    assert losses[-1] < losses[0]
