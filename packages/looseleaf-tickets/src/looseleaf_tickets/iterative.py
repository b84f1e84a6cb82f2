"""Iterative magnitude pruning: train, remove the smallest weights, rewind the others, and repeat."""

from __future__ import annotations

import dataclasses
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from looseleaf import Masks, Selection, Unstructured, WeightPruner, prunable_parameters
from looseleaf.fingerprint import fingerprint
from looseleaf.plugin import In
from looseleaf.progress import track
from looseleaf.pruning.applied import applied
from looseleaf.pruning.targets import check_finite, computed, holders, model_facts, named_by, stored_parameter
from looseleaf.resume import as_plain
from looseleaf_tickets.tickets import Ticket, TicketFolder, snapshot
from looseleaf_tickets.training import Evaluate, Train, Trained, takes_run, train_ticket


def find_tickets(model: nn.Module, train: Train, rules: Sequence[Selection], *, evaluate: Evaluate | None = None,
                 weights: Iterable[str] | None = None, rewind_to: int | float = 0, seed: int = 0,
                 state: str | os.PathLike[str] | None = None, train_last: bool = True,
                 progress: bool | None = None) -> list[Ticket]:
    """Iterative magnitude pruning. ``model`` is not changed.

    The whole network is trained; then, round by round, a rule removes the weights of smallest magnitude, those that are
    left go back to their values at the start (or at step ``rewind_to`` of the first training), and the sub-network is
    trained from there with an optimiser of its own. What is removed stays removed.

    Args:
        model: with the initial weights.
        train: ``train(model)`` or ``train(model, run)``, see :func:`looseleaf_tickets.train_ticket`.
        rules: one for each round, with rising sparsities.
        evaluate: gives the metrics of a trained ticket, see :func:`looseleaf_tickets.train_ticket`.
        weights: names of the parameters to prune; None: ``prunable_parameters(model)``.
        rewind_to: step of the first training (int), or fraction of it (float in [0, 1)), whose weights tickets begin
            from; 0: the initial weights.
        seed: random seed of each training run, and ``run.seed``.
        state: folder of this search alone. Each finished round is kept there, and the same call goes on after the last
            one with the same result as if it had not been interrupted, given a training function that is
            deterministic. ``train`` and ``evaluate`` are not compared: give another folder when they change.
        train_last: train the tickets of the last round too, so that they have metrics.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        Tickets of rounds 0 (the whole network) to ``len(rules)``.

    Raises:
        ValueError: a value out of range; weights of the model that are NaN, or become NaN in training; a rule that
            brings removed weights back; what :func:`looseleaf_tickets.train_ticket` raises; a state of another search.
    """
    return _search(model, train, rules, evaluate=evaluate, weights=weights, rewind_to=rewind_to, seed=seed, state=state,
                   train_last=train_last, progress=progress)[0]


def _search(model: nn.Module, train: Train, rules: Sequence[Selection], *, evaluate: Evaluate | None,
            weights: Iterable[str] | None, rewind_to: int | float, seed: int,
            state: str | os.PathLike[str] | None, train_last: bool, progress: bool | None
            ) -> tuple[list[Ticket], dict[str, Tensor]]:
    """The tickets, and the scores that the last masks were selected by (empty where they were read from ``state``)."""
    takes_run(train)
    check_rewind("rewind_to", rewind_to)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
    names = _checked(model, list(prunable_parameters(model)) if weights is None else list(weights))
    folder = TicketFolder(state, {
        "rules": [as_plain(rule.describe()) for rule in rules], "weights": names, "rewind_to": rewind_to, "seed": seed,
        "model": fingerprint(model)})
    whole = Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in _parameters(model, names).items()})
    whole.metadata.update(model_facts(model, whole), round=0)
    tickets, scores, first = [Ticket(whole, snapshot(model))], dict[str, Tensor](), 0
    last = len(rules) if train_last else len(rules) - 1
    for round in track(range(last + 1), "trainings", show=progress):
        ticket = tickets[round]
        known, following = folder.trained(round), folder.masks(round + 1) if round < len(rules) else None
        done = known is not None and (round == len(rules) or following is not None)
        if done:
            assert known is not None
            ticket.metrics, steps = known["metrics"], known["steps"]
            start, step = folder.start() if round == 0 else (ticket.start, ticket.step)
        else:
            trained = train_ticket(ticket, model, train, evaluate, seed=seed, rewind_to=0 if round else rewind_to)
            ticket.metrics, steps = trained.metrics, trained.steps
            start, step = ticket.start, ticket.step
            if round == 0:
                start, step = trained.captured or start, trained.step
                folder.keep_start(start, step)
            elif step and steps == first + step:
                raise ValueError(f"round {round}: {steps - step} steps were taken from step {step} on, as many as in "
                                 f"the first training from step 0: begin at run.start, so that the training ends at "
                                 f"step {first} again")
            if round < len(rules):
                following, scores = _pruned(trained, ticket, rules[round], model)
                folder.keep_masks(round + 1, following)
            folder.keep_trained(round, ticket.metrics, steps)
        first = steps if round == 0 else first
        if following is not None:
            tickets.append(Ticket(following, start, round + 1, step))
    return tickets, scores


def _pruned(trained: Trained, ticket: Ticket, rule: Selection, model: nn.Module) -> tuple[Masks, dict[str, Tensor]]:
    scores = magnitudes(trained.model, ticket.masks)
    masks = rule.select(scores)
    if (masks & ticket.masks) != masks:
        raise ValueError(f"rules: expected rising sparsities, got one for round {ticket.round + 1} that brings back "
                         "weights that were removed")
    masks.metadata.update(model_facts(model, masks), round=ticket.round + 1)
    return masks, scores


def magnitudes(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """|w| of every weight that the masks cover, by name; -1 where it is removed, so that it is removed first again."""
    return {name: p.detach().abs().masked_fill(~masks[name].to(p.device), -1.0)
            for name, p in _parameters(model, masks).items()}


def _parameters(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    places = holders(model)
    return {name: stored_parameter(*places[name][0]) for name in names}


def _checked(model: nn.Module, names: list[str]) -> list[str]:
    """The names, when all of them can be pruned and the model is sound."""
    places = holders(model)
    unknown = [name for name in names if name not in places]
    if unknown or not names:
        raise ValueError(f"weights: expected at least one parameter of this {type(model).__name__}, got "
                         f"{unknown[0] if unknown else names!r}")
    for name, found in places.items():
        parameter = stored_parameter(*found[0])
        if parameter.is_floating_point():
            check_finite(name, parameter.detach(), "weights")
        if applied(*found[0]) or (name in names and any(computed(*place) for place in found)):
            raise ValueError(f"{name!r} carries a mask or a parametrization: take it off first (remove or "
                             "make_permanent of the masks)")
    return names


def check_rewind(field: str, value: Any) -> None:
    """Raise ValueError that names ``field`` unless ``value`` is a step of a training run, or a fraction of one."""
    step = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not step and not (isinstance(value, float) and 0.0 <= value < 1.0):
        raise ValueError(f"{field}: expected a step of the training (an integer >= 0) or a fraction of it (a float in "
                         f"[0, 1)), got {value!r}")


@dataclasses.dataclass(frozen=True)
class Grouped(Selection):
    """A rule for most parameters, and others for some.

    Args:
        rule: for every parameter that no pattern matches.
        others: name pattern of parameters or layers (see :mod:`looseleaf.names`) -> rule; the first that matches
            counts. Each rule sees its own parameters alone.
    """

    rule: Selection
    others: Mapping[str, Selection]

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`Selection.select`. ValueError when a pattern matches no name."""
        kept: dict[str, Tensor] = {}
        for rule, names in self._groups(scores):
            kept.update(rule.select({name: scores[name] for name in names}))
        return Masks({name: kept[name] for name in scores}, self.describe())

    def violations(self, masks: Masks) -> list[str]:
        """See :meth:`Selection.violations`."""
        return [line for rule, names in self._groups(masks)
                for line in rule.violations(Masks({name: masks[name] for name in names}))]

    def for_model(self, model: nn.Module, names: Iterable[str]) -> Grouped:
        """See :meth:`Selection.for_model`."""
        names = list(names)
        return Grouped(self.rule.for_model(model, names),
                       {pattern: rule.for_model(model, names) for pattern, rule in self.others.items()})

    def describe(self) -> dict[str, Any]:
        """See :meth:`Selection.describe`."""
        return {**self.rule.describe(), "others": {p: rule.describe() for p, rule in self.others.items()}}

    def _groups(self, names: Iterable[str]) -> list[tuple[Selection, list[str]]]:
        rest = list(names)
        groups = []
        for pattern, rule in self.others.items():
            group = named_by(pattern, rest)
            if not group:
                raise ValueError(f"the pattern {pattern!r} matches none of {list(names)[:3]}, ...: leave it out")
            groups.append((rule, group))
            rest = [name for name in rest if name not in group]
        return [(self.rule, rest), *groups] if rest else groups


@dataclasses.dataclass
class IterativePruner(WeightPruner):
    """What methods of iterative magnitude pruning share: the schedule, and ``find`` on top of :func:`find_tickets`.

    After i rounds ``(1 - fraction)^i`` of the weights are left, to the weight: ``round((1 - (1 - fraction)^i) * n)`` of
    n are removed.

    Args:
        rounds: how often weights are removed; None: as often as ``sparsity`` needs, or 8 times without one. With
            ``sparsity``: the most rounds to make.
        fraction: fraction of the remaining weights that goes in a round, in (0, 1).
        sparsity: fraction of the weights to remove in all, in [0, 1); the last round then removes only what is missing.
        scope: "global" compares all weights together, "layer" removes the same fraction of each parameter.
        half_rate_layers: patterns of layers that are pruned at half of ``fraction``, and apart from the others.
        targets: patterns of the weights to prune; None: every Linear and convolution of the body, without the output
            head.
        exclude: patterns of weights to leave out.
        seed: random seed of each training run.
    """

    rounds: Annotated[int | None, In(">= 1")] = None
    fraction: Annotated[float, In("(0, 1)")] = 0.2
    sparsity: Annotated[float | None, In("[0, 1)")] = None
    scope: Literal["global", "layer"] = "global"
    half_rate_layers: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    seed: int = 0

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a training function, and two rounds."""
        return {"make": lambda: cls(rounds=2), "data": _small_training}

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`. Also ValueError when the rounds do not reach the sparsity."""
        for name in ("half_rate_layers", "targets", "exclude"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
            setattr(self, name, value)
            self.check(name, value is None or (isinstance(value, tuple) and len(value) > 0 and all(
                isinstance(p, str) and p for p in value)), "None or name patterns such as ('layers.*.mlp',)")
        needed = self._needed()
        if self.rounds is not None and needed > self.rounds:
            reached = 1 - (1 - self.fraction) ** self.rounds
            self.check("rounds", False, f"None or at least {needed} (with fraction={self.fraction}, {self.rounds} "
                                        f"rounds reach sparsity {reached:.4g}, not {self.sparsity})")

    def _needed(self) -> int:
        """Rounds to the sparsity that is asked for, or those asked for."""
        if self.sparsity is None:
            return 8 if self.rounds is None else self.rounds
        return math.ceil(math.log1p(-self.sparsity) / math.log1p(-self.fraction) - 1e-9)

    def rules(self) -> list[Selection]:
        """The rule of each round."""
        count = self._needed()
        made: list[Selection] = []
        for i in range(1, count + 1):
            level, times = 1 - (1 - self.fraction) ** i, float(i)
            if i == count and self.sparsity is not None:
                level, times = self.sparsity, math.log1p(-self.sparsity) / math.log1p(-self.fraction)
            made.append(self._rule(level, 1 - (1 - self.fraction / 2) ** times))
        return made

    def _rule(self, level: float, slower: float) -> Selection:
        rule = Unstructured(level, self.scope)
        if not self.half_rate_layers:
            return rule
        return Grouped(rule, {p: Unstructured(slower, self.scope) for p in self.half_rate_layers})

    def selection(self) -> Selection:
        """The rule of the last round."""
        made = self.rules()
        return made[-1] if made else self._rule(0.0, 0.0)

    @abstractmethod
    def rewinding(self) -> int | float:
        """The step of the first training that weights go back to (int), or a fraction of it (float)."""

    def find(self, model: nn.Module, train: Train, evaluate: Evaluate | None = None, *,
             state: str | os.PathLike[str] | None = None, progress: bool | None = None) -> list[Ticket]:
        """All tickets, of rounds 0 (the whole network) to the last; ``model`` is not changed.

        Args:
            model: with the initial weights.
            train: ``train(model)`` or ``train(model, run)`` trains the model in place; see
                :class:`looseleaf_tickets.TrainingRun`.
            evaluate: ``evaluate(model)`` gives a number or numbers by name, the metrics of a ticket.
            state: folder of this search alone: a killed search goes on after the last finished round with the same
                result.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: as :func:`looseleaf_tickets.find_tickets`; patterns that match nothing.
        """
        return find_tickets(model, train, self.rules(), evaluate=evaluate, weights=self._weights(model),
                            rewind_to=self.rewinding(), seed=self.seed, state=state, progress=progress)

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        """Magnitudes after the last training that masks are made from; -1 for what was removed before.

        Args:
            model: with the initial weights; not changed.
            data: the training function, see :meth:`find`.
        """
        return self._last(model, data)[1]

    def prune(self, model: nn.Module, data: Any = None) -> Masks:
        """The masks of the last round; see :meth:`find` for all tickets. ``model`` is not changed.

        Args:
            model: with the initial weights.
            data: the training function, see :meth:`find`.
        """
        return self._last(model, data)[0]

    def _last(self, model: nn.Module, train: Train) -> tuple[Masks, dict[str, Tensor]]:
        tickets, scores = _search(
            model, train, self.rules(), evaluate=None, weights=self._weights(model), rewind_to=self.rewinding(),
            seed=self.seed, state=None, train_last=False, progress=None)
        return tickets[-1].masks, scores or magnitudes(model, tickets[0].masks)

    def _weights(self, model: nn.Module) -> list[str]:
        chosen = list(prunable_parameters(model, self.targets, self.exclude))
        slow = list(prunable_parameters(model, self.half_rate_layers)) if self.half_rate_layers else []
        return chosen + [name for name in slow if name not in chosen]


def _small_training(model: nn.Module) -> Train:
    """What trains a model of the conformance kit for 20 steps of Adam."""
    from looseleaf.testing.pruners import inputs_for

    inputs = inputs_for(model)

    def train(model: nn.Module, run: Any) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in run.steps(20):
            optimizer.zero_grad()
            out: Any = model(inputs)
            getattr(out, "logits", out).square().mean().backward()
            optimizer.step()

    return train
