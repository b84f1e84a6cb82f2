"""reprogram-lt: another job for a frozen image classifier, and what sparsity costs when it is given one."""

from looseleaf_reprogram_lt.optimizer import (
    HeadPrompt,
    LinearHead,
    ReprogramPrompt,
    VisualReprogram,
    frequency_mapping,
    label_counts,
    text_classes,
)
from looseleaf_reprogram_lt.probe import TransferCost, TransferData

__all__ = ["HeadPrompt", "LinearHead", "ReprogramPrompt", "TransferCost", "TransferData", "VisualReprogram",
           "frequency_mapping", "label_counts", "text_classes"]
