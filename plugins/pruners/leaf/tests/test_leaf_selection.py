"""The rule, and runs and counterfactuals made of what it removes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from looseleaf_leaf import PairCollator, confounding, counterfactuals, runs, training_pairs
from looseleaf_leaf.sensitivity import min_max

INF = math.inf


def select(rows: list[list[float]], **fields: Any) -> list[list[int]]:
    """Removed places of each row."""
    gone = confounding(torch.tensor(rows), **fields)
    for row, places in zip(rows, gone, strict=True):
        count = sum(math.isfinite(x) for x in row)
        most = count if fields.get("tau") is not None else int(fields.get("q", 0.1) * count) + 1
        assert int(places.sum()) <= max(0, min(count - 1, most))
    return [row.nonzero().flatten().tolist() for row in gone]


def test_white_space_counts_in_the_quantile_and_stays() -> None:
    """Figures of a sample of ten tokens, two of them new lines, worked out as the authors' code does."""
    student = torch.tensor([[.2, .3, 2.0, .6, .3, .5, .4, 1.8, .9, 1.0]])
    teacher = torch.tensor([[.2, .4, .3, .9, .3, .8, .4, .2, .5, .3]])
    space = torch.tensor([[n in (2, 7) for n in range(10)]])
    everything = torch.ones_like(space)
    scores = min_max(teacher, everything) - min_max(student, everything)
    assert confounding(scores, q=0.1).nonzero()[:, 1].tolist() == [2, 7]
    assert not confounding(scores, q=0.1, never=space).any()
    assert confounding(scores, q=0.3, never=space).nonzero()[:, 1].tolist() == [9]


@pytest.mark.parametrize("count", [2, 5, 10, 19, 20, 21, 40, 100])
@pytest.mark.parametrize("q", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_quantile_rule_against_its_definition(count: int, q: float) -> None:
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    scaled = (values - values.min()) / (values.max() - values.min())
    threshold = min(np.sort(scaled)[int(count * q)], np.float32(0.5))
    expected = np.nonzero(scaled <= threshold)[0].tolist()
    if len(expected) == count:
        expected = []
    with_rest = [INF, *values.tolist(), INF, INF]
    assert select([with_rest], q=q) == [[p + 1 for p in expected]]


def test_the_cap() -> None:
    row = [0.0, 0.6, 0.7, 0.8, 1.0]
    assert select([row], q=0.6) == [[0]] and select([row], q=0.6, cap=0.75) == [[0, 1, 2]]
    assert select([row], q=0.6, cap=0.0) == [[0]]


def test_the_papers_variant() -> None:
    row = [5.0, 6.0, 7.0, INF, 9.0]  # scaled: 0, .25, .5, 1
    assert select([row], tau=0.3) == [[0, 1]] and select([row], tau=0.0) == [[0]]
    assert select([row], tau=0.99) == [[0, 1, 2]], "q and cap play no part"


def test_each_row_for_itself() -> None:
    assert select([[1.0, 2.0, 3.0], [30.0, 20.0, 10.0]]) == [[0], [2]]


def test_ties_go_in_order_and_never_too_many() -> None:
    assert select([[1.0, 0.0, 0.0, 0.0, 1.0]], q=0.2) == [[1, 2]]


@pytest.mark.parametrize("row", [[INF, INF], [0.3, INF], [0.4, 0.4, 0.4, INF]])
@pytest.mark.parametrize("fields", [{}, {"q": 0.9}, {"tau": 0.5}])
def test_a_row_in_which_nothing_stands_out_stays(row: list[float], fields: dict[str, float]) -> None:
    assert select([row], **fields) == [[]]


def test_a_row_never_loses_all_its_tokens() -> None:
    assert select([[0.1, 0.2, INF]], q=0.9, cap=1.0) == [[]] and select([[0.1, 0.2]], q=0.4, cap=1.0) == [[0]]


@pytest.mark.parametrize("scores", [{}, torch.ones(3), torch.ones(2, 2, dtype=torch.int64),
                                    torch.full((1, 2), math.nan), torch.full((1, 2), -INF)])
def test_bad_scores(scores: Any) -> None:
    with pytest.raises(ValueError, match=r"scores: expected .*, got"):
        confounding(scores)


# ------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("seed", range(20))
def test_runs_partition_the_mask(seed: int) -> None:
    removed = torch.rand(30, generator=torch.Generator().manual_seed(seed)) < 0.4
    spans = runs(removed)
    together = torch.zeros_like(removed)
    for start, stop in spans:
        assert start < stop and removed[start:stop].all() and not together[start:stop].any()
        assert start == 0 or not removed[start - 1], "a run begins where removal begins"
        assert stop == 30 or not removed[stop]
        together[start:stop] = True
    assert torch.equal(together, removed) and spans == sorted(spans)


def test_runs_of_nothing_and_all() -> None:
    assert runs(torch.zeros(4, dtype=torch.bool)) == [] and runs(torch.ones(4, dtype=torch.bool)) == [(0, 4)]


# ------------------------------------------------------------------------------------------- counterfactuals
def batch(left: bool = False) -> dict[str, Tensor]:
    """Row 0: template 1, instruction 2 to 6, response 7 8. Row 1: shorter, padded."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 7, 8, 0, 0]])
    labels = torch.tensor([[-100] * 6 + [7, 8], [-100] * 4 + [7, 8, -100, -100]])
    free = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]).bool()
    made = {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long(), "instruction_mask": free}
    if left:
        for key, value in made.items():
            made[key] = torch.stack([value[0], value[1].roll(2)])
    return made


def keeping(*gone: tuple[int, int]) -> Tensor:
    keep = torch.ones((2, 8), dtype=torch.bool)
    for row, at in gone:
        keep[row, at] = False
    return keep


def test_one_counterfactual_for_each_run() -> None:
    made = counterfactuals(batch(), keeping((0, 1), (0, 2), (0, 4), (1, 3)))
    assert made.source.tolist() == [0, 0, 1] and made.spans == [[(1, 3)], [(4, 5)], [(3, 4)]]
    assert made.batch["input_ids"].tolist() == [[1, 4, 5, 6, 7, 8, 0], [1, 2, 3, 4, 6, 7, 8], [1, 2, 3, 7, 8, 0, 0]]
    assert made.batch["labels"].tolist()[0] == [-100, -100, -100, -100, 7, 8, -100]
    assert made.batch["attention_mask"].tolist()[2] == [1, 1, 1, 1, 1, 0, 0]
    assert made.batch["instruction_mask"].tolist()[1] == [False, True, True, True, True, False, False]


def test_collective_pruning() -> None:
    made = counterfactuals(batch(), keeping((0, 1), (0, 2), (0, 4)), collective=True)
    assert made.batch["input_ids"].tolist() == [[1, 4, 6, 7, 8]] and made.spans == [[(1, 3), (4, 5)]]


def test_left_padding_is_taken_off() -> None:
    keep = keeping((1, 4))
    made = counterfactuals(batch(left=True), keep)
    assert made.batch["input_ids"].tolist() == [[1, 2, 4, 7, 8]] and len(made) == 1


def test_nothing_removed() -> None:
    made = counterfactuals(batch(), keeping())
    assert len(made) == 0 and made.batch["input_ids"].shape[0] == 0
    pairs = training_pairs(batch(), made)
    assert [p["input_ids"] == p["counterfactual_input_ids"] for p in pairs] == [True, True]


def test_pairs_and_their_collator() -> None:
    pairs = training_pairs(batch(), counterfactuals(batch(), keeping((0, 1), (0, 4))))
    assert [p["counterfactual_input_ids"] for p in pairs] == [
        [1, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 6, 7, 8], [1, 2, 3, 4, 7, 8]]
    out = PairCollator(pad_token_id=9)(pairs)
    assert out["input_ids"].shape == (3, 8) and out["counterfactual_labels"].shape == (3, 7)
    assert out["input_ids"][2].tolist() == [1, 2, 3, 4, 7, 8, 9, 9] and out["labels"][2, -1] == -100
    assert out["attention_mask"].sum().item() == 22
    plain = PairCollator()([{"input_ids": [1, 2], "labels": [-100, 2]}])
    assert sorted(plain) == ["attention_mask", "input_ids", "labels"]


@pytest.mark.parametrize("keep, word", [
    (torch.ones(2, 7, dtype=torch.bool), "shape"), (torch.ones(2, 8), "bool"), (keeping((0, 0)), "instruction"),
    (keeping((1, 7)), "instruction"), (keeping((0, 6)), "instruction")])
def test_masks_of_something_else(keep: Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        counterfactuals(batch(), keep)
