"""The conformance kit of pruners: sound ones pass, and each planted fault is found by name."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from looseleaf import (
    Masks,
    Paper,
    PerRow,
    Pruner,
    Selection,
    TokenPruner,
    Unstructured,
    UpdatePruner,
    WeightPruner,
    prunable_parameters,
)
from looseleaf.plugin import In
from looseleaf.testing import checks, conformance_tests, outcomes
from looseleaf.testing.pruners import inputs_for

torch.set_num_threads(1)
PAPER = Paper("A title", ("An Author",), 2020, summary="for tests")


def failed(cls: type, **given: Any) -> dict[str, str]:
    return {o.name: o.problem for o in outcomes(cls, **given) if o.problem is not None}


# ------------------------------------------------------------------------------------------------ weights
@dataclasses.dataclass
class Sound(WeightPruner):
    """Magnitude.

    Args:
        sparsity: fraction removed, in [0, 1).
    """

    sparsity: Annotated[float, In("[0, 1)")] = 0.5
    paper: ClassVar[Paper] = PAPER

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        for name, weight in prunable_parameters(model).items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{name!r} has NaN")
        return {name: p.detach().abs() for name, p in prunable_parameters(model).items()}

    def selection(self) -> Selection:
        return Unstructured(self.sparsity)


test_sound = conformance_tests(Sound, {"half": {}, "most": {"make": lambda: Sound(0.9)}})


@dataclasses.dataclass
class Undocumented(Sound):
    """No arguments described."""


@dataclasses.dataclass
class Unvalidated(Sound):
    __doc__ = Sound.__doc__
    sparsity: float = 0.5

    def selection(self) -> Selection:
        return Unstructured(min(max(self.sparsity, 0), 0.99) if self.sparsity == self.sparsity else 0.5)


@dataclasses.dataclass
class KeepingAll(Sound):
    __doc__ = Sound.__doc__

    def selection(self) -> Selection:
        return Unstructured(0.0)


@dataclasses.dataclass
class BlindToTheModel(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        return {n: torch.rand(s.shape, generator=g) for n, s in super().score(model).items()}


@dataclasses.dataclass
class Writing(Sound):
    __doc__ = Sound.__doc__

    def prune(self, model: nn.Module, data: Any = None) -> Masks:
        return super().prune(model, data).make_permanent(model)


@dataclasses.dataclass
class Hooking(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        model.register_forward_hook(lambda *_: None)
        return super().score(model)


@dataclasses.dataclass
class Drawing(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        return {n: torch.rand_like(s) for n, s in super().score(model).items()}


@dataclasses.dataclass
class Seeding(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        random.seed(0)
        np.random.seed(0)
        return super().score(model)


@dataclasses.dataclass
class Inexact(Sound):
    __doc__ = Sound.__doc__

    def prune(self, model: nn.Module, data: Any = None) -> Masks:
        return Unstructured(0.4).select(self.score(model))


@dataclasses.dataclass
class Biased(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        return {n: p.detach().abs() for n, p in model.named_parameters()}


@dataclasses.dataclass
class TrainingAll(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        model.eval()
        found = super().score(model)
        model.train()
        return found


@dataclasses.dataclass
class Unfreezing(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        model.requires_grad_(True)
        return super().score(model)


@dataclasses.dataclass
class Overlooking(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        return {n: p.detach().abs().nan_to_num(9.0) for n, p in prunable_parameters(model).items()}


@dataclasses.dataclass
class PruningAdapters(Sound):
    __doc__ = Sound.__doc__

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        adapters = {n: p.detach().abs() for n, p in model.named_parameters() if "lora_" in n}
        return {**super().score(model), **adapters}


@pytest.mark.parametrize("cls, check, complaint", [
    (Undocumented, "docstring", "parameters without an entry"),
    (Unvalidated, "sparsity is validated", r"sparsity=1\.0 is accepted"),
    (KeepingAll, "is at work", "0 of .* weights are removed"),
    (BlindToTheModel, "is at work", "other weights gives the same masks"),
    (Writing, "leaves the model as it was", "values of .* have changed"),
    (Hooking, "leaves the model as it was", "hooks"),
    (Drawing, "same result each time", "two runs differ"),
    (Drawing, "leaves the random state", "generator of torch"),
    (Seeding, "leaves the random state", "generator of numpy"),
    (Inexact, "exact counts", "the rule asks for"),
    (Biased, "masks fit the model", "bias or norm"),
    (TrainingAll, "leaves the model as it was", "modes"),
    (Unfreezing, "leaves the model as it was", "requires_grad"),
    (Overlooking, "names a weight that is NaN", "NaN weight and it is kept"),
    (PruningAdapters, "with an adapter of PEFT", "belongs to an adapter")])
def test_each_fault_is_found(cls: type[Pruner], check: str, complaint: str) -> None:
    if "PEFT" in check:
        pytest.importorskip("peft")
    (found,) = (c for c in checks(cls) if c.name == check)
    with pytest.raises(AssertionError, match=complaint):
        found.function()


@dataclasses.dataclass
class Gradient(Sound):
    __doc__ = Sound.__doc__
    leave: ClassVar[bool] = False
    careless: ClassVar[bool] = False

    def score(self, model: nn.Module, data: Any = None) -> dict[str, Tensor]:
        super().score(model)
        weights = prunable_parameters(model)
        former = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in weights.values()]
        model.eval()
        try:
            total: Any = 0.0
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in data:
                out = model(batch)
                total = total + (out.logits if hasattr(out, "logits") else out).square().mean()
            if self.leave:
                total.backward(retain_graph=True)
            slopes = torch.autograd.grad(total, list(weights.values()))
        except BaseException:
            if self.careless:
                raise
            self._restore(*former)
            raise
        self._restore(*former)
        return {n: (w.detach() * g).abs() for (n, w), g in zip(weights.items(), slopes)}

    @staticmethod
    def _restore(modes: list[Any], trained: list[Any]) -> None:
        for module, mode in modes:
            module.training = mode
        for parameter, was in trained:
            parameter.requires_grad_(was)


@dataclasses.dataclass
class LeavingGradients(Gradient):
    __doc__ = Sound.__doc__
    leave: ClassVar[bool] = True


@dataclasses.dataclass
class Careless(Gradient):
    __doc__ = Sound.__doc__
    careless: ClassVar[bool] = True


def batches_for(model: nn.Module) -> list[Tensor]:
    return [inputs_for(model), inputs_for(model).flip(0)]


test_pruners_that_learn_from_data = conformance_tests(Gradient, data=batches_for)


def test_what_gradients_and_exceptions_leave_behind() -> None:
    assert "gradients of" in failed(LeavingGradients, data=batches_for)["leaves the model as it was"]
    found = failed(Careless, data=batches_for)
    assert list(found) == ["leaves the model as it was after an exception"]
    assert "requires_grad" in found.popitem()[1]


def test_a_pruner_of_no_kind() -> None:
    @dataclasses.dataclass
    class Old(Pruner):
        """Of no kind."""

        paper: ClassVar[Paper] = PAPER

    assert "expected a subclass of WeightPruner, TokenPruner or UpdatePruner" in failed(Old)[
        "is a dataclass of its interface"]


# ------------------------------------------------------------------------------------------------ tokens
@dataclasses.dataclass
class Tokens(TokenPruner):
    """Removes the tokens whose embeddings are smallest.

    Args:
        ratio: fraction removed, in [0, 1).
    """

    ratio: Annotated[float, In("[0, 1)")] = 0.25
    paper: ClassVar[Paper] = PAPER

    def keep(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            norms = model.get_input_embeddings()(batch["input_ids"]).norm(dim=-1)
        return dict(PerRow(self.ratio).select({"input_ids": norms}))


@dataclasses.dataclass
class KeepingAllTokens(Tokens):
    __doc__ = Tokens.__doc__

    def keep(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.ones_like(batch["input_ids"], dtype=torch.bool)}


@dataclasses.dataclass
class FirstTokens(Tokens):
    __doc__ = Tokens.__doc__

    def keep(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"input_ids": (torch.arange(batch["input_ids"].shape[1]) > 2).expand(batch["input_ids"].shape)}


@dataclasses.dataclass
class RandomTokens(Tokens):
    __doc__ = Tokens.__doc__

    def keep(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return dict(PerRow(0.5).select({"input_ids": torch.rand(batch["input_ids"].shape)}))


@dataclasses.dataclass
class WritingTokens(Tokens):
    __doc__ = Tokens.__doc__

    def keep(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        model.train()
        kept = super().keep(model, batch)
        batch["input_ids"].masked_fill_(~kept["input_ids"], 0)
        return kept


@dataclasses.dataclass
class ScoresOfTokens(Tokens):
    __doc__ = Tokens.__doc__

    def keep(self, model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"input_ids": super().keep(model, batch)["input_ids"].float()}


def token_batches(model: Any) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.arange(24).view(2, 12) * 7 % 61}, {"input_ids": torch.arange(20).view(2, 10)}]


test_sound_tokens = conformance_tests(Tokens, {"a list": {"batches": token_batches},
                                               "one": {"batches": lambda model: token_batches(model)[0]}})


@pytest.mark.parametrize("cls, check, complaint", [
    (KeepingAllTokens, "is at work", "nothing is removed"), (FirstTokens, "is at work", "must depend on"),
    (RandomTokens, "same result each time", "explicit seed"),
    (RandomTokens, "leaves the random state", "generator of torch"),
    (WritingTokens, "leaves model and batch as they were", "modes"),
    (ScoresOfTokens, "what is kept fits the batch", "not boolean")])
def test_each_fault_with_tokens_is_found(cls: type[Pruner], check: str, complaint: str) -> None:
    assert complaint in failed(cls, batches=token_batches)[check]


# ------------------------------------------------------------------------------------------------ updates
@dataclasses.dataclass
class Updates(UpdatePruner):
    """Drops the largest changes.

    Args:
        k: fraction dropped, in [0, 1).
    """

    k: Annotated[float, In("[0, 1)")] = 0.1
    paper: ClassVar[Paper] = PAPER

    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Masks:
        changes = {}
        for name, value in after.items():
            if name not in before or before[name].shape != value.shape:
                raise ValueError(f"{name!r} is not in both")
            changes[name] = -(value - before[name]).abs()
        return Unstructured(self.k).select(changes)


@dataclasses.dataclass
class KeepingUpdates(Updates):
    __doc__ = Updates.__doc__

    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Masks:
        return Unstructured(0.0).select(dict(after))


@dataclasses.dataclass
class LargestWeights(Updates):
    __doc__ = Updates.__doc__

    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Masks:
        return Unstructured(self.k).select({n: -t.abs() for n, t in after.items()})


@dataclasses.dataclass
class WritingUpdates(Updates):
    __doc__ = Updates.__doc__

    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Masks:
        masks = super().keep(before, after)
        for name, mask in masks.items():
            after[name][~mask] = before[name][~mask]
        return masks


test_sound_updates = conformance_tests(Updates)


@pytest.mark.parametrize("cls, check, complaint", [
    (KeepingUpdates, "is at work", "0 of"), (LargestWeights, "is at work", "another update gives the same masks"),
    (LargestWeights, "refuses what is no update", "is accepted"),
    (WritingUpdates, "leaves the update as it was", "have changed")])
def test_each_fault_with_updates_is_found(cls: type[Pruner], check: str, complaint: str) -> None:
    assert complaint in failed(cls)[check]
