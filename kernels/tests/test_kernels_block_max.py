"""Largest scores of blocks: every implementation against the map written out, and inputs that break careless ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from looseleaf_kernels import block_score_max
from looseleaf_kernels.block_max import cpu

CASES = [  # batch, query heads, key heads, Lq, Lk, D, block, causal
    (1, 4, 2, 64, 64, 16, 16, True),
    (2, 4, 2, 50, 70, 16, 16, True),
    (2, 2, 1, 50, 33, 24, 16, True),   # more queries than keys: the first see none
    (1, 2, 2, 50, 70, 32, 32, False),
    (1, 1, 1, 5, 3, 16, 64, False),    # shorter than a block
]


def inputs(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    b, hq, hk, lq, lk, d, *_ = case
    g = torch.Generator().manual_seed(0)
    return torch.randn(b, hq, lq, d, generator=g).to(dtype), torch.randn(b, hk, lk, d, generator=g).to(dtype)


def by_hand(q: Tensor, k: Tensor, case: tuple, q_len: Tensor, k_len: Tensor) -> Tensor:
    """Pair by pair in float64."""
    b, hq, hk, lq, lk, d, block, causal = case
    out = torch.zeros(b, -(-lq // block), -(-lk // block), dtype=torch.float64)
    for item in range(b):
        n, m = int(q_len[item]), int(k_len[item])
        keys = k[item].double().repeat_interleave(hq // hk, 0)
        for i in range(n):
            for j in range(min(m, max(0, i + 1 + m - n)) if causal else m):
                score = float(((q[item, :, i].double() * keys[:, j]).sum(-1) * d ** -0.5).clamp(min=0).sum())
                at = (item, i // block, j // block)
                out[at] = max(score, float(out[at]))
    return out


def check(impl: str, case: tuple, device: str = "cpu", dtype: torch.dtype = torch.float32, atol: float = 2e-5) -> None:
    q, k = inputs(case, dtype)
    b, lq, lk = q.shape[0], q.shape[2], k.shape[2]
    q_len, k_len = torch.tensor([lq, lq // 2][:b]), torch.tensor([lk, lk // 2][:b])
    want = by_hand(q, k, case, q_len, k_len)
    for x, lengths in ((q, q_len), (k, k_len)):
        for item in range(b):
            x[item, :, lengths[item]:] = torch.nan
    got = block_score_max(q.to(device), k.to(device), case[6], causal=case[7], query_lengths=q_len, key_lengths=k_len,
                          impl=impl)
    torch.testing.assert_close(got.cpu().double(), want, atol=atol, rtol=atol)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_largest_of_the_map(case: tuple, impl: str) -> None:
    check(impl, case)


@pytest.mark.parametrize("scores", [1, 1 << 10])
def test_chunks_do_not_matter(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_SCORES", scores)
    for case in CASES[:4]:
        check("cpu", case)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_negative_scores_of_a_head_count_as_nothing(impl: str) -> None:
    q, k = torch.tensor([[[[1.0]], [[1.0]]]]), torch.tensor([[[[2.0]], [[-5.0]]]])  # one pair: scores 2 and -5
    assert float(block_score_max(q, k, 1, scale=1.0, impl=impl)) == 2.0


@pytest.mark.parametrize(("given", "says"), [
    ({"block": 0}, "block: expected an integer >= 1, got 0"),
    ({"scale": -1.0}, "scale: expected a number >= 0, got -1.0"),
    ({"impl": "fast"}, "impl: expected reference, cpu or triton, got 'fast'"),
    ({"key_lengths": torch.tensor([1])}, r"key_lengths: expected shape \(2,\)")])
def test_what_is_refused(given: dict, says: str) -> None:
    q, k = inputs(CASES[1])
    with pytest.raises(ValueError, match=says):
        block_score_max(q, k, **{"block": 16, **given})


def test_opcheck() -> None:
    q, k = inputs(CASES[1])
    torch.library.opcheck(torch.ops.looseleaf.block_score_max.default, (
        q, k, 0.2, True, 16, torch.tensor([50, 40]), torch.tensor([70, 60]), "cpu"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_triton_under_its_interpreter(cases_agree_under_the_interpreter: Callable[[], None]) -> None:
    cases_agree_under_the_interpreter()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_triton_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    check("triton", case, "cuda", dtype, 1e-3)
