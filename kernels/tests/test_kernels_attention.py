"""Block-sparse attention: every implementation against float64, and inputs that break careless ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from looseleaf_kernels import BlockIndex, block_sparse_attention, implementation, implementation_for

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [  # batch, query heads, key heads, Lq, Lk, D, block_q, block_k, causal
    (1, 2, 2, 128, 128, 64, 32, 32, True),
    (2, 6, 2, 100, 100, 64, 32, 32, True),     # GQA, ragged last blocks
    (2, 4, 1, 37, 150, 32, 16, 32, True),      # Lq < Lk, unequal blocks
    (1, 3, 3, 90, 61, 16, 32, 16, False),      # bidirectional, Lq > Lk
    (1, 2, 1, 5, 5, 128, 64, 64, True),        # shorter than a block
    (1, 1, 1, 70, 70, 256, 32, 32, True),
    (1, 2, 2, 64, 64, 80, 32, 32, True),       # D not a power of two
]


def inputs(case: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, BlockIndex]:
    b, hq, hk, lq, lk, d, bq, bk, causal = case
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, d, generator=g).to(dtype) for h, n in ((hq, lq), (hk, lk), (hk, lk)))
    mask = torch.rand(b, hq, -(-lq // bq), -(-lk // bk), generator=g) < 0.4
    return q, k, v, BlockIndex.from_mask(mask, block_q=bq, block_k=bk, q_len=lq, k_len=lk, causal=causal)


def by_hand(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """Independent of the package's reference: softmax under the expanded mask in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = (q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~index.expand(), -torch.inf)
    lse = torch.logsumexp(s, -1)
    return torch.softmax(s, -1).nan_to_num(0.0) @ v, lse


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: tuple, dtype: torch.dtype, impl: str) -> None:
    q, k, v, index = inputs(case, dtype)
    out, lse = block_sparse_attention(q, k, v, index, impl=impl)
    want, want_lse = by_hand(q, k, v, index)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_empty_rows_give_zero_and_minus_infinity(impl: str) -> None:
    q, k, v, _ = inputs(CASES[0], torch.float32)
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, 1, 1] = True   # only its diagonal block
    mask[:, :, 0, 3] = True   # a block that causality empties
    index = BlockIndex.from_mask(mask, block_q=32, block_k=32, q_len=128, k_len=128, causal=True)
    out, lse = block_sparse_attention(q, k, v, index, impl=impl)
    assert out[:, :, :32].abs().max() == 0 and out[:, :, 64:].abs().max() == 0
    assert torch.isneginf(lse[:, :, :32]).all() and torch.isneginf(lse[:, :, 64:]).all()
    torch.testing.assert_close(out.double(), by_hand(q, k, v, index)[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_large_logits(impl: str) -> None:
    q, k, v, index = inputs(CASES[1], torch.float32)
    q = q * 1e4
    out, lse = block_sparse_attention(q, k, v, index, impl=impl)
    assert torch.isfinite(out).all() and not torch.isnan(lse).any()
    # The softmax is nearly one-hot here: fp32 scores of 1e4 are known to about 1e-3.
    torch.testing.assert_close(out.double(), by_hand(q, k, v, index)[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_and_nan_in_padding(impl: str, causal: bool) -> None:
    case = (3, 4, 2, 70, 90, 32, 16, 16, causal)
    q, k, v, index = inputs(case, torch.float32)
    q_len, k_len = torch.tensor([70, 33, 0]), torch.tensor([90, 41, 0])
    single = []
    for b in range(3):
        mask = index.to_mask()[b:b + 1]
        n, m = int(q_len[b]), int(k_len[b])
        part = BlockIndex.from_mask(mask[:, :, :-(-n // 16), :-(-m // 16)], block_q=16, block_k=16, q_len=n, k_len=m,
                                    causal=causal)
        single.append(block_sparse_attention(q[b:b + 1, :, :n], k[b:b + 1, :, :m], v[b:b + 1, :, :m], part, impl=impl))
        q[b, :, n:] = torch.nan
        k[b, :, m:] = torch.nan
        v[b, :, m:] = torch.nan
    out, lse = block_sparse_attention(q, k, v, index, key_lengths=k_len, query_lengths=q_len, impl=impl)
    for b, (want, want_lse) in enumerate(single):
        n = int(q_len[b])
        torch.testing.assert_close(out[b:b + 1, :, :n], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[b:b + 1, :, :n], want_lse, atol=1e-5, rtol=1e-5)
        assert (out[b, :, n:] == 0).all() and torch.isneginf(lse[b, :, n:]).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_in_a_valid_row_is_not_hidden(impl: str) -> None:
    for which in range(3):
        *tensors, _ = inputs((1, 1, 1, 64, 64, 16, 32, 32, True), torch.float32)
        index = BlockIndex.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool).tril(), block_q=32, block_k=32,
                                     q_len=64, k_len=64, causal=True)
        tensors[which][0, 0, 40, 2] = torch.nan
        out, lse = block_sparse_attention(*tensors, index, impl=impl)
        assert torch.isnan(out[0, 0, 40, 2]) and torch.isnan(lse[0, 0, 40]) == (which < 2)


def test_gradients() -> None:
    for case in [CASES[1], CASES[2], CASES[3]]:
        q, k, v, index = inputs(case, torch.float64)
        wanted = [x.clone().requires_grad_() for x in (q, k, v)]
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        weight = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (by_hand_finite(*wanted, index) * weight).sum().backward()
        (block_sparse_attention(*given, index)[0] * weight).sum().backward()
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)


def by_hand_finite(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> Tensor:
    """As by_hand, but with gradients that are not NaN on empty rows."""
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    seen = index.expand()
    p = torch.where(seen, (s - s.detach().amax(-1, keepdim=True)).exp(), 0.0)
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
    return p @ v.repeat_interleave(group, 1)


def test_opcheck_and_compile() -> None:
    q, k, v, index = inputs(CASES[1], torch.float32)
    n = torch.full((2,), 100)
    torch.library.opcheck(torch.ops.looseleaf.block_sparse_attention.default,
                          (q.requires_grad_(), k, v, index.row_ptr, index.col, 0.1, True, 32, 32, n, n, "cpu"),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))

    def attend(q: Tensor) -> Tensor:
        return torch.ops.looseleaf.block_sparse_attention(
            q * 2, k, v, index.row_ptr, index.col, 0.1, True, 32, 32, n, n, "cpu")[0] + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q.detach()), attend(q.detach()))


def test_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert implementation_for("block_sparse_attention", cpu, torch.float32, 64)[0] == "cpu"
    with implementation("reference"):
        assert implementation_for("block_sparse_attention", cpu, torch.float32, 64) == ("reference", "forced")
    monkeypatch.setenv("LOOSELEAF_KERNELS", "fast")
    with pytest.raises(ValueError, match="LOOSELEAF_KERNELS: expected reference, cpu or triton, got 'fast'"):
        implementation_for("block_mean", cpu, torch.float32, 64)


@pytest.mark.parametrize(("change", "says"), [
    ({"q_len": 64}, "got one for batch 1, 2 heads, Lq 64"), ({"heads": 3}, "got one for batch 1, 3 heads, Lq 128")])
def test_an_index_of_other_sizes(change: dict, says: str) -> None:
    q, k, v, _ = inputs(CASES[0], torch.float32)
    n = change.get("q_len", 128)
    mask = torch.ones(1, change.get("heads", 2), -(-n // 32), 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=says):
        block_sparse_attention(q, k, v, BlockIndex.from_mask(mask, block_q=32, block_k=32, q_len=n, k_len=128,
                                                             causal=True))


def test_heads_that_do_not_divide() -> None:
    q, k, v, index = inputs(CASES[1], torch.float32)
    with pytest.raises(ValueError, match="divides the 6 of the query, got 4"):
        block_sparse_attention(q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1), index)


INTERPRET = """
import torch, sys
sys.path.insert(0, {tests!r})
import test_kernels_attention as t
from looseleaf_kernels import block_sparse_attention
from looseleaf_kernels.mean import reference, triton
for case in t.CASES[:6]:
    q, k, v, index = t.inputs(case, torch.float32)
    out, lse = block_sparse_attention(q, k, v, index, impl="triton")
    want, want_lse = t.by_hand(q, k, v, index)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)
t.test_empty_rows_give_zero_and_minus_infinity("triton")
t.test_large_logits("triton")
t.test_nan_in_a_valid_row_is_not_hidden("triton")
t.test_lengths_and_nan_in_padding("triton", True)
x = torch.randn(2, 3, 50, 24); n = torch.tensor([50, 17])
torch.testing.assert_close(triton.block_mean(x, 16, n), reference.block_mean(x, 16, n))
print("agrees")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_under_its_interpreter(agrees_under_the_interpreter: Callable[[str], None]) -> None:
    agrees_under_the_interpreter(INTERPRET)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_triton_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    q, k, v, index = inputs(case, dtype)
    out, lse = block_sparse_attention(q.cuda(), k.cuda(), v.cuda(), index.to("cuda"), impl="triton")
    want, want_lse = by_hand(q, k, v, index)
    torch.testing.assert_close(out.cpu().double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-3, rtol=1e-3)
