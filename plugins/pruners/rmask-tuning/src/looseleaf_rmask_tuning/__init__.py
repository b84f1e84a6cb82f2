"""Regularized mask tuning (R-AMT): adapt a frozen network by switching off some of its weights."""

from looseleaf_rmask_tuning.data import LabelledData, classifier_task, clip_task
from looseleaf_rmask_tuning.pruner import (
    RMaskTuning,
    choose_weights,
    keep_probability,
    regularized,
    show,
)

__version__ = "0.1.0"
__all__ = ["LabelledData", "RMaskTuning", "choose_weights", "classifier_task", "clip_task", "keep_probability",
           "regularized", "show"]
