"""The one loop that learns prompts: resumable, metered, with the conventions of CoOp and those that follow it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from looseleaf.budget import Budget, reason
from looseleaf.errors import BudgetExhausted
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, frozen, with_gradients
from looseleaf.names import match
from looseleaf.plugin import In, check_fields
from looseleaf.progress import bar
from looseleaf.resume import SearchState, StateError
from looseleaf.tasks import Example, Task

FORMAT = "looseleaf.tuning/1"
SAVE_SECONDS = 60.0
"""Between two writings of the state inside an epoch."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How vectors are trained; the defaults are those of CoOp with 16 shots (Zhou et al., 2022, and its code).

    Attributes:
        epochs: passes over the training examples.
        batch_size: pictures in a step; a last, smaller batch is left out where there is a whole one.
        lr: first learning rate.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD.
        weight_decay: of all learned numbers.
        schedule: ``cosine`` or ``constant`` per epoch, ``steps`` (cosine per step), or ``milestones`` (a tenth after
            each).
        milestones: fractions of the epochs.
        warmup: epochs at ``warmup_lr`` before.
        warmup_lr: constant learning rate of the warm-up.
        crop: smallest and largest fraction of the area of random parts of pictures; None: whole pictures, whose
            features are then computed once where nothing in the picture tower is learned.
        flip: mirror half of the pictures; read where ``crop`` is given.
        clip_norm: largest norm of the gradients together.
    """

    epochs: Annotated[int, In(">= 1")] = 200
    batch_size: Annotated[int, In(">= 1")] = 32
    lr: Annotated[float, In("> 0")] = 0.002
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Annotated[float, In("[0, 1)")] = 0.9
    weight_decay: Annotated[float, In(">= 0")] = 5e-4
    schedule: Literal["cosine", "constant", "steps", "milestones"] = "cosine"
    milestones: Annotated[tuple[float, ...], In("(0, 1)")] = (0.5, 0.72)
    warmup: Annotated[int, In(">= 0")] = 1
    warmup_lr: Annotated[float, In("> 0")] = 1e-5
    crop: tuple[float, float] | None = (0.08, 1.0)
    flip: bool = True
    clip_norm: Annotated[float | None, In("> 0")] = None

    def __post_init__(self) -> None:
        check_fields(self)

    @staticmethod
    def coop_epochs(shots: int) -> int:
        """Epochs of CoOp: 200 for 8 shots and more, 100 for 2 and 4, 50 for one (its authors' scripts)."""
        return 200 if shots >= 8 else 100 if shots >= 2 else 50

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0."""
        epoch = step // steps_per_epoch
        if epoch < self.warmup:
            return self.warmup_lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup) / self.epochs))
        if self.schedule == "steps":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup * steps_per_epoch)
                                                 / (self.epochs * steps_per_epoch)))
        if self.schedule == "milestones":
            return self.lr * 0.1 ** sum(epoch >= int(m * self.epochs) for m in self.milestones)
        return self.lr

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser of torch for parameter groups."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=self.lr, weight_decay=self.weight_decay)


class Batch:
    """The examples of one step.

    Attributes:
        examples: of this batch.
        index: (B,) their places in ``task.train``.
        targets: (B,) places of their targets in ``task.classes``.
        step, epoch: counted from 0.
        kept: what ``setup`` of :func:`tune` gave.
        generator: of all randomness of this step.
    """

    def __init__(self, examples: Sequence[Example], index: Tensor, targets: Tensor, step: int, epoch: int,
                 kept: dict[str, Tensor], generator: torch.Generator, model: Any, recipe: Recipe,
                 cache: dict[str, Tensor]) -> None:
        self.examples, self.index, self.targets, self.step, self.epoch = examples, index, targets, step, epoch
        self.kept, self.generator, self._model, self._recipe, self._cache = kept, generator, model, recipe, cache
        self._pixels: Tensor | None = None

    @property
    def pixels(self) -> Tensor:
        """(B, C, H, W) fractions: random parts of the pictures where the recipe says so."""
        if self._pixels is None:
            crop = self._recipe.crop
            self._pixels = self._model.read(self.examples) if crop is None else \
                self._model.crops(self.examples, self.generator, crop, self._recipe.flip)
        return self._pixels

    def read(self, size: int) -> Tensor:
        """(B, C, size, size): whole pictures squeezed to ``size``; see :meth:`looseleaf_vision.Preprocess.read`."""
        return self._model.read(self.examples, size)  # type: ignore[no-any-return]

    @property
    def features(self) -> Tensor:
        """(B, d) L2-normalised features by the frozen picture tower, without gradient; kept where nothing is random."""
        with torch.no_grad():
            if self._recipe.crop is not None:
                return self._model.images(self.pixels)
            rows = self.index.tolist()
            missing = [n for n, row in enumerate(rows) if f"features.{row}" not in self._cache]
            if missing:
                found = self._model.images(self._model.read([self.examples[n] for n in missing]))
                self._cache.update({f"features.{rows[n]}": f.cpu().clone() for n, f in zip(missing, found)})
            return torch.stack([self._cache[f"features.{row}"] for row in rows]).to(self._model.device)


@dataclasses.dataclass
class Tuned:
    """What came out of :func:`tune`; the modules themselves were changed in place.

    Attributes:
        losses: of every step made.
        epochs: mean loss of every epoch begun.
        steps: made, those of former runs included.
        stopped: ``"done"`` or the limit of the budget.
        kept: what ``setup`` gave.
        fitness: minus the mean loss of the last epoch; that of guessing where no step was made.
    """

    losses: list[float]
    epochs: list[float]
    steps: int
    stopped: str
    kept: dict[str, Tensor]
    fitness: float

    def info(self, **more: Any) -> dict[str, Any]:
        """Metadata for ``Prompt.info``."""
        return {"fitness": self.fitness, "evaluations": self.steps, "stopped": self.stopped,
                "history": [-x for x in self.epochs], **more}


def tune(modules: nn.Module, loss: Callable[[Batch, Any], Tensor], task: Task, model: Any, recipe: Recipe, *,
         setup: Callable[[Any], Mapping[str, Tensor]] | None = None, on_epoch: Callable[[int, Any], None] | None = None,
         backward: Callable[[Tensor], None] | None = None, factors: Mapping[str, float] | None = None,
         budget: Budget | None = None, seed: int = 0, state_dir: str | Path | None = None,
         identity: Mapping[str, Any] | None = None, progress: bool | None = None, label: str = "tuning") -> Tuned:
    """Train ``modules`` in front of, or inside, a frozen model on ``task.train``.

    The model is in evaluation mode and frozen meanwhile; modes and every ``requires_grad`` come back. Order of the
    examples, random crops and whatever ``loss`` draws from ``batch.generator`` depend on seed and step alone, so that
    a run that was stopped goes on as if it had not been.

    Args:
        modules: what is learned: all of their parameters that ask for a gradient. They may be part of the model.
        loss: (batch, model) -> a scalar with a gradient; the model it gets is metered, so it should ask no other.
        task: only ``train`` is read; it is validated first.
        model: a :class:`looseleaf_vision.DualEncoder` or :class:`looseleaf_vision.ImageClassifier`.
        recipe: optimiser, schedule and pictures.
        setup: metered model -> tensors that are computed once, before the first step, and kept (``batch.kept``).
        on_epoch: (epoch, metered model), called before the first step of each epoch; what it changes should be in
            buffers of ``modules``, which are kept with the state.
        backward: of the loss -> fills the gradients, instead of ``loss.backward()``; before clipping.
        factors: name pattern of parameters -> factor of their learning rate.
        budget: pictures and texts that go through the model; running out ends with the vectors of the last step.
        seed: the only source of randomness.
        state_dir: the state is kept there after every epoch, and once a minute.
        identity: plain data that make two runs the same one; see :meth:`looseleaf.PromptOptimizer.identity`.
        progress: show a progress bar; None: only on a terminal.
        label: of the progress bar.

    Raises:
        ValueError: a task that cannot be learned from, nothing to learn, or a loss that is not finite (the step is
            named).
        StateError: the state on disk is damaged, or that of another run.
    """
    task.validate()
    if task.classes is None:
        raise ValueError(f"task {task.name!r}: expected a task with classes, got one without")
    budget = budget or Budget()
    metered = budget.meter(model)
    named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad and p.numel()]
    if not named:
        raise ValueError("tune: expected modules with parameters that ask for a gradient, got none")
    examples, classes = list(task.train), list(task.classes)
    targets = torch.tensor([classes.index(e.target) for e in examples])
    optimizer = recipe.make_optimizer(_groups(named, factors or {}))
    size = min(recipe.batch_size, len(examples))
    per_epoch = max(1, len(examples) // size)
    total = recipe.epochs * per_epoch
    state = _State(state_dir, {**(identity or {}), "recipe": dataclasses.asdict(recipe), "seed": seed,
                               "learned": [[n, list(p.shape)] for n, p in named]}, modules, named, optimizer)
    done, losses, cache, kept = state.load(budget)
    stopped = "done"
    with contextlib.ExitStack() as around:
        around.enter_context(evaluating(metered.model))
        around.enter_context(frozen(metered.model))
        around.enter_context(with_gradients())
        around.enter_context(_learning([p for _, p in named]))
        progress_bar = around.enter_context(bar(label, total, progress))
        progress_bar.update(done)
        written = time.monotonic()
        try:
            if setup is not None and not kept:
                with torch.no_grad():
                    kept = {name: value.detach() for name, value in setup(metered).items()}
            kept = {name: value.to(named[0][1].device) for name, value in kept.items()}
            state.save(done, losses, cache, kept, budget)
            while done < total:
                epoch, place = divmod(done, per_epoch)
                if place == 0 and on_epoch is not None:
                    on_epoch(epoch, metered)
                draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                index = torch.randperm(len(examples), generator=draw)[place * size:(place + 1) * size]
                step_draw = torch.Generator().manual_seed((seed + 1) * 7_368_787 + done)
                batch = Batch([examples[n] for n in index.tolist()], index, targets[index].to(named[0][1].device), done,
                              epoch, kept, step_draw, metered, recipe, cache)
                value = loss(batch, metered)
                losses_here = float(value.detach().sum())
                if not math.isfinite(losses_here):
                    raise ValueError(f"{label}, step {done}: expected a finite loss, got {losses_here}: lower the "
                                     "learning rate or clip gradients")
                for _, parameter in named:
                    parameter.grad = None
                if backward is None:
                    value.backward()  # type: ignore[no-untyped-call]
                else:
                    backward(value)
                if recipe.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_([p for _, p in named], recipe.clip_norm)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(done, per_epoch) * group["factor"]
                optimizer.step()
                losses.append(losses_here)
                done += 1
                progress_bar.set_postfix(loss=f"{losses_here:.3g}", refresh=False)
                progress_bar.update()
                if done % per_epoch == 0 or time.monotonic() - written > SAVE_SECONDS:
                    state.save(done, losses, cache, kept, budget)
                    written = time.monotonic()
        except BudgetExhausted as error:
            stopped = reason(error)
            state.save(done, losses, cache, kept, budget)
    means = [sum(part) / len(part) for part in (losses[at:at + per_epoch] for at in range(0, done, per_epoch))]
    return Tuned(losses, means, done, stopped, kept, -means[-1] if means else -math.log(len(classes)))


@contextlib.contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters collect gradients, from none; afterwards they have those that they had."""
    former = [(p.requires_grad, p.grad) for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, (learns, grad) in zip(parameters, former, strict=True):
            parameter.requires_grad_(learns)
            parameter.grad = grad


def _groups(named: Sequence[tuple[str, nn.Parameter]], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """One parameter group for each factor of the learning rate."""
    of = {name: 1.0 for name, _ in named}
    for pattern, factor in factors.items():
        of.update(dict.fromkeys(match(list(of), pattern, what="parameter"), float(factor)))
    return [{"params": [p for n, p in named if of[n] == factor], "factor": factor}
            for factor in dict.fromkeys(of.values())]


class _State:
    """What a run has reached: plain data in ``state.json``, tensors in the safetensors file that it names."""

    def __init__(self, folder: str | Path | None, identity: dict[str, Any], modules: nn.Module,
                 named: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
        self.folder = None if folder is None else Path(folder)
        self.file, self.modules, self.optimizer = SearchState(folder, identity), modules, optimizer
        self.names = dict(named)

    def load(self, budget: Budget) -> tuple[int, list[float], dict[str, Tensor], dict[str, Tensor]]:
        """Steps done, losses, cached features and what was kept; modules, optimiser and budget are set."""
        saved = self.file.load()
        if saved is None or self.folder is None:
            return 0, [], {}, {}
        path = self.folder / saved["tensors"]
        try:
            tensors, _ = load_tensors(path, format=FORMAT)
        except (ValueError, FileNotFoundError) as error:
            raise StateError(f"the state {path} cannot be read ({error}): remove {self.folder} to begin again, or "
                             "give another state_dir") from error
        parts: dict[str, dict[str, Tensor]] = {"modules": {}, "optimizer": {}, "cache": {}, "kept": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        with torch.no_grad():
            own = {**dict(self.modules.named_buffers()), **self.names}
            for name, value in parts["modules"].items():
                own[name].copy_(value)
        moments: dict[int, dict[str, Any]] = {}
        for name, value in parts["optimizer"].items():
            number, _, key = name.partition("/")
            moments.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        budget.restore(saved["used"])
        return saved["done"], list(saved["losses"]), parts["cache"], parts["kept"]

    def save(self, done: int, losses: list[float], cache: dict[str, Tensor], kept: dict[str, Tensor],
             budget: Budget) -> None:
        """Write the tensors, then the plain data that name them, then remove the former tensors."""
        if self.folder is None:
            return
        tensors = {f"modules/{n}": v for n, v in (*self.names.items(), *self.modules.named_buffers())}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer/{number}/{k}": v for k, v in values.items() if isinstance(v, Tensor)})
        tensors.update({f"cache/{n}": v for n, v in cache.items()}, **{f"kept/{n}": v for n, v in kept.items()})
        name = f"tensors-{done}-{len(cache)}.safetensors"
        save_tensors(self.folder / name, {n: v.detach().cpu() for n, v in tensors.items()}, format=FORMAT)
        self.file.save({"done": done, "losses": losses, "used": budget.used, "tensors": name})
        for former in self.folder.glob("tensors-*.safetensors"):
            if former.name != name:
                former.unlink(missing_ok=True)


__all__ = ["Batch", "Recipe", "Tuned", "tune"]
