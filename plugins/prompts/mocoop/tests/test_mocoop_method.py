"""MoCoOp is what its paper and code say: figures worked out by hand, plain loops, and CoOp as its simplest case."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from looseleaf import Budget, Example, Prompt, UnsupportedModelError
from looseleaf.testing.models import seeded
from looseleaf_mocoop import (
    GENERAL,
    IMAGENET,
    MixedText,
    MixturePrompt,
    MixtureSpec,
    MoCoOp,
    Router,
    gate_loss,
    gate_target,
    group_templates,
    text_loss,
)
from looseleaf_mocoop.mixture import layer_norms
from looseleaf_mocoop.templates import GROUPS
from looseleaf_vision import CoOp, DualEncoder, base_to_new
from looseleaf_vision.testing import toy_clip, toy_pictures, toy_processor, toy_tokenizer

TEMPLATES = ("a photo of a {}.", "a drawing of a {}.", "a large {}, a type of pet.", "{} texture")
SPEC = MixtureSpec(TEMPLATES, (2, 1, 1))
NAMES = ["red", "green", "blue", "yellow"]


def quick(**options) -> MoCoOp:
    return MoCoOp(**{"templates": TEMPLATES, "groups": (2, 1, 1), "epochs": 3, "warmup": 1, "batch_size": 8,
                     "crop": None, **options})


# ------------------------------------------------------------------------------------------ figures worked out by hand
def test_router_weights() -> None:
    weights = Router(5, 4, 2).weights(torch.tensor([[2.0, 1.0, 0.0, -1.0]]))
    assert weights[0].tolist() == pytest.approx([0.731059, 0.268941, 0, 0], abs=1e-6)


def test_of_equal_logits_the_first_experts_are_taken() -> None:
    assert Router(5, 4, 2).weights(torch.zeros(1, 4))[0].tolist() == [0.5, 0.5, 0, 0]


def test_mixed_features_are_not_normalised_again() -> None:
    texts = torch.eye(2)[:, None]  # two experts, one class
    weights = Router(2, 2, 2).weights(torch.tensor([[1.0, 0.0]]))
    mixed = torch.einsum("bg,gcd->bcd", weights, texts)
    assert float(mixed.norm()) == pytest.approx(0.778958, abs=1e-6)
    clip, features = toy_clip(), torch.tensor([[0.6, 0.8]])
    with torch.no_grad():
        clip.model.logit_scale.fill_(math.log(100))
    learner = MixedText(dataclasses.replace(SPEC, groups=(2, 2)), clip)
    assert float(learner.logits(clip, features, texts, weights)) == pytest.approx(65.3788, abs=1e-4)
    assert float(clip.logits(features, F.normalize(mixed, dim=-1))) == pytest.approx(83.9311, abs=1e-4)  # the mistake


@pytest.mark.parametrize(("classes", "value"), [(2, 0.313262), (3, 0.551445)])
def test_text_loss_of_orthonormal_features(classes, value) -> None:
    texts = torch.eye(4)[:classes].expand(5, -1, -1)
    assert float(text_loss(texts, texts)) == pytest.approx(value, abs=1e-6)


def test_gate_loss() -> None:
    logits, cosines = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[0.30, 0.10, 0.28, 0.20]])
    assert float(gate_loss(logits, cosines)) == pytest.approx(1.430232, abs=1e-6)
    target = gate_target(torch.ones(1, 1), cosines.T[..., None], torch.tensor([0]))
    assert target[0, [0, 2]].tolist() == pytest.approx([0.505, 0.495], abs=1e-3)


def test_losses_are_what_plain_loops_give() -> None:
    draw = torch.Generator().manual_seed(0)
    texts, hand = (F.normalize(torch.randn(3, 5, 7, generator=draw), dim=-1) for _ in range(2))
    features, y = F.normalize(torch.randn(6, 7, generator=draw), dim=-1), torch.tensor([0, 1, 2, 3, 4, 0])
    logits = torch.randn(6, 3, generator=draw)
    own = -sum(math.log(math.exp(texts[g, c] @ hand[g, c]) / sum(math.exp(texts[g, c] @ hand[g, e]) for e in range(5)))
               for g in range(3) for c in range(5)) / 15
    assert float(text_loss(texts, hand)) == pytest.approx(own, abs=1e-5)
    total = 0.0
    for n in range(6):
        s = [float(features[n] @ hand[g, y[n]]) for g in range(3)]
        raised = [value + (10 if value in sorted(s)[-2:] else 0) for value in s]
        target = [math.exp(r) / sum(map(math.exp, raised)) for r in raised]
        total -= sum(t * math.log(math.exp(v) / sum(map(math.exp, logits[n].tolist())))
                     for t, v in zip(target, logits[n].tolist(), strict=True)) / 6
    cosines = torch.einsum("bd,gbd->bg", features, hand[:, y])
    assert float(gate_loss(logits, cosines)) == pytest.approx(total, abs=1e-5)
    assert torch.allclose(gate_target(features, hand, y).sum(-1), torch.ones(6))


def test_logits_are_those_of_the_mixed_class_features() -> None:
    clip, learner = toy_clip(), MixedText(SPEC, toy_clip(), seed=1)
    features = F.normalize(torch.randn(5, clip.dim, generator=torch.Generator().manual_seed(1)), dim=-1)
    texts = learner.texts(clip, NAMES)
    rows = []
    for f in features:  # step 2 of the method, one picture at a time
        values, chosen = (f @ learner.gate.weight.T + learner.gate.bias).topk(2)
        mixed = sum(p * texts[g] for p, g in zip(values.softmax(0), chosen, strict=True))
        rows.append(clip.model.logit_scale.exp() * (mixed @ f))
    assert torch.allclose(learner(clip, NAMES, features), torch.stack(rows), atol=1e-5)


# ------------------------------------------------------------------------------------------ against what is known
def test_one_expert_without_the_rest_is_coop_bit_for_bit() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    coop = CoOp(ctx_init="a photo of a", epochs=4, lr=0.05, batch_size=8).optimize(task, clip, seed=3)
    ours = MoCoOp(templates=("a photo of a {}.",), groups=(1,), top_k=1, text_weight=0.0, gate_weight=0.0,
                  correction=False, epochs=4, warmup=1, lr=0.05, batch_size=8, clip_norm=None).optimize(
                      task, clip, seed=3)
    assert torch.equal(ours.tensors["experts.0.context"], coop.tensors["context.context"])
    assert ours.info["history"] == coop.info["history"]
    assert torch.equal(ours.on(clip).scores(task.test), coop.on(clip).scores(task.test))


def test_experts_begin_at_the_first_template_of_their_group() -> None:
    clip = toy_clip()
    for template, row in zip(("a photo of a {}.", "a large {}, a type of pet.", "{} texture"),
                             MixedText(SPEC, clip).texts(clip, NAMES), strict=True):
        assert torch.allclose(row, clip.texts([template.format(n) for n in NAMES]), atol=1e-5)


def test_every_published_template_with_a_real_tokenizer() -> None:
    pytest.importorskip("looseleaf_models", reason="needs looseleaf-models")
    models = pytest.importorskip("looseleaf_lab.models", reason="needs looseleaf-lab")
    clip, names = DualEncoder(*models.load("mini-clip")), ["red apple", "St. Bernard's dog"]
    with torch.no_grad():
        own = MixedText(MixtureSpec(IMAGENET, (1,) * 32), clip).texts(clip, names)
        assert torch.allclose(own, torch.stack([clip.texts([t.format(n) for n in names]) for t in IMAGENET]), atol=1e-5)


def test_vectors_are_counted_by_the_tokenizer_and_the_end_of_text_stays() -> None:
    clip = toy_clip()
    expert = MixedText(SPEC, clip).experts[2]  # "{} texture": a splitter at spaces would count two tokens after
    assert (expert.before, expert.length) == (0, 1)
    tokens = expert(NAMES)
    assert (tokens.slots[tokens.ids == clip.tokenizer.eos_token_id] == -1).all()


def test_hand_features_of_groups() -> None:
    clip = toy_clip()
    hand = quick()._setup(SPEC, NAMES, clip)["hand"]
    two = torch.stack([clip.texts([t.format(n) for n in NAMES]) for t in TEMPLATES[:2]])
    assert torch.allclose(hand[0], F.normalize(two.mean(0), dim=-1), atol=1e-6)
    assert torch.allclose(hand[2], clip.texts([f"{n} texture" for n in NAMES]), atol=1e-6)


def test_order_of_pictures_and_batches_do_not_matter() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    predictor = quick().optimize(task, clip).on(clip)
    scores = predictor.scores(task.test)
    assert torch.allclose(predictor.scores(list(reversed(task.test))).flip(0), scores, atol=1e-5)
    assert torch.allclose(torch.cat([predictor.scores([e]) for e in task.test]), scores, atol=1e-5)


def test_the_router_learns_the_groups_that_hand_templates_point_to() -> None:
    """A planted case: pictures lie near the hand features of two groups each, which the router is never told."""
    draw = torch.Generator().manual_seed(0)
    hand = F.normalize(torch.randn(4, 3, 32, generator=draw), dim=-1)
    style, y = torch.arange(200) % 2, torch.randint(0, 3, (200,), generator=draw)
    near = hand[style * 2, y] + hand[style * 2 + 1, y]
    features = F.normalize(near + 0.1 * torch.randn(200, 32, generator=draw), dim=-1)
    cosines = torch.einsum("bd,gbd->bg", features, hand[:, y])
    router = Router(32, 4, 2)
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        gate_loss(router(features), cosines).backward()
        optimizer.step()
    chosen = router.weights(router(features)) > 0
    expected = F.one_hot(style * 2, 4) + F.one_hot(style * 2 + 1, 4) > 0
    assert (chosen == expected).all(1).float().mean() > 0.95


def test_learning_beats_the_hand_templates_and_serves_new_classes() -> None:
    clip, task = toy_clip(layers=2, width=48), toy_pictures(4, each=8)
    before, after = (quick(epochs=n, lr=0.2, text_weight=0.5).optimize(task, clip) for n in (1, 10))
    scores = [task.evaluate(prompt.on(clip)).score for prompt in (before, after)]
    assert scores[1] > scores[0] + 0.2, scores
    parts = base_to_new(task)
    found = parts.evaluate(quick(text_classes=("blue", "yellow")).optimize(parts.base, clip), clip)
    assert set(found) == {"base", "new", "whole", "harmonic"}


# ------------------------------------------------------------------------------------------ variants and edge cases
def test_below_four_pictures_only_chosen_experts_are_encoded() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    small, whole = Budget(), Budget()
    quick(batch_size=1, epochs=1).optimize(task, clip, budget=small)
    quick(batch_size=4, epochs=1).optimize(task, clip, budget=whole)
    pictures, setup = 16, 16  # setup: four templates of four names
    assert small.used["calls"] == pictures + setup + 16 * 2 * 4
    assert whole.used["calls"] == pictures + setup + 4 * 3 * 4
    # the others count as features of zeros, as in the official code: log C each
    texts = F.normalize(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    some = texts.clone()
    some[1] = 0
    expected = (text_loss(texts[[0, 2]], texts[[0, 2]]) * 2 + math.log(4)) / 3
    assert float(text_loss(some, texts)) == pytest.approx(float(expected), abs=1e-6)


def test_layer_norms_are_learned_beside_the_model_not_in_it() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    former = {n: p.clone() for n, p in clip.model.named_parameters()}
    prompt = quick(tune_layer_norm=True, clip_norm=None).optimize(task, clip)
    assert all(torch.equal(p, former[n]) for n, p in clip.model.named_parameters())
    norms = layer_norms(clip)
    assert len(norms) == 2 * clip.depth[1] == sum(name.startswith("norms.") for name in prompt.tensors) // 2
    moved = [not torch.equal(prompt.tensors[f"norms.{n}.weight"], norm.weight) for n, norm in enumerate(norms)]
    assert any(moved)
    with torch.no_grad():  # written into a copy of the model they give the same
        other = toy_clip()
        for n, norm in enumerate(layer_norms(other)):
            norm.weight.copy_(prompt.tensors[f"norms.{n}.weight"])
            norm.bias.copy_(prompt.tensors[f"norms.{n}.bias"])
    pixels = clip.read(task.test)
    assert torch.allclose(prompt.learner(clip).images(clip, pixels), other.images(pixels), atol=1e-5)
    assert not any(m._forward_hooks for m in clip.model.modules())


def test_further_names_are_seen_by_the_text_loss_alone_and_said() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    plain = quick().optimize(task, clip)
    more = quick(text_classes=("red", "black")).optimize(task, clip)
    assert "text_classes" not in plain.info and "1 further name" in more.info["text_classes"]
    assert not torch.equal(plain.tensors["experts.0.context"], more.tensors["experts.0.context"])
    assert more.classes == list(task.classes)


def test_without_a_router_all_experts_count_the_same() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    prompt = quick(router=False).optimize(task, clip)
    assert not any(name.startswith("gate") for name in prompt.tensors)
    assert torch.allclose(prompt.on(clip).weights(task.test), torch.full((16, 3), 1 / 3))
    assert prompt.info["usage"] == [1.0] * 3


def test_usage_counts_the_mixtures_of_the_last_epoch(tmp_path) -> None:
    clip, task = toy_clip(), toy_pictures(4)
    prompt = quick().optimize(task, clip, state_dir=tmp_path)
    assert sum(prompt.info["usage"]) == pytest.approx(2) and max(prompt.info["usage"]) <= 1
    again = quick().optimize(task, clip, state_dir=tmp_path)
    assert again.info == prompt.info and again.fingerprint() == prompt.fingerprint()


def test_explain(tmp_path) -> None:
    clip, task = toy_clip(), toy_pictures(4)
    prompt = quick().optimize(task, clip)
    prompt.save(tmp_path / "p.json")
    predictor = Prompt.load(tmp_path / "p.json").on(clip)
    shares = predictor.explain(task.test[0].inputs["image"])
    assert len(shares) == 2 and sum(s.weight for s in shares) == pytest.approx(1, abs=1e-6)
    assert shares[0].weight >= shares[1].weight
    assert shares[0].templates == SPEC.parts[shares[0].expert]
    untrained = MixturePrompt.of(MixedText(SPEC, clip), NAMES).on(clip)
    words = {s.expert: s.words for s in untrained.explain(task.test[0])}
    wanted = {0: "a photo of a", 1: "a large , a type of pet", 2: "texture"}
    assert all(" ".join(found) == wanted[g] for g, found in words.items())


def test_groups_of_ones_own_templates() -> None:
    axes = torch.eye(3)[[0, 1, 0, 2, 1, 0]] + 0.01 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert group_templates(axes, 3) == [[0, 2, 5], [1, 4], [3]]
    assert group_templates(axes, 6) == [[n] for n in range(6)] and group_templates(axes, 1) == [list(range(6))]
    assert all(len(group) for group in group_templates(torch.ones(5, 3), 3))  # all alike: no group is empty
    clip, task = toy_clip(), toy_pictures(4)
    prompt = quick(groups=None).optimize(task, clip)
    assert len(prompt.spec.groups) == 2 and sorted(prompt.spec.templates) == sorted(TEMPLATES)
    assert prompt.info["groups"] == list(map(list, prompt.spec.parts))
    stopped = quick(groups=None).optimize(task, clip, budget=Budget(calls=5))
    assert stopped.info["stopped"] == "budget: calls" and stopped.on(clip).scores(task.test).shape == (16, 4)


def test_published_lists() -> None:
    assert len(GENERAL) == 9 and GROUPS[GENERAL] == (1, 1, 1, 4, 2)
    assert len(IMAGENET) == 32 == sum(GROUPS[IMAGENET]) and len(GROUPS[IMAGENET]) == 20
    assert all(t.count("{}") == 1 for t in (*GENERAL, *IMAGENET))
    task = toy_pictures(2)
    assert MoCoOp(epochs=1, crop=None).optimize(task, toy_clip()).spec.groups == (1, 1, 1, 4, 2)
    recipe = MoCoOp().recipe()
    assert (recipe.epochs, recipe.lr, recipe.batch_size, recipe.warmup, recipe.clip_norm) == (50, 0.032, 32, 5, 1.0)


def test_goes_on_from_a_prompt() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    first = quick(epochs=8).optimize(task, clip)
    more = quick(epochs=8).optimize(task, clip, start=first)
    assert more.info["history"][0] > first.info["history"][0]
    with pytest.raises(ValueError, match="start: expected a prompt of"):
        quick(correction=False).optimize(task, clip, start=first)


# ------------------------------------------------------------------------------------------ models of one's own
def siglip() -> DualEncoder:
    transformers = pytest.importorskip("transformers")
    tokenizer = toy_tokenizer("siglip")
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "projection_size": 24},
        vision_config={**shape, "image_size": 16, "patch_size": 8})
    return DualEncoder(seeded(lambda: transformers.SiglipModel(config)).eval(), toy_processor(tokenizer))


def pair() -> DualEncoder:
    transformers = pytest.importorskip("transformers")
    tokenizer = toy_tokenizer("bert")
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**shape, image_size=16, patch_size=8),
        transformers.BertConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=40), projection_dim=16)
    return DualEncoder(seeded(lambda: transformers.VisionTextDualEncoderModel(config)).eval(), toy_processor(tokenizer))


def adapted() -> DualEncoder:
    peft, clip = pytest.importorskip("peft"), toy_clip()
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return DualEncoder(peft.get_peft_model(clip.model, config).eval(), toy_processor(clip.tokenizer))


def half() -> DualEncoder:
    clip = toy_clip()
    clip.model.to(torch.bfloat16)
    return clip


@pytest.mark.parametrize("make", [siglip, pair, adapted, half])
def test_other_models(make) -> None:
    clip, task = make(), toy_pictures(4)
    clip.model.train()
    next(clip.model.modules()).training = False
    modes = [m.training for m in clip.model.modules()]
    grads = [p.requires_grad for p in clip.model.parameters()]
    # the toy names are one token each; SigLIP's logits have a bias, which mixing leaves as it is
    prompt = quick(tune_layer_norm=True, lr=0.1).optimize(task, clip)
    assert torch.isfinite(prompt.on(clip).scores(task.test)).all()
    assert modes == [m.training for m in clip.model.modules()]
    assert grads == [p.requires_grad for p in clip.model.parameters()]
    assert len(prompt.tensors["correction"]) == clip.dim
    assert prompt.tensors["correction"].abs().sum() > 0


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(("options", "message"), [
    ({"groups": (2, 1)}, r"groups: expected integers >= 1 that sum to 4, the number of templates, got \[2, 1\]"),
    ({"groups": (2, 2, 0)}, "groups: expected None or a sequence of integers >= 1"),
    ({"templates": ("a photo", "a {}")}, "expected text with one {} where the name goes, got 'a photo'"),
    ({"templates": ("a {} and {}", "a {}")}, "expected text with one {}"),
    ({"templates": ("{}.",)}, "a word or more beside {}"),
    ({"templates": "a photo of a {}."}, "templates: expected a sequence of texts"),
    ({"top_k": 4}, r"top_k: expected an integer in \[1, 3\], the number of groups, got 4"),
    ({"top_k": 5, "groups": None}, r"top_k: expected an integer in \[1, 4\], the number of templates"),
    ({"text_classes": "black"}, "text_classes: expected None or a sequence of names"),
    ({"text_weight": -1.0}, "text_weight: expected a number >= 0"),
])
def test_bad_hyperparameters(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**options)


def test_bad_input() -> None:
    clip, task = toy_clip(), toy_pictures(4)
    long = dataclasses.replace(
        task, train=[Example(e.inputs, "green tree " * 20 if e.target == "green" else e.target) for e in task.train],
        classes=["green tree " * 20 if c == "green" else c for c in task.classes], dev=(), test=())
    with pytest.raises(ValueError, match=r"expected at most 40 tokens, .*green tree"):
        quick().optimize(long, clip)
    with pytest.raises(ValueError, match=r"expected at most 40 tokens, .*green tree"):
        quick(groups=None).optimize(long, clip)
    with pytest.raises(UnsupportedModelError, match="expected a DualEncoder"):
        quick().optimize(task, clip.model)
    prompt = quick().optimize(task, clip)
    with pytest.raises(ValueError, match="learned for another model"):
        prompt.on(toy_clip(width=32))
    with pytest.raises(UnsupportedModelError, match="expected a DualEncoder"):
        prompt.on(clip.model)
    with pytest.raises(ValueError, match="start: expected a MixturePrompt, got VisionPrompt"):
        quick().optimize(task, clip, start=CoOp(epochs=1, crop=None).optimize(task, clip))
    with pytest.raises(ValueError, match="count: expected an integer in"):
        group_templates(torch.eye(3), 4)
