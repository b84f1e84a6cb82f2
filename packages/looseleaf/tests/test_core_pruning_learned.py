"""Masks that are learned by gradients of scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import NM, LearnedMasks, Masks, Threshold, Unstructured, prunable_parameters
from looseleaf.testing.common import assert_unchanged, snapshot
from looseleaf.testing.models import small_network, tied_network, tiny_llama

torch.set_num_threads(1)
X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def layer() -> nn.Linear:
    made = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 4.0]]))
    return made


@pytest.mark.parametrize("scores", [[[0.01, 0.01], [0.01, 0.01]], [[0.01, 0.0], [-1.0, 0.005]]])
def test_gradient_is_straight_through(scores: Any) -> None:
    """dL/dm = dL/d(W b) * W, also where b = 0; the weights themselves get theirs where they are kept."""
    model = layer()
    learned = LearnedMasks(model, Threshold(0.005), init={"weight": torch.tensor(scores)})
    model(torch.tensor([3.0, 1.0])).sum().backward()
    (score,) = learned.parameters()
    assert score.grad is not None and score.grad.tolist() == [[3.0, -2.0], [1.5, 4.0]]
    kept = torch.tensor(scores) > 0.005
    weight: Any = model.parametrizations.weight.original  # type: ignore[union-attr]
    assert torch.equal(weight.grad, torch.tensor([[3.0, 1.0], [3.0, 1.0]]) * kept)
    assert torch.equal(learned.harden()["weight"], kept)


@pytest.mark.parametrize("frozen", [True, False])
def test_training_on_a_frozen_model_and_hardening(frozen: bool) -> None:
    model = small_network().eval()
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    before, dense = snapshot(model), model(X)
    target = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    with LearnedMasks(model, Threshold(0.005), init=0.01) as learned:
        assert torch.equal(model(X), dense), "fresh masks keep everything"
        optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(X) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        masks, soft = learned.harden(), model(X).detach()
        assert losses[-1] < losses[0] and 0 < masks.removed() < masks.total()
    before["gradients"] = snapshot(model)["gradients"]
    assert_unchanged(before, model)
    masks.apply(model)
    assert torch.equal(model(X), soft), "hard masks compute what the learned ones did"
    assert masks.metadata["rule"] == "Threshold" and masks.metadata["model"] == "SmallNetwork"


@pytest.mark.parametrize("rule", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)])
def test_rules_over_several_weights(rule: Any) -> None:
    """A rule may compare the scores of all weights; masks follow the scores after each step."""
    model = small_network()
    init = {n: p.detach().abs() for n, p in prunable_parameters(model).items()}
    learned = LearnedMasks(model, rule, init=init)
    assert learned.harden() == rule.select(init)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        masks = learned.harden()
        assert not rule.violations(masks)
        for name, mask in masks.items():
            module, attribute = learned.places[name][0]
            assert torch.equal(getattr(module, attribute) != 0, mask)
    assert masks != rule.select(init)
    with torch.no_grad():
        for score in learned.parameters():
            score.data.neg_()  # some optimisers write so
    model(X).sum().backward()
    assert learned.harden() != masks


def test_tied_weights_and_a_llama() -> None:
    tied = tied_network()
    learned = LearnedMasks(tied, Unstructured(0.5), init={n: p.detach().abs() for n, p in
                                                          prunable_parameters(tied).items()})
    assert len(list(learned.parameters())) == 2
    tied(torch.randn(3, 16)).sum().backward()
    assert all(s.grad is not None and s.grad.any() for s in learned.parameters())
    learned.remove()
    assert tied.first.weight is tied.again.weight  # type: ignore[union-attr]
    model, ids = tiny_llama(), torch.arange(12)[None]
    before = model(ids).logits
    with LearnedMasks(model, Threshold(0.0), weights=["model.layers.0.mlp.up_proj.weight"], init=1.0) as learned:
        model.gradient_checkpointing_enable()
        model.train()(ids, labels=ids).loss.backward()
        assert all(s.grad is not None for s in learned.parameters())
    assert torch.equal(model.eval()(ids).logits, before)


def test_half_precision() -> None:
    model = small_network().bfloat16()
    with LearnedMasks(model, Threshold(0.0), init=1.0) as learned:
        model(X.bfloat16()).sum().backward()
        assert all(s.dtype == torch.float32 and s.grad.any() for s in learned.parameters())


def test_files(tmp_path: Path) -> None:
    model = small_network()
    learned = LearnedMasks(model, Unstructured(0.5), init={n: torch.rand(p.shape) for n, p in
                                                           prunable_parameters(model).items()})
    learned.save(tmp_path / "scores.safetensors")
    other = LearnedMasks(small_network(), Unstructured(0.5))
    other.load(tmp_path / "scores.safetensors")
    assert other.harden() == learned.harden()
    with pytest.raises(ValueError, match=r"expected scores of the rule .*0\.2.*got .*0\.5"):
        LearnedMasks(small_network(), Unstructured(0.2)).load(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="for another model"):
        LearnedMasks(nn.Sequential(nn.Linear(3, 3)), Unstructured(0.5)).load(tmp_path / "scores.safetensors")


def test_what_is_saved_under_learned_masks_is_the_pruned_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = tiny_llama(), torch.arange(12)[None]
    init = {n: p.detach().abs() for n, p in prunable_parameters(model).items()}
    with LearnedMasks(model, Unstructured(0.5), init=init) as learned:
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        state = {n: t.clone() for n, t in model.state_dict().items()}
        twin = tiny_llama(seed=1)
        again = LearnedMasks(twin, Unstructured(0.5))
        twin.load_state_dict(state)  # a run that goes on
        assert torch.equal(twin(ids).logits, model(ids).logits) and again.harden() == learned.harden()
        dense = tiny_llama(seed=2)
        twin.load_state_dict(dense.state_dict(), strict=False)  # plain weights go behind the masks
        again.remove()
        assert torch.equal(twin(ids).logits, dense(ids).logits)


def test_copies() -> None:
    model = small_network().eval()
    learned = LearnedMasks(model, Unstructured(0.5), init={n: p.detach().abs() for n, p in
                                                           prunable_parameters(model).items()})
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    with torch.no_grad():
        for score in learned.parameters():
            score.neg_()
    assert not torch.equal(twin(X), model(X)), "a copy has scores of its own"
    learned.remove()
    assert type(model.get_submodule("hidden")) is nn.Linear and not torch.equal(twin(X), model(X))


def test_compiled() -> None:
    model = small_network().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with LearnedMasks(model, Unstructured(0.5), init={n: p.detach().abs() for n, p in
                                                      prunable_parameters(model).items()}) as learned:
        torch.testing.assert_close(compiled(X), model(X))
        compiled(X).sum().backward()
        assert all(s.grad is not None and s.grad.any() for s in learned.parameters())


def test_models_that_cannot_be() -> None:
    model = small_network()
    with pytest.raises(ValueError, match=r"weights: expected .* of this SmallNetwork, got 'nothing'"):
        LearnedMasks(model, Threshold(0.0), weights=["nothing"])
    with pytest.raises(ValueError, match=r"init: expected scores of shape \(24, 8\) for 'hidden\.weight'"):
        LearnedMasks(model, Threshold(0.0), weights=["hidden.weight"], init={"hidden.weight": torch.ones(2)})
    masks = Masks({"hidden.weight": torch.ones(24, 8, dtype=torch.bool)}).apply(model)
    with pytest.raises(ValueError, match="carries masks"):
        LearnedMasks(model, Threshold(0.0))
    masks.remove(model)
    with LearnedMasks(model, Threshold(0.0)), pytest.raises(ValueError, match="parametrization"):
        LearnedMasks(model, Threshold(0.0))
    with LearnedMasks(model, Threshold(0.0)), pytest.raises(ValueError, match="parametrization"):
        masks.apply(model)
    assert type(model.get_submodule("hidden")) is nn.Linear


