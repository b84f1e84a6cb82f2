"""Quantised block-sparse attention: its integers, its error, and inputs that break careless code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from looseleaf_kernels import (
    BlockIndex,
    block_sparse_attention,
    implementation_for,
    quantize_blocks,
    quantize_values,
    quantized_block_sparse_attention,
    smooth_keys,
)
from looseleaf_kernels.quantized import cpu, reference
from looseleaf_kernels.quantized.quantizers import LARGEST_P

CASES = [  # batch, query heads, key heads, Lq, Lk, D, block_q, block_k, causal
    (1, 2, 2, 128, 128, 64, 32, 32, True),
    (2, 6, 2, 100, 100, 64, 32, 32, True),     # GQA, ragged last blocks
    (2, 4, 1, 37, 150, 32, 16, 32, True),      # Lq < Lk, unequal blocks
    (1, 3, 3, 90, 61, 16, 32, 32, False),      # bidirectional, Lq > Lk
    (1, 2, 1, 5, 5, 128, 64, 64, True),        # shorter than a block
    (1, 2, 2, 64, 64, 80, 32, 32, True),       # D not a power of two
]
BITS = (8, 4, 16)


def inputs(case: tuple, dtype: torch.dtype = torch.float32, seed: int = 0,
           density: float = 0.4) -> tuple[Tensor, Tensor, Tensor, BlockIndex]:
    b, hq, hk, lq, lk, d, bq, bk, causal = case
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, n, d, generator=g).to(dtype) for h, n in ((hq, lq), (hk, lk), (hk, lk)))
    mask = torch.rand(b, hq, -(-lq // bq), -(-lk // bk), generator=g) < density
    return q, k, v, BlockIndex.from_mask(mask, block_q=bq, block_k=bk, q_len=lq, k_len=lk, causal=causal)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def by_hand(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, pv_bits: int) -> tuple[Tensor, Tensor]:
    """Dense and in float64, for full lengths: the scores from the integers of Q and K; P by block of the index."""
    group, bq, bk = q.shape[1] // k.shape[1], index.block_q, index.block_k

    def rows(scale: Tensor, block: int, length: int) -> Tensor:
        return scale.double().repeat_interleave(block, 2)[:, :, :length]

    qi, qs = quantize_blocks(q, bq, 8)
    ki, ks = quantize_blocks(smooth_keys(k), bk, 8)
    qd = qi.double() * rows(qs, bq, index.q_len)[..., None]
    kd = (ki.double() * rows(ks, bk, index.k_len)[..., None]).repeat_interleave(group, 1)
    s = (qd @ kd.mT * q.shape[-1] ** -0.5).masked_fill(~index.expand(), -torch.inf)
    lse = torch.logsumexp(s, -1)
    if pv_bits == 16:
        vd = v.double()
    else:
        vi, vs = quantize_values(v, bk, pv_bits)
        vd = vi.double() * rows(vs, bk, index.k_len)
    out = torch.zeros_like(qd)
    top = torch.full(s.shape[:3], -torch.inf, dtype=torch.float64)
    for c in range(index.columns):
        part = s[..., c * bk:(c + 1) * bk]
        top = torch.maximum(top, part.amax(-1))
        p = (part - top[..., None]).exp().nan_to_num(0.0)
        if pv_bits != 16:
            for n in range(index.rows):
                block = p[:, :, n * bq:(n + 1) * bq]
                scale = block.amax((2, 3), keepdim=True).clamp(min=1e-30) / LARGEST_P[pv_bits]
                block.copy_((block / scale).round() * scale)
        weight = (top - lse).exp().nan_to_num(0.0)[..., None]
        out += weight * (p @ vd[:, :, c * bk:(c + 1) * bk].repeat_interleave(group, 1))
    taken = q.double() @ k.double().mean(2, keepdim=True).repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    return out, lse + taken[..., 0]


@pytest.mark.parametrize("pv_bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_reference_agrees_with_a_dense_simulation(case: tuple, pv_bits: int) -> None:
    q, k, v, index = inputs(case)
    out, lse = quantized_block_sparse_attention(q, k, v, index, pv_bits=pv_bits, impl="reference")
    want, want_lse = by_hand(q, k, v, index, pv_bits)
    # Some of the thousands of P's integers lie at a rounding edge, and move by one in float64. Each moves its row by
    # less than a step of P.
    apart = (out - want).abs().amax(-1)
    assert (apart > 1e-5).double().mean() < 0.02
    assert apart.max() < (v.abs().max() / LARGEST_P.get(pv_bits, 1e5))
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pv_bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_cpu_agrees_with_the_reference(case: tuple, pv_bits: int, dtype: torch.dtype) -> None:
    agrees("cpu", inputs(case, dtype), pv_bits)


def agrees(impl: str, given: tuple[Tensor, Tensor, Tensor, BlockIndex], pv_bits: int) -> None:
    """Whether an implementation has the reference's output: equal to fp32 rounding, or to one step of the dtype."""
    q, k, v, index = given
    want, want_lse = quantized_block_sparse_attention(q, k, v, index, pv_bits=pv_bits, impl="reference")
    out, lse = quantized_block_sparse_attention(q, k, v, index, pv_bits=pv_bits, impl=impl)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, want, atol=2e-6, rtol=max(1e-5, 2 * torch.finfo(q.dtype).eps))
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pv_bits", [8, 4])
@pytest.mark.parametrize("case", [(2, 4, 2, 128, 192, 32, 32, 16, False), (2, 4, 2, 100, 90, 64, 32, 32, True)])
def test_integers_of_p_and_of_the_products_are_the_references(case: tuple, pv_bits: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """How often each integer occurs in P, and what it weighs: sums of P and P V over all blocks, as exact integers."""
    q, k, v, index = inputs(case)
    seen: dict[str, Tensor] = {}

    def count(name: str, x: Tensor) -> None:
        assert torch.equal(x, x.round())
        seen[name] = seen.get(name, 0) + torch.bincount(x.flatten().long(), minlength=128)

    for module in (reference, cpu):
        real = module.quantize_p

        def watched(p: Tensor, largest: int, name: str = module.__name__,
                    real: object = real) -> tuple[Tensor, Tensor]:
            integers, scale = real(p, largest)
            count(name, integers)
            return integers, scale

        monkeypatch.setattr(module, "quantize_p", watched)
        quantized_block_sparse_attention(q, k, v, index, pv_bits=pv_bits, impl=module.__name__.rpartition(".")[2])
    one, two = seen.values()
    assert one.sum() > 1000 and one[LARGEST_P[pv_bits]] > 0 and one[LARGEST_P[pv_bits] + 1:].sum() == 0
    assert torch.equal(one[1:], two[1:])  # zeros also fill what is ragged


def structured(length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slow waves along the sequence, keys with a large common offset, a few loud channels, as in real models."""
    g = torch.Generator().manual_seed(3)
    at = torch.arange(length)[:, None] / length
    waves = torch.sin(at * torch.rand(3, 1, 4, 1, width, generator=g).mul(60) + torch.arange(4.0)[:, None, None])
    q, k, v = waves + 0.3 * torch.randn(3, 1, 4, length, width, generator=g)
    offset = torch.zeros(width)
    offset[::17] = 12.0
    loud = torch.ones(width)
    loud[5] = 6.0
    return q, k + offset, v * loud


@pytest.mark.parametrize("data", ["gaussian", "structured"])
def test_error_of_8_bits_is_below_two_percent(data: str) -> None:
    if data == "gaussian":
        q, k, v, index = inputs((1, 4, 4, 256, 256, 64, 64, 64, False), density=0.5)
    else:
        q, k, v = structured(256, 64)
        index = inputs((1, 4, 4, 256, 256, 64, 64, 64, False), density=0.5)[3]
    want, want_lse = block_sparse_attention(q, k, v, index)
    out, lse = quantized_block_sparse_attention(q, k, v, index)
    assert error(out, want) < 2e-2
    some = ~torch.isneginf(want_lse)
    assert (lse - want_lse)[some].abs().max() < 0.1
    less = error(quantized_block_sparse_attention(q, k, v, index, pv_bits=4)[0], want)
    assert error(out, want) < less < 0.5
    if data == "structured":  # what smoothing is for
        smooth, rough = (error(quantized_block_sparse_attention(q, k, v, index, pv_bits=16, smooth_key=on)[0], want)
                         for on in (True, False))
        assert smooth < rough


def test_16_bit_values_and_all_blocks_are_close_to_dense_attention() -> None:
    q, k, v = structured(200, 64)
    index = BlockIndex.from_mask(torch.ones(1, 4, 4, 4, dtype=torch.bool), block_q=64, block_k=64, q_len=200,
                                 k_len=200, causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert error(quantized_block_sparse_attention(q, k, v, index, pv_bits=16)[0], want) < 1e-2
    # Nothing of the scores is lost where Q and K are integers times a power of two already: only rounding is left.
    q, k = (torch.randint(-127, 128, q.shape, generator=torch.Generator().manual_seed(n)).float() for n in (0, 1))
    q[:, :, ::64], k[:, :, ::64] = 127.0, -127.0
    q, k = q / 64, k / 32
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out, _ = quantized_block_sparse_attention(q, k, v, index, pv_bits=16, smooth_key=False)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def test_smoothing_leaves_exact_attention_unchanged() -> None:
    q, k, v, index = inputs(CASES[1])
    k[..., 3] += 20.0
    want, _ = block_sparse_attention(q, k, v, index)
    smooth = smooth_keys(k)
    torch.testing.assert_close(block_sparse_attention(q, smooth, v, index)[0], want, atol=2e-5, rtol=2e-5)
    assert smooth.mean(2).abs().max() < 1e-5
    lengths = torch.tensor([60, 100])
    k[0, :, 60:] = torch.nan
    smooth = smooth_keys(k, lengths)
    torch.testing.assert_close(smooth[0, :, :60], k[0, :, :60] - k[0, :, :60].mean(1, keepdim=True))
    assert (smooth[0, :, 60:] == 0).all()


@pytest.mark.parametrize("smooth_key", [True, False])
def test_log_sum_exp_is_that_of_the_scores(smooth_key: bool) -> None:
    q, k, v, index = inputs(CASES[1])
    _, want = block_sparse_attention(q, k, v, index)
    _, lse = quantized_block_sparse_attention(q, k, v, index, smooth_key=smooth_key)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want))
    some = ~torch.isneginf(want)
    assert (lse - want)[some].abs().max() < 0.05


def test_values_of_scales_and_integers() -> None:
    x = torch.tensor([[0.9, -2.0], [0.6, 0.25], [0.0, 0.0], [0.0, 0.0], [3.0, torch.nan]]).view(1, 1, 5, 2)
    integers, scale = quantize_blocks(x, 2, 8, torch.tensor([4]))
    torch.testing.assert_close(scale, torch.tensor([[[2 / 127, 0.0, 0.0]]]))
    assert integers.dtype == torch.int8
    assert integers[0, 0].tolist() == [[57, -127], [38, 16], [0, 0], [0, 0], [0, 0]]  # 57.15, 38.1, 15.875
    integers, scale = quantize_values(x[:, :, :4], 2, 4)
    torch.testing.assert_close(scale, torch.tensor([[[[0.9 / 7, 2 / 7], [0.0, 0.0]]]]))
    assert integers[0, 0].tolist() == [[7, -7], [5, 1], [0, 0], [0, 0]]  # 4.67, 0.875
    tiny = torch.full((1, 1, 2, 2), 1e-42)
    integers, scale = quantize_blocks(tiny, 2, 8)
    assert torch.isfinite(scale).all() and integers.abs().max() <= 127
    x = torch.randn(2, 3, 50, 24, generator=torch.Generator().manual_seed(0))
    integers, scale = quantize_blocks(x, 16, 8)
    back = integers * scale.repeat_interleave(16, 2)[:, :, :50, None]
    assert ((back - x).abs() <= scale.repeat_interleave(16, 2)[:, :, :50, None] * 0.5001).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_empty_rows_give_zero_and_minus_infinity(impl: str) -> None:
    q, k, v, _ = inputs(CASES[0])
    mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, 1, 1] = True   # only its diagonal block
    mask[:, :, 0, 3] = True   # a block that causality empties
    index = BlockIndex.from_mask(mask, block_q=32, block_k=32, q_len=128, k_len=128, causal=True)
    for bits in BITS:
        out, lse = quantized_block_sparse_attention(q, k, v, index, pv_bits=bits, impl=impl)
        assert out[:, :, :32].abs().max() == 0 and out[:, :, 64:].abs().max() == 0
        assert torch.isneginf(lse[:, :, :32]).all() and torch.isneginf(lse[:, :, 64:]).all()
        assert out[:, :, 32:64].abs().amax(-1).min() > 0 and torch.isfinite(lse[:, :, 32:64]).all()


def test_no_tokens_and_no_blocks() -> None:
    q, k, v, _ = inputs((1, 2, 2, 0, 8, 16, 16, 32, False))
    index = BlockIndex.from_mask(torch.zeros(1, 2, 0, 1, dtype=torch.bool), block_q=16, block_k=32, q_len=0, k_len=8,
                                 causal=False)
    assert quantized_block_sparse_attention(q, k, v, index)[0].shape == (1, 2, 0, 16)
    q, k, v, index = inputs((1, 2, 2, 40, 40, 16, 16, 32, True), density=0.0)
    out, lse = quantized_block_sparse_attention(q, k, v, index)
    assert out.abs().max() == 0 and torch.isneginf(lse).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_large_logits(impl: str) -> None:
    q, k, v, index = inputs(CASES[1])
    out, lse = quantized_block_sparse_attention(q * 1e4, k, v, index, impl=impl)
    assert torch.isfinite(out).all() and not torch.isnan(lse).any()
    assert out.abs().max() < v.abs().max() * 1.01  # a mean of values, to their rounding


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_and_nan_in_padding(impl: str, causal: bool) -> None:
    case = (3, 4, 2, 70, 90, 32, 16, 32, causal)
    q, k, v, index = inputs(case)
    q_len, k_len = torch.tensor([70, 33, 0]), torch.tensor([90, 41, 0])
    single = []
    for b in range(3):
        mask = index.to_mask()[b:b + 1]
        n, m = int(q_len[b]), int(k_len[b])
        part = BlockIndex.from_mask(mask[:, :, :-(-n // 16), :-(-m // 32)], block_q=16, block_k=32, q_len=n, k_len=m,
                                    causal=causal)
        single.append(part)
    for bits in BITS:
        alone = [quantized_block_sparse_attention(q[b:b + 1, :, :int(q_len[b])], k[b:b + 1, :, :int(k_len[b])],
                                                  v[b:b + 1, :, :int(k_len[b])], part, pv_bits=bits, impl=impl)
                 for b, part in enumerate(single)]
        padded = [x.clone() for x in (q, k, v)]
        for b in range(3):
            padded[0][b, :, q_len[b]:] = torch.nan
            padded[1][b, :, k_len[b]:] = torch.nan
            padded[2][b, :, k_len[b]:] = torch.nan
        out, lse = quantized_block_sparse_attention(*padded, index, key_lengths=k_len, query_lengths=q_len,
                                                    pv_bits=bits, impl=impl)
        for b, (want, want_lse) in enumerate(alone):
            n = int(q_len[b])
            torch.testing.assert_close(out[b:b + 1, :, :n], want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse[b:b + 1, :, :n], want_lse, atol=1e-5, rtol=1e-5)
            assert (out[b, :, n:] == 0).all() and torch.isneginf(lse[b, :, n:]).all()


def test_long_rows_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_SCORES", 3 * 32 * 32)
    for bits in BITS:
        agrees("cpu", inputs((1, 2, 1, 100, 320, 32, 32, 32, True), density=0.8), bits)


def test_sums_beyond_fp32_are_exact_too() -> None:
    """2048 keys in a block, most of P at 127 and V at 127 or 126: the sum is an odd number above 2^24."""
    v = torch.ones(1, 1, 2048, 16)
    v[:, :, 5, 3] = 126 / 127
    q, k = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2048, 16)
    index = BlockIndex.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), block_q=16, block_k=2048, q_len=2,
                                 k_len=2048, causal=False)
    assert 127 * 127 * 2047 + 127 * 126 > 1 << 24
    for impl in ("reference", "cpu"):
        out, _ = quantized_block_sparse_attention(q, k, v, index, impl=impl)
        want = (2047 + 126 / 127) / 2048
        torch.testing.assert_close(out[0, 0, :, 3], torch.full((2,), want), atol=1e-7, rtol=0)
    assert cpu._exact(1040, 127) == torch.float32 and cpu._exact(1041, 127) == torch.float64


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_in_a_valid_row_is_not_hidden(impl: str) -> None:
    for which in range(3):
        *given, index = inputs((1, 1, 1, 64, 64, 16, 32, 32, False), density=1.1)
        given[which][0, 0, 3, 2] = torch.nan
        out, _ = quantized_block_sparse_attention(*given, index, impl=impl)
        assert torch.isnan(out[0, 0, 3, 2])


def test_backward_is_refused() -> None:
    q, k, v, index = inputs(CASES[0])
    out, lse = quantized_block_sparse_attention(q.requires_grad_(), k, v, index)
    assert not lse.requires_grad
    with pytest.raises(NotImplementedError, match=r"call it under torch\.no_grad\(\)"):
        out.sum().backward()


@pytest.mark.parametrize(("change", "says"), [
    ({"qk_bits": 4}, "qk_bits: expected 8, got 4"),
    ({"pv_bits": 2}, "pv_bits: expected 4, 8 or 16, got 2"),
    ({"impl": "cuda"}, "impl: expected reference, cpu or triton, got 'cuda'"),
    ({"value": torch.zeros(1, 2, 128, 32)}, "key, value: expected equal shapes"),
    ({"key": torch.zeros(1, 2, 128, 64).half()}, "and the query's dtype"),
    ({"query": torch.zeros(1, 2, 128, 64).double()}, "dtype of query: expected torch.float32, .* got torch.float64"),
    ({"query": torch.zeros(1, 2, 64, 64)}, "index: expected an index for the tensors"),
    ({"key_lengths": torch.tensor([1, 2])}, "key_lengths: expected shape"),
    ({"impl": "triton"}, "blocks: expected powers of two .* for the Triton kernel, got 32 x 16"),
])
def test_what_does_not_fit(change: dict, says: str) -> None:
    q, k, v, index = inputs((1, 2, 2, 128, 128, 64, 32, 16, True))
    given = {"query": q, "key": k, "value": v, "index": index} | change
    with pytest.raises(ValueError, match=says):
        quantized_block_sparse_attention(**given)


def test_bits_and_blocks_of_the_quantisers() -> None:
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 16"):
        quantize_blocks(x, 2, 16)
    with pytest.raises(ValueError, match="block: expected an integer >= 1, got 0"):
        quantize_values(x, 0, 8)
    with pytest.raises(ValueError, match="expected floats of shape"):
        quantize_blocks(x.long(), 2, 8)


def test_opcheck_and_compile() -> None:
    q, k, v, index = inputs(CASES[1])
    n = torch.full((2,), 100)
    rest = (k, v, index.row_ptr, index.col, 0.1, True, 32, 32, n, n, 8, 8, True, "cpu")
    torch.library.opcheck(torch.ops.looseleaf.quantized_block_sparse_attention.default, (q, *rest),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))

    def attend(q: Tensor) -> Tensor:
        return torch.ops.looseleaf.quantized_block_sparse_attention(q * 2, *rest)[0] + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), attend(q))


def test_choice_of_implementation() -> None:
    name = "quantized_block_sparse_attention"
    assert implementation_for(name, torch.device("cpu"), torch.float32, 64) == ("cpu", "a CPU")
