"""A network of timm; with a torchvision whose operators are missing (a torch for CPUs) they are declared first."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

import pytest
import torch

from looseleaf_rmask_tuning import RMaskTuning, choose_weights, classifier_task
from looseleaf_vision import ImageClassifier
from looseleaf_vision.testing import toy_pictures

torch.set_num_threads(1)


def test_a_vision_transformer_and_a_ResNet() -> None:
    if find_spec("torchvision") is not None:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    task = toy_pictures(4)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=4).eval()
    classifier = ImageClassifier(model, size=16, classes=task.classes)
    masks = RMaskTuning(lr=3e-3, epochs=4, batch_size=8).prune(model, classifier_task(classifier, task))
    assert len(masks) == 2 * 2 + 1 and 0 < masks.removed() < masks.total()
    resnet = timm.create_model("resnet10t", num_classes=4)
    assert all(dict(resnet.named_parameters())[name].ndim == 4 for name in choose_weights(resnet))
