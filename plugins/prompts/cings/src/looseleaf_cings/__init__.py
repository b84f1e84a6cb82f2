"""CInGS: fine-tuning a language model to answer from the text it is given (arXiv 2506.15480)."""

from looseleaf_cings.decoding import ContextAwareLogits, context_aware
from looseleaf_cings.features import Collator, Rows, cings_features, packed
from looseleaf_cings.grounding import Fact, grounding_report
from looseleaf_cings.optimizer import CInGS, GroundedPrompt
from looseleaf_cings.trainer import CInGSTrainer, response_loss

__all__ = ["CInGS", "CInGSTrainer", "Collator", "ContextAwareLogits", "Fact", "GroundedPrompt", "Rows",
           "cings_features", "context_aware", "grounding_report", "packed", "response_loss"]
