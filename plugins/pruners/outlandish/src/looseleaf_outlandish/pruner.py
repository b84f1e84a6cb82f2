"""Ignore-top-k: drop the largest entries of what training does to the weights, keep the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from looseleaf import Masks, Paper, UpdatePruner
from looseleaf.plugin import In
from looseleaf_outlandish.updates import Update, check_finite, of_model, of_states, optimised, smallest


@dataclass
class Ignored:
    """What :meth:`IgnoreTopK.attach` has done so far.

    Attributes:
        steps: updates that were pruned; steps that a GradScaler skips do not count.
        entries: entries of those updates.
        dropped: how many of them were put back.
    """

    steps: int = 0
    entries: int = 0
    dropped: int = 0


_ATTACHED: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclasses.dataclass
class IgnoreTopK(UpdatePruner):
    """Learn a text without priming unrelated contexts: ignore the largest part of each update (arXiv 2504.09522).

    Of the update of each parameter, ``delta = after - before``, exactly ``round(k n)`` of the n entries, those of
    largest magnitude, are put back; of equal magnitudes the first in row-major order goes first. What is kept keeps
    every bit.

    Args:
        k: fraction of the entries to ignore, in [0, 1]; 0 is plain training, with 1 nothing is learned. [paper: 0.08]
        scope: "tensor" ignores the same fraction of every parameter, "global" compares all of them together.
        when: "step" prunes what each optimiser step does, "end" what the whole training did; see :meth:`attach`.
    """

    k: Annotated[float, In("[0, 1]")] = 0.08
    scope: Literal["tensor", "global"] = "tensor"
    when: Literal["step", "end"] = "step"

    paper: ClassVar[Paper] = Paper(
        title="How new data permeates LLM knowledge and how to dilute it",
        authors=("Chen Sun", "Renat Aksitov", "Andrey Zhmoginov", "Nolan Andrew Miller", "Max Vladymyrov",
                 "Ulrich Rueckert", "Been Kim", "Mark Sandler"), year=2025, arxiv="2504.09522", venue="ICLR 2025",
        summary="Teach a model a new fact without the fact leaking into unrelated contexts, and measure how far it "
                "leaks.")

    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Masks:
        """Which entries of ``after - before`` are kept, of all floating-point tensors, buffers too.

        Args:
            before: values by name, as in ``state_dict``.
            after: values of the same names and shapes; tensors that share memory count once, under their first name.

        Raises:
            ValueError: names or shapes differ, or an update has NaN or infinite entries (the parameter is named).
        """
        return self._described(self._kept(list({u.name: u for u in of_states(before, after).values()}.values())))

    def merge(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A new state: ``after`` without the largest entries of its update. What is not floating-point is copied.

        Raises:
            ValueError: as :meth:`keep`.
        """
        named = of_states(before, after)
        updates = {u.name: u for u in named.values()}
        kept = self._kept(list(updates.values()))
        merged = {name: torch.where(kept[name], u.after, u.before) for name, u in updates.items()}
        return {name: merged[named[name].name] if name in named else value.detach().clone()
                for name, value in after.items()}

    def apply(self, model: nn.Module, before: Mapping[str, Tensor]) -> Masks:
        """Prune the update of a finished training once, in place.

        Args:
            model: after training.
            before: the state before, copied: name -> tensor as in ``state_dict``; of every parameter that requires a
                gradient, a tied one once.

        Returns:
            What was kept.

        Raises:
            ValueError: no such state, or an update with NaN or infinite entries (the parameter is named); the model is
                not changed then.
        """
        updates = of_model(model, before)
        kept = self._kept(updates)
        self._put_back(updates, kept)
        return self._described(kept)

    def _kept(self, updates: list[Update]) -> dict[str, Tensor]:
        for what, named in (("update", [(u.name, u.after.detach()) for u in updates]),
                            ("state before", [(u.name, u.before) for u in updates])):
            check_finite(named, what, "Nothing was changed.")
        return smallest(updates, self.k, self.scope)

    def _described(self, kept: Mapping[str, Tensor]) -> Masks:
        return Masks(kept, {"plugin": "outlandish", "k": self.k, "scope": self.scope})

    @torch.no_grad()
    def _put_back(self, updates: list[Update], kept: Mapping[str, Tensor]) -> None:
        for update in updates:
            if self.k:
                update.put_back(kept[update.name])

    @contextlib.contextmanager
    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> Iterator[Ignored]:
        """Prune what ``optimizer`` does, within a ``with`` block.

        Works with any optimiser of torch, as it looks at the weights alone: before and after each step, or at the
        beginning and the end of the block (``when="end"``; not after an exception). Keeps one copy of the weights.

        Args:
            optimizer: whose steps are pruned.
            model: gives the parameters their names in errors.

        Raises:
            ValueError: here, for an optimiser that this cannot work with; in ``step()``, for a gradient or an update
                with NaN or infinite entries. The parameter is named and the weights are what they were before the step.
        """
        parameters = self._check_optimizer(optimizer, model)
        ignored = Ignored()
        updates: list[Update] = []

        def remember(condition: Any = None) -> None:
            updates[:] = [Update(name, p, p.detach().clone()) for name, p in parameters.items()
                          if p.requires_grad and (condition is None or condition(p))]

        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A fused optimiser under a GradScaler is called with infinite gradients and skips the step by itself.
            overflow = getattr(optimizer, "found_inf", None)
            if overflow is None or not float(overflow):
                check_finite(((n, p.grad) for n, p in parameters.items() if p.grad is not None), "gradient",
                             "The step was not made.")
            closure = args[0] if args else kwargs.get("closure")
            # a closure makes its gradients later
            remember(None if closure is not None else lambda p: p.grad is not None)

        @torch.no_grad()
        def end(*_: Any) -> None:
            try:
                check_finite(((u.name, u.after.detach()) for u in updates), "update", "The weights were put back.")
            except ValueError:
                for update in updates:
                    update.after.copy_(update.before)
                updates.clear()
                raise
            overflow = getattr(optimizer, "found_inf", None)
            if updates and (overflow is None or not float(overflow)):
                kept = smallest(updates, self.k, self.scope)
                self._put_back(updates, kept)
                ignored.dropped += sum(mask.numel() - int(mask.sum()) for mask in kept.values())
                ignored.entries += sum(u.after.numel() for u in updates)
                ignored.steps += 1
            updates.clear()

        handles: list[Any] = []
        _ATTACHED.add(optimizer)
        try:
            if self.when == "end":
                remember()
                yield ignored
                end()
            else:
                handles = [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
                yield ignored
        finally:
            for handle in handles:
                handle.remove()
            _ATTACHED.discard(optimizer)

    def _check_optimizer(self, optimizer: Any, model: nn.Module | None) -> dict[str, nn.Parameter]:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(inner, torch.optim.Optimizer):
            hint = f": give its .optimizer, which is {type(inner).__name__}" if inner is not None else ""
            raise ValueError("attach: expected the torch.optim.Optimizer that makes the steps, got "
                             f"{type(optimizer).__name__}{hint}")
        if isinstance(optimizer, torch.optim.LBFGS) and self.when == "step":
            raise ValueError("attach(optimizer=LBFGS): it learns the curvature from whole steps, so that none may be "
                             "pruned; take a first-order optimiser, or when='end'")
        if optimizer in _ATTACHED:
            raise ValueError("this optimizer is attached already: leave the first `with` block before")
        return optimised(optimizer, model)
