"""Any module whose parts call ``scaled_dot_product_attention``: timm, torchvision, nn.MultiheadAttention, one's own."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording_backends import Halved
from torch import nn
from torch.utils.checkpoint import checkpoint

from looseleaf import AttentionCall, UnsupportedModelError, attach
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import seeded


class Attention(nn.Module):
    """As timm writes it: fused, or by hand."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.num_heads, self.head_dim, self.fused_attn, self.dropout = 4, 8, fused, 0.0

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return self.qkv(y).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)

        query, key, value = heads(x)
        if context is not None:
            _, key, value = heads(context)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=causal,
                                                 dropout_p=self.dropout if self.training else 0.0)
        else:
            out = (query @ key.mT * 8 ** -0.5).softmax(-1) @ value
        return self.proj(out.transpose(1, 2).flatten(2))


class Own(nn.Module):
    """Two blocks of attention."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": Attention(fused), "mlp": nn.Linear(32, 32)}) for _ in range(2))

    def forward(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["attn"](x, **given)
            x = x + block["mlp"](x)
        return x


def hidden(length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fused", [True, False])
def test_a_module_of_ones_own(fused: bool) -> None:
    model = mixed_modes(seeded(lambda: Own(fused)))
    before, expected = snapshot(model), model(hidden())
    with attach(model, Halved(), layers="blocks.*.attn") as attached:
        assert not torch.allclose(model(hidden()), expected, atol=1e-3)
        assert attached.layers == ["blocks.0.attn", "blocks.1.attn"]
        assert [r["layer"] for r in attached.records] == [0, 1]
        copied = copy.deepcopy(model)
    call = attached.backend.calls[0]
    assert (call.phase, call.is_cross, call.layers, call.shape) == ("bidirectional", False, 2, (2, 4, 4, 9, 9, 8))
    assert type(call.module) is Attention
    assert_unchanged(before, model)
    assert model.blocks[0]["attn"].fused_attn is fused
    for other in (model, copied):
        torch.testing.assert_close(other(hidden()), expected)


def test_phases_and_cross_attention_of_own_modules() -> None:
    model = seeded(Own).eval()
    with torch.no_grad(), attach(model, Halved(), layers=["blocks.0.attn"]) as attached:
        model(hidden(), causal=True)
        model(hidden(), context=hidden(9, seed=1))
        model(hidden(), context=hidden(5))
        model(hidden(1), context=None)
        assert {r["layer"] for r in attached.records} == {0}
    calls = attached.backend.calls
    assert [(c.phase, c.is_cross) for c in calls] == [
        ("prefill", False), ("bidirectional", True), ("bidirectional", True), ("bidirectional", False)]


def test_what_the_backend_cannot_take_is_exact_and_counted() -> None:
    model = seeded(Own)
    for block in model.blocks:
        block["attn"].dropout = 0.5
    expected = seeded(lambda: model(hidden()))
    with attach(model, Halved(), layers="blocks.*.attn") as attached:
        assert torch.equal(seeded(lambda: model(hidden())), expected), "dropout is passed on"
    assert [r["fallback"] for r in attached.records] == ["dropout in training"] * 2
    model.eval()
    with attach(model, Halved(), layers="blocks.*.attn") as attached:
        model(hidden(), context=hidden(5), causal=True)
    assert all(r["fallback"].startswith("is_causal with another number of keys") for r in attached.records)
    with attach(model, Halved(), layers="blocks.*.mlp") as attached:
        model(hidden())
    assert [r["fallback"] for r in attached.records] == ["no call of scaled_dot_product_attention"] * 2
    assert "no call of" in attached.report().to_text()


def test_what_cannot_be_attached_to() -> None:
    model = seeded(Own)
    with pytest.raises(UnsupportedModelError, match=r"got Own alone: name its attention modules, such as layers="):
        attach(model, Halved())
    with pytest.raises(ValueError, match=r"no module matches 'block\.\*\.attn'. Near names are blocks"):
        attach(model, Halved(), layers="block.*.attn")
    with pytest.raises(ValueError, match="expected a name pattern"):
        attach(model, Halved(), layers=[0])
    with pytest.raises(UnsupportedModelError, match="expected a torch module or a diffusers pipeline, got str"):
        attach("model", Halved(), layers="blocks.*")
    with attach(model, Halved(), layers="blocks.*.attn"), \
            pytest.raises(UnsupportedModelError, match="attached already"):
        attach(model, Halved(), layers="blocks.0.attn")
    with pytest.raises(UnsupportedModelError, match="expected a module of Python code, got TorchScript"):
        attach(torch.jit.trace(model.eval(), hidden()), Halved(), layers="blocks.*.attn")


def test_nested_modules_take_one_call_once() -> None:
    model = seeded(Own).eval()
    with torch.no_grad(), attach(model, Halved(), layers=["blocks.*", "blocks.*.attn"]) as attached:
        for block in model.blocks:
            block["attn"](hidden())
    assert len(attached.backend.calls) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_behind_the_block(reentrant: bool) -> None:
    model, x = seeded(Own), hidden().requires_grad_()
    with attach(model, Halved(), layers="blocks.*.attn") as attached:
        out = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    out.backward()
    once = model.blocks[0]["attn"].qkv.weight.grad.clone()
    assert len(attached.records) == 2
    model.zero_grad()
    with attach(model, Halved(), layers="blocks.*.attn"):
        model(x).square().sum().backward()
    torch.testing.assert_close(once, model.blocks[0]["attn"].qkv.weight.grad)


def test_compiled_and_run_before() -> None:
    model = seeded(Own).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(hidden())
        with attach(compiled, Halved(), layers="blocks.*.attn") as attached:
            assert not torch.allclose(compiled(hidden()), before, atol=1e-3) and len(attached.backend.calls) == 2
        torch.testing.assert_close(compiled(hidden()), before)


# ---------------------------------------------------------------------- nn.MultiheadAttention
def transformer() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True), 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_fast_path_of_multihead_attention_is_not_taken(padded: bool, training: bool) -> None:
    model = seeded(transformer).train(training)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = padded
    given = {"src_key_padding_mask": padding} if padded else {}
    with torch.no_grad():
        expected = model(hidden(), **given)
        with attach(model, Halved(), layers="layers.*.self_attn") as attached:
            got = model(hidden(), **given)
            alone = model.layers[1](hidden())
        assert len(attached.backend.calls) == 3 and alone.shape == (2, 9, 32)
        assert not torch.allclose(got[~padding], expected[~padding], atol=1e-3)
        with attach(model, Exact(), layers="layers.*.self_attn"):
            torch.testing.assert_close(model(hidden(), **given)[~padding], expected[~padding], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(hidden(), **given)[~padding], expected[~padding], atol=1e-6, rtol=1e-5)


@dataclasses.dataclass
class Exact(Halved):
    """Exact attention."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call)
        return call.dense()


def test_multihead_attention_by_itself() -> None:
    model = nn.ModuleDict({"attn": seeded(lambda: nn.MultiheadAttention(32, 4, batch_first=True))}).eval()
    attention, x = model["attn"], hidden()
    with torch.no_grad():
        expected = attention(x, x, x, need_weights=False)[0]
        with attach(model, Exact(), layers="attn") as attached:
            torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, atol=1e-6, rtol=1e-5)
            attention(x, hidden(9, seed=1), hidden(9, seed=1), need_weights=False)
            assert [c.is_cross for c in attached.backend.calls] == [False, True]
            out, weights = attention(x, x, x)
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
            assert weights.shape == (2, 9, 9)
    assert attached.records[-1]["fallback"] == "need_weights=True asks for exact weights" and len(attached.records) == 3


# ---------------------------------------------------------------------- timm and torchvision
@pytest.fixture(scope="module")
def vision() -> Any:
    """timm and torchvision; the wheel of torchvision for CUDA lacks its operators beside a torch for the CPU."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pytest.skip("torchvision is not installed")
    return pytest.importorskip("timm"), pytest.importorskip("torchvision")


@pytest.mark.parametrize("fused", [True, False])
def test_timm(vision: Any, fused: bool) -> None:
    timm, _ = vision
    timm.layers.set_fused_attn(fused)
    try:
        model = seeded(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32,
                                                 num_heads=4, depth=2)).eval()
    finally:
        timm.layers.set_fused_attn(True)
    pixels = seeded(lambda: torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        before = model(pixels)
        with attach(model, Exact(), layers="blocks.*.attn") as attached:
            torch.testing.assert_close(model.forward_head(model.forward_features(pixels)), before, atol=1e-5, rtol=1e-4)
        assert [c.layer for c in attached.backend.calls] == [0, 1] and attached.backend.calls[0].shape[3] == 17
        with attach(model, Halved(), layers="blocks.1.attn") as attached:
            assert not torch.allclose(model(pixels), before)
        assert torch.equal(model(pixels), before) and model.blocks[0].attn.fused_attn is fused


def test_torchvision(vision: Any) -> None:
    _, torchvision = vision
    model = seeded(lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48)).eval()
    nn.init.normal_(model.heads.head.weight)
    pixels = seeded(lambda: torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        before = model(pixels)
        with attach(model, Exact(), layers="encoder.layers.*.self_attention") as attached:
            torch.testing.assert_close(model(pixels), before, atol=1e-5, rtol=1e-4)
        assert [c.layer for c in attached.backend.calls] == [0, 1] and attached.backend.calls[0].shape[3] == 17
        with attach(model, Halved(), layers="encoder.layers.*.self_attention"):
            assert not torch.allclose(model(pixels), before, atol=1e-3)
        torch.testing.assert_close(model(pixels), before)
