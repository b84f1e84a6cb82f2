"""LeaF: gradient-guided token pruning and causal attention distillation."""

from typing import TYPE_CHECKING, Any

from looseleaf_leaf.batch import response_level
from looseleaf_leaf.counterfactual import Counterfactuals, PairCollator, counterfactuals, runs, training_pairs
from looseleaf_leaf.encoding import encode
from looseleaf_leaf.gradients import input_gradient_norms
from looseleaf_leaf.loss import response_kl
from looseleaf_leaf.pruner import LeaF, greedy_match
from looseleaf_leaf.selection import ConfoundingTokens
from looseleaf_leaf.view import show

if TYPE_CHECKING:
    from looseleaf_leaf.trainer import LeaFTrainer

__version__ = "0.1.0"
__all__ = ["ConfoundingTokens", "Counterfactuals", "LeaF", "LeaFTrainer", "PairCollator", "counterfactuals", "encode",
           "greedy_match", "input_gradient_norms", "response_kl", "response_level", "runs", "show", "training_pairs"]


def __getattr__(name: str) -> Any:
    if name == "LeaFTrainer":  # transformers is imported when it is first asked for
        from looseleaf_leaf.trainer import LeaFTrainer

        return LeaFTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
