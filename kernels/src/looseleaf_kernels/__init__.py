"""Shared attention kernels: one public function per operation, three implementations each."""

from looseleaf_kernels.importance import block_importance
from looseleaf_kernels.index import BlockIndex
from looseleaf_kernels.layout import Layout
from looseleaf_kernels.ops import (
    available_implementations,
    block_mean,
    block_sparse_attention,
    implementation,
    implementation_for,
    last_query_scores,
    top_mass,
)
from looseleaf_kernels.quantized import quantized_block_sparse_attention
from looseleaf_kernels.quantizers import quantize_blocks, quantize_values, smooth_keys
from looseleaf_kernels.vertical_slash import column_index, vertical_slash_attention

__all__ = ["BlockIndex", "Layout", "available_implementations", "block_importance", "block_mean",
           "block_sparse_attention", "column_index", "implementation", "implementation_for", "last_query_scores",
           "quantize_blocks", "quantize_values", "quantized_block_sparse_attention", "smooth_keys", "top_mass",
           "vertical_slash_attention"]
__version__ = "0.1.0"
