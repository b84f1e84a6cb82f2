"""Blocks and single columns: every implementation against float64, and no key counted twice."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from looseleaf_kernels import (
    BlockIndex,
    Layout,
    block_sparse_attention,
    column_index,
    vertical_slash_attention,
)
from looseleaf_kernels.problem import Problem
from looseleaf_kernels.vertical_slash import cpu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [  # batch, query heads, key heads, Lq, Lk, D, block
    (1, 2, 2, 128, 128, 64, 32),
    (2, 4, 2, 100, 100, 32, 16),    # GQA, ragged last blocks
    (2, 2, 1, 70, 217, 16, 32),     # chunked prefill, off the grid of blocks
    (1, 2, 2, 90, 61, 16, 16),      # more queries than keys: the first see none
    (1, 1, 1, 5, 5, 128, 64),       # shorter than a block
    (1, 2, 1, 64, 64, 80, 32),      # D not a power of two
]


def inputs(case: tuple, dtype: torch.dtype = torch.float32, density: float = 0.3
           ) -> tuple[list[Tensor], Tensor, Tensor, Layout]:
    b, hq, hk, lq, lk, d, block = case
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, n, d, generator=g).to(dtype) for h, n in ((hq, lq), (hk, lk), (hk, lk)))
    layout = Layout.of(q, k, block, torch.tensor([lq, lq // 2][:b]), torch.tensor([lk, lk // 3][:b]))
    blocks = torch.rand(b, hq, layout.rows, layout.columns, generator=g) < density
    columns = torch.rand(b, hq, lk, generator=g) < 0.2
    columns[:, -1] = False  # a head without any
    return [q, k, v], blocks, columns, layout


def union(blocks: Tensor, columns: Tensor, layout: Layout) -> Tensor:
    """(B, H, Lq, Lk) bool: what is attended to."""
    mask = blocks.repeat_interleave(layout.block, 2).repeat_interleave(layout.block, 3)
    mask = mask[:, :, :layout.q_len, :layout.k_len] | columns[:, :, None]
    i, j = torch.arange(layout.q_len), torch.arange(layout.k_len)
    seen = j <= (i + (layout.key_lengths - layout.query_lengths)[:, None])[..., None]
    seen = seen & (j < layout.key_lengths[:, None])[:, None] & (i < layout.query_lengths[:, None])[..., None]
    return mask & seen[:, None]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax under the mask in float64; gradients are not NaN on empty rows."""
    group = q.shape[1] // k.shape[1]
    s = q.double() @ k.double().repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    finite = s.masked_fill(~mask, -1e9)
    p = torch.where(mask, (finite - finite.detach().amax(-1, keepdim=True)).exp(), 0.0)
    out = p / p.sum(-1, keepdim=True).clamp(min=1e-300) @ v.double().repeat_interleave(group, 1)
    return out, torch.logsumexp(s.masked_fill(~mask, -torch.inf), -1)


def check(impl: str, case: tuple, dtype: torch.dtype = torch.float32, device: str = "cpu",
          density: float = 0.3) -> None:
    (q, k, v), blocks, columns, layout = inputs(case, dtype, density)
    want, want_lse = by_hand(q, k, v, union(blocks, columns, layout))
    for x, lengths in ((q, layout.query_lengths), (k, layout.key_lengths), (v, layout.key_lengths)):
        for b, n in enumerate(lengths.tolist()):
            x[b, :, n:] = torch.nan
    index, singles = layout.index(blocks), column_index(blocks, columns, layout)
    out, lse = vertical_slash_attention(
        *(x.to(device) for x in (q, k, v)), index.to(device), singles.to(device), impl=impl,
        key_lengths=layout.key_lengths, query_lengths=layout.query_lengths)
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    atol = 1e-10 if dtype == torch.float64 else 1e-4 if device == "cpu" else 1e-3
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=atol, rtol=atol)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: tuple, dtype: torch.dtype, impl: str) -> None:
    check(impl, case, dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_blocks_and_all_blocks(density: float, impl: str) -> None:
    for case in CASES[:4]:
        check(impl, case, density=density)


@pytest.mark.parametrize("rows", [1, 64])
def test_sharing_of_columns_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SHARED_ROWS", rows)
    for case in CASES[:4]:
        check("cpu", case)


@pytest.mark.parametrize("case", CASES)
def test_no_key_is_counted_twice(case: tuple) -> None:
    _, blocks, columns, layout = inputs(case)
    singles = column_index(blocks, columns, layout)
    wide = blocks.repeat_interleave(layout.block, 3)[..., :layout.k_len]
    both = (wide & columns[:, :, None]).any()
    assert bool(both) or case == CASES[4], "the inputs must have columns inside of blocks, or this shows nothing"
    times = wide.int() + singles.to_mask().int()
    assert int(times.max()) <= 1
    first, last = layout.row_ends
    last = torch.where(last >= first, torch.minimum(last, layout.key_lengths[:, None] - 1), -1)
    seen = (torch.arange(layout.k_len) <= last[..., None])[:, None]
    assert torch.equal((times > 0) & seen, (wide | columns[:, :, None]) & seen)
    assert not (singles.to_mask() & ~seen).any(), "keys that the last query does not see"
    for start, end in zip(singles.row_ptr[..., :-1].flatten(), singles.row_ptr[..., 1:].flatten(), strict=True):
        assert bool((singles.col[start:end].diff() > 0).all())


def test_without_columns_it_is_block_sparse_attention() -> None:
    (q, k, v), blocks, columns, layout = inputs(CASES[0])
    none = column_index(blocks, torch.zeros_like(columns), layout)
    got = vertical_slash_attention(q, k, v, layout.index(blocks), none)
    for one, two in zip(got, block_sparse_attention(q, k, v, layout.index(blocks)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_in_a_valid_column_is_not_hidden(impl: str) -> None:
    for which in (1, 2):
        tensors, blocks, columns, layout = inputs(CASES[0])
        columns[..., 5], blocks[..., 0] = True, False
        tensors[which][0, 0, 5, 2] = torch.nan
        out, lse = vertical_slash_attention(*tensors, layout.index(blocks), column_index(blocks, columns, layout),
                                            impl=impl)
        assert torch.isnan(out[0, 0, 5:, 2]).all() and torch.isfinite(out[0, 0, :5]).all()
        assert torch.isnan(lse[0, 0, 5:]).all() == (which == 1)


def test_gradients() -> None:
    for case in CASES[:4]:
        tensors, blocks, columns, layout = inputs(case, torch.float64)
        lengths = {"key_lengths": layout.key_lengths, "query_lengths": layout.query_lengths}
        weight = torch.randn(tensors[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        wanted, given = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
        (by_hand(*wanted, union(blocks, columns, layout))[0] * weight).sum().backward()
        index, singles = layout.index(blocks), column_index(blocks, columns, layout)
        out, _ = vertical_slash_attention(*given, index, singles, **lengths)
        (out * weight).sum().backward()
        for one, two in zip(given, wanted, strict=True):
            torch.testing.assert_close(one.grad, two.grad, atol=1e-9, rtol=1e-9)


def test_opcheck_and_compile() -> None:
    (q, k, v), blocks, columns, layout = inputs(CASES[1])
    index, singles = layout.index(blocks), column_index(blocks, columns, layout)
    rest = (index.row_ptr, index.col, singles.row_ptr, singles.col, 0.2, 16, 16, layout.query_lengths,
            layout.key_lengths, "cpu")
    torch.library.opcheck(torch.ops.looseleaf.vertical_slash_attention.default, (q.requires_grad_(), k, v, *rest),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))

    def attend(q: Tensor) -> Tensor:
        return torch.ops.looseleaf.vertical_slash_attention(q * 2, k, v, *rest)[0] + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q.detach()), attend(q.detach()))


def test_memory_is_that_of_the_columns() -> None:
    """Nothing of size L x L, nor of size L x (the columns of a head) in floats, is made."""
    length, chosen = 4096, 1000
    q, k, v = (torch.randn(1, 1, length, 16) for _ in range(3))
    layout = Layout.of(q, k, 64)
    columns = torch.zeros(1, 1, length, dtype=torch.bool)
    columns[..., :chosen] = True
    with Largest() as made:
        index = layout.index(torch.eye(64, dtype=torch.bool)[None, None])
        singles = column_index(index.to_mask(), columns, layout)
        problem = Problem(0.25, True, 64, 64, layout.query_lengths, layout.key_lengths)
        cpu.vertical_slash_attention(q, k, v, index.csr, singles.csr, problem)
    assert length * 16 <= made.numel <= max(cpu.SHARED_ROWS * chosen, length * length // 16)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_indices_that_do_not_fit() -> None:
    (q, k, v), blocks, columns, layout = inputs(CASES[0])
    index, singles = layout.index(blocks), column_index(blocks, columns, layout)
    with pytest.raises(ValueError, match=r"columns: expected blocks of 32 x 1, .* got 32 x 32"):
        vertical_slash_attention(q, k, v, index, index)
    with pytest.raises(ValueError, match=r"columns: .* Lq 128, Lk 96, got one for batch 1, 2 heads, Lq 128, Lk 128"):
        vertical_slash_attention(q, k[:, :, :96], v[:, :, :96], Layout.of(q, k[:, :, :96], 32).index(
            blocks[..., :3]), singles)
    both = BlockIndex.from_mask(blocks, block_q=32, block_k=32, q_len=128, k_len=128, causal=False)
    with pytest.raises(ValueError, match=r"index\.causal: expected True, got False"):
        vertical_slash_attention(q, k, v, both, singles)


INTERPRET = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_kernels_vertical_slash as t
for case in t.CASES:
    t.check("triton", case)
t.check("triton", t.CASES[2], density=0.0)
t.check("triton", t.CASES[1], density=1.0)
t.test_nan_in_a_valid_column_is_not_hidden("triton")
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
    check("triton", case, dtype, "cuda")
