"""2:4 weights as torch's semi-structured tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from looseleaf import NM, Masks, Unstructured, UnsupportedModelError, prunable_parameters
from looseleaf.pruning.selection import Selection
from looseleaf_lab.compressed import compress_semi_structured, fewer_zeros


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def masks_of(model: nn.Module, rule: Selection) -> Masks:
    return rule.select({n: p.detach().abs() for n, p in prunable_parameters(model).items()})


def test_other_patterns_are_refused() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'0\.weight': expected 2 of 4 inputs kept, got more in \d+ groups"):
        compress_semi_structured(model, masks_of(model, Unstructured(0.5)))
    with pytest.raises(ValueError, match="another model"):
        compress_semi_structured(model, masks_of(nn.Sequential(net()), NM(2, 4)))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert fewer_zeros(torch.ones(2, 6, dtype=torch.bool)) == 1
    assert fewer_zeros(torch.zeros(2, 8, dtype=torch.bool)) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_processor_is_refused_and_says_what_is_wanted() -> None:
    model = net().half()
    wanted = r"(?s)'0\.weight': expected a CUDA device of capability 8\.0.*got torch\.float16, \(128, 64\), on cpu"
    masks, before = masks_of(model, NM(2, 4)), copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=wanted):
        compress_semi_structured(model, masks.apply(model))
    masks.remove(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_our_masks_are_what_torch_compresses_without_loss() -> None:
    """The conversion itself has no need of a GPU."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    model = net().half()
    masks_of(model, NM(2, 4)).make_permanent(model)
    for weight in (model[0].weight.detach(), model[2].weight.detach()):  # type: ignore[index]
        small, places = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        assert small.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(small, places), weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
                    reason="needs an NVIDIA GPU with sparse tensor cores")
def test_outputs_are_those_of_the_pruned_model() -> None:
    model = net().half().cuda()
    masks = masks_of(model, NM(2, 4))
    x = torch.randn(64, 64, dtype=torch.float16, device="cuda")
    masks.apply(model)
    expected = model(x)
    assert compress_semi_structured(model, masks) == ["0.weight", "2.weight"]
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-3)
