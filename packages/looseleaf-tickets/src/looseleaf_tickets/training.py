"""One training of a ticket by a function of the user."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from looseleaf.modes import evaluating, own_random_state, with_gradients
from looseleaf.pruning.applied import applied
from looseleaf.pruning.targets import holders, stored_parameter
from looseleaf_tickets.tickets import Ticket, load_state, snapshot

T = TypeVar("T")
Train = Callable[..., Any]
Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]
EVERY = 64
"""Weights are looked at for NaN after 1, 2, 4, 8, ... and after each so many steps."""


class TrainingRun:
    """Where a training function begins, and how it reports its steps.

    A function with a parameter called ``run`` gets one. It reports its steps in one of three ways, and begins at step
    :attr:`start` in each:

    - ``for step in run.steps(total)``: ``step`` goes from ``run.start`` to ``total - 1``;
    - ``for batch in run.batches(loader, total)``: the same, with the batches of these steps;
    - ``run.step()`` after every step of the optimiser, in a loop of its own.

    torch's, numpy's and Python's global generators are seeded from :attr:`seed` before the training, and again at the
    step that tickets rewind to, in the first training as well: a rewound one draws what the first one drew there.

    Attributes:
        round: how often weights were removed before; 0 is the training of the whole network.
        start: the step to begin at; above 0 for tickets whose weights are from within the first training. Learning-rate
            schedule and order of the data go on from there; the optimiser is a new one.
        seed: what the order of the data should depend on.
        done: steps of the optimiser that the weights have had, those before ``start`` included.
    """

    def __init__(self, model: nn.Module, *, round: int = 0, start: int = 0, seed: int = 0,
                 rewind_to: int | float = 0) -> None:
        self.round, self.start, self.seed, self.done = round, start, seed, start
        self.captured: dict[str, Tensor] | None = None
        self._model, self._rewind = model, rewind_to
        self._total: int | None = None

    @property
    def total(self) -> int | None:
        """Number of steps of a whole training run, where it is known; set it before the first ``step()`` where
        ``rewind_to`` is a fraction."""
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise ValueError(f"total: expected an integer >= 1, got {total!r}")
        if total <= self.start:
            raise ValueError(f"total: expected more than {self.start} steps, where this training begins, got {total}. "
                             "Train for as many steps as the first time")
        self._total = total

    def rewind_step(self) -> int:
        """The step to rewind to.

        Raises:
            ValueError: it is a fraction and the number of steps is not known, or there is no such step.
        """
        if isinstance(self._rewind, int):
            step = self._rewind
        elif not self._rewind:
            step = 0
        elif self._total is None:
            raise ValueError(f"rewind_to={self._rewind} is a fraction of an unknown number of steps: use "
                             "run.steps(total) or run.batches(loader, total), set run.total before the first "
                             "run.step(), or give rewind_to as an integer number of steps")
        else:
            step = round(self._rewind * self._total)
            if not step:
                raise ValueError(f"rewind_to={self._rewind} of {self._total} steps rounds to step 0, the initial "
                                 "weights: give at least one step, or rewind_to=0")
        if self._total is not None and step and step >= self._total:
            raise ValueError(f"rewind_to: expected a step before the last of {self._total}, got {self._rewind}, which "
                             f"is step {step}")
        return step

    def step(self) -> None:
        """Report a step of the optimiser.

        Raises:
            ValueError: a weight is NaN or infinite (parameter, round and step are named); see also
                :meth:`rewind_step`.
        """
        self.done += 1
        here = self.done - self.start
        if here & (here - 1) == 0 or here % EVERY == 0:
            check_numbers(self._model, self.round, self.done)
        if self._rewind and self.done == self.rewind_step():
            check_numbers(self._model, self.round, self.done)
            self.captured = snapshot(self._model)
            seed_all(self.seed, self.done)

    def steps(self, total: int) -> Iterator[int]:
        """The steps of this training, ``start`` to ``total - 1``; each counts once its turn of the loop is over."""
        self.total = total
        while self.done < total:
            before = self.done
            yield before
            if self.done != before:
                raise ValueError("run.step() was called inside run.steps() or run.batches(), which count by "
                                 "themselves: leave it out")
            self.step()

    def batches(self, loader: Iterable[T], total: int) -> Iterator[T]:
        """A batch for each step of this training, from as many epochs of ``loader`` as it takes.

        The order of an epoch depends on :attr:`seed` and the number of the epoch alone. Batches before ``start`` are
        left out, so that a rewound training sees what the first one saw at these steps.

        Args:
            loader: a ``DataLoader`` or a list of batches; its length must be known. Generators of its own, of its
                sampler and of its data set are seeded for each epoch, and a sampler's ``set_epoch`` is called.
            total: number of steps of a whole training.

        Raises:
            ValueError: the loader has no length or is empty.
        """
        if not isinstance(loader, Sized) or not len(loader):
            raise ValueError(f"run.batches: expected a loader of known length with at least one batch, got "
                             f"{type(loader).__name__}: use run.steps(total) and draw the batches yourself")
        size = len(loader)
        epoch: Iterator[T] | None = None
        with own_generators(loader) as seed_them:
            for step in self.steps(total):
                if epoch is None or step % size == 0:
                    with own_random_state(mixed(self.seed, 1 + step // size)):
                        seed_them(self.seed, step // size)
                        epoch = iter(loader)
                        batch = next(epoch)
                    for _ in range(step % size):
                        batch = next(epoch)
                else:
                    batch = next(epoch)
                yield batch


@contextlib.contextmanager
def own_generators(loader: Any) -> Iterator[Callable[[int, int], None]]:
    """What seeds the generators that a loader, its samplers and its data set hold, given a seed and an epoch.

    Those of torch, numpy and Python, and the epoch of samplers that have ``set_epoch``; all come back as they were.
    """
    owners, waiting = {id(loader): loader}, [loader]
    for owner in waiting:
        for name, value in getattr(owner, "__dict__", {}).items():
            inside = value if isinstance(value, (list, tuple)) else [value]
            if name.strip("_") in ("sampler", "batch_sampler", "dataset", "datasets", "data_source", "loader"):
                waiting += [v for v in inside if id(v) not in owners]
                owners.update((id(v), v) for v in inside)
    held = {id(v): v for owner in owners.values() for v in getattr(owner, "__dict__", {}).values()}
    states: list[tuple[Callable[[int], Any], Callable[[], Any]]] = []
    for value in held.values():
        kind = type(value).__name__
        if isinstance(value, torch.Generator):
            states.append((value.manual_seed, functools.partial(value.set_state, value.get_state())))
        elif isinstance(value, random.Random):
            states.append((value.seed, functools.partial(value.setstate, value.getstate())))
        elif kind == "RandomState":
            states.append((value.seed, functools.partial(value.set_state, value.get_state())))
        elif kind == "Generator" and hasattr(value, "bit_generator"):
            bits = value.bit_generator
            states.append((functools.partial(_seed_bits, bits), functools.partial(setattr, bits, "state", bits.state)))
    epochs = [(owner, getattr(owner, "epoch", 0)) for owner in owners.values() if hasattr(owner, "set_epoch")]

    def seed_them(seed: int, epoch: int) -> None:
        for seeding, _ in states:
            seeding(mixed(seed, 1 + epoch))
        for owner, _ in epochs:
            owner.set_epoch(epoch)

    try:
        yield seed_them
    finally:
        for _, restore in states:
            restore()
        for owner, epoch in epochs:
            owner.set_epoch(epoch)


@dataclass
class Trained:
    """What a training gave.

    Attributes:
        model: a plain model with the trained weights; removed weights are 0.
        metrics: what the training function and ``evaluate`` returned.
        steps: that were reported; 0 where the function reported none.
        captured: the state at the step to rewind to, where one was asked for.
        step: that step.
    """

    model: nn.Module
    metrics: dict[str, float]
    steps: int
    captured: dict[str, Tensor] | None = None
    step: int = 0


def train_ticket(ticket: Ticket, model: nn.Module, train: Train, evaluate: Evaluate | None = None, *, seed: int = 0,
                 rewind_to: int | float = 0) -> Trained:
    """Train a ticket on a copy of ``model``, which is not changed.

    Args:
        ticket: what to train.
        model: its architecture; all values come from the ticket.
        train: ``train(model)`` or ``train(model, run)`` trains the model in place, under the masks; see
            :class:`TrainingRun`. It must make its optimiser itself, since the model is a new copy each time. It may
            return numbers by name, which become metrics.
        evaluate: ``evaluate(model)`` gives a number (called ``score``) or numbers by name; the model is in evaluation
            mode and no gradients are recorded.
        seed: of the global random generators during the training, and ``run.seed``.
        rewind_to: for the first training, the step (int) or fraction of the training (float) to keep the state of.

    Raises:
        ValueError: the ticket is for another model; the training function changed nothing, took the masks off, did
            not reach the step to rewind to or reports no steps; weights became NaN or infinite.
    """
    reports = takes_run(train)
    if (rewind_to or ticket.step) and not reports:
        raise ValueError("rewinding needs to know the steps of the training: give the training function a parameter "
                         "called run, as in `def train(model, run)`, and loop over run.steps(total) or "
                         "run.batches(loader, total), or begin at run.start and call run.step() after each step of the "
                         "optimiser")
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.grad = None
    masked = bool(ticket.masks.removed())
    if masked:
        ticket.apply(copied)
    else:
        ticket.masks.places(copied)
        load_state(copied, ticket.start)
    run = TrainingRun(copied, round=ticket.round, start=ticket.step, seed=seed, rewind_to=rewind_to)
    with own_random_state(mixed(seed, ticket.step)), with_gradients():
        returned = train(copied, run=run) if reports else train(copied)
    check_numbers(copied, ticket.round, run.done)
    if masked:
        for name, places in ticket.masks.places(copied).items():
            if any(applied(*place) is None for place in places):
                raise ValueError(f"the training function took the mask of {name!r} off: it must leave the masks on")
        ticket.masks.make_permanent(copied)
    for parameter in copied.parameters():
        parameter.grad = None
    _changed(copied, ticket)
    if rewind_to and run.captured is None:
        raise ValueError(f"rewind_to={rewind_to!r}: " + (
            "the training function reported no step; loop over run.steps(total) or run.batches(loader, total), or call "
            "run.step() after each step of the optimiser" if not run.done else
            f"the training ended after {run.done} steps, before step {run.rewind_step()}"))
    if ticket.step and run.done == run.start:
        raise ValueError("the training function reported no step: it must begin at run.start, and loop over "
                         "run.steps(total) or run.batches(loader, total), or call run.step()")
    metrics = _numbers(returned, copied, "train")
    if evaluate is not None:
        with evaluating(copied), torch.no_grad(), own_random_state(mixed(seed, 0)):
            scores = _numbers(evaluate(copied), copied, "evaluate")
        twice = sorted(set(scores) & set(metrics))
        if twice:
            raise ValueError(f"both train and evaluate give a metric called {twice[0]!r}: give one another name")
        metrics.update(scores)
    return Trained(copied, metrics, run.done, run.captured, run.rewind_step() if run.captured is not None else 0)


def takes_run(train: Train) -> bool:
    """Whether a training function has a parameter called ``run``.

    Raises:
        ValueError: it is no function.
    """
    if not callable(train) or isinstance(train, nn.Module):
        raise ValueError(
            f"expected a training function, got {type(train).__name__}: weights are removed between trainings. Write "
            "`def train(model): ...`, which makes an optimiser and trains the model in place, and pass it as in "
            "prune(model, data=train) or find(model, train)")
    try:
        return "run" in inspect.signature(train).parameters
    except (TypeError, ValueError):  # some callables of C have no signature
        return False


def check_numbers(model: nn.Module, round: int, step: int) -> None:
    """Raise ValueError when a parameter is NaN or infinite; the first is named, and whether its gradient is, too."""
    parameters = {name: stored_parameter(*found[0]) for name, found in holders(model).items()}
    wrong = [name for name, p in parameters.items() if p.is_floating_point() and not _finite(p.detach())]
    if not wrong:
        return
    gradient = parameters[wrong[0]].grad
    cause = ", as is its gradient" if gradient is not None and not _finite(gradient) else ""
    when = f"after {step} steps " if step else ""
    raise ValueError(f"round {round}: {when}the weights of {wrong[0]!r} are NaN or infinite{cause} ({len(wrong)} of "
                     f"{len(parameters)} parameters are): lower the learning rate, clip gradients, or check the loss. "
                     "Rounds before this one are kept where a state folder was given")


def _seed_bits(bits: Any, seed: int) -> None:
    bits.state = type(bits)(seed).state


def seed_all(seed: int, step: int) -> None:
    """Seed the global generators from ``seed`` and a step of the training; for step 0 with ``seed`` itself."""
    import numpy

    value = mixed(seed, step)
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def mixed(seed: int, number: int) -> int:
    """A seed below 2^32 made of a seed and a number; ``seed`` itself for number 0."""
    return (seed + number * 1_000_003) % 2 ** 32


def _finite(tensor: Tensor) -> bool:
    return not tensor.numel() or bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def _changed(model: nn.Module, ticket: Ticket) -> None:
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if name not in ticket.start:
            return
        begun = ticket.start[name].to(parameter.device)
        if name in ticket.masks:
            begun = torch.where(ticket.masks[name].to(parameter.device), begun, torch.zeros_like(begun))
        if not torch.equal(parameter.detach(), begun):
            return
    raise ValueError(f"round {ticket.round}: the training function changed no weight: it must train the model that it "
                     "is given (a new copy each round), with an optimiser that it makes itself")


def _numbers(returned: Any, model: nn.Module, who: str) -> dict[str, float]:
    """What a user's function returned, as numbers by name."""
    if returned is None or returned is model:
        if who == "evaluate":
            raise ValueError("evaluate: expected a number, or numbers by name, got nothing")
        return {}
    if who == "evaluate" and not isinstance(returned, Mapping):
        returned = {"score": returned}
    if isinstance(returned, nn.Module):
        raise ValueError("the training function returned another model: expected the one that it is given, trained in "
                         "place")
    try:
        numbers = {str(name): float(value) for name, value in returned.items()}
    except (AttributeError, TypeError, ValueError):
        expected = "a number, or numbers by name" if who == "evaluate" else "None, or numbers by name"
        raise ValueError(f"{who}: expected {expected}, got {type(returned).__name__}") from None
    wrong = [name for name, value in numbers.items() if math.isnan(value)]
    if wrong:
        raise ValueError(f"{who}: expected numbers, got NaN for {wrong[0]!r}")
    return numbers
