"""Essential sparsity: one-shot magnitude pruning and the search for its knee."""

from looseleaf_essential_sparsity.pruner import MagnitudePruner
from looseleaf_essential_sparsity.sweep import sparsity_curve, sparsity_sweep
from looseleaf_tickets.knee import Curve, Interval, Knee, essential_sparsity

__version__ = "0.3.0"
__all__ = ["Curve", "Interval", "Knee", "MagnitudePruner", "essential_sparsity", "sparsity_curve", "sparsity_sweep"]
