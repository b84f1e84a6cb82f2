"""The estimate of the essential sparsity, and the sweep that feeds it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from looseleaf import Report
from looseleaf.testing.models import small_network
from looseleaf_essential_sparsity import Curve, MagnitudePruner, essential_sparsity, sparsity_curve, sparsity_sweep
from looseleaf_essential_sparsity.sweep import masked_metric
from looseleaf_tickets.knee import relative_drops

LEVELS = [x / 10 for x in range(10)]


def cliff(at: float, batches: int = 20, noise: float = 0.0) -> Curve:
    """Accuracy 0.8 up to ``at``, then down by 1.5 a unit of sparsity."""
    rng = np.random.default_rng(0)
    offsets = rng.normal(0, noise, batches)
    return Curve(LEVELS, [[0.8 - max(0.0, s - at) * 1.5 + o for o in offsets] for s in LEVELS], "accuracy")


@pytest.mark.parametrize("at", [0.2, 0.4, 0.6])
def test_a_cliff_is_found(at: float) -> None:
    knee = essential_sparsity(cliff(at))
    assert knee.within[0.01].value == at and knee.knee.value == at and knee.dense == pytest.approx(0.8)
    assert knee.step == pytest.approx(0.1)


def test_tolerance_moves_it() -> None:
    curve = Curve([0.0, 0.1, 0.2, 0.3], [[1.0], [0.995], [0.96], [0.5]])
    found = essential_sparsity(curve, (0.001, 0.01, 0.05, 0.6)).within
    assert [i.value for i in found.values()] == [0.0, 0.1, 0.2, 0.3]
    assert all(i.low is None for i in found.values())  # one batch carries no uncertainty


def test_perplexity_gets_worse_upwards() -> None:
    losses = [2.0, 2.0, 2.005, 2.04, 3.0, 6.0, 9.0]
    curve = Curve(LEVELS[:7], [[x, x + 0.1] for x in losses], "perplexity", False, "exp-mean")
    found = essential_sparsity(curve)
    assert found.within[0.01].value == 0.2 and found.within[0.05].value == 0.3 and found.knee.value == 0.4
    assert found.dense == pytest.approx(math.exp(2.05))
    assert relative_drops(curve)[4] == pytest.approx(math.e - 1)


def test_interval_covers_the_value_and_is_reproducible() -> None:
    curve = cliff(0.4, noise=0.05)
    rng = np.random.default_rng(1)
    curve.batches = [[v + float(rng.normal(0, 0.02)) for v in row] for row in curve.batches]
    one, two = essential_sparsity(curve, seed=3), essential_sparsity(curve, seed=3)
    assert one == two
    low, high = one.within[0.05].low, one.within[0.05].high
    assert low is not None and high is not None and low <= 0.4 <= high + 0.1


def test_flat_has_no_knee_and_tolerates_everything() -> None:
    found = essential_sparsity(Curve(LEVELS, [[0.5, 0.6]] * 10))
    assert found.knee.value is None and found.within[0.01].value == 0.9 and "none" in str(found.knee)


def test_a_straight_line_has_no_knee() -> None:
    assert essential_sparsity(Curve(LEVELS, [[1 - s] for s in LEVELS])).knee.value is None


def test_levels_that_broke_the_model_count_as_worst() -> None:
    curve = Curve([0.0, 0.2, 0.4, 0.6, 0.8], [[2.0, 2.1], [2.0, 2.1], [2.1, 2.2], [6.0, 6.1], [math.nan, 9.0]],
                  higher_is_better=False)
    found = essential_sparsity(curve)
    assert found.within[0.01].value == 0.2 and found.knee.value == 0.4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=10, max_size=10))
def test_any_curve(values: list[float]) -> None:
    curve = Curve(LEVELS, [[v, v] for v in values])
    found = essential_sparsity(curve, resamples=20)
    assert found.within[0.01].value is not None and found.within[0.05].value is not None
    assert found.within[0.01].value <= found.within[0.05].value
    assert found.knee.value is None or found.knee.value in LEVELS


@pytest.mark.parametrize("levels, batches", [
    ([0.0], [[1.0]]), ([0.0, 0.1], [[1.0]]), ([0.1, 0.2], [[1.0], [1.0]]), ([0.0, 0.2, 0.1], [[1.0]] * 3),
    ([0.0, 1.0], [[1.0]] * 2), ([0.0, 0.1], [[], []]), ([0.0, 0.1], [[1.0], [1.0, 2.0]]),
    ([0.0, 0.1], [[math.nan], [1.0]])])
def test_bad_curves(levels: list[float], batches: list[list[float]]) -> None:
    with pytest.raises(ValueError):
        Curve(levels, batches)


def test_bad_estimates() -> None:
    with pytest.raises(ValueError, match="mean"):
        Curve([0.0, 0.1], [[1.0], [1.0]], mean="median")  # type: ignore[arg-type]
    for tolerances in ((), (0.0,), (-1.0,), (math.nan,)):
        with pytest.raises(ValueError, match="tolerances"):
            essential_sparsity(cliff(0.4), tolerances)
    with pytest.raises(ValueError, match="resamples"):
        essential_sparsity(cliff(0.4), resamples=-1)
    assert essential_sparsity(cliff(0.4), resamples=0).knee.low is None


class Sweep:
    """Evaluation of a small network against its own dense outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.x = torch.randn(4, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.dense = [model(x) for x in self.x]

    def __call__(self, model: nn.Module) -> list[float]:
        with torch.no_grad():
            return [1 / (1 + float((model(x) - d).norm() / d.norm())) for x, d in zip(self.x, self.dense)]


def test_sweep_reports_and_leaves_the_model_dense() -> None:
    model = small_network().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = sparsity_sweep(model, Sweep(model), [0.2, 0.5, 0.9], name="likeness", progress=False, pruners={
        "global": MagnitudePruner(), "layer": MagnitudePruner(scope="layer"), "2:4": MagnitudePruner(pattern="2:4")})
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert len(report.tables[0].rows) == 4 + 4 + 1 and len(report.figures[0].series) == 3
    assert report.tables[0].rows[0][2] == 1.0 and len(report.tables[1].rows) == 2
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()


def test_sweep_of_patterns_alone() -> None:
    model = small_network().eval()
    report = sparsity_sweep(model, Sweep(model), pruners={"2:4": MagnitudePruner(pattern="2:4")}, progress=False)
    assert [row[0] for row in report.tables[0].rows] == ["dense", "2:4"]


def test_sweep_takes_single_numbers_and_adds_dense() -> None:
    model = small_network().eval()
    whole = Sweep(model)
    curve = sparsity_curve(model, lambda m: sum(whole(m)) / 4, [0.5], progress=False)
    assert curve.levels == [0.0, 0.5] and curve.values()[0] == 1.0


def test_an_exception_in_the_evaluation_leaves_the_model_dense() -> None:
    model = small_network()
    keys = list(model.state_dict())

    def failing(m: nn.Module) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        masked_metric(model, failing, MagnitudePruner())
    assert list(model.state_dict()) == keys


def test_bad_sweeps() -> None:
    model = small_network()
    calls: list[int] = []
    with pytest.raises(ValueError, match="sparsity"):
        sparsity_curve(model, lambda m: calls.append(1) or 0.0, [0.5, 1.0])  # type: ignore[func-returns-value]
    assert not calls, "a bad level must be found before anything is measured"
    with pytest.raises(ValueError, match="above 0"):
        sparsity_curve(model, lambda m: 0.0, [])
    with pytest.raises(ValueError, match="not a number"):
        sparsity_curve(model, lambda m: math.nan, [0.5])
