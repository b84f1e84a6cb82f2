"""Sparsifiner: sparse attention of vision transformers with learned masks for each picture (CVPR 2023, 2303.13755)."""

from looseleaf_sparsifiner.backend import RowKeys, Sparsifiner
from looseleaf_sparsifiner.baselines import LowRank, Nearest, RandomKeys, TrueTop
from looseleaf_sparsifiner.pictures import draw_keys, show
from looseleaf_sparsifiner.predictor import Predictor, budget, index_of, macs, top_keys
from looseleaf_sparsifiner.training import Outputs, distill, distillation_loss

__all__ = ["LowRank", "Nearest", "Outputs", "Predictor", "RandomKeys", "RowKeys", "Sparsifiner", "TrueTop", "budget",
           "distill", "distillation_loss", "draw_keys", "index_of", "macs", "show", "top_keys"]
