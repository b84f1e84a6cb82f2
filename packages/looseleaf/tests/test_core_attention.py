"""Exact attention and the trivial baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looseleaf import AttentionCall, SlidingWindow
from looseleaf.attention.attach import choose
from looseleaf.attention.dense import LazyMask
from looseleaf.testing import conformance_tests


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
                changes = call.score_changes
                if "softcap" in changes:
                    scores = torch.tanh(scores / changes["softcap"]) * changes["softcap"]
                if "position_bias" in changes:
                    scores = scores + changes["position_bias"].expand(b, hq, lq, lk)[i, h, row, seen].double()
                if mask is not None and mask.dtype != torch.bool:
                    scores = scores + mask[i, h, row, seen].double()
                    if scores.isneginf().all():
                        continue
                sinks = changes["s_aux"][h:h + 1].double() if "s_aux" in changes else scores[:0]
                out[i, h, row] = torch.softmax(torch.cat([scores, sinks]), 0)[:len(seen)] @ v[i, g, seen]
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.booleans(), st.sampled_from(["none", "bool", "additive", "lazy"]),
       st.booleans(), st.sets(st.sampled_from(["softcap", "s_aux", "position_bias"])), st.integers(0, 1000))
def test_dense_is_the_definition(lq: int, more: int, causal: bool, kind: str, ragged: bool, changed: set[str],
                                 seed: int) -> None:
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
    every: dict[str, Any] = {"softcap": 0.8, "s_aux": torch.randn(4, generator=g),
                             "position_bias": torch.randn(1, 4, lq, lk, generator=g)}
    call = AttentionCall(q, k, v, 0.3, causal, mask=masks[kind], score_changes={n: every[n] for n in sorted(changed)},
                         **lengths)
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


test_conformance = conformance_tests(SlidingWindow)


def test_unknown_layers_offer_near_names() -> None:
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    assert choose(names, None) == {0, 1, 2}
    assert choose(names, [-1, "*.0.*"]) == {0, 2}
    with pytest.raises(ValueError, match=r"no attention layer matches '.*layer\.1.*'. Near names are model"):
        choose(names, ["model.layer.1.self_attn"])
    with pytest.raises(ValueError, match="layers: expected an index from -3 to 2, got 3"):
        choose(names, [3])


def test_sdpa_signature_refuses_what_it_cannot() -> None:
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        SlidingWindow()(q, k, k)
    with pytest.raises(ValueError, match=r"dropout_p: expected 0\.0, because SlidingWindow has no dropout, got 0.1"):
        SlidingWindow()(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="expected as many keys as queries with is_causal, got 8 and 4"):
        SlidingWindow()(q[:, :, :4], q, q, is_causal=True)


def test_lengths_are_never_none() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    queries, keys = AttentionCall(q, k, k, 1.0).lengths()
    assert queries.tolist() == [3, 3] and keys.tolist() == [5, 5] and queries.dtype == keys.dtype == torch.int64
    assert AttentionCall(q, k, k, 1.0, key_lengths=torch.tensor([5, 2])).lengths()[1].tolist() == [5, 2]


def test_the_core_answers_for_what_a_backend_is_not_for() -> None:
    """Other phases, score changes that it does not list, and keys and values of different sizes."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 40, 8, generator=g), torch.randn(1, 2, 40, 8, generator=g)
    value = torch.randn(1, 2, 40, 5, generator=g)
    backend = SlidingWindow(sink=0, window=8)
    changes: list[dict[str, Any]] = [{"phase": "bidirectional", "is_causal": False}, {"phase": "decode"},
                                     {"score_changes": {"softcap": 2.0}}]
    for change in changes:
        recorded: dict[str, Any] = {}
        call = AttentionCall(q, k, k, 0.3, record=recorded.update, **change)
        assert torch.equal(backend.compute(call), call.dense()) and "fallback" in recorded
    padded = torch.cat([value, value[..., :3]], -1)
    narrow, wide = (backend.compute(AttentionCall(q, k, v, 0.3)) for v in (value, padded))
    torch.testing.assert_close(narrow, wide[..., :5])
    big = backend.compute(AttentionCall(q, k, torch.cat([k, value], -1), 0.3))
    torch.testing.assert_close(big[..., :8], backend.compute(AttentionCall(q, k, k, 0.3)))
    dropped = AttentionCall(q, k, k, 0.3, score_changes={"dropout": 0.5})
    torch.manual_seed(0)
    one = dropped.dense()
    assert not torch.allclose(one, dropped.dense()), "dropout draws anew"


def test_shapes_are_checked_where_a_test_asks_for_it() -> None:
    """The annotations are the contract: beartype and jaxtyping read them."""
    from beartype import beartype
    from jaxtyping import TypeCheckError, jaxtyped

    checked = jaxtyped(typechecker=beartype)(AttentionCall)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    checked(q, k, k, 1.0, key_lengths=torch.tensor([5, 2]))
    for wrong in ((q[0], k, k), (q, k, k[:, :, :4]), (q, k[:1], k[:1]), (q, k[..., :4], k)):
        with pytest.raises(TypeCheckError):
            checked(*wrong, 1.0)
    with pytest.raises(TypeCheckError):
        checked(q, k, k, 1.0, key_lengths=torch.tensor([5.0, 2.0]))
