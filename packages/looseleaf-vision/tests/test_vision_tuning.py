"""Learning vectors: what is changed and what is not, resuming, budgets, and the numbers of the recipe."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from looseleaf import Budget, LearnedMasks, Prompt, Threshold, UnsupportedModelError
from looseleaf.resume import StateError
from looseleaf.testing.common import assert_unchanged, mixed_modes, same_random_state, snapshot
from looseleaf_vision import PixelFrame, PromptSpec, Recipe, TemplatePrompt, VisionPrompt, tune
from looseleaf_vision.testing import toy_classifier, toy_clip, toy_pictures

SHORT = Recipe(epochs=4, batch_size=6, lr=0.05, crop=None)
SPECS = {
    "coop": PromptSpec(length=4), "class": PromptSpec("class", length=3),
    "cocoop": PromptSpec("conditional", start="a photo of a"), "vpt": PromptSpec(None, vision="own", vision_depth=2),
    "both": PromptSpec(length=2, vision="own"),
    "maple": PromptSpec(length=2, text_depth=3, vision="coupled", vision_depth=3)}


def learn(spec: PromptSpec, recipe: Recipe = SHORT, seed: int = 0, clip=None, **options):
    clip, task = clip or toy_clip(), toy_pictures(3)
    learner = spec.build(clip, 3, seed)

    def loss(batch, model):
        seen = {"pixels": batch.pixels} if learner.changes_images else {"features": batch.features}
        return F.cross_entropy(learner(model, task.classes, **seen), batch.targets)

    tuned = tune(learner, loss, task, clip, recipe, seed=seed, progress=False, **options)
    return VisionPrompt.of(learner, task.classes, **tuned.info()), tuned, clip, task


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_prompt_learns_is_saved_and_predicts_the_same(name, tmp_path) -> None:
    clip = toy_clip()
    mixed_modes(clip.model)
    before = snapshot(clip.model)
    with same_random_state():
        prompt, tuned, _, task = learn(SPECS[name], clip=clip)
    assert_unchanged(before, clip.model)
    assert tuned.steps == 8 and tuned.stopped == "done" and tuned.epochs[-1] < tuned.epochs[0]
    prompt.save(tmp_path / "prompt.json")
    again = Prompt.load(tmp_path / "prompt.json")
    assert isinstance(again, VisionPrompt) and again.fingerprint() == prompt.fingerprint()
    clip.model.eval()
    assert task.evaluate(again.on(clip)).class_scores == task.evaluate(prompt.on(clip)).class_scores
    if name == "class":
        with pytest.raises(ValueError, match="as many classes"):
            prompt.for_classes(["cat", "dog"])
    else:
        other = prompt.for_classes(["cat", "dog"]).on(clip).scores(task.test)
        assert other.shape == (len(task.test), 2)
    with pytest.raises(ValueError, match="another model"):
        prompt.on(toy_clip(width=16))


@pytest.mark.parametrize("recipe", [SHORT, dataclasses.replace(SHORT, crop=(0.5, 1.0), optimizer="adam",
                                                               clip_norm=1.0)], ids=["sgd", "adam"])
def test_a_run_that_was_stopped_goes_on_to_the_same_vectors(recipe, tmp_path) -> None:
    whole, tuned, *_ = learn(SPECS["coop"], recipe)
    calls = Budget()
    learn(SPECS["coop"], recipe, budget=calls)
    for part in (0.3, 0.6, 0.9):
        folder = tmp_path / str(part)
        limit = int(calls.used["calls"] * part)
        _, stopped, *_ = learn(SPECS["coop"], recipe, state_dir=folder, budget=Budget(calls=limit))
        assert stopped.stopped == "budget: calls" and stopped.steps < tuned.steps
        more = Budget()
        prompt, went_on, *_ = learn(SPECS["coop"], recipe, state_dir=folder, budget=more)
        assert prompt.fingerprint() == whole.fingerprint() and went_on.losses == tuned.losses
    again, _, *_ = learn(SPECS["coop"], recipe, state_dir=folder)
    assert again.fingerprint() == whole.fingerprint()
    with pytest.raises(StateError, match="seed was 0, is 1"):
        learn(SPECS["coop"], recipe, seed=1, state_dir=folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StateError, match="remove"):
        learn(SPECS["coop"], recipe, state_dir=folder)


def test_features_are_computed_once_unless_pictures_are_random() -> None:
    whole, random = Budget(), Budget()
    learn(SPECS["coop"], budget=whole)
    learn(SPECS["coop"], dataclasses.replace(SHORT, crop=(0.5, 1.0)), budget=random)
    assert whole.used["calls"] == 12 + 8 * 3 and random.used["calls"] == 8 * (6 + 3)


def test_learning_rates_are_those_of_coop() -> None:
    recipe = Recipe(epochs=50)
    rates = [recipe.rate(epoch * 7, 7) for epoch in range(50)]
    assert rates[0] == 1e-5 and rates[1] == 0.002
    assert math.isclose(rates[26], 0.001) and rates[49] > 0
    assert [Recipe.coop_epochs(n) for n in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    steps = Recipe(epochs=100, warmup=0, schedule="milestones", lr=0.01)
    assert [round(steps.rate(e, 1), 6) for e in (49, 50, 71, 72)] == [0.01, 0.001, 0.001, 0.0001]
    assert Recipe(epochs=2, warmup=0, schedule="steps").rate(5, 5) == 0.001


def test_setup_epochs_backward_and_factors() -> None:
    clip, task = toy_clip(), toy_pictures(3)
    learner, seen, calls = SPECS["cocoop"].build(clip, 3), [], []

    def loss(batch, model):
        assert batch.kept["hand"].shape[0] == 3
        return F.cross_entropy(learner(model, task.classes, features=batch.features), batch.targets)

    def backward(value):
        value.backward()
        calls.append(float(learner.context.context.grad.norm()))
        learner.context.context.grad.zero_()

    before = learner.context.context.detach().clone()
    recipe = dataclasses.replace(SHORT, weight_decay=0.0)
    tune(learner, loss, task, clip, recipe, setup=lambda model: {"hand": model.ensemble(task.classes, ["a {}"])},
         on_epoch=lambda epoch, model: seen.append(epoch), backward=backward, progress=False)
    assert seen == [0, 1, 2, 3] and len(calls) == 8 and max(calls) > 0
    assert torch.equal(learner.context.context, before)  # backward() took its gradient away
    slow = SPECS["cocoop"].build(clip, 3)
    start = slow.context.context.detach().clone()
    weight = slow.context.network[0].weight.detach().clone()
    tune(slow, lambda b, m: F.cross_entropy(slow(m, task.classes, features=b.features), b.targets), task, clip, recipe,
         factors={"context.context": 0.0}, progress=False)
    assert torch.equal(slow.context.context, start) and not torch.equal(slow.context.network[0].weight, weight)


def test_pixels_are_learned_in_front_of_a_classifier() -> None:
    classifier, task = toy_classifier(3), toy_pictures(3)
    frame = PixelFrame(16, inner=8)
    before = snapshot(classifier.model)
    recipe = dataclasses.replace(SHORT, optimizer="adam", schedule="milestones", warmup=0)
    tuned = tune(frame, lambda b, m: F.cross_entropy(m.logits(frame(b.pixels)), b.targets), task, classifier, recipe,
                 progress=False)
    assert tuned.epochs[-1] < tuned.epochs[0] and frame.delta.abs().sum() > 0
    assert_unchanged(before, classifier.model)


def test_what_is_learned_may_be_part_of_the_model() -> None:
    clip, task = toy_clip(), toy_pictures(3)
    norms = torch.nn.ModuleList([clip.model.vision_model.post_layernorm])
    other = clip.model.visual_projection.weight.detach().clone()
    recipe = dataclasses.replace(SHORT, lr=0.5)

    def loss(batch, model):
        texts = batch.kept["texts"]
        return F.cross_entropy(model.logits(model.images(batch.pixels), texts), batch.targets)

    tuned = tune(norms, loss, task, clip, recipe, setup=lambda m: {"texts": m.ensemble(task.classes, ["a {}"])},
                 progress=False)
    assert tuned.epochs[-1] < tuned.epochs[0]
    assert torch.equal(clip.model.visual_projection.weight, other)
    assert all(p.requires_grad and p.grad is None for p in clip.model.parameters())


def test_masks_of_the_models_own_weights_are_learned(tmp_path) -> None:
    """What mask tuning does: scores that lie inside the model, two losses, gradients of the caller's own making."""
    clip, task, found = toy_clip(), toy_pictures(3), []
    names = [n for n, _ in clip.model.named_parameters() if "vision_model" in n and "q_proj.weight" in n]
    recipe = dataclasses.replace(SHORT, lr=0.05, optimizer="adam", weight_decay=0.0)
    before = snapshot(clip.model)
    for limit in (None, 60):
        with LearnedMasks(clip.model, Threshold(0.005), names) as masks:
            scores = torch.nn.ParameterList(masks.parameters())

            def loss(batch, model):
                logits = model.logits(model.images(batch.pixels), batch.kept["texts"])
                teacher = batch.kept["teacher"][batch.index].softmax(-1)
                return torch.stack([F.cross_entropy(logits, batch.targets), F.cross_entropy(logits, teacher)])

            def backward(losses, scores=scores):
                first, second = (torch.autograd.grad(loss, list(scores), retain_graph=True) for loss in losses)
                for score, a, b in zip(scores, first, second):
                    score.grad = torch.where(a.sign() == b.sign(), a, 0.0)

            def setup(model):
                texts = model.ensemble(task.classes, ["a {}"])
                return {"texts": texts, "teacher": model.logits(model.images(model.read(task.train)), texts)}

            def run(budget=None, folder=None, scores=scores):
                return tune(scores, loss, task, clip, recipe, setup=setup, backward=backward, budget=budget,
                            state_dir=folder, progress=False)

            if limit is not None:
                assert run(Budget(calls=limit), tmp_path).stopped == "budget: calls"
            run(folder=limit and tmp_path)
            found.append(masks.harden())
    assert all(torch.equal(found[0][n], found[1][n]) for n in names) and not all(found[0][n].all() for n in names)
    assert_unchanged(before, clip.model)


def test_bad_input() -> None:
    clip, task = toy_clip(), toy_pictures(3)
    learner = PromptSpec(length=2).build(clip, 3)
    with pytest.raises(ValueError, match="step 0: expected a finite loss"):
        tune(learner, lambda b, m: learner.context.context.sum() * math.nan, task, clip, SHORT, progress=False)
    with pytest.raises(ValueError, match="ask for a gradient"):
        tune(learner.requires_grad_(False), lambda b, m: None, task, clip, SHORT, progress=False)
    with pytest.raises(ValueError, match="epochs"):
        Recipe(epochs=0)
    with pytest.raises(ValueError, match="coupled"):
        PromptSpec(None, vision="coupled")
    with pytest.raises(UnsupportedModelError, match="expected a DualEncoder"):
        TemplatePrompt(task.classes).on(toy_classifier())
