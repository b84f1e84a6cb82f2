"""The kit of probes passes a sound one, and names what is wrong with each of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf import Paper, Probe, Report, SlidingWindow, capture
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf.testing import conformance_tests, outcomes

IDS = torch.arange(12).view(2, 6)


@dataclasses.dataclass
class Norms(Probe):
    """Mean norm of the outputs of some modules.

    Args:
        modules: name pattern.
        calls: how often the model is run.
    """

    modules: str = "*.mlp"
    calls: Annotated[int, In(">= 1")] = 2
    paper: ClassVar[Paper] = SlidingWindow.paper

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        model: Any = parts(subject)[0]
        report = Report("norms", facts={"seconds": random.SystemRandom().random(), "seed": seed})
        table = report.table("norms", ["module", "norm"])
        with evaluating(model), torch.no_grad(), capture(model, self.modules) as seen:
            for _ in range(self.calls):
                model(IDS)
            for name, values in seen.items():
                table.add(name, float(values[0].norm()))
        return report


test_conformance = conformance_tests(Norms)


@dataclasses.dataclass
class Constant(Norms):
    """Says the same of every model."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        super().run(subject, seed=seed)
        report = Report("norms", facts={"norm": float(next(parts(subject)[0].parameters()).detach().norm())})
        report.table("norms", ["module", "norm"], [["mlp", 1.0]])
        return report


@dataclasses.dataclass
class LeavesAHook(Norms):
    """Leaves a hook on the model."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        parts(subject)[0].register_forward_hook(lambda *_: None)
        return super().run(subject, data, seed=seed)


@dataclasses.dataclass
class HookAfterException(Norms):
    """Takes its hook away, but not after an exception."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        handle = parts(subject)[0].register_forward_hook(lambda *_: None)
        report = super().run(subject, data, seed=seed)
        handle.remove()
        return report


@dataclasses.dataclass
class OneModeForAll(Norms):
    """Puts the whole model back into the mode of its root."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        model = parts(subject)[0]
        former = model.training
        report = super().run(subject, data, seed=seed)
        model.train(former)
        return report


@dataclasses.dataclass
class Thaws(Norms):
    """Leaves every parameter with requires_grad."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        report = super().run(subject, data, seed=seed)
        parts(subject)[0].requires_grad_(True)
        return report


@dataclasses.dataclass
class ClearsGradients(Norms):
    """Clears gradients that are not its own."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        parts(subject)[0].zero_grad()
        return super().run(subject, data, seed=seed)


@dataclasses.dataclass
class InTrainingMode(Norms):
    """Runs the model in whatever mode it is, with its dropout."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        model: Any = parts(subject)[0]
        report = Report("norms")
        with torch.no_grad():
            report.table("norms", ["norm"], [[float(model(IDS).logits.norm())]])
        return report


@dataclasses.dataclass
class SeedsGlobally(Norms):
    """Seeds torch's global generator."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        torch.manual_seed(seed)
        return super().run(subject, data, seed=seed)


@dataclasses.dataclass
class DrawsGlobally(Norms):
    """Draws from numpy's global generator."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        report = super().run(subject, data, seed=seed)
        report.facts["noise"] = float(np.random.rand())
        return report


@dataclasses.dataclass
class Loud(Norms):
    """Prints although progress is False."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        print("hello")
        return super().run(subject, data, seed=seed)


@dataclasses.dataclass
class GoesOn(Norms):
    """Catches more than Exception."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        with contextlib.suppress(BaseException):
            return super().run(subject, data, seed=seed)
        return Report("nothing")


@dataclasses.dataclass
class Empty(Norms):
    """Reports nothing."""

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        super().run(subject, seed=seed)
        return Report("norms")


@dataclasses.dataclass
class TakesNoSeed(Norms):
    """Takes no seed, and calls its subject otherwise."""

    def run(self, model: Any, data: Any = None, **options: Any) -> Report:  # type: ignore[override]
        return super().run(model, data)


@pytest.mark.parametrize(("cls", "name", "words"), [
    (Constant, "the method is at work", "two models with different weights give the same report"),
    (LeavesAHook, "leaves the model as it was", "hooks of the model have changed"),
    (HookAfterException, "leaves the model as it was after an exception", "hooks of the model have changed"),
    (OneModeForAll, "leaves the model as it was", "modes of"),
    (Thaws, "leaves the model as it was", "requires_grad of"),
    (ClearsGradients, "leaves the model as it was", "gradients of"),
    (InTrainingMode, "leaves the random state", "global generator of torch"),
    (SeedsGlobally, "leaves the random state", "global generator of torch"),
    (DrawsGlobally, "same seed same report", "differ in facts"),
    (Loud, "is silent", "'hello'"),
    (GoesOn, "leaves the model as it was after an exception", "goes on after KeyboardInterrupt"),
    (Empty, "reports a measurement", "no table"),
    (TakesNoSeed, "runs on a subject", r"expected run\(self, subject, .* got run\(self, model, data, options\)"),
])
def test_planted_faults_are_named(cls: type[Norms], name: str, words: str) -> None:
    helped = dataclasses.make_dataclass(cls.__name__, [], bases=(cls,))
    helped.__doc__ = f"{cls.__doc__}\n\n{Norms.__doc__}"
    failed = {o.name: o.problem or "" for o in outcomes(helped) if o.problem is not None}
    assert name in failed, failed
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(failed[name])


class World:
    """An environment: it has no model."""

    def __init__(self, reward: float) -> None:
        self.reward = reward


@dataclasses.dataclass
class OfAWorld(Probe):
    """The reward of an environment."""

    paper: ClassVar[Paper] = SlidingWindow.paper

    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        if not isinstance(subject, World):
            raise TypeError(f"subject: expected a World, got {type(subject).__name__}")
        report = Report("reward")
        report.table("reward", ["reward"], [[subject.reward]])
        return report

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        return {"subject": lambda: World(1.0), "other": lambda: World(2.0)}


test_conformance_of_an_environment = conformance_tests(OfAWorld)


def test_subjects_without_a_model_need_another_one() -> None:
    found = {o.name: o for o in outcomes(OfAWorld, other=None)}
    assert "give the kit other=" in (found["the method is at work"].problem or "")
    assert "no model" in (found["leaves the model as it was"].skipped or "")


def test_models_of_other_kinds_with_data_of_their_own() -> None:
    @dataclasses.dataclass
    class Mean(Probe):
        """The mean output for given inputs."""

        paper: ClassVar[Paper] = SlidingWindow.paper

        def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None) -> Report:
            model, _ = parts(subject)
            report = Report("mean")
            with evaluating(model), torch.no_grad():
                report.table("mean", ["mean"], [[float(model(data).mean())]])
            return report

    def subject() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    assert [o for o in outcomes(Mean, subject=subject, data=torch.ones(2, 3)) if o.problem] == []
