"""Dual encoders of all families give the model's own logits, and vectors can be spliced into every one of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from looseleaf import Budget, Example, UnsupportedModelError
from looseleaf.testing.common import assert_unchanged, interrupt, mixed_modes, same_random_state, snapshot
from looseleaf.testing.models import seeded
from looseleaf_vision import (
    ConditionalContext,
    CoupledTokens,
    DualEncoder,
    PixelFrame,
    PromptSpec,
    TextContext,
    VisionTokens,
)
from looseleaf_vision.testing import SIZE, toy_clip, toy_pictures, toy_processor, toy_tokenizer

TEXTS = ["a photo of a cat.", "a large photo of a red dog.", "house"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": SIZE, "patch_size": 8}


def siglip() -> DualEncoder:
    tokenizer = toy_tokenizer("siglip", 24)
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32,
            "pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    return DualEncoder(seeded(lambda: transformers.SiglipModel(config)).eval(), toy_processor(tokenizer))


def altclip() -> DualEncoder:
    tokenizer = toy_tokenizer("bert")
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 42, "project_dim": 20, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": len(tokenizer) - 1}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return DualEncoder(seeded(lambda: transformers.AltCLIPModel(config)).eval(), toy_processor(tokenizer))


def chinese_clip() -> DualEncoder:
    tokenizer = toy_tokenizer("bert")
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return DualEncoder(seeded(lambda: transformers.ChineseCLIPModel(config)).eval(), toy_processor(tokenizer))


def pair() -> DualEncoder:
    tokenizer = toy_tokenizer("bert")
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VISION),
        transformers.BertConfig(**SHAPE, vocab_size=len(tokenizer), max_position_embeddings=40), projection_dim=16)
    model = seeded(lambda: transformers.VisionTextDualEncoderModel(config)).eval()
    return DualEncoder(model, toy_processor(tokenizer))


def metaclip2() -> DualEncoder:
    tokenizer = toy_tokenizer()
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "projection_dim": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = transformers.MetaClip2Config(text_config=text, vision_config={**VISION, "projection_dim": 16},
                                          projection_dim=16)
    return DualEncoder(seeded(lambda: transformers.MetaClip2Model(config)).eval(), toy_processor(tokenizer))


def old_clip() -> DualEncoder:
    return toy_clip(eos_token_id=2)  # such configurations pool at the largest token number


FAMILIES = [toy_clip, old_clip, siglip, altclip, chinese_clip, pair, metaclip2]
family = pytest.mark.parametrize("make", FAMILIES, ids=lambda f: f.__name__)


@family
@torch.no_grad()
def test_logits_are_the_models_own(make) -> None:
    encoder, examples = make(), toy_pictures().train[:5]
    processor = encoder.preprocess.processor
    values = processor(images=[e.inputs["image"] for e in examples], return_tensors="pt").pixel_values
    padding = "max_length" if make is siglip else True
    tokens = encoder.tokenizer(TEXTS, padding=padding, return_tensors="pt")
    names = encoder.tokenizer.model_input_names
    own = encoder.model(pixel_values=values, **{n: tokens[n] for n in names}).logits_per_image
    ours = encoder.logits(encoder.images(encoder.read(examples)), encoder.texts(TEXTS))
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert ours.std() > 0
    torch.testing.assert_close(encoder.logits(encoder.all_images(examples), encoder.texts(TEXTS)), ours)


@family
def test_rows_of_the_plain_prompt_spliced_in_are_the_plain_prompt_and_learn(make) -> None:
    encoder, names = make(), ["cat", "red_dog", "house"]
    plain = encoder.texts([f"a photo of a {n.replace('_', ' ')}." for n in names])
    context = TextContext(encoder, start="a photo of a")
    found = encoder.texts(context(names))
    assert torch.equal(found, plain)
    found[:, 0].sum().backward()
    assert (context.context.grad.norm(dim=-1) > 0).all()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.model.modules()]
    assert not any(before)


@family
def test_vision_tokens_reach_the_features(make) -> None:
    encoder = make()
    pixels = encoder.read(toy_pictures().train[:3])
    for depth in (1, 3):
        vision = VisionTokens(encoder, length=2, depth=depth)
        found = encoder.images(pixels, vision())
        assert not torch.allclose(found, encoder.images(pixels))
        found[:, 0].sum().backward()
        assert (vision.vectors.grad.flatten(1).norm(dim=-1) > 0).all()


def test_the_class_token_stays_and_deeper_tokens_replace_the_former() -> None:
    encoder = toy_clip()
    pixels, seen = encoder.read(toy_pictures().train[:2]), []
    vision = VisionTokens(encoder, length=2, depth=2)
    layers = encoder.model.vision_model.encoder.layers
    handles = [layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach())) for layer in layers]
    encoder.images(pixels, vision())
    for handle in handles:
        handle.remove()
    patches = (SIZE // 8) ** 2
    assert [tuple(x.shape[:2]) for x in seen] == [(2, 1 + patches + 2)] * 3
    plain = encoder.model.vision_model.pre_layrnorm(encoder.model.vision_model.embeddings(
        encoder.preprocess.normalize(pixels)))
    torch.testing.assert_close(seen[0][:, :1 + patches], plain)
    alone = VisionTokens(encoder, length=2, depth=2)
    with torch.no_grad():
        alone.vectors.copy_(vision.vectors)
        alone.vectors[0] += 1  # what the first layer makes of its tokens is lost, what it tells the patches is not
    assert not torch.allclose(encoder.images(pixels, alone()), encoder.images(pixels, vision()))


@pytest.mark.parametrize(("position", "pieces"), [("end", "v v v v cat ."), ("middle", "v v cat v v ."),
                                                  ("front", "cat v v v v .")])
def test_positions_of_the_name(position, pieces) -> None:
    encoder = toy_clip()
    tokens = TextContext(encoder, length=4, position=position).tokens(["cat"])
    words = ["v" if slot >= 0 else encoder.tokenizer.decode([i])
             for i, slot in zip(tokens.ids[0].tolist(), tokens.slots[0].tolist())]
    assert " ".join(words[1:-1]) == pieces and words[0] == "<s>" and words[-1] == "</s>"
    assert [s for s in tokens.slots[0].tolist() if s >= 0] == [0, 1, 2, 3]


def test_pieces_of_unequal_length_before_and_after() -> None:
    encoder = toy_clip()
    context = TextContext(encoder, start="a large photo of a {}, a type")
    assert (context.before, context.length) == (5, 8)
    assert torch.equal(encoder.texts(context(["cat", "red dog"])),
                       encoder.texts(["a large photo of a cat, a type.", "a large photo of a red dog, a type."]))


def test_a_context_of_each_class_and_one_shifted_by_pictures() -> None:
    encoder, names = toy_clip(), ["cat", "red dog"]
    own = TextContext(encoder, length=3, classes=2)
    with torch.no_grad():
        own.context[1] += 1
    shared = TextContext(encoder, length=3)
    for n in range(2):
        with torch.no_grad():
            shared.context.copy_(own.context[n])
        torch.testing.assert_close(encoder.texts(own(names))[n], encoder.texts(shared(names))[n])
    with pytest.raises(ValueError, match="expected 2"):
        own(["cat"])
    conditional = ConditionalContext(encoder, length=3)
    features = encoder.images(encoder.read(toy_pictures().train[:2]))
    texts = encoder.texts(conditional(names, features)).view(2, 2, -1)
    with torch.no_grad():
        shared.context.copy_(conditional.context + conditional.network(features[1]))
    torch.testing.assert_close(texts[1], encoder.texts(shared(names)))
    logits = encoder.logits(features, texts)
    torch.testing.assert_close(logits[1], encoder.logits(features[1:], encoder.texts(shared(names)))[0])


def test_deep_text_takes_the_places_of_the_slots() -> None:
    encoder = toy_clip()
    context = TextContext(encoder, length=2, depth=3, position="middle")
    found = encoder.texts(context(["cat", "red dog"]))
    found[:, 0].sum().backward()
    assert context.deep.shape[0] == 2 and (context.deep.grad.flatten(1).norm(dim=-1) > 0).all()
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        TextContext(encoder, depth=4)


def test_coupled_tokens_are_functions_of_the_text() -> None:
    encoder = toy_clip()
    context, coupled = TextContext(encoder, length=2, depth=2), CoupledTokens(encoder, depth=2)
    tokens = coupled(context)
    assert [tuple(t.shape) for t in tokens] == [(2, encoder.vision_width)] * 2
    encoder.images(encoder.read(toy_pictures().train[:2]), tokens)[:, 0].sum().backward()
    assert context.context.grad.abs().sum() > 0 and context.deep.grad.abs().sum() > 0


def test_true_length_is_as_good_as_padding_to_the_longest() -> None:
    encoder = toy_clip()
    short, long = encoder.texts(TEXTS[:1]), encoder.texts([*TEXTS, "a " * 30])[:1]
    torch.testing.assert_close(short, long, atol=5e-7, rtol=1e-5)


def test_everything_comes_back_after_an_exception_too() -> None:
    encoder = toy_clip()
    mixed_modes(encoder.model)
    before = snapshot(encoder.model)
    context, vision = TextContext(encoder, length=2, depth=2), VisionTokens(encoder, length=2, depth=2)
    pixels = encoder.read(toy_pictures().train[:2])
    with same_random_state():
        encoder.texts(context(["cat", "dog"]))
        encoder.images(pixels, vision())
    assert_unchanged(before, encoder.model)
    last = encoder.model.text_model.encoder.layers[-1].register_forward_hook(interrupt)
    other = encoder.model.vision_model.encoder.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        encoder.texts(context(["cat", "dog"]))
    with pytest.raises(KeyboardInterrupt):
        encoder.images(pixels, vision())
    last.remove()
    other.remove()
    assert_unchanged(before, encoder.model)


def test_pixel_frames() -> None:
    border = PixelFrame(224, inner=33)
    pixels = torch.rand(2, 3, 33, 33)
    out = border(pixels)
    assert (border.left, 224 - 33 - border.left) == (96, 95)
    assert torch.equal(out[:, :, 96:129, 96:129], pixels) and out[0, 0, 0, 0] == 0.5
    out.sum().backward()
    assert border.delta.grad[:, 96:129, 96:129].abs().sum() == 0 and border.delta.grad[0, 0, 0] > 0
    assert PixelFrame(224, inner=32).trained == 147_456 and PixelFrame(224, inner=128).trained == 101_376
    frame = PixelFrame(16, pad=2)
    assert torch.equal(frame(pixels[..., :16, :16]), pixels[..., :16, :16])
    with pytest.raises(ValueError, match=r"\[1, 222\]"):
        PixelFrame(224, inner=223)


def test_learners_work_with_parameters_given_by_functional_call_and_to_second_order() -> None:
    """What meta-learning does: a step on the vectors, and the gradient through it."""
    encoder, task = toy_clip(), toy_pictures(3)
    encoder.model.requires_grad_(False)
    pixels, targets = encoder.read(task.train[:6]), torch.tensor([0, 1, 2] * 2)
    for spec in (PromptSpec(length=2), PromptSpec("conditional", length=2), PromptSpec(length=2, vision="own")):
        learner = spec.build(encoder, 3)
        start = dict(learner.named_parameters())

        def loss(values, learner=learner):
            return F.cross_entropy(torch.func.functional_call(
                learner, values, (encoder, task.classes), {"pixels": pixels}), targets)

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            gradients = torch.autograd.grad(loss(start), list(start.values()), create_graph=True)
            assert all(g.numel() for g in gradients)
            moved = {name: p - 0.1 * g for (name, p), g in zip(start.items(), gradients)}
            outer = torch.autograd.grad(loss(moved), list(start.values()))
        assert all(o.isfinite().all() for o in outer) and not torch.allclose(outer[0], gradients[0])


def test_features_before_normalisation() -> None:
    encoder = toy_clip()
    pixels = encoder.read(toy_pictures().train[:2])
    for raw, unit in ((encoder.images(pixels, normalize=False), encoder.images(pixels)),
                      (encoder.texts(["cat"], normalize=False), encoder.texts(["cat"]))):
        assert not torch.allclose(raw, unit)
        torch.testing.assert_close(F.normalize(raw, dim=-1), unit)


def test_calls_are_charged() -> None:
    encoder, budget = toy_clip(), Budget(calls=100)
    metered = budget.meter(encoder)
    metered.images(metered.read(toy_pictures().train[:3]))
    metered.texts(["a cat", "a dog"])
    metered.ensemble(["cat", "dog"], ["a photo of a {}.", "a {}"])
    assert budget.used["calls"] == 3 + 2 + 4


def test_a_real_clip_tokenizer_and_peft() -> None:
    encoder = toy_clip()
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={p: n for n, p in enumerate(pieces)},
                                           merges=[("c", "a"), ("ca", "t</w>")], model_max_length=77)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    model = toy_clip(**ends).model
    images = encoder.preprocess.processor
    processor = transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    encoder = DualEncoder(model, processor)
    assert encoder.count_tokens("a cat.") == 3
    context = TextContext(encoder, start="a photo of a")
    plain = encoder.texts(["a photo of a Cat.", "a photo of a hot dog."])
    assert torch.equal(encoder.texts(context(["Cat", "hot_dog"])), plain)

    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    again = DualEncoder(wrapped.eval(), processor)
    assert torch.equal(again.texts(context(["Cat", "hot_dog"])), plain)


def test_bad_input() -> None:
    encoder = toy_clip()
    with pytest.raises(UnsupportedModelError, match="embeds pictures and texts"):
        DualEncoder(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="tokenizer and image_processor"):
        DualEncoder(encoder.model, object())
    with pytest.raises(ValueError, match=r"at most 40 tokens.*'<16 vectors> cat cat"):
        TextContext(encoder)(["cat " * 30])
    with pytest.raises(ValueError, match="template"):
        encoder.ensemble(["cat"], ["a photo"])
    with pytest.raises(ValueError, match="image"):
        encoder.read([Example({"text": "no picture"}, "cat")])
    with pytest.raises(ValueError, match="at most 3 tensors"):
        encoder.images(encoder.read(toy_pictures().train[:1]), [torch.zeros(2, 5)])
