"""The steps of the method, against plain code."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from looseleaf import AttentionCall
from looseleaf.testing.attention import tensors
from looseleaf_kernels import BlockIndex, block_sparse_attention, row_sparse_attention
from looseleaf_sparsifiner import Predictor, Sparsifiner, TrueTop, budget, index_of, macs, top_keys

torch.set_num_threads(1)
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 37, 4, 2, 16


def call_of(**given: Any) -> AttentionCall:
    query, key, value = tensors(TOKENS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    given = {"query": query, "key": key, "value": value, "scale": HEAD_DIM ** -0.5, "is_causal": False,
             "phase": "bidirectional", "layers": 1, **given}
    return AttentionCall(**given)


def sized(backend: Any, seed: int = 0, tokens: int = TOKENS) -> Any:
    """With random predictors whose basis is larger than at the start of training, so that it is not mostly 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backend.modules = {n: backend.predictor(HEAD_DIM, tokens, HEADS, KV_HEADS) for n in range(4)}
        for module in backend.modules.values():
            for matrix in (module.down, module.up):
                if matrix is not None:
                    matrix.data *= 5
    return backend


def plain(backend: Sparsifiner, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output and mask, row by row and in float64, as the card of the paper says it."""
    p: Any = backend.modules[call.layer]
    wq, bq, wk, bk = (x.double() for x in (p.query.weight, p.query.bias, p.key.weight, p.key.bias))
    down, up = p.down.double(), (p.down if p.up is None else p.up).double()
    basis = up.T.abs()
    basis = torch.where(basis > 0.02, basis, 0.0)
    batch, heads, group = len(call.query), HEADS, HEADS // KV_HEADS
    out, mask = torch.zeros_like(call.query), torch.ones(batch, heads, TOKENS, TOKENS, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            q, k, v = (x.double() for x in (call.query[b, h], call.key[b, h // group], call.value[b, h // group]))
            mixtures = down.T @ (k @ wk.T + bk)
            for i in range(TOKENS):
                if i >= backend.prefix_tokens:
                    coefficients = torch.softmax((wq @ q[i] + bq) @ mixtures.T * heads ** -0.5, -1)
                    largest = sorted(range(len(coefficients)), key=lambda j: -float(coefficients[j]))[:8]
                    guess = sum(float(coefficients[j]) * basis[j] for j in largest)
                    order = sorted(range(TOKENS), key=lambda j: -float(guess[j]))  # stable: lower indices first
                    mask[b, h, i] = False
                    mask[b, h, i, order[:math.ceil(backend.keep_rate * TOKENS)]] = True
                scores = (k @ q[i] * call.scale).masked_fill(~mask[b, h, i], -torch.inf)
                out[b, h, i] = (torch.softmax(scores, -1) @ v).float()
    return out, mask


@pytest.mark.parametrize("fields", [{}, {"prefix_tokens": 0, "keep_rate": 0.1}, {"prefix_tokens": 5},
                                    {"share_inout_proj": True, "keep_rate": 0.5}])
@pytest.mark.parametrize("way", ["masked", "gather"])
@torch.no_grad()
def test_every_step(fields: dict[str, Any], way: str) -> None:
    backend, call = sized(Sparsifiner(compute_with=way, **fields)), call_of()
    expected, mask = plain(backend, call)
    torch.testing.assert_close(backend.attend(call), expected, atol=1e-5, rtol=1e-5)
    backend._watched = {}
    backend.attend(call)
    assert torch.equal(backend._watched[0], mask)
    count, prefix = math.ceil(backend.keep_rate * TOKENS), backend.prefix_tokens
    assert (mask[:, :, prefix:].sum(-1) == count).all() and mask[:, :, :prefix].all()


@pytest.mark.parametrize("way", ["masked", "gather"])
@torch.no_grad()
def test_all_keys_are_dense(way: str) -> None:
    call = call_of()
    out = sized(Sparsifiner(keep_rate=1.0, compute_with=way)).attend(call)
    torch.testing.assert_close(out, call.dense(), atol=1e-6, rtol=0)


def test_sizes_of_deit_s() -> None:
    predictor = Sparsifiner().predictor(64, 197, 6)
    assert sum(p.numel() for p in predictor.parameters()) == 16_768
    assert predictor.rank == 32 and predictor.width == 32
    shared = Sparsifiner(share_inout_proj=True).predictor(64, 197, 6)
    assert sum(p.numel() for p in shared.parameters()) == 16_768 - 197 * 32


@pytest.mark.parametrize("keep, total, saved", [(0.25, 15.53, 0.479), (0.05, 9.51, 0.681)])
def test_multiply_adds_of_deit_s(keep: float, total: float, saved: float) -> None:
    count = budget(keep, 197)
    cost = macs(197, 6, 64, 196 * count + 197, rank=32, width=32, coefficients=8, basis_density=0.317)
    assert cost["dense"] / 1e6 == pytest.approx(29.81, abs=0.005)
    assert cost["total"] / 1e6 == pytest.approx(total, abs=0.005)
    assert 1 - cost["total"] / cost["dense"] == pytest.approx(saved, abs=0.0005)
    # what runs is what is counted: the parts against the multiplications of torch
    from torch.utils.flop_counter import FlopCounterMode

    predictor = Predictor(64, 197, 6)
    query, key, _ = tensors(197, batch=1, heads=6, kv_heads=6, head_dim=64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predictor.coefficients(query, key, 1.0)
    assert counter.get_total_flops() / 2 == cost["projections"] + cost["mixtures"] + cost["coefficients"]


@torch.no_grad()
def test_the_guess() -> None:
    call, backend = call_of(), sized(Sparsifiner())
    predictor = backend.modules[0]
    coefficients = predictor.coefficients(call.query[:, :, 1:], call.key, 0.5)
    torch.testing.assert_close(coefficients.sum(-1), torch.ones(2, HEADS, TOKENS - 1), atol=1e-6, rtol=0)
    assert bool((predictor.dense_map(coefficients) < 0).any()), "the first stage is signed"
    assert bool((predictor.sparse_map(coefficients, 0.02, 8) >= 0).all())
    basis = predictor.basis(0.02)
    assert basis.shape == (TOKENS // 6, TOKENS) and not basis[predictor.up.abs().T <= 0.02].any()
    torch.testing.assert_close(predictor.sparse_map(coefficients, 0.02, 99), coefficients @ basis)
    changed = coefficients.clone()
    changed[0, 0, 0] = 0
    changed[0, 0, 0, 2] = 1.0
    torch.testing.assert_close(predictor.sparse_map(changed, 0.02, 8)[0, 0, 0], basis[2])
    half = predictor.coefficients(call.query[:, :, 1:].bfloat16(), call.key.bfloat16(), 0.5)
    assert half.dtype == torch.float32, "half precision would make ties"


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 1.0]])
    assert top_keys(scores, 3).tolist() == [[True, True, False, False, True], [True, True, True, False, False],
                                            [True, True, True, False, False]]
    scores = torch.rand(2, 3, 50, 200, generator=torch.Generator().manual_seed(0)).mul(20).round()
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., :30]
    assert torch.equal(top_keys(scores, 30), torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True))
    mask = scores > 15
    index = index_of(mask)
    again = torch.zeros(*mask.shape[:-1], 201, dtype=torch.bool).scatter(-1, torch.where(index < 0, 200, index).long(),
                                                                         True)[..., :200]
    assert index.dtype == torch.int32 and torch.equal(again, mask)


def test_budget() -> None:
    assert [budget(r, n) for r, n in ((0.25, 197), (0.05, 197), (0.07, 100), (1.0, 5), (1e-9, 5), (0.29, 100))] == [
        50, 10, 7, 5, 1, 29]


def test_the_operation_is_blocks_of_one_and_a_mask_with_its_gradient() -> None:
    """Gathered, masked, and as blocks of 1 x 1: outputs and gradients of queries, keys and values."""
    call = call_of()
    mask = next(sized(Sparsifiner(prefix_tokens=0)).kept(call, None, 10))
    gradients, outs = [], []
    for way in range(4):
        q, k, v = (x.clone().requires_grad_() for x in (call.query, call.key, call.value))
        if way == 0:
            out = row_sparse_attention(q, k, v, index_of(mask), scale=call.scale)[0]
        elif way == 1:
            blocks = BlockIndex.from_mask(mask, block_q=1, block_k=1, q_len=TOKENS, k_len=TOKENS, causal=False)
            out = block_sparse_attention(q, k, v, blocks, scale=call.scale)[0]
        elif way == 2:
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale, enable_gqa=True)
        else:
            backend = sized(Sparsifiner(prefix_tokens=0, keep_rate=10 / TOKENS))
            out = backend.attend(dataclasses.replace(call, query=q, key=k, value=v))
            assert all(p.grad is None for m in backend.modules.values() for p in m.parameters())
        out.square().sum().backward()
        outs.append(out.detach())
        gradients.append(torch.cat([x.grad.flatten() for x in (q, k, v)]))
    for out, gradient in zip(outs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, gradients[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    call, backend = call_of(), sized(Sparsifiner())
    expected = backend.attend(call)
    monkeypatch.setattr("looseleaf_sparsifiner.backend.ELEMENTS", 5 * 2 * HEADS * TOKENS)
    assert len(list(backend.kept(call, None, 3))) == 8
    for way in ("masked", "gather"):
        backend.compute_with = way
        torch.testing.assert_close(backend.attend(call), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", ["masked", "gather"])
@torch.no_grad()
def test_threshold(way: str) -> None:
    """All keys above it; a row with none keeps its best."""
    backend, call = sized(Sparsifiner(mask_threshold=0.05, compute_with=way)), call_of()
    backend._watched = {}
    records: dict[str, Any] = {}
    expected = backend.attend(dataclasses.replace(call, record=records.update))
    mask = backend._watched[0]
    scores = backend.importance(call, 1, TOKENS)
    above = scores > 0.05
    assert bool(above.any()) and torch.equal(mask[:, :, 1:] & above, above)
    assert torch.equal(mask[:, :, 1:].sum(-1), above.sum(-1).clamp(min=1))
    assert float(records["density"]) == pytest.approx(float(mask.float().mean()))
    backend._watched = None
    torch.testing.assert_close(backend.attend(call), expected, atol=1e-6, rtol=1e-5)
    none = sized(Sparsifiner(mask_threshold=1e9, compute_with=way)).attend(call)
    assert bool(torch.isfinite(none).all())


@pytest.mark.parametrize("way", ["masked", "gather"])
@torch.no_grad()
def test_dropped_tokens(way: str) -> None:
    """Behind layers 0 and 2 the patches that the class token looks at least are nobody's keys and have no output."""
    backend = sized(Sparsifiner(token_rate=0.5, token_layers=(0, 2), keep_rate=0.9, compute_with=way))
    call = call_of()
    alive = torch.ones(2, TOKENS, dtype=torch.bool)
    for layer, left in ((0, TOKENS), (1, 19), (2, 19), (3, 10)):
        own = dataclasses.replace(call, query=call.query.roll(layer, 2), layer=layer, state=SimpleNamespace())
        assert (alive.sum(1) == left).all()  # 1 + ceil(0.5 * 36), 1 + ceil(0.25 * 36)
        key = own.key.repeat_interleave(2, 1)
        scores = (own.query @ key.mT * own.scale).masked_fill(~alive[:, None, None], -torch.inf)
        guess = backend.importance(own, 1, TOKENS).masked_fill(~alive[:, None, None], -1)
        count = min(math.ceil(0.9 * TOKENS), left)
        order = torch.argsort(guess, dim=-1, descending=True, stable=True)[..., :count]
        mask = torch.zeros_like(guess, dtype=torch.bool).scatter(-1, order, True)
        mask = torch.cat([alive[:, None, None].expand(-1, HEADS, 1, -1), mask], 2)
        expected = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ own.value.repeat_interleave(2, 1)
        expected = expected * alive[:, None, :, None]
        records: dict[str, Any] = {}
        out = backend.attend(dataclasses.replace(own, record=records.update))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        assert float(records["density"]) == pytest.approx(float(mask.float().mean()), rel=1e-5)
        if layer in (0, 2):
            class_row = torch.softmax(scores[:, :, 0], -1).mean(1)[:, 1:].masked_fill(~alive[:, 1:], -1)
            best = class_row.topk({0: 18, 2: 9}[layer], -1).indices
            alive = torch.cat([alive[:, :1], torch.zeros(2, 36, dtype=torch.bool).scatter(1, best, True)], 1)
    assert backend.attend(call).shape == call.query.shape  # the next forward begins with all tokens


@torch.no_grad()
def test_items_of_other_lengths_are_exact() -> None:
    backend = sized(Sparsifiner(), tokens=30)
    query, key, value = tensors(TOKENS, batch=3, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    lengths = torch.tensor([30, 21, 30])
    records: dict[str, Any] = {}
    call = call_of(query=query, key=key, value=value, query_lengths=lengths, key_lengths=lengths, record=records.update)
    out = backend.attend(call)
    short = [x[[0, 2], :, :30] for x in (query, key, value)]
    torch.testing.assert_close(out[[0, 2], :, :30], backend.attend(call_of(query=short[0], key=short[1],
                                                                           value=short[2])))
    torch.testing.assert_close(out[1], call.dense()[1])
    assert records["exact_items"] == 1 and not out[:, :, 30:].any()
    backend.attend(dataclasses.replace(call, query_lengths=None, key_lengths=None))
    assert records["fallback"] == "another number of tokens than 30"


@torch.no_grad()
def test_auto_gathers_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = row_sparse_attention
    monkeypatch.setattr("looseleaf_sparsifiner.backend.row_sparse_attention",
                        lambda *args, **kwargs: (seen.append(args[3].shape[-1]), own(*args, **kwargs))[1])
    for tokens, keep, gathers in ((37, 0.03, False), (1100, 0.25, False), (1100, 0.02, True)):
        q, k, v = tensors(tokens, batch=1, heads=1, kv_heads=1, head_dim=HEAD_DIM)
        seen.clear()
        TrueTop(keep).attend(call_of(query=q, key=k, value=v))
        assert bool(seen) == gathers
    assert seen == [22]
