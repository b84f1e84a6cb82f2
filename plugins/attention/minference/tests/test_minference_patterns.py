"""The vectorised indices against the patterns written out token by token, and what each pattern must guarantee."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from looseleaf import AttentionCall, attach
from looseleaf.testing.attention import tensors
from looseleaf.testing.models import tiny_llama
from looseleaf_minference import Keys, MInference, Pattern

PATTERNS = [Pattern("a_shape", 20, 40), Pattern("vertical_slash", 35, 51), Pattern("block_sparse", 4),
            Pattern("vertical_slash", 70, 50)]
SMALL = {"min_length": 1, "block_size": 16, "last_q": 16, "forced_offsets": 46}


def expand(keys: Keys) -> Tensor:
    """The boolean mask of the attention, (B, Hq, Lq, Lk), with causality and lengths in it."""
    layout = keys.layout
    blocks = keys.blocks.repeat_interleave(layout.block, 2).repeat_interleave(layout.block, 3)
    mask = blocks[:, :, :layout.q_len, :layout.k_len] | keys.columns[:, :, None]
    query, key = torch.arange(layout.q_len), torch.arange(layout.k_len)
    position = query + (layout.key_lengths - layout.query_lengths)[:, None]
    seen = (key <= position[..., None]) & (key < layout.key_lengths[:, None])[:, None]
    return mask & (seen & (query < layout.query_lengths[:, None])[..., None])[:, None]


def call_of(q: Tensor, k: Tensor, v: Tensor, **given: object) -> AttentionCall:
    return AttentionCall(q, k, v, q.shape[-1] ** -0.5, **given)


def written_out(plugin: MInference, pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    """The boolean mask (Lq, Lk) of one head, from the definition of its pattern: q (Lq, D), k (Lk, D)."""
    b, lq, lk, scale = plugin.block_size, len(q), len(k), q.shape[-1] ** -0.5
    offset = lk - lq
    mask = torch.zeros(lq, lk, dtype=torch.bool)
    rows = [range(s, min(s + b, lq)) for s in range(0, lq, b)]
    columns = [range(s, min(s + b, lk)) for s in range(0, lk, b)]
    verticals: set[int] = set()
    wanted: list[set[int]] = [set() for _ in rows]
    if pattern.name == "a_shape":
        for i, row in enumerate(rows):
            for p in (r + offset for r in row):
                wanted[i] |= {j // b for j in range(p + 1) if j < pattern.first or j > p - pattern.second}
    if pattern.name == "vertical_slash":
        n = min(plugin.last_q, lq)
        a = torch.zeros(n, lk)
        for r in range(n):
            seen = lk - n + r + 1
            a[r, :seen] = torch.softmax(q[lq - n + r] @ k[:seen].T * scale, 0)
        slash = torch.zeros(lk)
        for r in range(n):
            for j in range(lk - n + r + 1):
                slash[lk - n + r - j] += a[r, j]

        def top(scores: Tensor, forced: int, count: int) -> set[int]:
            others = sorted(range(min(forced, lk), lk), key=lambda i: (-float(scores[i]), i))
            return set([*range(min(forced, lk)), *others][:count])

        verticals = top(a.sum(0), plugin.forced_columns, max(30, pattern.first))
        diagonals = top(slash, plugin.forced_offsets, max(50, pattern.second))
        for i, row in enumerate(rows):
            wanted[i] = {(r + offset - s) // b for r in row for s in diagonals if r + offset >= s}
    if pattern.name == "block_sparse":
        for i, row in enumerate(rows):
            seen = [c for c in range(len(columns)) if c * b <= row[-1] + offset]
            diagonal = {(r + offset) // b for r in row}
            products = {c: float(q[list(row)].mean(0) @ k[list(columns[c])].mean(0)) for c in seen}
            order = sorted(seen, key=lambda c: (c not in diagonal, -products[c] if c not in diagonal else 0, c))
            wanted[i] = set(order[:pattern.first]) | diagonal
    for i, row in enumerate(rows):
        for r in row:
            for j in range(r + offset + 1):
                mask[r, j] = j // b in wanted[i] or j in verticals
    return mask


@pytest.mark.parametrize(("lq", "lk"), [(200, 200), (203, 203), (96, 215), (70, 217), (9, 150)])
def test_indices_are_the_patterns_written_out(lq: int, lk: int) -> None:
    plugin = MInference(**SMALL)
    q, k, v = tensors(lq, keys=lk, batch=2)
    keys = plugin.select(call_of(q, k, v), PATTERNS)
    mask = expand(keys)
    for b in range(2):
        for h, pattern in enumerate(PATTERNS):
            wanted = written_out(plugin, pattern, q[b, h], k[b, h // 2])
            assert torch.equal(mask[b, h], wanted), (b, h, pattern, (mask[b, h] != wanted).nonzero()[:5])
    if lq > 50:
        _, singles = keys.indices()
        sizes = singles.row_ptr[:, 1::2, -1] - singles.row_ptr[:, 1::2, 0]
        assert int(sizes.min()) > 0, "no single column outside of blocks: this shows nothing"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lengths", [(330, 330), (330, 301), (330, 17), (0, 330)])
def test_each_pattern_is_dense_attention_under_its_mask(pattern: Pattern, lengths: tuple[int, int]) -> None:
    plugin = MInference(config=[[pattern] * 4], **SMALL)
    q, k, v = tensors(330)
    for b, n in enumerate(lengths):
        for x in (q, k, v):
            x[b, :, n:] = torch.nan
    valid = torch.tensor(lengths)
    call = call_of(q, k, v, query_lengths=valid, key_lengths=valid)
    keys = plugin.select(call, [pattern] * 4)
    assert float(keys.density().max(1).values[torch.tensor(lengths).argmax()]) < 1
    wanted = call_of(q, k, v, mask=expand(keys), query_lengths=valid, key_lengths=valid).dense()
    torch.testing.assert_close(plugin.attend(call), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [256, 257, 319])
def test_all_columns_are_dense_attention(length: int) -> None:
    """With n_v = L every key is attended to once: those in blocks by the kernel, the others as single columns."""
    q, k, v = tensors(length)
    call = call_of(q, k, v)
    plugin = MInference(config=[[Pattern("vertical_slash", length, 50)] * 4], **SMALL)
    torch.testing.assert_close(plugin.attend(call), call.dense(), atol=2e-5, rtol=1e-4)
    dense = torch.ones(length, length, dtype=torch.bool).tril()
    assert bool((expand(plugin.select(call, plugin.assignment[0])) == dense).all())


def test_no_key_is_counted_twice() -> None:
    q, k, v = tensors(300)
    plugin = MInference(**SMALL)
    keys = plugin.select(call_of(q, k, v), PATTERNS)
    times = keys.blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :300, :300].int().tril()
    twice = times + keys.columns[:, :, None].expand_as(times).int().tril()
    assert int(twice.max()) == 2, "the inputs must have columns inside of blocks, or this shows nothing"
    _, singles = keys.indices()
    times += singles.to_mask().repeat_interleave(16, 2)[:, :, :300].int().tril()
    assert torch.equal(times.bool(), expand(keys)) and int(times.max()) == 1


def test_density_counts_computed_scores() -> None:
    q, k, v = tensors(256)
    keys = MInference(**SMALL).select(call_of(q, k, v), PATTERNS)
    for b in range(2):
        for h in range(4):
            computed = 0
            for i in range(16):
                for j in range(i + 1):
                    single = int(keys.columns[b, h, j * 16:(j + 1) * 16].sum())
                    computed += 16 * (16 if keys.blocks[b, h, i, j] else single)
            assert float(keys.density()[b, h]) == pytest.approx(computed / (136 * 256))


@pytest.mark.parametrize("length", [16, 40, 257, 320])
def test_every_query_sees_itself(length: int) -> None:
    q, k, v = tensors(length)
    mask = expand(MInference(**SMALL).select(call_of(q, k, v), [
        Pattern("a_shape", 0, 1), Pattern("vertical_slash", 0, 0), Pattern("block_sparse", 1),
        Pattern("vertical_slash", 30, 50)]))
    assert bool(mask.diagonal(dim1=2, dim2=3).all())


def test_forced_indices_are_kept() -> None:
    q, k, v = tensors(600)
    k[:, :, :100] -= 100 * q.mean((1, 2))[:, None, None]  # nobody would choose them
    keys = MInference(min_length=1, block_size=16).select(call_of(q, k, v), [Pattern("vertical_slash", 30, 100)] * 4)
    assert bool(keys.columns[..., :30].all()) and int(keys.columns.sum(-1).max()) == 30
    mask = expand(keys)
    position = torch.arange(600)
    distance = position[:, None] - position
    assert bool(mask[..., (distance >= 0) & (distance < 100)].all())


def test_gradients_are_those_of_the_masked_attention() -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors(150))
    plugin = MInference(config=[PATTERNS], **SMALL)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    call = call_of(q, k, v)
    mask = expand(plugin.select(call, PATTERNS))
    assert float(mask.float().mean()) < 0.45
    wanted = torch.autograd.grad((call_of(q, k, v, mask=mask, is_causal=False).dense() * weight).sum(), (q, k, v))
    found = torch.autograd.grad((plugin.attend(call) * weight).sum(), (q, k, v))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)])
def test_other_floating_types(dtype: torch.dtype, atol: float) -> None:
    q, k, v = (x.to(dtype) for x in tensors(330))
    call = call_of(q, k, v)
    plugin = MInference(config=[PATTERNS], **SMALL)
    mask = expand(plugin.select(call, PATTERNS))
    wanted = call_of(q.double(), k.double(), v.double(), mask=mask, is_causal=False).dense()
    out = plugin.attend(call)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=atol, rtol=0)


def test_short_bidirectional_masked_and_first_layers_fall_back() -> None:
    q, k, v = tensors(300)
    reasons: list[str] = []

    def call(**given: object) -> AttentionCall:
        return call_of(q, k, v, record=lambda **r: reasons.append(r["fallback"]), **given)

    MInference().attend(call())
    MInference(min_length=16).attend(call(phase="bidirectional", is_causal=False))
    MInference(min_length=16).attend(call(mask=torch.ones(300, 300, dtype=torch.bool)))
    MInference(min_length=16, starting_layer=2).attend(call(layer=1))
    assert reasons == ["no longer than 1024 tokens", "only causal prefill is sparse", "a mask of the caller's own",
                       "a layer before starting_layer"]


def test_a_short_item_of_a_batch_is_exact_as_it_would_be_alone() -> None:
    q, k, v = tensors(300)
    lengths = torch.tensor([300, 90])
    plugin = MInference(config=[PATTERNS], **{**SMALL, "min_length": 100})
    call = call_of(q, k, v, query_lengths=lengths, key_lengths=lengths)
    torch.testing.assert_close(plugin.attend(call)[1], call.dense()[1], atol=2e-5, rtol=1e-4)


def test_chunked_prefill_with_all_columns_is_one_pass() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    config = [[Pattern("vertical_slash", 200, 50)] * 4] * 2
    with torch.no_grad():
        whole = model(ids).logits
        with attach(model, MInference(config=config, **SMALL), chunked_prefill=True) as attached:
            first = model(ids[:, :90])
            second = model(ids[:, 90:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=1e-3)
    assert all("fallback" not in r for r in attached.records)


def test_report_shows_heads() -> None:
    model = tiny_llama()
    with torch.no_grad(), attach(model, MInference(config=[PATTERNS] * 2, **SMALL)) as attached:
        model(torch.randint(0, 64, (1, 300)))
    report = attached.report()
    assert [f.title for f in report.figures] == ["density by head"]
    assert {"density", "a_shape_heads", "vertical_slash_heads", "block_sparse_heads"} <= set(report.tables[0].columns)
    assert report.tables[0].rows[0][report.tables[0].columns.index("vertical_slash_heads")] == 0.5
