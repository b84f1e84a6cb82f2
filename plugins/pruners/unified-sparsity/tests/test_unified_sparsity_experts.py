"""Dense MLPs as experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from looseleaf.testing.models import seeded, tiny_bert, tiny_llama
from looseleaf_unified_sparsity import (
    Experts,
    UnifiedSparsity,
    count_parameters,
    deal,
    experts_of,
    freeze_experts,
    load_experts,
    routing,
    save_experts,
    to_experts,
)
from looseleaf_unified_sparsity.stand_in import toy_batch, toy_model, toy_tasks


def outputs(m: Any) -> list[torch.Tensor]:
    """Logits of both tasks."""
    b = toy_batch(5)
    with torch.no_grad():
        return [m(**b), m(codes=b["codes"])]


def scores(m: Any, component: Any = "generation") -> dict[str, torch.Tensor]:
    """Scores of neurons."""
    return UnifiedSparsity(component=component).score(m, toy_tasks())


def converted(component: Any = "generation", **options: Any) -> Any:
    """The model with experts."""
    m = toy_model()
    to_experts(m, scores(m, component), component=component, **{"experts": 8, "top_k": 4, **options})
    return m


def test_neurons_are_dealt_like_a_snake() -> None:
    importance = torch.tensor([8.0, 3.0, 9.0, 1.0, 7.0, 2.0, 6.0, 4.0, 5.0, 0.0])
    shared, dealt = deal(importance, 4, 0.2)
    assert shared.tolist() == [2, 0]                                       # 9, 8
    assert importance[dealt].tolist() == [[7, 0], [6, 1], [5, 2], [4, 3]]  # 7 6 5 4, then 0 1 2 3
    assert deal(torch.zeros(6), 3)[1].tolist() == [[0, 5], [1, 4], [2, 3]], "among equals the first comes first"


@pytest.mark.parametrize("shared", [0.0, 1 / 3])
def test_all_experts_together_hold_each_neuron_once(shared: float) -> None:
    m = converted(shared=shared, keep_ends=False)
    for layer, dense in zip(m.layers, toy_model().layers, strict=True):
        experts = layer.mlp_moe_gen
        assert sorted(experts.order.tolist()) == list(range(48)) and experts.size * 8 == 48 - 48 * shared
        assert torch.equal(experts.inner[1].weight, dense.mlp_moe_gen.up_proj.weight[experts.order])


@pytest.mark.parametrize("shared", [0.0, 1 / 3])
def test_all_experts_are_the_dense_model_at_first(shared: float) -> None:
    m = converted(top_k=8, shared=shared, keep_ends=False)
    for a, b in zip(outputs(toy_model()), outputs(m), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert count_parameters(m)["total"] == count_parameters(m)["active"]


def reference(e: Experts, x: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert."""
    inner, down = [layer.weight for layer in e.inner], e.down.weight
    router, rows = e.routers["all"].weight, []
    for token in x:
        logits = [float(router[n] @ token) for n in range(e.experts)]
        best = sorted(range(e.experts), key=lambda n: (-logits[n], n))[:e.top_k]
        out = torch.zeros_like(token)
        for n in best:
            own = slice(n * e.size, (n + 1) * e.size)
            out += down[:, own] @ (F.silu(inner[0][own] @ token) * (inner[1][own] @ token)) * (1 + logits[n])
        if e.shared_gate is not None:
            own = slice(e.experts * e.size, None)
            out += down[:, own] @ (F.silu(inner[0][own] @ token) * (inner[1][own] @ token)) * \
                (1 + e.shared_gate.weight[0] @ token)
        rows.append(out)
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("shared", [0.0, 1 / 3])
def test_experts_are_the_plain_loop(shared: float) -> None:
    e = converted(shared=shared).layers[1].mlp_moe_gen
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(e(x).flatten(0, 1), reference(e, x.flatten(0, 1)), atol=1e-5, rtol=1e-5)
    for p in (*e.routers.parameters(), *(e.shared_gate.parameters() if e.shared_gate else ())):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(e(x).flatten(0, 1), reference(e, x.flatten(0, 1)), atol=1e-4, rtol=1e-4)


def test_routers_learn_and_experts_do_not() -> None:
    m = converted()
    routers = freeze_experts(m)
    assert [n for n, p in m.named_parameters() if p.requires_grad] == [
        f"layers.{n}.mlp_moe_gen.routers.all.weight" for n in (1, 2)] and len(routers) == 2
    before, b = copy.deepcopy(m.state_dict()), toy_batch(1)
    optimizer = torch.optim.Adam(routers, 1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(m(**b).flatten(0, 1), b["codes"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[n]) for n, v in m.state_dict().items() if "routers" not in n)


def test_active_parameters() -> None:
    dense, m = count_parameters(toy_model()), count_parameters(converted())
    routers = 2 * 8 * 32
    assert dense["active"] == dense["total"] and m["total"] == dense["total"] + routers
    assert m["active"] == m["total"] - 2 * 3 * 32 * 24


def test_understanding_has_a_router_for_text_and_one_for_pictures() -> None:
    m = converted("understanding")
    assert set(experts_of(m)) == {"layers.1.mlp", "layers.2.mlp"}
    with torch.no_grad():
        for e in experts_of(m).values():
            e.routers["picture"].weight.normal_(generator=torch.Generator().manual_seed(2))
    text = outputs(m)
    with routing(m, True):
        pictures = outputs(m)
    assert not any(torch.allclose(a, b) for a, b in zip(text, pictures, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(text, outputs(m), strict=True)), "as before"
    codes = toy_batch(5)["codes"]
    which = torch.ones(3, 17, dtype=torch.bool)
    which[:, -1] = False
    with torch.no_grad(), routing(m, which):
        mixed = m(codes=codes)
    assert not torch.allclose(mixed, pictures[1]) and not torch.allclose(mixed, text[1])
    with pytest.raises(ValueError, match="an entry for each of 51 tokens, got 7"), routing(m, torch.ones(7).bool()):
        m(codes=codes)


def test_saved_and_loaded(tmp_path: Any) -> None:
    m = converted(shared=1 / 3)
    with torch.no_grad():
        for e in experts_of(m).values():
            e.routers["all"].weight.normal_(generator=torch.Generator().manual_seed(3))
    save_experts(m, tmp_path / "experts.safetensors")
    again = toy_model()
    load_experts(again, tmp_path / "experts.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(outputs(m), outputs(again), strict=True))
    with pytest.raises(ValueError, match="expected experts of this SmallUnified"):
        load_experts(toy_model(layers=2), tmp_path / "experts.safetensors")


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(mlp_bias=True)])
def test_a_decoder_of_transformers(make: Any) -> None:
    m, ids = make(), torch.arange(24).view(2, 12)
    if m.config.mlp_bias:
        for layer in m.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                nn.init.normal_(getattr(layer.mlp, name).bias, generator=torch.Generator().manual_seed(0))
    expected = m(ids).logits
    found = UnifiedSparsity().score(m, {"understanding": [ids]})
    to_experts(m, found, 8, 8, component="generation", keep_ends=False)
    torch.testing.assert_close(m(ids).logits, expected, atol=2e-5, rtol=2e-5)


def test_an_mlp_of_two_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
            self.fc1, self.fc2, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.GELU()

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]

    m = seeded(lambda: nn.ModuleDict({"mlp": Mlp()}))
    x = torch.randn(5, 8)
    dense = m["mlp"]
    e = Experts([dense.fc1], dense.fc2, dense.act, *deal(torch.rand(12), 3), top_k=3)
    torch.testing.assert_close(e(x), dense(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"experts": 7}, "divides the 48 neurons which are not shared .of 48., got 7"),
    ({"experts": 8, "shared": 0.1}, "divides the 44 neurons"),
    ({"top_k": 9}, "top_k: expected an integer from 1 to experts=8, got 9"),
    ({"top_k": 0}, "top_k: expected"),
    ({"shared": 1.0}, r"shared: expected a number in \[0, 1\)"),
    ({"component": "both"}, "component: expected understanding or generation, got 'both'"),
])
def test_bad_input(options: dict[str, Any], message: str) -> None:
    m = toy_model()
    before, found = str(m), scores(m)
    with pytest.raises(ValueError, match=message):
        to_experts(m, found, **{"experts": 8, "top_k": 4, **options})
    assert str(m) == before, "nothing is changed"


def test_more_bad_input(tmp_path: Any) -> None:
    m = toy_model()
    with pytest.raises(ValueError, match=r"scores: expected those of 'layers.1.mlp_moe_gen.down"):
        to_experts(m, scores(m, "understanding"), 8, 4)
    with pytest.raises(ValueError, match="keep_ends=False"):
        to_experts(toy_model(layers=2), scores(m), 8, 4)
    for call in (freeze_experts, lambda m: save_experts(m, tmp_path / "no")):
        with pytest.raises(ValueError, match="call to_experts first"):
            call(m)
    with pytest.raises(ValueError, match="expected weights of generation in the layers of this model, got none"):
        to_experts(tiny_bert(), {}, layers="encoder.layer.*")
