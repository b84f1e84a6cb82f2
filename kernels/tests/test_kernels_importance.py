"""Block importance: every implementation against the softmax written out, and inputs that break careless ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from looseleaf_kernels import block_importance
from looseleaf_kernels.importance import cpu

CASES = [  # batch, query heads, key heads, Lq, Lk, D, block_q, block_k, causal
    (1, 4, 2, 64, 64, 16, 16, 16, True),
    (2, 4, 2, 50, 70, 16, 16, 32, True),
    (2, 2, 1, 50, 33, 24, 16, 16, True),    # more queries than keys: the first see none
    (1, 2, 2, 50, 70, 32, 32, 16, False),
    (1, 1, 1, 5, 3, 16, 64, 64, False),     # shorter than a block
]


def inputs(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, hq, hk, lq, lk, d, *_ = case
    g = torch.Generator().manual_seed(0)
    return torch.randn(b, hq, lq, d, generator=g).to(dtype), torch.randn(b, hk, lk, d, generator=g).to(dtype)


def by_hand(q: Tensor, k: Tensor, case: tuple, q_len: Tensor, k_len: Tensor) -> Tensor:
    """Sums of blocks, pair by pair, in float64."""
    b, hq, hk, lq, lk, d, bq, bk, causal = case
    out = torch.zeros(b, hq, -(-lq // bq), -(-lk // bk), dtype=torch.float64)
    for item in range(b):
        n, m = int(q_len[item]), int(k_len[item])
        for h in range(hq):
            for i in range(n):
                seen = min(m, max(0, i + 1 + m - n)) if causal else m
                scores = k[item, h // (hq // hk), :seen].double() @ q[item, h, i].double() * d ** -0.5
                for j, p in enumerate(torch.softmax(scores, 0).tolist()):
                    out[item, h, i // bq, j // bk] += p
    return out


def check(impl: str, case: tuple, device: str = "cpu", dtype: torch.dtype = torch.float32, atol: float = 2e-5) -> None:
    q, k = inputs(case, dtype)
    b, lq, lk = q.shape[0], q.shape[2], k.shape[2]
    q_len, k_len = torch.tensor([lq, lq // 2][:b]), torch.tensor([lk, lk // 2][:b])
    want = by_hand(q, k, case, q_len, k_len)
    for x, lengths in ((q, q_len), (k, k_len)):
        for item in range(b):
            x[item, :, lengths[item]:] = torch.nan
    got = block_importance(q.to(device), k.to(device), case[6], case[7], causal=case[8], reduce="sum",
                           query_lengths=q_len, key_lengths=k_len, impl=impl)
    torch.testing.assert_close(got.cpu().double(), want, atol=atol, rtol=atol)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_the_softmax(case: tuple, impl: str) -> None:
    check(impl, case)


@pytest.mark.parametrize("scores", [1, 1 << 10])
def test_chunks_do_not_matter(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_SCORES", scores)
    for case in CASES[:4]:
        check("cpu", case)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_mean_divides_by_a_whole_block(impl: str) -> None:
    q, k = inputs(CASES[1])
    lengths = {"query_lengths": torch.tensor([50, 3]), "key_lengths": torch.tensor([70, 9])}
    total = block_importance(q, k, 16, 32, causal=True, reduce="sum", impl=impl, **lengths)
    torch.testing.assert_close(block_importance(q, k, 16, 32, causal=True, impl=impl, **lengths), total / (16 * 32))
    torch.testing.assert_close(total.sum((2, 3)), torch.tensor([50.0, 3.0])[:, None].expand(2, 4))


def test_no_length_at_all() -> None:
    q, k = inputs(CASES[1])
    none = torch.tensor([0, 0])
    for impl in ("reference", "cpu"):
        for lengths in ({"query_lengths": none}, {"key_lengths": none}):
            assert not block_importance(q, k, 16, 16, causal=False, impl=impl, **lengths).any()
    assert block_importance(q[:, :, :0], k, 16, 16, causal=False).shape == (2, 4, 0, 5)


@pytest.mark.parametrize(("given", "says"), [
    ({"reduce": "max"}, "reduce: expected 'mean' or 'sum', got 'max'"),
    ({"impl": "fast"}, "impl: expected reference, cpu or triton, got 'fast'"),
    ({"key_lengths": torch.tensor([1])}, r"key_lengths: expected shape \(2,\)")])
def test_what_is_refused(given: dict, says: str) -> None:
    q, k = inputs(CASES[1])
    with pytest.raises(ValueError, match=says):
        block_importance(q, k, 16, 16, causal=True, **given)
    with pytest.raises(ValueError, match="block_k: expected an integer >= 1, got 0"):
        block_importance(q, k, 16, 0, causal=True)


def test_opcheck() -> None:
    q, k = inputs(CASES[1])
    torch.library.opcheck(torch.ops.looseleaf.block_importance.default, (
        q, k, 16, 32, 0.2, True, True, torch.tensor([50, 40]), torch.tensor([70, 60]), "cpu"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_triton_under_its_interpreter(cases_agree_under_the_interpreter: Callable[[], None]) -> None:
    cases_agree_under_the_interpreter()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_triton_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    check("triton", case, "cuda", dtype, 1e-4)
