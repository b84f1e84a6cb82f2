"""Shared attention kernels: one public function per operation, three implementations each."""

from looseleaf_kernels.index import BlockIndex
from looseleaf_kernels.ops import (
    available_implementations,
    block_importance,
    block_mean,
    block_sparse_attention,
    implementation,
    implementation_for,
    last_query_scores,
    top_mass,
)

__all__ = ["BlockIndex", "available_implementations", "block_importance", "block_mean", "block_sparse_attention",
           "implementation", "implementation_for", "last_query_scores", "top_mass"]
__version__ = "0.1.0"
