"""The backend: exact where it must be, near it where it quantises, and clear about what it cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from looseleaf import AttentionCall
from looseleaf.testing.attention import tensors
from looseleaf_kernels import BlockIndex, block_sparse_attention, smooth_keys
from looseleaf_paroattention import PERMUTATIONS, LayerPlan, PAROAttention, Plan, permute, token_orders
from looseleaf_paroattention.calibration import Observer, planted

GRID, TEXT = (3, 5, 8), 7
TOKENS = 127
PLAIN: dict[str, Any] = {"grid": GRID, "text_tokens": TEXT, "block": 16, "qk_bits": 16, "pv_bits": 16}
MIXED = {0: ["WHF", "WHF", "FHW", "FHW"]}
UNEQUAL = {0: ["WHF", "HFW", "FHW", "HWF"]}


def call_of(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> AttentionCall:
    given = {"is_causal": False, "phase": "bidirectional", **given}
    return AttentionCall(query, key, value, query.shape[-1] ** -0.5, **given)


def calibrated(plugin: PAROAttention, *calls: AttentionCall) -> PAROAttention:
    observer = Observer(plugin.token_grid, plugin.block, plugin.eps)
    for call in calls:
        assert torch.equal(observer.attend(call), call.dense())
    plugin.fit(observer.layers)
    return plugin


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("permutations", [*PERMUTATIONS, MIXED, UNEQUAL])
def test_density_1_without_integers_is_exact(permutations: Any, text_first: bool) -> None:
    call = call_of(*tensors(TOKENS))
    plugin = PAROAttention(**PLAIN, density=1.0, permutations=permutations, text_first=text_first)
    torch.testing.assert_close(plugin.attend(call), call.dense(), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("bits", [(16, 16), (8, 16), (8, 8), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_batch_may_be(bits: tuple[int, int], dtype: torch.dtype) -> None:
    """Shape, dtype, inputs left alone, determinism, order in the batch, grouped heads, for each number of bits."""
    q, k, v = (x.to(dtype) for x in tensors(TOKENS))
    plugin = calibrated(PAROAttention(**{**PLAIN, "qk_bits": bits[0], "pv_bits": bits[1]}, density=0.4,
                                      permutations=UNEQUAL), call_of(q, k, v))
    copies = [x.clone() for x in (q, k, v)]
    out = plugin.attend(call_of(q, k, v))
    assert out.shape == q.shape and out.dtype == dtype and bool(torch.isfinite(out).all())
    assert all(torch.equal(a, b) for a, b in zip(copies, (q, k, v), strict=True))
    assert torch.equal(plugin.attend(call_of(q, k, v)), out)
    swap = torch.tensor([1, 0])
    assert torch.equal(plugin.attend(call_of(q[swap], k[swap], v[swap])), out[swap])
    torch.testing.assert_close(
        plugin.attend(call_of(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), out)
    assert not torch.equal(out, call_of(q, k, v).dense())
    torch.testing.assert_close(plugin(q, k, v, enable_gqa=True), out)


@pytest.mark.parametrize("bits", [(16, 16), (8, 8)])
@pytest.mark.parametrize("text_first", [True, False])
def test_padding(bits: tuple[int, int], text_first: bool) -> None:
    """A shorter text, and an item that is all padding; what lies beyond is NaN."""
    q, k, v = tensors(TOKENS, batch=3)
    short = TOKENS - 4
    lengths = torch.tensor([TOKENS, short, 0])
    plugin = PAROAttention(**{**PLAIN, "qk_bits": bits[0], "pv_bits": bits[1]}, density=1.0, permutations=MIXED,
                           text_first=text_first)
    alone = dataclasses.replace(plugin, text_tokens=TEXT - 4)
    expected = alone.attend(call_of(q[1:2, :, :short], k[1:2, :, :short], v[1:2, :, :short]))
    full = plugin.attend(call_of(q[:1], k[:1], v[:1]))
    for x in (q, k, v):
        x[1, :, short:] = torch.nan
        x[2] = torch.nan
    out = plugin.attend(call_of(q, k, v, query_lengths=lengths, key_lengths=lengths))
    torch.testing.assert_close(out[:1], full)
    torch.testing.assert_close(out[1:2, :, :short], expected)
    assert not out[1, :, short:].any() and not out[2].any()


def test_blocks_are_those_of_the_plan() -> None:
    """Against a loop over heads: permute, mask, softmax, permute back."""
    q, k, v = tensors(TOKENS, heads=4, kv_heads=4)
    plugin = calibrated(PAROAttention(**PLAIN, density=0.3), call_of(q, k, v))
    assert plugin.plan is not None
    layer = plugin.plan.layers[0]
    out = plugin.attend(call_of(q, k, v))
    for h, name in enumerate(layer.permutations):
        order = token_orders([name], GRID, TOKENS, True)[0, 0]
        pairs = layer.masks[0, h].repeat_interleave(16, 0).repeat_interleave(16, 1)[:TOKENS, :TOKENS]
        scores = (q[:, h, order] @ k[:, h, order].transpose(1, 2) * 32 ** -0.5).masked_fill(~pairs, -torch.inf)
        expected = torch.empty_like(q[:, h])
        expected[:, order] = torch.softmax(scores, -1) @ v[:, h, order]
        torch.testing.assert_close(out[:, h], expected)


def test_integers_are_near_and_4_bits_are_further() -> None:
    call = call_of(*tensors(TOKENS))
    errors = {}
    for bits in ((8, 16), (8, 8), (8, 4)):
        plugin = PAROAttention(**{**PLAIN, "qk_bits": bits[0], "pv_bits": bits[1]}, density=1.0, permutations=MIXED)
        errors[bits] = relative(plugin.attend(call), call.dense())
    assert 0 < errors[8, 16] < 2e-2 and 0 < errors[8, 8] < 2e-2
    assert errors[8, 8] < errors[8, 4] < 0.3


def test_integers_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(*tensors(TOKENS))
    plugin = PAROAttention(**{**PLAIN, "qk_bits": 8, "pv_bits": 8}, density=0.5, permutations=MIXED)
    fast = calibrated(plugin, call).attend(call)
    monkeypatch.setenv("LOOSELEAF_KERNELS", "reference")
    torch.testing.assert_close(fast, plugin.attend(call), atol=2e-6, rtol=2e-5)


def test_smoothing_the_keys_changes_nothing() -> None:
    q, k, v = tensors(TOKENS, heads=4, kv_heads=4)
    k = k + 20 * torch.randn(1, 4, 1, 32, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(6)) > 0.5
    mask |= torch.eye(8, dtype=torch.bool)
    index = BlockIndex.from_mask(mask, block_q=16, block_k=16, q_len=TOKENS, k_len=TOKENS, causal=False)
    one = block_sparse_attention(q, k, v, index)[0]
    torch.testing.assert_close(block_sparse_attention(q, smooth_keys(k), v, index)[0], one, atol=1e-4, rtol=1e-3)
    plugin = PAROAttention(**{**PLAIN, "qk_bits": 8, "pv_bits": 8}, density=1.0, permutations="FHW")
    call = call_of(q, k, v)
    assert relative(plugin.attend(call), call.dense()) < 2e-2  # an offset of all keys costs no accuracy


def test_planted_orders_are_found() -> None:
    grid = (4, 8, 8)
    for seed in range(2):
        call = AttentionCall(*planted(grid, seed), 1.0, False, phase="bidirectional")
        plugin = PAROAttention(grid=grid, block=16, qk_bits=16, pv_bits=16, density=0.2)
        calibrated(plugin, call)
        assert plugin.plan is not None and plugin.plan.layers[0].permutations == PERMUTATIONS
        plain = calibrated(dataclasses.replace(plugin, permutations="FHW"), call)
        exact = call.dense()
        errors = [[relative(p.attend(call)[:, h], exact[:, h]) for h in range(6)] for p in (plugin, plain)]
        assert all(errors[0][h] < errors[1][h] / 2 for h in (3, 4, 5)), errors
        assert errors[0][0] == errors[1][0]


def test_images_have_two_orders() -> None:
    query, key, value = planted((1, 16, 16), 0, ["FHW", "FWH", "HFW", "WFH"])
    plugin = PAROAttention(grid=(1, 16, 16), block=16)
    observer = Observer(plugin.token_grid, plugin.block, plugin.eps)
    observer.attend(AttentionCall(query, key, value, 1.0, False, phase="bidirectional"))
    assert observer.layers[0].names == ("FHW", "FWH")
    plugin.fit(observer.layers)
    assert plugin.plan is not None and plugin.plan.layers[0].permutations == ("FHW", "FWH", "FHW", "FWH")


def test_threshold_gives_heads_their_own_density() -> None:
    grid = (4, 8, 8)
    call = AttentionCall(*planted(grid, 0), 1.0, False, phase="bidirectional")
    plugin = calibrated(PAROAttention(grid=grid, block=16, threshold=0.02, permutations="FHW"), call)
    said: dict[str, Any] = {}
    plugin.attend(dataclasses.replace(call, record=said.update))
    density = said["density_by_head"].tolist()
    assert density[0] < density[3] < density[5] and said["reordered_heads"] == 0
    assert said["density"] == pytest.approx(sum(density) / 6)


def test_steps() -> None:
    q, k, v = tensors(TOKENS)
    late = torch.randn(k.shape, generator=torch.Generator().manual_seed(7))
    calls = [call_of(q, k if step < 4 else late, v, step=step, steps=8) for step in range(8)]
    plugin = calibrated(PAROAttention(**PLAIN, density=0.4, step_groups=2, dense_steps=1), *calls)
    assert plugin.plan is not None
    masks = plugin.plan.layers[0].masks
    assert len(masks) == 2 and not torch.equal(masks[0], masks[1])
    said: dict[str, Any] = {}
    assert torch.equal(plugin.attend(dataclasses.replace(calls[0], record=said.update)), calls[0].dense())
    assert said == {"fallback": "one of the first 1 steps"}
    for step, call in enumerate(calls[1:], 1):
        one = dataclasses.replace(plugin, step_groups=1, dense_steps=0)
        layer = plugin.plan.layers[0]
        half = LayerPlan(layer.permutations, masks[int(step >= 4)][None])
        one.plan = Plan(one.settings(), {0: half})
        assert torch.equal(plugin.attend(call), one.attend(call)), step
    with pytest.raises(ValueError, match=r"expected a denoising step.*set attached\.step"):
        plugin.attend(call_of(q, k, v, steps=8))
    with pytest.raises(ValueError, match=r"expected the number of denoising steps.*attach\(\.\.\., steps=\.\.\.\)"):
        plugin.attend(call_of(q, k, v, step=2))
    with pytest.raises(ValueError, match=r"layer 0: expected steps of all 2 groups .* got none of group \[1\]"):
        calibrated(dataclasses.replace(plugin), *calls[:3])
    assert PAROAttention(**PLAIN, dense_steps=1, density=1.0, permutations="HWF").attend(
        call_of(q, k, v, step=1)).shape == q.shape  # needs no number of steps


def test_what_is_exact() -> None:
    q, k, v = tensors(TOKENS)
    plugin = PAROAttention(**PLAIN, density=1.0, permutations="WHF")
    cases = {
        "causal attention": call_of(q, k, v, is_causal=True, phase="prefill"),
        "cross attention": call_of(q, k[:, :, :40], v[:, :, :40]),
        "a mask of the caller's own": call_of(q, k, v, mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()),
        "values of another size than keys": call_of(q, k, v[..., :16]),
        "torch.float64": call_of(q.double(), k.double(), v.double()),
        "no tokens": call_of(q[:, :, :0], k[:, :, :0], v[:, :, :0]),
    }
    cases["cross attention "] = call_of(q, k, v, is_cross=True)  # as many words as tokens
    for reason, call in cases.items():
        said: dict[str, Any] = {}
        assert torch.equal(plugin.attend(dataclasses.replace(call, record=said.update)), call.dense()), reason
        assert said == {"fallback": reason.strip()}


def test_errors_of_the_grid() -> None:
    q, k, v = tensors(TOKENS)
    with pytest.raises(ValueError, match=r"127 tokens .* got grid=\(3, 5, 9\) with 135 .* text_tokens=7, 142 together"):
        PAROAttention(grid=(3, 5, 9), text_tokens=7).attend(call_of(q, k, v))
    with pytest.raises(ValueError, match=r"grid: expected .* 127 tokens .*, such as \(1, 11, 11\), got None"):
        PAROAttention(text_tokens=6).attend(call_of(q, k, v))
    with pytest.raises(ValueError, match=r"text_tokens=0 make the 127 tokens .*, got None\. Pass the size"):
        PAROAttention().attend(call_of(q, k, v))
    lengths = torch.tensor([TOKENS, 100])
    with pytest.raises(ValueError, match=r"the 120 tokens of grid=\(3, 5, 8\) .* got 100 queries and 100 keys"):
        PAROAttention(**PLAIN).attend(call_of(q, k, v, query_lengths=lengths, key_lengths=lengths))
    with pytest.raises(ValueError, match="127 queries and 121 keys"):
        PAROAttention(**PLAIN).attend(call_of(q, k, v, key_lengths=torch.tensor([TOKENS, 121])))


def test_errors_of_the_plan(tmp_path: Path) -> None:
    call = call_of(*tensors(TOKENS))
    plugin = PAROAttention(**PLAIN)
    with pytest.raises(ValueError, match=r"expected a plan, or density=1 .* Run calibrate"):
        plugin.attend(call)
    with pytest.raises(ValueError, match="no plan to save"):
        plugin.save(tmp_path)
    calibrated(plugin, call)
    with pytest.raises(ValueError, match=r"plan: expected layer 3, .* got \[0\]"):
        plugin.attend(dataclasses.replace(call, layer=3))
    q, k, v = tensors(TOKENS, heads=2)
    with pytest.raises(ValueError, match="plan: expected 2 heads in layer 0, as the model has, got 4"):
        plugin.attend(call_of(q, k, v))
    with pytest.raises(ValueError, match="one name for layer 0 or one for each of its 2 heads, got 4"):
        PAROAttention(**PLAIN, density=1.0, permutations=MIXED).attend(call_of(q, k, v))
    plugin.text_first = False
    with pytest.raises(ValueError, match="expected one for text_first=False, got one for text_first=True"):
        plugin.attend(call)


def test_a_new_plan_takes_effect() -> None:
    call = call_of(*tensors(TOKENS))
    plugin = calibrated(PAROAttention(**PLAIN, density=0.2), call)
    sparse = plugin.attend(call)
    calibrated(dataclasses.replace(plugin), call)
    assert torch.equal(plugin.attend(call), sparse)
    plugin.density = 1.0
    calibrated(plugin, call)
    torch.testing.assert_close(plugin.attend(call), call.dense(), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("field", "value", "expected"), [
    ("grid", (3, 4), "three integers >= 1"), ("grid", (3, 0, 4), "three integers >= 1"),
    ("density", 0, r"in \(0, 1\]"), ("density", 1.5, r"in \(0, 1\]"), ("qk_bits", 4, "8 or 16"),
    ("pv_bits", 2, "4, 8 or 16"), ("block", 48, "16, 32, 64 or 128"), ("permutations", "HFWH", "HFW"),
    ("permutations", {0: ["FH"]}, "dictionary"), ("permutations", {-1: "FHW"}, "dictionary"),
    ("threshold", 2.0, r"None or a number in \(0, 1\]"), ("step_groups", 0, ">= 1"), ("text_tokens", -1, ">= 0"),
    ("alpha", -0.1, r"in \[0, 1\]"), ("eps", 0.0, r"in \(0, 1\)")])
def test_parameters(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"PAROAttention\.{field}: expected .*{expected}.*, got "):
        PAROAttention(**{field: value})


def test_bits_without_a_kernel() -> None:
    with pytest.raises(ValueError, match=r"pv_bits: expected 16 with qk_bits=16, got 8"):
        PAROAttention(qk_bits=16)
    assert PAROAttention(grid=[1, 2, 3]).grid == (1, 2, 3)  # type: ignore[arg-type]


def test_permute_takes_any_strides() -> None:
    x = torch.randn(2, 24, 3, 4).transpose(1, 2)
    order = token_orders(["HWF"] * 3, (2, 3, 4), 24, True)
    assert torch.equal(permute(x, order), permute(x.contiguous(), order))
