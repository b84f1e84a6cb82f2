"""Meta-learn a start and a gradient regulator from pictures with captions, then tune prompts with both."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from looseleaf import Budget, Example, Paper, Task
from looseleaf.fingerprint import content_fingerprint
from looseleaf.modes import evaluating, frozen, with_gradients
from looseleaf.plugin import In
from looseleaf_gram.episodes import Episode, Episodes, Namer, Pair, embed, read_pairs
from looseleaf_gram.regulator import Kind, Regulator, regulated, widths_of
from looseleaf_vision import Batch, DualEncoder, PromptLearner, PromptSpec, Recipe, VisionOptimizer, VisionPrompt, tune

Loss = Callable[[Mapping[str, Tensor]], Tensor]
BLOCK = 50
"""Most outer steps between two writings of the state."""


def meta_loss(parameters: Mapping[str, Tensor], support: Loss, query: Loss,
              regulate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], *, lr: float, steps: int = 1,
              second_order: bool = False) -> Tensor:
    """The loss of the query after inner steps along regulated gradients of the loss of the support.

    Its gradient reaches ``parameters`` through theta' = theta - lr * M(g), and the regulator through M. In first order
    g is a constant (the code of SUPMER); in second order it is not.

    Args:
        parameters: theta, by name.
        support, query: parameters -> scalar loss.
        regulate: M, gradients by name -> the same.
        lr: alpha.
        steps: inner steps.
        second_order: differentiate through g; needs attention with second derivatives.
    """
    current = dict(parameters)
    for _ in range(steps):
        found = torch.autograd.grad(support(current), list(current.values()), create_graph=second_order)
        bent = regulate(dict(zip(current, found, strict=True)))
        current = {name: value - lr * bent[name] for name, value in current.items()}
    return query(current)


@dataclasses.dataclass
class MetaPrompt(VisionPrompt):
    """A prompt with the regulator that goes with it: what every later task may start from.

    Attributes:
        regulator: tensors of the :class:`Regulator`, by name.
        settings: what it was made with: kind, dim, rank, final_relu.
    """

    regulator: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "none", "dim": 1, "rank": 1,
                                                                          "final_relu": False})

    def make_regulator(self) -> Regulator:
        """The regulator as a module, for :func:`regulated`."""
        found = Regulator(widths_of({n: t.shape for n, t in self.tensors.items()}), **self.settings)
        found.load_state_dict(self.regulator)
        return found

    def with_vectors(self, prompt: VisionPrompt) -> MetaPrompt:
        """The vectors of another prompt of the same kind, with the regulator of this one.

        Raises:
            ValueError: it has other vectors.
        """
        shapes = [{n: tuple(t.shape) for n, t in p.tensors.items()} for p in (self, prompt)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"with_vectors: expected vectors of the shapes {shapes[0]}, got {shapes[1]}")
        return dataclasses.replace(self, classes=prompt.classes, spec=prompt.spec, tensors=prompt.tensors)


@dataclasses.dataclass
class Gram(VisionOptimizer):
    """Prompt tuning of a dual encoder from a meta-learned start, with meta-learned regulation of its gradients.

    :meth:`meta_train` makes a start once, from unlabelled pictures with captions; :meth:`optimize` tunes it on a task.
    Reconstructed from the paper's abstract, that of its extension, and the code of the same group's SUPMER: the
    official code is not public.

    Args:
        learner: ``coop`` (context of the texts), ``cocoop`` (shifted by each picture), ``vpt`` (tokens beside the
            patches) or ``both`` (coop and vpt: UNIGRAM).
        n_ctx: context vectors.
        ctx_init: text whose embeddings they begin with before meta-training; None: N(0, 0.02) (ours).
        n_vision: vision tokens.
        classes: clusters of captions.
        domains: clusters of pictures in each.
        ways: classes of an episode.
        shots: pictures of each class in support and query of an episode.
        shifted: the query comes from another domain than the support; False is the ablation.
        inner_lr: alpha; SUPMER's value. Choose it for your model by `held_out`.
        inner_steps: steps on the support.
        outer_lr: of Adam on the prompt; SUPMER's value.
        regulator_lr: of Adam on the regulator; SUPMER's value.
        episodes_per_step: episodes of an outer step.
        clip_norm: largest norm of the gradients, outer and adapting; SUPMER's value.
        meta_steps: outer steps (ours).
        second_order: differentiate through the inner gradient.
        regulator: ``gated`` (after SUPMER), ``affine`` (ours) or ``none``.
        rank: of the layers of ``gated``.
        final_relu: a ReLU after them, as in SUPMER: no component of their rows can be negative.
        epochs: of adapting to a task (ours).
        lr: learning rate of adapting, by plain SGD; None: `inner_lr`.
        batch_size: pictures in a step of adapting.
        crop: fractions of the area of random crops; None: whole pictures, which is much faster (ours).
        meta: path of a saved start, for where `start` cannot be given.
    """

    paper = Paper("Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models",
                  ("Juncheng Li", "Minghe Gao", "Longhui Wei", "Siliang Tang", "Wenqiao Zhang", "Mengze Li", "Wei Ji",
                   "Qi Tian", "Tat-Seng Chua", "Yueting Zhuang"), 2023, "2303.06571", "ICCV 2023", None,
                  "few-shot prompts for CLIP that start well and forget less, from unlabelled pictures with captions")
    learner: Literal["coop", "cocoop", "vpt", "both"] = "coop"
    n_ctx: Annotated[int, In(">= 1")] = 16
    ctx_init: str | None = None
    n_vision: Annotated[int, In(">= 1")] = 4
    classes: Annotated[int, In(">= 2")] = 100
    domains: Annotated[int, In(">= 2")] = 4
    ways: Annotated[int, In(">= 2")] = 5
    shots: Annotated[int, In(">= 1")] = 4
    shifted: bool = True
    inner_lr: Annotated[float, In("> 0")] = 0.1
    inner_steps: Annotated[int, In(">= 1")] = 1
    outer_lr: Annotated[float, In("> 0")] = 0.1
    regulator_lr: Annotated[float, In("> 0")] = 1e-4
    episodes_per_step: Annotated[int, In(">= 1")] = 4
    clip_norm: Annotated[float, In("> 0")] = 1.0
    meta_steps: Annotated[int, In(">= 1")] = 2000
    second_order: bool = False
    regulator: Kind = "gated"
    rank: Annotated[int, In(">= 1")] = 64
    final_relu: bool = False
    epochs: Annotated[int, In(">= 1")] = 20
    lr: Annotated[float | None, In("> 0")] = None
    batch_size: Annotated[int, In(">= 1")] = 32
    crop: tuple[float, float] | None = None
    meta: str | None = None

    def spec(self) -> PromptSpec:
        """Which vectors are learned."""
        text: Any = {"coop": "shared", "both": "shared", "cocoop": "conditional", "vpt": None}[self.learner]
        return PromptSpec(text, self.n_ctx, self.ctx_init, vision="own" if self.learner in ("vpt", "both") else None,
                          vision_length=self.n_vision)

    def make_regulator(self, learner: PromptLearner, model: DualEncoder, seed: int = 0) -> Regulator:
        """An untrained regulator for the tensors of a learner."""
        widths = widths_of({name: p.shape for name, p in learner.named_parameters()})
        return Regulator(widths, model.dim, self.regulator, rank=self.rank, final_relu=self.final_relu, seed=seed).to(
            model.device)

    # ---------------------------------------------------------------------------------------------- meta-training
    def meta_train(self, pairs: Sequence[Any] | Episodes, model: DualEncoder, *, budget: Budget | None = None,
                   namer: Namer | None = None, seed: int = 0, state_dir: str | Path | None = None,
                   progress: bool | None = None) -> MetaPrompt:
        """Learn a start and a regulator from unlabelled pictures with captions; their order does not matter.

        Args:
            pairs: see :func:`looseleaf_gram.episodes.read_pairs`; or what :meth:`episodes` made of them, whose
                features are then not computed again.
            model: the dual encoder; left as it is.
            budget: pictures and texts that go through the model; running out gives what was reached.
            namer: the captions of a class -> its name; None: the caption nearest to its centroid.
            seed: of clusters, episodes and weights.
            state_dir: features and what was reached are kept there, every 50 steps or every minute; the same call
                goes on.
            progress: show a progress bar; None: only on a terminal.

        Returns:
            A :class:`MetaPrompt` for the names of the clusters; give it to :meth:`optimize` as ``start``.

        Raises:
            ValueError: pairs that are not usable, or fewer classes of two domains than :attr:`ways`.
        """
        self.check_model(model)
        made: list[Episodes] = []
        if isinstance(pairs, Episodes):
            self._check_episodes(pairs, namer)
            made, known = [pairs], pairs.pairs
        else:
            known = read_pairs(pairs)
        learner = self.spec().build(model, self.ways, seed)
        regulator = self.make_regulator(learner, model, seed)
        both = nn.ModuleDict({"learner": learner, "regulator": regulator})

        def setup(metered: Any) -> dict[str, Tensor]:
            images, texts = embed(known, metered)
            return {"images": images, "texts": texts}

        def loss(batch: Batch, metered: Any) -> Tensor:
            if not made:
                made.append(self._episodes(known, batch.kept["images"], batch.kept["texts"], model, namer, seed))
            first = batch.step * self.episodes_per_step
            return torch.stack([
                self.episode_loss(learner, regulator, made[0], made[0][first + n], metered)
                for n in range(self.episodes_per_step)]).mean()

        task, recipe = self._outer()
        factors = {"regulator.**": self.regulator_lr / self.outer_lr} if self.regulator != "none" else {}
        identity = {**self.identity(task, model, None, seed), "pairs": _of_pairs(known),
                    "episodes": made[0].fingerprint() if made else None,
                    "namer": None if namer is None else content_fingerprint(namer)}
        with _differentiable(self.second_order):
            tuned = tune(both, loss, task, model, recipe, setup=None if made else setup, budget=budget, seed=seed,
                         state_dir=state_dir, factors=factors, identity=identity, progress=progress,
                         label="Gram.meta_train")
        if not made and tuned.kept:  # resumed when done
            made.append(self._episodes(known, tuned.kept["images"], tuned.kept["texts"], model, namer, seed))
        prompt = VisionPrompt.of(learner, [c.name for c in made[0].usable] if made else [])
        info = tuned.info(pairs=len(known), data=_of_pairs(known), seed=seed, start="meta-trained",
                          clusters=len(made[0].clusters) if made else 0)
        return MetaPrompt(prompt.classes, prompt.spec, prompt.tensors, info=info,
                          regulator={n: t.detach().cpu().clone() for n, t in regulator.state_dict().items()},
                          settings={"kind": self.regulator, "dim": model.dim, "rank": self.rank,
                                    "final_relu": self.final_relu})

    def episodes(self, pairs: Sequence[Any], model: DualEncoder, seed: int = 0, *,
                 namer: Namer | None = None) -> Episodes:
        """The episodes that :meth:`meta_train` learns from: look at ``episodes(...).report()`` first.

        Args:
            pairs, namer: see :meth:`meta_train`.
            model: the dual encoder, metered or not.
            seed: that of the meta-training.
        """
        known = read_pairs(pairs)
        with torch.no_grad(), evaluating(model.model):
            images, texts = embed(known, model)
        return self._episodes(known, images, texts, model, namer, seed)

    def held_out(self, prompt: MetaPrompt, episodes: Episodes, model: DualEncoder, count: int = 20) -> dict[str, float]:
        """Mean query loss ``before`` and ``after`` the inner steps, on episodes of pairs that were not learned from.

        Compare it for several :attr:`inner_lr`, and with a prompt that was not meta-trained.
        """
        learner, regulator = prompt.learner(model), prompt.make_regulator().to(model.device)
        plain = dataclasses.replace(self, inner_lr=1e-30)
        with evaluating(model.model), frozen(model.model), with_gradients():
            losses = {name: [float(method.episode_loss(learner, regulator, episodes, episodes[n], model).detach())
                             for n in range(count)] for name, method in (("before", plain), ("after", self))}
        return {name: sum(values) / len(values) for name, values in losses.items()}

    def episode_loss(self, learner: PromptLearner, regulator: Regulator, episodes: Episodes, episode: Episode,
                     model: Any) -> Tensor:
        """The loss of an episode's query after the inner steps on its support; see :func:`meta_loss`.

        Args:
            learner, regulator: what its gradient reaches.
            episodes: whose pictures and features the episode's places are of.
            episode: one of them.
            model: the dual encoder, metered or not.
        """
        targets = episode.targets.to(model.device)

        def features(places: Tensor) -> Tensor:
            return episodes.images[places.to(episodes.images.device)].to(model.device)

        def of(places: Tensor) -> Loss:
            seen = {"pixels": model.read([episodes.pairs[n].example for n in places.tolist()])} \
                if learner.changes_images else {"features": features(places)}
            return lambda parameters: F.cross_entropy(functional_call(
                learner, dict(parameters), (model, episode.names), seen), targets)

        if regulator.kind == "gated":
            regulator.observe(features(episode.support))
        return meta_loss(dict(learner.named_parameters()), of(episode.support), of(episode.query), regulator,
                         lr=self.inner_lr, steps=self.inner_steps, second_order=self.second_order)

    def _check_episodes(self, episodes: Episodes, namer: Namer | None) -> None:
        """Raise ValueError unless episodes are those of this method's fields."""
        for name in ("ways", "shots", "shifted"):
            if getattr(episodes, name) != getattr(self, name):
                raise ValueError(f"pairs: expected episodes with {name}={getattr(self, name)}, as this Gram has it, "
                                 f"got {name}={getattr(episodes, name)}")
        if namer is not None:
            raise ValueError("namer: expected None with episodes, whose classes have names already, got a namer")

    def _episodes(self, pairs: Sequence[Pair], images: Tensor, texts: Tensor, model: DualEncoder, namer: Namer | None,
                  seed: int) -> Episodes:
        spec = self.spec()
        vectors = 0 if spec.text is None else len(model.embed_tokens(spec.start)) if spec.start else spec.length
        room = model.max_length - 2 - max(vectors, 5)  # as long as "a photo of a", at least
        return Episodes(pairs, images, texts, classes=self.classes, domains=self.domains, ways=self.ways,
                        shots=self.shots, shifted=self.shifted, namer=namer, seed=seed,
                        fits=lambda caption: model.count_tokens(f"{caption}.") <= room)

    def _outer(self) -> tuple[Task, Recipe]:
        """Outer steps as a task whose examples are steps: :func:`tune` meters, keeps and resumes them."""
        block = max(n for n in range(1, BLOCK + 1) if self.meta_steps % n == 0)
        stubs = [Example({"step": n}, n % 2) for n in range(max(2, block))]
        recipe = Recipe(self.meta_steps // block, len(stubs) // block, self.outer_lr, "adam", weight_decay=0.0,
                        schedule="constant", warmup=0, crop=None, clip_norm=self.clip_norm)
        return Task("outer steps", stubs, classes=(0, 1)), recipe

    # --------------------------------------------------------------------------------------------------- adapting
    def recipe(self) -> Recipe:
        """Plain SGD: Adam would hide the length that the regulator gives to a gradient."""
        return Recipe(self.epochs, self.batch_size, self.lr or self.inner_lr, momentum=0.0, weight_decay=0.0,
                      schedule="constant", warmup=0, crop=self.crop, clip_norm=self.clip_norm)

    def optimize(self, task: Task, model: DualEncoder, *, budget: Budget | None = None,
                 start: VisionPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> MetaPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            task: with classes and pictures.
            model: the dual encoder.
            start: what :meth:`meta_train` gave, or what an earlier call gave; with ``regulator="none"`` any prompt of
                the same vectors. None: what :attr:`meta` names; without either this is the bare learner, with a
                warning.
            budget, seed, state_dir, progress: as there.

        Raises:
            ValueError: a start of another learner, with another regulator, or for another model.
        """
        self.check_model(model)
        task.validate()
        if task.classes is None:
            raise ValueError(f"task {task.name!r}: expected a task with classes, got one without")
        if start is None and self.meta is not None:
            start = VisionPrompt.load(self.meta)
        if start is None:
            warnings.warn("Gram: no start was given, so this is the bare learner: give optimize(start=...) or "
                          "Gram(meta=...) what meta_train made", stacklevel=2)
            learner = self.spec().build(model, len(task.classes), seed)
            prompt = MetaPrompt(list(task.classes), learner.spec)
        else:
            prompt = self._started(start).for_classes(task.classes)  # type: ignore[assignment]
            learner = prompt.learner(model)
        regulator = prompt.make_regulator().to(model.device)
        if regulator.kind == "gated" and regulator.dim != model.dim:
            raise ValueError(f"start: expected a regulator for features of {model.dim} numbers, got one for "
                             f"{regulator.dim}: it was learned for another width")
        names = list(task.classes)

        def loss(batch: Batch, metered: Any) -> Tensor:
            features = batch.features if regulator.kind == "gated" or not learner.changes_images else None
            if regulator.kind == "gated" and features is not None:
                regulator.observe(features)
            seen = {"pixels": batch.pixels} if learner.changes_images else {"features": features}
            return F.cross_entropy(learner(metered, names, **seen), batch.targets)

        with regulated(dict(learner.named_parameters()), regulator):
            tuned = tune(learner, loss, task, model, self.recipe(), budget=budget, seed=seed, state_dir=state_dir,
                         identity=self.identity(task, model, start, seed), progress=progress, label="Gram")
        found = VisionPrompt.of(learner, names)
        return dataclasses.replace(prompt, tensors=found.tensors, info=tuned.info(
            start="none: the bare learner" if start is None else start.info.get("start", "given"),
            regulator=regulator.kind))

    def _started(self, start: VisionPrompt) -> MetaPrompt:
        """``start`` with the regulator that this method asks for."""
        spec = self.spec()
        if not isinstance(start, VisionPrompt) or dataclasses.replace(
                start.spec, start=spec.start, length=spec.length, vision_length=spec.vision_length) != spec:
            got = start.spec if isinstance(start, VisionPrompt) else type(start).__name__
            raise ValueError(f"start: expected the vectors of learner={self.learner!r}, got {got}: it is of another "
                             "learner")
        if self.regulator == "none":
            return MetaPrompt(start.classes, start.spec, start.tensors, info=start.info)
        kind = start.settings["kind"] if isinstance(start, MetaPrompt) else "none"
        if kind != self.regulator or not isinstance(start, MetaPrompt):
            raise ValueError(f"start: expected a prompt with the regulator {self.regulator!r}, which meta_train makes, "
                             f"got one with {kind!r}: give Gram(regulator={kind!r})")
        return start

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {**super().conformance(), "make": lambda: cls(n_ctx=4, epochs=5, batch_size=8, meta=_toy_start())}


@functools.cache
def _toy_start() -> str:
    """The path of a start for the kit's model, meta-trained on its pictures; removed at the end."""
    from looseleaf_vision.testing import toy_clip, toy_pictures

    folder = tempfile.mkdtemp(prefix="looseleaf-gram-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    task = toy_pictures(4, each=12)
    pairs = [(e.inputs["image"], e.target) for e in task.train]
    method = Gram(n_ctx=4, classes=4, domains=2, ways=2, shots=1, meta_steps=4, episodes_per_step=1)
    path = str(Path(folder) / "start.json")
    method.meta_train(pairs, toy_clip(), progress=False).save(path)
    return path


@contextlib.contextmanager
def _differentiable(second_order: bool) -> Iterator[None]:
    """Attention with second derivatives, which the fused kinds do not have."""
    with sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext():
        yield


def _of_pairs(pairs: Sequence[Pair]) -> str:
    return content_fingerprint([[pair.key, pair.caption] for pair in pairs])


__all__ = ["Gram", "MetaPrompt", "meta_loss"]
