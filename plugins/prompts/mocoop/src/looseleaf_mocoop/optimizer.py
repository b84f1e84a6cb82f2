"""MoCoOp: a mixture of soft prompts for a frozen dual encoder, and the prompt that comes out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from looseleaf import Budget, BudgetExhausted, Example, Paper, Task
from looseleaf.budget import reason
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf_mocoop.mixture import FEW, MixedText, MixtureSpec, gate_loss, text_loss
from looseleaf_mocoop.templates import GENERAL, GROUPS, check_groups, group_templates
from looseleaf_vision import Batch, DualEncoder, PicturePredictor, Recipe, VectorPrompt, VisionOptimizer, spaced, tune

LAYER_NORM_RATE = 0.1
"""Factor of the learning rate of LayerNorms, as in the official code."""


@dataclasses.dataclass
class MoCoOp(VisionOptimizer):
    """Mixture of prompts: one soft prompt for each group of hand templates, the best mixed for each picture.

    Args:
        templates: hand-written texts with one {}; those of a group follow one another.
        groups: sizes of the groups; None: the published ones for GENERAL and IMAGENET, else k-means of the text
            features into half as many groups as templates (ours).
        top_k: experts mixed for each picture.
        text_weight: of the loss that keeps each expert near its group's hand-written class features.
        gate_weight: of the loss that teaches the router the groups whose hand templates are nearest to the picture.
        correction: learn a vector, added to all text features.
        tune_layer_norm: also learn the LayerNorms in the blocks of the image tower, at a tenth of the learning rate;
            the official configurations do, which is slower, as every picture goes through the tower in each step.
        text_classes: further names that the text loss sees, such as those of new classes (the official code does so
            on base classes); the prompt's info then says it.
        router: False: mix all experts with equal weights (an ablation).
        margin: added to the top_k largest cosines of the router's target.
        epochs: passes over the training examples.
        lr: learning rate of SGD.
        warmup: epochs at 1e-5 before.
        batch_size: pictures in a step; below 4 only the experts that were chosen are encoded.
        clip_norm: largest norm of the gradients; None: not clipped.
        crop: fractions of the area of random crops; None: whole pictures, which is much faster (ours).
    """

    paper = Paper("Mixture of Prompt Learning for Vision Language Models", ("Yu Du", "Tong Niu", "Rong Zhao"), 2024,
                  "2409.12011", "Frontiers in Artificial Intelligence 8, 2025", "https://github.com/dyabel/mocoop",
                  "one soft prompt per group of hand templates, mixed for each picture by a router")
    templates: tuple[str, ...] = GENERAL
    groups: Annotated[tuple[int, ...] | None, In(">= 1")] = None
    top_k: Annotated[int, In(">= 1")] = 2
    text_weight: Annotated[float, In(">= 0")] = 5.0
    gate_weight: Annotated[float, In(">= 0")] = 1.0
    correction: bool = True
    tune_layer_norm: bool = False
    text_classes: tuple[str, ...] | None = None
    router: bool = True
    margin: Annotated[float, In(">= 0")] = 10.0
    epochs: Annotated[int, In(">= 1")] = 50
    lr: Annotated[float, In("> 0")] = 0.032
    warmup: Annotated[int, In(">= 0")] = 5
    batch_size: Annotated[int, In(">= 1")] = 32
    clip_norm: Annotated[float | None, In("> 0")] = 1.0
    crop: tuple[float, float] | None = (0.08, 1.0)

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        check_groups(self.templates, self.groups, "MoCoOp")
        groups = self.groups or GROUPS.get(tuple(self.templates))
        most = len(self.templates) if groups is None else len(groups)
        self.check("top_k", not self.router or self.top_k <= most,
                   f"an integer in [1, {most}], the number of {'groups' if groups else 'templates'}")
        self.check("text_classes", self.text_classes is None or not isinstance(self.text_classes, str),
                   "None or a sequence of names")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "calls": 900, "make": lambda: cls(
            templates=("a photo of a {}.", "a drawing of a {}.", "a large {}."), groups=(1, 2), epochs=4, warmup=1,
            batch_size=8)}

    def recipe(self) -> Recipe:
        """How the vectors are learned."""
        return Recipe(self.epochs, self.batch_size, self.lr, warmup=self.warmup, clip_norm=self.clip_norm,
                      crop=self.crop)

    def optimize(self, task: Task, model: DualEncoder, *, budget: Budget | None = None,
                 start: MixturePrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> MixturePrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``start`` has the same templates and parts."""
        self.check_model(model)
        task.validate()
        if task.classes is None:
            raise ValueError(f"task {task.name!r}: expected a task with classes, got one without")
        budget, classes = budget or Budget(), list(task.classes)
        try:
            spec = self._spec(classes, budget.meter(model)) if start is None else self._spec_of(start)
        except BudgetExhausted as error:  # no groups yet: every template in turn, half as many groups
            sizes = (2,) * (len(self.templates) // 2) + (1,) * (len(self.templates) % 2)
            spec = self._made(tuple(self.templates), sizes if len(sizes) >= self.top_k else (1,) * len(self.templates))
            return MixturePrompt.of(spec.build(model, len(classes), seed), classes, fitness=-math.log(len(classes)),
                                    evaluations=0, stopped=reason(error), groups=list(map(list, spec.parts)))
        learner = spec.build(model, len(classes), seed) if start is None else start.learner(model)

        def begin(epoch: int, metered: Any) -> None:
            learner.usage.zero_()

        names = [*classes, *dict.fromkeys(n for n in self.text_classes or () if n not in classes)]
        tuned = tune(learner, lambda batch, metered: self.loss(learner, batch, names, len(classes), metered), task,
                     model, self.recipe(), setup=lambda metered: self._setup(spec, names, metered),
                     on_epoch=begin, budget=budget, seed=seed,
                     factors={"norms.*.*": LAYER_NORM_RATE} if spec.layer_norm else None, state_dir=state_dir,
                     identity=self.identity(task, model, start, seed), progress=progress, label=type(self).__name__)
        seen = tuned.steps and (tuned.steps - 1) % max(1, len(task.train) // self.batch_size) + 1
        seen *= min(self.batch_size, len(task.train))
        more = {"groups": list(map(list, spec.parts)), "trained": sum(p.numel() for p in learner.parameters()),
                "usage": [count / seen for count in learner.usage.tolist()] if seen else None}
        if len(names) > len(classes):
            more["text_classes"] = f"the text loss saw {len(names) - len(classes)} further names"
        return MixturePrompt.of(learner, classes, **tuned.info(**more))

    def loss(self, learner: MixedText, batch: Batch, names: Sequence[Any], classes: int, model: DualEncoder) -> Tensor:
        """Cross-entropy + text_weight * text loss + gate_weight * gate loss.

        Args:
            learner: what is learned.
            batch: of one step; ``kept["hand"]`` as :meth:`optimize` computes it.
            names: of the classes, then those that only the text loss sees.
            classes: how many of the names are classes.
            model: the metered dual encoder.
        """
        features = learner.images(model, batch.pixels) if len(learner.norms) else batch.features
        gate, weights = learner.route(features)
        chosen = (weights > 0).any(0).nonzero()[:, 0].tolist() if len(features) < FEW else None
        learner.usage += (weights.detach() > 0).sum(0)
        texts = learner.texts(model, names if self.text_weight else names[:classes], chosen)
        value = F.cross_entropy(learner.logits(model, features, texts[:, :classes], weights), batch.targets)
        if self.text_weight:
            value = value + self.text_weight * text_loss(texts, batch.kept["hand"])
        if self.gate_weight and gate is not None:
            cosines = torch.einsum("bd,gbd->bg", features.detach(), batch.kept["hand"][:, batch.targets])
            value = value + self.gate_weight * gate_loss(gate, cosines, self.margin, self.top_k)
        return value

    def _setup(self, spec: MixtureSpec, names: Sequence[Any], model: DualEncoder) -> dict[str, Tensor]:
        """(experts, names, d): the hand-written class features of each group."""
        if not self.text_weight and not (self.gate_weight and spec.router):
            return {}
        return {"hand": torch.stack([model.ensemble(list(map(str, names)), group) for group in spec.parts])}

    def _made(self, templates: tuple[str, ...], groups: tuple[int, ...]) -> MixtureSpec:
        return MixtureSpec(templates, groups, self.top_k, self.router, self.correction, self.tune_layer_norm)

    def _spec(self, classes: Sequence[Any], model: DualEncoder) -> MixtureSpec:
        """The spec, its templates grouped by their features where no groups were given."""
        templates = tuple(self.templates)
        groups = self.groups or GROUPS.get(templates)
        if groups is not None:
            return self._made(templates, tuple(groups))
        with torch.no_grad(), evaluating(model.model):
            features = torch.stack([model.texts([t.format(spaced(n)) for n in classes]).mean(0) for t in templates])
        count = min(len(templates), max(self.top_k if self.router else 1, math.ceil(len(templates) / 2)))
        numbers = group_templates(features, count)
        return self._made(tuple(templates[n] for group in numbers for n in group), tuple(map(len, numbers)))

    def _spec_of(self, start: MixturePrompt) -> MixtureSpec:
        """That of ``start``, which must be what this optimiser would make."""
        if not isinstance(start, MixturePrompt):
            raise ValueError(f"start: expected a MixturePrompt, got {type(start).__name__}")
        spec, groups = start.spec, self.groups or GROUPS.get(tuple(self.templates))
        wanted = self._made(tuple(self.templates), tuple(groups)) if groups else self._made(spec.templates, spec.groups)
        if spec != wanted or sorted(spec.templates) != sorted(self.templates):
            raise ValueError(f"start: expected a prompt of {wanted}, got {spec}")
        return spec


@dataclasses.dataclass
class MixturePrompt(VectorPrompt):
    """A mixture of soft prompts, learned for a dual encoder.

    Attributes:
        classes: what it tells apart, in the order of the scores.
        spec: what it is made of.
        tensors: ``experts.g.context``, ``gate.weight``, ``gate.bias``, ``correction``, ``norms.n.weight``, ...
    """

    spec: MixtureSpec

    def on(self, model: DualEncoder) -> MixturePredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is a :class:`looseleaf_vision.DualEncoder`."""
        return MixturePredictor(self, model)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one expert has in the mixture of a picture.

    Attributes:
        expert: its number.
        weight: in (0, 1].
        templates: of its group; it began at the first.
        words: for each of its vectors the token whose embedding is nearest (Euclidean).
    """

    expert: int
    weight: float
    templates: tuple[str, ...]
    words: tuple[str, ...]


class MixturePredictor(PicturePredictor):
    """Predicts with the mixture of each picture; the class features of all experts are computed once.

    Args:
        prompt: what was learned.
        model: the dual encoder.
    """

    model: DualEncoder

    def __init__(self, prompt: MixturePrompt, model: DualEncoder) -> None:
        self.learner = prompt.learner(model)
        self._texts: Tensor | None = None
        super().__init__(model, prompt.classes, self._logits)

    def _logits(self, pixels: Tensor) -> Tensor:
        if self._texts is None:
            self._texts = self.learner.texts(self.model, self.classes or ())
        return self.learner(self.model, self.classes or (), self.learner.images(self.model, pixels), self._texts)

    @torch.no_grad()
    def weights(self, examples: Sequence[Example]) -> Tensor:
        """(examples, experts): how each picture's mixture is weighed."""
        size, rows = self.model.batch_size, [torch.zeros(0, len(self.learner.experts))]
        with evaluating(self.model.model):
            for at in range(0, len(examples), size):
                pixels = self.model.read([examples[n] for n in range(at, min(at + size, len(examples)))])
                rows.append(self.learner.route(self.learner.images(self.model, pixels))[1].cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def explain(self, picture: Any) -> list[Share]:
        """The experts in a picture's mixture, the heaviest first.

        Args:
            picture: an Example, or whatever a picture may be (PIL image, array, tensor).
        """
        example = picture if isinstance(picture, Example) else Example({"image": picture})
        weights, table = self.weights([example])[0], self.model.embedding.weight.float()
        shares = []
        for expert in weights.argsort(descending=True, stable=True).tolist():
            if weights[expert] > 0:
                near = torch.cdist(self.learner.experts[expert].context.float(), table).argmin(1).tolist()
                words = tuple(self.model.tokenizer.decode([token]).strip() for token in near)
                shares.append(Share(expert, float(weights[expert]), self.learner.spec.parts[expert], words))
        return shares


__all__ = ["MixturePredictor", "MixturePrompt", "MoCoOp", "Share"]
