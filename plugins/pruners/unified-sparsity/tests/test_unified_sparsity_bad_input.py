"""Errors say what was expected, what was given and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import Masks
from looseleaf.testing.models import small_network, tiny_llama
from looseleaf_unified_sparsity import Calibration, Components, UnifiedSparsity, shrink, survey, to_experts
from looseleaf_unified_sparsity.stand_in import KeyCache, toy_batch, toy_model, toy_tasks

torch.set_num_threads(1)
IDS = torch.arange(8)[None]


@pytest.mark.parametrize("fields, message", [
    ({"keep": 0.0}, r"keep: expected a number in \(0, 1\], got 0.0"), ({"keep": 1.01}, "keep"), ({"keep": -1}, "keep"),
    ({"what": "weights"}, "what"), ({"component": "both"}, "component"), ({"unit": "layer"}, "unit"),
    ({"tasks": ()}, "tasks"), ({"tasks": "drawing"}, "tasks"), ({"layers": ""}, "layers"), ({"seed": -1}, "seed"),
    ({"criterion": "last"}, "expected 'paper' or 'random' with what='width', got 'last'")])
def test_parameters(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnifiedSparsity(**fields)


def no_generation() -> Any:
    """Pairs of norms alone."""
    model = toy_model()
    for layer in model.layers:
        for name in "qkvo":
            delattr(layer.self_attn, f"{name}_proj_moe_gen")
        delattr(layer, "mlp_moe_gen")
    return model


def wrong_phase(_: Any) -> torch.Tensor:
    """Of another number of tokens."""
    return torch.ones(1, 3, dtype=torch.bool)


class TwoDecoders(nn.Module):
    """Which of them is meant?"""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = tiny_llama().model, tiny_llama().model


@pytest.mark.parametrize("call, error, message", [
    (lambda: UnifiedSparsity().prune(tiny_llama()), ValueError, "expected .'understanding': .*, got NoneType"),
    (lambda: UnifiedSparsity().prune(tiny_llama(), IDS), ValueError, "or a Calibration, got Tensor"),
    (lambda: Calibration({}), ValueError, "expected .'understanding'"),
    (lambda: Calibration({"reading": [IDS]}), ValueError, "or one of both, .* got .'reading'"),
    (lambda: Calibration({"generation": []}), ValueError, "with batches or functions of the model"),
    (lambda: UnifiedSparsity(tasks=("generation",)).prune(tiny_llama(), {"understanding": [IDS]}), ValueError,
     "expected forwards of the task generation, got understanding"),
    (lambda: UnifiedSparsity(component="generation").prune(no_generation(), toy_tasks()), ValueError,
     "expected weights of generation in the layers of this model, got none"),
    (lambda: UnifiedSparsity(tasks=("understanding",), component="generation").prune(toy_model(), toy_tasks()),
     ValueError, "expected tokens of generation while the task understanding runs, got those of nothing"),
    (lambda: UnifiedSparsity(layers="blocks.*").prune(tiny_llama(), {"understanding": [IDS]}), ValueError,
     r"no module matches 'blocks.\*'. Near names are"),
    (lambda: Components.of(TwoDecoders()), ValueError,
     r"several lists of layers, one.layers, two.layers: expected one; say which with layers='one.layers.\*'"),
    (lambda: Components.of("BAGEL"), TypeError, "expected a torch module or a pipeline of diffusers, got str"),
    (lambda: Components.of(nn.Linear(2, 2)), TypeError, "Linear has no layers with an MLP .* give layers="),
    (lambda: UnifiedSparsity(what="depth", criterion="last").prune(small_network()), TypeError,
     "SmallNetwork: expected layers with attention and MLP, got none"),
    (lambda: UnifiedSparsity(what="heads", criterion="random").prune(small_network()), TypeError,
     "heads are not scored here"),
    (lambda: survey(toy_model(), {"understanding": [lambda model: None]}), ValueError,
     "expected tokens of a component"),
    (lambda: UnifiedSparsity().prune(tiny_llama(), Calibration({"understanding": [IDS]}, wrong_phase)), ValueError,
     r"phase: expected the name of a component or a tensor of shape \(1, 8\), got \(1, 3\)")])
def test_data_and_models(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_weights_that_are_no_numbers() -> None:
    model = toy_model()
    model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'layers.1.mlp.up_proj.weight' has 1 NaN"):
        UnifiedSparsity().prune(model, toy_tasks())
    model = toy_model()
    model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"integers in 'layers.1.mlp.up_proj.weight': load the model without quantis"):
        UnifiedSparsity().prune(model, toy_tasks())
    model = tiny_llama()
    model.is_quantized = True
    for call in (lambda: UnifiedSparsity().prune(model, {"understanding": [IDS]}), lambda: to_experts(model, {})):
        with pytest.raises(ValueError, match="a quantised model: load the model without quantisation"):
            call()


def test_shrinking() -> None:
    model = toy_model()
    masks = UnifiedSparsity(0.5).prune(model, toy_tasks())
    shapes = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="expected masks, or a model that carries some, got neither"):
        shrink(model)
    name = "layers.3.mlp.down_proj.weight"
    ragged = masks[name].clone()
    ragged[0, 0] = ~ragged[0, 0]
    with pytest.raises(ValueError, match=r"masks of whole units, got single weights removed in 'layers\.3\.mlp"):
        shrink(model, Masks({**masks, name: ragged}))
    with pytest.raises(ValueError, match="these masks are for another model"):
        shrink(toy_model(layers=2), masks)
    assert shapes == {n: p.shape for n, p in model.named_parameters()}, "nothing is changed"
    llama = tiny_llama(attention_bias=True)
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(ValueError, match="has no inputs left, but a bias that stays"):
        shrink(llama, Masks({name: torch.zeros(64, 64, dtype=torch.bool)}))
    grouped = torch.ones(64, 64, dtype=torch.bool)
    grouped[:, :16] = False
    with pytest.raises(ValueError, match="expected whole groups of heads that share a key"):
        shrink(tiny_llama(), Masks({name: grouped}))


def test_a_dropped_half_needs_calls_for_one_component() -> None:
    model = toy_model()
    small = shrink(model, UnifiedSparsity(0.5, "depth").prune(model, toy_tasks()))
    with pytest.raises(ValueError, match="was dropped for understanding: expected a call for one component"):
        small.run(small.words(toy_batch()["text"]), "both", KeyCache())
