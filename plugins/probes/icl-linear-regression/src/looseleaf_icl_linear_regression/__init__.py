"""In-context linear regression by multi-head softmax attention (arXiv 2503.12734)."""

from looseleaf_icl_linear_regression.attention import EffectiveHeads, probe_attention, probe_layers
from looseleaf_icl_linear_regression.probe import ICLRegressionProbe
from looseleaf_icl_linear_regression.regression import Regression, debiased_gd, optimal_step, ridge, vanilla_gd
from looseleaf_icl_linear_regression.signature import Signature, head_signature, invariants
from looseleaf_icl_linear_regression.training import Trained, opposite_heads, predict, train

__all__ = ["EffectiveHeads", "ICLRegressionProbe", "Regression", "Signature", "Trained", "debiased_gd",
           "head_signature", "invariants", "opposite_heads", "optimal_step", "predict", "probe_attention",
           "probe_layers", "ridge", "train", "vanilla_gd"]
