"""The vectorised index selection against the method written out head by head, and what the method must guarantee."""

from __future__ import annotations

import math

import pytest
import torch

from looseleaf import AttentionCall, attach
from looseleaf.testing.attention import tensors
from looseleaf.testing.models import tiny_llama
from looseleaf_flexprefill import FlexPrefill
from looseleaf_flexprefill.patterns import jensen_shannon


def smallest_set(values: torch.Tensor, mass: float) -> set[int]:
    """Indices of the largest values, in falling order, until their sum reaches a fraction of the total."""
    total, reached, out = float(values.double().sum()), 0.0, set()
    for i in sorted(range(len(values)), key=lambda i: (-float(values[i]), i)):
        if reached >= mass * total or values[i] <= 0:
            break
        out.add(i)
        reached += float(values[i].double())
    return out


def written_out(plugin: FlexPrefill, q: torch.Tensor, k: torch.Tensor) -> tuple[set[tuple[int, int]], bool]:
    """Steps 1 to 5 of the method for one head: q (Lq, D), k (Lk, D)."""
    b, scale = plugin.block_size, q.shape[-1] ** -0.5
    lq, lk = len(q), len(k)
    offset = lk - lq
    rows, columns = math.ceil(lq / b), math.ceil(lk / b)
    last = q[-b:]
    n = len(last)
    scores = last @ k.T * scale
    for r in range(n):
        scores[r, lk - n + r + 1:] = -torch.inf
    a = torch.softmax(scores, -1)
    vertical = a.sum(0) / n
    slash = torch.zeros(lk)
    for r in range(n):
        for j in range(lk - n + r + 1):
            slash[lk - n + r - j] += a[r, j] / n
    def blocks(x: torch.Tensor) -> list[torch.Tensor]:
        return list(x.split(b))
    estimate = torch.softmax(torch.stack([last.mean(0) @ block.mean(0) for block in blocks(k)]) * scale, 0)
    true = torch.stack([block.sum() for block in blocks(vertical)])
    middle = (estimate + true) / 2
    divergence = sum(0.5 * float(p * torch.log(p / m)) for x in (estimate, true)
                     for p, m in zip(x, middle, strict=True) if p > 0)
    aware = math.sqrt(max(divergence, 0)) < plugin.tau
    low = math.ceil(plugin.min_budget / b)
    high = math.ceil(plugin.max_budget / b) if plugin.max_budget else 10 ** 9
    chosen = []
    for x in (vertical, slash):
        budget = low if aware else min(max(len(smallest_set(x, plugin.gamma)) // b + 1, low), high)
        sums = [float("inf") if i == 0 else float(block.sum()) for i, block in enumerate(blocks(x))]
        chosen.append(set(sorted(range(columns), key=lambda i: (-sums[i], i))[:budget]))
    def visible(i: int, j: int) -> bool:
        return j * b <= offset + min((i + 1) * b, lq) - 1
    pairs = {(i, j) for i in range(rows) for j in range(columns) if visible(i, j)}
    active = {(i, j) for i, j in pairs if j in chosen[0] or any(
        p // b - j in chosen[1] for p in (offset + i * b, offset + min((i + 1) * b, lq) - 1))}
    if aware:
        estimate = torch.zeros(rows, columns)
        for i, qb in enumerate(blocks(q)):
            seen = [j for j in range(columns) if visible(i, j)]
            estimate[i, seen] = torch.softmax(torch.stack([qb.mean(0) @ blocks(k)[j].mean(0) for j in seen]) * scale, 0)
        active |= {divmod(f, columns) for f in smallest_set(estimate.flatten(), plugin.gamma)} & pairs
    return active, aware


@pytest.mark.parametrize(("lq", "lk", "tau", "gamma", "largest"), [
    (200, 200, 0.0, 0.7, None), (200, 200, 1.0, 0.7, None), (203, 203, 0.35, 0.5, None), (96, 215, 0.35, 0.8, None),
    (70, 217, 0.35, 0.6, 32), (9, 150, 0.3, 0.9, None), (192, 192, 0.3, 1.0, None)])
def test_selection_is_the_method_written_out(lq: int, lk: int, tau: float, gamma: float, largest: int | None) -> None:
    plugin = FlexPrefill(gamma=gamma, tau=tau, min_budget=16, max_budget=largest, block_size=16)
    q, k, v = tensors(lq, keys=lk, batch=2)
    index, density, aware = plugin.select(AttentionCall(q, k, v, q.shape[-1] ** -0.5))
    mask = index.to_mask()
    for b in range(2):
        for h in range(4):
            wanted, wanted_aware = written_out(plugin, q[b, h], k[b, h // 2])
            assert bool(aware[b, h]) == wanted_aware
            assert {(int(i), int(j)) for i, j in mask[b, h].nonzero()} == wanted
            visible = sum(j * 16 <= lk - lq + min((i + 1) * 16, lq) - 1
                          for i in range(math.ceil(lq / 16)) for j in range(math.ceil(lk / 16)))
            assert float(density[b, h]) == pytest.approx(len(wanted) / visible)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_output_is_exact_inside_the_blocks(tau: float) -> None:
    plugin = FlexPrefill(gamma=0.6, tau=tau, min_budget=16, block_size=16)
    q, k, v = tensors(330)
    lengths = torch.tensor([330, 301])
    call = AttentionCall(q, k, v, 0.2, query_lengths=lengths, key_lengths=lengths)
    index, density, _ = plugin.select(call)
    assert float(density.max()) < 1
    mask = index.expand()
    wanted = AttentionCall(q, k, v, 0.2, mask=mask, query_lengths=lengths, key_lengths=lengths).dense()
    torch.testing.assert_close(plugin.attend(call), wanted, atol=2e-5, rtol=1e-4)


def test_all_mass_is_dense_attention() -> None:
    q, k, v = tensors(300)
    call = AttentionCall(q, k, v, 0.2)
    for tau in (0.0, 1.0):
        out = FlexPrefill(gamma=1.0, tau=tau, min_budget=16, block_size=16).attend(call)
        torch.testing.assert_close(out, call.dense(), atol=2e-5, rtol=1e-4)


def test_every_row_has_its_diagonal_and_the_first_block() -> None:
    q, k, v = tensors(500)
    index, _, _ = FlexPrefill(gamma=0.1, min_budget=16, block_size=16).select(AttentionCall(q, k, v, 0.2))
    mask = index.to_mask()
    rows = torch.arange(mask.shape[2])
    assert bool(mask[:, :, rows, rows].all()) and bool(mask[:, :, :, 0].all())


def test_density_rises_with_gamma() -> None:
    q, k, v = tensors(600)
    for tau in (0.0, 1.0):
        last = torch.zeros(2, 4)
        for gamma in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            _, density, _ = FlexPrefill(gamma=gamma, tau=tau, min_budget=16, block_size=16).select(
                AttentionCall(q, k, v, 0.2))
            assert bool((density >= last - 1e-6).all()), gamma
            last = density


def test_divergence() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(jensen_shannon(p, p), torch.zeros(2))
    q = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(jensen_shannon(p, q), torch.full((2,), math.log(2)))


def test_chunked_prefill_with_all_mass_is_one_pass() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        with attach(model, FlexPrefill(gamma=1.0, min_budget=16, block_size=16), chunked_prefill=True) as attached:
            first = model(ids[:, :90])
            second = model(ids[:, 90:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=1e-3)
    assert all("fallback" not in r for r in attached.records)


def test_short_bidirectional_and_masked_calls_fall_back() -> None:
    q, k, v = tensors(300)
    reasons = []
    def call(**given: object) -> AttentionCall:
        return AttentionCall(q, k, v, 0.2, record=lambda **r: reasons.append(r["fallback"]), **given)
    FlexPrefill().attend(call())
    FlexPrefill(min_budget=16, block_size=16).attend(call(phase="bidirectional", is_causal=False))
    FlexPrefill(min_budget=16, block_size=16).attend(call(mask=torch.ones(300, 300, dtype=torch.bool)))
    assert reasons == ["no longer than 1024 tokens", "only causal prefill is sparse", "a mask of the caller's own"]


def test_report_shows_heads() -> None:
    model = tiny_llama()
    with torch.no_grad(), attach(model, FlexPrefill(gamma=0.5, min_budget=16, block_size=16)) as attached:
        model(torch.randint(0, 64, (1, 300)))
    report = attached.report()
    assert [f.title for f in report.figures] == ["density by head", "query aware by head"]
    assert len(report.figures[0].image) == 2 and len(report.figures[0].image[0]) == 4
    assert "density" in report.tables[0].columns


@pytest.mark.parametrize(("field", "value"), [
    ("gamma", 0.0), ("gamma", 1.1), ("tau", -0.1), ("tau", 1.5), ("block_size", 48), ("block_size", 8),
    ("min_budget", 0), ("max_budget", 5)])
def test_bad_parameters(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"FlexPrefill\.{field}: expected .*, got {value}$"):
        FlexPrefill(**{field: value})


def test_gradients_flow() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(200))
    call = AttentionCall(q, k, v, 0.2)
    FlexPrefill(gamma=1.0, min_budget=16, block_size=16).attend(call).sum().backward()
    grad = q.grad.clone()
    q.grad = None
    call.dense().sum().backward()
    torch.testing.assert_close(grad, q.grad, atol=1e-4, rtol=1e-3)
