"""Blocks of rows: every implementation against plain indexing, gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from looseleaf_kernels import gather_rows, scatter_rows_add

CASES = [  # batch, blocks of the sequence, rows of a block, width, blocks of each item
    (1, 4, 8, 16, [[3, 0]]),
    (2, 5, 4, 24, [[4, 2, 0], [1, 3, -1]]),    # items with different and different many blocks
    (2, 3, 1, 7, [[2], [0]]),                  # single rows of an odd width
    (2, 3, 64, 40, [[0, 1, 2], [-1, -1, -1]]),  # all, and none
    (1, 2, 16, 1100, [[1]]),                   # more numbers than a Triton program copies
]


def inputs(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, int]:
    b, n, block, width, chosen = case
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(b, m * block, width, generator=g).to(dtype) for m in (n, len(chosen[0])))
    return x, y, torch.tensor(chosen, dtype=torch.int32), block


def by_hand(x: Tensor, y: Tensor, blocks: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Row by row, with a matrix of zeros and ones."""
    choice = torch.zeros(x.shape[0], y.shape[1], x.shape[1], dtype=torch.float64)
    for b, row in enumerate(blocks.tolist()):
        for n, m in enumerate(row):
            for r in range(block if m >= 0 else 0):
                choice[b, n * block + r, m * block + r] = 1
    return choice @ x.double(), x.double() + choice.mT @ y.double()


def check(impl: str, case: tuple, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    x, y, blocks, block = inputs(case, dtype)
    taken, total = by_hand(x, y, blocks, block)
    x, y, blocks = x.to(device), y.to(device), blocks.to(device)
    got = gather_rows(x, blocks, block, impl=impl)
    assert torch.equal(got.cpu().double(), taken), "copies are exact"
    torch.testing.assert_close(scatter_rows_add(x, y, blocks, block, impl=impl).cpu(), total.to(dtype))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_blocks(case: tuple, dtype: torch.dtype, impl: str) -> None:
    check(impl, case, dtype=dtype)


@pytest.mark.parametrize("case", CASES[:4])
def test_gradients_are_each_other(case: tuple) -> None:
    x, y, blocks, block = inputs(case, torch.float64)
    torch.autograd.gradcheck(lambda x: gather_rows(x, blocks, block), x[..., :3].clone().requires_grad_())
    torch.autograd.gradcheck(lambda x, y: scatter_rows_add(x, y, blocks, block),
                             (x[..., :2].clone().requires_grad_(), y[..., :2].clone().requires_grad_()))
    torch.autograd.gradgradcheck(lambda x: gather_rows(x, blocks, block).square(), x[..., :2].clone().requires_grad_())


def test_only_the_numbers_of_the_blocks_are_kept() -> None:
    x, _, blocks, block = inputs(CASES[1])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scatter_rows_add(x.requires_grad_(), gather_rows(x, blocks, block), blocks, block)
    assert kept and all(t.dtype == torch.int32 and t.numel() == blocks.numel() for t in kept)


def test_what_is_taken_and_put_back_leaves_the_rest() -> None:
    x, _, blocks, block = inputs(CASES[1])
    back = scatter_rows_add(torch.zeros_like(x), gather_rows(x, blocks, block), blocks, block)
    inside = scatter_rows_add(torch.zeros_like(x), torch.ones(2, 12, 24), blocks, block).bool()
    assert torch.equal(back[inside], x[inside]) and not back[~inside].any() and 0 < inside.float().mean() < 1


@pytest.mark.parametrize(("change", "says"), [
    ({"blocks": torch.tensor([[5, 0, 1], [0, 1, 2]])}, "blocks: expected numbers from 0 to 4, or -1 for none, got 0"),
    ({"blocks": torch.tensor([[1, 0, 1], [0, 1, 2]])}, "expected each block once, got block 1 twice"),
    ({"blocks": torch.tensor([0, 1])}, r"expected shapes \(B, L, H\) and \(B, K\)"),
    ({"block": 3}, "block: expected a number of rows that divides the 20 of .*: pad the sequence"),
    ({"y": torch.zeros(2, 8, 24)}, r"y: expected shape \(2, 12, 24\)"),
])
def test_what_is_refused(change: dict, says: str) -> None:
    x, y, blocks, block = inputs(CASES[1])
    given = {"residual": x, "y": y, "blocks": blocks, "block": block, **change}
    with pytest.raises(ValueError, match=says):
        scatter_rows_add(**given)
    if "y" not in change:
        with pytest.raises(ValueError, match=says):
            gather_rows(x, given["blocks"], given["block"])


def test_opcheck() -> None:
    x, y, blocks, block = inputs(CASES[1])
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.looseleaf.gather_rows.default, (x, blocks, block, "cpu"), test_utils=tests)
    torch.library.opcheck(torch.ops.looseleaf.scatter_rows_add.default, (x, y, blocks, block, "cpu"), test_utils=tests)


def test_triton_under_its_interpreter(cases_agree_under_the_interpreter: Callable[[], None]) -> None:
    cases_agree_under_the_interpreter()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_triton_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    check("triton", case, "cuda", dtype)
