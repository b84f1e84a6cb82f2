"""The conformance kit of pruners."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf.modes import evaluating
from looseleaf.pruning.masks import Masks
from looseleaf.pruning.pruner import Pruner, TokenPruner, UpdatePruner, WeightPruner
from looseleaf.pruning.selection import Selection
from looseleaf.pruning.targets import holders, stored_parameter
from looseleaf.testing.common import Kit, Skip, assert_unchanged, mixed_modes, same_random_state, snapshot
from looseleaf.testing.models import small_network, tied_llama, tied_network


def training(model: nn.Module) -> Callable[..., None]:
    """A function that trains a model of the kit for 20 steps of Adam, for pruners that are given one as data."""
    inputs = inputs_for(model)

    def train(model: nn.Module, run: Any) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in run.steps(20):
            optimizer.zero_grad()
            _output(model, inputs).square().mean().backward()
            optimizer.step()

    return train


def inputs_for(model: nn.Module) -> Tensor:
    """Two inputs of a model of the kit: token ids (2, 12) of the Llama, (2, 16) of the tied network, else images."""
    if hasattr(model, "config"):
        return torch.arange(24).view(2, 12) * 7 % 61
    return torch.randn((2, 16) if hasattr(model, "again") else (2, 8, 8, 8), generator=_generator(0))


class PrunerKit(Kit):
    """What a pruner must do; which checks there are depends on what it prunes.

    Models of the kit are a small convolutional network, one with tied weights and, where transformers is installed, a
    random Llama (token ids below 64); :func:`inputs_for` makes inputs of them.

    Args:
        cls: the pruner class.
        make: makes an instance that removes something from the kit's models; None: ``cls``.
        data: of a :class:`WeightPruner`: makes, for each model, what is handed to ``prune(model, data)``, such as
            :func:`training`; None: no data.
        batches: of a :class:`TokenPruner`: makes a batch, or a list of batches, for the Llama.
    """

    interface: ClassVar[type[Any]] = Pruner

    def __new__(cls, plugin: Any, *given: Any, **named: Any) -> PrunerKit:
        kits: tuple[type[PrunerKit], ...] = (WeightKit, TokenKit, UpdateKit)
        return super().__new__(next((kit for kit in kits if issubclass(plugin, kit.interface)), cls))

    def __init__(self, cls: type[Pruner], make: Callable[[], Any] | None = None, *,
                 data: Callable[[nn.Module], Any] | None = None,
                 batches: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__(cls, make)
        self.data = data or (lambda model: None)
        self.batches = batches

    def check_is_a_dataclass_of_its_interface(self) -> None:
        assert type(self) is not PrunerKit, "expected a subclass of WeightPruner, TokenPruner or UpdatePruner"
        super().check_is_a_dataclass_of_its_interface()

    def check_is_at_work(self) -> None:
        raise NotImplementedError  # here so that it comes first

    def check_same_result_each_time(self) -> None:
        for title, run in self._runs().items():
            first = run()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(12345)
                assert _same(run(), first), f"{title}: two runs differ: take randomness from an explicit seed only"

    def check_leaves_the_random_state(self) -> None:
        for run in self._runs().values():
            with same_random_state():
                run()

    def _runs(self) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
        """What makes the pruner's result, each time on a new model."""
        return {}


class WeightKit(PrunerKit):
    """The checks of a :class:`WeightPruner`."""

    interface = WeightPruner

    def check_is_at_work(self) -> None:
        for title, build in _models().items():
            masks = self._masks(title)
            assert isinstance(masks, Masks), f"{title}: expected looseleaf.Masks, got {type(masks).__name__}"
            assert 0 < masks.removed() < masks.total(), \
                f"{title}: {masks.removed()} of {masks.total()} weights are removed: make an instance that removes some"
            other = build()
            _change(other)
            assert self._prune(other) != masks, f"{title}: a model with other weights gives the same masks"

    def check_masks_fit_the_model(self) -> None:
        for title, build in _models().items():
            known = {name: stored_parameter(*found[0]) for name, found in holders(build()).items()}
            for name, mask in self._masks(title).items():
                assert name in known, f"{title}: {name!r} is no parameter (a tied weight has its first name)"
                assert mask.shape == known[name].shape, \
                    f"{title}: {name!r} has shape {tuple(known[name].shape)}, its mask {tuple(mask.shape)}"
                assert mask.ndim > 1, f"{title}: {name!r} is a bias or norm: only weights of Linear and Conv are pruned"

    def check_scores(self) -> None:
        for title, build in _models().items():
            model, masks = build(), self._masks(title)
            scores = self.make().score(model, self.data(model))
            assert scores, f"{title}: no scores"
            for name, score in scores.items():
                assert name in masks, f"{title}: {name!r} has scores but no mask"
                assert score.shape == masks[name].shape, f"{title}: scores of {name!r} have shape {tuple(score.shape)}"
                assert score.is_floating_point(), f"{title}: scores of {name!r} are {score.dtype}"
                assert not score.isnan().any(), f"{title}: scores of {name!r} have NaN"
                assert not score.requires_grad, f"{title}: scores of {name!r} carry a graph: detach them"

    def check_exact_counts(self) -> None:
        rule = self.make().selection()
        assert isinstance(rule, Selection), f"expected selection() to give a Selection, got {type(rule).__name__}"
        for title, build in _models().items():
            wrong = rule.for_model(build(), self._masks(title)).violations(self._masks(title))
            assert not wrong, f"{title}: {'; '.join(wrong[:3])}"

    def check_sparsity_is_validated(self) -> None:
        for wrong in (1.0, 1.5, -0.1, float("nan")):
            try:
                self._with_sparsity(wrong)
            except ValueError as error:
                assert "sparsity" in str(error), f"the error for sparsity={wrong} does not name the field: {error}"
                continue
            raise AssertionError(f"sparsity={wrong} is accepted: declare it with In('[0, 1)')")

    def check_sparsity_0_keeps_everything(self) -> None:
        try:
            pruner = self._with_sparsity(0.0)
        except ValueError as error:
            raise Skip(f"the sparsity is fixed: {error}") from None
        model = small_network()
        assert pruner.prune(model, self.data(model)).removed() == 0, "weights are removed"

    def check_leaves_the_model_as_it_was(self) -> None:
        """Modes of each submodule, what is frozen, gradients and hooks, too."""
        for build in _models().values():
            model = mixed_modes(build())
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
            model.register_forward_hook(lambda *_: None)
            before = snapshot(model)
            with contextlib.suppress(ValueError):  # a method may refuse frozen weights
                self._prune(model)
            assert_unchanged(before, model)

    def check_leaves_the_model_as_it_was_after_an_exception(self) -> None:
        for build in _models().values():
            for broken in ("data", "forward"):
                model = mixed_modes(build())
                data = self.data(model)
                if broken == "forward":
                    list(model.modules())[-1].register_forward_pre_hook(_stop)
                elif data is not None:
                    data = _stop if callable(data) else _stopping()
                before = snapshot(model)
                with contextlib.suppress(_Stop, TypeError, ValueError):
                    self.make().prune(model, data)
                assert_unchanged(before, model)

    def check_names_a_weight_that_is_NaN(self) -> None:
        for title, build in _models().items():
            model, last = build(), list(self._masks(title))[-1]
            with torch.no_grad():
                stored_parameter(*holders(model)[last][0]).view(-1)[0] = torch.nan
            before = snapshot(model)
            try:
                out = self._prune(model)
                assert not out[last].view(-1)[0], f"{title}: {last!r} has a NaN weight and it is kept without a word"
            except ValueError as error:
                assert last in str(error), f"{title}: the error does not name {last!r}: {error}"
            assert_unchanged(before, model)

    def check_saved_and_loaded_masks_are_the_same(self) -> None:
        for title in _models():
            _round_trip(self._masks(title))

    def check_masks_go_on_the_model_and_off(self) -> None:
        for title, build in _models().items():
            model, masks = build(), self._masks(title)
            before, dense = snapshot(model), _run(model)
            masks.apply(model)
            once = _run(model)
            masks.apply(model)
            assert torch.equal(_run(model), once), f"{title}: applying twice differs from applying once"
            masks.remove(model)
            assert_unchanged(before, model)
            assert torch.equal(_run(model), dense), f"{title}: after remove the model computes something else"
            masks.make_permanent(model)
            assert torch.equal(_run(model), once), f"{title}: make_permanent computes something else than apply"
            for name, parameter in model.named_parameters():
                old = before["values"][name]
                expected = torch.where(masks[name], old, torch.zeros_like(old)) if name in masks else old
                assert torch.equal(parameter, expected), f"{title}: make_permanent changes other weights of {name!r}"

    def check_trains_under_masks(self) -> None:
        for title, build in _models().items():
            model, masks = build().train(), self._masks(title)
            masks.apply(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                _output(model, inputs_for(model)).square().mean().backward()
                for name, found in masks.places(model).items():
                    gradient = stored_parameter(*found[0]).grad
                    assert gradient is None or not gradient[~masks[name]].any(), \
                        f"{title}: removed weights of {name!r} get a gradient"
                optimizer.step()
            for name, found in masks.places(model).items():
                assert not any(getattr(*place)[~masks[name]].any() for place in found), \
                    f"{title}: removed weights of {name!r} come back"

    def check_copies_and_states_under_masks(self) -> None:
        for title, build in _models().items():
            model, masks = build(), self._masks(title)
            masks.apply(model)
            expected, twin, plain = _run(model), copy.deepcopy(model), build()
            plain.load_state_dict(model.state_dict())
            assert torch.equal(_run(plain), expected), f"{title}: the state under masks is not that of the pruned model"
            model.load_state_dict(build().state_dict())
            assert torch.equal(_run(model), expected), f"{title}: loading a state takes the masks off"
            masks.remove(model)
            assert torch.equal(_run(twin), expected), f"{title}: a copy depends on the original"
            assert torch.equal(_run(model), _run(build())), f"{title}: the dense weights are lost"

    def check_save_pretrained_under_masks(self) -> None:
        model, masks = _llama(), self._masks("Llama")
        masks.apply(model)
        for _ in range(2):  # under masks, and for good
            expected = _run(model)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                assert torch.equal(_run(type(model).from_pretrained(folder)), expected), \
                    "the saved model computes something else"
            masks.make_permanent(model)

    def check_with_an_adapter_of_PEFT(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise Skip("PEFT is not installed")
        import peft

        adapted = _llama()
        self._masks("Llama").apply(adapted)
        adapted = peft.get_peft_model(adapted, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        expected = _run(adapted)
        assert torch.allclose(_run(adapted.merge_and_unload()), expected, atol=1e-5), \
            "an adapter that is merged into masked weights loses its effect"
        fresh = peft.get_peft_model(_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapters = [name for name in self._prune(fresh) if "lora_" in name]
        assert not adapters, f"{adapters[0]!r} belongs to an adapter and is pruned"

    def check_under_torch_compile(self) -> None:
        for title, build in _models().items():
            model = build().eval()
            compiled = torch.compile(model, backend="eager")
            _run(compiled, model)
            self._masks(title).apply(model)
            assert torch.allclose(_run(compiled, model), _run(model), atol=1e-5), \
                f"{title}: a model compiled and run before computes without the masks"

    @functools.cache  # noqa: B019 (a kit lives as long as its checks)
    def _masks(self, title: str) -> Masks:
        if title not in _models():
            raise Skip("transformers is not installed")
        return self._prune(_models()[title]())

    def _runs(self) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
        return {title: lambda build=build: self._prune(build()) for title, build in _models().items()}  # type: ignore[misc]

    def _prune(self, model: nn.Module) -> Masks:
        masks: Masks = self.make().prune(model, self.data(model))
        return masks

    def _with_sparsity(self, sparsity: float) -> WeightPruner:
        if "sparsity" not in self.make().hyperparameters():
            raise Skip("there is no field called sparsity")
        changed: WeightPruner = dataclasses.replace(self.make(), sparsity=sparsity)
        return changed


class TokenKit(PrunerKit):
    """The checks of a :class:`TokenPruner`."""

    interface = TokenPruner

    def check_is_at_work(self) -> None:
        other = _llama()
        _change(other)
        kept = [self._keep(_llama(), batch) for batch in self._batches()]
        masks = [mask for found in kept for mask in found.values()]
        assert any(not mask.all() for mask in masks), "nothing is removed: make an instance that removes something"
        assert any(len(mask.unique(dim=0)) > 1 for mask in masks) or not all(
            map(_same, kept, [self._keep(other, batch) for batch in self._batches()])), \
            "every sample of every model loses the same: what is kept must depend on the model or the sample"

    def check_what_is_kept_fits_the_batch(self) -> None:
        for batch in self._batches():
            kept = self._keep(_llama(), batch)
            assert kept, "keep gives nothing"
            for name, mask in kept.items():
                assert name in batch, f"{name!r} is no tensor of the batch"
                assert isinstance(mask, Tensor) and mask.dtype == torch.bool, f"what is kept of {name!r} is not boolean"
                size = batch[name].shape
                assert mask.ndim == 2 and len(mask) == size[0] and (len(size) != 2 or mask.shape == size), \
                    f"what is kept of {name!r} {tuple(size)}: expected the shape (B, N), got {tuple(mask.shape)}"
            _round_trip(Masks(kept))

    def check_leaves_model_and_batch_as_they_were(self) -> None:
        for broken in (False, True):
            model, batch = mixed_modes(_llama()), self._batches()[0]
            if broken:
                list(model.modules())[-1].register_forward_pre_hook(_stop)
            before, tensors = snapshot(model), copy.deepcopy(dict(batch))
            with contextlib.suppress(_Stop, ValueError):
                self._keep(model, batch)
            assert_unchanged(before, model)
            assert _same(batch, tensors), "the batch has changed"

    def _runs(self) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
        return {f"batch {n}": lambda n=n: self._keep(_llama(), self._batches()[n])  # type: ignore[misc]
                for n in range(len(self._batches()))}

    def _keep(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = self.make().keep(model, batch)
        return kept

    def _batches(self) -> list[Any]:
        assert self.batches is not None, "give the kit batches=, a function of the model that makes a batch"
        made = self.batches(_llama())
        return [made] if isinstance(made, Mapping) else list(made)


class UpdateKit(PrunerKit):
    """The checks of an :class:`UpdatePruner`."""

    interface = UpdatePruner

    def check_is_at_work(self) -> None:
        for title, build in _models().items():
            before, after = _update(build())
            masks = self.make().keep(before, after)
            assert isinstance(masks, Masks), f"{title}: expected looseleaf.Masks, got {type(masks).__name__}"
            assert 0 < masks.removed() < masks.total(), \
                f"{title}: {masks.removed()} of {masks.total()} entries are removed: make an instance that removes some"
            assert self.make().keep(_update(build(), seed=1)[0], after) != masks, \
                f"{title}: another update gives the same masks"

    def check_masks_fit_the_update(self) -> None:
        for title, build in _models().items():
            before, after = _update(build())
            masks = self.make().keep(before, after)
            for name, mask in masks.items():
                assert name in after, f"{title}: {name!r} is not in the update"
                assert mask.shape == after[name].shape, f"{title}: the mask of {name!r} has shape {tuple(mask.shape)}"
            _round_trip(masks)

    def check_leaves_the_update_as_it_was(self) -> None:
        before, after = _update(small_network())
        former = copy.deepcopy((before, after))
        self.make().keep(before, after)
        assert _same(before, former[0]) and _same(after, former[1]), "the values before or after have changed"

    def check_refuses_what_is_no_update(self) -> None:
        before, after = _update(small_network())
        name = list(after)[-1]
        for wrong in (torch.full_like(before[name], torch.nan), torch.zeros(before[name].shape + (2,)), None):
            broken = {**before, name: wrong} if wrong is not None else {n: t for n, t in before.items() if n != name}
            try:
                self.make().keep(broken, after)
            except ValueError as error:
                assert name in str(error), f"the error does not name {name!r}: {error}"
                continue
            raise AssertionError(f"{name!r} is {'missing' if wrong is None else 'NaN or of another shape'} before the "
                                 "update, and that is accepted")

    def _runs(self) -> dict[str, Callable[[], Mapping[str, Tensor]]]:
        return {"small network": lambda: self.make().keep(*_update(small_network()))}


class _Stop(Exception):
    pass


def _stop(*given: Any, **named: Any) -> None:
    raise _Stop


def _stopping() -> Iterator[Any]:
    raise _Stop
    yield


def _models() -> dict[str, Callable[[], nn.Module]]:
    found = {"small network": small_network, "tied weights": tied_network}
    if importlib.util.find_spec("transformers") is not None:  # no dependency of the core
        found["Llama"] = tied_llama
    return found


def _llama() -> Any:
    if "Llama" not in _models():
        raise Skip("transformers is not installed")
    return tied_llama()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _change(model: nn.Module) -> None:
    """Give all weights other values."""
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=_generator(n)), alpha=0.2)


def _update(model: nn.Module, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {n: p + 0.01 * torch.randn(p.shape, generator=_generator(seed)) for n, p in after.items()}, after


def _output(model: nn.Module, inputs: Tensor) -> Tensor:
    out: Any = model(inputs)
    logits: Tensor = out.logits if hasattr(out, "logits") else out
    return logits


def _run(model: Any, plain: nn.Module | None = None) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return _output(model, inputs_for(plain or model)).clone()


def _same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(v, two[n]) if isinstance(v, Tensor) else v == two[n] for n, v in one.items())


def _round_trip(masks: Masks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        masks.save(Path(folder) / "masks.safetensors", {"by": "kit"})
        loaded = Masks.load(Path(folder) / "masks.safetensors")
        assert loaded == masks and loaded.metadata["by"] == "kit", "saved and loaded masks differ"


__all__ = ["PrunerKit", "inputs_for", "training"]
