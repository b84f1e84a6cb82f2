"""Prompts for models of pictures: which vectors are learned, what computes with them, and what predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating
from looseleaf.plugin import In, check_fields
from looseleaf.prompts.prompt import Prompt, storable
from looseleaf.tasks import Example, Predictor
from looseleaf_vision.encoder import DualEncoder
from looseleaf_vision.modules import ConditionalContext, CoupledTokens, TextContext, VisionTokens
from looseleaf_vision.pictures import PictureModel

PHOTO = ("a photo of a {}.",)


@storable
@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """Which vectors a prompt for a dual encoder has, and where they go.

    Attributes:
        text: context in the texts: ``shared`` by all classes, one for each ``class``, ``conditional`` on the picture,
            or None: the hand-written :attr:`templates` stay.
        length, start, position, lead, ending, text_depth: see :class:`TextContext`.
        vision: vectors beside the patches: its ``own``, ``coupled`` to those of the text, or None.
        vision_length: how many, where they are its own.
        vision_depth: layers that have vectors of their own.
        templates: texts with ``{}``, averaged; read where :attr:`text` is None.
    """

    text: Literal["shared", "class", "conditional"] | None = "shared"
    length: Annotated[int, In(">= 1")] = 16
    start: str | None = None
    position: Literal["end", "middle", "front"] = "end"
    lead: str = ""
    ending: str = "."
    text_depth: Annotated[int, In(">= 1")] = 1
    vision: Literal["own", "coupled"] | None = None
    vision_length: Annotated[int, In(">= 1")] = 4
    vision_depth: Annotated[int, In(">= 1")] = 1
    templates: tuple[str, ...] = PHOTO

    def __post_init__(self) -> None:
        check_fields(self)
        if self.vision == "coupled" and (self.text is None or self.text == "class"
                                         or self.vision_depth != self.text_depth):
            raise ValueError("PromptSpec: expected a shared text context of the same depth for coupled vision tokens, "
                             f"got text={self.text!r}, depths {self.text_depth} and {self.vision_depth}")
        if self.text is None and not self.templates:
            raise ValueError("PromptSpec.templates: expected one or more where text is None, got none")

    def build(self, encoder: DualEncoder, classes: int, seed: int = 0) -> PromptLearner:
        """The module with these vectors at their start.

        Args:
            encoder: what they are for.
            classes: how many there are; read where each has a context of its own.
            seed: of the vectors.
        """
        return PromptLearner(self, encoder, classes, seed)


class PromptLearner(nn.Module):
    """The vectors of a :class:`PromptSpec` as a module that gives logits; train it with :func:`looseleaf_vision.tune`.

    Args:
        spec, encoder, classes, seed: see :meth:`PromptSpec.build`.
    """

    def __init__(self, spec: PromptSpec, encoder: DualEncoder, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.context: TextContext | None = None
        self.vision: VisionTokens | CoupledTokens | None = None
        if spec.text is not None:
            kind = ConditionalContext if spec.text == "conditional" else TextContext
            self.context = kind(encoder, length=spec.length, start=spec.start, position=spec.position,
                                lead=spec.lead, ending=spec.ending, depth=spec.text_depth, seed=seed,
                                classes=classes if spec.text == "class" else None)
        if spec.vision == "own":
            self.vision = VisionTokens(encoder, length=spec.vision_length, depth=spec.vision_depth, seed=seed + 1)
        elif spec.vision == "coupled":
            self.vision = CoupledTokens(encoder, depth=spec.vision_depth, seed=seed + 1)

    @property
    def changes_images(self) -> bool:
        """Whether features of pictures depend on the vectors, so that they cannot be computed once."""
        return self.vision is not None

    def image_features(self, model: DualEncoder, pixels: Tensor) -> Tensor:
        """(B, d) of fractions (B, 3, H, W)."""
        tokens = [] if self.vision is None else self.vision(self.context)  # type: ignore[arg-type]
        return model.images(pixels, tokens)

    def class_features(self, model: DualEncoder, names: Sequence[Any], features: Tensor | None = None) -> Tensor:
        """(C, d), or (B, C, d) for a context that is conditional on the features (B, d) of pictures."""
        if self.context is None:
            return model.ensemble(list(map(str, names)), self.spec.templates)
        if isinstance(self.context, ConditionalContext):
            if features is None:
                raise ValueError("class_features: expected the features of pictures, on which the context is "
                                 "conditional, got none")
            return model.texts(self.context(names, features)).view(len(features), len(names), -1)
        return model.texts(self.context(names))

    def forward(self, model: DualEncoder, names: Sequence[Any], *, pixels: Tensor | None = None,
                features: Tensor | None = None, texts: Tensor | None = None) -> Tensor:
        """Logits (B, C).

        Args:
            model: the dual encoder, metered or not.
            names: of the classes.
            pixels: fractions (B, 3, H, W); needed where :attr:`changes_images`.
            features: (B, d) of the pictures, where they are known.
            texts: what :meth:`class_features` gives, where it is known.
        """
        if features is None or self.changes_images:
            if pixels is None:
                raise ValueError("PromptLearner: expected pixels, got none: the features of pictures depend on its "
                                 "vectors, or were not given")
            features = self.image_features(model, pixels)
        return model.logits(features, self.class_features(model, names, features) if texts is None else texts)


@dataclasses.dataclass
class VectorPrompt(Prompt):
    """Vectors learned for a dual encoder, as the module that a spec builds holds them.

    Attributes:
        classes: what it tells apart, in the order of the scores.
        spec: which vectors there are; ``spec.build(encoder, classes)`` makes the module, whose ``spec`` it is.
        tensors: their values by name, as in the module.
    """

    classes: Sequence[Any]
    spec: Any
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, learner: Any, classes: Sequence[Any], **info: Any) -> Self:
        """The vectors of a learner as they are now."""
        tensors = {name: value.detach().cpu().clone() for name, value in learner.state_dict().items()}
        return cls(list(classes), learner.spec, tensors, info=info)

    def learner(self, model: DualEncoder) -> Any:
        """The module with these vectors, to be used or trained further.

        Raises:
            UnsupportedModelError: ``model`` is no dual encoder.
            ValueError: the vectors are for a model of other sizes.
        """
        if not isinstance(model, DualEncoder):
            raise UnsupportedModelError(f"{type(self).__name__}: expected a DualEncoder, got {type(model).__name__}")
        learner = self.spec.build(model, len(self.classes))
        expected = {name: tuple(value.shape) for name, value in learner.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in self.tensors.items()}
        if expected != given:
            raise ValueError(f"{type(self).__name__}: expected vectors of the shapes {expected} for {model.name}, got "
                             f"{given}: it was learned for another model")
        learner.load_state_dict(self.tensors)
        return learner

    def for_classes(self, classes: Sequence[Any]) -> Self:
        """The same vectors around other names."""
        return dataclasses.replace(self, classes=list(classes))


@dataclasses.dataclass
class VisionPrompt(VectorPrompt):
    """Vectors learned for a dual encoder: context of texts, tokens beside patches, or both.

    Attributes:
        classes: what it tells apart, in the order of the scores.
        spec: which vectors there are.
        tensors: their values by name, as a :class:`PromptLearner` has them.
    """

    spec: PromptSpec

    def for_classes(self, classes: Sequence[Any]) -> Self:
        """The same vectors around other names.

        Raises:
            ValueError: each class has vectors of its own.
        """
        if self.spec.text == "class" and len(classes) != len(self.classes):
            raise ValueError("for_classes: expected as many classes as the context was learned for, got "
                             f"{len(classes)} for {len(self.classes)}: a context of each class has nothing for others")
        return super().for_classes(classes)

    def on(self, model: DualEncoder) -> PicturePredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is a :class:`DualEncoder`."""
        learner, kept = self.learner(model), dict[str, Tensor]()

        def logits(pixels: Tensor) -> Tensor:
            if self.spec.text == "conditional":
                return learner(model, self.classes, pixels=pixels)
            if not kept:
                kept["texts"] = learner.class_features(model, self.classes)
            return learner(model, self.classes, pixels=pixels, texts=kept["texts"])

        return PicturePredictor(model, self.classes, logits)


@dataclasses.dataclass
class TemplatePrompt(Prompt):
    """Hand-written texts: zero-shot classification with one template, or the ensemble of several.

    Attributes:
        classes: what it tells apart.
        templates: texts with one ``{}`` each.
    """

    classes: Sequence[Any]
    templates: tuple[str, ...] = PHOTO

    def for_classes(self, classes: Sequence[Any]) -> TemplatePrompt:
        """The same templates with other names."""
        return dataclasses.replace(self, classes=list(classes))

    def on(self, model: DualEncoder) -> PicturePredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is a :class:`DualEncoder`."""
        return VisionPrompt(self.classes, PromptSpec(text=None, templates=tuple(self.templates))).on(model)


class PicturePredictor(Predictor):
    """Predicts the class of pictures from logits; scores are natural-log probabilities.

    Args:
        model: whose preprocessing reads the pictures; it is in evaluation mode meanwhile.
        classes: in the order of the logits.
        logits: fractions (B, C, H, W) -> (B, classes).
        size: of the pictures that ``logits`` gets; None: the model's.
    """

    def __init__(self, model: PictureModel, classes: Sequence[Any], logits: Callable[[Tensor], Tensor],
                 size: int | None = None) -> None:
        self.model, self.classes, self.logits, self.size = model, list(classes), logits, size

    @torch.no_grad()
    def scores(self, examples: Sequence[Example]) -> Tensor:
        """(examples, classes) log-probabilities, float32."""
        size = self.model.batch_size
        if not len(examples):
            return torch.zeros(0, len(self.classes or ()))
        with evaluating(self.model.model):
            rows = ([examples[i] for i in range(at, min(at + size, len(examples)))]
                    for at in range(0, len(examples), size))
            return torch.cat([F.log_softmax(self.logits(self.model.read(part, self.size)).float(), dim=-1).cpu()
                              for part in rows])


__all__ = ["PHOTO", "PicturePredictor", "PromptLearner", "PromptSpec", "TemplatePrompt", "VectorPrompt", "VisionPrompt"]
