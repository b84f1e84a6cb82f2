"""The one loop that trains small models; models of users are trained by transformers' ``Trainer``, TRL or PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any

import torch

from looseleaf.modes import evaluating, training, with_gradients
from looseleaf.progress import bar

if TYPE_CHECKING:
    from torch import Tensor, nn

Optimizer = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


def fit(model: nn.Module, loss: Callable[[int], Tensor], *, steps: int | Iterable[int], optimizer: Optimizer,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None, factor: Callable[[int], float] | None = None,
        clip: float | None = None, every: int = 0, watch: Callable[[int], None] | None = None,
        label: str = "training", progress: bool | None = None) -> list[float]:
    """Train ``model`` in place and give the loss of each step.

    Random numbers are drawn by ``loss`` alone, in the order in which it is called, so that a loop written by hand
    gives the same numbers. The model is in training mode meanwhile; every submodule's own mode comes back.

    ```python
    draw = torch.Generator().manual_seed(seed)

    def loss(step):
        rows = torch.randint(0, len(x), (64,), generator=draw)
        return cross_entropy(model(x[rows]), y[rows])

    fit(model, loss, steps=200, optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    ```

    Args:
        model: what is trained; parameters that ask for no gradient stay as they are.
        loss: step -> a scalar with a gradient; draws its batch and runs the model.
        steps: how many, or their numbers, such as ``run.steps(total)`` of a :class:`looseleaf_tickets.TrainingRun`.
        optimizer: an optimiser, or a function that makes one of ``model.parameters()``.
        schedule: makes a scheduler of torch of the optimiser; it makes a step after each of the optimiser's.
        factor: step -> what the first learning rate of each parameter group is multiplied by.
        clip: largest norm of the gradients of all parameters together.
        every, watch: ``watch(done)`` is called after each ``every`` steps, counted from step 0, with the model in
            evaluation mode and no gradients: the place for validation.
        label: of the progress bar.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no steps, or a loss that is not finite; the weights are those before that step.
    """
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {steps}")
        steps = range(steps)
    worker = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model.parameters())
    scheduler = schedule(worker) if schedule is not None else None
    rates = [group["lr"] for group in worker.param_groups]
    losses: list[float] = []
    count = len(steps) if isinstance(steps, Sized) else None
    with with_gradients(), training(model), bar(label, count, progress) as progress_bar:
        for step in steps:
            if factor is not None:
                for group, rate in zip(worker.param_groups, rates, strict=True):
                    group["lr"] = rate * factor(step)
            value = loss(step)
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {step}: expected a finite loss, got {losses[-1]}: lower the learning rate, "
                                 "clip gradients, or mend the loss")
            worker.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            worker.step()
            if scheduler is not None:
                scheduler.step()
            if watch is not None and every and (step + 1) % every == 0:
                with evaluating(model), torch.no_grad():
                    watch(step + 1)
            progress_bar.set_postfix(loss=f"{losses[-1]:.3g}", refresh=False)
            progress_bar.update()
    return losses


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """A learning rate that rises for a twentieth of the steps and then falls to zero along half a cosine."""
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    warmup = max(1, steps // 20)
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / warmup, total_iters=warmup),
                                    CosineAnnealingLR(optimizer, max(1, steps - warmup))], [warmup])


__all__ = ["fit", "warmup_cosine"]
