"""Pictures of all kinds, preprocessing from all sources, and image classifiers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from looseleaf import Budget, Example
from looseleaf.testing.models import seeded
from looseleaf_vision import ImageClassifier, Preprocess, as_image
from looseleaf_vision.testing import SIZE, ToyNetwork, toy_classifier, toy_clip, toy_pictures


def test_pictures_of_all_kinds_are_read_alike() -> None:
    pixels = toy_pictures().train[0].inputs["image"]
    kinds = [pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
             np.dstack([pixels, np.full((SIZE, SIZE), 255, np.uint8)])]
    for source in (toy_clip().preprocess, toy_classifier().preprocess):
        first, *others = source.read(kinds)
        assert first.shape == (3, SIZE, SIZE)
        for other in others:
            torch.testing.assert_close(other, first, atol=1e-6, rtol=0)
    clear = np.zeros((4, 4, 4), np.uint8)
    assert np.asarray(as_image(clear)).min() == 255  # transparent parts are white
    assert as_image(np.zeros((5, 4), np.uint8)).mode == "RGB"
    grey = Preprocess(size=4, mean=(0.5,), std=(0.5,))
    assert grey.read([clear]).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="uint8"):
        as_image(np.zeros((4, 4, 3)))


def test_pictures_can_be_read_at_another_size() -> None:
    pixels, whole = toy_pictures(size=9).train[0].inputs["image"], torch.from_numpy
    for source in (toy_clip().preprocess, toy_classifier().preprocess):
        assert torch.equal(source.read([pixels], 9)[0], whole(pixels).permute(2, 0, 1).float() / 255)
        assert source.read([pixels], 5).shape == (1, 3, 5, 5)


def test_random_crops_depend_on_the_generator_alone() -> None:
    source, picture = toy_classifier().preprocess, toy_pictures(size=40).train[0].inputs["image"]
    one, two, other = (source.crops([picture] * 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (4, 3, SIZE, SIZE)
    whole = source.crops([picture], torch.Generator().manual_seed(0), (1.0, 1.0), flip=False)
    assert (whole - source.read([picture])).abs().mean() < 0.1


def test_sources_of_preprocessing() -> None:
    preset = SimpleNamespace(crop_size=[8], resize_size=[10], mean=[0.1] * 3, std=[0.2] * 3,
                             interpolation="InterpolationMode.BILINEAR")
    timm = nn.Linear(1, 1)
    timm.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1,) * 3, "std": (0.2,) * 3, "crop_pct": 0.8,
                           "interpolation": "bilinear"}
    picture = Image.fromarray(toy_pictures(size=24).train[0].inputs["image"])
    one, two = Preprocess(preset), Preprocess(timm)
    assert one.size == two.size == (8, 8) and one.mean == (0.1,) * 3 and one.resize == two.resize == 10
    assert torch.equal(one.read([picture]), two.read([picture]))
    function = Preprocess(lambda image: torch.ones(3, 8, 8))
    assert function.size == (8, 8) and function.normalize(function.read([picture])).mean() == 1
    with pytest.raises(ValueError, match="size=224"):
        Preprocess()


def test_an_image_classifier_of_any_library() -> None:
    examples = toy_pictures().test
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                    image_size=SIZE, patch_size=8, num_labels=3)
    config.id2label = {0: "cat", 1: "dog", 2: "house"}
    vit = seeded(lambda: transformers.ViTForImageClassification(config)).eval()
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    classifier = ImageClassifier(vit, processor)
    assert classifier.classes == ["cat", "dog", "house"]
    values = processor(images=[e.inputs["image"] for e in examples], return_tensors="pt").pixel_values
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(classifier.read(examples)), vit(pixel_values=values).logits)
    predictor = classifier.predictor()
    rows = torch.as_tensor(predictor.scores(examples))
    assert rows.shape == (len(examples), 3)
    torch.testing.assert_close(rows.exp().sum(1), torch.ones(len(examples)))
    assert set(predictor.predict(examples)) <= {"cat", "dog", "house"}

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ToyNetwork(4)

        def forward(self, pixels):
            return (self.inner(pixels),)

    plain = ImageClassifier(Tuple().eval(), size=SIZE)
    assert plain.logits(plain.read(examples)).shape == (len(examples), 4)
    with pytest.raises(ValueError, match="names of the classes"):
        plain.predictor()
    budget = Budget()
    budget.meter(plain).log_probs(plain.read(examples))
    assert budget.used["calls"] == len(examples)


def test_a_dual_encoder_as_classifier_is_its_zero_shot_prediction() -> None:
    from looseleaf_vision import TemplatePrompt

    encoder, task = toy_clip(), toy_pictures()
    classifier = ImageClassifier.of_encoder(encoder, task.classes)
    mine, theirs = (torch.as_tensor(p.scores(task.test)) for p in (
        classifier.predictor(), TemplatePrompt(task.classes).on(encoder)))
    torch.testing.assert_close(mine, theirs)


def test_modes_come_back_after_scoring() -> None:
    classifier = toy_classifier()
    classifier.model.train()
    classifier.model.norm.eval()
    classifier.predictor().scores([Example({"image": toy_pictures().test[0].inputs["image"]}, "red")])
    assert classifier.model.training and not classifier.model.norm.training
    assert classifier.model.norm.num_batches_tracked == 0
