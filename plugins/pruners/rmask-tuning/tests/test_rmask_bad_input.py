"""Errors say what was expected, what was given and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import Task
from looseleaf.testing.models import seeded, small_network, tied_network
from looseleaf_rmask_tuning import LabelledData, RMaskTuning, choose_weights, classifier_task, clip_task
from looseleaf_vision import TemplatePrompt
from looseleaf_vision.testing import toy_classifier, toy_clip, toy_pictures

torch.set_num_threads(1)
INPUTS = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("fields", "message"), [
    ({"targets": ()}, "targets"), ({"targets": 3}, "targets"), ({"exclude": ("",)}, "exclude"),
    ({"init": 0.004}, "above threshold=0.005"), ({"gdr_lambda": 1.5}, "gdr_lambda"), ({"lr": 0.0}, "lr"),
    ({"temperature": 0.0}, "temperature"), ({"epochs": 0}, "epochs"), ({"reg_weight": -1.0}, "reg_weight")])
def test_parameters(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RMaskTuning(**fields)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: choose_weights(tied_network()), "expected 'attention' to name weights .* give name patterns"),
    (lambda: choose_weights(small_network(), "mlp"), "expected 'mlp' to name weights"),
    (lambda: choose_weights(small_network(), ("q_proj",)), "targets='q_proj' matches no parameter"),
    (lambda: choose_weights(small_network(), exclude="k_proj"), "exclude='k_proj' matches no parameter"),
    (lambda: LabelledData.of_tensors(INPUTS, [0] * 8, range(3)), "examples of two classes or more, got only 0"),
    (lambda: LabelledData.of_tensors(INPUTS, [0] * 8), "two different classes or more"),
    (lambda: LabelledData.of_tensors(INPUTS, [0, 3] * 4, "ab"), "numbers of 2 classes, 0 to 1, got 3"),
    (lambda: LabelledData.of_tensors(INPUTS, [0, 1]), r"tensor of 2 rows, as there are labels, got \(8, 8, 8, 8\)"),
    (lambda: LabelledData(["dog", "catt"], ["dog", "cat"], max, max), r"got 'catt'\. Did you mean 'cat'"),
    (lambda: clip_task(toy_classifier(), toy_pictures()), "expected a looseleaf_vision.DualEncoder"),
    (lambda: classifier_task(toy_clip(), toy_pictures()), "expected a looseleaf_vision.ImageClassifier"),
    (lambda: classifier_task(toy_classifier(4), toy_pictures()), "expected one of the classes"),
    (lambda: clip_task(toy_clip(), toy_pictures(), prompt=TemplatePrompt(["a", "b"])), "predicts the classes"),
    (lambda: clip_task(toy_clip(), Task("t", [], classes=["a", "b"])), "expected training examples"),
    (lambda: RMaskTuning().prune(small_network()), "expected what looseleaf_rmask_tuning.clip_task"),
    (lambda: RMaskTuning().prune(toy_clip(2).model, clip_task(toy_clip(2), toy_pictures())), "got another CLIPModel"),
    (lambda: RMaskTuning(lr=0.1).prune(small_network(), LabelledData.of_tensors(INPUTS, [0, 1] * 4)),
     r"logits: expected \(B, 2\), one for each class, got \(8, 8\)"),
    (lambda: RMaskTuning(lr=0.1).prune(small_network().half(), LabelledData.of_tensors(INPUTS, [0, 1] * 4, range(8))),
     "expected float32 weights")])
def test_data_and_models(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_quantised_weights() -> None:
    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Linear(8, 8)
            self.attn.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)

    with pytest.raises(ValueError, match=r"integers in 'attn.weight': load the model without quantisation"):
        choose_weights(Integers())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    with pytest.raises(ValueError, match="of the type Linear: load the model without quantisation"):
        choose_weights(packed, "all")
    marked = small_network()
    marked.is_quantized = True
    with pytest.raises(ValueError, match="a quantised model"):
        choose_weights(marked)


def test_a_loss_that_is_not_finite_names_step_and_layer() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    inputs = torch.randn(8, 4)
    inputs[3, 1] = torch.inf
    data = LabelledData.of_tensors(inputs, [0, 1] * 4)
    with pytest.raises(ValueError, match=r"step 0: expected a finite loss, got nan; the first layer .* is '0'"):
        RMaskTuning(targets=("**",), lr=0.1).prune(model, data)
    model[1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the first layer whose output is not finite is '1'"):
        RMaskTuning(targets=("**",), lr=0.1).prune(model, LabelledData.of_tensors(torch.randn(8, 4), [0, 1] * 4))


def test_too_few_steps_are_warned_of() -> None:
    model, data = small_network(), LabelledData.of_tensors(INPUTS, torch.arange(8), range(8))
    with pytest.warns(UserWarning, match=r"rates of 30 steps sum to 0.0012, and a score must move by 0.005"):
        masks = RMaskTuning().prune(model, data)
    assert masks.removed() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RMaskTuning(lr=2e-3, epochs=10).prune(model, data)
