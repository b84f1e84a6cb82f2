"""Shared attention kernels: one public function per operation, up to three implementations of each."""

from looseleaf_kernels.block_max.op import block_score_max
from looseleaf_kernels.block_rows.op import gather_rows, scatter_rows_add
from looseleaf_kernels.block_sparse.op import block_sparse_attention
from looseleaf_kernels.importance.op import block_importance
from looseleaf_kernels.index import BlockIndex
from looseleaf_kernels.last_queries.op import last_query_scores
from looseleaf_kernels.layout import Layout
from looseleaf_kernels.mass.op import top_mass
from looseleaf_kernels.mean.op import block_mean
from looseleaf_kernels.operations import (
    Operation,
    available_implementations,
    implementation,
    implementation_for,
    operations,
)
from looseleaf_kernels.quantized.op import quantized_block_sparse_attention
from looseleaf_kernels.quantized.quantizers import quantize_blocks, quantize_values, smooth_keys
from looseleaf_kernels.row_sparse.op import row_sparse_attention
from looseleaf_kernels.vertical_slash.op import column_index, vertical_slash_attention

__all__ = ["BlockIndex", "Layout", "Operation", "available_implementations", "block_importance", "block_mean",
           "block_score_max", "block_sparse_attention", "column_index", "gather_rows", "implementation",
           "implementation_for", "last_query_scores", "operations", "quantize_blocks", "quantize_values",
           "quantized_block_sparse_attention", "row_sparse_attention", "scatter_rows_add", "smooth_keys", "top_mass",
           "vertical_slash_attention"]
__version__ = "0.3.0"
