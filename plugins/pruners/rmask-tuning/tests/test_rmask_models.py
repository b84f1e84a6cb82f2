"""Networks of all kinds: which weights, what is saved and loaded, prompts, adapters, and runs that go on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import Masks
from looseleaf.testing.common import assert_unchanged, snapshot
from looseleaf.testing.models import seeded, tied_llama
from looseleaf_rmask_tuning import LabelledData, RMaskTuning, choose_weights, classifier_task, clip_task, show
from looseleaf_vision import CoOp, DualEncoder, ImageClassifier, LinearProbe, TemplatePrompt, base_to_new
from looseleaf_vision.testing import ToyNetwork, toy_clip, toy_pictures, toy_processor, toy_tokenizer

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK: dict[str, Any] = {"lr": 3e-3, "epochs": 4, "batch_size": 8}
QKVO = ["k_proj", "out_proj", "q_proj", "v_proj"]


def clip_of(wrap: Callable[[nn.Module], nn.Module]) -> DualEncoder:
    return DualEncoder(wrap(toy_clip(2).model), toy_processor(toy_tokenizer()))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**{**SMALL, "mlp_ratio": 2}, image_size=16, patch_size=8, num_labels=4,
                                       layerscale_value=1.0, initializer_range=0.2)
    return seeded(lambda: transformers.Dinov2ForImageClassification(config)).eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=16, num_labels=3,
                                     initializer_range=0.2)
    return seeded(lambda: transformers.BertForSequenceClassification(config)).eval()


class Encoder(nn.Module):
    """A network of torch's own transformer layers with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


def short(names: list[str]) -> list[str]:
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})


def test_the_weights_of_CLIP() -> None:
    model = toy_clip(2).model
    names = choose_weights(model, within="vision_model")
    assert len(names) == 2 * 4 + 1 and all(name.startswith("vision_model.") for name in names)
    assert short(names) == sorted([*QKVO, "patch_embedding"])
    assert short(choose_weights(model, patch_embedding=False, within="vision_model")) == QKVO
    assert short(choose_weights(model, "mlp", patch_embedding=False, within="vision_model")) == ["fc1", "fc2"]
    assert len(choose_weights(model, "all", within="vision_model")) == 2 * 6 + 1
    assert len(choose_weights(model)) == 9 + 8, "without a part, the text tower too"
    assert short(choose_weights(model, exclude="v_proj", within="vision_model")) == ["k_proj", "out_proj",
                                                                                      "patch_embedding", "q_proj"]
    assert short(choose_weights(model, ("vision_model.**.fc1",))) == ["fc1"]


def test_the_weights_of_other_networks() -> None:
    assert len(choose_weights(dinov2())) == 2 * 4 + 1
    assert len(choose_weights(bert())) == 2 * 4 and len(choose_weights(bert(), "mlp")) == 2 * 2
    assert len(choose_weights(tied_llama())) == 2 * 4 and len(choose_weights(tied_llama(), "mlp")) == 2 * 3
    assert short(choose_weights(Encoder())) == ["in_proj_weight", "out_proj"]
    assert choose_weights(ToyNetwork(4)) == ["first.weight"], "every convolution where nothing makes patches"
    t5 = transformers.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=30)
    chosen = choose_weights(transformers.T5ForConditionalGeneration(t5))
    assert chosen and not any("EncDec" in name for name in chosen)
    siglip = transformers.SiglipModel(transformers.SiglipConfig(
        text_config={**SMALL, "vocab_size": 30}, vision_config={**SMALL, "image_size": 16, "patch_size": 8}))
    chosen = choose_weights(siglip, within="vision_model")
    assert len(chosen) == 2 * 4 + 1 + 2, "those of the attention that pools as well"


def test_masks_of_a_CLIP_are_saved_and_its_pruned_model_is_plain(tmp_path: Path) -> None:
    clip, task = toy_clip(2), toy_pictures(4)
    before, data = snapshot(clip.model), clip_task(clip, task)
    masks = RMaskTuning(**QUICK).prune(clip.model, data)
    assert_unchanged(before, clip.model)
    assert 0 < masks.removed() < masks.total() and masks.metadata["plugin"] == "rmask-tuning"
    masks.save(tmp_path / "masks.safetensors")
    bits = sum(-(-masks.total(name) // 8) for name in masks)
    assert bits <= (tmp_path / "masks.safetensors").stat().st_size < bits + 8000, "one bit for each weight"
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded == masks and (loaded & masks) == masks
    loaded.apply(clip.model)
    pixels = clip.read(task.test)
    with torch.no_grad():
        expected = clip.images(pixels)
    clip.model.save_pretrained(tmp_path / "applied")
    loaded.make_permanent(clip.model)
    clip.model.save_pretrained(tmp_path / "permanent")
    for name in ("applied", "permanent"):
        plain = DualEncoder(transformers.CLIPModel.from_pretrained(tmp_path / name).eval(),
                            toy_processor(toy_tokenizer()))
        with torch.no_grad():
            assert torch.equal(plain.images(pixels), expected)
    report = show(masks)
    assert report.facts["switched off"] == masks.removed() and len(report.tables[0].rows) == 9
    assert {s.name for s in report.figures[0].series} == {f"self_attn.{n}" for n in QKVO}


def test_what_was_learned_fits_the_examples_and_serves_new_names() -> None:
    clip, parts = toy_clip(2), base_to_new(toy_pictures(4, 8))
    prompt = TemplatePrompt(parts.base.classes)
    before = parts.base.evaluate(prompt.on(clip), "train").score
    masks = RMaskTuning(lr=3e-3, epochs=12, batch_size=8).prune(clip.model, clip_task(clip, parts.base, crop=None))
    masks.apply(clip.model)
    assert parts.base.evaluate(prompt.on(clip), "train").score > before
    assert 0 <= parts.evaluate(prompt, clip)["new"] <= 1


@pytest.mark.parametrize("method", [CoOp(n_ctx=4, epochs=3, crop=None), LinearProbe(c=100.0, iterations=100)])
def test_on_top_of_a_prompt(method: Any) -> None:
    clip, task = toy_clip(2), toy_pictures(4)
    prompt = method.optimize(task, clip)
    data = clip_task(clip, task, prompt=prompt, crop=None)
    pixels = clip.read(task.train)
    torch.testing.assert_close(data.logits(clip.model, pixels).log_softmax(-1), prompt.on(clip).scores(task.train))
    start = task.evaluate(prompt.on(clip), "train").score
    masks = RMaskTuning(lr=3e-3, epochs=10, batch_size=8, gdr=False).prune(clip.model, data)
    masks.apply(clip.model)
    assert masks.removed() and task.evaluate(prompt.on(clip), "train").score >= start


def test_with_an_adapter_and_compiled() -> None:
    task = toy_pictures(4)
    plain = RMaskTuning(**QUICK).prune((clip := toy_clip(2)).model, clip_task(clip, task, crop=None))
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        clip = clip_of(lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
        masks = RMaskTuning(**QUICK).prune(clip.model, clip_task(clip, task, crop=None))
        assert not any("lora_" in name for name in masks) and len(masks) == 2 * 4 + 1
    clip = toy_clip(2)
    data = clip_task(clip, task, crop=None)
    masks = RMaskTuning(**QUICK).prune(torch.compile(clip.model, backend="eager"), data)
    assert [name.replace("_orig_mod.", "") for name in masks] == list(plain)
    assert all(torch.equal(masks[a], plain[b]) for a, b in zip(masks, plain, strict=True))


@pytest.mark.parametrize("network", [dinov2, lambda: ToyNetwork(4)])
def test_classifiers_of_pictures(network: Callable[[], nn.Module]) -> None:
    task, model = toy_pictures(4), seeded(network).train()
    classifier = ImageClassifier(model, size=16, mean=(0.5,) * 3, std=(0.25,) * 3, classes=task.classes)
    before = snapshot(model)  # batch norms with their statistics
    masks = RMaskTuning(**QUICK).prune(model, classifier_task(classifier, task))
    assert_unchanged(before, model)
    assert 0 < masks.removed() < masks.total()
    assert all(module.training for module in model.modules()), "modes come back"


def test_a_classifier_of_texts() -> None:
    model, labels = bert(), torch.arange(12) % 3
    ids = torch.randint(1, 50, (12, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9)[None] < torch.arange(12)[:, None] % 5 + 4).long()
    data = LabelledData.of_tensors({"input_ids": ids, "attention_mask": mask}, labels, ["a", "b", "c"])
    before = float((model(input_ids=ids, attention_mask=mask).logits.argmax(1) == labels).float().mean())
    masks = RMaskTuning(lr=2e-3, epochs=15, batch_size=6).prune(model, data)
    masks.apply(model)
    after = float((model(input_ids=ids, attention_mask=mask).logits.argmax(1) == labels).float().mean())
    assert len(masks) == 8 and after > before


def test_torchs_own_transformer_layers() -> None:
    model = seeded(Encoder).eval()
    inputs = torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(0))
    masks = RMaskTuning(**QUICK).prune(model, LabelledData.of_tensors(inputs, torch.arange(12) % 3))
    assert 0 < masks.removed() < masks.total()


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    model, inputs = seeded(Encoder).eval(), torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(0))
    method, calls = RMaskTuning(lr=1e-3, epochs=8, batch_size=4), [0]

    def stopping(network: nn.Module, batch: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return network(batch)

    labels = torch.arange(12) % 3
    whole = method.score(model, LabelledData.of_tensors(inputs, labels))
    data = LabelledData.of_tensors(inputs, labels, logits=stopping)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        method.score(model, data, state_dir=tmp_path)
    assert_unchanged(before, model)
    again = method.score(model, data, state_dir=tmp_path)
    assert calls[0] < 2 * (3 + 8 * 3), "it did not begin again"
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="belongs to another search"):
        RMaskTuning(lr=1e-3, epochs=8, batch_size=4, gdr_lambda=0.5).score(model, data, state_dir=tmp_path)
