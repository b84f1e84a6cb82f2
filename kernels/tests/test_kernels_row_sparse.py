"""Attention of every query to its own keys: against masked softmax, 1 x 1 blocks, and torch's own, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from looseleaf_kernels import BlockIndex, block_sparse_attention, row_sparse_attention
from looseleaf_kernels.row_sparse import cpu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [  # batch, query heads, key heads, Lq, Lk, D, keys of a query, causal
    (1, 2, 2, 40, 40, 64, 10, False),
    (2, 6, 2, 33, 50, 32, 7, False),   # GQA
    (2, 4, 1, 37, 60, 16, 40, True),   # more keys than a Triton program takes at once
    (1, 3, 3, 30, 21, 24, 5, True),    # Lq > Lk: the first queries see nothing
    (1, 1, 1, 5, 5, 128, 5, False),    # all keys
    (1, 2, 2, 20, 20, 80, 3, False),   # D not a power of two
]


def inputs(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, hq, hk, lq, lk, d, many, _ = case
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, n, d, generator=g).to(dtype) for h, n in ((hq, lq), (hk, lk), (hk, lk)))
    index = torch.rand(b, hq, lq, lk, generator=g).argsort(-1)[..., :many]
    index = torch.where(torch.rand(index.shape, generator=g) < 0.2, -1, index)
    index[:, :, 3] = -1  # a query without any key
    return q, k, v, index.int()


def dense(index: Tensor, case: tuple, q_len: Tensor, k_len: Tensor) -> Tensor:
    """(B, Hq, Lq, Lk) bool, pair by pair."""
    lk, causal = case[4], case[7]
    mask = torch.zeros(*index.shape[:3], lk, dtype=torch.bool)
    for item, head, i in torch.cartesian_prod(*(torch.arange(n) for n in index.shape[:3])).tolist():
        n, m = int(q_len[item]), int(k_len[item])
        last = min(m, i + 1 + m - n) if causal else m
        for j in index[item, head, i].tolist():
            mask[item, head, i, j] |= 0 <= j < last and i < n
    return mask


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (torch.nan_to_num(x.double()).repeat_interleave(group, 1) for x in (k, v))
    s = (torch.nan_to_num(q.double()) @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(s, -1).nan_to_num(0.0) @ v, torch.logsumexp(s, -1)


def check(impl: str, case: tuple, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    q, k, v, index = inputs(case, dtype)
    b, lq, lk = q.shape[0], q.shape[2], k.shape[2]
    q_len, k_len = torch.tensor([lq, lq // 2][:b]), torch.tensor([lk, lk // 2][:b])
    want, want_lse = by_hand(q, k, v, dense(index, case, q_len, k_len))
    for x, lengths in ((q, q_len), (k, k_len), (v, k_len)):
        for item in range(b):
            x[item, :, lengths[item]:] = torch.nan
    out, lse = row_sparse_attention(q.to(device), k.to(device), v.to(device), index.to(device), causal=case[7],
                                    query_lengths=q_len, key_lengths=k_len, impl=impl)
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_masked_softmax(case: tuple, dtype: torch.dtype, impl: str) -> None:
    check(impl, case, dtype=dtype)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    for case in CASES:
        check("cpu", case)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1]])
def test_is_blocks_of_one_by_one_and_masked_sdpa_with_gradients(case: tuple, impl: str) -> None:
    q, k, v, index = inputs(case, torch.float64)
    lq, lk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    mask = dense(index, case, *(torch.full((q.shape[0],), n) for n in (lq, lk)))
    blocks = BlockIndex.from_mask(mask, block_q=1, block_k=1, q_len=lq, k_len=lk, causal=False)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        return torch.where(mask.any(-1)[..., None], torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, mask | ~mask.any(-1)[..., None]), 0.0)

    results = []
    for run in (lambda *x: row_sparse_attention(*x, index, impl=impl)[0],
                lambda *x: block_sparse_attention(*x, blocks)[0], sdpa):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out = run(*tensors)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        results.append([out.detach(), *(x.grad for x in tensors)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_gradient_by_differences() -> None:
    q, k, v, index = (x[..., :6] if x.dim() == 4 and x.is_floating_point() else x
                      for x in inputs((2, 2, 1, 6, 9, 6, 4, True), torch.float64))
    lengths = {"query_lengths": torch.tensor([6, 4]), "key_lengths": torch.tensor([9, 5])}
    torch.autograd.gradcheck(lambda q, k, v: row_sparse_attention(q, k, v, index, causal=True, **lengths)[0],
                             tuple(x.clone().requires_grad_() for x in (q, k, v)))


def test_nothing_to_attend_to() -> None:
    q, k, v, index = inputs(CASES[0])
    for none in (index[..., :0], -torch.ones_like(index)):
        out, lse = row_sparse_attention(q, k, v, none)
        assert not out.any() and bool(torch.isneginf(lse).all())


@pytest.mark.parametrize(("index", "says"), [
    (torch.tensor([0, 40]), "index: expected keys from 0 to 39, or -1 for none, got 0 to 40"),
    (torch.tensor([5, 5]), "expected each key at most once in a row, got key 5 twice"),
    (torch.tensor([0.0, 1.0]), "index: expected integers of shape"),
])
def test_what_is_refused(index: Tensor, says: str) -> None:
    q, k, v, _ = inputs(CASES[0])
    with pytest.raises(ValueError, match=says):
        row_sparse_attention(q, k, v, index.expand(1, 2, 40, 2))
    with pytest.raises(ValueError, match="index: expected integers of shape"):
        row_sparse_attention(q, k, v, torch.zeros(1, 2, 39, 2, dtype=torch.int32))


def test_opcheck() -> None:
    q, k, v, index = inputs(CASES[1])
    torch.library.opcheck(torch.ops.looseleaf.row_sparse_attention.default, (
        q, k, v, index, 0.2, False, torch.tensor([33, 20]), torch.tensor([50, 40]), "cpu"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_triton_under_its_interpreter(cases_agree_under_the_interpreter: Callable[[], None]) -> None:
    cases_agree_under_the_interpreter()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_triton_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    check("triton", case, "cuda", dtype)
