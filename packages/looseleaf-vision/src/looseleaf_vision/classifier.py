"""Image classifiers as things one can prompt, measure and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.budget import costs
from looseleaf.unwrap import unwrapped
from looseleaf_vision.encoder import DualEncoder
from looseleaf_vision.pictures import PictureModel, Preprocess
from looseleaf_vision.prompt import PHOTO, PicturePredictor


class ImageClassifier(PictureModel):
    """Any network from pictures to logits: transformers, timm, torchvision, or one of your own.

    Args:
        model: a torch module; what it gives is logits (B, classes), or has them as ``logits``. Put it into evaluation
            mode yourself.
        preprocess: a :class:`Preprocess` or what makes one: an image processor of transformers, ``transforms()`` of
            torchvision's weights, a function of a PIL image. None: the ``pretrained_cfg`` of a timm model.
        size, mean, std: of the model's input, where nothing else knows them; see :class:`Preprocess`.
        classes: names of the outputs; None: those of the model's configuration, else their numbers when asked for.
    """

    def __init__(self, model: nn.Module, preprocess: Any = None, *, size: int | tuple[int, int] | None = None,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 classes: Sequence[Any] | None = None) -> None:
        inner = unwrapped(model)
        timm = inner if preprocess is None and (hasattr(inner, "pretrained_cfg") or hasattr(inner, "default_cfg")) \
            else None
        if not isinstance(preprocess, Preprocess):
            preprocess = Preprocess(preprocess if preprocess is not None else timm, size=size, mean=mean, std=std)
        super().__init__(model, preprocess)
        names = getattr(getattr(inner, "config", None), "id2label", None)
        self.classes = list(classes) if classes is not None else \
            [names[n] for n in sorted(names)] if names and hasattr(inner, "num_labels") else None

    @classmethod
    def of_encoder(cls, encoder: DualEncoder, classes: Sequence[Any], templates: Sequence[str] = PHOTO,
                   ) -> ImageClassifier:
        """A dual encoder as the zero-shot classifier of some names; their features are computed here, once."""
        with torch.no_grad():
            texts = encoder.ensemble(list(map(str, classes)), templates)
        return cls(_ZeroShot(encoder, texts), encoder.preprocess, classes=classes)

    @costs(calls=lambda self, pixels: len(pixels))
    def logits(self, pixels: Tensor) -> Tensor:
        """(B, classes), float32, of fractions (B, C, H, W)."""
        found: Any = self.model(self.preprocess.normalize(pixels).to(self.dtype))
        found = getattr(found, "logits", found)
        found = found[0] if isinstance(found, (tuple, list)) else found
        return found.float()  # type: ignore[no-any-return]

    @costs(calls=lambda self, pixels: len(pixels))
    def log_probs(self, pixels: Tensor) -> Tensor:
        """(B, classes) natural-log probabilities."""
        return F.log_softmax(self.logits(pixels), dim=-1)

    def predictor(self, classes: Sequence[Any] | None = None) -> PicturePredictor:
        """What predicts the model's own classes.

        Args:
            classes: their names; None: :attr:`classes`.

        Raises:
            ValueError: no names are known.
        """
        names = self.classes if classes is None else classes
        if names is None:
            raise ValueError(f"predictor: expected the names of the classes, which {self.name} does not have, got none")
        return PicturePredictor(self, names, self.logits)


class _ZeroShot(nn.Module):
    """Normalised pixels to the logits of some texts."""

    def __init__(self, encoder: DualEncoder, texts: Tensor) -> None:
        super().__init__()
        self.model = encoder.model
        self.register_buffer("texts", texts)
        self._encoder = (encoder,)

    def forward(self, pixel_values: Tensor) -> Tensor:
        model: Any = self.model
        found = model.get_image_features(pixel_values=pixel_values)
        features = F.normalize((found if isinstance(found, Tensor) else found.pooler_output).float(), dim=-1)
        return self._encoder[0].logits(features, self.texts)  # type: ignore[arg-type]


__all__ = ["ImageClassifier"]
