"""On models of transformers and one's own: both stages of training, files, pictures, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import attach
from looseleaf_sparsifiner import (
    LowRank,
    Nearest,
    Outputs,
    RandomKeys,
    Sparsifiner,
    TrueTop,
    distill,
    distillation_loss,
    draw_keys,
    show,
)

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                         "image_size": 32, "patch_size": 4, "num_channels": 3}
DINO = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
FAMILIES = {"ViT": (1, SIZES), "DeiT": (2, SIZES), "Dinov2": (1, DINO), "Dinov2WithRegisters": (5, DINO),
            "CLIPVision": (1, SIZES), "SiglipVision": (0, SIZES)}
"""Tokens before the patches (DeiT has one for distillation), and the configuration."""


def pictures(count: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def model_of(family: str) -> tuple[Any, int]:
    prefix, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layer" in name:
            parameter.data *= 8  # attention that is not uniform
    return model, prefix


def learned(model: nn.Module, backend: Sparsifiner, **options: Any) -> Sparsifiner:
    backend.calibrate(model, {"pixel_values": pictures()}, **{"epochs": 3, **options})
    return backend


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model, prefix = model_of(family)
    backend = learned(model, Sparsifiner(prefix_tokens=prefix))
    assert list(backend.modules) == [0, 1] and {m.tokens for m in backend.modules.values()} == {64 + prefix}
    with torch.no_grad():
        plain = model(pixel_values=pictures()).last_hidden_state
        with attach(model, backend) as attached:
            out = model(pixel_values=pictures()).last_hidden_state
        backend.keep_rate = 1.0
        with attach(model, backend):
            whole = model(pixel_values=pictures()).last_hidden_state
    torch.testing.assert_close(whole, plain, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, plain, atol=1e-3)
    assert all("fallback" not in r and r["density"] < 0.35 for r in attached.records)
    assert "dense mega macs" in attached.report().to_text() or "dense_mega_macs" in attached.report().to_text()


def test_the_first_stage_leaves_the_model_alone_and_lowers_the_loss() -> None:
    """One step lowers the loss of the batch; modes, weights, gradients and random state are as before."""
    model, _ = model_of("ViT")
    model.train()
    model.encoder.layer[0].eval() if hasattr(model, "encoder") else model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    backend = learned(model, Sparsifiner(), epochs=2, lr=(1e-3, 1e-3))
    assert backend.losses[1] < backend.losses[0]
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    again = learned(model, Sparsifiner(), epochs=2, lr=(1e-3, 1e-3))
    assert again.losses == backend.losses, "equal seeds"
    assert learned(model, Sparsifiner(), seed=1, epochs=2).losses[0] != backend.losses[0]
    mean = learned(model, Sparsifiner(), epochs=1, reduction="mean")
    assert mean.losses[0] * 4 * 2 * 64 * 65 == pytest.approx(backend.losses[0], rel=1e-4)


def test_the_loss_of_the_first_stage() -> None:
    """Against the probabilities that the model itself gives."""
    model, _ = model_of("ViT")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(pixel_values=pictures(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    backend = learned(model, Sparsifiner(), epochs=1, lr=(1e-12, 1e-12))
    expected, seen = 0.0, []
    with torch.no_grad(), attach(model, backend):
        own = backend.importance
        backend.importance = lambda call, start, stop: (seen.append(call), own(call, start, stop))[1]  # type: ignore
        backend.keep_rate = 1.0
        model(pixel_values=pictures())
    for call, true in zip(seen, maps, strict=True):
        module = backend.modules[call.layer]
        guess = module.dense_map(module.coefficients(call.query[:, :, 1:], call.key, 2 ** -0.5)).detach()
        expected += 0.01 * float((guess - true[:, :, 1:]).square().sum()) / 2
    assert backend.losses[0] == pytest.approx(expected, rel=1e-4)


def test_calibration_learns_where_a_head_looks() -> None:
    """A planted head that looks at two columns of patches: the guess keeps nearly all of its attention."""

    class Planted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            key = torch.zeros(len(x), 1, 65, 16)
            key[:, 0, [5, 13, 21, 29, 40]] = 3.0  # the same for all queries
            out: Tensor = F.scaled_dot_product_attention(x[:, None].abs(), key, x[:, None])
            return out

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Planted()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attn(x)
            return out

    model, x = Host(), torch.randn(8, 65, 16, generator=torch.Generator().manual_seed(0))
    backend = Sparsifiner(keep_rate=0.1)
    backend.calibrate(model, x, layers="attn", epochs=60, lr=(1e-2, 1e-2))
    assert backend.losses[-1] < 0.2 * backend.losses[0]
    with torch.no_grad(), attach(model, backend, "attn"):
        near = (model(x) - F.scaled_dot_product_attention(x[:, None].abs(), *_planted(x))).norm()
    with torch.no_grad(), attach(model, RandomKeys(keep_rate=0.1), "attn"):
        far = (model(x) - F.scaled_dot_product_attention(x[:, None].abs(), *_planted(x))).norm()
    assert near < 0.2 * far


def _planted(x: Tensor) -> tuple[Tensor, Tensor]:
    key = torch.zeros(len(x), 1, 65, 16)
    key[:, 0, [5, 13, 21, 29, 40]] = 3.0
    return key, x[:, None]


def test_ways_to_give_batches() -> None:
    model, _ = model_of("ViT")
    data = torch.utils.data.DataLoader([{"pixel_values": x} for x in pictures(4)], batch_size=2)
    for batches, steps in (({"pixel_values": pictures()}, 2), (pictures(), 2), (data, 4), ([pictures(), pictures()], 4),
                           ((x for x in (pictures(), pictures())), 4),
                           (lambda attached: model(pixel_values=pictures()), 2)):
        backend = Sparsifiner()
        backend.calibrate(model, batches, epochs=2)
        assert len(backend.losses) == steps and len(backend.modules) == 2
    one = Sparsifiner()
    one.calibrate(model, pictures(), layers=[1], epochs=1)
    assert list(one.modules) == [1]
    with torch.no_grad(), attach(model, one, [1]) as attached:
        model(pixel_values=pictures())
    assert {r["layer"] for r in attached.records} == {1}
    with torch.no_grad(), attach(model, one), pytest.raises(ValueError, match="layer 0"):
        model(pixel_values=pictures())


def test_files_are_equal_to_the_bit(tmp_path: Path) -> None:
    model, _ = model_of("ViT")
    for shared in (False, True):
        backend = learned(model, Sparsifiner(share_inout_proj=shared), epochs=1)
        backend.save(tmp_path / "p.safetensors")
        loaded = Sparsifiner(share_inout_proj=shared)
        loaded.load(tmp_path / "p.safetensors")
        for layer, module in backend.modules.items():
            ours, theirs = module.state_dict(), loaded.modules[layer].state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
        with torch.no_grad():
            outs = []
            for one in (backend, loaded):
                with attach(model, one):
                    outs.append(model(pixel_values=pictures()).last_hidden_state)
        assert torch.equal(*outs)
        assert loaded.flops().to_dict() == backend.flops().to_dict()
    with pytest.raises(ValueError, match=r"prefix_tokens=0.*got some for prefix_tokens=1"):
        Sparsifiner(prefix_tokens=0).load(tmp_path / "p.safetensors")


def test_the_second_stage() -> None:
    """The model gets nearer to its dense self under masks; predictors and frozen parts stay; other backends, too."""
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=3)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 8
    batch = {"pixel_values": pictures(), "labels": torch.tensor([0, 1, 2, 0])}
    with torch.no_grad():
        dense = model(**batch).logits
    start = copy.deepcopy(model)
    for make in (lambda: learned(start, Sparsifiner(keep_rate=0.1), epochs=1), lambda: Nearest(0.1)):
        own, backend = copy.deepcopy(start), make()
        own.classifier.requires_grad_(False)
        before = copy.deepcopy([m.state_dict() for m in backend.modules.values()])
        losses = distill(own, backend, {k: v for k, v in batch.items() if k != "labels"}, epochs=15, lr=(1e-3, 1e-4))
        assert losses[-1] < 0.8 * losses[0]
        assert torch.equal(own.classifier.weight, start.classifier.weight)
        assert not own.training and all(p.grad is None for p in own.parameters())
        after = [m.state_dict() for m in backend.modules.values()]
        assert all(torch.equal(a[n], b[n]) for a, b in zip(before, after, strict=True) for n in a)
        with torch.no_grad(), attach(own, backend):
            near = (own(**batch).logits - dense).norm()
        with torch.no_grad(), attach(start, backend):
            far = (start(**batch).logits - dense).norm()
        assert near < far
    backend = learned(start, Sparsifiner(), epochs=1)
    losses = backend.finetune(copy.deepcopy(start), [batch, batch], start, epochs=2)
    assert len(losses) == 4


def test_the_loss_of_the_second_stage() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = torch.softmax(ours, -1), torch.softmax(theirs, -1)
    features = torch.ones(1, 2, 3)
    loss = distillation_loss(Outputs(torch.tensor(2.0), ours, features), Outputs(None, theirs, features * 3))
    assert float(loss) == pytest.approx(2 + 0.5 * float((q * (q / p).log()).sum()) + 0.5 * 4)
    with pytest.raises(ValueError, match="outputs"):
        distillation_loss(Outputs(), Outputs())


def test_baselines() -> None:
    model, _ = model_of("ViT")
    backend = learned(model, Sparsifiner(), epochs=1)
    low = LowRank()
    low.modules = backend.modules
    budgets = {}
    with torch.no_grad():
        plain = model(pixel_values=pictures()).last_hidden_state
        for one in (backend, Nearest(), RandomKeys(), TrueTop(), low):
            with attach(model, one):
                budgets[type(one).__name__] = (model(pixel_values=pictures()).last_hidden_state - plain).norm()
        masks = {type(b).__name__: b.masks(model, pictures())[1] for b in (backend, Nearest(), RandomKeys(), TrueTop())}
    assert {int(m[:, :, 1:].sum(-1).unique()) for m in masks.values()} == {17}, "ceil(0.25 * 65), all alike"
    assert budgets["TrueTop"] < min(budgets[n] for n in ("Nearest", "RandomKeys"))
    window = masks["Nearest"][0, 0, 1 + 27]  # patch (3, 3)
    assert bool(window[0]) and window[1:].view(8, 8).nonzero().sub(3).abs().max() <= 2
    assert not torch.equal(masks["RandomKeys"][0, 0], masks["RandomKeys"][0, 1])
    assert torch.equal(masks["RandomKeys"][0], masks["RandomKeys"][1])


def test_pictures() -> None:
    model, _ = model_of("ViT")
    backend = learned(model, Sparsifiner(), epochs=1)
    report = show(backend, model, pictures(2), [np.full((32, 32, 3), 0.5, np.float32)] * 2, (8, 8))
    assert len(report.images) == 2 and len(report.images[0].pngs) == 5 and not hasattr(model, "_looseleaf_place")
    kept = torch.zeros(2, 65, 65, dtype=torch.bool)
    kept[0, 1 + 9, 1 + 0] = kept[:, 1 + 9, 1 + 63] = True
    drawn = draw_keys(np.ones((32, 32, 3)), kept, (8, 8), 9)
    assert drawn[:4, :4].mean() == pytest.approx(0.625) and drawn[-4:, -4:].mean() == pytest.approx(1.0)
    assert drawn[16:20, :4].mean() == pytest.approx(0.25) and drawn[4, 4].tolist() == pytest.approx([1.0, 0.85, 0.1])
    assert draw_keys(np.ones((32, 32, 3)), kept, (8, 8))[:4, :4].mean() == pytest.approx(0.625)
    with pytest.raises(ValueError, match="picture"):
        draw_keys(np.ones((30, 32, 3)), kept, (8, 8))
    with pytest.raises(ValueError, match="kept"):
        draw_keys(np.ones((32, 32, 3)), kept, (8, 8), prefix=0)
    with pytest.raises(ValueError, match="query"):
        draw_keys(np.ones((32, 32, 3)), kept, (8, 8), 64)


@torch.no_grad()
def test_other_sizes_masks_and_causal_calls_fall_back() -> None:
    model, _ = model_of("Dinov2")
    backend = learned(model, Sparsifiner())
    for size in (24, 40):
        plain = model(pixel_values=pictures(2, size)).last_hidden_state
        with attach(model, backend) as attached:
            out = model(pixel_values=pictures(2, size)).last_hidden_state
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
        assert {r["fallback"] for r in attached.records} == {"another number of tokens than 65"}


def test_bad_input(tmp_path: Path) -> None:
    for fields, text in (({"keep_rate": 0.0}, "keep_rate"), ({"keep_rate": 1.1}, "keep_rate"),
                         ({"reduce_n": 0}, "reduce_n"), ({"token_layers": (3, 2)}, "token_layers"),
                         ({"token_layers": (1,), "prefix_tokens": 0}, "token_layers"),
                         ({"token_rate": 0}, "token_rate"), ({"scale": -1.0}, "scale"),
                         ({"compute_with": "fast"}, "compute_with")):
        with pytest.raises(ValueError, match=text):
            Sparsifiner(**fields)
    model, _ = model_of("ViT")
    with attach(model, Sparsifiner()), pytest.raises(ValueError, match=r"calibrate\(model, batches\) or load"):
        model(pixel_values=pictures())
    for action in (lambda: Sparsifiner().save(tmp_path / "x"), lambda: Sparsifiner().flops()):
        with pytest.raises(ValueError, match="calibrate"):
            action()
    with pytest.raises(ValueError, match="reduce_n"):
        learned(model, Sparsifiner(reduce_n=66))
    with pytest.raises(ValueError, match="reduce_c"):
        learned(model, Sparsifiner(reduce_c=17))
    with pytest.raises(ValueError, match="prefix_tokens=65"):
        learned(model, Sparsifiner(prefix_tokens=65))
    backend = learned(model, Sparsifiner(), epochs=1)
    torch.manual_seed(0)
    wide = transformers.ViTModel(transformers.ViTConfig(**{**SIZES, "hidden_size": 64})).eval()
    with attach(wide, backend), pytest.raises(ValueError, match=r"heads of 16 in layer 0.*got 32"):
        wide(pixel_values=pictures())
    torch.save({}, tmp_path / "p.pt")
    with pytest.raises(ValueError):
        backend.load(tmp_path / "p.pt")
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad_"):
        backend.finetune(frozen, pictures())


def test_autocast_and_half_precision() -> None:
    model, _ = model_of("ViT")
    backend = learned(model, Sparsifiner(), epochs=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), attach(model, backend) as attached:
        model(pixel_values=pictures())
    assert all("fallback" not in r for r in attached.records)
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad(), attach(half, backend) as attached:
        out = half(pixel_values=pictures().bfloat16()).last_hidden_state
    assert out.dtype == torch.bfloat16 and bool(torch.isfinite(out).all())
    assert all("fallback" not in r for r in attached.records)
