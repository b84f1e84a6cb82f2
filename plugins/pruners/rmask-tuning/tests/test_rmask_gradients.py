"""The gradient rule, the straight-through gradient and the loss, against numbers and a plain reference."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from looseleaf import LearnedMasks, Threshold
from looseleaf_rmask_tuning import LabelledData, RMaskTuning, clip_task, keep_probability, pruner, regularized
from looseleaf_rmask_tuning.pruner import _Steps, groups, penalty
from looseleaf_vision import TemplatePrompt
from looseleaf_vision.testing import toy_clip, toy_pictures

torch.set_num_threads(1)


def steps_of(method: RMaskTuning, model: nn.Module, data: LabelledData, learned: LearnedMasks) -> _Steps:
    return _Steps(method, model, data, dict(zip(learned.places, learned.parameters(), strict=True)), None)


def batch_of(data: LabelledData, seed: int = 0) -> Any:
    targets = torch.tensor([data.classes.index(label) for label in data.labels])
    return SimpleNamespace(index=torch.arange(len(data)), targets=targets, step=0,
                           generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("a", "c", "p"), [(0.7, 0.3, 1.0), (0.2, -0.6, 0.25), (-0.5, 0.1, 0.8333333),
                                           (0.1, -0.1, 0.5), (-0.2, -0.9, 1.0)])
def test_the_probability_that_a_gradient_is_kept(a: float, c: float, p: float) -> None:
    a64, c64 = torch.tensor([a, c], dtype=torch.float64)
    assert float(keep_probability(a64, c64)) == pytest.approx(p, abs=1e-7)
    if p == 1.0:  # never dropped: the draw is below 1
        assert float(keep_probability(torch.tensor(a), torch.tensor(c))) == 1.0


def test_the_mean_gradient() -> None:
    a, c, draws = torch.full((400_000,), 0.2), torch.full((400_000,), -0.6), torch.Generator().manual_seed(0)
    found = regularized(a, c, 0.3, draws)
    assert found.unique().tolist() == [pytest.approx(0.14), pytest.approx(0.2)]
    assert float(found.double().mean()) == pytest.approx(0.155, abs=5e-4)
    assert regularized(a, c, 1.0, draws).unique().tolist() == [0.0, pytest.approx(0.2)]
    assert torch.equal(regularized(a, c, 0.0, draws), a)
    assert torch.equal(regularized(a, -3 * c, 1.0, draws), a)


@pytest.mark.parametrize("scores", [[[1.0, 1], [1, 1]], [[0.0, 1], [1, 0]], [[0.0, 0], [0, 0]]])
def test_the_gradient_passes_straight_through_whatever_the_mask(scores: list[list[float]]) -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2], [0.5, 4]])
    with LearnedMasks(layer, Threshold(0.005), ["weight"], {"weight": torch.tensor(scores)}) as learned:
        layer(torch.tensor([3.0, 1])).sum().backward()
        assert next(learned.parameters()).grad.tolist() == [[3, -2], [1.5, 4]]


def test_scores_at_the_threshold_are_removed() -> None:
    kept = RMaskTuning().selection().select({"w": torch.tensor([0.0049, 0.005, 0.0051])})
    assert kept["w"].tolist() == [False, False, True]


def test_q_k_and_v_have_one_norm() -> None:
    names = [f"layers.0.attn.{n}_proj.weight" for n in ("q", "k", "v", "out")]
    names += ["layers.1.query.weight", "conv.weight"]
    assert [len(group) for group in groups(names)] == [3, 1, 1, 1]
    scores = {name: torch.full((2, 2), 0.5) for name in names}
    assert float(penalty(scores)) == pytest.approx(math.sqrt(12 * 0.25) + 3 * 1.0)


def test_fresh_masks_are_the_unmasked_network() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    data, method = clip_task(clip, task), RMaskTuning()
    pixels = data.read(torch.arange(16), torch.Generator().manual_seed(0))
    with torch.no_grad():
        zero_shot = clip.logits(clip.images(pixels), clip.ensemble(task.classes, ["a photo of a {}."]))
    names = pruner.choose_weights(clip.model, within=data.within)
    with LearnedMasks(clip.model, method.selection(), names, method.init) as learned:
        assert torch.equal(data.logits(clip.model, pixels), zero_shot)
        steps, batch = steps_of(method, clip.model, data, learned), batch_of(data)
        loss, seen = steps.loss(batch, None), []
        plain = torch.autograd.grad(loss, list(steps.scores.values()), retain_graph=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pruner, "regularized", lambda a, c, *_: seen.append(c) or a)
            steps.backward(loss)
        assert all(not c.any() for c in seen) and len(seen) == len(names)
        assert all(torch.equal(s.grad, a) for s, a in zip(steps.scores.values(), plain, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_distance_is_that_of_the_paper(temperature: float) -> None:
    data, model = features()
    method = RMaskTuning(targets=("**",), temperature=temperature, reg_weight=0.0)
    draw = torch.Generator().manual_seed(3)
    start = {n: 0.005 + 0.01 * torch.randn(p.shape, generator=draw) for n, p in model.named_parameters() if p.ndim > 1}
    with LearnedMasks(model, method.selection(), start, start) as learned:
        steps, seen = steps_of(method, model, data, learned), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pruner, "regularized", lambda a, c, *_: seen.append(c) or a)
            steps.backward(steps.loss(batch_of(data), None))
        inputs = data.read(torch.arange(len(data)), torch.Generator())
        distance = -temperature ** 2 * (F.softmax(features()[1](inputs).float() / temperature, -1) * F.log_softmax(
            data.logits(model, inputs).float() / temperature, -1)).sum(1).mean()
        for ours, theirs in zip(seen, torch.autograd.grad(distance, list(learned.parameters())), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def features() -> tuple[LabelledData, nn.Module]:
    """A network in float64, so that rounding does not decide signs, and examples with labels."""
    from looseleaf.testing.models import seeded

    model = seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))).double()
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return LabelledData.of_tensors(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0)), model


def agreeing(a: Tensor, c: Tensor, strength: float, generator: Any = None) -> Tensor:
    """The rule without its draw."""
    return a * ((1 - strength) + strength * (keep_probability(a, c) > 0.5))


def reference(data: LabelledData, model: nn.Module, method: RMaskTuning) -> dict[str, Tensor]:
    """The official training loop in plain torch, each epoch one batch of everything."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    scores = {n: torch.full(p.shape, method.init, requires_grad=True) for n, p in weights.items() if p.ndim > 1}
    optimizer = torch.optim.Adam(scores.values(), lr=method.lr)
    inputs, labels = data.read(torch.arange(len(data)), torch.Generator()), torch.tensor(data.labels)
    teacher = functional_call(model, weights, (inputs,)).float()
    for epoch in range(method.epochs):
        bits = {n: (m > method.threshold).float() for n, m in scores.items()}
        masked = {n: weights[n] * (m + (bits[n] - m).detach()) for n, m in scores.items()}
        logits = functional_call(model, {**weights, **masked}, (inputs,)).float()
        a = F.cross_entropy(logits, labels) + method.reg_weight * sum(m.norm() for m in scores.values())
        c = -(F.softmax(teacher, -1) * F.log_softmax(logits, -1)).sum(1).mean()
        grads = [torch.autograd.grad(value, list(scores.values()), retain_graph=True) for value in (a, c)]
        for group in optimizer.param_groups:
            group["lr"] = method.lr * 0.5 * (1 + math.cos(math.pi * epoch / method.epochs))
        for score, first, second in zip(scores.values(), *grads, strict=True):
            score.grad = agreeing(first, second, method.gdr_lambda) if method.gdr else first
        optimizer.step()
    return {n: m.detach() for n, m in scores.items()}


@pytest.mark.parametrize("gdr", [True, False])
def test_training_is_that_of_a_plain_loop(gdr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner, "regularized", agreeing)
    data, model = features()
    method = RMaskTuning(targets=("**",), lr=2e-3, epochs=12, gdr=gdr, gdr_lambda=0.8)
    ours, theirs = method.score(model, data), reference(data, model, method)
    assert ours.keys() == theirs.keys()
    for name, scores in ours.items():
        torch.testing.assert_close(scores, theirs[name], rtol=1e-4, atol=1e-6)
    assert 0 < method.prune(model, data).sparsity() < 1


def test_without_strength_it_is_AMT_bit_for_bit() -> None:
    data, model = features()
    kinds = [RMaskTuning(targets=("**",), lr=2e-3, epochs=6, batch_size=8, **k)  # type: ignore[arg-type]
             for k in ({"gdr_lambda": 0.0}, {"gdr": False}, {"gdr_lambda": 1.0})]
    zero, amt, full = (kind.score(model, data) for kind in kinds)
    assert all(torch.equal(zero[n], amt[n]) for n in amt) and any(not torch.equal(full[n], amt[n]) for n in amt)


def test_weights_that_spoil_are_switched_off_and_those_that_serve_stay() -> None:
    draw = torch.Generator().manual_seed(0)
    side = torch.randint(2, (200,), generator=draw)
    noise = torch.randn(200, 1, generator=draw)
    inputs = torch.cat([2.0 * side[:, None] - 1 + 0.1 * noise, 5 * torch.randn(200, 1, generator=draw)], 1)
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # the second input only spoils
    data = LabelledData.of_tensors(inputs, side)

    def accuracy() -> float:
        return float((model(inputs).argmax(1) == side).float().mean())

    before = accuracy()
    masks = RMaskTuning(targets=("**",), lr=1e-3, epochs=20, gdr=False).prune(model, data)
    assert masks["0.weight"].tolist() == [[True, False], [True, False]]
    masks.apply(model)
    assert before < 0.7 and accuracy() == 1.0


def test_the_teacher_is_the_unmasked_network_with_random_reading_too() -> None:
    data, model = features()
    again = LabelledData(data.labels, data.classes, data.read, data.logits, random=True)
    method = RMaskTuning(targets=("**",), lr=2e-3, epochs=8, batch_size=24)
    once, each = method.score(model, data), method.score(model, again)
    for name in once:
        torch.testing.assert_close(once[name], each[name], rtol=1e-4, atol=1e-6)


def test_class_features_are_those_of_lower_case_names() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    upper = task.__class__(task.name, [e.__class__(e.inputs, e.target.upper()) for e in task.train],
                           classes=[c.upper() for c in task.classes])
    pixels = clip.read(task.train)
    rows = [clip_task(clip, t, template="a picture of {}", crop=None).logits(clip.model, pixels) for t in (task, upper)]
    assert torch.equal(*rows)
    expected = TemplatePrompt(task.classes, ("a picture of {}",)).on(clip).scores(task.train)
    torch.testing.assert_close(rows[0].log_softmax(-1), expected)
