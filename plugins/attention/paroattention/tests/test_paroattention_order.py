"""Orders of tokens, metrics of block maps, and masks."""

from __future__ import annotations

import itertools

import pytest
import torch

from looseleaf_paroattention import (
    PERMUTATIONS,
    block_masks,
    block_statistics,
    distinct,
    inverse,
    permute,
    scores,
    sparsity,
    token_orders,
)
from looseleaf_paroattention.calibration import density_for, expected_mass, planted
from looseleaf_paroattention.grid import grid_order

GRID = (2, 3, 4)


def test_orders_by_hand() -> None:
    assert ["".join(p) for p in itertools.permutations("FHW")] == list(PERMUTATIONS)
    assert grid_order("FHW", GRID).tolist() == list(range(24))
    # HWF: both frames of one place next to each other; a frame has 12 tokens.
    assert grid_order("HWF", GRID).tolist() == [f * 12 + p for p in range(12) for f in range(2)]
    # FWH: in each frame column by column.
    assert grid_order("FWH", GRID).tolist()[:12] == [h * 4 + w for w in range(4) for h in range(3)]
    assert [len({tuple(grid_order(n, GRID).tolist()) for n in PERMUTATIONS})] == [6]
    with pytest.raises(ValueError, match=r"permutation: expected FHW, .*, got 'FH'"):
        grid_order("FH", GRID)


@pytest.mark.parametrize(("grid", "names"), [(GRID, PERMUTATIONS), ((1, 3, 4), ("FHW", "FWH")), ((1, 1, 5), ("FHW",)),
                                             ((3, 1, 4), ("FHW", "HWF"))])
def test_distinct_orders(grid: tuple[int, int, int], names: tuple[str, ...]) -> None:
    assert distinct(grid) == names
    orders = {n: tuple(grid_order(n, grid).tolist()) for n in PERMUTATIONS}
    assert {orders[n] for n in names} == set(orders.values()) and len({orders[n] for n in names}) == len(names)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("lengths", [None, (29, 26, 24, 0)])
def test_there_and_back(text_first: bool, lengths: tuple[int, ...] | None) -> None:
    order = token_orders(PERMUTATIONS, GRID, 29, text_first, lengths)
    assert order.shape == (1 if lengths is None else 4, 6, 29)
    assert torch.equal(order.sort(-1).values, torch.arange(29).expand_as(order))
    x = torch.randn(4, 6, 29, 5)
    there = permute(x, order)
    assert torch.equal(permute(there, inverse(order)), x)
    for b, length in enumerate(lengths or (29,) * 4):
        if not length:
            continue
        start = length - 24 if text_first else 0
        cells = x[b, :, start:start + 24]
        text = torch.cat([x[b, :, :start], x[b, :, start + 24:length]], 1)
        assert torch.equal(there[b, :, 24:length], text)  # text in its own order, behind the grid
        assert torch.equal(there[b, :, length:], x[b, :, length:])  # padding last, as it was
        for h, name in enumerate(PERMUTATIONS):
            axes = ["FHW".index(a) for a in name]
            assert torch.equal(there[b, h, :24], cells[h].view(*GRID, 5).permute(*axes, 3).reshape(24, 5))


@pytest.mark.parametrize("rows", [1, 1 << 22])
def test_block_statistics(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("looseleaf_paroattention.calibration.ELEMENTS", rows)
    query, key = torch.randn(2, 3, 43, 8, generator=torch.Generator().manual_seed(0))
    mass, incoherence = block_statistics(query, key, 0.7, 16)
    p = torch.softmax(query @ key.transpose(1, 2) * 0.7, -1)
    edges = [slice(0, 16), slice(16, 32), slice(32, 43)]
    for i, j in itertools.product(range(3), range(3)):
        part = p[:, edges[i], edges[j]]
        torch.testing.assert_close(mass[:, i, j], part.sum(2).mean(1))
        torch.testing.assert_close(incoherence[:, i, j], part.amax((1, 2)) / part.mean((1, 2)))
    torch.testing.assert_close(mass.sum(-1), torch.ones(3, 3))


def test_incoherence_of_uniform_and_empty_blocks() -> None:
    # All queries look at the first block only, alike at each of its keys.
    key = torch.zeros(1, 32, 4)
    key[:, :16, 0] = 1e4
    mass, incoherence = block_statistics(torch.ones(1, 32, 4), key, 1.0, 16)
    assert torch.equal(incoherence, torch.ones(1, 2, 2))
    assert mass[0].tolist() == [[1, 0], [1, 0]] and float(sparsity(mass, 1e-3)) == 0.5


def test_scores() -> None:
    sparse = torch.tensor([[0.2, 0.0], [0.6, 0.0]])
    incoherent = torch.tensor([[10.0, 9.0], [30.0, 3.0]])
    # the metrics disagree about the first head; nothing is empty in the second one
    assert scores(sparse, incoherent, 0.0).argmax(0).tolist() == [1, 0]
    assert scores(sparse, incoherent, 1.0).argmax(0).tolist() == [0, 1]
    torch.testing.assert_close(scores(sparse, incoherent, 0.5), torch.tensor(
        [[0.5 * 0.25 - 0.5 * 0.25, -0.5 * 0.75], [0.5 * 0.75 - 0.5 * 0.75, -0.5 * 0.25]]))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.3, 0.5, 1.0])
def test_masks_reach_their_density(density: float) -> None:
    mass = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    mask = block_masks(mass, density=density)
    kept = max(10, round(density * 100))
    assert torch.equal(mask.sum((2, 3)), torch.full((2, 3), kept)) and bool(mask.any(-1).all())
    best = mass.argmax(-1, keepdim=True)
    assert bool(mask.gather(-1, best).all())
    others = ~torch.zeros_like(mask).scatter_(-1, best, True)
    worst = mass.masked_fill(~(mask & others), torch.inf).amin((2, 3))
    assert bool((worst >= mass.masked_fill(mask, -torch.inf).amax((2, 3))).all())


def test_masks_by_threshold() -> None:
    mass = torch.tensor([[[0.6, 0.3, 0.1], [0.3, 0.35, 0.35], [0.1, 0.1, 0.8]]])
    assert block_masks(mass, threshold=0.3).int().tolist() == [[[1, 1, 0], [1, 1, 1], [0, 0, 1]]]
    # no row is left without a block; of equals the first
    assert block_masks(mass, threshold=0.9).int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]


def test_planted_heads_are_what_they_say() -> None:
    grid = (4, 8, 8)
    query, key, value = planted(grid, 0, ["WHF", "FHW"])
    assert query.shape == key.shape == value.shape == (1, 2, 256, 256)
    for h, name in enumerate(["WHF", "FHW"]):
        order = grid_order(name, grid)
        mass, _ = block_statistics(query[0, h:h + 1, order], key[0, h:h + 1, order], 1.0, 32)
        expected = expected_mass(name, name, grid, 32)
        torch.testing.assert_close(expected.sum(-1), torch.ones(8))
        assert float(mass[0].masked_fill(expected > 0, 0.0).sum(-1).max()) < 0.02
        assert float((mass[0] - expected).abs().sum(-1).mean()) < 0.2
    assert density_for(torch.tensor([[0.5, 0.0], [0.3, 0.2]]), 0.8).item() == 0.5
