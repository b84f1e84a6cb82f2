"""Dense against sparse: the same networks give the same rows, weights are left alone, and real classifiers work."""

import contextlib
import copy
import dataclasses
import importlib.util

import pytest
import torch

from looseleaf import Masks, Task, Unstructured, prunable_parameters
from looseleaf_reprogram_lt import LinearHead, TransferCost, TransferData, VisualReprogram, text_classes
from looseleaf_reprogram_lt.probe import sparsity
from looseleaf_tickets import Ticket
from looseleaf_vision import ImageClassifier
from looseleaf_vision.testing import toy_classifier, toy_clip, toy_pictures

QUICK = {"shots": (2, 0), "seeds": 2, "epochs": 3, "batch_size": 8}


def magnitude(model, level):
    return Unstructured(level).select({n: p.detach().abs() for n, p in prunable_parameters(model).items()})


def test_zero_sparsity_is_the_dense_network_exactly_and_weights_are_left_alone():
    model, task = toy_classifier(), toy_pictures()
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    whole = Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in prunable_parameters(model.model).items()})
    half = magnitude(model.model, 0.5)
    other = toy_classifier(seed=1).model
    data = TransferData([task], {"whole": whole, "half": half, "ticket": Ticket(whole, other.state_dict()),
                                 "network": copy.deepcopy(other)})
    report = TransferCost(**QUICK).run(model, data, progress=False)
    assert all(torch.equal(before[n], t) for n, t in model.model.state_dict().items())
    arrays = report.arrays
    for name in (n for n in arrays if n.endswith("dense")):
        assert arrays[name] == arrays[name.replace("dense", "whole")]
    assert any(arrays[n] != arrays[n.replace("dense", "half")] for n in arrays if n.endswith("dense"))
    for name in (n for n in arrays if n.endswith("ticket")):
        assert arrays[name] == arrays[name.replace("ticket", "network")]
    table = next(t for t in report.tables if t.title == "Dense against sparse")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert {row["shots"] for row in rows} == {2, "all"} and {row["method"] for row in rows} == {"vp", "lp"}
    assert all(row["lost"] == row["low"] == row["high"] == row["ECE added"] == 0
               for row in rows if row["network"] == "whole")
    for row in rows:
        if row["network"] == "half":
            dense = next(r for r in rows if r["network"] == "dense" and all(
                r[k] == row[k] for k in ("task", "shots", "method")))
            assert row["lost"] == pytest.approx(dense["accuracy"] - row["accuracy"])
            assert row["ECE added"] == pytest.approx(row["ECE"] - dense["ECE"])
    assert len(report.images) == 1 and report.images[0].captions == ["dense", "whole", "half", "ticket", "network"]


def test_upstream_agreement_accuracy_and_sparsity_without_the_first_convolution():
    model, task = toy_classifier(), toy_pictures()
    examples = [dataclasses.replace(e, target=3) for e in task.test]
    masks = magnitude(model.model, 0.5)
    report = TransferCost(**QUICK, methods=("lp",)).run(model, TransferData([task], {"half": masks}, examples),
                                                        progress=False)
    (_, none, alike, dense), (_, half, agreement, accuracy) = report.tables[0].rows
    found = model.predictor().scores(examples).argmax(1)
    assert none == 0 and alike == 1 and dense == pytest.approx(float((found == 3).float().mean()))
    network = copy.deepcopy(model.model)
    masks.make_permanent(network)
    sparse = ImageClassifier(network, model.preprocess).predictor(range(12)).scores(examples).argmax(1)
    assert agreement == pytest.approx(float((sparse == found).float().mean()))
    assert accuracy == pytest.approx(float((sparse == 3).float().mean()))
    counted = [n for n in masks if n != "first.weight"]
    assert half == sparsity(network) == pytest.approx(sum(map(masks.removed, counted)) / sum(map(masks.total, counted)))


def test_a_run_goes_on_from_its_state(tmp_path):
    model, task = toy_classifier(), toy_pictures()
    data = TransferData([task], {"half": magnitude(model.model, 0.5)})
    options = {**QUICK, "seeds": 1, "shots": (2,)}
    whole = TransferCost(**options).run(model, data, progress=False)
    probe = TransferCost(**options, state_dir=str(tmp_path))
    for _ in range(2):
        assert probe.run(model, data, progress=False).arrays == whole.arrays
    assert len(list(tmp_path.iterdir())) == 4


def test_bad_input_of_the_probe():
    model, task = toy_classifier(), toy_pictures()
    masks = magnitude(model.model, 0.5)
    probe = TransferCost(**QUICK)
    for data, error, words in (
            (None, TypeError, "expected TransferData"), (TransferData([], {"half": masks}), ValueError, "data.tasks"),
            (TransferData([task, task], {"half": masks}), ValueError, "different names"),
            (TransferData([task], {}), ValueError, "one sparse network or more"),
            (TransferData([task], {"dense": masks}), ValueError, "none called 'dense'"),
            (TransferData([task], {"half": 0.5}), TypeError, "expected Masks, a Ticket or a network, got float"),
            (TransferData([dataclasses.replace(task, test=())], {"half": masks}), ValueError, "test examples"),
            (TransferData([task], {"half": Masks({"odd": torch.ones(2, dtype=torch.bool)})}), ValueError,
             "for another model")):
        with pytest.raises(error, match=words):
            probe.run(model, data, progress=False)
    with pytest.raises(ValueError, match="shots"):
        TransferCost(shots=())
    with pytest.raises(ValueError, match="methods"):
        TransferCost(methods=("ft",))


def transformers_resnet():
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7)
    processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, image_mean=[0.5] * 3,
                                       image_std=[0.25] * 3)
    return ImageClassifier(ResNetForImageClassification(config).eval(), processor, size=32)


def transformers_vit():
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
                       patch_size=8, num_labels=7)
    return ImageClassifier(ViTForImageClassification(config).eval(),
                           ViTImageProcessor(size={"height": 32, "width": 32}))


def compiled():
    model = toy_classifier()
    return ImageClassifier(torch.compile(model.model, backend="eager"), model.preprocess)


def timm_resnet():
    import timm

    return ImageClassifier(timm.create_model("resnet10t", num_classes=9).eval(), size=32)


def torchvision_squeezed():
    from torchvision.models import mobilenet_v3_small

    return ImageClassifier(mobilenet_v3_small(num_classes=9).eval(), size=32, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize("make", [transformers_resnet, transformers_vit, compiled, timm_resnet, torchvision_squeezed])
def test_classifiers_of_several_libraries(make):
    library = make.__name__.split("_")[0]
    if library in ("timm", "torchvision"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):  # its wheel has none beside a torch for the CPU, and no classifier needs them
            with contextlib.suppress(RuntimeError):
                operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    task: Task = toy_pictures()
    for optimizer in (VisualReprogram(epochs=2, in_size=8), LinearHead(epochs=2)):
        prompt = optimizer.optimize(task, model, progress=False)
        assert 0 <= task.evaluate(prompt.on(model)).score <= 1
    data = TransferData([task], {"half": magnitude(model.model, 0.5)})
    options = {**QUICK, "seeds": 1, "shots": (2,), "in_size": 8}
    assert TransferCost(**options).run(model, data, progress=False).tables[0].rows[1][1] > 0.3


def test_clip_with_one_output_for_each_text():
    model = text_classes(toy_clip(), ["red", "green", "blue"], ("a photo of a {}.", "a drawing of a {}."))
    assert model.classes[3] == "a drawing of a red."
    optimizer = VisualReprogram(prompt="add", pad=4, optimizer="sgd", lr=40, epochs=3)
    task = toy_pictures(3)
    prompt = optimizer.optimize(task, model, progress=False)
    assert prompt.program.any() and task.evaluate(prompt.on(model)).class_scores is not None
    rate = optimizer.recipe
    assert rate.rate(0, 4) == 40 and rate.rate(6, 4) == pytest.approx(20) and rate.momentum == 0.9
    adam = VisualReprogram().recipe
    assert [adam.rate(e, 1) for e in (0, 49, 50, 71, 72)] == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4])
    assert adam.weight_decay == 0 and adam.batch_size == 128
