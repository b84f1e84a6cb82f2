"""Language models, local, behind an endpoint or masked, and prompts made of text.

Names are loaded when first used, so that importing the package costs milliseconds and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.lazy import lazy

__version__ = "0.4.0"

_HOME = {
    "LanguageModel": "model", "LocalModel": "local", "EndpointModel": "endpoint", "MaskedModel": "masked",
    "TextTask": "task", "Template": "template", "Verbalizer": "verbalizer", "TextPrompt": "prompts",
    "ChatPrompt": "prompts", "ClozePrompt": "prompts", "RetrievedPrompt": "prompts", "TextOptimizer": "prompts",
    "EnsemblePrompt": "ensemble", "CalibratedPrompt": "calibration", "calibrate": "calibration",
    "ChatEndpoint": "chat", "JSONEndpoint": "chat", "ChatModel": "conversations", "LocalChat": "local_chat",
    "SoftPrompt": "soft", "LogitLens": "lens", "decoder_layers": "layers", "scale_layers": "layers",
}

__all__ = ["__version__", *sorted(_HOME)]
__getattr__ = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from looseleaf_text.calibration import CalibratedPrompt, calibrate
    from looseleaf_text.chat import ChatEndpoint, JSONEndpoint
    from looseleaf_text.conversations import ChatModel
    from looseleaf_text.endpoint import EndpointModel
    from looseleaf_text.ensemble import EnsemblePrompt
    from looseleaf_text.layers import decoder_layers, scale_layers
    from looseleaf_text.lens import LogitLens
    from looseleaf_text.local import LocalModel
    from looseleaf_text.local_chat import LocalChat
    from looseleaf_text.masked import MaskedModel
    from looseleaf_text.model import LanguageModel
    from looseleaf_text.prompts import ChatPrompt, ClozePrompt, RetrievedPrompt, TextOptimizer, TextPrompt
    from looseleaf_text.soft import SoftPrompt
    from looseleaf_text.task import TextTask
    from looseleaf_text.template import Template
    from looseleaf_text.verbalizer import Verbalizer
