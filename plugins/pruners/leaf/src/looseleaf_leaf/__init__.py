"""LeaF: gradient-guided token pruning and causal attention distillation."""

from typing import TYPE_CHECKING, Any

from looseleaf_leaf.batch import encode, response_level
from looseleaf_leaf.pruner import Counterfactuals, LeaF, counterfactuals, greedy_match, runs, show
from looseleaf_leaf.sensitivity import confounding, input_gradient_norms

if TYPE_CHECKING:
    from looseleaf_leaf.trainer import LeaFTrainer, PairCollator, response_kl, training_pairs

__version__ = "0.3.0"
__all__ = ["Counterfactuals", "LeaF", "LeaFTrainer", "PairCollator", "confounding", "counterfactuals", "encode",
           "greedy_match", "input_gradient_norms", "response_kl", "response_level", "runs", "show", "training_pairs"]


def __getattr__(name: str) -> Any:
    if name in ("LeaFTrainer", "PairCollator", "response_kl", "training_pairs"):
        from looseleaf_leaf import trainer  # transformers is imported when one of these is first asked for

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
