"""anypattern: finds originals of pictures edited in a new way, with one example of that edit in the channels."""

from looseleaf_anypattern.edits import keyed
from looseleaf_anypattern.encoder import StackedEncoder, encode, stack
from looseleaf_anypattern.optimizer import (
    CopyDetector,
    ImageStacker,
    StackPrompt,
    copy_task,
    toy_copies,
    toy_encoder,
)
from looseleaf_anypattern.patterns import PATTERNS, Pattern, apply, pattern
from looseleaf_anypattern.retrieval import CopyIndex, CopyMetric, Match, micro_average_precision
from looseleaf_anypattern.training import train

__all__ = ["PATTERNS", "CopyDetector", "CopyIndex", "CopyMetric", "ImageStacker", "Match", "Pattern", "StackPrompt",
           "StackedEncoder", "apply", "copy_task", "encode", "keyed", "micro_average_precision", "pattern", "stack",
           "toy_copies", "toy_encoder", "train"]
