"""Rules: the same count in each row, a threshold, tied structures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from looseleaf import NM, Masks, PerRow, Structured, Threshold, Tied, prunable_parameters
from looseleaf.pruning.targets import named_by
from looseleaf.testing.models import small_network, tiny_llama

torch.set_num_threads(1)


def scores_of(model: nn.Module, **given: Any) -> dict[str, Tensor]:
    return {name: p.detach().abs() for name, p in prunable_parameters(model, **given).items()}


# ------------------------------------------------------------------------------------------------ rows and thresholds
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6), st.floats(0, 1, exclude_max=True))
def test_per_row_equals_a_sort_of_each_row(seed: int, sparsity: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = {"ids": torch.randint(0, 4, (3, 17), generator=g).float(), "conv": torch.rand(4, 2, 3, generator=g),
              "one": torch.rand(9, generator=g)}
    masks = PerRow(sparsity).select(scores)
    assert not PerRow(sparsity).violations(masks)
    for name, score in scores.items():
        rows = score.reshape(1 if score.ndim == 1 else len(score), -1)
        for row, kept in zip(rows, masks[name].view(rows.shape)):
            gone = round(sparsity * len(row))
            expected = torch.ones(len(row), dtype=torch.bool)
            expected[row.sort(stable=True).indices[:gone]] = False
            assert torch.equal(kept, expected), "of equal scores the first goes first"


def test_per_row_by_count_and_along_other_dimensions() -> None:
    scores = {"pixel_values": torch.rand(5, 196)}
    assert PerRow(keep=49).select(scores)["pixel_values"].sum(1).eq(49).all()
    assert PerRow(keep=0).select(scores).sparsity() == 1 and PerRow(keep=196).select(scores).sparsity() == 0
    with pytest.raises(ValueError, match=r"PerRow\.keep: expected at most 196, .*'pixel_values', got 197"):
        PerRow(keep=197).select(scores)
    assert PerRow(0.5).violations(PerRow(0.4).select(scores)) and not PerRow(0.1).violations(PerRow(0.1).select(scores))
    masks = PerRow(0.5, dims={"a": 0}).select({"a": torch.rand(8, 3)})
    assert masks["a"].sum(0).eq(4).all()
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    scores = scores_of(model)
    for rule in (PerRow(0.5), NM(2, 4)):
        fitted = rule.for_model(model, scores)
        masks = fitted.select(scores)
        assert all(mask.sum(0).eq(mask.shape[0] // 2).all() for mask in masks.values()), "Conv1D has (in, out)"
        assert not fitted.violations(masks) and fitted.describe() == rule.describe() and "dims" not in rule.describe()
    for wrong in ({"sparsity": 1.0}, {"keep": -1}, {"keep": 2.5}):
        with pytest.raises(ValueError, match=f"PerRow.{next(iter(wrong))}: expected"):
            PerRow(**wrong)  # type: ignore[arg-type]


def test_threshold() -> None:
    masks = Threshold(0.005).select({"a": torch.tensor([0.0049, 0.005, 0.0051], dtype=torch.float64),
                                     "b": torch.tensor([-1.0, torch.inf])})
    assert masks["a"].tolist() == [False, False, True] and masks["b"].tolist() == [False, True]
    assert masks.metadata == {"rule": "Threshold", "value": 0.005} and not Threshold(0.005).violations(masks)
    with pytest.raises(ValueError, match=r"Threshold\.value: expected a number, got nan"):
        Threshold(float("nan"))
    with pytest.raises(ValueError, match="'a' has 1 NaN"):
        Threshold(0.0).select({"a": torch.tensor([torch.nan])})


# ------------------------------------------------------------------------------------------------ tied structures
NEURONS = Tied({"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}, within="layers.*.mlp")


def test_neurons_of_a_llama_go_as_a_whole() -> None:
    """The masked model computes what one with smaller MLPs does."""
    model, ids = tiny_llama(), torch.arange(24).view(2, 12)
    rule = Structured(0.25, tied=(NEURONS,))
    scores = scores_of(model, targets="layers.*.mlp")
    masks = rule.select(scores)
    assert not rule.violations(masks) and masks.sparsity() == 0.25
    small = tiny_llama(intermediate_size=72)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for n in range(2):
        path = f"model.layers.{n}.mlp"
        alive = masks[f"{path}.up_proj.weight"].any(1)
        neurons = sum(scores[f"{path}.{m}.weight"].sum(1 - d).double() for m, d in
                      (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)))
        assert isinstance(neurons, Tensor) and neurons[~alive].max() < neurons[alive].min()
        for member, dim in NEURONS.members.items():
            name = f"{path}.{member}"
            assert torch.equal(masks[name], alive[:, None].expand(-1, 64) if dim == 0 else alive.expand(64, -1))
            state[name] = state[name].index_select(dim, alive.nonzero()[:, 0])
    small.load_state_dict(state)
    masks.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, small(ids).logits)
    assert rule.violations(Masks({**masks, "model.layers.0.mlp.up_proj.weight": masks[
        "model.layers.1.mlp.up_proj.weight"]}))


def test_channels_of_a_convolutional_network() -> None:
    """Chains, where the middle weight is in two ties, and channels that are flattened into inputs."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(6 * 4 * 4, 5)).eval()
    with torch.no_grad():
        model[1].bias.uniform_(-1, 1)  # type: ignore[union-attr, operator]
    rule = Structured(0.5, tied=(Tied({"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1}),
                                 Tied({"3.weight": 0, "6.weight": 1})))
    scores = {n: p.detach().abs() for n, p in model.named_parameters() if n not in ("3.bias", "6.bias")}
    masks = rule.select(scores)
    assert not rule.violations(masks)
    first, second = masks["0.bias"], masks["3.weight"].any((1, 2, 3))
    assert int(first.sum()) == 4 and int(second.sum()) == 3
    assert torch.equal(masks["3.weight"], (second[:, None] & first)[..., None, None].expand(6, 8, 3, 3))
    assert torch.equal(masks["6.weight"], second.repeat_interleave(16).expand(5, 96))
    a, b = first.nonzero()[:, 0], second.nonzero()[:, 0]
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(3 * 4 * 4, 5)).eval()
    s = model.state_dict()
    small.load_state_dict({
        **{n: s[n][a] for n in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")},
        "1.num_batches_tracked": s["1.num_batches_tracked"],
        "3.weight": s["3.weight"][b][:, a], "3.bias": s["3.bias"][b],
        "6.weight": s["6.weight"].view(5, 6, 16)[:, b].reshape(5, 48), "6.bias": s["6.bias"]})
    x = torch.randn(2, 3, 8, 8)
    masked = copy.deepcopy(model)
    masks.make_permanent(masked)
    with torch.no_grad():
        masked[3].bias[~second] = 0  # type: ignore[index, operator]
        torch.testing.assert_close(masked(x), small(x))


def test_ties_of_the_small_network() -> None:
    model = small_network()
    rule = Structured(0.25, tied=(Tied({"first.weight": 0, "second.weight": 1}),
                                  Tied({"second.weight": 0, "hidden.weight": 1})))
    masks = rule.select(scores_of(model))
    assert not rule.violations(masks) and masks.sparsity("last.weight") == 0.25, "what is not tied is thinned by itself"
    assert rule.violations(Structured(0.25).select(scores_of(model)))
    assert rule.describe()["tied"][0]["members"] == {"first.weight": 0, "second.weight": 1}
    assert "tied" not in Structured(0.5).describe()


def test_heads_that_share_keys() -> None:
    model = tiny_llama()
    heads = Tied({"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0, "o_proj.weight": 1}, "self_attn", units=2)
    masks = Structured(0.5, tied=(heads,)).select(scores_of(model, targets="self_attn"))
    for n in range(2):
        q, k = (masks[f"model.layers.{n}.self_attn.{x}_proj.weight"].any(1) for x in "qk")
        assert torch.equal(q.view(2, 32).any(1), k.view(2, 16).any(1)) and int(k.sum()) == 16


@pytest.mark.parametrize("tied, words", [
    (Tied({"up_proj.weight": 0, "gate_proj.bias": 0}, "mlp"), r"scores of 'model\.layers\.0\.mlp\.gate_proj\.bias'"),
    (Tied({"up_proj.weight": 0}, "mpl"), r"Tied\.within: expected .*got 'mpl'"),
    (Tied({"up_proj.weight": 2}, "mlp"), "only 2 dimensions"),
    (Tied({"up_proj.weight": 0, "down_proj.weight": 0}, "mlp"), "multiple of 64 slices, got .*up_proj.* 96"),
    (Tied({"up_proj.weight": 0}, "mlp", units=7), "multiple of 7")])
def test_ties_that_cannot_be(tied: Tied, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Structured(0.5, tied=(tied,)).select(scores_of(tiny_llama()))


def test_ties_are_checked() -> None:
    with pytest.raises(ValueError, match="members: expected at least one"):
        Tied({})
    with pytest.raises(ValueError, match=r"Tied\.units: expected"):
        Tied({"a": 0}, units=0)


def test_ties_of_a_wrapped_model() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    rule = Structured(0.25, tied=(NEURONS,))
    masks = rule.select(scores_of(model, targets="layers.*.mlp"))
    plain = rule.select(scores_of(tiny_llama(), targets="layers.*.mlp"))
    assert not rule.violations(masks) and [m.sum() for m in masks.values()] == [m.sum() for m in plain.values()]


# ------------------------------------------------------------------------------------------------ patterns
def test_patterns_mean_what_they_mean_everywhere() -> None:
    names = ["head.weight", "body.0.mlp.up.weight", "body.0.mlp.up.bias", "body.1.mlp.up.weight", "body.1.head.weight"]
    assert named_by("head", names) == ["head.weight"], "a whole name names that alone"
    assert named_by("mlp", names) == names[1:4] and named_by("body.*.mlp", names) == names[1:4]
    assert named_by("up.weight", names) == [names[1], names[3]] and named_by("*.weight", names) == [
        n for n in names if n.endswith("weight")]
    assert named_by("body.*.weight", names) == [], "a star stays within one part"
    assert named_by("body.**.weight", names) == [names[1], names[3], names[4]]
    assert named_by("1", names) == names[3:] and named_by("nothing", names) == []
