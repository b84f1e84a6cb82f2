"""Encoders of many families, wrapped or not, and pictures of any kind; bad input is named."""

from __future__ import annotations

import contextlib
import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf import Budget, Example, Task, UnsupportedModelError
from looseleaf_anypattern import (
    CopyIndex,
    CopyMetric,
    ImageStacker,
    Pattern,
    StackedEncoder,
    apply,
    copy_task,
    encode,
    keyed,
    pattern,
    stack,
    toy_copies,
    toy_encoder,
    train,
)

torch.set_num_threads(1)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
         "patch_size": 4}
CONVOLUTIONS = {"ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
                "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
                "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 16,
                         "patch_size": 2}}


def of_transformers(name, **sizes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    kind = name.removesuffix("Model").removesuffix("ForImageClassification")
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**(sizes or SIZES))).eval()


def checked(base, where, **fields):
    """An encoder that is the base at the start, and whose pattern and descriptor learn."""
    before = {k: v.clone() for k, v in base.state_dict().items()}
    encoder = StackedEncoder(base, n_patterns=2, descriptor=6, **fields).eval()
    assert encoder.pattern_from == where and encoder.preprocess.size == (16, 16)
    x, a, b = (torch.randn(3, 3, 16, 16) for _ in range(3))
    one, other = encoder(stack(x, a, b)), encoder(stack(x))
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
        assert left.dtype == torch.float32
    assert one.descriptor.shape == (3, 6) and one.logits.shape == (3, 2) and one.pattern.shape[1] == encoder.width
    assert (one.features[0] - one.features[1]).abs().max() > 1e-6
    train(encoder, pictures(), ["invert", "flip"], steps=2, batch=8, lr=1e-2, progress=False)
    with torch.no_grad():
        assert (encoder(stack(x, a, b)).descriptor - encoder(stack(x)).descriptor).abs().max() > 1e-6  # it looks now
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items()), "the given model has changed"
    again = copy.deepcopy(encoder)
    with torch.no_grad():
        next(p for n, p in again.named_parameters() if "pattern" in n).add_(1.0)
        assert torch.equal(encoder(stack(x)).pattern, copy.deepcopy(encoder)(stack(x)).pattern)
        assert not torch.equal(encoder(stack(x)).pattern, again(stack(x)).pattern)
    return encoder


def pictures(count=6, size=16):
    return (np.random.default_rng(0).random((count, size, size, 3)) * 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "DeiTModel", "ViTMSNModel", "Dinov2Model",
                                  "Dinov2WithRegistersModel", "CLIPVisionModel"])
def test_vision_transformers_of_transformers_take_a_pattern_token(name):
    base = of_transformers(name)
    encoder = checked(base, "token")
    assert encoder.width == 16
    seen = []
    layers = [m for n, m in encoder.base.named_modules() if n.endswith((".0", "layer.0", "layers.0"))
              and "ayer" in type(m).__name__]
    layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    encode(encoder, pictures(2))
    assert seen[0] >= 18, "16 patches, CLS and the pattern token"


def test_the_token_hardly_changes_a_vision_transformer_at_the_start():
    base = of_transformers("ViTModel")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        own = base(pixel_values=x).last_hidden_state[:, 0]
        with_token = StackedEncoder(base).eval()(stack(x)).features
        without = StackedEncoder(base, pattern="pooled").eval()
        torch.testing.assert_close(without(stack(x)).features, base(pixel_values=x).pooler_output, atol=1e-6, rtol=0)
    assert 0 < (own - with_token).abs().max() < 0.3


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_other_models_of_transformers_give_pooled_features(name):
    checked(of_transformers(f"{name}Model", **CONVOLUTIONS[name]), "pooled", size=16)


def test_plain_modules_and_maps_of_features():
    torch.manual_seed(0)
    checked(nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), nn.ReLU()), "pooled", size=16)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

        def features(self, x):
            return self.stem(x).mean((2, 3))

        def forward(self, x):
            return self.head(self.features(x))

    assert checked(Net(), "pooled", size=16).width == 8


def test_wrapped_models_and_half_precision():
    base = of_transformers("ViTModel")
    plain = StackedEncoder(base).eval()
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.get_peft_model(of_transformers("ViTModel"), peft.LoraConfig(r=2, target_modules=["q_proj", "query"]))
    for wrapped in (torch.compile(base, backend="eager"), nn.DataParallel(base), lora):
        encoder = StackedEncoder(wrapped).eval()
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(encoder(stack(x)).descriptor, plain(stack(x)).descriptor, atol=1e-5, rtol=0)
    half = StackedEncoder(of_transformers("ViTModel").to(torch.bfloat16)).eval()
    assert encode(half, pictures(2)).descriptor.dtype == torch.float32
    compiled = torch.compile(plain, backend="eager")
    torch.testing.assert_close(encode(compiled, pictures(3)).descriptor, encode(plain, pictures(3)).descriptor)
    prompt = ImageStacker().optimize(toy_copies(), compiled, progress=False)
    assert prompt.on(compiled).describe(pictures(2)).shape == (2, 512)


def timm_or_skip():
    if find_spec("torchvision") is not None:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize("name, where, more", [
    ("vit_tiny_patch16_224", "token", {"img_size": 16, "patch_size": 4, "depth": 1}),
    ("vit_small_patch14_reg4_dinov2", "token", {"img_size": 16, "patch_size": 4, "depth": 1}),
    ("deit_tiny_distilled_patch16_224", "token", {"img_size": 16, "patch_size": 4, "depth": 1}),
    ("resnet10t", "pooled", {}), ("mobilenetv3_small_050", "pooled", {})])
def test_models_of_timm(name, where, more):
    timm = timm_or_skip()
    torch.manual_seed(0)
    checked(timm.create_model(name, num_classes=0, **more), where, size=16)


def test_pictures_of_any_mode_and_size_are_read_alike():
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    encoder = toy_encoder()
    plain = image.fromarray(pictures(1, 20)[0])
    odd = [plain, plain.convert("RGBA"), plain.resize((31, 17)), plain.convert("L"), plain.convert("P"),
           plain.convert("CMYK"), plain.convert("LA"), np.asarray(plain), np.asarray(plain.convert("L"))]
    found = encode(encoder, odd).descriptor
    assert found.shape == (9, 8) and found.isfinite().all()
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[7])
    torch.testing.assert_close(found[3], found[8])
    assert apply(["rotate"], plain.convert("CMYK"), 1).shape == (20, 20, 3)


def test_what_is_asked_is_charged():
    encoder, budget = toy_encoder(), Budget()
    prompt = ImageStacker().optimize(toy_copies(), encoder, budget=budget, progress=False)
    dev = len(toy_copies().dev)
    assert budget.used["calls"] == 6 + dev + 3  # pairs, dev, and the patterns of its three queries
    few = ImageStacker().optimize(toy_copies(), encoder, budget=Budget(calls=2), progress=False)
    assert len(few.keys) == 2 and few.info["stopped"] == "budget: calls" and len(prompt.keys) == 6
    nothing = ImageStacker().optimize(toy_copies(), encoder, budget=Budget(seconds=1e-9), progress=False)
    torch.testing.assert_close(nothing.on(encoder).describe(pictures(2)), encode(encoder, pictures(2)).descriptor)


def test_bad_input():
    one, other = pictures(2)
    encoder = toy_encoder()
    with pytest.raises(ValueError, match="expected support pairs"):
        copy_task([])
    with pytest.raises(ValueError, match="expected support pairs"):
        ImageStacker().optimize(Task("t", [Example({"image": one}, 1)], metric=CopyMetric()), encoder, progress=False)
    for support, missing in ([(None, one, "snow")], "replica"), ([(one, None, "snow")], "original"), (
            [(one, other, None)], "pattern"):
        with pytest.raises(ValueError, match=f"got no {missing}"):
            copy_task(support)
    with pytest.raises(ValueError, match="got 'r9'"):
        copy_task([(one, other, "snow")], [(one, "r9")], {"r1": one})
    with pytest.raises(ValueError, match="neither a reference nor"):
        copy_task([(one, other, "snow")], [(one, "r1")], {"r1": other})
    with pytest.raises(ValueError, match="two identities or more, got 1 different"):
        train(encoder, [one, one], ["invert"], steps=1)
    with pytest.raises(ValueError, match="two identities or more, got 0"):
        train(encoder, [], ["invert"], steps=1)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        train(encoder, [one, other], [])
    with pytest.raises(ValueError, match="rotate"):
        train(encoder, [one, other], ["rotat"])
    with pytest.raises(ValueError, match="that made its keys"):
        ImageStacker().optimize(toy_copies(), encoder, progress=False).on(StackedEncoder(nn.Conv2d(3, 4, 4), size=16))
    with pytest.raises(ValueError, match="three pictures in the channels"):
        encoder(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="one key for each"):
        CopyIndex(torch.zeros(2, 3), ["a"])
    with pytest.raises(ValueError, match="'invert', which is registered"):
        pattern("colour", "invert")(lambda p, rng: p)
    with pytest.raises(ValueError, match="finite numbers of the shape"):
        apply([Pattern("cut", "own", lambda p, rng: p[:3])], one)
    with pytest.raises(ValueError, match="blocks"):
        keyed("block", 0)
    with pytest.raises(UnsupportedModelError, match="size=224"):
        StackedEncoder(nn.Conv2d(3, 4, 4))
    with pytest.raises(UnsupportedModelError, match="three channels"):
        StackedEncoder(nn.Conv2d(1, 4, 4), size=16)
    with pytest.raises(UnsupportedModelError, match="pattern='pooled'"):
        StackedEncoder(nn.Conv2d(3, 4, 4), size=16, pattern="token")
    with pytest.raises(UnsupportedModelError, match="StackedEncoder"):
        ImageStacker().optimize(toy_copies(), nn.Linear(2, 2))
