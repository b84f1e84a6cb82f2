"""MInference: dynamic sparse attention for long prompts, one pattern per head (NeurIPS 2024, arXiv 2407.02490)."""

from looseleaf_minference.backend import MInference
from looseleaf_minference.config import CANDIDATES, Pattern
from looseleaf_minference.patterns import Keys, Layout, a_shape_blocks, block_sparse_blocks, vertical_slash

__all__ = ["CANDIDATES", "Keys", "Layout", "MInference", "Pattern", "a_shape_blocks", "block_sparse_blocks",
           "vertical_slash"]
