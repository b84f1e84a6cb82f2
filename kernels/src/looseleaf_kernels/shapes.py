"""Shapes in the signatures of the public operations, which a type checker can hold calls to (jaxtyping)."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int, Int8, Int32
from torch import Tensor

Queries = Float[Tensor, "batch heads q_len head_dim"]
"""(B, Hq, Lq, D)"""
Keys = Float[Tensor, "batch kv_heads k_len head_dim"]
"""(B, Hkv, Lk, D), of keys or of values; Hkv divides Hq."""
Lengths = Int[Tensor, " batch"]
"""(B,) valid rows of each item."""
RowStatistics = Float[Tensor, "batch heads q_len"]
"""(B, Hq, Lq), one number for each query."""
KeyScores = Float[Tensor, "batch heads k_len"]
"""(B, Hq, Lk), one number for each key or distance."""
BlockScores = Float[Tensor, "batch heads q_blocks k_blocks"]
"""(B, Hq, Nq, Nk), one number for each pair of blocks."""
BlockMask = Bool[Tensor, "batch heads q_blocks k_blocks"]
"""(B, Hq, Nq, Nk), the pairs of blocks that take part."""
ColumnMask = Bool[Tensor, "batch heads k_len"]
"""(B, Hq, Lk), the single keys that take part."""
Vectors = Float[Tensor, "batch heads rows head_dim"]
"""(B, H, L, D)"""
BlockVectors = Float[Tensor, "batch heads blocks head_dim"]
"""(B, H, N, D)"""
RowPointers = Int32[Tensor, "batch heads pointers"]
"""(B, H, N + 1), where the entries of each row begin, and where those of the last end."""
Entries = Int32[Tensor, " entries"]
"""(nnz,)"""
VectorIntegers = Int8[Tensor, "batch heads rows head_dim"]
"""(B, H, L, D)"""
RowBlocks = Float[Tensor, "batch heads blocks"]
"""(B, H, N), one number for each block."""
Hidden = Float[Tensor, "batch rows width"]
"""(B, L, H)"""
Taken = Float[Tensor, "batch taken width"]
"""(B, K * block, H), rows of some blocks."""
Blocks = Int[Tensor, "batch kept"]
"""(B, K), numbers of blocks."""
PairScores = Float[Tensor, "batch q_blocks k_blocks"]
"""(B, Nq, Nk), one number for each pair of blocks, heads taken together."""
RowKeys = Int[Tensor, "batch heads q_len keys"]
"""(B, Hq, Lq, K), the keys of each query."""
AnyScores = Float[Tensor, "*rows n"]
"""(..., n)"""
AnyMask = Bool[Tensor, "*rows n"]
"""(..., n)"""
