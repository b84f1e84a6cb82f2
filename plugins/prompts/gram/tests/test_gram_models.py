"""GRAM on other families, wrapped by PEFT, in half precision, in mixed modes; the report of the reproduction."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from looseleaf.testing.common import mixed_modes
from looseleaf.testing.models import seeded
from looseleaf_gram import Gram
from looseleaf_vision import DualEncoder
from looseleaf_vision.testing import COLOURS, SIZE, toy_clip, toy_pictures, toy_processor, toy_tokenizer

SMALL: dict[str, Any] = {"n_ctx": 3, "classes": 4, "domains": 2, "ways": 2, "shots": 1, "episodes_per_step": 1,
                         "meta_steps": 2, "rank": 4, "epochs": 2, "batch_size": 8}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def siglip() -> DualEncoder:
    tokenizer = toy_tokenizer("siglip", 24)
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32,
            "pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SHAPE, "image_size": SIZE, "patch_size": 8})
    return DualEncoder(seeded(lambda: transformers.SiglipModel(config)).eval(), toy_processor(tokenizer))


def chinese_clip() -> DualEncoder:
    tokenizer = toy_tokenizer("bert")
    config = transformers.ChineseCLIPConfig(
        text_config={**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 40},
        vision_config={**SHAPE, "image_size": SIZE, "patch_size": 8}, projection_dim=16)
    return DualEncoder(seeded(lambda: transformers.ChineseCLIPModel(config)).eval(), toy_processor(tokenizer))


def peft_clip() -> DualEncoder:
    peft = pytest.importorskip("peft")
    clip = toy_clip(layers=2)
    model = peft.get_peft_model(clip.model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    return DualEncoder(model.eval(), toy_processor(clip.tokenizer))


def half_clip() -> DualEncoder:
    clip = toy_clip(layers=2)
    return DualEncoder(clip.model.to(torch.bfloat16), toy_processor(clip.tokenizer))


def pairs() -> list[tuple[np.ndarray, str]]:
    draw = np.random.default_rng(0)
    return [((np.array(COLOURS[name]) * scale * 255 + draw.integers(-10, 10, (n % 3 + 12, 20, 3))).clip(0, 255).astype(
        np.uint8), f"a {name} square") for name in list(COLOURS)[:4] for scale in (0.4, 1.0) for n in range(4)]


@pytest.mark.parametrize("make", [siglip, chinese_clip, peft_clip, half_clip], ids=lambda f: f.__name__)
def test_models(make: Any) -> None:
    clip, task = make(), toy_pictures(3)
    mixed_modes(clip.model)
    next(clip.model.parameters()).requires_grad_(False)
    before = [(m.training) for m in clip.model.modules()], [p.requires_grad for p in clip.model.parameters()]
    weights = clip.fingerprint()
    method = Gram(**SMALL, learner="both")
    meta = method.meta_train(pairs(), clip, progress=False)
    tuned = method.optimize(task, clip, start=meta, progress=False)
    assert all(t.dtype == torch.float32 and bool(torch.isfinite(t).all())
               for t in (*meta.tensors.values(), *meta.regulator.values(), *tuned.tensors.values()))
    assert not torch.equal(tuned.tensors["vision.vectors"], meta.tensors["vision.vectors"])
    assert 0 <= task.evaluate(tuned.on(clip)).score <= 1
    assert before == ([m.training for m in clip.model.modules()], [p.requires_grad for p in clip.model.parameters()])
    assert clip.fingerprint() == weights and all(p.grad is None for p in clip.model.parameters())


def test_crops_and_second_order_on_a_family_with_masks() -> None:
    clip, task = chinese_clip(), toy_pictures(3)
    method = Gram(**SMALL, second_order=True, crop=(0.3, 1.0), inner_steps=2, regulator="affine")
    meta = method.meta_train(pairs(), clip, progress=False)
    assert method.optimize(task, clip, start=meta, progress=False).info["evaluations"] == 2


def test_report_and_verdicts_of_the_reproduction() -> None:
    pytest.importorskip("looseleaf_lab")
    from looseleaf_gram import reproduction
    from looseleaf_lab.study import Results

    rng = random.Random(0)

    def row(gain: float) -> dict[str, Any]:
        def values(name: str, count: int = 5) -> list[float]:
            return [0.4 + (gain if name == reproduction.BOTH else 0) + 0.01 * rng.random() for _ in range(count)]

        return {"held": {n: {"before": 1.5 - 5 * gain * (n == reproduction.BOTH), "after": 1.4}
                         for n in (reproduction.RANDOM, reproduction.BOTH)},
                "rates": {}, "pairs": 10, "classes": 5, "domains": {n: {"stamps": values(n)}
                                                                    for n in reproduction.METHODS},
                "curves": {n: {"1": {"a": values(n), "b": values(n)}} for n in reproduction.METHODS},
                "new": {n: {k: values(n) for k in ("base", "new", "harmonic")} for n in reproduction.METHODS},
                "towers": {w: values("", 4) for w in reproduction.TOWERS.values()}}

    for gain, verdict in ((0.1, "holds"), (-0.1, "does not hold")):
        results = Results([row(gain) for _ in range(4)], {}, [0, 1, 2, 3], reproduction.Scale(shots=(1,)), False)
        found = list(reproduction.claims(results))
        assert len(found) == 14 and {claim.verdict for claim in found[:3]} == {verdict}
        assert found[6].verdict == verdict and found[-1].verdict == "not shown at this scale"
