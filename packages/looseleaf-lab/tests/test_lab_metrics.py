"""Metrics against definitions written out by hand."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf_lab import metrics, timing

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (200,), generator=torch.Generator().manual_seed(1))


def nll(model: Any, window: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double().log_softmax(-1)
    return -logits[torch.arange(len(window) - 1), window[1:]]


@pytest.mark.parametrize(("context", "stride"), [(50, 50), (50, 20), (200, 200), (64, 1), (2, 2)])
def test_perplexity_scores_each_token_once(tiny: Any, ids: torch.Tensor, context: int, stride: int) -> None:
    text = ids[:80] if stride == 1 else ids
    result = metrics.perplexity(tiny, text, context, stride, batch=3)
    losses = []
    for n, start in enumerate(range(0, len(text) - context + 1, stride)):
        every = nll(tiny, text[start:start + context])
        losses.append(every if n == 0 else every[-stride:])
    joined = torch.cat(losses)
    assert result.tokens == [len(x) for x in losses]
    assert result.value == pytest.approx(math.exp(float(joined.mean())), rel=1e-5)
    assert result.losses == pytest.approx([float(x.mean()) for x in losses], rel=1e-5)
    assert result.loss == pytest.approx(math.log(result.value))
    if stride == context:
        value, low, high = result.interval()
        assert low <= value <= high
        assert value == pytest.approx(result.value, rel=1e-9)


def test_perplexity_of_the_last_tokens(tiny: Any, ids: torch.Tensor) -> None:
    result = metrics.perplexity(tiny, ids, 100, last=10)
    want = torch.cat([nll(tiny, ids[:100])[-10:], nll(tiny, ids[100:])[-10:]]).mean()
    assert result.loss == pytest.approx(float(want), rel=1e-5)


def test_a_start_token_takes_the_place_of_the_first(tiny: Any, ids: torch.Tensor) -> None:
    want = []
    for start in (0, 100):
        window = ids[start:start + 100].clone()
        window[0] = 7
        want.append(nll(tiny, window))
    before = ids.clone()
    assert metrics.perplexity(tiny, ids, 100, bos=7).loss == pytest.approx(float(torch.cat(want).mean()), rel=1e-5)
    assert torch.equal(ids, before)


def test_logits_in_pieces_equal_logits_at_once(tiny: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ids[:100].reshape(2, 50)
    with torch.no_grad():
        whole = metrics.token_losses(tiny, rows)
        monkeypatch.setattr(metrics, "LOGITS_BYTES", 97 * 4 * 2 * 7)
        pieces = metrics.token_losses(tiny, rows)
        monkeypatch.setattr(metrics, "_hidden", lambda model, ids: None)
        plain = metrics.token_losses(tiny, rows)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(plain, whole, rtol=1e-5, atol=1e-5)


def test_capped_logits_are_not_bypassed() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, sliding_window=8)
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    row = torch.randint(0, 61, (30,))
    assert metrics.perplexity(model, row, 30).loss == pytest.approx(float(nll(model, row).mean()), rel=1e-4)


def test_a_module_of_ones_own(ids: torch.Tensor) -> None:
    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 97)

    assert metrics.perplexity(Uniform(), ids, 50).value == pytest.approx(97)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"context": 1}, "context: expected an integer >= 2, got 1"),
    ({"context": 50, "stride": 51}, "stride: expected .* got 51"),
    ({"context": 500}, "expected at least context=500 tokens, got 200"),
    ({"context": 50, "last": 50}, "last: expected .* got 50"),
    ({"context": 50, "batch": 0}, "batch: expected .* got 0")])
def test_perplexity_refuses(tiny: Any, ids: torch.Tensor, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.perplexity(tiny, ids, **arguments)


class Words:
    """A tokenizer of whole words and single digits."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.known: list[str] = ["<end>"]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        import re

        out = []
        for word in re.findall(r"\d|[A-Za-z]+|[^\w\s]", text):
            if word not in self.known:
                self.known.append(word)
            out.append(self.known.index(word))
        return {"input_ids": out}

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(self.known[i] for i in ids.tolist())


def test_passkey_finds_what_is_there() -> None:
    tokenizer = Words()
    seen: list[int] = []

    class Reader(torch.nn.Module):
        """Answers with the five digits that stand before "Remember"; wrong at the second half of the text."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, prompt: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
            at = prompt[0].tolist().index(tokenizer.known.index("Remember"))
            seen.append(prompt.shape[1])
            answer = prompt[:, at - 6:at - 1] if at < prompt.shape[1] / 2 else torch.zeros(1, 5, dtype=torch.int64)
            return torch.cat([prompt, answer], 1)

    text = "some words that say nothing at all " * 100
    result = metrics.passkey(Reader(), tokenizer, 300, trials=4, seed=3, text=text)
    assert seen == [300] * 4
    assert result.depths == [0.125, 0.375, 0.625, 0.875]
    assert result.correct == [1.0, 1.0, 0.0, 0.0] and result.accuracy == 0.5
    assert result.digits[:2] == [1.0, 1.0]
    with pytest.raises(ValueError, match="context: expected an integer >= 128, got 10"):
        metrics.passkey(Reader(), tokenizer, 10)


def test_relative_error() -> None:
    assert metrics.relative_error(torch.tensor([1.1, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.1, rel=1e-5)
    assert metrics.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert metrics.relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_interleave_takes_turns_and_times_only_the_function() -> None:
    order: list[str] = []
    inside = SimpleNamespace(count=0)

    import contextlib

    @contextlib.contextmanager
    def around() -> Any:
        inside.count += 1
        yield
        inside.count -= 1

    timed = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1,
                              around={"a": around})
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert inside.count == 0
    assert len(timed.seconds["a"]) == len(timed.seconds["b"]) == 3
    with pytest.raises(ValueError, match="rounds=0"):
        timing.interleave({"a": lambda: None}, rounds=0)


def test_ratio_is_paired() -> None:
    made = timing.Timing({"slow": [2.0, 20.0, 4.0], "fast": [1.0, 10.0, 2.0]})
    assert made.ratio("fast", "slow") == (2.0, 2.0, 2.0)
    assert made.median("slow") == 4.0


def test_peak_memory_sees_an_allocation() -> None:
    if not timing.resident_bytes():
        pytest.skip("this system does not say how much memory a process has")
    with timing.peak_memory() as peak:
        block = np.ones(40_000_000, dtype=np.uint8)
        time.sleep(0.2)  # a busy machine lets the watching thread run late
        del block
    assert 30e6 < peak.bytes < 400e6


def test_peak_memory_sees_a_spike_that_no_sample_falls_into() -> None:
    if not timing._reset_high_mark():
        pytest.skip("this system keeps no high mark of memory, or does not let us reset it")
    with timing.peak_memory(every=60) as peak:
        block = np.ones(40_000_000, dtype=np.uint8)
        del block
    assert 30e6 < peak.bytes < 400e6


def test_peak_memory_counts_again_what_was_given_back() -> None:
    libc = pytest.importorskip("ctypes").CDLL(None)
    if not timing.resident_bytes() or not hasattr(libc, "malloc_trim"):
        pytest.skip("needs Linux and glibc")

    def work() -> int:
        with timing.peak_memory() as peak:
            blocks = [torch.ones(250_000) for _ in range(60)]
            del blocks
        return peak.bytes

    first, second = work(), work()
    assert first > 40e6 and second > 40e6
