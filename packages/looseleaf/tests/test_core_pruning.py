"""Targets, selection rules, masks and the conformance kit of pruners."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from looseleaf import NM, Masks, Selection, Structured, Unstructured, prunable_parameters
from looseleaf.errors import UnsupportedModelError
from looseleaf.pruning.selection import _keep_largest
from looseleaf.pruning.targets import input_dims, model_facts
from looseleaf.testing.models import small_network, tied_network

torch.set_num_threads(1)


def scores_of(model: nn.Module, **given: Any) -> dict[str, Tensor]:
    return {name: p.detach().abs() for name, p in prunable_parameters(model, **given).items()}


def llama(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{**dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, tie_word_embeddings=True), **changes})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(20).view(2, 10)


class TestTargets:
    def test_body_of_a_llama(self) -> None:
        for tied in (True, False):
            names = list(prunable_parameters(llama(tie_word_embeddings=tied)))
            assert len(names) == 14 and all("layers" in n and "norm" not in n for n in names)

    def test_order_is_that_of_the_model(self) -> None:
        model = llama()
        order = [n for n, _ in model.named_parameters()]
        found = [order.index(n) for n in prunable_parameters(model, ["*.mlp", "*.self_attn"])]
        assert found == sorted(found)

    @pytest.mark.parametrize("pattern, count", [
        ("model.layers.*.mlp", 6), ("*.q_proj", 2), ("*.q_proj.weight", 2), ("model.layers.0", 7), ("*", 14),
        ("model", 14)])
    def test_patterns(self, pattern: str, count: int) -> None:
        assert len(prunable_parameters(llama(), pattern)) == count

    def test_exclude_wins(self) -> None:
        assert len(prunable_parameters(llama(), "*", exclude=["*.mlp", "lm_head"])) == 8

    def test_head_and_embedding_only_when_named(self) -> None:
        model = llama(tie_word_embeddings=False)
        assert list(prunable_parameters(model, "lm_head")) == ["lm_head.weight"]
        assert list(prunable_parameters(model, "model.embed_tokens")) == ["model.embed_tokens.weight"]
        assert "model.embed_tokens.weight" not in prunable_parameters(model, "*")

    def test_a_weight_tied_to_an_embedding_is_an_embedding(self) -> None:
        with pytest.raises(ValueError, match="embedding or an adapter only by its exact name"):
            prunable_parameters(llama(), "*embed*")

    def test_tied_once(self) -> None:
        assert list(prunable_parameters(tied_network())) == ["first.weight", "other.weight"]

    @pytest.mark.parametrize("pattern, hint", [
        ("model.layer.*.mlp", "model.layers.0.mlp"), ("*.q_prj", "q_proj"), ("modle.layers.0.mlp.up_proj", "up_proj")])
    def test_unknown_pattern_names_near_names(self, pattern: str, hint: str) -> None:
        for field in ("targets", "exclude"):
            with pytest.raises(ValueError, match=hint) as caught:
                prunable_parameters(llama(), **{field: pattern})
            assert field in str(caught.value) and pattern in str(caught.value)

    @pytest.mark.parametrize("bad", [[], [""], [3], ""])
    def test_bad_patterns(self, bad: Any) -> None:
        with pytest.raises(ValueError, match="targets"):
            prunable_parameters(llama(), bad)

    def test_only_norms(self) -> None:
        with pytest.raises(ValueError, match="never pruned"):
            prunable_parameters(llama(), "*norm*")

    def test_excluding_everything(self) -> None:
        with pytest.raises(ValueError, match="leaves nothing"):
            prunable_parameters(llama(), exclude="model")

    def test_nothing_to_prune(self) -> None:
        for model in (nn.LayerNorm(3), nn.Sequential(), nn.Embedding(3, 4)):
            with pytest.raises(UnsupportedModelError, match="nothing to prune"):
                prunable_parameters(model)

    def test_classifier_head_of_a_direct_child(self) -> None:
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
        assert list(prunable_parameters(model)) == ["body.weight"]
        assert list(prunable_parameters(model, "*")) == ["body.weight", "classifier.weight"]

    def test_a_single_layer(self) -> None:
        assert list(prunable_parameters(nn.Linear(3, 4))) == ["weight"]

    def test_input_dims(self) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
        dims = input_dims(model, prunable_parameters(model))
        assert len(dims) == 4 and set(dims.values()) == {0}
        assert set(input_dims(llama(), prunable_parameters(llama())).values()) == {1}
        with pytest.raises(ValueError, match="expected a prunable weight"):
            input_dims(model, ["nothing"])

    def test_attention_of_torch(self) -> None:
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        names = list(prunable_parameters(model))
        assert names == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
        masks = Unstructured(0.5).select(scores_of(model))
        x = torch.randn(2, 5, 16)
        dense = model(x)
        masks.apply(model)
        sparse = model(x)
        masks.remove(model)
        assert torch.equal(model(x), dense)
        masks.make_permanent(model)
        torch.testing.assert_close(model(x), sparse)
        assert set(input_dims(model, names).values()) == {1}

    def test_stacked_experts_only_when_spelled_out(self) -> None:
        model = nn.Module()
        model.experts = nn.Module()
        model.experts.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        model.router = nn.Linear(8, 4)
        with pytest.warns(UserWarning, match=r"left out.*experts\.down_proj"):
            assert list(prunable_parameters(model)) == ["router.weight"]
        for pattern in ("*", "router"):
            assert list(prunable_parameters(model, pattern)) == ["router.weight"]
        with pytest.raises(ValueError):
            prunable_parameters(model, "experts.*")
        assert list(prunable_parameters(model, "*.down_proj")) == ["experts.down_proj"]
        assert model_facts(model, ["router.weight"])["left_out"] == 4 * 8 * 6
        with pytest.raises(ValueError, match="not known"):
            input_dims(model, ["experts.down_proj"])
        masks = Unstructured(0.5).select(scores_of(model, targets="*.down_proj")).apply(model)
        assert int((model.experts.down_proj == 0).sum()) == 96
        masks.remove(model)

    def test_names_are_those_of_named_parameters_where_another_module_comes_first(self) -> None:
        class Holder(nn.Module):
            def __init__(self, weight: nn.Parameter) -> None:
                super().__init__()
                self.kept = weight

        layer = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": Holder(layer.weight), "b": layer})
        assert list(prunable_parameters(model)) == ["a.kept"]
        masks = Unstructured(0.5).select(scores_of(model)).apply(model)
        assert int((layer.weight == 0).sum()) == int((model["a"].kept == 0).sum()) == 8  # type: ignore[arg-type]
        masks.remove(model)
        assert model["a"].kept is layer.weight

    def test_facts(self) -> None:
        model = llama()
        facts = model_facts(model, prunable_parameters(model))
        assert facts["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["model"] == "LlamaForCausalLM" and facts["model_type"] == "llama" and facts["tensors"] == 14

    def test_under_masks_the_names_and_parameters_are_the_same(self) -> None:
        model = llama()
        plain = prunable_parameters(model)
        Unstructured(0.5).select(scores_of(model)).apply(model)
        masked = prunable_parameters(model)
        assert list(plain) == list(masked) and all(plain[n] is masked[n] for n in plain)


class TestKeepLargest:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10 ** 6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
           st.booleans())
    def test_equals_a_stable_sort(self, seed: int, dtype: torch.dtype, coarse: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        parts = [torch.randn(5, 9, generator=g), torch.randn(31, generator=g), torch.zeros(4), -torch.zeros(3),
                 torch.tensor([torch.inf, -torch.inf])]
        parts = [((p * 3).round() / 3 if coarse else p).to(dtype) for p in parts]
        flat = torch.cat([p.flatten() for p in parts]).double()
        count = int(torch.randint(0, len(flat) + 1, (1,), generator=g))
        expected = torch.ones(len(flat), dtype=torch.bool)
        expected[flat.sort(stable=True).indices[:count]] = False
        assert torch.equal(torch.cat([m.flatten() for m in _keep_largest(parts, count)]), expected)

    def test_mixed_dtypes_do_not_round_the_threshold(self) -> None:
        fine = torch.tensor([1.0, 1.001, 1.002], dtype=torch.float32)
        coarse = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
        masks = _keep_largest([coarse, fine], 3)
        assert masks[0].tolist() == [False, True] and masks[1].tolist() == [False, False, True]

    def test_many_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import looseleaf.pruning.selection as selection

        parts = [torch.randint(0, 5, (37,)).float(), torch.randint(0, 5, (4, 11)).float()]
        whole = _keep_largest(parts, 40)
        monkeypatch.setattr(selection, "CHUNK", 7)
        assert all(torch.equal(a, b) for a, b in zip(whole, _keep_largest(parts, 40)))

    def test_subnormal_and_huge(self) -> None:
        values = torch.tensor([1e-45, 0.0, 3e38, -3e38, 1e-40])
        assert _keep_largest([values], 3)[0].tolist() == [False, False, True, False, True]


class TestSelection:
    @settings(max_examples=40, deadline=None)
    @given(st.floats(0, 1, exclude_max=True), st.sampled_from(["global", "layer"]))
    def test_unstructured_counts(self, sparsity: float, scope: Any) -> None:
        scores = {"a": torch.rand(7, 11), "b": torch.rand(5), "c": torch.ones(3, 3)}
        masks = Unstructured(sparsity, scope).select(scores)
        if scope == "global":
            assert masks.removed() == round(sparsity * 91)
        else:
            assert all(masks.removed(n) == round(sparsity * s.numel()) for n, s in scores.items())
        assert Unstructured(sparsity, scope).violations(masks) == []

    def test_float_error_does_not_cost_a_weight(self) -> None:
        assert Unstructured(0.29).select({"a": torch.rand(100)}).removed() == 29

    def test_ties_go_by_index(self) -> None:
        masks = Unstructured(0.5).select({"a": torch.ones(4), "b": torch.ones(4)})
        assert not masks["a"].any() and masks["b"].all()

    def test_zero_keeps_everything(self) -> None:
        assert Unstructured(0.0).select({"a": torch.zeros(4)})["a"].all()

    def test_nested(self) -> None:
        scores = {"a": torch.rand(20, 20), "b": torch.rand(30).mul(4).floor()}
        last = None
        for step in range(10):
            masks = Unstructured(step / 10).select(scores)
            assert last is None or (masks & last) == masks
            last = masks

    @pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 8), (1, 4), (3, 4)])
    def test_nm(self, n: int, m: int) -> None:
        scores = {"a": torch.rand(6, 16), "conv": torch.rand(4, 8, 3, 3), "flat": torch.ones(2, 8)}
        masks = NM(n, m).select(scores)
        assert NM(n, m).violations(masks) == [] and masks.sparsity() == pytest.approx(NM(n, m).sparsity)
        groups, kept = scores["a"].view(6, -1, m), masks["a"].view(6, -1, m)
        low = groups.masked_fill(~kept, 9).amin(-1)
        assert bool((groups.masked_fill(kept, -9).amax(-1) <= low).all())
        for y in range(3):  # a convolution groups its input channels
            assert bool((masks["conv"][:, :, y, 0].reshape(4, -1, m).sum(-1) == n).all())

    def test_nm_ties_go_by_index(self) -> None:
        assert NM(2, 4).select({"a": torch.ones(1, 4)})["a"].tolist() == [[False, False, True, True]]

    def test_nm_along_other_dimension(self) -> None:
        masks = NM(2, 4, {"a": 0}).select({"a": torch.rand(8, 3)})
        assert bool((masks["a"].view(2, 4, 3).sum(1) == 2).all())

    def test_nm_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import looseleaf.pruning.selection as selection

        scores = {"a": torch.rand(8, 16)}
        whole = NM(2, 4).select(scores)
        monkeypatch.setattr(selection, "CHUNK", 12)
        assert NM(2, 4).select(scores) == whole

    def test_nm_needs_a_multiple(self) -> None:
        with pytest.raises(ValueError, match="multiple of 4 inputs, 'b' has 6"):
            NM(2, 4).select({"a": torch.rand(2, 8), "b": torch.rand(2, 6)})
        with pytest.raises(ValueError, match="shape"):
            NM(2, 4).select({"bias": torch.rand(8)})

    def test_structured(self) -> None:
        scores = {"a": torch.rand(6, 4), "b": torch.rand(5, 2, 3)}
        for dim in (0, 1):
            masks = Structured(0.5, dim).select(scores)
            assert Structured(0.5, dim).violations(masks) == []
        lost = Structured(0.5).select(scores)["a"].any(1)
        sums = scores["a"].sum(1)
        assert sums[~lost].max() <= sums[lost].min()
        with pytest.raises(ValueError, match="only 2 dimensions"):
            Structured(0.5, 2).select(scores)

    @pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), float("inf"), "half", None, True])
    def test_bad_sparsity(self, sparsity: Any) -> None:
        for cls in (Unstructured, Structured):
            with pytest.raises(ValueError, match=r"sparsity: expected a number in \[0, 1\), got "):
                cls(sparsity)

    @pytest.mark.parametrize("n, m", [(4, 4), (0, 4), (5, 4), (-1, 4), (2.0, 4), (True, 4)])
    def test_bad_nm(self, n: Any, m: Any) -> None:
        with pytest.raises(ValueError, match=r"expected (1 <= n < m|an integer >= 1).*, got "):
            NM(n, m)

    def test_bad_scope_and_dim(self) -> None:
        with pytest.raises(ValueError, match="'global' or 'layer'"):
            Unstructured(0.5, "model")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="dim"):
            Structured(0.5, -1)

    @pytest.mark.parametrize("rule", [Unstructured(0.5), NM(2, 4), Structured(0.5)])
    def test_bad_scores(self, rule: Selection) -> None:
        bad = torch.ones(4, 4)
        bad[1, 2] = torch.nan
        with pytest.raises(ValueError, match=r"'layer\.b' has 1 NaN"):
            rule.select({"layer.a": torch.ones(4, 4), "layer.b": bad})
        with pytest.raises(ValueError, match="no scores"):
            rule.select({})
        with pytest.raises(ValueError, match="floating-point"):
            rule.select({"a": torch.ones(4, 4, dtype=torch.int64)})
        with pytest.raises(ValueError, match="meta device"):
            rule.select({"a": torch.ones(4, 4, device="meta")})

    def test_infinite_scores_are_allowed(self) -> None:
        masks = Unstructured(0.5).select({"a": torch.tensor([torch.inf, 1.0, torch.inf, 0.0])})
        assert masks["a"].tolist() == [True, False, True, False]

    def test_rules_are_values(self) -> None:
        assert Unstructured(0.5) == Unstructured(0.5) and NM(2, 4) == NM() and Structured(0.5).describe()["dim"] == 0

    def test_violations_speak(self) -> None:
        masks = Masks({"a": torch.tensor([[True, True, True, False]])})
        assert Unstructured(0.5).violations(masks) and NM(2, 4).violations(masks)
        assert len(Structured(0.5, 0).violations(masks)) == 1


class TestMasks:
    def masks(self, model: nn.Module, sparsity: float = 0.5) -> Masks:
        return Unstructured(sparsity).select(scores_of(model))

    def test_mapping(self) -> None:
        masks = Masks({"a": torch.tensor([True, False]), "b": torch.tensor([[True]])}, {"x": 1})
        assert list(masks) == ["a", "b"] and len(masks) == 2 and masks.sparsity() == pytest.approx(1 / 3)
        assert masks.sparsity("a") == 0.5 and masks.removed("b") == 0 and masks.total() == 3
        assert masks.table().rows[-1][-1] == pytest.approx(1 / 3) and "1 of 3" in repr(masks)
        assert Masks({}).sparsity() == 0.0

    @pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(2, dtype=torch.uint8), [True]])
    def test_only_bool(self, bad: Any) -> None:
        with pytest.raises(ValueError, match=r"'a': expected .*bool.*, got "):
            Masks({"a": bad})

    def test_algebra(self) -> None:
        a = Masks({"x": torch.tensor([True, True, False, False])})
        b = Masks({"x": torch.tensor([True, False, True, False])})
        assert (a & b)["x"].tolist() == [True, False, False, False]
        assert (a | b)["x"].tolist() == [True, True, True, False]
        assert a.overlap(b) == pytest.approx(1 / 3) and a.cosine(b) == 0.5 and a.hamming(b) == 0.5
        assert a.overlap(a) == a.cosine(a) == 1.0 and a.hamming(a) == 0.0 and a == Masks(dict(a)) and a != b
        nothing = Masks({"x": torch.zeros(4, dtype=torch.bool)})
        assert nothing.overlap(nothing) == nothing.cosine(nothing) == 1.0 and a.cosine(nothing) == 0.0

    def test_algebra_needs_the_same_parameters(self) -> None:
        a = Masks({"x": torch.ones(4, dtype=torch.bool)})
        with pytest.raises(ValueError, match="different parameters, such as 'y'"):
            a & Masks({"x": a["x"], "y": a["x"]})
        with pytest.raises(ValueError, match="shapes"):
            a.overlap(Masks({"x": torch.ones(5, dtype=torch.bool)}))
        with pytest.raises(TypeError):
            a.cosine(3)  # type: ignore[arg-type]

    @pytest.mark.parametrize("build", [small_network, tied_network])
    def test_remove_restores_bits_objects_and_order(self, build: Any) -> None:
        model = build()
        before = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)]
        keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        masks = self.masks(model)
        masks.apply(model)
        assert list(model.state_dict()) == keys, "what is saved under masks is loaded by the plain model"
        masks.remove(model)
        after = list(model.named_parameters(remove_duplicate=False))
        assert [(n, i) for n, i, _ in before] == [(n, id(p)) for n, p in after]
        assert all(torch.equal(old, p) for (_, _, old), (_, p) in zip(before, after))
        assert keys == list(model.state_dict()) and classes == [type(m) for m in model.modules()]

    def test_negative_zero_and_sign_survive(self) -> None:
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[-0.0, 1.0], [2.0, -3.0]]))
        masks = Unstructured(0.5).select({"weight": layer.weight.detach().abs()})
        masks.apply(layer)
        masks.remove(layer)
        assert torch.signbit(layer.weight[0, 0])

    def test_apply_twice_and_other_masks(self) -> None:
        model = small_network()
        masks, other = self.masks(model), self.masks(model, 0.7)
        masks.apply(model).apply(model)
        with pytest.raises(ValueError, match="other masks"):
            other.apply(model)
        with pytest.raises(ValueError, match="other masks"):
            other.remove(model)
        with pytest.raises(ValueError, match="other masks"):
            other.make_permanent(model)
        masks.remove(model)
        other.apply(model)

    def test_remove_without_apply(self) -> None:
        model = small_network()
        with pytest.raises(ValueError, match="nothing to remove"):
            self.masks(model).remove(model)

    def test_apply_is_all_or_nothing(self) -> None:
        model = small_network()
        good = self.masks(model)
        keys = list(model.state_dict())
        for bad in (Masks({**good, "nothing.weight": torch.ones(2, dtype=torch.bool)}),
                    Masks({**good, "last.weight": torch.ones(2, 2, dtype=torch.bool)})):
            with pytest.raises(ValueError, match="another model"):
                bad.apply(model)
            with pytest.raises(ValueError, match="another model"):
                bad.make_permanent(model)
            assert list(model.state_dict()) == keys

    @pytest.mark.parametrize("before", [True, False])
    def test_apply_undone_when_it_fails_halfway(self, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        from looseleaf.pruning.applied import AppliedMask

        model, calls, real = small_network(), [], AppliedMask.zero

        def failing(mask: Any) -> None:
            calls.append(1)
            if len(calls) != 3 or not before:
                real(mask)
            if len(calls) == 3:
                raise KeyboardInterrupt

        was = {n: t.clone() for n, t in model.state_dict().items()}
        attributes = {n: set(vars(m)) for n, m in model.named_modules()}
        monkeypatch.setattr(AppliedMask, "zero", failing)
        with pytest.raises(KeyboardInterrupt):
            self.masks(model).apply(model)
        assert all(torch.equal(t, was[n]) for n, t in model.state_dict().items()) and not Masks.of(model)
        assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes

    def test_another_model_says_where_the_masks_come_from(self) -> None:
        model = small_network()
        masks = Masks(self.masks(model), {"model": "Small", "parameters": 5})
        with pytest.raises(ValueError, match=r"0 of 4 names are known.*Small"):
            masks.apply(nn.Sequential(nn.Linear(2, 2)))

    def test_nan_weights_are_named(self) -> None:
        model = small_network()
        masks = self.masks(model)
        with torch.no_grad():
            model.hidden.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
        with pytest.raises(ValueError, match=r"hidden\.weight"):
            masks.apply(model)

    def test_foreign_parametrization(self) -> None:
        model = small_network()
        masks = self.masks(model)
        nn.utils.parametrizations.weight_norm(model.hidden)
        with pytest.raises(ValueError):
            masks.apply(model)

    def test_tied_weight_is_masked_everywhere(self) -> None:
        model: Any = tied_network()
        masks = self.masks(model).apply(model)
        for layer in (model.first, model.again):
            assert not layer.weight[~masks["first.weight"]].any()
        assert len(list(model.parameters())) == 5
        masks.remove(model)
        assert model.first.weight is model.again.weight
        masks.make_permanent(model)
        assert model.first.weight is model.again.weight and not model.first.weight[~masks["first.weight"]].any()

    @pytest.mark.parametrize("make", [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)])
    def test_an_optimiser_from_before_keeps_working(self, make: Any) -> None:
        model = small_network()
        optimizer, masks = make(model.parameters()), self.masks(model)
        dense = {n: p.detach().clone() for n, p in model.named_parameters()}
        masks.apply(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 8, 8, 8)).square().mean().backward()
            weight: Any = model.hidden
            stored = weight.weight
            assert not stored.grad[~masks["hidden.weight"]].any() and stored.grad.any()
            optimizer.step()
            assert not weight.weight[~masks["hidden.weight"]].any()
        masks.make_permanent(model)
        hidden: Any = model.hidden
        assert not torch.equal(hidden.weight, dense["hidden.weight"])
        assert hidden.weight is stored

    def test_gradient_of_removed_weights_is_zero_even_when_it_overflows(self) -> None:
        layer = nn.Linear(2, 1, bias=False)
        masks = Masks({"weight": torch.tensor([[True, False]])}).apply(layer)
        layer(torch.tensor([[1.0, torch.inf]])).nan_to_num().sum().backward()
        assert layer.weight.grad[0, 1] == 0  # type: ignore[index]
        masks.remove(layer)

    def test_bake_then_remove_and_bake_alone(self) -> None:
        model, other = small_network(), small_network()
        masks = self.masks(model)
        masks.apply(model)
        masks.make_permanent(model)
        masks.remove(model)
        masks.make_permanent(other)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        assert list(model.state_dict()) == list(other.state_dict())

    def test_sparsity_zero_changes_nothing(self) -> None:
        model = small_network().eval()
        x = torch.randn(2, 8, 8, 8)
        before = model(x)
        masks = self.masks(model, 0.0).apply(model)
        assert torch.equal(model(x), before)
        masks.remove(model)

    def test_save_pretrained_and_plain_transformers(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        model = llama()
        masks = self.masks(model).apply(model)
        expected = model(IDS).logits
        masks.make_permanent(model).remove(model)
        model.save_pretrained(tmp_path)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(plain(IDS).logits, expected)
        weights = dict(plain.named_parameters())
        assert all(not weights[n][~m].any() for n, m in masks.items())

    def test_deepcopy_and_dtype_under_masks(self) -> None:
        model = small_network()
        masks = self.masks(model).apply(model)
        twin = copy.deepcopy(model).double()
        masks.remove(twin)
        assert not model.hidden.weight[~masks["hidden.weight"]].any()  # type: ignore[union-attr, index]
        masks.remove(model)
        assert type(model.hidden) is type(twin.hidden) is nn.Linear
        assert twin.hidden.weight.dtype == torch.float64  # type: ignore[union-attr]

    def test_generation_under_masks(self) -> None:
        model = llama()
        with torch.inference_mode():
            masks = self.masks(model).apply(model)
            out = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
            masks.remove(model)
        assert out.shape == (2, 13)


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        g = torch.Generator().manual_seed(0)
        masks = Masks({"a.weight": torch.rand(3, 5, generator=g) > 0.5, "b": torch.rand(17, generator=g) > 0.2,
                       "empty": torch.ones(0, 4, dtype=torch.bool), "one": torch.tensor(True)}, {"rule": "x"})
        path = tmp_path / "deep" / "masks.safetensors"
        masks.save(path, {"seed": 3, "levels": [0.1]})
        loaded = Masks.load(path)
        assert loaded == masks and list(loaded) == list(masks)
        assert loaded.metadata == {"rule": "x", "seed": 3, "levels": [0.1]}
        assert os.listdir(path.parent) == ["masks.safetensors"]
        masks.save(path)
        assert Masks.load(path).metadata == {"rule": "x"}

    def test_eight_weights_to_a_byte(self, tmp_path: Path) -> None:
        Masks({"a": torch.ones(1000, 800, dtype=torch.bool)}).save(tmp_path / "m")
        assert (tmp_path / "m").stat().st_size < 101_000

    def test_eight_weights_to_a_byte_in_memory(self) -> None:
        masks = Masks({"a": torch.rand(1000, 801) > 0.5})
        assert sum(t.numel() * t.element_size() for t in vars(masks)["_packed"].values()) == 100_125
        held = pickle.dumps(masks)
        assert len(held) < 102_000

    def test_not_contiguous(self, tmp_path: Path) -> None:
        masks = Masks({"a": (torch.rand(4, 6) > 0.5).T})
        masks.save(tmp_path / "m")
        assert Masks.load(tmp_path / "m") == masks

    def test_truncated_at_every_place(self, tmp_path: Path) -> None:
        path = tmp_path / "m"
        Masks({"a": torch.ones(40, dtype=torch.bool)}).save(path)
        data = path.read_bytes()
        for size in (0, 1, 7, 8, 20, len(data) - 1):
            path.write_bytes(data[:size])
            with pytest.raises(ValueError, match="not a whole safetensors"):
                Masks.load(path)

    def test_something_else(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        path = tmp_path / "m"
        path.write_text("hello, I am no such file at all")
        with pytest.raises(ValueError, match="not a whole safetensors"):
            Masks.load(path)
        save_file({"a": torch.ones(3)}, path)
        with pytest.raises(ValueError, match=r"expected a file of the format 'looseleaf\.masks"):
            Masks.load(path)
        for shapes in ('{"a": [3]}', '{"b": [3]}', "3", "{"):
            save_file({"a": torch.ones(3)}, path, {"format": "looseleaf.masks/1", "shapes": shapes})
            with pytest.raises(ValueError):
                Masks.load(path)
        for head in ({"format": "looseleaf.masks/1"}, {"format": "looseleaf.masks/2"},
                     {"format": "looseleaf.masks/2", "info": '{"shapes": {"a": [3]}, "metadata": {}}'}):
            save_file({"a": torch.ones(3)}, path, head)
            with pytest.raises(ValueError, match=r"Write it again with Masks\.save"):
                Masks.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="got no file"):
            Masks.load(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError):
            Masks.load(tmp_path)

    def test_unwritable(self, tmp_path: Path) -> None:
        masks = Masks({"a": torch.ones(3, dtype=torch.bool)})
        (tmp_path / "file").write_text("x")
        with pytest.raises(OSError, match="file"):
            masks.save(tmp_path / "file" / "m")
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match="folder"):
            masks.save(tmp_path / "folder")
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

    def test_a_failed_write_leaves_the_former_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "m"
        old = Masks({"a": torch.ones(3, dtype=torch.bool)})
        old.save(path)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            Masks({"a": torch.zeros(3, dtype=torch.bool)}).save(path)
        assert Masks.load(path) == old and os.listdir(tmp_path) == ["m"]

    def test_metadata_must_be_json(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON"):
            Masks({"a": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "m", {"x": object()})
        assert not (tmp_path / "m").exists()
