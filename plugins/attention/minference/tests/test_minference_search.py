"""The search: known heads get their pattern, costs are matched, and what cannot be searched is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from looseleaf import AttentionCall, attach
from looseleaf.testing.attention import tensors
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_llama
from looseleaf_minference import CANDIDATES, VERTICAL_SLASH, Keys, MInference
from looseleaf_minference.patterns import DEFAULT
from looseleaf_minference.search import KNOWN_HEADS, Search, known_heads, streaming

SMALL = {"min_length": 16, "block_size": 16, "last_q": 16}
FEW = [("a_shape", 16, 64), ("vertical_slash", 30, 60), ("vertical_slash", 60, 50), ("block_sparse", 4, 0)]


class Fixed(nn.Module):
    """A projection that gives (1, L, heads * D), whatever it is given."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x.transpose(1, 2).flatten(2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.x


class Unrotated(nn.Module):
    """Rotary embeddings that rotate by nothing."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one = hidden.new_ones(1, hidden.shape[1], 64)
        return one, torch.zeros_like(one)


def model_with(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A Llama of one layer whose attention sees these tensors, with a scale of 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=192, intermediate_size=16, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, head_dim=64)).eval()
    attention = model.model.layers[0].self_attn
    attention.q_proj, attention.k_proj, attention.v_proj = Fixed(q), Fixed(k), Fixed(v)
    attention.scaling = 1.0
    model.model.rotary_emb = Unrotated()
    return model


@pytest.mark.parametrize(("seed", "error"), [(0, "relative_l2"), (10, "relative_l2"), (0, "count")])
def test_known_heads_get_their_pattern(seed: int, error: str) -> None:
    model = model_with(*known_heads(2048, seed))
    plugin = MInference()
    plugin.calibrate(model, {"input_ids": torch.zeros(1, 2048, dtype=torch.long)}, density=0.3, error=error,
                     candidates=CANDIDATES)
    assert plugin.assignment is not None
    assert [p.name for p in plugin.assignment[0]] == list(KNOWN_HEADS)


def test_scores_are_the_relative_error_of_the_output() -> None:
    q, k, v = known_heads(1100, 3)
    plugin = MInference()
    plugin.calibrate(model_with(q, k, v), [{"input_ids": torch.zeros(1, 1100, dtype=torch.long)}], match_flops=False,
                     candidates=[("a_shape", 64, 100)])
    call = AttentionCall(q, k, v, 1.0)
    exact = call.dense()
    assert plugin.assignment is not None
    gap = plugin.attend(call) - exact
    for h, pattern in enumerate(plugin.assignment[0]):
        assert (pattern.name, pattern.first, pattern.second) == ("a_shape", 64, 100)
        assert pattern.score == pytest.approx(float(gap[:, h].norm() / exact[:, h].norm()), rel=1e-4)
    plugin.calibrate(model_with(q, k, v), [{"input_ids": torch.zeros(1, 1100, dtype=torch.long)}], match_flops=False,
                     candidates=[("a_shape", 64, 100)], error="count")
    assert [p.score for p in plugin.assignment[0]] == [float((gap[:, h].abs() > 5e-3).sum()) for h in range(3)]


@pytest.mark.parametrize("density", [0.35, 0.6])
def test_candidates_are_made_equally_costly(density: float) -> None:
    q, k, v = tensors(640)
    search = Search(MInference(forced_offsets=20, **SMALL).selector, FEW, density=density)
    call = AttentionCall(q, k, v, 0.2)
    search._scores = search.selector.scores(call)
    sizes = search._sizes(call)
    for pattern, found in zip(search.tried, sizes, strict=True):
        cost = search._cost(call, pattern, found)
        larger = search._cost(call, pattern, found + torch.tensor([[4 * (pattern.name != "a_shape")], [32]]))
        least = bool((found == torch.tensor([[30], [50]])).all())  # cannot be made any cheaper
        assert least or bool((cost <= density + 1e-6).all()), (pattern, cost)
        assert bool((larger > density).any()), (pattern, larger)


def test_the_cost_of_no_choice_is_the_median_and_half_at_most() -> None:
    q, k, v = tensors(640)
    call = AttentionCall(q, k, v, 0.2)
    for candidates, target in ((CANDIDATES, 0.5), ([("a_shape", 16, 32)], None)):
        search = Search(MInference(**SMALL).selector, candidates)
        search.attend(call)
        costs = search._cost(call, search.tried[0], search.sizes[0][0].contiguous())
        if target is None:  # one candidate is its own median: it stays as it is
            assert costs.tolist() == pytest.approx(search._cost(
                call, search.tried[0], torch.tensor([[16], [32]]).expand(2, 4)).tolist(), abs=0.03)
        else:
            assert target - 0.06 < float(costs.mean()) <= target


def test_without_matching_sizes_stay() -> None:
    q, k, v = tensors(300)
    search = Search(MInference(**SMALL).selector, CANDIDATES, match_flops=False)
    search.attend(AttentionCall(q, k, v, 0.2))
    assert [(int(s[0, 0]), int(s[1, 0])) for s in search.sizes[0]] == [(p.first, p.second) for p in CANDIDATES]
    # All but the cheapest candidates are dense at this length: equals go to the first of them.
    assert {p.name for p in search.assignment()[0]} == {"a_shape"}


@pytest.mark.parametrize(("last", "winner"), [(None, "a_shape"), (64, "vertical_slash")])
def test_few_queries_that_look_far_do_not_count_among_all(last: int | None, winner: str) -> None:
    """Why A-shape is no candidate unless asked for: its error is in the queries that matter, and they are few."""
    q, k = streaming(2048, 0)
    q[-2:] = 0
    q[-2:, 63], k[600, 63] = 6, 6
    search = Search(MInference().selector, CANDIDATES, density=0.3, last=last)
    v = torch.randn(1, 1, 2048, 64, generator=torch.Generator().manual_seed(0))
    search.attend(AttentionCall(q[None, None], k[None, None], v, 1.0))
    assert search.assignment()[0][0].name == winner


def test_only_the_last_queries_of_each_item_count() -> None:
    q, k, v = tensors(320)
    lengths = torch.tensor([320, 250])
    found = Search(MInference(**SMALL).selector, FEW, match_flops=False, last=20)
    found.attend(AttentionCall(q, k, v, 0.2, query_lengths=lengths, key_lengths=lengths))
    alone = Search(MInference(**SMALL).selector, FEW, match_flops=False, last=20)
    for b, n in enumerate(lengths.tolist()):
        call = AttentionCall(q[b:b + 1, :, :n], k[b:b + 1, :, :n], v[b:b + 1, :, :n], 0.2)
        alone.attend(call)
        if not b:  # what the figure is, for one candidate
            keys = alone.selector.keys(call, ["a_shape"] * 4, *torch.tensor([[16] * 4, [64] * 4]))
            gap = keys.attention(call) - call.dense()
            assert torch.allclose(alone.errors[0][0], gap[:, :, -20:].square().sum((0, 2, 3)).double(), rtol=1e-4)
    assert torch.allclose(found.errors[0], alone.errors[0], rtol=1e-4)
    assert torch.allclose(found.norms[0], alone.norms[0], rtol=1e-4)


def test_candidates_that_became_the_same_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(300)
    ran: list[int] = []
    real = Keys.attention

    def counted(keys: Keys, call: AttentionCall) -> Tensor:
        ran.append(1)
        return real(keys, call)

    monkeypatch.setattr(Keys, "attention", counted)
    pair = [("vertical_slash", 40, 60), ("block_sparse", 4, 0), ("vertical_slash", 40, 60), ("vertical_slash", 41, 60)]
    found = Search(MInference(**SMALL).selector, pair, match_flops=False)
    for _ in range(2):
        found.attend(AttentionCall(q, k, v, 0.2))
    assert len(ran) == 2 * 3
    assert torch.equal(found.errors[0][0], found.errors[0][2]) and bool((found.errors[0][0] > 0).all())
    assert not torch.equal(found.errors[0][0], found.errors[0][3])


def test_by_default_all_heads_are_vertical_slash() -> None:
    assert [p.name for p in VERTICAL_SLASH] == ["vertical_slash"] * 6 and set(VERTICAL_SLASH) < set(CANDIDATES)
    plugin = MInference(**SMALL)
    plugin.calibrate(tiny_llama(), {"input_ids": torch.arange(320)[None] % 64})
    assert {p.name for heads in plugin.assignment or [] for p in heads} == {"vertical_slash"}


def test_calibrate_any_decoder_and_use_it(tmp_path: Path) -> None:
    model = tiny_llama().train()
    before = model.config._attn_implementation
    ids = torch.randint(0, 64, (2, 320), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    plugin = MInference(**SMALL)
    plugin.calibrate(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}, {"input_ids": ids}],
                     candidates=FEW, density=0.5, progress=True)
    assert model.training and model.config._attn_implementation == before
    assert plugin.assignment is not None and [len(heads) for heads in plugin.assignment] == [4, 4]
    plugin.save(tmp_path / "tiny.json")
    model.eval()
    with torch.no_grad(), attach(model, MInference(config=tmp_path / "tiny.json", **SMALL)) as attached:
        model(ids)
    assert all(0.2 < r["density"] < 0.75 for r in attached.records)


def test_other_architectures() -> None:
    """Nothing is named by class: Qwen3 (norms on queries and keys) and GPT-NeoX (one projection) calibrate as well."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

    common = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4}
    for model in (Qwen3ForCausalLM(Qwen3Config(**common, num_key_value_heads=2, head_dim=16)),
                  GPTNeoXForCausalLM(GPTNeoXConfig(**common))):
        plugin = MInference(**SMALL)
        plugin.calibrate(model, [{"input_ids": torch.randint(0, 32, (1, 200))}], candidates=FEW[:2])
        with torch.no_grad(), attach(model, plugin) as attached:
            model(torch.randint(0, 32, (1, 200)))
        assert [len(heads) for heads in plugin.assignment or []] == [4, 4]
        assert all("density" in r for r in attached.records)


def test_layers_with_a_window_of_their_own_stay_exact() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"]))
    model.eval()
    plugin = MInference(**SMALL)
    plugin.calibrate(model, {"input_ids": torch.arange(200)[None] % 32}, candidates=FEW, density=0.5)
    assert plugin.assignment is not None
    assert plugin.assignment[0] == [DEFAULT] * 4 != plugin.assignment[1]
    with torch.no_grad(), attach(model, plugin) as attached:
        model(torch.arange(200)[None] % 32)
    assert [r["layer"] for r in attached.records] == [1] and "density" in attached.records[0]


def test_what_cannot_be_searched() -> None:
    model = tiny_llama()
    short = [{"input_ids": torch.zeros(1, 100, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"batches: expected texts longer than min_length=1024 .* got no layer to me"):
        MInference().calibrate(model, short)
    with pytest.raises(ValueError, match="got no layer to measure"):
        MInference().calibrate(model, [])
    for given, message in (({"candidates": []}, r"candidates: expected one pattern or more, got \[\]"),
                           ({"density": 0.0}, r"density: expected None or a number in \(0, 1\], got 0\.0"),
                           ({"error": "l1"}, "error: expected 'relative_l2' or 'count', got 'l1'"),
                           ({"candidates": [("a_shpe", 1, 2)]}, "got 'a_shpe'.*Did you mean 'a_shape'")):
        with pytest.raises(ValueError, match=message):
            MInference().calibrate(model, short, **given)


def test_a_failing_search_leaves_the_model_and_the_plugin_as_they_were() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    plugin = MInference(**SMALL)
    with pytest.raises(ValueError, match="input_ids"):
        plugin.calibrate(model, [{"no_such_input": torch.zeros(1, 100)}])
    assert model.config._attn_implementation == before and plugin.assignment is None


def test_a_search_leaves_every_submodule_in_its_own_mode() -> None:
    """A model that is partly in training, after a search and after one that failed."""
    model = mixed_modes(tiny_llama())
    before = snapshot(model)
    plugin = MInference(**SMALL)
    plugin.calibrate(model, {"input_ids": torch.arange(320)[None] % 64}, candidates=FEW)
    assert_unchanged(before, model)
    with pytest.raises(ValueError, match="input_ids"):
        plugin.calibrate(model, {"no_such_input": torch.zeros(1, 100)})
    assert_unchanged(before, model)
