"""The run of a method: what is exact when, when the pattern is found, and what begins a new run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from looseleaf import AttentionCall, attach
from looseleaf.testing.attention import tensors
from looseleaf_kernels import BlockIndex
from looseleaf_sparsed import SparseD

SMALL = {"block_size": 16, "min_length": 16}
T = 10


def tiny(seed: int) -> Any:
    """A small bidirectional encoder with random weights: 2 layers of 4 heads."""
    from transformers import BertConfig, BertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(BertConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, initializer_range=0.3)).eval()


def call_of(x: tuple[Tensor, Tensor, Tensor], step: int | None, steps: int | None = T, **given: Any) -> AttentionCall:
    given = {"state": SimpleNamespace(), "phase": "bidirectional", **given}
    return AttentionCall(*x, x[0].shape[-1] ** -0.5, is_causal=False, step=step, steps=steps, **given)


def run(plugin: SparseD, state: SimpleNamespace, inputs: dict[int, Tensor] | Any, steps: int = T,
        first: int = 0) -> list[tuple[str, Tensor, Tensor]]:
    """(stage, output, exact output) of every step; each has tensors of its own."""
    out = []
    for step in range(first, steps):
        found: dict[str, Any] = {}
        call = call_of(inputs(step), step, steps, state=state, record=lambda found=found, **v: found.update(v))
        out.append((found, plugin.attend(call), call.dense()))
    return [(f.get("stage", f.get("fallback")), o, d) for f, o, d in out]


def changing(step: int) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(200, seed=step)


def test_full_steps_then_one_pattern_then_sparse_steps() -> None:
    plugin = SparseD(skip=0.3, **SMALL)
    state = SimpleNamespace()
    steps = run(plugin, state, changing)
    assert [s for s, _, _ in steps] == ["full"] * 3 + ["pattern found"] + ["sparse"] * 6
    pattern, _ = SparseD(skip=0.3, **SMALL).pattern(call_of(changing(3), 3))
    assert torch.equal(state.index.to_mask(), pattern.to_mask())
    for step, (stage, out, exact) in enumerate(steps):
        if stage != "sparse":
            assert torch.equal(out, exact)
            continue
        wanted = call_of(changing(step), step, mask=pattern.expand()).dense()
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(out, exact, atol=1e-2), "the pattern hides nothing: this shows nothing"


@pytest.mark.parametrize("given", [{"select": 1.0}, {"skip": 1.0}, {"skip": 0.0, "select": 1.0}])
def test_all_blocks_or_all_steps_are_exact(given: dict[str, float]) -> None:
    for _, out, exact in run(SparseD(**given, **SMALL, prompt_tokens=70), SimpleNamespace(), changing):
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4)


def test_skip_is_a_fraction_of_the_steps() -> None:
    counted = {(skip, n): SparseD(skip=skip).full_steps(n) for skip, n in (
        (0.2, 10), (0.2, 9), (0.29, 100), (0.0, 7), (1.0, 7), (0.2, 4))}
    assert list(counted.values()) == [2, 1, 29, 0, 7, 0]


def test_grouped_query_attention() -> None:
    """Heads that share keys have patterns of their own, as if the keys were repeated."""
    def repeated(step: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = changing(step)
        return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    one, two = SimpleNamespace(), SimpleNamespace()
    for (_, a, _), (_, b, _) in zip(run(SparseD(**SMALL), one, changing), run(SparseD(**SMALL), two, repeated),
                                    strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    mask = one.index.to_mask()
    assert torch.equal(mask, two.index.to_mask()) and not torch.equal(mask[:, 0], mask[:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The same blocks but for near ties, and the output of exact attention under them in the input's type."""
    state = SimpleNamespace()

    def half(step: int) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) for x in changing(step))
    run(SparseD(**SMALL), state, half)
    full = SimpleNamespace()
    run(SparseD(**SMALL), full, changing)
    assert float((state.index.to_mask() == full.index.to_mask()).float().mean()) > 0.98
    out = SparseD(**SMALL).attend(call_of(half(9), 9, state=state))
    wanted = call_of(changing(9), 9, mask=state.index.expand()).dense()
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, atol=3e-2, rtol=3e-2)


def test_padded_items_give_what_they_give_alone() -> None:
    lengths = torch.tensor([200, 130])

    def padded(step: int) -> tuple[Tensor, Tensor, Tensor]:
        x = changing(step)
        for y in x:
            y[1, :, 130:] = torch.nan
        return x
    state = SimpleNamespace()
    plugin = SparseD(prompt_tokens=[50, 33], **SMALL)
    alone = run(SparseD(prompt_tokens=33, **SMALL), SimpleNamespace(),
                lambda step: tuple(y[1:, :, :130] for y in changing(step)))
    for step in range(T):
        out = plugin.attend(call_of(padded(step), step, state=state, query_lengths=lengths, key_lengths=lengths))
        torch.testing.assert_close(out[1:, :, :130], alone[step][1], atol=2e-5, rtol=1e-4)
        assert bool(torch.isfinite(out[:, :, :130]).all())


def test_what_begins_a_new_run() -> None:
    plugin = SparseD(skip=0.2, **SMALL)
    state = SimpleNamespace()
    whole = ["full"] * 2 + ["pattern found"] + ["sparse"] * 7
    assert [s for s, _, _ in run(plugin, state, changing)] == whole
    first = state.index
    assert [s for s, _, _ in run(plugin, state, lambda s: tensors(200, seed=50 + s))] == whole
    assert not torch.equal(first.to_mask(), state.index.to_mask())
    # a loop that begins late, or goes back, finds its pattern where it is
    assert [s for s, _, _ in run(plugin, state, changing, first=5)] == ["pattern found"] + ["sparse"] * 4
    # runs of one step
    assert [s for s, _, _ in run(plugin, state, changing, steps=1) * 2] == ["pattern found"] * 2


def test_a_pattern_is_not_used_for_another_number_of_tokens() -> None:
    """Texts that grow within a run (semi-autoregressive generation) get a pattern for each length."""
    plugin = SparseD(**SMALL)
    steps = run(plugin, SimpleNamespace(), lambda step: tensors(100 if step < 5 else 150, seed=step))
    assert [s for s, _, _ in steps] == ["full"] * 2 + ["pattern found"] + ["sparse"] * 2 + ["pattern found"] + [
        "sparse"] * 4
    # the same number of rows, but other lengths within
    state = SimpleNamespace()
    stages = []
    for step, n in ((2, 90), (3, 90), (4, 70)):
        valid = torch.tensor([100, n])
        plugin.attend(call_of(tensors(100), step, state=state, query_lengths=valid, key_lengths=valid,
                              record=lambda **v: stages.append(v["stage"])))
    assert stages == ["pattern found", "sparse", "pattern found"]


def test_more_keys_than_queries() -> None:
    plugin, state = SparseD(**SMALL), SimpleNamespace()
    for step in range(T):
        call = call_of(tensors(70, keys=200, seed=step), step, state=state)
        out = plugin.attend(call)
    index: BlockIndex = state.index
    assert (index.rows, index.columns) == (5, 13) and out.shape == call.query.shape
    torch.testing.assert_close(out, call_of((call.query, call.key, call.value), 0, mask=index.expand()).dense(),
                               atol=2e-5, rtol=1e-4)


def test_where_the_method_does_not_apply() -> None:
    x = tensors(100)
    plugin = SparseD(**SMALL)
    causal = AttentionCall(*x, 0.2)
    for call, reason in (
            (causal, "only bidirectional attention is sparse"),
            (AttentionCall(*x, 0.2, phase="decode", is_causal=False), "only bidirectional attention is sparse"),
            (call_of(x, 5, mask=torch.ones(100, 100, dtype=torch.bool)), "a mask of the caller's own"),
            (call_of(tensors(16), 5), "no longer than 16 tokens"),
            (call_of(tensors(0, keys=100), 5), "no longer than 16 tokens")):
        found: dict[str, Any] = {}
        call.record = lambda found=found, **values: found.update(values)
        torch.testing.assert_close(plugin.attend(call), call.dense())
        assert found == {"fallback": reason}


@pytest.mark.parametrize(("step", "steps"), [(None, None), (None, 10), (3, None), (10, 10), (-1, 10)])
def test_missing_or_wrong_steps(step: int | None, steps: int | None) -> None:
    message = (rf"expected a denoising step from 0 to steps - 1, got step={step} of steps={steps}\. Pass the number of "
               r"steps as looseleaf\.attach\(model, SparseD\(\), steps=T\) and set attached\.step = t before each step")
    with pytest.raises(ValueError, match=message):
        SparseD(**SMALL).attend(call_of(tensors(100), step, steps))


def test_in_a_model() -> None:
    """Once for each run and layer; reset; the report; two models at once."""
    one, two = tiny(0), tiny(1)
    ids = torch.arange(400).view(2, 200) * 7 % 61
    mask = torch.ones_like(ids)
    mask[1, 150:] = 0

    def stages(attached: Any, layer: int) -> list[str]:
        return [r["stage"] for r in attached.records if r["layer"] == layer]
    whole = ["full"] * 2 + ["pattern found"] + ["sparse"] * 7
    with torch.no_grad(), attach(one, SparseD(**SMALL), steps=T) as a, attach(two, SparseD(**SMALL), steps=4) as b:
        with pytest.raises(ValueError, match="step=None of steps=10"):
            one(ids)
        for step in range(T):
            a.step = step
            one(ids, attention_mask=mask)
            if step < 4:
                b.step = step
                two(ids.flip(0))
        for attached, wanted in ((a, whole), (b, ["pattern found"] + ["sparse"] * 3)):
            assert [stages(attached, layer) for layer in range(len(attached.layers))] == [wanted] * 2
        first, other = (attached._states[0].index.to_mask() for attached in (a, b))
        assert not torch.equal(first, other)
        text = a.report().to_text()
        assert "2 x full, 1 x pattern found, 7 x sparse" in text and "density" in text
        a.reset()
        assert not a.records and not a._states
        for step in range(T):
            a.step = step
            one(ids, attention_mask=mask)
        assert stages(a, 0) == stages(a, 1) == whole
        assert torch.equal(a._states[0].index.to_mask(), first)
    padded = one(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[1:, :150], one(ids[1:, :150]).logits, atol=1e-3, rtol=1e-3)


def test_left_and_right_padding_in_a_model() -> None:
    """A padded text is denoised as alone, wherever its padding is."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ModernBertForMaskedLM(ModernBertConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            global_attn_every_n_layers=1, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2)).eval()
    ids = torch.arange(400).view(2, 200) * 7 % 61

    def denoised(ids: Tensor, mask: Tensor | None, prompt: Any) -> Tensor:
        with torch.no_grad(), attach(model, SparseD(prompt_tokens=prompt, **SMALL), steps=2) as attached:
            for attached.step in range(2):
                out = model(ids, attention_mask=mask).logits
            assert [r["stage"] for r in attached.records] == ["pattern found"] * 2 + ["sparse"] * 2
        return out
    alone = denoised(ids[1:, :150], None, 40)
    mask = torch.ones_like(ids)
    mask[1, 150:] = 0
    torch.testing.assert_close(denoised(ids, mask, [90, 40])[1:, :150], alone, atol=1e-3, rtol=1e-3)
    left, mask = ids.clone(), mask.clone()
    left[1], mask[1] = ids[1].roll(50), mask[1].roll(50)
    torch.testing.assert_close(denoised(left, mask, [90, 40])[1:, 50:], alone, atol=1e-3, rtol=1e-3)
