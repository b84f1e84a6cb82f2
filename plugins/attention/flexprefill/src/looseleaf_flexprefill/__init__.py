"""FlexPrefill: context-aware sparse attention for long prompts (ICLR 2025, arXiv 2502.20766)."""

from looseleaf_flexprefill.backend import FlexPrefill
from looseleaf_flexprefill.patterns import query_aware_blocks, select_pattern, vertical_slash_blocks

__all__ = ["FlexPrefill", "query_aware_blocks", "select_pattern", "vertical_slash_blocks"]
