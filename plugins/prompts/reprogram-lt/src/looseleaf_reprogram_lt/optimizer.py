"""Visual reprogramming with iterative label mapping, and the linear head that it is compared with."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.budget import Budget
from looseleaf.errors import UnsupportedModelError
from looseleaf.names import match
from looseleaf.paper import Paper
from looseleaf.plugin import In
from looseleaf.probes.hooks import uncompiled
from looseleaf.prompts.optimizer import PromptOptimizer
from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Task
from looseleaf.unwrap import unwrapped
from looseleaf_vision import (
    DualEncoder,
    ImageClassifier,
    PicturePredictor,
    PixelFrame,
    Recipe,
    few_shot,
    picture_of,
    tune,
)

PAPER = Paper(
    title="Reprogramming under constraints: Revisiting efficient and reliable transferability of lottery tickets",
    authors=("Diganta Misra", "Agam Goyal", "Bharat Runwal", "Pin-Yu Chen"), year=2023, arxiv="2308.14969",
    code="https://github.com/landskape-ai/Reprogram_LT",
    summary="Another job for my frozen image classifier, and what its sparse version loses there.")


def frequency_mapping(counts: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Which source class stands for each target class: greedily, one to one.

    The largest count of the whole matrix gives its source to its target (of equal ones the smallest source, then the
    smallest target); both are struck out, and so on. A target that is never predicted so gets the first free source.

    Args:
        counts: (sources, targets), how often pictures of a target are predicted as a source, integers >= 0.

    Returns:
        (targets,) int64, all different.

    Raises:
        ValueError: more targets than sources, or no matrix of counts.
    """
    matrix = torch.as_tensor(counts).cpu()
    if matrix.dim() != 2 or not matrix.numel() or matrix.is_floating_point() or int(matrix.min()) < 0:
        raise ValueError("counts: expected integers >= 0 of the shape (sources, targets), got "
                         f"{matrix.dtype} {tuple(matrix.shape)}")
    sources, targets = matrix.shape
    _enough(sources, targets)
    flat = matrix.flatten()
    order = flat.argsort(descending=True, stable=True)  # row by row: equal counts go by source, then target
    found: dict[int, int] = {}
    used: set[int] = set()
    for place in order[:int((flat > 0).sum())].tolist():
        source, target = divmod(place, targets)
        if target not in found and source not in used:
            found[target] = source
            used.add(source)
    free = iter(source for source in range(sources) if source not in used)
    return torch.tensor([found[t] if t in found else next(free) for t in range(targets)])


@torch.no_grad()
def label_counts(logits: Any, model: ImageClassifier, examples: Sequence[Example], classes: Sequence[Any],
                 size: int | None = None) -> Tensor:
    """How often pictures of each class are predicted as each output of the model: (sources, targets) int64.

    Args:
        logits: fractions (B, C, size, size) -> (B, sources), such as the model behind a border of pixels.
        model: reads the pictures.
        examples: with targets, such as ``task.train``.
        classes: the targets in their order.
        size: that pictures are squeezed to; None: the model's own way.

    Raises:
        ValueError: more classes than outputs.
    """
    at = {c: n for n, c in enumerate(classes)}
    counts = torch.zeros(0, len(classes), dtype=torch.int64)
    for first in range(0, len(examples), model.batch_size):
        part = examples[first:first + model.batch_size]
        found = logits(model.read(part, size))
        if not len(counts):
            _enough(found.shape[1], len(classes))
            counts = torch.zeros(found.shape[1], len(classes), dtype=torch.int64)
        targets = torch.tensor([at[e.target] for e in part])
        counts.index_put_((found.argmax(1).cpu(), targets), torch.ones(len(part), dtype=torch.int64), accumulate=True)
    return counts


def text_classes(encoder: DualEncoder, names: Sequence[str], templates: Sequence[str]) -> ImageClassifier:
    """A dual encoder as a classifier with one output for each pair of template and name, as the authors' code has it.

    Args:
        encoder: such as ``DualEncoder(clip, processor)``.
        names: of the classes.
        templates: texts with one ``{}``.
    """
    texts = [template.format(name) for template in templates for name in names]
    return ImageClassifier.of_encoder(encoder, texts, ("{}",))


class Program(nn.Module):
    """Learned pixels in front of a classifier, and which of its outputs are read.

    Args:
        frame: the pixels.
        targets: how many classes there are.

    Attributes:
        mapping: (targets,) int64: the output that stands for each class.
    """

    def __init__(self, frame: PixelFrame, targets: int) -> None:
        super().__init__()
        self.frame = frame
        self.register_buffer("mapping", torch.arange(targets))  # what no counts at all give
        self.mapping: Tensor

    def forward(self, model: ImageClassifier, pixels: Tensor) -> Tensor:
        """Logits (B, targets) of fractions (B, C, h, w)."""
        found = model.logits(self.frame(pixels))
        if found.shape[1] <= int(self.mapping.max()):
            raise UnsupportedModelError(f"expected a model with output {int(self.mapping.max())}, which stands for a "
                                        f"class, got {found.shape[1]} outputs: learned for another model")
        return found[:, self.mapping]


@dataclasses.dataclass
class ReprogramPrompt(Prompt):
    """Pixels around, or on, every picture, and which of the model's outputs stands for each class.

    Attributes:
        classes: what it tells apart.
        program: (C, height, width) float32, before the sigmoid where there is a border; zero where nothing is learned.
        mapping: (classes,) int64.
        inner: height and width of the picture inside the border; None: the pixels are added to the whole picture.
        pad: width of the frame that is added, where ``inner`` is None.
    """

    classes: Sequence[Any]
    program: Tensor
    mapping: Tensor
    inner: int | None = None
    pad: int = 30

    def module(self, model: ImageClassifier) -> Program:
        """The pixels and the mapping as a module, to be used or trained further.

        Raises:
            UnsupportedModelError: ``model`` is no image classifier, or one of pictures with other channels.
        """
        if not isinstance(model, ImageClassifier):
            raise UnsupportedModelError(f"{type(self).__name__}: expected an ImageClassifier, got "
                                        f"{type(model).__name__}: wrap it, as in ImageClassifier(model, processor)")
        channels, height, width = self.program.shape
        if channels != len(model.preprocess.mean):
            raise UnsupportedModelError(f"{type(self).__name__}: expected a model of pictures with {channels} "
                                        f"channels, got one of {len(model.preprocess.mean)}")
        module = Program(PixelFrame((height, width), inner=self.inner, pad=self.pad, channels=channels),
                         len(self.classes))
        with torch.no_grad():
            module.frame.delta.copy_(self.program)
            module.mapping.copy_(self.mapping)
        return module.to(model.device)

    def size(self, model: ImageClassifier) -> int | None:
        """What pictures are squeezed to; None: they are read in the model's own way."""
        own = tuple(self.program.shape[-2:]) == tuple(model.preprocess.size)
        return self.inner if self.inner is not None else None if own else int(self.program.shape[-1])

    @torch.no_grad()
    def canvas(self, model: ImageClassifier, examples: Sequence[Example]) -> Tensor:
        """What the network sees before normalisation: (B, C, height, width) in [0, 1], on the CPU."""
        module = self.module(model)
        return module.frame(model.read(examples, self.size(model))).clamp(0, 1).cpu()

    def on(self, model: ImageClassifier) -> PicturePredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is an :class:`looseleaf_vision.ImageClassifier`."""
        module = self.module(model)
        return PicturePredictor(model, self.classes, lambda pixels: module(model, pixels), self.size(model))


@dataclasses.dataclass
class ClassifierOptimizer(PromptOptimizer):
    """Fits something to a frozen classifier by the recipe of the authors; subclasses say what.

    Args:
        epochs: passes over the training pictures (authors' code).
        lr: learning rate of Adam (authors' code).
        milestones: fractions of the epochs after each of which the rate is divided by 10 (authors' code).
        batch_size: pictures in a step (authors' code); a smaller rest is left out where there is a whole batch.
        shots: training pictures of each class, drawn by the seed; a smaller class gives all. None: all.
    """

    accepts: ClassVar[type] = ImageClassifier
    paper = PAPER
    epochs: Annotated[int, In(">= 1")] = 100
    lr: Annotated[float, In("> 0")] = 0.01
    milestones: Annotated[tuple[float, ...], In("(0, 1)")] = (0.5, 0.72)
    batch_size: Annotated[int, In(">= 1")] = 128
    shots: Annotated[int | None, In(">= 1")] = None

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        from looseleaf_vision.testing import toy_classifier, toy_pictures

        return {"task": toy_pictures, "model": toy_classifier, "make": lambda: cls(epochs=6, batch_size=8)}

    @property
    def recipe(self) -> Recipe:
        """How it is trained."""
        return Recipe(self.epochs, self.batch_size, self.lr, "adam", weight_decay=0.0, schedule="milestones",
                      milestones=tuple(self.milestones), warmup=0, crop=None)

    @abstractmethod
    def fit(self, task: Task, model: ImageClassifier, start: Any, seed: int, **options: Any) -> Prompt:
        """What :meth:`optimize` gives, of a sound task that has the shots alone."""

    def optimize(self, task: Task, model: ImageClassifier, *, budget: Budget | None = None, start: Any = None,
                 seed: int = 0, state_dir: str | Path | None = None, progress: bool | None = None) -> Any:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``start`` is what this method gave before.

        Raises:
            ValueError: a class without a training picture, more classes than the model has outputs, a picture that
                does not fit, or a ``start`` for another task or model.
        """
        self.check_model(model)
        task.validate()
        if task.classes is None:
            raise ValueError(f"task {task.name!r}: expected a task with classes, got one without")
        identity = self.identity(task, model, start, seed)
        train = list(task.train)
        if self.shots is not None:
            train = [train[n] for n in few_shot([e.target for e in train], self.shots, seed)[0]]
        counts = Counter(e.target for e in train)
        missing = [c for c in task.classes if not counts[c]]
        if missing:
            raise ValueError(f"task {task.name!r}: expected a training picture of every class, got none of "
                             f"{', '.join(map(repr, missing[:5]))}: leave it out of task.classes, or add pictures")
        if start is not None and list(getattr(start, "classes", ())) != list(task.classes):
            raise ValueError(f"start: expected a prompt for the classes {list(task.classes)[:5]}, got a "
                             f"{type(start).__name__} for {list(getattr(start, 'classes', ()))[:5]}")
        return self.fit(dataclasses.replace(task, train=train), model, start, seed, budget=budget, state_dir=state_dir,
                        identity=identity, progress=progress, label=type(self).__name__)


@dataclasses.dataclass
class VisualReprogram(ClassifierOptimizer):
    """A border of learned pixels and a one-to-one map of labels: another job for a frozen classifier (ILM-VP).

    Args:
        out_size: height and width of the canvas; None: the model's input.
        in_size: height and width of the picture inside the border; None: the longest side of the training pictures, at
            most two below the canvas. The authors' code has 32 for small pictures, 128 for others, of 224.
        mapping: ilm: by frequency, again before each epoch; flm: by frequency, once, through the untrained pixels as in
            the authors' code; random: drawn by the seed.
        mapping_interval: epochs between two mappings of ilm.
        prompt: border: pixels around the shrunken picture, sigmoid of what is learned; add: pixels added to the outer
            frame of the whole picture, which the authors' code has for CLIP.
        pad: width of the frame that is added, in pixels (authors' code, for CLIP).
        optimizer: adam with milestones; sgd: momentum 0.9 and a cosine per step, which the authors' code has for CLIP
            with lr=40 and epochs=10.
        epochs: passes over the training pictures (authors' code).
        lr: first learning rate of the optimiser (authors' code).
        milestones: fractions of the epochs after each of which the rate is divided by 10, with adam (authors' code).
        batch_size: pictures in a step (authors' code); a smaller rest is left out where there is a whole batch.
        shots: training pictures of each class, drawn by the seed; a smaller class gives all. None: all.
    """

    out_size: Annotated[int | None, In(">= 3")] = None
    in_size: Annotated[int | None, In(">= 1")] = None
    mapping: Literal["ilm", "flm", "random"] = "ilm"
    mapping_interval: Annotated[int, In(">= 1")] = 1
    prompt: Literal["border", "add"] = "border"
    pad: Annotated[int, In(">= 1")] = 30
    optimizer: Literal["adam", "sgd"] = "adam"

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("in_size", self.in_size is None or self.prompt == "border",
                   "None where prompt='add', which keeps the picture whole")

    @property
    def recipe(self) -> Recipe:
        """How it is trained."""
        if self.optimizer == "adam":
            return super().recipe
        return dataclasses.replace(super().recipe, optimizer="sgd", schedule="steps")

    def untrained(self, task: Task, model: ImageClassifier) -> ReprogramPrompt:
        """The pixels before training, with outputs 0, 1, ... in the order of the classes: a grey border, or nothing.

        Raises:
            ValueError: a picture that is not smaller than the canvas, or a frame that does not fit.
        """
        height, width = (self.out_size,) * 2 if self.out_size else model.preprocess.size
        inner = None
        if self.prompt == "border":
            most = min(height, width) - 2
            inner = self.in_size or min(most, max(_longest(picture_of(e)) for e in task.train))
            if inner > most:
                raise ValueError(f"in_size: expected at most {most}, two below the canvas of {height} x {width}, got "
                                 f"{inner}: shrink the picture, or set out_size where the model takes larger ones")
        classes = list(task.classes or ())
        frame = PixelFrame((height, width), inner=inner, pad=self.pad, channels=len(model.preprocess.mean))
        return ReprogramPrompt(classes, frame.delta.detach().clone(), torch.arange(len(classes)), inner, self.pad)

    def fit(self, task: Task, model: ImageClassifier, start: ReprogramPrompt | None, seed: int, **options: Any,
            ) -> ReprogramPrompt:
        """See :meth:`ClassifierOptimizer.fit`."""
        first = self.untrained(task, model)
        if start is not None:
            kinds = [(tuple(p.program.shape), p.inner, p.inner or p.pad) for p in (start, first)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"start: expected pixels of the shape, inner size and pad {kinds[1]}, got {kinds[0]}")
            first = start
        program, size = first.module(model), first.size(model)
        changes: list[int] = []

        def on_epoch(epoch: int, metered: ImageClassifier) -> None:
            again = epoch % self.mapping_interval == 0 if self.mapping == "ilm" else epoch == 0
            if not again or (self.mapping == "random" and start is not None):
                return

            def logits(pixels: Tensor) -> Tensor:
                return metered.logits(program.frame(pixels))

            if self.mapping == "random":
                with torch.no_grad():
                    outputs = logits(metered.read(task.train[:1], size)).shape[1]
                _enough(outputs, len(first.classes))
                draw = torch.Generator().manual_seed(seed)
                new = torch.randperm(outputs, generator=draw)[:len(first.classes)]
            else:
                new = frequency_mapping(label_counts(logits, metered, task.train, first.classes, size))
            changes.append(int((new != program.mapping.cpu()).sum()))
            program.mapping.copy_(new)

        tuned = tune(program, lambda batch, metered: F.cross_entropy(
            program(metered, batch.pixels if size is None else batch.read(size)), batch.targets), task, model,
            self.recipe, on_epoch=on_epoch, seed=seed, **options)
        names = model.classes
        mapping = program.mapping.cpu().clone()
        info = tuned.info(learned=program.frame.trained, pictures=len(task.train),
                          sources=[str(names[n]) if names is not None and n < len(names) else str(n)
                                   for n in mapping.tolist()])
        delta = program.frame.delta.detach() * program.frame.mask
        return dataclasses.replace(first, program=delta.cpu().clone(), mapping=mapping, info=info)


@dataclasses.dataclass
class HeadPrompt(Prompt):
    """A linear layer in the place of a classifier's last one.

    Attributes:
        classes: what it tells apart.
        weight: (classes, width) float32.
        bias: (classes,) float32.
        head: name of the module that it takes the place of.
    """

    classes: Sequence[Any]
    weight: Tensor
    bias: Tensor
    head: str

    def on(self, model: ImageClassifier) -> PicturePredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is an :class:`looseleaf_vision.ImageClassifier`."""
        if not isinstance(model, ImageClassifier):
            raise UnsupportedModelError(f"{type(self).__name__}: expected an ImageClassifier, got "
                                        f"{type(model).__name__}: wrap it, as in ImageClassifier(model, processor)")
        weight, bias = self.weight.to(model.device), self.bias.to(model.device)
        return PicturePredictor(model, self.classes, lambda pixels: F.linear(head_input(model, self.head, pixels),
                                                                            weight, bias), _whole(model))


@dataclasses.dataclass
class LinearHead(ClassifierOptimizer):
    """The linear probe: a new last layer on the frozen network, trained as the authors train it.

    Whole pictures are squeezed to the model's input; their features are computed once, since nothing before the last
    layer learns.

    Args:
        head: name of the last layer; None: the last linear layer.
        epochs: passes over the training pictures (authors' code).
        lr: first learning rate of Adam (authors' code).
        milestones: fractions of the epochs after each of which the rate is divided by 10 (authors' code).
        batch_size: pictures in a step (authors' code); a smaller rest is left out where there is a whole batch.
        shots: training pictures of each class, drawn by the seed; a smaller class gives all. None: all.
    """

    head: str | None = None

    def fit(self, task: Task, model: ImageClassifier, start: HeadPrompt | None, seed: int, **options: Any,
            ) -> HeadPrompt:
        """See :meth:`ClassifierOptimizer.fit`."""
        head = last_layer(model, self.head)
        classes = list(task.classes or ())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.Linear(_linear(model, head).in_features, len(classes))
        if start is not None:
            if start.weight.shape != layer.weight.shape:
                raise ValueError(f"start: expected weights of the shape {tuple(layer.weight.shape)}, got "
                                 f"{tuple(start.weight.shape)}: it was learned for another model")
            layer.load_state_dict({"weight": start.weight, "bias": start.bias})
        layer = layer.to(model.device)

        def setup(metered: ImageClassifier) -> dict[str, Tensor]:
            rows = (task.train[at:at + metered.batch_size] for at in range(0, len(task.train), metered.batch_size))
            return {"features": torch.cat([head_input(metered, head, metered.read(part, _whole(metered)))
                                           for part in rows])}

        tuned = tune(layer, lambda batch, _: F.cross_entropy(
            layer(batch.kept["features"][batch.index.to(model.device)]), batch.targets), task, model, self.recipe,
            setup=setup, seed=seed, **options)
        weight, bias = layer.weight.detach().cpu().clone(), layer.bias.detach().cpu().clone()
        return HeadPrompt(classes, weight, bias, head, info=tuned.info(
            learned=weight.numel() + bias.numel(), pictures=len(task.train)))


def last_layer(model: ImageClassifier, name: str | None = None) -> str:
    """The name of a classifier's last linear layer, or of the one that is asked for.

    Raises:
        ValueError: there is none.
    """
    linear = [n for n, m in unwrapped(model.model).named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"head: expected a model that ends in a linear layer, got {model.name} without any")
    if name is None:
        return linear[-1]
    found = match(linear, name, what="linear layer")
    if len(found) != 1:
        raise ValueError(f"head: expected the name of one linear layer, got {name!r}, which matches {len(found)}")
    return found[0]


def head_input(model: ImageClassifier, head: str, pixels: Tensor) -> Tensor:
    """(B, width) float32: what the layer called ``head`` is given for fractions (B, C, H, W).

    Raises:
        ValueError: the layer does not make the model's logits.
    """
    seen: list[tuple[Tensor, tuple[int, ...]]] = []
    with uncompiled(model.model), _watching(_linear(model, head), seen):
        logits = model.logits(pixels)
    if len(seen) != 1 or seen[0][1] != tuple(logits.shape):
        raise ValueError(f"head: expected the layer whose output (B, {logits.shape[1]}) are the logits, got {head!r} "
                         f"with {[shape for _, shape in seen] or 'no call'}: give its name, as in head='fc'")
    return seen[0][0].float()


@contextlib.contextmanager
def _watching(layer: nn.Module, seen: list[tuple[Tensor, tuple[int, ...]]]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], tuple(output.shape))))
    try:
        yield
    finally:
        handle.remove()


def _linear(model: ImageClassifier, head: str) -> nn.Linear:
    layer = unwrapped(model.model).get_submodule(head)
    assert isinstance(layer, nn.Linear)
    return layer


def _whole(model: ImageClassifier) -> int | None:
    """The size that whole pictures are squeezed to; None where the model's input is no square."""
    height, width = model.preprocess.size
    return height if height == width else None


def _longest(picture: Any) -> int:
    """The longer side of a picture in pixels."""
    if hasattr(picture, "convert"):
        return int(max(picture.size))
    sides = tuple(picture.shape)
    return int(max(sides[-2:] if isinstance(picture, Tensor) and picture.is_floating_point() else sides[:2]))


def _enough(sources: int, targets: int) -> None:
    if sources < targets:
        raise ValueError(f"expected at least as many outputs of the model as there are classes, one for each, got "
                         f"{sources} for {targets}: take fewer classes, a model with more, or a linear head")


__all__ = ["ClassifierOptimizer", "HeadPrompt", "LinearHead", "Program", "ReprogramPrompt", "VisualReprogram",
           "frequency_mapping", "head_input", "label_counts", "last_layer", "text_classes"]
