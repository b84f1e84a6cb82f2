"""MInference: dynamic sparse attention for long prompts, one pattern per head (NeurIPS 2024, arXiv 2407.02490)."""

from looseleaf_minference.backend import MInference
from looseleaf_minference.config import CANDIDATES, VERTICAL_SLASH, Pattern
from looseleaf_minference.key_value import key_value_ids
from looseleaf_minference.patterns import Keys, a_shape_blocks, block_sparse_blocks, vertical_slash

__all__ = ["CANDIDATES", "VERTICAL_SLASH", "Keys", "MInference", "Pattern", "a_shape_blocks", "block_sparse_blocks",
           "key_value_ids", "vertical_slash"]
