"""Each step of LeMo against plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from looseleaf.testing.models import tiny_gemma3, tiny_llama
from looseleaf_lemo import LeMo
from looseleaf_lemo import elimination as E
from looseleaf_lemo import saving as S
from looseleaf_lemo.training import parts_of

PLAIN = {"mlp_sparsity": 0.0, "recompute_norms": False, "loss_chunk": 0}


def random_rank(n, x, rows):
    """Scores that depend on the layer alone; the same for an item alone and in a batch."""
    return torch.rand(rows.blocks, generator=torch.Generator().manual_seed(n)).expand(len(x), -1)


def qwen(**options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=3, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                       initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PhiForCausalLM(config).eval()


def gemma():
    model = tiny_gemma3()
    model.config.attention_dropout = 0.0
    return model


# ---------------------------------------------------------------------------------------------------- choosing
def test_true_scores_are_those_of_the_whole_map():
    model = tiny_llama().double()
    attention, x = parts_of(model)[0].attention, torch.randn(2, 22, 64, dtype=torch.float64)
    rows = E.rows_of(x, None, 4)
    with torch.no_grad():
        query, key = E.projections(attention, x)
        s = (query @ key.repeat_interleave(2, 1).transpose(2, 3) / 16 ** 0.5).relu().sum(1)
        s = s.masked_fill(torch.ones(22, 22).triu(1).bool(), 0)
        largest = torch.zeros(2, 6, 6, dtype=torch.float64)
        for i in range(6):
            for j in range(6):
                largest[:, i, j] = s[:, 4 * i:4 * i + 4, 4 * j:4 * j + 4].amax((1, 2))
        expected = torch.stack([largest[:, j:, j].sum(1) + largest[:, j, :j].sum(1) for j in range(6)], 1)
    torch.testing.assert_close(E.true_scores(attention, x, rows), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_true_scores_do_not_see_padding(side):
    model = tiny_llama().double()
    attention = parts_of(model)[0].attention
    x = torch.randn(2, 24, 64, dtype=torch.float64)
    valid = torch.arange(24) < torch.tensor([[24], [13]])
    valid = valid if side == "right" else valid.flip(1)
    mask = torch.zeros(2, 1, 1, 24, dtype=torch.float64).masked_fill(
        ~valid[:, None, None], torch.finfo(torch.float64).min).expand(2, 1, 24, 24)
    batch = E.true_scores(attention, x, E.rows_of(x, mask, 4))
    own = x[1][valid[1]][None]
    alone = E.true_scores(attention, own, E.rows_of(own, None, 4))
    torch.testing.assert_close(batch[1:, :4], alone)
    assert not batch[1, 4:].any()


def test_choose():
    scores = torch.tensor([[1.0, 5.0, 5.0, 2.0, 5.0], [9.0, 1.0, 2.0, 9.0, 9.0]])
    real = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert E.choose(scores, real, 0.4).tolist() == [[1, 2], [0, -1]], "round(2), round(1.2); ties: the earlier"
    assert E.choose(scores, real, 0.5).tolist() == [[1, 2], [0, 2]], "round(2.5) is 2 as in Python, round(1.5) is 2"
    assert E.choose(scores, real, 0.01).tolist() == [[1], [0]], "at least one"
    assert E.choose(scores, real, 1.0).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]], "in order"
    assert E.choose(scores, real, 0.1, threshold=0.4).tolist() == [[1, 2, 3, 4], [0, -1, -1, -1]]
    assert E.choose(scores, torch.zeros_like(real), 0.4).shape == (2, 0), "padding alone: nothing"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 9), (18, 7), (5, 0)])
def test_take_and_put_back_are_inverse(side, lengths):
    total = max(lengths)
    valid = torch.arange(total) < torch.tensor(lengths)[:, None]
    valid = valid if side == "right" else valid.flip(1)
    x = torch.randn(2, total, 3, dtype=torch.float64).requires_grad_()
    rows = E.rows_of(x, valid.long(), 4)
    blocks = E.choose(torch.rand(2, rows.blocks), rows.real(x), 1.0)
    out = E.put_back(E.take(x, rows, blocks), rows, blocks)
    torch.testing.assert_close(out[valid], x[valid])
    part = E.choose(torch.rand(2, rows.blocks), rows.real(x), 0.5)
    kept = rows.mask_of(part)
    out = E.put_back(E.take(x, rows, part) * 2, rows, part)
    torch.testing.assert_close(out[kept], 2 * x[kept])
    assert not out[valid & ~kept].any()
    [grad] = torch.autograd.grad(out[valid].sum(), x)
    torch.testing.assert_close(grad[valid], (2.0 * kept[..., None].expand_as(x)).double()[valid])


# ---------------------------------------------------------------------------------------------------- elimination
def seen_by_attention(model, lemo, batch, **options):
    """Layer -> (input, given, output) of each attention in a forward in training mode."""
    seen, handles = {}, []
    for n, layer in enumerate(parts_of(model)):
        handles.append(layer.attention.register_forward_hook(
            lambda module, args, given, out, n=n: seen.__setitem__(n, (dict(given), out[0])), with_kwargs=True))
    try:
        with lemo.training(model, **options) as run:
            model.train()
            run.output = model(**batch)
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    return seen, run


@pytest.mark.parametrize("build, implementation", [
    (lambda: tiny_llama(num_hidden_layers=3), "sdpa"), (lambda: tiny_llama(num_hidden_layers=3), "eager"),
    (qwen, "sdpa"), (gemma, "sdpa"), (gemma, "eager"), (phi, "sdpa")])
@pytest.mark.parametrize("case", ["plain", "right", "left", "packed"])
def test_a_cut_layer_is_dense_attention_with_masked_keys(build, implementation, case, ids):
    model = build().double()
    model.set_attn_implementation(implementation)
    batch = {"plain": ids(45, 45), "right": ids(45, 21), "left": ids(45, 21, side="left"), "packed": ids(45)}[case]
    if case == "plain":
        del batch["attention_mask"]
    if case == "packed":
        batch["position_ids"] = torch.cat([torch.arange(17), torch.arange(28)])[None]
        del batch["attention_mask"]
    lemo = LeMo(block=4, dense_first=0.0, **PLAIN)
    seen, run = seen_by_attention(model, lemo, batch, rank=random_rank)
    layers = parts_of(model)
    assert len(run.kept) == len(layers) - 1 and not run.fallbacks
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for n, layer in enumerate(layers[:-1]):
        given, out = seen[n]
        x, kept = given["hidden_states"].detach(), run.kept[layer.name]
        length = x.shape[1]
        mask = given["attention_mask"]
        if mask is None:
            mask = torch.ones(length, length).tril().bool()[None, None]
        if mask.dtype != torch.bool:
            mask = mask > -1
        mask = (mask & kept[:, None, None, :]).expand(len(x), 1, length, length)
        mask = mask | torch.eye(length).bool()  # rows outside S are zeroed below, and need not be empty
        additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
        with torch.no_grad():
            given = {**given, "attention_mask": additive}
            expected = layer.attention(**given)[0] * kept[..., None]
        close = 1e-10 if implementation == "sdpa" else 2e-6  # transformers' eager softmax is float32
        torch.testing.assert_close(out.detach()[real], expected[real], rtol=close, atol=close)
        sums = kept.sum(1)
        blocks = [-(-int(r.sum()) // 4) for r in real]
        assert all(4 * round(0.4 * b) - 3 <= s <= 4 * round(0.4 * b) for s, b in zip(sums, blocks, strict=True))
    assert kept.any()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("scores", ["exact", "predicted"])
def test_batched_is_single(side, scores, adapted, gradients, ids):
    model = adapted(tiny_llama(num_hidden_layers=4).double())
    lemo = LeMo(block=4, dense_first=0.0, mlp_sparsity=0.5, scores=scores, predictor_steps=2, predictor_width=4)
    if scores == "predicted":
        lemo.calibrate(model, [ids(32)], progress=False)
    batch = ids(45, 21, 6, side=side)
    model.train()
    with lemo.training(model) as run:
        base = model.get_base_model()
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                            position_ids=places).last_hidden_state
        (hidden * batch["attention_mask"][..., None]).square().sum().backward()
        together, masks = gradients(model), dict(run.kept)
        for row in range(3):
            own = batch["attention_mask"][row].bool()
            alone = base.model(input_ids=batch["input_ids"][row][own][None]).last_hidden_state
            alone.square().sum().backward()
            torch.testing.assert_close(hidden[row][own], alone[0], rtol=1e-9, atol=1e-9)
            if own.sum() >= 8:
                assert all(torch.equal(masks[name][row][own], mask[0]) for name, mask in run.kept.items())
        single = gradients(model)
        assert any(mask[0][:20].ne(mask[1][:20]).any() for mask in masks.values()), "items keep other blocks"
    for name, grad in together.items():
        torch.testing.assert_close(grad, single[name], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("build", [lambda: tiny_llama(num_hidden_layers=3), qwen, gemma])
def test_nothing_cut_is_nothing_changed(build, adapted, gradients, ids):
    model = adapted(build()).train()
    batch = ids(45, 21)
    plain = model(**batch)
    plain.loss.backward()
    expected = gradients(model)
    with LeMo(block=4, rho=1.0, mlp_sparsity=0.0, loss_chunk=16).training(model) as run:
        ours = model(**batch)
        ours.loss.backward()
        torch.testing.assert_close(model.get_base_model().lm_head(model.get_base_model().model(
            **{n: v for n, v in batch.items() if n != "labels"}).last_hidden_state), plain.logits, rtol=1e-6, atol=1e-6)
    assert ours.logits is None and run.loss == "in chunks of 16 tokens"
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-6, atol=1e-6)
    found = gradients(model)
    assert found and found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_takes_the_same_blocks(reentrant, adapted, gradients, ids):
    model = adapted(tiny_llama(num_hidden_layers=4).double()).train()
    model.enable_input_require_grads()
    lemo = LeMo(block=4, dense_first=0.0, mlp_sparsity=0.5, scores="exact")
    batch, chosen = ids(45, 21), []
    with lemo.training(model) as run:
        former = run._blocks
        run._blocks = lambda n, x, rows: chosen.append((n, former(n, x, rows))) or chosen[-1][1]
        model(**batch).loss.backward()
        expected, once = gradients(model), list(chosen)
        chosen.clear()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch).loss.backward()
    found = gradients(model)
    assert len(once) == 3 and len(chosen) == 6
    for n, blocks in chosen:
        assert torch.equal(blocks, dict(once)[n])
    for name, grad in expected.items():
        torch.testing.assert_close(grad, found[name], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- MLP, norms, loss
@pytest.mark.parametrize("build", [tiny_llama, phi])
@pytest.mark.parametrize("padded", [False, True])
def test_mlp_backward_is_that_of_the_network_cut_to_its_columns(build, padded):
    mlp = parts_of(build().double())[0].mlp.requires_grad_(False)
    parts = S.mlp_parts(mlp)
    gate, up, down, act = parts
    x = torch.randn(2, 11, 64, dtype=torch.float64).requires_grad_()
    valid = (torch.arange(11) < torch.tensor([[11], [6]])) if padded else None
    out = S.cut_mlp(x, parts, 0.75, valid)
    torch.testing.assert_close(out, mlp(x), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    [grad] = torch.autograd.grad(out, x, weight)
    for row in range(2):
        own = x[row].detach().clone().requires_grad_()
        u = own @ up.weight.T + (up.bias if up.bias is not None else 0)
        g = u if gate is None else own @ gate.weight.T
        real = slice(0, 11 if valid is None else int(valid[row].sum()))
        norms = act(g)[real].norm(dim=0) + (0 if gate is None else u[real].norm(dim=0))
        columns = norms.topk(24).indices
        h = act(g)[:, columns] * (1 if gate is None else u[:, columns])
        cut = h @ down.weight[:, columns].T
        [expected] = torch.autograd.grad(cut, own, weight[row])
        torch.testing.assert_close(grad[row], expected, rtol=1e-12, atol=1e-12)


def test_mlp_keeps_no_more_than_its_columns():
    mlp = parts_of(tiny_llama())[0].mlp.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        S.cut_mlp(torch.randn(1, 50, 64, requires_grad=True), S.mlp_parts(mlp), 0.75)
    assert sum(t.untyped_storage().nbytes() for t in saved) == 2 * 50 * 24 * 4 + 24 * 8


@pytest.mark.parametrize("items", [None, 10])
def test_chunked_loss_is_the_plain_mean(items):
    head = torch.nn.Linear(8, 30).double()
    hidden = torch.randn(2, 21, 8, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 30, (2, 21)).masked_fill(torch.rand(2, 21) < 0.4, -100)
    found = S.chunked_loss(hidden, head, labels, 8, items=items)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=-100,
                               reduction="sum" if items else "mean") / (items or 1)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, [hidden, *head.parameters()]),
                          torch.autograd.grad(expected, [hidden, *head.parameters()]), strict=True):
        torch.testing.assert_close(one, other)


def test_recomputed_norm_keeps_its_input_alone_and_trains_its_weight():
    norm = parts_of(tiny_llama())[0].norms[0]
    x = torch.randn(2, 5, 64).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = S.recomputed(norm, x, norm.weight)
    assert all(t is x or t is norm.weight for t in saved)
    weight = torch.randn_like(out)
    for one, other in zip(torch.autograd.grad(out, [x, norm.weight], weight),
                          torch.autograd.grad(norm(x), [x, norm.weight], weight), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast(adapted, gradients, ids):
    model = adapted(tiny_llama(num_hidden_layers=3)).train()
    lemo = LeMo(block=4, dense_first=0.0, scores="exact", loss_chunk=16)
    with lemo.training(model), torch.autocast("cpu", torch.bfloat16):
        loss = model(**ids(45, 21)).loss
    loss.backward()
    assert gradients(model) and torch.isfinite(loss)
    half = adapted(copy.deepcopy(tiny_llama(num_hidden_layers=3)).bfloat16()).train()
    with lemo.training(half):
        half(**ids(45, 21)).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(half).values())
