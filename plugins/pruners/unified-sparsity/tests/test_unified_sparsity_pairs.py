"""A model with two sets of weights in each layer, as BAGEL: scores, masks and what is left after shrinking."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from looseleaf.testing.models import seeded
from looseleaf_unified_sparsity import Calibration, Components, UnifiedSparsity, count_parameters, shrink, survey
from looseleaf_unified_sparsity.stand_in import GatedMlp, KeyCache, SmallUnified, toy_batch, toy_model, toy_tasks

torch.set_num_threads(1)


def outputs(m: Any) -> list[torch.Tensor]:
    """Logits of both tasks."""
    b = toy_batch(5)
    with torch.no_grad():
        return [m(**b), m(codes=b["codes"])]


def test_components_by_name() -> None:
    found = Components.of(toy_model())
    assert found.kind == "pairs" and len(found["generation"]) == 4
    gen, und = found["generation"][1], found["understanding"][1]
    assert gen.attention.out == ("layers.1.self_attn.o_proj_moe_gen",) and gen.attention.paired
    assert und.attention.q == "layers.1.self_attn.q_proj" and und.attention.paired
    assert [m.down for m in gen.mlps] == ["layers.1.mlp_moe_gen.down_proj"]
    assert [m.down for m in und.mlps] == ["layers.1.mlp.down_proj"]


@pytest.mark.parametrize("what", ["width", "heads", "depth"])
@pytest.mark.parametrize("component", ["understanding", "generation"])
def test_keep_1_is_the_same_model(what: Any, component: Any) -> None:
    m, before = toy_model(), outputs(toy_model())
    masks = UnifiedSparsity(1.0, what, component).prune(m, {"generation": [toy_batch(1)]})
    assert masks.removed() == 0
    masks.apply(m)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(m), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(shrink(m, masks)), strict=True))
    assert count_parameters(m)["total"] == count_parameters(toy_model())["total"]


# ---------------------------------------------------------------------------------------------- scores, by hand
def test_scores_of_neurons_are_those_of_a_plain_loop() -> None:
    """Sum over tasks of mean over tokens of |act(gate) * up|, times the norm of the column; no padding."""
    m, seen = toy_model(), []
    m.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data = toy_tasks()
    with torch.no_grad():
        m(**data["generation"][0])
        m(**data["understanding"][0])
    real = data["generation"][0]["attention_mask"].bool()
    tokens = [seen[0][real], seen[1].flatten(0, 1)]
    norms = m.layers[2].mlp.down_proj.weight.detach().norm(dim=0).tolist()
    expected = [sum(sum(abs(float(t[j])) for t in rows) / len(rows) for rows in tokens) * norms[j] for j in range(48)]
    pruner = UnifiedSparsity(component="understanding")
    name = "layers.2.mlp.down_proj.weight"
    scores = pruner.score(m, data)
    unit = scores[name].sum(0) + scores["layers.2.mlp.gate_proj.weight"].sum(1) + \
        scores["layers.2.mlp.up_proj.weight"].sum(1)
    torch.testing.assert_close(unit, torch.tensor(expected), rtol=1e-5, atol=0)
    kept = pruner.prune(m, data)[name].any(0)
    assert set(kept.nonzero()[:, 0].tolist()) == set(torch.tensor(expected).topk(24).indices.tolist())
    one = UnifiedSparsity(tasks=("generation",)).score(m, data)[name]
    assert not torch.allclose(one, scores[name]) and bool((one < scores[name]).all()), "scores of tasks add"


def test_scores_of_heads_are_those_of_a_plain_loop() -> None:
    m, seen = toy_model(), []
    m.layers[1].self_attn.o_proj_moe_gen.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        m(**toy_batch(1))
    weight = m.layers[1].self_attn.o_proj_moe_gen.weight.detach()
    expected = [float((seen[0][..., 8 * h:8 * h + 8] @ weight[:, 8 * h:8 * h + 8].T).abs().mean()) for h in range(4)]
    scores = UnifiedSparsity(what="heads", component="generation").score(m, {"generation": [toy_batch(1)]})
    q, o = (scores[f"layers.1.self_attn.{x}_proj_moe_gen.weight"] for x in "qo")
    units = q.view(4, 8, -1).sum((1, 2)) + o.T.reshape(4, 8, -1).sum((1, 2))
    torch.testing.assert_close(units, torch.tensor(expected))
    masks = UnifiedSparsity(0.1, "heads", "generation").prune(m, {"generation": [toy_batch(1)]})
    assert int(masks["layers.1.self_attn.o_proj_moe_gen.weight"].any(0).sum()) == 8, "one head stays"
    assert masks["layers.1.self_attn.k_proj_moe_gen.weight"].all(), "text meets these keys, too"


def reference_states(m: SmallUnified, b: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """h_in, h_mid and h_out of each layer for the drawn tokens, computed layer by layer."""
    with torch.no_grad():
        cache = m.read(b["text"], b["attention_mask"])
        begun = torch.cat([torch.full((len(b["codes"]), 1), 16), b["codes"][:, :-1]], 1)
        x, rows = m.drawn(begun) + m.drawn_places.weight, []
        for layer in m.layers:
            real = torch.ones(x.shape[:2], dtype=torch.bool)
            mid = x + layer.self_attn(layer.input_layernorm_moe_gen(x), mode="gen", real=real, past_key_values=cache)[0]
            out = mid + layer.mlp_moe_gen(layer.post_attention_layernorm_moe_gen(mid))
            rows.append([x, mid, out])
            x = out
    return rows


@pytest.mark.parametrize("unit, ends", [("block", (0, 2)), ("attention", (0, 1)), ("mlp", (1, 2))])
def test_the_most_similar_layers_go(unit: Any, ends: tuple[int, int]) -> None:
    m, b = toy_model(), toy_batch(1)
    expected = torch.stack([F.cosine_similarity(r[ends[0]], r[ends[1]], dim=-1).mean() for r in reference_states(m, b)])
    masks = UnifiedSparsity(0.5, "depth", "generation", unit).prune(m, {"generation": [b]})
    names = {"block": ["self_attn.o_proj_moe_gen", "mlp_moe_gen.down_proj"], "attention": ["self_attn.o_proj_moe_gen"],
             "mlp": ["mlp_moe_gen.down_proj"]}[unit]
    gone = {n for n in range(4) if not masks[f"layers.{n}.{names[0]}.weight"].any()}
    assert gone == set(expected.topk(2).indices.tolist())
    assert all(masks.removed(f"layers.{n}.{name}.weight") == masks.total(f"layers.{n}.{name}.weight")
               for n in gone for name in names)
    table = survey(m, {"generation": [b]}).tables[0]
    values = [row[table.columns.index(unit)] for row in table.rows if row[0] == "generation"]
    torch.testing.assert_close(torch.tensor(values), expected.float())


def test_a_planted_layer_goes_first() -> None:
    """A layer that does nothing is the first to go, and dropping it changes nothing."""
    m = toy_model()
    with torch.no_grad():
        m.layers[2].self_attn.o_proj.weight.mul_(1e-6)
        m.layers[2].mlp.down_proj.weight.mul_(1e-6)
    before = outputs(m)
    masks = UnifiedSparsity(0.75, "depth", tasks=("understanding",)).prune(m, toy_tasks())
    assert [n for n in range(4) if not masks[f"layers.{n}.mlp.down_proj.weight"].any()] == [2]
    masks.apply(m)
    torch.testing.assert_close(before[1], outputs(m)[1], atol=1e-4, rtol=1e-4)


def test_last_first_and_random() -> None:
    m = toy_model()

    def gone(**options: Any) -> list[int]:
        masks = UnifiedSparsity(0.5, "depth", "generation", **options).prune(m)
        return [n for n in range(4) if not masks[f"layers.{n}.mlp_moe_gen.down_proj.weight"].any()]

    assert gone(criterion="last") == [2, 3] and gone(criterion="first") == [0, 1]
    assert len({tuple(gone(criterion="random", seed=seed)) for seed in range(5)}) > 1
    a, b = (UnifiedSparsity(criterion="random", seed=seed).prune(m) for seed in (0, 1))
    assert a != b and a.sparsity() == b.sparsity() > 0


# ---------------------------------------------------------------------------------------------- shrinking
@pytest.mark.parametrize("component", ["understanding", "generation"])
@pytest.mark.parametrize("keep", [0.5, 0.9, 0.03])
def test_narrower_mlps_compute_what_the_masks_do(component: Any, keep: float) -> None:
    m = toy_model()
    masks = UnifiedSparsity(keep, component=component).prune(m, toy_tasks())
    small = shrink(copy.deepcopy(m), masks)
    left, path = max(1, round(keep * 48)), "mlp" if component == "understanding" else "mlp_moe_gen"
    assert small.layers[0].get_submodule(path).up_proj.weight.shape == (left, 32)
    gone = count_parameters(m)["total"] - count_parameters(small)["total"]
    assert gone == masks.removed() == 4 * 3 * 32 * (48 - left)
    masks.apply(m)
    for a, b in zip(outputs(m), outputs(small), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    on = copy.deepcopy(m)
    for a, b in zip(outputs(m), outputs(shrink(on)), strict=True):  # the masks that the model carries
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_dropped_generation_is_what_the_masks_do(unit: Any) -> None:
    m = toy_model()
    masks = UnifiedSparsity(0.5, "depth", "generation", unit).prune(m, toy_tasks(), progress=False)
    small = shrink(copy.deepcopy(m), masks)
    gone = 2 * ((4 * 32 * 32 if unit != "mlp" else 0) + (3 * 32 * 48 if unit != "attention" else 0))
    assert count_parameters(m)["total"] - count_parameters(small)["total"] == gone
    masks.apply(m)
    for a, b in zip(outputs(m), outputs(small), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    b = toy_batch(3)
    assert torch.equal(small.draw(b["text"], b["attention_mask"]), m.draw(b["text"], b["attention_mask"]))


def test_dropped_understanding_leaves_no_keys() -> None:
    """In a layer without understanding the picture sees no text; masks alone would leave its keys."""
    m, b = toy_model(), toy_batch(3)
    masks = UnifiedSparsity(0.5, "depth", "understanding").prune(m, toy_tasks())
    gone = [n for n in range(4) if not masks[f"layers.{n}.self_attn.o_proj.weight"].any()]
    small = shrink(copy.deepcopy(m), masks)
    with torch.no_grad():
        cache = small.read(b["text"], b["attention_mask"])
        assert sorted(cache.layers) == [n for n in range(4) if n not in gone]

        # by hand: text skips the layer, and the drawn tokens of that layer see themselves alone
        expected = KeyCache()
        x = m.words(b["text"]) + m.text_places.weight
        for n, layer in enumerate(m.layers):
            if n not in gone:
                x, _ = layer(x, mode="und", real=b["attention_mask"].bool(), past_key_values=expected)
        begun = torch.cat([torch.full((3, 1), 16), b["codes"][:, :-1]], 1)
        by_hand = m.code_head(m.run(m.drawn(begun) + m.drawn_places.weight, "gen", expected))
        torch.testing.assert_close(small(**b), by_hand, atol=1e-6, rtol=1e-6)
        masks.apply(m)
        assert not torch.allclose(m(**b), by_hand, atol=1e-3), "masks leave the keys"
        torch.testing.assert_close(small(codes=b["codes"]), m(codes=b["codes"]), atol=1e-6, rtol=1e-6)


def test_heads_of_pairs_stay_as_zeros() -> None:
    m = toy_model()
    masks = UnifiedSparsity(0.5, "heads", "generation").prune(m, toy_tasks() | {"understanding": [toy_batch(1)]})
    before = copy.deepcopy(m)
    masks.apply(before)
    with pytest.warns(UserWarning, match="heads of one component stay as zeros"):
        small = shrink(m, masks)
    assert small.layers[0].self_attn.o_proj_moe_gen.weight.shape == (32, 32)


def test_several_masks_at_once() -> None:
    m = toy_model()
    width = UnifiedSparsity(0.5, "width", "generation").prune(m, {"generation": [toy_batch(1)]})
    depth = UnifiedSparsity(0.5, "depth", "generation").prune(m, {"generation": [toy_batch(1)]})
    both = width & depth
    small = shrink(copy.deepcopy(m), width, depth)
    same = shrink(copy.deepcopy(m), both)
    both.apply(m)
    for a, b, c in zip(outputs(m), outputs(small), outputs(same), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert torch.equal(b, c)


def test_saved_masks_shrink_a_dense_model(tmp_path: Any) -> None:
    from looseleaf import Masks

    masks = UnifiedSparsity(0.5).prune(toy_model(), toy_tasks())
    masks.save(tmp_path / "m.safetensors")
    one, two = shrink(toy_model(), masks), shrink(toy_model(), Masks.load(tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(two), strict=True))
    names = {n: p.shape for n, p in one.named_parameters()}
    assert names == {n: p.shape for n, p in two.named_parameters()}


def test_training_of_a_shrunken_model() -> None:
    m = toy_model()
    m.layers[0].requires_grad_(False)
    small = shrink(m, UnifiedSparsity(0.5).prune(m, toy_tasks()))
    assert not small.layers[0].mlp.up_proj.weight.requires_grad and small.layers[1].mlp.up_proj.weight.requires_grad
    small(**toy_batch(1)).sum().backward()
    assert small.layers[1].mlp.up_proj.weight.grad is not None


def test_calibration_leaves_no_hooks_after_an_exception() -> None:
    m = toy_model()

    def fails(_: Any) -> None:
        raise RuntimeError("in the middle")

    for what in ("width", "heads", "depth"):
        with pytest.raises(RuntimeError, match="in the middle"):
            UnifiedSparsity(0.5, what, "generation").prune(m, {"generation": [toy_batch(1), fails]})
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in m.modules())


def test_a_phase_function_tells_tokens_of_one_call_apart() -> None:
    """A layer that is given the tokens of both components at once."""
    m, b = toy_model(), toy_batch(1)
    which = torch.zeros(3, 16, dtype=torch.bool)
    which[:, 5:] = True
    phase = lambda inputs: which if inputs["mode"] == "gen" else "unknown"  # noqa: E731
    report = survey(m, Calibration({"generation": [b]}, phase))
    states = reference_states(m, b)
    expected = torch.stack([F.cosine_similarity(r[0][:, 5:], r[2][:, 5:], dim=-1).mean() for r in states])
    values = [row[3] for row in report.tables[0].rows if row[0] == "generation"]
    torch.testing.assert_close(torch.tensor(values), expected)


class PackedAttention(nn.Module):
    """As BAGEL's: all samples in one row of tokens, keywords alone, the cache as second value."""

    head_dim = 8

    def __init__(self) -> None:
        super().__init__()
        for suffix in ("", "_moe_gen"):
            for name in "qkvo":
                self.add_module(f"{name}_proj{suffix}", nn.Linear(16, 16))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_inference(*args, **kwargs)

    def forward_inference(self, packed_query_sequence: torch.Tensor, past_key_values: dict[int, Any],
                          mode: str = "und") -> Any:
        suffix = "_moe_gen" if mode == "gen" else ""
        q, k, v = (self.get_submodule(f"{name}_proj{suffix}")(packed_query_sequence) for name in "qkv")
        before = past_key_values.get(id(self))
        k, v = (k, v) if before is None else (torch.cat([before[0], k]), torch.cat([before[1], v]))
        past_key_values[id(self)] = k, v
        out = F.scaled_dot_product_attention(*(x.unflatten(-1, (2, 8)).transpose(0, 1) for x in (q, k, v)))
        return self.get_submodule(f"o_proj{suffix}")(out.transpose(0, 1).flatten(1)), past_key_values


class PackedLayer(nn.Module):
    """h + attention, + MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.mlp_moe_gen = PackedAttention(), GatedMlp(16, 24), GatedMlp(16, 24)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, mode = kwargs["packed_query_sequence"], kwargs["mode"]
        out, cache = self.self_attn(packed_query_sequence=x, past_key_values=kwargs["past_key_values"], mode=mode)
        x = x + out
        return x + (self.mlp_moe_gen if mode == "gen" else self.mlp)(x), cache


class Packed(nn.Module):
    """Reads five tokens, then changes seven others."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList(PackedLayer() for _ in range(4))})

    def forward(self, seed: int = 0) -> tuple[torch.Tensor, dict[int, Any]]:
        cache: dict[int, Any] = {}
        for mode, count in (("und", 5), ("gen", 7)):
            x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed + count))
            for layer in self.language_model["layers"]:  # type: ignore[union-attr]
                x, cache = layer(packed_query_sequence=x, past_key_values=cache, mode=mode)
        return x, cache


@torch.no_grad()
def test_packed_tokens_as_bagel_has_them() -> None:
    m = seeded(Packed).eval()
    data = {"generation": [lambda model: model()]}
    assert len(survey(m, data).tables[0].rows) == 8
    for component in ("understanding", "generation"):
        for unit in ("block", "attention", "mlp"):
            masks = UnifiedSparsity(0.5, "depth", component, unit).prune(m, data)  # type: ignore[arg-type]
            small, masked = shrink(copy.deepcopy(m), masks), copy.deepcopy(m)
            x, cache = small(1)
            gone = {"understanding": 7, "generation": 5}[component] if unit != "mlp" else 12
            assert sorted(len(keys) for keys, _ in cache.values()) == [gone, gone, 12, 12]
            masks.apply(masked)
            if component == "generation" or unit == "mlp":
                torch.testing.assert_close(x, masked(1)[0], atol=1e-6, rtol=1e-6)
    both = [UnifiedSparsity(0.5, "depth", component, criterion="last").prune(m)  # type: ignore[arg-type]
            for component in ("understanding", "generation")]
    x, cache = shrink(copy.deepcopy(m), *both)(1)
    two = copy.deepcopy(m)
    del two.language_model["layers"][2:]  # type: ignore[union-attr]
    torch.testing.assert_close(x, two(1)[0], atol=1e-6, rtol=1e-6)
    assert len(cache) == 2
