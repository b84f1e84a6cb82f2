"""MInference: dynamic sparse attention for long prompts, one pattern per head (NeurIPS 2024, arXiv 2407.02490)."""

from looseleaf_minference.backend import MInference
from looseleaf_minference.patterns import Keys, Pattern, a_shape_blocks, block_sparse_blocks, vertical_slash
from looseleaf_minference.search import CANDIDATES, VERTICAL_SLASH, key_value_ids

__all__ = ["CANDIDATES", "VERTICAL_SLASH", "Keys", "MInference", "Pattern", "a_shape_blocks", "block_sparse_blocks",
           "key_value_ids", "vertical_slash"]
