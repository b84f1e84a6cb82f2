"""CLIP and its kin, image classifiers, what can be learned in front of them, and few-shot tasks of pictures.

Names are loaded when first used, so that importing the package costs milliseconds and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.lazy import lazy

__version__ = "0.1.0"

_HOME = {
    "DualEncoder": "encoder", "Tokens": "encoder", "spaced": "encoder",
    "PictureModel": "pictures", "Preprocess": "pictures", "as_image": "pictures", "picture_of": "pictures",
    "ImageClassifier": "classifier",
    "TextContext": "modules", "ConditionalContext": "modules", "VisionTokens": "modules", "CoupledTokens": "modules",
    "PixelFrame": "modules",
    "PromptSpec": "prompt", "PromptLearner": "prompt", "VectorPrompt": "prompt", "VisionPrompt": "prompt",
    "TemplatePrompt": "prompt", "PicturePredictor": "prompt", "PHOTO": "prompt",
    "Recipe": "tuning", "Batch": "tuning", "Tuned": "tuning", "tune": "tuning",
    "VisionOptimizer": "baselines", "LearnedPrompt": "baselines", "CoOp": "baselines", "CoCoOp": "baselines",
    "KgCoOp": "baselines", "MaPLe": "baselines", "ZeroShot": "baselines", "TemplateEnsemble": "baselines",
    "LinearProbe": "baselines", "LinearPrompt": "baselines", "IMAGENET_TEMPLATES": "baselines",
    "few_shot": "tasks", "few_shot_task": "tasks", "from_torchvision": "tasks", "read_split": "tasks",
    "from_arrays": "tasks",
    "BaseToNew": "tasks", "base_to_new": "tasks", "cross_domain": "tasks", "harmonic_mean": "tasks",
    "calibration_error": "tasks", "scores_by_class": "tasks", "LazyExamples": "tasks",
}

__all__ = ["__version__", *sorted(_HOME)]
__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from looseleaf_vision.baselines import (
        IMAGENET_TEMPLATES,
        CoCoOp,
        CoOp,
        KgCoOp,
        LearnedPrompt,
        LinearProbe,
        LinearPrompt,
        MaPLe,
        TemplateEnsemble,
        VisionOptimizer,
        ZeroShot,
    )
    from looseleaf_vision.classifier import ImageClassifier
    from looseleaf_vision.encoder import DualEncoder, Tokens, spaced
    from looseleaf_vision.modules import ConditionalContext, CoupledTokens, PixelFrame, TextContext, VisionTokens
    from looseleaf_vision.pictures import PictureModel, Preprocess, as_image, picture_of
    from looseleaf_vision.prompt import (
        PHOTO,
        PicturePredictor,
        PromptLearner,
        PromptSpec,
        TemplatePrompt,
        VectorPrompt,
        VisionPrompt,
    )
    from looseleaf_vision.tasks import (
        BaseToNew,
        LazyExamples,
        base_to_new,
        calibration_error,
        cross_domain,
        few_shot,
        few_shot_task,
        from_arrays,
        from_torchvision,
        harmonic_mean,
        read_split,
        scores_by_class,
    )
    from looseleaf_vision.tuning import Batch, Recipe, Tuned, tune
