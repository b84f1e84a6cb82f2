"""The two stages of training: predictors from a dense model, then the model under the masks of its predictors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import AttentionBackend, AttentionCall, attach
from looseleaf.attention.call import Phase
from looseleaf.modes import evaluating, frozen, own_random_state, with_gradients
from looseleaf.progress import bar
from looseleaf_sparsifiner.predictor import Predictor

if TYPE_CHECKING:
    from looseleaf_sparsifiner.backend import RowKeys

WEIGHT = 0.01
"""Of the loss of the first stage (authors' code)."""
WARMUP = 0.6
"""Fraction of the steps of the first stage in which its learning rate rises: 3 of 5 epochs (authors' code)."""


def run_model(model: Any, batch: Any) -> Any:
    """The model on a dictionary of its arguments, or on its only argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def several(batches: Any) -> Any:
    """Batches that can be counted and gone through again."""
    if isinstance(batches, (Mapping, Tensor)):
        return [batches]
    return batches if hasattr(batches, "__len__") else list(batches)


def rate(step: int, steps: int, lr: tuple[float, float], warmup: float) -> float:
    """The learning rate: up to the first along a line, then to the last along half a cosine."""
    rising = warmup * steps
    if step < rising:
        return lr[0] * (step + 1) / (math.floor(rising) + 1)
    done = (step - rising) / max(1.0, steps - 1 - rising)
    return lr[1] + (lr[0] - lr[1]) * (1 + math.cos(math.pi * min(1.0, done))) / 2


# ------------------------------------------------------------------------------------------------------ first stage
@dataclasses.dataclass
class Observer(AttentionBackend):
    """Exact attention, from which predictors learn as the model calls it; each layer's gradient is taken at once.

    Args:
        make: makes a predictor of head size, tokens, heads and key heads.
        scale_for: factor of the predictor's scores for a number of heads.
        prefix: rows for which nothing is guessed.
        reduction: ``sum``, or ``mean`` over the entries of the maps.
    """

    make: Callable[[int, int, int, int], Predictor]
    scale_for: Callable[[int], float]
    prefix: int = 1
    reduction: Literal["sum", "mean"] = "sum"
    phases: ClassVar[frozenset[Phase]] = frozenset({"prefill", "decode", "bidirectional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.predictors: dict[int, Predictor] = {}
        self.layers, self.loss, self.passed = 1, 0.0, set[str]()

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, Hq, Lq, D)."""
        lengths = call.lengths()
        reason = "a causal or cross call" if call.is_causal or call.is_cross else \
            "a mask" if call.mask is not None else None
        if reason is None:
            known = self.predictors.get(call.layer)
            tokens = known.tokens if known else int(lengths[0].max())
            fits = (lengths[0] == tokens) & (lengths[1] == tokens)
            if tokens <= self.prefix or not bool(fits.any()):
                reason = f"{int(lengths[0].max())} tokens"
            else:
                self._learn(call, fits, tokens)
        if reason is not None:
            self.passed.add(reason)
        return call.dense()

    def _learn(self, call: AttentionCall, fits: Tensor, tokens: int) -> None:
        heads, kv_heads, head_dim = call.shape[1], call.shape[2], call.shape[5]
        predictor = self.predictors.get(call.layer)
        if predictor is None:
            predictor = self.predictors[call.layer] = self.make(head_dim, tokens, heads, kv_heads).to(call.query.device)
        query, key = call.query.detach()[fits, :, self.prefix:tokens], call.key.detach()[fits, :, :tokens]
        with torch.no_grad():
            true = torch.softmax((query @ key.repeat_interleave(heads // kv_heads, 1).mT).float() * call.scale, -1)
        with torch.enable_grad():
            guess = predictor.dense_map(predictor.coefficients(query, key, self.scale_for(heads)))
            error = F.mse_loss(guess, true, reduction=self.reduction)
            loss = WEIGHT * error / self.layers
            loss.backward()  # type: ignore[no-untyped-call]
        self.loss += float(loss.detach())


def train_predictors(model: Any, observer: Observer, batches: Any, *, layers: Any = None, epochs: int = 5,
                     lr: tuple[float, float] = (3e-4, 2e-4), warmup: float = WARMUP, weight_decay: float = 0.05,
                     seed: int = 0, progress: bool | None = None) -> list[float]:
    """Run the model, without a gradient of its own, and let the observer's predictors learn; the loss of each step.

    Raises:
        ValueError: no layer was seen that the method is for.
    """
    own_loop = callable(batches) and not hasattr(batches, "__iter__")
    batches = [batches] if own_loop else several(batches)
    steps, losses = epochs * len(batches), []
    optimizer: torch.optim.Optimizer | None = None
    known: set[int] = set()
    with with_gradients(), torch.no_grad(), own_random_state(seed), evaluating(model), \
            attach(model, observer, layers) as attached, bar("calibrating", steps, progress) as progress_bar:
        observer.layers = len(attached.chosen)
        for step in range(steps):
            if step % len(batches) == 0:
                remaining = iter(batches)  # anew: a DataLoader shuffles
            batch = next(remaining)
            observer.loss = 0.0
            batch(attached) if own_loop else run_model(model, batch)
            new = [p for layer in observer.predictors.keys() - known for p in observer.predictors[layer].parameters()]
            known |= observer.predictors.keys()
            if not known:
                raise ValueError("batches: expected bidirectional self-attention without masks and with more tokens "
                                 f"than prefix_tokens={observer.prefix}, got none (exact calls: "
                                 f"{', '.join(sorted(observer.passed)) or 'none'})")
            if optimizer is None:
                optimizer = torch.optim.AdamW(new, lr=lr[0], weight_decay=weight_decay)
            elif new:
                optimizer.add_param_group({"params": new})
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, lr, warmup)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(observer.loss)
            progress_bar.set_postfix(loss=f"{observer.loss:.3g}", refresh=False)
            progress_bar.update()
    return losses


# ----------------------------------------------------------------------------------------------------- second stage
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the second stage takes from a model; what is None takes no part.

    Attributes:
        loss: of the task itself, a scalar (cross-entropy).
        logits: (B, classes).
        features: (B, patches, width), of the last layer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


def transformers_outputs(model: Any, batch: Mapping[str, Any], prefix: int) -> Outputs:
    """The outputs of a transformers model; its loss where the batch has ``labels``."""
    out = model(**batch, output_hidden_states=True)
    hidden = getattr(out, "hidden_states", None)
    features = hidden[-1] if hidden else getattr(out, "last_hidden_state", None)
    return Outputs(getattr(out, "loss", None), getattr(out, "logits", None),
                   None if features is None or features.dim() != 3 else features[:, prefix:])


def distill(model: nn.Module, backend: RowKeys, batches: Any, teacher: nn.Module | None = None, *,
            outputs: Callable[[Any, Any], Outputs] | None = None, layers: Any = None, epochs: int = 45,
            lr: tuple[float, float] = (8e-5, 2e-6), weight_decay: float = 0.05, kl: float = 0.5, mse: float = 0.5,
            progress: bool | None = None) -> list[float]:
    """Adapt a model in place to the masks of a backend, with a dense teacher; the loss of each step.

    The loss is that of the task, plus ``kl`` times ``F.kl_div`` of the log-probabilities of student and teacher in
    this order (authors' code), plus ``mse`` times the mean squared difference of the last features of the patches.

    Args:
        model: changes where its parameters ask for gradients; it stays in its mode, so call ``model.train()`` before
            if you want that. Attention dropout would make its layers exact.
        backend: how it attends; its own parameters stay as they are.
        batches: a dictionary of the model's arguments, or several, with ``labels`` for the loss of the task.
        teacher: the dense model; None: the model as it is now.
        outputs: ``outputs(model, batch)`` runs a model and says what to compare; None: as transformers models answer.
        layers: as for :func:`looseleaf.attach`.
        epochs: how often ``batches`` are gone through.
        lr: the first and the last learning rate, along a cosine.
        weight_decay: of AdamW.
        kl, mse: weights of logits and features.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: the model gives neither loss nor logits nor features; nothing in it may change.
    """
    batches = several(batches)
    teacher = copy.deepcopy(model) if teacher is None else teacher
    answer = outputs or (lambda model, batch: transformers_outputs(model, batch, backend.prefix_tokens))
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("model: expected parameters that ask for gradients, got none: call model.requires_grad_(True)")
    optimizer = torch.optim.AdamW(learned, lr=lr[0], weight_decay=weight_decay)
    steps = epochs * len(batches)
    losses: list[float] = []
    with with_gradients(), evaluating(teacher), frozen(nn.ModuleList(backend.modules.values())), \
            attach(model, backend, layers), bar("fine-tuning", steps, progress) as progress_bar:
        for _ in range(epochs):
            for batch in batches:
                with torch.no_grad():
                    theirs = answer(teacher, batch)
                loss = distillation_loss(answer(model, batch), theirs, kl, mse)
                for group in optimizer.param_groups:
                    group["lr"] = rate(len(losses), steps, lr, 0.0)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
                progress_bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
                progress_bar.update()
    optimizer.zero_grad()
    return losses


def distillation_loss(ours: Outputs, theirs: Outputs, kl: float = 0.5, mse: float = 0.5) -> Tensor:
    """The loss of the second stage, a scalar.

    Raises:
        ValueError: there is nothing to compare.
    """
    parts = [] if ours.loss is None else [ours.loss]
    if ours.logits is not None and theirs.logits is not None and kl:
        parts.append(kl * F.kl_div(F.log_softmax(ours.logits, -1), F.log_softmax(theirs.logits, -1),
                                   reduction="batchmean", log_target=True))
    if ours.features is not None and theirs.features is not None and mse:
        parts.append(mse * F.mse_loss(ours.features, theirs.features))
    if not parts:
        raise ValueError("outputs: expected a loss, logits or features of the model, got none of them: pass outputs=, "
                         "a function of model and batch that gives Outputs")
    return torch.stack([part.float() for part in parts]).sum()


__all__ = ["Observer", "Outputs", "distill", "distillation_loss", "run_model", "train_predictors"]
