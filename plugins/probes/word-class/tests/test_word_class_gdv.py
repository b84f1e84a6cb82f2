"""The measure: exact values, invariances, chance, conditions and bad input."""

import math

import numpy as np
import pytest
import torch

from looseleaf_word_class import Separation, conditional, gdv, gdv_reference, measure
from looseleaf_word_class.separation import distances, scaled

EXACT = 1e-10


def blobs(seed=0, count=60, dims=5, classes=3, gap=1.0):
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % classes)
    return draw.normal(size=(count, dims)) + gap * draw.normal(size=(classes, dims))[labels], labels


def test_two_point_classes_give_minus_one():
    assert gdv(np.array([[0.0, 1], [0, 1], [3, 5], [3, 5]]), [0, 0, 1, 1]) == pytest.approx(-1, abs=EXACT)


@pytest.mark.parametrize(("classes", "value"), [(2, -1.0), (3, -0.8660254037844386), (10, -0.7453559924999299)])
def test_one_hot_point_classes_have_the_closed_form(classes, value):
    points = np.repeat(np.eye(classes), 4, 0)
    assert gdv(points, np.repeat(np.arange(classes), 4)) == pytest.approx(value, abs=EXACT)
    assert value == pytest.approx(-math.sqrt(classes / (2 * (classes - 1))), abs=EXACT)


def test_worked_example_in_one_dimension():
    points, labels = np.array([[0.0], [2], [6], [8]]), ["a", "a", "b", "b"]
    separation = Separation(points)
    intra, inter = separation._means(np.array([0, 0, 1, 1]), None)
    assert intra[0].mean() == pytest.approx(0.31622776601683794, abs=EXACT)
    assert inter[0, 0, 1] == pytest.approx(0.9486832980505138, abs=EXACT)
    assert gdv(points, labels) == pytest.approx(-0.6324555320336759, abs=EXACT)
    constant = np.concatenate([points, np.full((4, 1), 7.0)], 1)
    assert gdv(constant, labels) == pytest.approx(-0.6324555320336759 / math.sqrt(2), abs=EXACT)


def test_every_class_weighs_the_same():
    value = gdv(np.array([[0.0], [1], [2], [3], [10], [11]]), [0, 0, 0, 0, 1, 1])
    assert value == pytest.approx(-0.8813619, abs=1e-7)
    assert value == pytest.approx(gdv_reference(np.array([[0.0], [1], [2], [3], [10], [11]]), [0, 0, 0, 0, 1, 1]),
                                  abs=EXACT)


@pytest.mark.parametrize("classes", [2, 4])
def test_equals_the_reference_in_numpy_and_torch_and_in_chunks(classes):
    points, labels = blobs(classes=classes)
    expected = gdv_reference(points, labels)
    assert gdv(points, labels) == pytest.approx(expected, abs=EXACT)
    assert gdv(torch.from_numpy(points), torch.from_numpy(labels)) == pytest.approx(expected, abs=EXACT)
    for chunk in (1, 7, 60):
        assert Separation(points, chunk=chunk)(labels)[0] == pytest.approx(expected, abs=EXACT)


def test_distances_that_are_not_kept_are_the_same(monkeypatch):
    points, labels = blobs()
    expected = Separation(points)(labels)[0]
    monkeypatch.setattr("looseleaf_word_class.separation.KEPT", 10)
    assert Separation(points, chunk=16)(labels)[0] == pytest.approx(expected, abs=EXACT)


def test_close_points_keep_their_digits():
    draw = np.random.default_rng(0)
    far = torch.from_numpy(draw.normal(size=(200, 8)))
    near = far.clone()
    near[3] += 1e-9
    points = torch.cat([far, near[3:4]]) + 5.0
    exact = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances(points, points) - exact).abs().max() < 1e-12


def test_shift_scale_order_and_repetition_change_nothing_but_rotation_does():
    points, labels = blobs(gap=2.0)
    value = gdv(points, labels)
    for same in (points * [1, 20, 0.1, 3, 5] + [9, 0, -4, 1, 2], points[:, ::-1].copy(), np.tile(points, 3)):
        assert gdv(same, labels) == pytest.approx(value, abs=EXACT)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    assert abs(gdv(points @ rotation, labels) - value) > 1e-4


def test_pairs_have_the_gdv_as_their_mean():
    points, labels = blobs(classes=4)
    names = np.array(["noun", "verb", "det", "adp"])[labels]
    classes, matrix = gdv(points, names, pairwise=True)
    assert classes == sorted(set(names))
    assert matrix[np.triu_indices(4, 1)].mean() == pytest.approx(gdv(points, names), abs=EXACT)
    assert np.array_equal(matrix, matrix.T)
    assert np.diag(matrix).tolist() == [0] * 4


def test_pairs_of_two_classes_are_the_gdv():
    points, labels = blobs(classes=2)
    assert gdv(points, labels, pairwise=True).matrix[0, 1] == pytest.approx(gdv(points, labels), abs=EXACT)


def test_a_constant_dimension_of_any_type_is_zero_and_counts():
    draw = np.random.default_rng(0)
    points = draw.normal(size=(40, 3))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        both = torch.cat([torch.from_numpy(points), torch.full((40, 1), 0.1)], 1).to(dtype)
        values, dead = scaled(both)
        assert dead == 0.25
        assert values[:, 3].abs().max() == 0
        assert values.dtype == torch.float64
        assert values[:, :3].square().mean(0).numpy() == pytest.approx(np.full(3, 0.25), abs=EXACT)


def test_permuted_labels_have_mean_zero_and_a_real_class_has_a_small_p():
    points, labels = blobs(count=120, gap=1.5)
    found = measure(Separation(points), labels, np.arange(120), permutations=200, seed=1)
    assert abs(found.null) < 0.003
    assert found.value < found.null_low
    assert found.p == pytest.approx(1 / 201)
    assert found.interval.low < found.value < found.interval.high
    noise = measure(Separation(np.random.default_rng(5).normal(size=(120, 5))), labels, np.arange(120), seed=1)
    assert noise.p > 0.05


def test_permutation_p_values_of_noise_are_uniform():
    ps = []
    for seed in range(60):
        points, labels = blobs(seed, count=30, gap=0.0)
        ps.append(measure(Separation(points), labels, np.arange(30), permutations=39, samples=1, seed=seed).p)
    assert 0.35 < np.mean(ps) < 0.65
    assert np.mean(np.array(ps) <= 0.05) < 0.15


def test_a_bootstrap_weight_is_a_repetition_without_distance_to_itself():
    points, labels = blobs(count=12, classes=2)
    weights = np.random.default_rng(2).integers(0, 3, 12).astype(float)
    separation = Separation(points)
    x = separation.points.numpy()
    rows = np.repeat(np.arange(12), weights.astype(int))
    means = []
    for a, b in ((0, 0), (1, 1), (0, 1)):
        pairs = [(i, j) for n, i in enumerate(rows) for m, j in enumerate(rows)
                 if labels[i] == a and labels[j] == b and n != m]
        # two repetitions of a point are 0 apart and count in the sum and in the number of pairs of its weight's square
        own = sum(w * w for w, label in zip(weights, labels, strict=True) if label == a) if a == b else 0
        total = sum(np.linalg.norm(x[i] - x[j]) for i, j in pairs)
        means.append(total / (weights[labels == a].sum() * weights[labels == b].sum() - own))
    expected = ((means[0] + means[1]) / 2 - means[2]) / math.sqrt(5)
    assert separation(labels, weights[None])[0] == pytest.approx(expected, abs=EXACT)


def test_points_of_one_text_are_drawn_together():
    points, labels = blobs(count=120, gap=1.0)
    alone = measure(Separation(points), labels, np.arange(120), permutations=1)
    together = measure(Separation(np.repeat(points, 4, 0)), np.repeat(labels, 4), np.repeat(np.arange(120), 4),
                       permutations=1)
    width = alone.interval.high - alone.interval.low
    assert together.interval.high - together.interval.low == pytest.approx(width, rel=0.25)


def test_a_condition_takes_out_what_it_explains():
    values, ps = [], []
    for seed in range(12):
        draw = np.random.default_rng(seed)
        condition = draw.integers(0, 4, 400)
        labels = (condition + (draw.random(400) < 0.3) * draw.integers(0, 4, 400)) % 4  # it follows the condition
        copied = np.eye(4)[condition] + 0.1 * draw.normal(size=(400, 4))
        known = np.eye(4)[labels] + 0.1 * draw.normal(size=(400, 4))
        assert gdv(copied, labels) < -0.2
        found = conditional(copied, labels, condition, np.arange(400), samples=20, seed=1)
        values.append(found.value)
        ps.append(found.p)
    assert abs(np.mean(values)) < 0.01
    assert 0.2 < np.mean(ps) < 0.8
    real = conditional(known, labels, condition, np.arange(400), seed=1)
    assert real.value < -0.5
    assert real.p < 0.02
    assert real.interval.high < 0


def test_a_representation_that_a_condition_determines_has_exactly_zero():
    condition, labels = np.repeat([0, 1], 20), np.tile([0, 1], 20)
    found = conditional(np.eye(2)[condition], labels, condition, np.arange(40))
    assert found.value == 0
    assert found.p == 1


def test_no_condition_with_two_classes_is_none():
    labels = np.repeat([0, 1], 5)
    assert conditional(np.eye(2)[labels], labels, labels, np.arange(10)) is None


@pytest.mark.parametrize(("points", "labels", "message"), [
    (np.zeros((4, 2)), [1, 1, 1, 1], "two classes or more, got 1"),
    (np.zeros((3, 2)), ["a", "a", "b"], "got one of b.*drop_small=True"),
    (np.array([[0.0], [np.nan], [1], [2]]), [0, 0, 1, 1], "finite values, got NaN or infinity in 1 of 4"),
    (np.zeros((4, 2)), [0, 1], "a label for each of 4 points, got 2"),
    (np.zeros(4), [0, 0, 1, 1], r"points \(N, D\), got the shape \(4,\)"),
    (np.zeros((0, 3)), [], r"got the shape \(0, 3\)"),
])
def test_bad_input_is_refused(points, labels, message):
    with pytest.raises(ValueError, match=message):
        gdv(points, labels)


def test_small_classes_can_be_dropped_and_are_named():
    points = np.array([[0.0], [2], [6], [8], [100]])
    with pytest.warns(UserWarning, match="left out: rare"):
        assert gdv(points, ["a", "a", "b", "b", "rare"], drop_small=True) == pytest.approx(-0.6324555320336759)


def test_labels_of_any_kind_and_integer_points():
    points = np.array([[0], [2], [6], [8]])
    assert gdv(points, ["a", "a", 1, 1]) == pytest.approx(-0.6324555320336759, abs=EXACT)
    assert gdv(points, [True, True, False, False]) == pytest.approx(-0.6324555320336759, abs=EXACT)
