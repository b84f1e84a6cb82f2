"""The probe: rival pre-trainings of your encoder on your demonstrations, and what each is worth on a new task."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf import Paper, Probe, Report, Series
from looseleaf.files import load_tensors, save_tensors
from looseleaf.fingerprint import content_fingerprint, fingerprint
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf.progress import bar
from looseleaf.resume import as_plain
from looseleaf.statistics import bootstrap
from looseleaf_inverse_dynamics.demonstrations import Demonstrations
from looseleaf_inverse_dynamics.linear import LinearWorld, linear_encoder, with_gains
from looseleaf_inverse_dynamics.objectives import OBJECTIVES, Objective, find_objective
from looseleaf_inverse_dynamics.training import (
    action_error,
    agreement,
    feature_size,
    features,
    pretrain,
    rollout,
    transfer,
)

FORMAT = "looseleaf.inverse-dynamics/1"
GIVEN, SCRATCH, STATE = "as given, frozen", "as given, trained with the policy", "true state"
"""Rows without pre-training: the encoder as it came; the same, trained on the few demonstrations; the state itself."""


@dataclasses.dataclass
class InverseDynamics(Probe):
    """Which pre-training on demonstrations without task labels makes a new task need few of them (arXiv 2305.16985).

    Args:
        objectives: names of the paper (ID, BC, FD-e, FD-i, Cont), or objectives of your own.
        sizes: trajectories of the corpus, each its own pre-training; empty: all.
        demonstrations: of the new task, for each transfer.
        repeats: draws of that many demonstrations, over which intervals are taken; at least one trajectory of the new
            task is kept to measure the error on.
        steps: of a pre-training; 100,000 to 200,000 in the authors' code.
        batch: pairs of a step; 256 in the authors' code (128 for FD-e).
        lr: learning rate for 256 pairs, in proportion for others; falls to 0 along a cosine.
        n: steps between the two observations of a pair, for objectives given by name; None: 1, and 0 for BC and Cont.
        policy_steps: of each transfer, 10,000 in the authors' code; and of the MLPs that compare representations.
        tune: train the encoder with the policy; frozen in the paper.
        bounded: the policy's actions are in [-1, 1], by tanh.
        rollouts: in each environment, where one is given; 100 in the paper.
        rollout_steps: at most in each.
        state_dir: folder for finished pre-trainings, so that a killed run goes on; empty: none are kept.
    """

    objectives: tuple[Any, ...] = tuple(OBJECTIVES)
    sizes: tuple[int, ...] = ()
    demonstrations: Annotated[tuple[int, ...], In(">= 1")] = (2, 5, 10)
    repeats: Annotated[int, In(">= 1")] = 5
    steps: Annotated[int, In(">= 1")] = 100_000
    batch: Annotated[int, In(">= 2")] = 256
    lr: Annotated[float, In("> 0")] = 1e-3
    n: Annotated[int | None, In(">= 1")] = None
    policy_steps: Annotated[int, In(">= 1")] = 10_000
    tune: bool = False
    bounded: bool = True
    rollouts: Annotated[int, In(">= 1")] = 100
    rollout_steps: Annotated[int, In(">= 1")] = 500
    state_dir: str = ""
    paper: ClassVar[Paper] = Paper(
        title="Inverse Dynamics Pretraining Learns Good Representations for Multitask Imitation",
        authors=("David Brandfonbrener", "Ofir Nachum", "Joan Bruna"), year=2023, arxiv="2305.16985",
        venue="NeurIPS 2023", code="https://github.com/davidbrandfonbrener/imitation_pretraining",
        summary="Pre-train an encoder by predicting the action between two observations, and see if it is worth it.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A few steps in the linear world, on an encoder that is an MLP."""
        return {"make": lambda: cls(objectives=("ID", "BC"), demonstrations=(2,), repeats=2, steps=4, batch=16,
                                    policy_steps=4, bounded=False),
                "subject": example_encoder}

    def validate(self) -> None:
        self.check("objectives", isinstance(self.objectives, (tuple, list)) and len(self.objectives) > 0
                   and all(isinstance(o, Objective) or o in OBJECTIVES for o in self.objectives),
                   f"some of {', '.join(OBJECTIVES)}, or Objectives")
        self.check("sizes", all(isinstance(s, int) and s >= 2 for s in self.sizes), "integers >= 2, or none")
        self.check("demonstrations", len(self.demonstrations) > 0, "one number or more")

    def named(self) -> dict[str, Objective]:
        """The objectives by the names of their rows."""
        out = {}
        for each in self.objectives:
            objective = find_objective(each)
            if isinstance(each, str):
                fixed = self.n is None or each in ("BC", "Cont")
                out[each] = objective if fixed else dataclasses.replace(objective, n=int(self.n or 1))
            else:  # such as Inverse(n=2)
                other = [f"{f.name}={getattr(each, f.name)!r}" for f in dataclasses.fields(each)
                         if getattr(each, f.name) != getattr(type(each)(), f.name)]
                out[f"{type(each).__name__}({', '.join(other)})"] = objective
        return out

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Pre-train copies of an encoder by each objective, and clone new tasks from few demonstrations on each.

        Args:
            subject: an encoder, from observations (B, ...) to features, see
                :func:`looseleaf_inverse_dynamics.networks.represent`; or ``(encoder, environment)``, a gymnasium
                environment of the new task, a list of them that run side by side, or a dictionary from the new tasks'
                labels to these.
            data: ``(corpus, new)``, two :class:`Demonstrations`, whose labels must not overlap; or labelled ones alone,
                a tenth of whose contexts is held out as new. None: the linear world, for encoders of 32 numbers.
            seed: of everything.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject or other data, such as an encoder that does not take the observations.
            ValueError: too few trajectories, contexts that are not new, and what :func:`pretrain` and
                :func:`transfer` refuse.
        """
        encoder, env = parts(subject)
        corpus, new = split(data, seed, max(self.demonstrations) + 1)
        feature_size(encoder, corpus)
        check_environments(env, new)
        methods, losses = {}, {}
        sizes = sorted({min(size, len(corpus)) for size in self.sizes}) or [len(corpus)]
        order = random.Random(seed).sample(range(len(corpus)), len(corpus))
        with bar("pre-trainings", len(sizes) * len(self.objectives), progress) as progress_bar:
            for size in sizes:
                part = corpus if size == len(corpus) else corpus.take(sorted(order[:size]))
                for name, objective in self.named().items():
                    trained, losses[name] = self._pretrained(encoder, part, objective, seed, progress)
                    methods[name, size] = (trained, self.tune)
                    progress_bar.update()
        methods[GIVEN, 0], methods[SCRATCH, 0] = (encoder, False), (encoder, True)
        if not any(p.requires_grad for p in encoder.parameters()):
            del methods[SCRATCH, 0]
        report = Report("Pre-training on demonstrations", {
            **{k: v for k, v in as_plain(self.hyperparameters()).items() if k not in ("objectives", "state_dir")},
            "objectives": ", ".join(self.named()), "trajectories of the corpus": len(corpus),
            "contexts of the corpus": len(set(corpus.contexts)) if any(corpus.contexts) else "unknown",
            "new": ", ".join(sorted(set(new.contexts)))[:200] or "one task",
            "actions": "choices" if corpus.discrete else "amounts"})
        self._transfers(report, methods, new, env, seed, progress)
        self._representations(report, {name: m for (name, size), (m, _) in methods.items()
                                       if size in (0, max(sizes)) and name != SCRATCH}, corpus, seed)
        report.figure("Losses of the pre-trainings", x_label="step", y_label="loss over its first", series=[
            Series(name, [float(i) for i in range(0, len(values), max(1, len(values) // 100))],
                   [v / max(abs(values[0]), 1e-12) for v in values[::max(1, len(values) // 100)]], style="line")
            for name, values in losses.items()])
        return report

    def _pretrained(self, encoder: nn.Module, corpus: Demonstrations, objective: Objective, seed: int,
                    progress: bool | None) -> tuple[nn.Module, list[float]]:
        """The pre-trained encoder, from ``state_dir`` where it is there."""
        key = content_fingerprint([type(objective).__name__, dataclasses.asdict(objective), fingerprint(encoder),
                                   self.steps, self.batch, self.lr, seed, corpus.observations, corpus.actions])
        path = Path(self.state_dir) / f"{type(objective).__name__}-{key}.safetensors" if self.state_dir else None
        if path is not None and path.exists():
            tensors, info = load_tensors(path, format=FORMAT)
            kept = copy.deepcopy(encoder)
            kept.load_state_dict(tensors)
            return kept.eval(), list(info["losses"])
        result = pretrain(corpus, objective, encoder, steps=self.steps, batch=self.batch, lr=self.lr, seed=seed,
                          progress=progress)
        if path is not None:
            save_tensors(path, result.encoder.state_dict(), {"losses": result.losses}, format=FORMAT)
        return result.encoder, result.losses

    def _transfers(self, report: Report, methods: Mapping[tuple[str, int], tuple[nn.Module, bool]], new: Demonstrations,
                   env: Any, seed: int, progress: bool | None) -> None:
        """The table: method x corpus x demonstrations, means over new contexts, intervals over draws."""
        labels = sorted(set(new.contexts))
        tasks = {label: [i for i, c in enumerate(new.contexts) if c == label] for label in labels}
        rows = dict(methods)
        if new.states is not None:
            rows[STATE, 0] = (nn.Identity(), False)
        table = report.table(
            "Few demonstrations of a new task",
            ["pre-training", "corpus", "demonstrations", "action error", "low", "high",
             *(["success", "success low", "success high"] if env is not None else [])],
            note="action error: on other demonstrations, " + (
                "fraction of choices that are wrong" if new.discrete else "squared error over the variance of actions")
            + f"; means over {len(tasks)} new tasks, intervals over {self.repeats} draws of demonstrations")
        curves: dict[str, list[Any]] = {}
        total = len(rows) * len(self.demonstrations) * self.repeats * len(tasks)
        with bar("transfers", total, progress) as progress_bar:
            for (name, size), (encoder, tune) in rows.items():
                for count in self.demonstrations:
                    errors: list[float] = []
                    successes: list[float] = []
                    for repeat in range(self.repeats):
                        each: list[float] = []
                        won: list[float] = []
                        for label, indices in tasks.items():
                            # the same demonstrations for every method
                            drawn = random.Random(f"{seed} {repeat} {label}").sample(indices, len(indices))
                            few, rest = new.take(drawn[:count]), new.take(drawn[count:])
                            if name == STATE:
                                few, rest = with_states(few), with_states(rest)
                            policy = transfer(encoder, few, tune=tune, steps=self.policy_steps, bounded=self.bounded,
                                              seed=seed + repeat, progress=False)
                            if env is not None and name != STATE:
                                place = env[label] if isinstance(env, Mapping) else env
                                won.append(sum(rollout(policy, place, rollouts=self.rollouts, seed=seed,
                                                       steps=self.rollout_steps)) / self.rollouts)
                            each.append(action_error(policy, rest))
                            progress_bar.update()
                        errors.append(sum(each) / len(each))
                        successes += [sum(won) / len(won)] if won else []
                    error = bootstrap(errors)
                    success = [*bootstrap(successes)] if successes else [None] * 3
                    table.add(name, size, count, *error, *(success if env is not None else []))
                    curves.setdefault(f"{name}, {size} trajectories" if size else name, []).append((count, error))
        report.figure("Action error on the new task", x_label="demonstrations", y_label="action error", series=[
            Series(name, [float(c) for c, _ in points], [e.value for _, e in points], [e.low for _, e in points],
                   [e.high for _, e in points]) for name, points in curves.items()])

    def _representations(self, report: Report, encoders: Mapping[str, nn.Module], corpus: Demonstrations,
                         seed: int) -> None:
        """How well each representation, and the true state, can be predicted from each other one."""
        count = len(corpus)
        some = corpus.take(range(min(count, 200))) if count > 200 else corpus
        known: dict[str, Tensor] = {name: features(encoder, some) for name, encoder in encoders.items()}
        if some.states is not None:
            known[STATE] = some.states
        test = some.trajectory % 4 == 3
        rows = torch.arange(len(test))
        found = agreement(known, rows[~test], rows[test], steps=self.policy_steps, seed=seed)
        report.table("One representation from another", ["from", *known],
                     [[name, *(found[name][target] for target in known)] for name in known],
                     note="fraction of the variance that an MLP explains, on every fourth trajectory")
        report.figure("One representation from another", x_label="predicted", y_label="from",
                      image=[[max(0.0, found[name][target]) for target in known] for name in known],
                      note=f"in order: {', '.join(known)}")


def split(data: Any, seed: int, needed: int) -> tuple[Demonstrations, Demonstrations]:
    """The corpus and the demonstrations of new tasks.

    Args:
        data: as for :meth:`InverseDynamics.run`.
        seed: which contexts are held out.
        needed: trajectories of each new context.
    """
    if data is None:
        return example_demonstrations(seed, needed)
    if isinstance(data, Demonstrations):
        labels = sorted(set(data.contexts))
        if len(labels) < 2:
            raise ValueError(f"data: expected demonstrations of two contexts or more, of which one can be held out, "
                             f"got {len(data)} trajectories of one: give labels (contexts=...), or (corpus, new)")
        data = data.hold_out(random.Random(seed).sample(labels, max(1, len(labels) // 10)))
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not all(isinstance(d, Demonstrations) for d in data):
        raise TypeError("data: expected Demonstrations, or (corpus, new) of them, got "
                        f"{type(data).__name__}: see Demonstrations.from_arrays")
    corpus, new = data
    for name in ("observation_shape", "discrete", "action_size", "history"):
        if getattr(corpus, name) != getattr(new, name):
            raise ValueError(f"new: expected the {name.replace('_', ' ')} {getattr(corpus, name)} of the corpus, got "
                             f"{getattr(new, name)}")
    both = (set(corpus.contexts) & set(new.contexts)) - {""}
    if both:
        raise ValueError(f"new: expected contexts that are not in the corpus, got {', '.join(sorted(both)[:5])} in "
                         f"both: use hold_out")
    few = [c for c in sorted(set(new.contexts)) if new.contexts.count(c) < needed]
    if few:
        raise ValueError(f"new: expected {needed} trajectories or more of each context, one to measure on beside the "
                         f"most that are learned from, got {new.contexts.count(few[0])} of {few[0] or 'the task'!r}: "
                         f"choose fewer demonstrations")
    return corpus, new


def check_environments(env: Any, new: Demonstrations) -> None:
    """Raise TypeError or ValueError unless there are environments, or none, for the new tasks."""
    if isinstance(env, Mapping) and set(new.contexts) - set(env):
        raise ValueError(f"environments: expected one for each of {', '.join(sorted(set(new.contexts)))}, got "
                         f"{', '.join(map(str, env)) or 'none'}")
    several = env.values() if isinstance(env, Mapping) else [env]
    for each in (one for some in several for one in (some if isinstance(some, (list, tuple)) else [some])):
        if each is not None and not (callable(getattr(each, "reset", None)) and callable(getattr(each, "step", None))):
            raise TypeError("subject: expected an encoder, or (encoder, environment) with reset(seed=...) and "
                            f"step(action), got {type(each).__name__} for the environment")


def with_states(demonstrations: Demonstrations) -> Demonstrations:
    """The same with the true state as observation."""
    assert demonstrations.states is not None
    return dataclasses.replace(demonstrations, observations=demonstrations.states)


def example_encoder() -> nn.Module:
    """A linear encoder of the linear world's observations."""
    return linear_encoder(LinearWorld(), k=4)


def example_demonstrations(seed: int, needed: int) -> tuple[Demonstrations, Demonstrations]:
    """The linear world: a corpus of contexts that cancel, and a new context."""
    world = LinearWorld()
    corpus = world.sample(40, seed)
    new = with_gains(world, [[[-0.4, 0.2], [0.1, -0.3]]]).sample(max(needed, 12), seed + 1)
    return corpus, dataclasses.replace(new, contexts=("new",) * len(new))


__all__ = ["GIVEN", "SCRATCH", "STATE", "InverseDynamics", "example_demonstrations", "example_encoder", "split",
           "with_states"]
