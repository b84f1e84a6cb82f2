"""Unified sparsity: what a model that reads and draws pictures can do without, removed or split into experts."""

from looseleaf_unified_sparsity.components import Components, default_phase
from looseleaf_unified_sparsity.experts import (
    Experts,
    deal,
    experts_of,
    freeze_experts,
    load_experts,
    routing,
    save_experts,
    to_experts,
)
from looseleaf_unified_sparsity.pruner import UnifiedSparsity, survey
from looseleaf_unified_sparsity.shrinking import count_parameters, shrink
from looseleaf_unified_sparsity.watching import Calibration

__version__ = "0.1.0"
__all__ = ["Calibration", "Components", "Experts", "UnifiedSparsity", "count_parameters", "deal", "default_phase",
           "experts_of", "freeze_experts", "load_experts", "routing", "save_experts", "shrink", "survey", "to_experts"]
