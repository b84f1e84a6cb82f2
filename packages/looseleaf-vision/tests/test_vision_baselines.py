"""The baselines pass the conformance kit, learn, and are what their papers say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from looseleaf import Prompt
from looseleaf.testing import conformance_tests
from looseleaf_vision import (
    IMAGENET_TEMPLATES,
    CoCoOp,
    CoOp,
    KgCoOp,
    LinearProbe,
    MaPLe,
    Recipe,
    TemplateEnsemble,
    TextContext,
    ZeroShot,
    few_shot_task,
)
from looseleaf_vision.baselines import logistic
from looseleaf_vision.testing import toy_clip, toy_pictures

test_coop_conforms = conformance_tests(CoOp)
test_cocoop_conforms = conformance_tests(CoCoOp)
test_kgcoop_conforms = conformance_tests(KgCoOp)
test_maple_conforms = conformance_tests(MaPLe)
test_zero_shot_conforms = conformance_tests(ZeroShot)
test_template_ensemble_conforms = conformance_tests(TemplateEnsemble)
test_linear_probe_conforms = conformance_tests(LinearProbe)


def test_learned_context_beats_the_hand_written_on_what_it_learns() -> None:
    clip, task = toy_clip(layers=2, width=48), toy_pictures(4, each=8)
    plain = ZeroShot().optimize(task, clip)
    learned = CoOp(n_ctx=4, class_specific=True, epochs=40, lr=0.05, crop=None).optimize(task, clip, progress=False)
    scores = [task.evaluate(p.on(clip)).score for p in (plain, learned)]
    assert scores[1] > scores[0] + 0.2, scores


def test_published_recipes() -> None:
    clip, task = toy_clip(), toy_pictures()
    sixteen = few_shot_task("t", toy_pictures(2, each=16).train, [], shots=16, seed=0)
    assert CoOp().recipe(sixteen).epochs == 200 and CoOp().recipe(task).epochs == 100
    assert CoCoOp().recipe(task) == Recipe(epochs=10, batch_size=1)
    assert KgCoOp().recipe(task) == Recipe(epochs=100) and KgCoOp().weight == 8.0
    assert MaPLe().recipe(task) == Recipe(epochs=5, batch_size=4, lr=0.0035)
    assert MaPLe().spec(clip).text_depth == 3  # of nine, the smaller tower has three
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    assert all(t.count("{}") == 1 and t.endswith(".") for t in IMAGENET_TEMPLATES)


def test_maple_begins_as_the_plain_prompt_in_the_text_tower() -> None:
    clip = toy_clip()
    learner = dataclasses.replace(MaPLe(depth=1)).spec(clip).build(clip, 2)
    assert isinstance(learner.context, TextContext) and learner.context.length == 2
    assert torch.equal(learner.class_features(clip, ["cat", "dog"]),
                       clip.texts(["a photo of a cat.", "a photo of a dog."]))


def test_kgcoop_without_weight_is_coop_from_the_same_start() -> None:
    clip, task = toy_clip(), toy_pictures()
    settings = {"epochs": 3, "lr": 0.05, "crop": None}
    ours = KgCoOp(weight=0.0, **settings).optimize(task, clip, progress=False)
    coop = CoOp(ctx_init="a photo of a", **settings).optimize(task, clip, progress=False)
    assert torch.equal(ours.tensors["context.context"], coop.tensors["context.context"])
    near = KgCoOp(weight=1000.0, **{**settings, "lr": 1e-4}).optimize(task, clip, progress=False)
    hand = clip.ensemble(task.classes, ["a photo of a {}."])

    @torch.no_grad()
    def cosine(prompt: Prompt) -> float:
        return float((prompt.learner(clip).class_features(clip, task.classes) * hand).sum(-1).mean())

    assert cosine(near) > cosine(coop)


def test_a_start_is_gone_on_from() -> None:
    clip, task = toy_clip(), toy_pictures()
    coop = CoOp(n_ctx=4, epochs=2, lr=0.05, crop=None)
    first = coop.optimize(task, clip, progress=False)
    second = coop.optimize(task, clip, start=first, progress=False)
    assert second.info["history"][0] > first.info["history"][0]
    with pytest.raises(ValueError, match="of the kind"):
        CoCoOp().optimize(task, clip, start=first, progress=False)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=draw, dtype=torch.float64), torch.randint(0, 3, (60,), generator=draw)
    for c in (100.0, 1.0, 0.01):
        weight, bias = logistic(x, y, 3, c)
        theirs = linear.LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x.numpy(), y.numpy())
        ours = (x @ weight.T + bias).softmax(-1)
        torch.testing.assert_close(ours, torch.from_numpy(theirs.predict_proba(x.numpy())), atol=2e-4, rtol=0)
