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
    weight: Any = dict(model.named_parameters())["weight"]
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




# ------------------------------------------------------------------------------------------------ writes under scores
def scores_by_magnitude(model: nn.Module, targets: Any = None) -> dict[str, torch.Tensor]:
    return {n: p.detach().abs() for n, p in prunable_parameters(model, targets).items()}


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_an_adapter_is_not_merged_into_weights_with_scores(safe: bool, options: Any) -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny_llama(), torch.arange(12)[None]
    learned = LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"],
                                                         init_lora_weights=False, **options)).eval()
    expected = adapted(ids).logits
    with pytest.raises(ValueError, match=r"to be hardened before .*an adapter merged.*remove\(\)"):
        adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(adapted(ids).logits, expected)
    masks = learned.harden()
    learned.remove()
    masks.apply(adapted)
    torch.testing.assert_close(adapted.merge_and_unload(safe_merge=safe)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def set_data(layer: Any) -> None:
    layer.weight.data = torch.ones(24, 8)


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def set_rows(layer: Any) -> None:
    layer.weight.data[:2] = 1.0


@pytest.mark.parametrize("write", [
    set_data, add_to_data, set_rows, lambda m: nn.init.ones_(m.weight), lambda m: m.weight.view(-1).zero_(),
    lambda m: m.weight.detach()[0].copy_(torch.ones(8)), lambda m: torch._foreach_add_([m.weight], 1.0),
    lambda m: torch.add(m.bias[:, None], 1.0, out=m.weight), lambda m: m.weight.T.mul_(2),
    lambda m: setattr(m, "weight", torch.ones(24, 8))])
def test_what_would_be_lost_is_refused(write: Any) -> None:
    model = small_network()
    with LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model)), torch.no_grad():
        before = model(X)
        with pytest.raises((ValueError, AttributeError, TypeError)):
            write(model.get_submodule("hidden"))
        assert torch.equal(model(X), before)
        out = model.get_submodule("hidden").weight * 2.0  # type: ignore[operator]
        assert type(out) is torch.Tensor and out.add_(1.0) is out, "what is computed from a weight is a plain tensor"


def test_a_new_parameter_lies_behind_the_scores() -> None:
    model = small_network()
    with LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model)) as learned:
        hidden: Any = model.get_submodule("hidden")
        hidden.weight = nn.Parameter(torch.ones(24, 8))
        assert torch.equal(hidden.weight, learned.harden()["hidden.weight"].float())
    assert hidden.weight.eq(1).all()


def test_tied_or_resized_since() -> None:
    model: Any = tiny_llama(tie_word_embeddings=False)
    with LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model, ["lm_head", "layers.0"])) as learned:
        ids = torch.arange(12)[None]
        before = model(ids).logits
        model.resize_token_embeddings(70)
        torch.testing.assert_close(model(ids).logits[..., :64], before)
        with pytest.raises(ValueError, match=r"lm_head\.weight.*resized or tied since"):
            learned.harden()
    model = tiny_llama(tie_word_embeddings=False)
    with LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model, ["lm_head", "layers.0"])) as learned:
        model.lm_head.weight = model.model.embed_tokens.weight
        with pytest.raises(ValueError, match=r"lm_head\.weight.*resized or tied since"):
            learned.harden()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.all()


def test_averages_are_of_scores_and_dense_weights() -> None:
    model = small_network().eval()
    learned = LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model))
    average = torch.optim.swa_utils.AveragedModel(model)
    first, dense = [s.detach().clone() for s in learned.parameters()], dict(model.named_parameters())["hidden.weight"]
    former = dense.detach().clone()
    average.update_parameters(model)
    with torch.no_grad():
        for score in learned.parameters():
            score.neg_()
        dense.add_(1.0)
    average.update_parameters(model)
    averaged = dict(average.module.named_parameters())
    torch.testing.assert_close(averaged["hidden.weight"], former + 0.5)
    assert len(first) == 4 and all(not averaged[f"{n}_scores.scores"].any() for n in learned.places)
    assert not torch.equal(average(X), model(X))


def test_quantised_and_loaded_under_scores() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model)) as learned:
        masks = learned.harden()
        quantised = torch.ao.quantization.quantize_dynamic(model, {type(model[0])}, torch.qint8)
        assert not quantised(torch.eye(8)).isnan().any()
        state = {n: torch.ones_like(t) for n, t in model.state_dict().items() if "scores" not in n}
        model.load_state_dict(state, strict=False, assign=True)
        assert torch.equal(model[0].weight, masks["0.weight"].float())
    assert model[0].weight.eq(1).all() and type(model[0]) is nn.Linear


def test_several_weights_of_one_module() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    x, names = (torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)), list(dict(model.named_parameters()))
    before = model(*x)[0]
    outer = LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model, ["q_proj_weight", "out_proj"]))
    inner = LearnedMasks(model, Unstructured(0.5), init=scores_by_magnitude(model, ["k_proj_weight", "v_proj_weight"]))
    twin = copy.deepcopy(model)
    masks = Masks({**outer.harden(), **inner.harden()})
    pruned = model(*x)[0]
    pruned.sum().backward()
    assert all(s.grad is not None and s.grad.any() for part in (outer, inner) for s in part.parameters())
    outer.remove()
    inner.remove()
    assert type(model) is nn.MultiheadAttention and list(dict(model.named_parameters())) == names
    assert torch.equal(model(*x)[0], before) and torch.equal(twin(*x)[0], pruned)
    masks.apply(model)
    torch.testing.assert_close(model(*x)[0], pruned)
