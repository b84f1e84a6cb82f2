"""All public operations at once: the list of them, the shapes in their signatures, and torch.compile."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import looseleaf_kernels
from looseleaf_kernels import BlockIndex, Layout, available_implementations, implementation_for, operations

LENGTHS = {"query_lengths": torch.tensor([70, 33]), "key_lengths": torch.tensor([90, 41])}
NAMES = [operation.name for operation in operations()]


def arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an operation; the first is a tensor of queries or scores."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 32, generator=g) for h, n in ((4, 70), (2, 90), (2, 90)))
    layout = Layout.of(q, k, 32, **LENGTHS)
    blocks = torch.rand(2, 4, layout.rows, layout.columns, generator=g) < 0.5
    index = layout.index(blocks)
    columns = looseleaf_kernels.column_index(blocks, torch.rand(2, 4, 90, generator=g) < 0.2, layout)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "block_sparse_attention": ((q, k, v, index), LENGTHS),
        "quantized_block_sparse_attention": ((q, k, v, index), LENGTHS),
        "vertical_slash_attention": ((q, k, v, index, columns), LENGTHS),
        "block_importance": ((q, k, 32, 16), {"causal": True, **LENGTHS}),
        "block_mean": ((q, 16), {"lengths": LENGTHS["query_lengths"]}),
        "last_query_scores": ((q, k, 16), LENGTHS),
        "top_mass": ((q.abs(), 0.5), {}),
        "row_sparse_attention": ((q, k, v, torch.rand(2, 4, 70, 90, generator=g).argsort(-1)[..., :20].int()), LENGTHS),
        "block_score_max": ((q, k, 16), LENGTHS),
        "gather_rows": ((q[:, 0, :64], torch.tensor([[2, 0], [3, -1]]), 16), {}),
        "scatter_rows_add": ((q[:, 0, :64], q[:, 1, :32], torch.tensor([[2, 0], [3, -1]]), 16), {}),
    }
    return calls[name]


@pytest.mark.parametrize("operation", operations(), ids=NAMES)
def test_the_list_is_what_exists(operation: looseleaf_kernels.Operation) -> None:
    assert operation.name in looseleaf_kernels.__all__ and hasattr(torch.ops.looseleaf, operation.name)
    assert available_implementations(operation.name) == tuple(operation.implementations)
    assert {"reference", "cpu"} <= set(operation.implementations)
    for name in operation.implementations:
        if name != "triton" or importlib.util.find_spec("triton"):
            assert callable(getattr(operation.module(name), operation.name))


def test_an_implementation_runs_on_its_device() -> None:
    for operation in operations():
        for device in ("cpu", "cuda", "mps"):
            for dtype in (torch.float32, torch.float64):
                chosen, why = implementation_for(operation.name, torch.device(device), dtype, 512)
                devices = operation.implementations[chosen]
                assert device in devices or (device == "mps" and "cuda" in devices), (operation.name, device, why)
    with pytest.raises(ValueError, match=r"op: expected block_importance, .* got 'attention'"):
        available_implementations("attention")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_signatures(name: str) -> None:
    beartype = pytest.importorskip("beartype").beartype
    jaxtyping = pytest.importorskip("jaxtyping")
    function = jaxtyping.jaxtyped(typechecker=beartype)(getattr(looseleaf_kernels, name))
    (first, *rest), named = arguments(name)
    function(first, *rest, **named)
    with pytest.raises(jaxtyping.TypeCheckError):
        function(first.long(), *rest, **named)
    if "key_lengths" in named:
        with pytest.raises(jaxtyping.TypeCheckError):
            function(first, *rest, **{**named, "key_lengths": torch.tensor([1, 2, 3])})


def test_shapes_of_what_prepares_an_operation() -> None:
    beartype = pytest.importorskip("beartype").beartype
    checked = pytest.importorskip("jaxtyping").jaxtyped(typechecker=beartype)
    (q, k, _, index), _ = arguments("block_sparse_attention")
    layout = checked(Layout.of)(q, k, 32, **LENGTHS)
    assert torch.equal(checked(BlockIndex.from_mask)(layout.causal, block_q=32, block_k=32, q_len=70, k_len=90,
                                                     causal=True).to_mask(), layout.causal)
    checked(looseleaf_kernels.column_index)(index.to_mask(), torch.ones(2, 4, 90, dtype=torch.bool), layout)
    for quantize in (looseleaf_kernels.quantize_blocks, looseleaf_kernels.quantize_values):
        checked(quantize)(k, 32, 8, LENGTHS["key_lengths"])
    checked(looseleaf_kernels.smooth_keys)(k, LENGTHS["key_lengths"])


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()  # the graphs of the other operations are counted
    function = getattr(looseleaf_kernels, name)
    (first, *rest), named = arguments(name)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        out = function(x, *rest, **named)
        return out if isinstance(out, tuple) else (out,)

    for one, two in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(first), call(first), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", [operation.name for operation in operations() if operation.differentiable])
def test_gradient_compiles_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    given, named = arguments(name)
    floats = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    rest, function = given[len(floats):], getattr(looseleaf_kernels, name)

    def attend(*tensors: Tensor) -> Tensor:
        out = function(*tensors, *rest, **named)
        return out[0] if isinstance(out, tuple) else out

    gradients = []
    for run in (torch.compile(attend, fullgraph=True, backend="aot_eager"), attend):
        tensors = [x.clone().requires_grad_() for x in floats]
        run(*tensors).square().sum().backward()
        gradients.append([x.grad for x in tensors])
    for one, two in zip(*gradients, strict=True):
        assert one.abs().sum() > 0 and torch.equal(one, two)
