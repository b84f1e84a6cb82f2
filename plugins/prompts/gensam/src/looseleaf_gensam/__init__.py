"""gensam: points and boxes for SAM, made for each picture from one task text."""

from looseleaf_gensam.heat import heat_map, points_of, spatial_features
from looseleaf_gensam.measures import MEASURES, e_measure, iou, mean_absolute_error, s_measure, weighted_f_measure
from looseleaf_gensam.namer import ChatNamer, FixedWords, Namer, Words, clean, words_of
from looseleaf_gensam.optimizer import (
    GenericPrompt,
    GenSAM,
    GenSAMPredictor,
    Pass,
    PointPrompt,
    Segmentation,
    mask_iou,
    mask_task,
    toy_mask_task,
    toy_models,
)
from looseleaf_gensam.segmenter import PromptableModels, Segmenter

__all__ = ["MEASURES", "ChatNamer", "FixedWords", "GenSAM", "GenSAMPredictor", "GenericPrompt", "Namer", "Pass",
           "PointPrompt", "PromptableModels", "Segmentation", "Segmenter", "Words", "clean", "e_measure", "heat_map",
           "iou", "mask_iou", "mask_task", "mean_absolute_error", "points_of", "s_measure", "spatial_features",
           "toy_mask_task", "toy_models", "weighted_f_measure", "words_of"]
