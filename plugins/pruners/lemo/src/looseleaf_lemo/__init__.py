"""LeMo: fine-tuning on long texts with less of them in memory."""

from looseleaf_lemo.pruner import BlockScores, Calibration, LeMo
from looseleaf_lemo.training import Training

__version__ = "0.1.0"
__all__ = ["BlockScores", "Calibration", "LeMo", "Training"]
