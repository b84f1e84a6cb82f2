"""The index and the estimation helpers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looseleaf_kernels import BlockIndex, block_importance, block_mean, implementation, last_query_scores, top_mass


def test_index_round_trips() -> None:
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    index = BlockIndex.from_mask(mask, block_q=16, block_k=8, q_len=60, k_len=40, causal=False)
    assert torch.equal(index.to_mask(), mask)
    lists = [[[row.nonzero().flatten().tolist() for row in head] for head in item] for item in mask]
    other = BlockIndex.from_lists(lists, block_q=16, block_k=8, q_len=60, k_len=40, causal=False)
    assert torch.equal(other.col, index.col) and torch.equal(other.row_ptr, index.row_ptr)
    ptr, rows = index.transpose()
    back = torch.zeros_like(mask)
    for b in range(2):
        for h in range(3):
            for c in range(5):
                back[b, h, rows[ptr[b, h, c]:ptr[b, h, c + 1]].long(), c] = True
    assert torch.equal(back, mask)
    torch.testing.assert_close(index.density(), mask.float().mean((2, 3)))


def test_density_counts_causal_blocks_only() -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    index = BlockIndex.from_mask(mask, block_q=8, block_k=8, q_len=32, k_len=32, causal=True)
    assert index.density().item() == 1
    only = BlockIndex.from_mask(torch.eye(4, dtype=torch.bool)[None, None], block_q=8, block_k=8, q_len=32, k_len=32,
                                causal=True)
    assert only.density().item() == pytest.approx(4 / 10)
    assert only.density(torch.tensor([16])).item() == pytest.approx(2 / 3)


def test_flex_round_trip() -> None:
    mask = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    index = BlockIndex.from_mask(mask, block_q=128, block_k=128, q_len=384, k_len=384, causal=False)
    assert torch.equal(BlockIndex.from_flex(index.to_flex(), causal=False).to_mask(), mask)


def test_bad_index() -> None:
    with pytest.raises(ValueError, match=r"mask: expected torch\.bool of shape \(B, H, 2, 2\), got torch\.float32"):
        BlockIndex.from_mask(torch.ones(1, 1, 2, 2), block_q=8, block_k=8, q_len=16, k_len=16, causal=True)
    with pytest.raises(ValueError, match=r"lists: expected key blocks in \[0, 1\], got 2 in item 0, head 0, row 1"):
        BlockIndex.from_lists([[[[0], [2]]]], block_q=8, block_k=8, q_len=16, k_len=16, causal=True)


@pytest.mark.parametrize(("lq", "lk", "last"), [(40, 40, 8), (10, 40, 16), (40, 40, 64), (1, 20, 4)])
def test_last_query_scores(lq: int, lk: int, last: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, lq, 16, generator=g), torch.randn(2, 2, lk, 16, generator=g)
    lengths = {"query_lengths": torch.tensor([lq, max(1, lq - 3)]), "key_lengths": torch.tensor([lk, lk - 5])}
    got = last_query_scores(q, k, last, **lengths)
    with implementation("reference"):
        want = last_query_scores(q, k, last, **lengths)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(a.sum(-1), torch.ones(2, 4))


def test_block_mean() -> None:
    x = torch.randn(2, 3, 50, 24)
    lengths = torch.tensor([50, 17])
    x[1, :, 17:] = torch.nan
    got = block_mean(x, 16, lengths)
    with implementation("reference"):
        torch.testing.assert_close(got, block_mean(x, 16, lengths))
    assert not torch.isnan(got).any()


@pytest.mark.parametrize("causal", [True, False])
def test_block_importance(causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 50, 16, generator=g), torch.randn(1, 2, 70, 16, generator=g)
    got = block_importance(q, k, 16, 16, causal=causal, reduce="sum")
    with implementation("reference"):
        torch.testing.assert_close(got, block_importance(q, k, 16, 16, causal=causal, reduce="sum"))
    torch.testing.assert_close(got.sum((2, 3)), torch.full((1, 4), 50.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.sampled_from([0.1, 0.5, 0.9]))
def test_top_mass_is_the_smallest_set(values: list[float], mass: float) -> None:
    scores = torch.tensor([values])
    keep = top_mass(scores, mass)[0]
    total = scores.double().sum()
    if total == 0:
        assert not keep.any()
        return
    chosen = scores[0].double()[keep]
    assert chosen.sum() >= mass * total * (1 - 1e-6)
    assert chosen.sum() - chosen.min() < mass * total * (1 + 1e-6)
    assert chosen.min() >= scores[0].double()[~keep].max() if (~keep).any() else True


def test_top_mass_ties_go_to_the_lower_index() -> None:
    assert top_mass(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 0.5).tolist() == [[True, True, False, False]]
    assert top_mass(torch.tensor([[0.0, 1.0, 2.0]]), 1.0).tolist() == [[False, True, True]]
