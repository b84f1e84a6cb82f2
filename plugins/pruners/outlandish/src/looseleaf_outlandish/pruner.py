"""Ignore-top-k: drop the largest entries of what training does to the weights, keep the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from looseleaf import Masks, Paper, Pruner, Selection, Unstructured
from looseleaf_outlandish.paper import PAPER
from looseleaf_outlandish.updates import Update, check_finite, drop_largest, of_model, optimised


@dataclass(frozen=True)
class Everything(Selection):
    """The rule that removes all; :class:`looseleaf.Unstructured` stops short of it."""

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`looseleaf.Selection.select`."""
        return Masks({n: torch.zeros(s.shape, dtype=torch.bool, device=s.device) for n, s in scores.items()},
                     self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`looseleaf.Selection.violations`."""
        return [f"{name}: {int(mask.sum())} are kept" for name, mask in masks.items() if mask.any()]


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
class IgnoreTopK(Pruner):
    """Learn a text without priming unrelated contexts: ignore the largest part of each update (arXiv 2504.09522).

    Of the update of each parameter, ``delta = after - before``, exactly ``round(k n)`` of the n entries, those of
    largest magnitude, are put back; of equal magnitudes the first in row-major order goes first. What is kept keeps
    every bit.

    Args:
        k: share of the entries to ignore, 0 (plain training) to 1 (nothing is learned).
        scope: "tensor" ignores the same share of every parameter, "global" compares all of them together.
        when: "step" prunes what each optimiser step does, "end" what the whole training did.
    """

    k: float = 0.08
    scope: Literal["tensor", "global"] = "tensor"
    when: Literal["step", "end"] = "step"
    removes: ClassVar[Literal["weights", "updates", "tokens"]] = "updates"
    paper: ClassVar[Paper] = PAPER

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a state before."""
        from looseleaf.testing.pruners import earlier

        return {"data": earlier}

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        number = isinstance(self.k, (int, float)) and not isinstance(self.k, bool)
        self.check("k", number and 0 <= self.k <= 1, "a number from 0 to 1")
        self.check("scope", self.scope in ("tensor", "global"), "'tensor' or 'global'")
        self.check("when", self.when in ("step", "end"), "'step' or 'end'")

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        """-|delta| of every parameter that requires a gradient, float32 or float64; a tied weight once.

        Args:
            model: after training.
            data: the state before, copied: name -> tensor as in ``state_dict``.

        Raises:
            ValueError: an update with NaN or infinite entries (the parameter is named), or no such state.
        """
        updates = of_model(model, data)
        _check(updates, "Nothing was changed.")
        return {u.name: -u.magnitude() for u in updates}

    def selection(self) -> Selection:
        """The core's rule for ``k`` and ``scope``; the largest updates have the lowest scores and go first."""
        if self.k == 1:
            return Everything()
        return Unstructured(self.k, "layer" if self.scope == "tensor" else "global")

    def apply(self, model: nn.Module, before: Mapping[str, Tensor]) -> Masks:
        """Prune the update of a finished training once, in place.

        Args:
            model: after training.
            before: the state before, copied: name -> tensor as in ``state_dict``.

        Returns:
            What was kept; equal to ``prune(model, before)`` of the model as it was.

        Raises:
            ValueError: as :meth:`score`; the model is not changed then.
        """
        updates = of_model(model, before)
        _check(updates, "Nothing was changed.")
        with torch.no_grad():
            masks, _ = drop_largest(updates, self.k, self.scope)
        return Masks(masks, self.selection().describe())

    def merge(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`apply`, of two states: a new state, ``after`` without the largest entries of its update.

        All floating-point tensors of ``after`` count, buffers too; tensors that share memory there count once.
        Other tensors are copied.

        Raises:
            ValueError: names or shapes differ, or an update has NaN or infinite entries.
        """
        odd = sorted(set(before) ^ set(after))
        if odd:
            raise ValueError(f"the states have different names, such as {odd[0]!r}: both must be of one model")
        made: dict[str, Tensor] = {}
        updates: dict[tuple[Any, ...], Update] = {}
        for name, value in after.items():
            if before[name].shape != value.shape:
                raise ValueError(f"{name!r} has shapes {tuple(before[name].shape)} and {tuple(value.shape)}: both "
                                 "states must be of one model")
            if not value.is_floating_point():
                made[name] = value.detach().clone()
                continue
            place: tuple[Any, ...] = (value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,)
            if place not in updates:
                updates[place] = Update(name, value.detach().clone(), before[name].detach().to(value.device))
            made[name] = updates[place].after
        _check(list(updates.values()), "Nothing was changed.")
        drop_largest(list(updates.values()), self.k, self.scope)
        return made

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

        def remember(wanted: Any = None) -> None:
            updates[:] = [Update(name, p, p.detach().clone()) for name, p in parameters.items()
                          if p.requires_grad and (wanted is None or wanted(p))]

        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A fused optimiser under a GradScaler is called with infinite gradients and skips the step by itself.
            found = getattr(optimizer, "found_inf", None)
            if found is None or not float(found):
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
            found = getattr(optimizer, "found_inf", None)
            if updates and (found is None or not float(found)):
                ignored.dropped += drop_largest(updates, self.k, self.scope)[1]
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
            hint = f", such as its .optimizer, which is {type(inner).__name__}" if inner is not None else ""
            raise ValueError(f"attach(optimizer={type(optimizer).__name__}): allowed is the torch.optim.Optimizer that "
                             f"makes the steps{hint}")
        if isinstance(optimizer, torch.optim.LBFGS) and self.when == "step":
            raise ValueError("attach(optimizer=LBFGS): it learns the curvature from whole steps, so that none may be "
                             "pruned; take a first-order optimiser, or when='end'")
        if optimizer in _ATTACHED:
            raise ValueError("this optimizer is attached already: leave the first `with` block before")
        return optimised(optimizer, model)


def _check(updates: list[Update], so: str) -> None:
    check_finite(((u.name, u.after.detach()) for u in updates), "update", so)
    check_finite(((u.name, u.before) for u in updates), "state before", so)
