"""SparseD: sparse attention for diffusion language models, one pattern per head and run (arXiv 2509.24014)."""

from looseleaf_sparsed.backend import SparseD
from looseleaf_sparsed.patterns import blocks_kept, prompt_blocks, select_blocks

__all__ = ["SparseD", "blocks_kept", "prompt_blocks", "select_blocks"]
