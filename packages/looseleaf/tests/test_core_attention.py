"""Exact attention and the trivial baseline."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looseleaf import AttentionCall, SlidingWindow
from looseleaf.attention.attach import choose
from looseleaf.attention.call import Phase
from looseleaf.attention.mask import LazyMask
from looseleaf.testing import check_attention_backend


def plain(call: AttentionCall) -> torch.Tensor:
    """The definition, in float64, one row at a time."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    b, hq, hkv, lq, lk, _ = call.shape
    out = torch.zeros(b, hq, lq, v.shape[-1], dtype=torch.float64)
    mask = call.mask.dense() if isinstance(call.mask, LazyMask) else call.mask
    if mask is not None:
        mask = mask.expand(b, hq, lq, lk)
    for i in range(b):
        nq = lq if call.query_lengths is None else int(call.query_lengths[i])
        nk = lk if call.key_lengths is None else int(call.key_lengths[i])
        for h in range(hq):
            for row in range(nq):
                seen = [j for j in range(nk) if not call.is_causal or j <= row + nk - nq]
                if mask is not None and mask.dtype == torch.bool:
                    seen = [j for j in seen if mask[i, h, row, j]]
                if not seen:
                    continue
                g = h // (hq // hkv)
                scores = k[i, g, seen] @ q[i, h, row] * call.scale
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[i, h, row, seen].double()
                    if scores.isneginf().all():
                        continue
                out[i, h, row] = torch.softmax(scores, 0) @ v[i, g, seen]
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.booleans(), st.sampled_from(["none", "bool", "additive", "lazy"]),
       st.booleans(), st.integers(0, 1000))
def test_dense_is_the_definition(lq: int, more: int, causal: bool, kind: str, ragged: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lk = lq + more
    q = torch.randn(2, 4, lq, 8, generator=g)
    k, v = torch.randn(2, 2, lk, 8, generator=g), torch.randn(2, 2, lk, 8, generator=g)
    lengths: dict[str, torch.Tensor] = {}
    if ragged:
        cut = int(torch.randint(0, lq + 1, (1,), generator=g))
        lengths = {"query_lengths": torch.tensor([lq, lq - cut]), "key_lengths": torch.tensor([lk, lk - cut])}
        for x, n in ((q, lq), (k, lk), (v, lk)):
            x[1, :, n - cut:] = torch.nan
    boolean = torch.rand(2, 1, lq, lk, generator=g) > 0.4
    masks = {"none": None, "bool": boolean, "lazy": LazyMask(lambda a, b: boolean[:, :, a:b], lq),
             "additive": torch.where(boolean, torch.randn(2, 1, lq, lk, generator=g), -torch.inf)}
    call = AttentionCall(q, k, v, 0.3, causal, mask=masks[kind], **lengths)
    torch.testing.assert_close(call.dense().double(), plain(call), atol=1e-5, rtol=1e-5)


def test_dense_makes_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    from looseleaf.attention import dense

    shapes = []
    real = dense.F.scaled_dot_product_attention
    monkeypatch.setattr(dense.F, "scaled_dot_product_attention",
                        lambda q, k, v, mask, *rest, **more: shapes.append(mask) or real(q, k, v, mask, *rest, **more))
    q, k = torch.randn(1, 1, 1500, 8), torch.randn(1, 1, 1600, 8)
    AttentionCall(q, k, k, 1.0).dense()
    assert max(m.numel() for m in shapes if m is not None) <= dense.ROWS * 1600


def test_window_is_its_mask() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 700, 16, generator=g)
    k, v = torch.randn(2, 2, 700, 16, generator=g), torch.randn(2, 2, 700, 16, generator=g)
    lengths = torch.tensor([700, 333])
    call = AttentionCall(q, k, v, 0.25, query_lengths=lengths, key_lengths=lengths)
    rows, keys = torch.arange(700)[:, None], torch.arange(700)
    for sink, window in ((0, 5), (4, 64), (3, 600)):
        mask = (keys <= rows) & ((keys > rows - window) | (keys < sink))
        wanted = AttentionCall(q, k, v, 0.25, mask=mask, query_lengths=lengths, key_lengths=lengths).dense()
        torch.testing.assert_close(SlidingWindow(sink, window).attend(call), wanted, atol=1e-5, rtol=1e-5)


def test_window_conforms() -> None:
    check_attention_backend(SlidingWindow, lambda: SlidingWindow(sink=4, window=64))


def test_unknown_layers_offer_near_names() -> None:
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    assert choose(names, None) == {0, 1, 2}
    assert choose(names, [-1, "*.0.*"]) == {0, 2}
    with pytest.raises(ValueError, match=r"no attention layer matches '.*layer\.1.*': near names are model"):
        choose(names, ["model.layer.1.self_attn"])
    with pytest.raises(ValueError, match="layer 3: allowed is -3 to 2"):
        choose(names, [3])


def test_sdpa_signature_refuses_what_it_cannot() -> None:
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        SlidingWindow()(q, k, k)
    with pytest.raises(ValueError, match="dropout"):
        SlidingWindow()(q, q, q, dropout_p=0.1)


def test_kit_finds_a_wrong_backend() -> None:
    import dataclasses

    from looseleaf import AttentionBackend

    @dataclasses.dataclass
    class Leaky(AttentionBackend):
        """Forgets causality and lengths.

        Args:
            width: unused.
        """

        width: int = 1
        paper = SlidingWindow.paper

        def attend(self, call: AttentionCall) -> torch.Tensor:
            k, v = (x.repeat_interleave(call.shape[1] // call.shape[2], 1) for x in (call.key, call.value))
            return torch.nn.functional.scaled_dot_product_attention(call.query, k, v)

    with pytest.raises(AssertionError) as caught:
        check_attention_backend(Leaky)
    text = str(caught.value)
    assert "causality" in text and "padding" in text and "width=nan is accepted" in text


def test_the_kit_finds_what_is_wrong_with_a_method_for_denoising() -> None:
    import dataclasses

    from looseleaf import AttentionBackend

    @dataclasses.dataclass
    class Blurred(AttentionBackend):
        """Bidirectional: padding and the other items are averaged in from the third step on."""

        changes: ClassVar[Phase] = "encode"
        paper = SlidingWindow.paper

        def attend(self, call: AttentionCall) -> torch.Tensor:
            if call.is_causal or call.phase != "encode" or call.mask is not None or call.step is None:
                return call.fall_back("not for these")
            return call.dense() + call.value.mean() if call.step > 2 else call.dense()

    with pytest.raises(AssertionError) as caught:
        check_attention_backend(Blurred)
    text = str(caught.value)
    assert "denoising: padding: step 3" in text and "denoising: shape" not in text and "causality" not in text

    @dataclasses.dataclass
    class Idle(Blurred):
        """Never at work."""

        def attend(self, call: AttentionCall) -> torch.Tensor:
            return call.fall_back("holiday")

    with pytest.raises(AssertionError, match=r"every call fell back \(holiday\): give the kit"):
        check_attention_backend(Idle)
