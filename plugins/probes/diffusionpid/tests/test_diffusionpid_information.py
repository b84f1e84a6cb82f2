"""Information and its decomposition against exact denoisers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from looseleaf_diffusionpid import Mixture, decompose, known_case, logistic_samples, observe, with_errors

LOG2 = math.log(2)
TEXTS = ["", "a", "b", "a b"]
EXPECTED = {"xor": (0, 0, 0, 1), "copy": (1, 0, 0, 0), "unique": (0, 1, 0, 0), "and": (1, 0, 0, 1)}


def quadrature(denoiser: Any, x: Tensor, texts: list[str], *, low: float = -14, high: float = 18, levels: int = 320,
               nodes: int = 48) -> Any:
    """The observation by the trapezoid rule over log-SNR and Gauss-Hermite over noise; ``x`` has one or two numbers."""
    points, chances = np.polynomial.hermite_e.hermegauss(nodes)
    chances = chances / chances.sum()
    grid = torch.tensor(np.stack(np.meshgrid(*[points] * x.numel(), indexing="ij"), -1).reshape(-1, x.numel()))
    mass = torch.tensor(np.prod(np.stack(np.meshgrid(*[chances] * x.numel(), indexing="ij"), -1), -1).reshape(-1))
    keep = mass > 1e-14
    grid, mass = grid[keep], mass[keep]
    a = torch.linspace(low, high, levels, dtype=torch.float64)
    width = torch.full((levels,), (high - low) / (levels - 1), dtype=torch.float64)
    width[[0, -1]] /= 2
    n = levels * len(grid)
    return observe(denoiser, x, texts, a.repeat_interleave(len(grid)),
                   (width[:, None] * mass).flatten() * n, grid.view(-1, *x.shape).repeat(levels, 1, 1, 1), batch=40000)


def test_information_of_a_gaussian_is_exact() -> None:
    """One number; the context is a wide mixture, the texts are single Gaussians."""
    means = torch.tensor([[-1.5], [0.4], [1.0]], dtype=torch.float64).view(3, 1, 1, 1)
    denoiser = Mixture(means, 0.7, {"": [0.2, 0.5, 0.3], "y": [0, 0, 1], "w": [0, 1, 0]})
    for value in (-1.0, 0.3, 2.0):
        x = torch.full((1, 1, 1), value, dtype=torch.float64)
        seen = quadrature(denoiser, x, ["", "y", "w"])
        for n, text in enumerate(("", "y", "w")):
            exact = float(denoiser.log_prob(x[None], text) - denoiser.log_prob(x[None], ""))
            assert float((seen.weights * seen.standard[n]).mean()) == pytest.approx(exact, abs=1e-4)
            assert float(seen.standard_map[n].sum()) == pytest.approx(exact, abs=1e-4)
            assert float(seen.negative_log_likelihood()[n]) == pytest.approx(
                -float(denoiser.log_prob(x[None], text)), abs=1e-4)


def test_information_of_a_mixture_is_exact() -> None:
    """Two numbers, three components under every text."""
    means = torch.tensor([[-1.0, 0.5], [0.8, -0.2], [0.3, 1.2]], dtype=torch.float64).view(3, 2, 1, 1)
    denoiser = Mixture(means, 0.6, {"": [0.3, 0.3, 0.4], "y": [0.1, 0.8, 0.1]})
    x = torch.tensor([0.5, 0.1], dtype=torch.float64).view(2, 1, 1)
    seen = quadrature(denoiser, x, ["", "y"], nodes=24, levels=200)
    exact = float(denoiser.log_prob(x[None], "y") - denoiser.log_prob(x[None], ""))
    assert float((seen.weights * seen.standard[1]).mean()) == pytest.approx(exact, abs=1e-4)


def test_both_estimators_agree_on_average_and_not_point_by_point() -> None:
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    denoiser = Mixture(means, 0.5, {"": [0.5, 0.5], "y": [0.9, 0.1]})
    points, chances = np.polynomial.hermite_e.hermegauss(24)
    average, apart = torch.zeros(2, dtype=torch.float64), 0.0
    for mean, part in ((-1.0, 0.9), (1.0, 0.1)):
        for point, chance in zip(points, chances / chances.sum(), strict=True):
            if chance < 1e-9:
                continue
            x = torch.full((1, 1, 1), mean + 0.5 * point, dtype=torch.float64)
            seen = quadrature(denoiser, x, ["", "y"], levels=120, nodes=24)
            both = torch.stack([(seen.weights * v[1]).mean() for v in (seen.standard, seen.orthogonal)])
            average += part * chance * both
            apart = max(apart, abs(float(both[0] - both[1])))
            assert both[1] >= 0
    assert float(average[0]) == pytest.approx(float(average[1]), abs=1e-4)
    assert apart > 0.1


@pytest.mark.parametrize("case", EXPECTED)
def test_xor_copy_unique_and(case: str) -> None:
    """In multiples of log 2, by quadrature, at the picture that both inputs select."""
    denoiser = known_case(case)
    means = [float((s.weights * s.standard[n]).mean()) for s in [quadrature(
        denoiser, denoiser.means[0], TEXTS, nodes=24, levels=200)] for n in (1, 2, 3)]
    parts = decompose(*means)
    assert [float(p) / LOG2 for p in parts] == pytest.approx(EXPECTED[case], abs=1e-4)
    # the other measure with equal priors: the larger, where the smaller was
    parts = decompose(*means, "pointwise", (3.0, 3.0))
    assert float(parts.R) == pytest.approx(max(means[:2]), abs=1e-9)


@pytest.mark.parametrize("case", ["xor", "copy", "unique"])  # AND: "a" alone describes other pictures than "a b"
def test_the_orthogonal_estimator_by_samples(case: str) -> None:
    """As a probe measures it: averaged over pictures given both texts, within its own standard error."""
    denoiser, draw = known_case(case), torch.Generator().manual_seed(0)
    rows = []
    for x in denoiser.sample("a b", 30, draw):
        a, w = logistic_samples(200, clip=6, generator=draw)
        seen = observe(denoiser, x, TEXTS, a, w, torch.randn(200, 2, 1, 1, dtype=torch.float64, generator=draw),
                       batch=4000)
        rows.append(seen.contributions("orthogonal")[1:])
    found = with_errors(torch.cat(rows, 1))
    for name, expected in zip(("R", "U1", "U2", "S"), EXPECTED[case], strict=True):
        value, error = found[name]
        assert abs(value - expected * LOG2) < 4 * error + 0.01, (name, value, error)


def test_weights_of_the_importance_sampling() -> None:
    draw = torch.Generator().manual_seed(0)
    a, w = logistic_samples(200_000, loc=1, scale=2, clip=3, generator=draw)
    assert float(w.mean()) == pytest.approx(2 * 2 * 3, rel=5e-3)
    assert float(a.min()) >= -5 and float(a.max()) <= 7
    t = (a - 1) / 2  # the closed form of the weight
    closed = 2 * math.tanh(1.5) / (torch.sigmoid(t) * torch.sigmoid(-t))
    torch.testing.assert_close(w, closed)
    a, w = logistic_samples(200_000, limits=(-3.0, 20.0), generator=draw)
    assert float(w.mean()) == pytest.approx(10, rel=5e-3) and float(a.min()) >= -3
    with pytest.raises(ValueError, match=r"expected an interval that meets the log-SNRs 8\.00 to 9\.00"):
        logistic_samples(3, limits=(8.0, 9.0))


def seen_of(texts: list[str], batch: int = 32, count: int = 24, groups: int = 1) -> Any:
    draw = torch.Generator().manual_seed(1)
    means = torch.randn(3, 2, 4, 5, generator=draw)
    denoiser = Mixture(means, 0.5, {"": [0.4, 0.3, 0.3], "a": [1, 0, 0], "b": [0.1, 0.4, 0.5], "a b": [0.8, 0.2, 0],
                                    "b a": [0.8, 0.2, 0]})
    a, w = logistic_samples(count // groups, generator=draw)
    noise = torch.randn(count, 2, 4, 5, generator=draw)
    return observe(denoiser, means[0], texts, a.repeat_interleave(groups), w.repeat_interleave(groups), noise,
                   batch=batch, groups=groups)


def test_pixels_sum_to_the_picture() -> None:
    seen = seen_of(TEXTS, groups=3)
    for name in ("standard", "orthogonal"):
        torch.testing.assert_close(getattr(seen, f"{name}_map").sum((1, 2)), seen.contributions(name).mean(1))
    assert (seen.orthogonal_map >= 0).all()
    assert seen.contributions("standard").shape == (4, 8)


def test_the_empty_text_says_nothing() -> None:
    seen = seen_of(["", "", "a"])
    assert not seen.standard[1].any() and not seen.orthogonal_map[1].any() and seen.orthogonal[2].any()


def test_order_of_the_words_swaps_the_unique_parts() -> None:
    one, two = (with_errors(seen_of(texts).contributions("orthogonal")[1:])
                for texts in (TEXTS, ["", "b", "a", "b a"]))
    assert one["R"] == pytest.approx(two["R"]) and one["S"] == pytest.approx(two["S"])
    assert one["U1"] == pytest.approx(two["U2"]) and one["U2"] == pytest.approx(two["U1"])


@pytest.mark.parametrize("batch", [1, 4, 5, 400])
def test_a_batch_is_as_single_rows(batch: int) -> None:
    one, two = seen_of(TEXTS), seen_of(TEXTS, batch)
    torch.testing.assert_close(one.orthogonal, two.orthogonal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.standard_map, two.standard_map, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("redundancy", "surprisals"), [("min", (0.0, 0.0)), ("pointwise", (1.0, 6.0)),
                                                        ("pointwise", (2.0, 2.0))])
def test_identities_and_errors(redundancy: Any, surprisals: tuple[float, float]) -> None:
    found = with_errors(seen_of(TEXTS).contributions("standard")[1:], redundancy, surprisals)
    values = {name: value for name, (value, _) in found.items()}
    parts = decompose(values["I1"], values["I2"], values["I12"], redundancy, surprisals)
    assert [values[n] for n in parts._fields] == pytest.approx([float(p) for p in parts])
    assert values["R"] + values["U1"] == pytest.approx(values["I1"])
    assert sum(values[n] for n in parts._fields) == pytest.approx(values["I12"])


def test_standard_errors_fall_with_the_root_of_the_samples() -> None:
    denoiser, draw, n = known_case("xor", distance=1), torch.Generator().manual_seed(2), 25_600
    a, w = logistic_samples(n, generator=draw)
    noise = torch.randn(n, 2, 1, 1, dtype=torch.float64, generator=draw)
    every = observe(denoiser, denoiser.means[0], TEXTS, a, w, noise, batch=40_000).contributions("orthogonal")[1:]
    errors = []
    for count in (64, 256, 1024):
        runs = [with_errors(part)["S"] for part in every.split(count, 1)]
        spread = float(torch.tensor([value for value, _ in runs]).std())
        errors.append(math.sqrt(sum(error ** 2 for _, error in runs) / len(runs)))
        assert spread == pytest.approx(errors[-1], rel=0.4)  # the reported error is what estimates scatter by
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02) and errors[1] / errors[2] == pytest.approx(2, rel=0.02)


def test_errors() -> None:
    means = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"conditions\['a'\]: expected 2 non-negative weights of sum 1, got \[0.5\]"):
        Mixture(means, 1.0, {"": [0.5, 0.5], "a": [0.5]})
    with pytest.raises(ValueError, match='expected weights for the empty text ""'):
        Mixture(means, 1.0, {"a": [0.5, 0.5]})
    a, w = logistic_samples(4)
    noise = torch.zeros(4, 2, 1, 1)
    with pytest.raises(ValueError, match=r"condition: expected one of .*got 'c'"):
        observe(known_case("xor"), torch.zeros(2, 1, 1), ["", "c"], a, w, noise)
    with pytest.raises(ValueError, match=r"finite numbers \(C, H, W\), got NaN.*vae.to\(torch.float32\)"):
        observe(known_case("xor"), torch.full((2, 1, 1), torch.nan), TEXTS, a, w, noise)
    with pytest.raises(ValueError, match=r"expected finite numbers \(C, H, W\), got the shape \(2,\)"):
        observe(known_case("xor"), torch.zeros(2), TEXTS, a, w, noise)

    class Half:
        def eps(self, z: Tensor, log_snr: Tensor, condition: Any) -> Tensor:
            return z * torch.inf if log_snr.numel() % 2 else z[:, :1]

    with pytest.raises(ValueError, match=r"finite noise of the shape \(1, 2, 1, 1\), got NaN or infinity"):
        observe(Half(), torch.ones(2, 1, 1), ["a"], a[:1], w[:1], noise[:1])
    with pytest.raises(ValueError, match=r"finite noise of the shape \(4, 2, 1, 1\), got the shape \(4, 1, 1, 1\)"):
        observe(Half(), torch.ones(2, 1, 1), TEXTS, a[:1], w[:1], noise[:1])
