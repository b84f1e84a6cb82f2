"""The reproduction runs on stand-ins, and its measures are what they say."""

import dataclasses

import pytest
import torch

from looseleaf_mask_and_match import reproduction
from looseleaf_mask_and_match.reproduction import GRID, Expressions, Scale, lifts, ridge, roles

TINY = Scale(images=12, test=8, labels=(8,), steps=(2, 2, 2), batches=(4, 4, 4), stand_in=True)


def test_it_runs_and_reports(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    report = dataclasses.replace(reproduction.study, quick=TINY)(quick=True, seeds=1, progress=False)
    assert len(report.claims) == 26 and {c.verdict for c in report.claims} == {"not shown at this scale"}
    assert len(report.images) == 4 and "Readers" in report.to_text()


def test_symbols_come_in_the_order_of_drawing() -> None:
    assert roles(r"\frac{1}{x^{2+n}}-\sqrt{y_{3}}") == [
        ("1", False), ("\\frac", False), ("x", False), ("2", True), ("+", True), ("n", True), ("-", False),
        ("\\sqrt", False), ("y", False), ("3", False)]


def test_an_even_map_over_the_ink_has_lift_1() -> None:
    image = torch.zeros(2, 1, 64, 192)
    image[:, 0, 20:30, 20:60] = image[:, 0, 20:30, 100:120] = 1
    symbols = [[("7", 20, 20, 40, 10, False), ("+", 100, 20, 20, 10, True)]] * 2
    of = Expressions(image, ["7^{+}"] * 2, symbols)
    cells = reproduction.ink_in_cells(reproduction.ink_of(image), GRID)
    found = lifts(cells / cells.flatten(1).sum(1)[:, None, None], of)
    assert found["on ink"] == pytest.approx([1, 1]) and found["operators"] == pytest.approx([1, 1], abs=0.1)
    only = torch.zeros(2, *GRID)
    only[:, 1, 6] = 1  # the operator
    assert lifts(only, of)["exponents"] == pytest.approx([3, 3], abs=0.1)


def test_ridge_finds_a_line() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3
    torch.testing.assert_close(ridge(x, y, x, 1e-9).float(), y, atol=1e-3, rtol=0)
