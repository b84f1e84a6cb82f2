"""What new prompts for dual encoders are compared with, as their authors tune it: CoOp, CoCoOp, KgCoOp, MaPLe and more.

Hyper-parameters are fields with the published values; those of CoOp hold wherever a paper says nothing else.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from looseleaf.budget import Budget
from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating, with_gradients
from looseleaf.paper import Paper
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import PromptOptimizer, Search
from looseleaf.prompts.prompt import Prompt
from looseleaf.tasks import Example, Task
from looseleaf_vision.encoder import DualEncoder
from looseleaf_vision.pictures import batches
from looseleaf_vision.prompt import (
    PHOTO,
    PicturePredictor,
    PromptLearner,
    PromptSpec,
    TemplatePrompt,
    VisionPrompt,
)
from looseleaf_vision.tuning import Batch, Recipe, tune

_TEMPLATES = (
    "a bad photo of a {}; a photo of many {}; a sculpture of a {}; a photo of the hard to see {}; a low resolution "
    "photo of the {}; a rendering of a {}; graffiti of a {}; a bad photo of the {}; a cropped photo of the {}; a "
    "tattoo of a {}; the embroidered {}; a photo of a hard to see {}; a bright photo of a {}; a photo of a clean {}; "
    "a photo of a dirty {}; a dark photo of the {}; a drawing of a {}; a photo of my {}; the plastic {}; a photo of "
    "the cool {}; a close-up photo of a {}; a black and white photo of the {}; a painting of the {}; a painting of a "
    "{}; a pixelated photo of the {}; a sculpture of the {}; a bright photo of the {}; a cropped photo of a {}; a "
    "plastic {}; a photo of the dirty {}; a jpeg corrupted photo of a {}; a blurry photo of the {}; a photo of the "
    "{}; a good photo of the {}; a rendering of the {}; a {} in a video game; a photo of one {}; a doodle of a {}; a "
    "close-up photo of the {}; a photo of a {}; the origami {}; the {} in a video game; a sketch of a {}; a doodle of "
    "the {}; a origami {}; a low resolution photo of a {}; the toy {}; a rendition of the {}; a photo of the clean {}; "
    "a photo of a large {}; a rendition of a {}; a photo of a nice {}; a photo of a weird {}; a blurry photo of a {}; "
    "a cartoon {}; art of a {}; a sketch of the {}; a embroidered {}; a pixelated photo of a {}; itap of the {}; a "
    "jpeg corrupted photo of the {}; a good photo of a {}; a plushie {}; a photo of the nice {}; a photo of the small "
    "{}; a photo of the weird {}; the cartoon {}; art of the {}; a drawing of the {}; a photo of the large {}; a black "
    "and white photo of a {}; the plushie {}; a dark photo of a {}; itap of a {}; graffiti of the {}; a toy {}; itap "
    "of my {}; a photo of a cool {}; a photo of a small {}; a tattoo of the {}")
IMAGENET_TEMPLATES = tuple(f"{text}." for text in _TEMPLATES.split("; "))
"""The 80 templates that CLIP's authors average for ImageNet."""
_CLIP = ("Learning Transferable Visual Models From Natural Language Supervision",
         ("Alec Radford", "Jong Wook Kim", "Chris Hallacy", "Aditya Ramesh", "Gabriel Goh", "Sandhini Agarwal",
          "Girish Sastry", "Amanda Askell", "Pamela Mishkin", "Jack Clark", "Gretchen Krueger", "Ilya Sutskever"), 2021)
_ZHOU = ("Kaiyang Zhou", "Jingkang Yang", "Chen Change Loy", "Ziwei Liu")


@dataclasses.dataclass
class VisionOptimizer(PromptOptimizer):
    """A prompt optimiser for dual encoders; the conformance kit gives it a toy model and a toy task of pictures."""

    accepts: ClassVar[type] = DualEncoder

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        from looseleaf_vision.testing import toy_clip, toy_pictures

        return {"task": toy_pictures, "model": toy_clip}


@dataclasses.dataclass
class LearnedPrompt(VisionOptimizer):
    """An optimiser that learns the vectors of a :class:`PromptSpec` by :func:`tune`: subclasses say which and how."""

    @abstractmethod
    def spec(self, model: DualEncoder) -> PromptSpec:
        """Which vectors are learned."""

    @abstractmethod
    def recipe(self, task: Task) -> Recipe:
        """How they are learned."""

    def setup(self, task: Task, model: DualEncoder) -> Mapping[str, Tensor]:
        """What :meth:`loss` reads as ``batch.kept``; here nothing."""
        return {}

    def loss(self, learner: PromptLearner, batch: Batch, task: Task, model: DualEncoder) -> Tensor:
        """What is minimised; here cross-entropy over the names of the classes."""
        seen: dict[str, Tensor] = {"pixels": batch.pixels} if learner.changes_images else {"features": batch.features}
        return F.cross_entropy(learner(model, task.classes or (), **seen), batch.targets)

    def optimize(self, task: Task, model: DualEncoder, *, budget: Budget | None = None,
                 start: VisionPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> VisionPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``start`` has vectors of the same kinds."""
        self.check_model(model)
        task.validate()
        if task.classes is None:
            raise ValueError(f"task {task.name!r}: expected a task with classes, got one without")
        spec = self.spec(model)
        if start is not None and dataclasses.replace(start.spec, start=spec.start, length=spec.length) != spec:
            raise ValueError(f"start: expected a prompt of the kind {spec}, got {start.spec}")
        learner = spec.build(model, len(task.classes), seed) if start is None else \
            start.for_classes(task.classes).learner(model)
        tuned = tune(learner, lambda batch, metered: self.loss(learner, batch, task, metered), task, model,
                     self.recipe(task), setup=lambda metered: self.setup(task, metered), budget=budget, seed=seed,
                     state_dir=state_dir, identity=self.identity(task, model, start, seed), progress=progress,
                     label=type(self).__name__)
        return VisionPrompt.of(learner, task.classes, **tuned.info())


def shots_of(task: Task) -> int:
    """Training examples of the largest class."""
    return max(Counter(e.target for e in task.train).values())


@dataclasses.dataclass
class CoOp(LearnedPrompt):
    """Context optimisation: learned vectors in the place of "a photo of a".

    Args:
        n_ctx: context vectors.
        ctx_init: text whose embeddings they begin with; None: N(0, 0.02).
        position: where the class name stands.
        class_specific: a context for each class; it has nothing for new ones.
        epochs: None: 200 for 8 shots and more, 100 for 2 and 4, 50 for one, as the authors do.
        lr: learning rate of SGD.
        batch_size: pictures in a step.
        crop: fractions of the area of random crops; None: whole pictures, which is much faster (ours).
    """

    paper = Paper("Learning to Prompt for Vision-Language Models", _ZHOU, 2022, "2109.01134", "IJCV",
                  "https://github.com/KaiyangZhou/CoOp", "few-shot classes for CLIP by learned context vectors")
    n_ctx: Annotated[int, In(">= 1")] = 16
    ctx_init: str | None = None
    position: Literal["end", "middle", "front"] = "end"
    class_specific: bool = False
    epochs: Annotated[int | None, In(">= 1")] = None
    lr: Annotated[float, In("> 0")] = 0.002
    batch_size: Annotated[int, In(">= 1")] = 32
    crop: tuple[float, float] | None = (0.08, 1.0)

    def spec(self, model: DualEncoder) -> PromptSpec:
        """See :class:`LearnedPrompt`."""
        return PromptSpec("class" if self.class_specific else "shared", self.n_ctx, self.ctx_init, self.position)

    def recipe(self, task: Task) -> Recipe:
        """See :class:`LearnedPrompt`."""
        return Recipe(self.epochs or Recipe.coop_epochs(shots_of(task)), self.batch_size, self.lr, crop=self.crop)

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(n_ctx=4, epochs=5, batch_size=8, lr=0.05)}


@dataclasses.dataclass
class CoCoOp(LearnedPrompt):
    """Conditional context optimisation: every picture shifts the context through a small network.

    Args:
        ctx_init: text whose embeddings the context begins with.
        epochs: passes over the training examples.
        lr: learning rate of SGD.
        batch_size: pictures in a step; every one of them has texts of its own.
        crop: fractions of the area of random crops; None: whole pictures (ours).
    """

    paper = Paper("Conditional Prompt Learning for Vision-Language Models", _ZHOU, 2022, "2203.05557", "CVPR 2022",
                  "https://github.com/KaiyangZhou/CoOp", "few-shot classes for CLIP that serve new classes too")
    ctx_init: str = "a photo of a"
    epochs: Annotated[int, In(">= 1")] = 10
    lr: Annotated[float, In("> 0")] = 0.002
    batch_size: Annotated[int, In(">= 1")] = 1
    crop: tuple[float, float] | None = (0.08, 1.0)

    def spec(self, model: DualEncoder) -> PromptSpec:
        """See :class:`LearnedPrompt`."""
        return PromptSpec("conditional", start=self.ctx_init)

    def recipe(self, task: Task) -> Recipe:
        """See :class:`LearnedPrompt`."""
        return Recipe(self.epochs, self.batch_size, self.lr, crop=self.crop)

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(epochs=5, lr=0.05, batch_size=4)}


@dataclasses.dataclass
class KgCoOp(LearnedPrompt):
    """Knowledge-guided context optimisation: the learned class features may not go far from the hand-written ones.

    Args:
        ctx_init: text whose embeddings the context begins with.
        weight: of one minus the mean cosine to the features of :attr:`templates`.
        templates: hand-written texts, averaged; the authors take the template of each data set.
        epochs: passes over the training examples.
        lr: learning rate of SGD.
        batch_size: pictures in a step.
        crop: fractions of the area of random crops; None: whole pictures (ours).
    """

    paper = Paper("Visual-Language Prompt Tuning with Knowledge-guided Context Optimization",
                  ("Hantao Yao", "Rui Zhang", "Changsheng Xu"), 2023, "2303.13283", "CVPR 2023",
                  "https://github.com/htyao89/KgCoOp", "few-shot classes for CLIP that forget less")
    ctx_init: str = "a photo of a"
    weight: Annotated[float, In(">= 0")] = 8.0
    templates: tuple[str, ...] = PHOTO
    epochs: Annotated[int, In(">= 1")] = 100
    lr: Annotated[float, In("> 0")] = 0.002
    batch_size: Annotated[int, In(">= 1")] = 32
    crop: tuple[float, float] | None = (0.08, 1.0)

    def spec(self, model: DualEncoder) -> PromptSpec:
        """See :class:`LearnedPrompt`."""
        return PromptSpec("shared", start=self.ctx_init)

    def recipe(self, task: Task) -> Recipe:
        """See :class:`LearnedPrompt`."""
        return Recipe(self.epochs, self.batch_size, self.lr, crop=self.crop)

    def setup(self, task: Task, model: DualEncoder) -> Mapping[str, Tensor]:
        """The hand-written class features (C, d)."""
        return {"hand": model.ensemble(list(map(str, task.classes or ())), self.templates)}

    def loss(self, learner: PromptLearner, batch: Batch, task: Task, model: DualEncoder) -> Tensor:
        """Cross-entropy + weight * (1 - mean cosine)."""
        names, features = task.classes or (), batch.features
        texts = learner.class_features(model, names)
        far = 1 - (texts * batch.kept["hand"]).sum(-1).mean()
        return F.cross_entropy(model.logits(features, texts), batch.targets) + self.weight * far

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(epochs=5, batch_size=8, lr=0.05)}


@dataclasses.dataclass
class MaPLe(LearnedPrompt):
    """Multi-modal prompt learning: deep vectors in the text tower, of which those beside the patches are functions.

    Args:
        n_ctx: vectors in each layer; they take the places of the first words of ``ctx_init``.
        ctx_init: text before the class name.
        depth: layers with vectors of their own; at most those of the smaller tower.
        epochs: passes over the training examples.
        lr: learning rate of SGD.
        batch_size: pictures in a step.
        crop: fractions of the area of random crops; None: whole pictures (ours).
    """

    paper = Paper("MaPLe: Multi-modal Prompt Learning",
                  ("Muhammad Uzair Khattak", "Hanoona Rasheed", "Muhammad Maaz", "Salman Khan", "Fahad Shahbaz Khan"),
                  2023, "2210.03117", "CVPR 2023", "https://github.com/muzairkhattak/multimodal-prompt-learning",
                  "few-shot classes for CLIP by vectors in both towers")
    n_ctx: Annotated[int, In(">= 1")] = 2
    ctx_init: str = "a photo of a"
    depth: Annotated[int, In(">= 1")] = 9
    epochs: Annotated[int, In(">= 1")] = 5
    lr: Annotated[float, In("> 0")] = 0.0035
    batch_size: Annotated[int, In(">= 1")] = 4
    crop: tuple[float, float] | None = (0.08, 1.0)

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        self.check("ctx_init", len(self.ctx_init.split()) >= self.n_ctx, f"text of {self.n_ctx} words or more")

    def spec(self, model: DualEncoder) -> PromptSpec:
        """See :class:`LearnedPrompt`."""
        words, depth = self.ctx_init.split(), min(self.depth, *model.depth)
        return PromptSpec("shared", start=" ".join(words[:self.n_ctx]), lead=" ".join(words[self.n_ctx:]),
                          text_depth=depth, vision="coupled", vision_depth=depth)

    def recipe(self, task: Task) -> Recipe:
        """See :class:`LearnedPrompt`."""
        return Recipe(self.epochs, self.batch_size, self.lr, crop=self.crop)

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(lr=0.02)}


@dataclasses.dataclass
class ZeroShot(VisionOptimizer):
    """Hand-written templates and nothing learned; ``fitness`` is the accuracy on the training pictures.

    Args:
        templates: texts with ``{}``; several are averaged.
    """

    paper = Paper(*_CLIP, "2103.00020", "ICML 2021", "https://github.com/openai/CLIP",
                  "classes for CLIP without any picture")
    templates: tuple[str, ...] = PHOTO

    def optimize(self, task: Task, model: DualEncoder, *, budget: Budget | None = None, start: Prompt | None = None,
                 seed: int = 0, state_dir: str | Path | None = None, progress: bool | None = None) -> TemplatePrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``start`` is not read."""
        task.validate()
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        prompt = TemplatePrompt(list(task.classes or ()), self.templates)
        with search:
            for _ in search.steps(1):
                search.state["fitness"] = task.evaluate(prompt.on(search.model), "train").score
        prompt.info = search.info(search.state.get("fitness", 0.0), max(1, search.done))
        return prompt


@dataclasses.dataclass
class TemplateEnsemble(ZeroShot):
    """The mean of the features of CLIP's 80 templates for ImageNet; see :class:`ZeroShot`.

    Args:
        templates: texts with ``{}``.
    """

    templates: tuple[str, ...] = IMAGENET_TEMPLATES

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(IMAGENET_TEMPLATES[:8])}


@dataclasses.dataclass
class LinearPrompt(Prompt):
    """A linear classifier of the features of pictures.

    Attributes:
        classes: what it tells apart.
        weight, bias: (classes, d) and (classes,).
    """

    classes: Sequence[Any]
    weight: Tensor
    bias: Tensor

    def on(self, model: DualEncoder) -> PicturePredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is a :class:`DualEncoder`."""
        if not isinstance(model, DualEncoder):
            raise UnsupportedModelError(f"LinearPrompt: expected a DualEncoder, got {type(model).__name__}")
        weight, bias = self.weight.to(model.device), self.bias.to(model.device)
        return PicturePredictor(model, self.classes, lambda pixels: model.images(pixels) @ weight.T + bias)


@dataclasses.dataclass
class LinearProbe(VisionOptimizer):
    """Logistic regression on the features of pictures, its penalty chosen on the dev examples as CoOp's authors do.

    Features are L2-normalised here, which CoOp's script leaves out (ours).

    Args:
        c: inverse strength of the L2 penalty; None: the best on dev of 1e6, 1e4, ..., 1e-6, narrowed by halves; 1
            where there are no dev examples.
        halvings: steps of the narrowing.
        iterations: of L-BFGS.
    """

    paper = Paper(*_CLIP, "2103.00020", "ICML 2021", "https://github.com/KaiyangZhou/CoOp",
                  "few-shot classes by a linear classifier of CLIP's features")
    c: Annotated[float | None, In("> 0")] = None
    halvings: Annotated[int, In(">= 0")] = 8
    iterations: Annotated[int, In(">= 1")] = 1000

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(halvings=0, iterations=20)}

    def optimize(self, task: Task, model: DualEncoder, *, budget: Budget | None = None, start: Prompt | None = None,
                 seed: int = 0, state_dir: str | Path | None = None, progress: bool | None = None) -> LinearPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``start`` is not read."""
        task.validate()
        classes = list(task.classes or ())
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        size = model.batch_size
        pieces = [*batches(list(task.train), size), *batches(list(task.dev), size)]
        rows = search.state.setdefault("features", [])
        with search, torch.no_grad(), evaluating(model.model):
            for number in search.steps(len(pieces)):
                rows += search.model.images(search.model.read(pieces[number])).tolist()
        train, dev = list(task.train)[:len(rows)], list(task.dev)[:max(0, len(rows) - len(task.train))]
        x = torch.tensor(rows or [[0.0] * model.dim], dtype=torch.float64)
        y = _targets(train, classes) if rows else torch.zeros(1, dtype=torch.long)
        first, second = x[:len(y)], x[len(y):]
        weight, bias, c = self._chosen(first, y, second, _targets(dev, classes), len(classes))
        right = float(((first @ weight.T + bias).argmax(1) == y).double().mean()) if rows else 0.0
        return LinearPrompt(classes, weight.float(), bias.float(), info=search.info(right, max(1, len(rows)), c=c))

    def _chosen(self, x: Tensor, y: Tensor, dev: Tensor, dev_y: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and penalty that are best on dev."""
        def worth(c: float) -> float:
            weight, bias = logistic(x, y, classes, c, self.iterations)
            return float(((dev @ weight.T + bias).argmax(1) == dev_y).double().mean())

        c = self.c if self.c is not None else 1.0
        if self.c is None and len(dev_y):
            grid = [1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6]
            peak = max(grid, key=worth)  # the first of equals
            low, high = peak / 10, peak * 10
            c = peak
            for _ in range(self.halvings):
                better = worth(low) < worth(high)
                c, middle = (high if better else low), (low * high) ** 0.5
                low, high = (middle, high) if better else (low, middle)
        return *logistic(x, y, classes, c, self.iterations), c


def logistic(x: Tensor, y: Tensor, classes: int, c: float, iterations: int = 1000) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias of the logistic regression with the loss ``c * sum of cross-entropies + |w|^2 / 2``.

    Args:
        x: (n, d) float64.
        y: (n,) numbers of the classes.
        classes: how many there are.
        c: inverse strength of the penalty, as scikit-learn has it.
        iterations: of L-BFGS.
    """
    with with_gradients():
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10,
                                      line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            # divided by c * n, so that the size of the steps does not depend on the penalty
            value = F.cross_entropy(x @ weight.T + bias, y) + (weight ** 2).sum() / (2 * c * len(y))
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _targets(examples: Sequence[Example], classes: list[Any]) -> Tensor:
    return torch.tensor([classes.index(e.target) for e in examples], dtype=torch.long)


__all__ = ["IMAGENET_TEMPLATES", "CoCoOp", "CoOp", "KgCoOp", "LearnedPrompt", "LinearProbe", "LinearPrompt", "MaPLe",
           "TemplateEnsemble", "VisionOptimizer", "ZeroShot", "logistic", "shots_of"]
