"""What masks are learned from: labelled examples, and what computes a network's logits of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import Prompt, Task, unwrapped
from looseleaf.errors import did_you_mean
from looseleaf.fingerprint import content_fingerprint
from looseleaf.modes import evaluating
from looseleaf_vision import DualEncoder, ImageClassifier, PictureModel, TemplatePrompt

CROP = (0.5, 1.0)
"""Smallest and largest fraction of the area of random crops [official code]."""
Inputs = Any
"""What a network reads: a tensor, or tensors by name."""


@dataclasses.dataclass
class LabelledData:
    """Labelled examples, what reads them, and what computes logits of them.

    Attributes:
        labels: of the examples, each one of ``classes``.
        classes: two or more, in the order of the logits.
        read: (places (B,) of examples, generator of all randomness) -> what ``logits`` takes.
        logits: (model, what was read) -> (B, classes), with a gradient.
        random: the same example is read differently each time, such as a random crop. Without, the logits of the
            unmasked network are computed once.
        within: name pattern of the part of the network that may be masked, such as ``vision_model``; None: all of it.
        content: what the examples are, so that a run that goes on is not taken for another.

    Raises:
        ValueError: fewer than two classes, labels of one class only, or a label that is no class.
    """

    labels: Sequence[Any]
    classes: Sequence[Any]
    read: Callable[[Tensor, torch.Generator], Inputs]
    logits: Callable[[nn.Module, Inputs], Tensor]
    random: bool = False
    within: str | None = None
    content: Any = None

    def __post_init__(self) -> None:
        self.labels, self.classes = list(self.labels), list(self.classes)
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: expected two different classes or more, got {self.classes}")
        for n, label in enumerate(self.labels):
            if label not in self.classes:
                raise ValueError(f"labels[{n}]: expected one of the classes {self.classes}, got {label!r}."
                                 + did_you_mean(str(label), map(str, self.classes)))
        if len(set(self.labels)) < 2:
            raise ValueError("labels: expected examples of two classes or more, got "
                             + (f"only {self.labels[0]!r}" if self.labels else "no example"))

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """A short hash of the examples."""
        return content_fingerprint([self.labels, self.classes, self.random, self.within, self.content])

    @classmethod
    def of_tensors(cls, inputs: Inputs, labels: Sequence[int] | Tensor, classes: Sequence[Any] | None = None, *,
                   logits: Callable[[nn.Module, Inputs], Tensor] | None = None,
                   within: str | None = None) -> LabelledData:
        """Tensors that go to the network as they are.

        Args:
            inputs: (n, ...), or several by name, such as what a tokenizer gives; moved to the network's device by
                batches.
            labels: (n,) numbers of the outputs, from 0.
            classes: names of the outputs; None: as many numbers as the labels need.
            logits: (model, batch) -> (B, classes); None: ``model(batch)`` or ``model(**batch)``, or its ``logits``.
            within: see :class:`LabelledData`.

        Raises:
            ValueError: not as many labels as rows, or labels that are no numbers of classes.
        """
        numbers = [int(label) for label in labels]
        names = list(classes) if classes is not None else list(range(max(numbers, default=0) + 1))
        outside = [n for n in numbers if not 0 <= n < len(names)]
        if outside:
            raise ValueError(f"labels: expected numbers of {len(names)} classes, 0 to {len(names) - 1}, got "
                             f"{outside[0]}")
        by_name = dict(inputs) if isinstance(inputs, Mapping) or hasattr(inputs, "keys") else None
        rows = by_name if by_name is not None else {"inputs": inputs}
        for name, tensor in rows.items():
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != len(numbers):
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: expected a tensor of {len(numbers)} rows, as there are labels, got {got}")

        def read(places: Tensor, generator: torch.Generator) -> Inputs:
            return {k: v[places] for k, v in by_name.items()} if by_name is not None else inputs[places]

        def run(model: nn.Module, batch: Inputs) -> Tensor:
            device = next(model.parameters()).device
            batch = {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)
            if logits is not None:
                return logits(model, batch)
            found: Any = model(**batch) if isinstance(batch, dict) else model(batch)
            found = getattr(found, "logits", found)
            return found[0] if isinstance(found, (tuple, list)) else found  # type: ignore[no-any-return]

        return cls([names[n] for n in numbers], names, read, run, within=within, content=rows)


def clip_task(encoder: DualEncoder, task: Task, *, template: str = "a photo of a {}.", prompt: Prompt | None = None,
              crop: tuple[float, float] | None = CROP) -> LabelledData:
    """Pictures of some classes for the image tower of CLIP and its kin; class features are computed once.

    Args:
        encoder: its ``model`` is what is masked.
        task: its training examples are read, pictures of named classes.
        template: text with one ``{}``, where the name goes in lower case; the authors have one for each data set.
        prompt: instead of the template, any prompt that predicts from pictures, such as a tuned one: the masks are
            then learned on top of it. It stays as it is.
        crop: fractions of the area of random crops, which are mirrored at random as well; None: whole pictures, whose
            unmasked logits are computed once (ours).

    Raises:
        ValueError: a task that cannot be learned from, or a prompt of other classes.
    """
    if not isinstance(encoder, DualEncoder):
        raise ValueError(f"encoder: expected a looseleaf_vision.DualEncoder, got {type(encoder).__name__}")
    task.validate()
    classes = list(task.classes or ())
    if prompt is None:
        named = TemplatePrompt([str(name).lower() for name in classes], (template,))
        predictor: Any = named.on(encoder)
    else:
        predictor = prompt.on(encoder)
        if not hasattr(predictor, "logits") or set(predictor.classes) != set(classes):
            raise ValueError(f"prompt: expected one that predicts the classes {classes} from pictures, got one of "
                             f"{predictor.classes}: prompt.for_classes(...) changes them")
        classes = list(predictor.classes)
    with torch.no_grad(), evaluating(encoder.model):
        predictor.logits(encoder.read(list(task.train)[:1]))  # class features are kept from here on, without gradient
    return _pictures(encoder, task, classes, predictor.logits, crop, "vision_model",
                     [template, prompt and vars(prompt)])


def classifier_task(classifier: ImageClassifier, task: Task, *,
                    crop: tuple[float, float] | None = CROP) -> LabelledData:
    """Pictures for a network that has a head for these classes: of transformers, timm, torchvision, or your own.

    Args:
        classifier: its ``model`` is what is masked, all but the head.
        task: its training examples are read; its classes are those of the classifier.
        crop: see :func:`clip_task`.

    Raises:
        ValueError: a task that cannot be learned from, or of other classes.
    """
    if not isinstance(classifier, ImageClassifier):
        raise ValueError(f"classifier: expected a looseleaf_vision.ImageClassifier, got {type(classifier).__name__}")
    task.validate()
    classes = list(task.classes or ()) if classifier.classes is None else list(classifier.classes)
    return _pictures(classifier, task, classes, classifier.logits, crop, None, None)


def _pictures(owner: PictureModel, task: Task, classes: Sequence[Any], logits: Callable[[Tensor], Tensor],
              crop: tuple[float, float] | None, within: str | None, content: Any) -> LabelledData:
    examples = list(task.train)

    def read(places: Tensor, generator: torch.Generator) -> Tensor:
        chosen = [examples[n] for n in places.tolist()]
        return owner.read(chosen) if crop is None else owner.crops(chosen, generator, crop)

    def run(model: nn.Module, pixels: Tensor) -> Tensor:
        if unwrapped(model) is not unwrapped(owner.model):
            raise ValueError(f"model: expected the model of the {type(owner).__name__} that the data were made for, "
                             f"got another {type(unwrapped(model)).__name__}: make the data with this one")
        return logits(pixels)

    return LabelledData([e.target for e in examples], classes, read, run, crop is not None, within,
                        [examples, crop, content])


__all__ = ["CROP", "LabelledData", "classifier_task", "clip_task"]
