"""Attention over blocks and single columns in Triton. Imported only where Triton is installed and wanted."""

from __future__ import annotations

from torch import Tensor

from looseleaf_kernels import launch
from looseleaf_kernels.block_sparse.triton import block_sparse_attention, jobs
from looseleaf_kernels.index import Csr
from looseleaf_kernels.problem import Problem


def vertical_slash_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Csr, columns: Csr,
                             problem: Problem) -> tuple[Tensor, Tensor]:
    """As the reference; products in the dtype of the inputs, sums in fp32, P cast to V's dtype before P V."""
    return block_sparse_attention(query, key, value, blocks, problem, columns)


def compile_jobs() -> list[launch.Job]:
    """What is compiled ahead of time."""
    return jobs(" causal with columns", CAUSAL=True, SINGLES=True)
