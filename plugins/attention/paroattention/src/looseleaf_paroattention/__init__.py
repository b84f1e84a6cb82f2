"""PAROAttention: reordered, sparse and quantised attention for image and video models (NeurIPS 2025, 2506.16054)."""

from looseleaf_paroattention.backend import PAROAttention
from looseleaf_paroattention.calibration import block_masks, block_statistics, scores, sparsity
from looseleaf_paroattention.grid import PERMUTATIONS, distinct, inverse, permute, token_orders
from looseleaf_paroattention.plan import LayerPlan, Plan

__all__ = ["PERMUTATIONS", "LayerPlan", "PAROAttention", "Plan", "block_masks", "block_statistics", "distinct",
           "inverse", "permute", "scores", "sparsity", "token_orders"]
