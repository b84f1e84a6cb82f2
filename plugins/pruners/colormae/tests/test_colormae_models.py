"""Masks arrive at models of transformers and timm, which learn as before, wrapped or not."""

from __future__ import annotations

import contextlib
import copy
from importlib.util import find_spec

import pytest
import torch

from looseleaf.errors import UnsupportedModelError
from looseleaf_colormae import ColorMAE, attach_masking

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "image_size": 32, "patch_size": 4, "num_channels": 3}
GRID = (8, 8)


def method(**fields):
    return ColorMAE(bank=16, size=16, **fields)


def vit_mae(**fields):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**SIZES, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                                       decoder_num_attention_heads=2, decoder_intermediate_size=32, **fields)
    return transformers.ViTMAEForPreTraining(config)


def pictures(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vit_mae_masks_what_the_method_does(dtype):
    model = vit_mae().to(dtype)
    ids = method().ids(3, GRID)
    out = model(pixel_values=pictures().to(dtype), noise=method().mae_noise(3, GRID))
    assert torch.equal(out.mask, ids.mask.to(out.mask.dtype)) and torch.equal(out.ids_restore, ids.ids_restore)
    # minus the noise gives the same, the noise itself the opposite
    noise = method().noise(3, GRID)
    assert torch.equal(model(pixel_values=pictures().to(dtype), noise=-noise).mask, out.mask)
    assert not torch.equal(model(pixel_values=pictures().to(dtype), noise=noise).mask, out.mask)


def test_attached_in_training_only_and_gone_afterwards():
    model = vit_mae().train()
    with attach_masking(model, method()) as masking:
        expected = method()
        for _ in range(2):
            out = model(pixel_values=pictures())
            assert torch.equal(out.mask == 0, expected.keep_mask(3, GRID))
        assert torch.equal(masking.last.mask, out.mask) and masking.grid == GRID and masking.count == 2
        out.loss.backward()
        own = torch.arange(64.0).expand(3, 64)
        assert torch.equal(model(pictures(), noise=own).mask[0], (own[0] >= 16).float())  # the caller's is left alone
        model.eval()
        torch.manual_seed(1)
        inside = model(pixel_values=pictures()).mask
        assert masking.count == 2
    torch.manual_seed(1)
    assert torch.equal(model(pixel_values=pictures()).mask, inside)
    assert not model._forward_pre_hooks
    with pytest.raises(RuntimeError), attach_masking(model, method(), always=True) as masking:
        model(pixel_values=pictures())
        assert masking.count == 1
        raise RuntimeError
    assert not model._forward_pre_hooks


def test_an_equal_seed_trains_equally():
    losses = []
    for _ in range(2):
        model = vit_mae().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with attach_masking(model, method()):
            for _ in range(5):
                loss = model(pixel_values=pictures(8)).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name, config, extra", [
    ("ViTForMaskedImageModeling", {"encoder_stride": 4}, {}),
    ("Dinov2Model", {}, {}),
    ("SwinForMaskedImageModeling", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
                                    "encoder_stride": 8}, {"block": 4}),
    ("BeitForMaskedImageModeling", {"vocab_size": 20, "use_mask_token": True}, {})])
def test_models_that_take_bool_masked_pos(name, config, extra, monkeypatch):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if not name.startswith("Swin") or k in ("image_size", "patch_size")}
    kind = name.removesuffix("ForMaskedImageModeling").removesuffix("Model")
    cls = getattr(transformers, name)
    arguments = {"use_mask_token": True} if name == "SwinForMaskedImageModeling" else {}
    model = cls(getattr(transformers, f"{kind}Config")(**sizes, **config, **arguments)).train()
    seen = []
    forward = model.forward

    def spy(*args, **kwargs):
        seen.append(kwargs["bool_masked_pos"])
        return forward(*args, **kwargs)

    labels = {"labels": torch.randint(20, (3, 64))} if name.startswith("Beit") else {}
    with attach_masking(model, method(), **extra) as masking:
        monkeypatch.setattr(model, "forward", spy)
        out = model(pixel_values=pictures(), **labels)
    expected = method().bool_masked_pos(3, GRID, **extra)
    assert seen[0].dtype == torch.bool and torch.equal(seen[0], expected)
    assert torch.equal(masking.last.mask.bool(), expected) and (expected.sum(1) == 48).all()
    assert torch.equal(masking.last.ids_keep[0].sort().values, (~expected[0]).nonzero().flatten())
    if name != "Dinov2Model":
        assert out.loss.isfinite()


@pytest.mark.parametrize("video", ["tube", "volume"])
def test_video_mae(video):
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(**SIZES, num_frames=4, tubelet_size=2, decoder_hidden_size=16,
                                         decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                         decoder_intermediate_size=32)
    model = transformers.VideoMAEForPreTraining(config).train()
    with attach_masking(model, method(video=video)) as masking:
        assert model(torch.randn(2, 4, 3, 32, 32)).loss.isfinite()
    assert masking.grid == (2, 8, 8) and (masking.last.mask.sum(1) == 96).all()


def test_wrapped_models():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(vit_mae(), peft.LoraConfig(r=2, target_modules=["q_proj", "query"])).train()
    for wrapped in (model, torch.compile(vit_mae().train(), backend="eager"), torch.nn.DataParallel(vit_mae().train())):
        with attach_masking(wrapped, method()) as masking:
            out = wrapped(pixel_values=pictures())
        assert torch.equal(out.mask == 0, method().keep_mask(3, GRID)) and masking.count == 1


def test_compiled_after_attaching():
    model = vit_mae().train()
    with attach_masking(model, method()):
        compiled = torch.compile(model, backend="eager")
        expected = method()
        for _ in range(2):
            assert torch.equal(compiled(pixel_values=pictures()).mask == 0, expected.keep_mask(3, GRID))


def test_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = vit_mae()
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[],
                                               use_cpu=True, save_strategy="no", disable_tqdm=True)
    rows = [{"pixel_values": p} for p in pictures(8)]
    with attach_masking(model, method()) as masking:
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert masking.count == 2 and masking.method.step == 2


def timm_or_skip():
    if find_spec("torchvision") is not None:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm", reason="timm is not installed")


def test_a_vision_transformer_of_timm():
    timm = timm_or_skip()
    for name, more in (("vit_tiny_patch16_224", {}), ("vit_small_patch14_reg4_dinov2", {}),
                       ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5})):
        model = timm.create_model(name, img_size=32, patch_size=4, depth=1, num_classes=0, **more).train()
        seen = []
        hook = model.norm_pre.register_forward_hook(lambda m, a, o, seen=seen: seen.append(a[0]))
        plain = []
        whole = model.patch_drop.register_forward_hook(lambda m, a, o, plain=plain: plain.append(a[0]))
        with attach_masking(model, method()) as masking:
            model(pictures())
        prefix = model.num_prefix_tokens
        assert seen[0].shape[1] == prefix + 16 and torch.equal(masking.last.mask == 0, method().keep_mask(3, GRID))
        for row in range(3):
            assert torch.equal(seen[0][row, prefix:], plain[0][row, prefix:][masking.last.ids_keep[row]])
        hook.remove()
        whole.remove()
        model.eval()
        assert torch.equal(model(pictures()), model(pictures()))


def test_keep_reads_the_grid_of_the_model():
    batch = {"pixel_values": pictures(2)}
    kept = method().keep(vit_mae(), batch)["pixel_values"]
    assert torch.equal(kept, method().keep_mask(2, GRID))
    assert torch.equal(method().keep(None, {"patches": torch.zeros(2, 8, 8, 1)})["patches"], kept)


def test_bad_input():
    model = vit_mae().train()
    with attach_masking(model, method(ratio=0.5)), pytest.raises(ValueError, match="make it and ColorMAE"):
        model(pixel_values=pictures())
    with pytest.raises(UnsupportedModelError, match="bool_masked_pos"), attach_masking(torch.nn.Linear(2, 2), method()):
        pass
    with pytest.raises(ValueError, match="block"), attach_masking(model, method(), block=2):
        pass
    beit = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**SIZES, vocab_size=20))
    with pytest.raises(ValueError, match="use_mask_token"), attach_masking(beit, method()):
        pass
    with attach_masking(model, copy.copy(method())), pytest.raises(ValueError, match="pixel_values"):
        model(pixel_values=torch.zeros(3, 32))
