"""The conformance kit of pruners."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from looseleaf.modes import evaluating
from looseleaf.pruning.masks import Masks
from looseleaf.pruning.pruner import Pruner, TokenPruner, UpdatePruner, WeightPruner
from looseleaf.pruning.selection import Selection
from looseleaf.pruning.targets import holders, stored_parameter
from looseleaf.testing.common import Kit, Skip, assert_refused, assert_unchanged, interrupt, needs, reloaded, snapshot
from looseleaf.testing.models import change, small_network, tied_llama, tied_network

MODELS: dict[str, Callable[[], nn.Module]] = {"small network": small_network, "tied weights": tied_network}
if importlib.util.find_spec("transformers") is not None:  # no dependency of the core
    MODELS["Llama"] = tied_llama


def inputs_for(model: nn.Module) -> Tensor:
    """Two inputs of a model of the kit: token ids (2, 12) of the Llama, (2, 16) of the tied network, else images."""
    if hasattr(model, "config"):
        return torch.arange(24).view(2, 12) * 7 % 61
    shape = (2, 16) if hasattr(model, "again") else (2, 8, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class PrunerKit(Kit):
    """What a pruner must do; which checks there are depends on what it prunes.

    Models of the kit are a small convolutional network, one with tied weights and, where transformers is installed, a
    random Llama (token ids below 64); :func:`inputs_for` makes inputs of them.

    Args:
        cls: the pruner class.
        make: makes an instance that removes something from the kit's models; None: ``cls``.
        data: of a :class:`WeightPruner`: makes, for each model, what is handed to ``prune(model, data)``.
        batches: of a :class:`TokenPruner`: makes a batch, or a list of batches, for the Llama.
    """

    interface: ClassVar[type[Any]] = Pruner
    refusals = (ValueError,)
    other = "a model with other weights"

    def __new__(cls, plugin: Any, *given: Any, **named: Any) -> PrunerKit:
        kits: tuple[type[PrunerKit], ...] = (WeightKit, TokenKit, UpdateKit)
        return super().__new__(next((kit for kit in kits if issubclass(plugin, kit.interface)), cls))

    def __init__(self, cls: type[Pruner], make: Callable[[], Any] | None = None, *,
                 data: Callable[[nn.Module], Any] = lambda model: None,
                 batches: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__(cls, make)
        self.data, self.batches = data, batches

    def use(self, subject: Any) -> Any:
        return self.make().keep(*subject)

    def tensors(self, subject: Any) -> dict[str, Tensor]:
        """What masks are for, and depend on."""
        return dict(subject[0])

    def check_is_a_dataclass_of_its_interface(self) -> None:
        assert type(self) is not PrunerKit, "expected a subclass of WeightPruner, TokenPruner or UpdatePruner"
        super().check_is_a_dataclass_of_its_interface()

    def check_is_at_work(self, build: Callable[[], Any]) -> None:
        masks, other = self.first(build).result, build()
        assert isinstance(masks, Masks), f"expected looseleaf.Masks, got {type(masks).__name__}"
        assert 0 < masks.removed() < masks.total(), \
            f"{masks.removed()} of {masks.total()} weights are removed: make an instance that removes some"
        change(self.tensors(other).values(), seed=2)
        assert self.use(other) != masks, f"{self.other} gives the same masks"

    check_same_result_each_time = Kit.same_result
    check_leaves_the_random_state = Kit.leaves_random_state

    def fit(self, build: Callable[[], Any]) -> None:
        """Masks have the names and shapes of what they are for."""
        known = self.tensors(build())
        for name, mask in self.first(build).result.items():
            assert name in known, f"{name!r} is no parameter (a tied weight has its first name)"
            assert mask.shape == known[name].shape, \
                f"{name!r} has shape {tuple(known[name].shape)}, its mask {tuple(mask.shape)}"

    def saved_and_loaded(self, build: Callable[[], Any]) -> None:
        """Masks in a file are the same masks."""
        masks = Masks(self.first(build).result)
        loaded = reloaded(lambda path: masks.save(path, {"by": "kit"}), Masks.load)
        assert loaded == masks and loaded.metadata["by"] == "kit", "saved and loaded masks differ"


class WeightKit(PrunerKit):
    """The checks of a :class:`WeightPruner`."""

    interface = WeightPruner
    subjects = MODELS

    def use(self, model: nn.Module) -> Any:
        return self.make().prune(model, self.data(model))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: stored_parameter(*found[0]) for name, found in holders(model).items()}

    def masks(self, build: Callable[[], nn.Module]) -> Masks:
        """The masks of a model; skips the Llama without transformers."""
        needs(build in MODELS.values(), "transformers is not installed")
        return self.first(build).result  # type: ignore[no-any-return]

    def check_masks_fit_the_model(self, build: Callable[[], nn.Module]) -> None:
        self.fit(build)
        for name, mask in self.masks(build).items():
            assert mask.ndim > 1, f"{name!r} is a bias or norm: only weights of Linear and Conv are pruned"

    def check_scores(self, build: Callable[[], nn.Module]) -> None:
        model, masks = build(), self.masks(build)
        scores = self.make().score(model, self.data(model))
        assert scores, "no scores"
        for name, score in scores.items():
            assert name in masks and score.shape == masks[name].shape, \
                f"scores of {name!r}: expected a mask of the same shape, got scores of shape {tuple(score.shape)}"
            assert score.is_floating_point() and not score.isnan().any(), \
                f"scores of {name!r}: expected floating-point numbers without NaN, got {score.dtype}"
            assert not score.requires_grad, f"scores of {name!r} carry a graph: detach them"

    def check_exact_counts(self, build: Callable[[], nn.Module]) -> None:
        rule, masks = self.make().selection(), self.masks(build)
        assert isinstance(rule, Selection), f"expected selection() to give a Selection, got {type(rule).__name__}"
        wrong = rule.for_model(build(), masks).violations(masks)
        assert not wrong, "; ".join(wrong[:3])

    def check_sparsity_is_validated(self) -> None:
        needs("sparsity" in self.make().hyperparameters(), "there is no field called sparsity")
        for wrong in (1.0, 1.5, -0.1, float("nan")):
            assert_refused(functools.partial(self.with_sparsity, wrong), f"sparsity={wrong}", names="sparsity",
                           remedy="declare it with In('[0, 1)')")

    def check_sparsity_0_keeps_everything(self) -> None:
        try:
            pruner = self.with_sparsity(0.0)
        except ValueError as error:
            raise Skip(f"the sparsity is fixed: {error}") from None
        assert not pruner.prune(model := small_network(), self.data(model)).removed(), "weights are removed"

    def with_sparsity(self, sparsity: float) -> WeightPruner:
        """The pruner with another sparsity; skips those without."""
        needs("sparsity" in self.make().hyperparameters(), "there is no field called sparsity")
        return dataclasses.replace(self.make(), sparsity=sparsity)  # type: ignore[no-any-return]

    check_leaves_the_model_as_it_was = Kit.leaves_subject

    def check_leaves_the_model_as_it_was_after_an_exception(self, build: Callable[[], nn.Module]) -> None:
        data = self.data(build())
        if data is not None:
            model = self.in_use(build)
            with self.left_as_it_was(model), contextlib.suppress(KeyboardInterrupt, TypeError, ValueError):
                self.make().prune(model, interrupt if callable(data) else map(interrupt, [0]))
        self.leaves_subject_after_exception(build)

    def check_names_a_weight_that_is_NaN(self, build: Callable[[], nn.Module]) -> None:
        model, last = build(), list(self.masks(build))[-1]
        self.tensors(model)[last].detach().view(-1)[0] = torch.nan
        before = snapshot(model)
        try:
            assert not self.use(model)[last].view(-1)[0], f"{last!r} has a NaN weight and it is kept without a word"
        except ValueError as error:
            assert last in str(error), f"the error does not name {last!r}: {error}"
        assert_unchanged(before, model)

    check_saved_and_loaded_masks_are_the_same = PrunerKit.saved_and_loaded

    def check_masks_go_on_the_model_and_off(self, build: Callable[[], nn.Module]) -> None:
        model, masks = build(), self.masks(build)
        before, dense = snapshot(model), _run(model)
        masks.apply(model)
        once = _run(model)
        masks.apply(model)
        assert torch.equal(_run(model), once), "applying twice differs from applying once"
        masks.remove(model)
        assert_unchanged(before, model)
        assert torch.equal(_run(model), dense), "after remove the model computes something else"
        masks.make_permanent(model)
        assert torch.equal(_run(model), once), "make_permanent computes something else than apply"
        values = {name: old.where(masks[name], 0) if name in masks else old for name, old in before["values"].items()}
        assert_unchanged({"values": values}, model)

    def check_trains_under_masks(self, build: Callable[[], nn.Module]) -> None:
        model, masks = build().train(), self.masks(build)
        masks.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            _output(model, inputs_for(model)).square().mean().backward()
            optimizer.step()
            for name, found in masks.places(model).items():
                gradient = stored_parameter(*found[0]).grad
                removed = f"removed weights of {name!r}"
                assert gradient is None or not gradient[~masks[name]].any(), f"{removed} get a gradient"
                assert not any(getattr(*place)[~masks[name]].any() for place in found), f"{removed} come back"

    def check_copies_and_states_under_masks(self, build: Callable[[], nn.Module]) -> None:
        model, masks, plain = build(), self.masks(build), build()
        masks.apply(model)
        expected, twin = _run(model), copy.deepcopy(model)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(_run(plain), expected), "the state under masks is not that of the pruned model"
        model.load_state_dict(build().state_dict())
        assert torch.equal(_run(model), expected), "loading a state takes the masks off"
        masks.remove(model)
        assert torch.equal(_run(twin), expected), "a copy depends on the original"
        assert torch.equal(_run(model), _run(build())), "the dense weights are lost"

    def check_save_pretrained_under_masks(self) -> None:
        masks, model = self.masks(tied_llama), tied_llama()
        masks.apply(model)
        for _ in range(2):  # under masks, and for good
            loaded = reloaded(model.save_pretrained, type(model).from_pretrained)
            assert torch.equal(_run(loaded), _run(model)), "the saved model computes something else"
            masks.make_permanent(model)

    def check_with_an_adapter_of_PEFT(self) -> None:
        needs(importlib.util.find_spec("peft"), "PEFT is not installed")
        from peft import LoraConfig, get_peft_model

        masks, llama = self.masks(tied_llama), tied_llama()
        masks.apply(llama)
        adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        expected = _run(adapted)
        assert torch.allclose(_run(adapted.merge_and_unload()), expected, atol=1e-5), \
            "an adapter that is merged into masked weights loses its effect"
        fresh = get_peft_model(tied_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        adapters = [name for name in self.use(fresh) if "lora_" in name]
        assert not adapters, f"{adapters[0]!r} belongs to an adapter and is pruned"

    def check_under_torch_compile(self, build: Callable[[], nn.Module]) -> None:
        model = build().eval()
        compiled = torch.compile(model, backend="eager")
        _run(compiled, model)
        self.masks(build).apply(model)
        assert torch.allclose(_run(compiled, model), _run(model), atol=1e-5), \
            "a model compiled and run before computes without the masks"


class TokenKit(PrunerKit):
    """The checks of a :class:`TokenPruner`."""

    interface = TokenPruner

    @functools.cached_property
    def subjects(self) -> Mapping[str, Callable[[], Any]]:  # type: ignore[override]
        needs("Llama" in MODELS, "transformers is not installed")
        return {f"batch {n}": functools.partial(self._subject, n) for n in range(len(self._batches(tied_llama())))}

    def _subject(self, n: int) -> tuple[Any, Any]:
        model = tied_llama()
        return model, self._batches(model)[n]

    def _batches(self, model: Any) -> list[Any]:
        assert self.batches is not None, "give the kit batches=, a function of the model that makes a batch"
        made = self.batches(model)
        return [made] if isinstance(made, Mapping) else list(made)

    def check_is_at_work(self) -> None:  # type: ignore[override]
        masks, changed = [], []
        for build in self.subjects.values():
            (model, batch), kept = build(), self.first(build).result
            change(model.parameters())
            other = self.use((model, batch))
            changed.append(kept.keys() != other.keys() or any(not torch.equal(kept[n], other[n]) for n in kept))
            masks += kept.values()
        assert any(not mask.all() for mask in masks), "nothing is removed: make an instance that removes something"
        assert any(changed) or any(len(mask.unique(dim=0)) > 1 for mask in masks), \
            "every sample of every model loses the same: what is kept must depend on the model or the sample"

    def check_what_is_kept_fits_the_batch(self, build: Callable[[], Any]) -> None:
        batch, kept = build()[1], self.first(build).result
        assert kept, "keep gives nothing"
        for name, mask in kept.items():
            assert name in batch, f"{name!r} is no tensor of the batch"
            assert isinstance(mask, Tensor) and mask.dtype == torch.bool, f"what is kept of {name!r} is not boolean"
            size = batch[name].shape
            assert mask.ndim == 2 and len(mask) == size[0] and (len(size) != 2 or mask.shape == size), \
                f"what is kept of {name!r} {tuple(size)}: expected the shape (B, N), got {tuple(mask.shape)}"
        self.saved_and_loaded(build)

    def check_leaves_model_and_batch_as_they_were(self, build: Callable[[], Any]) -> None:
        self.leaves_subject(build)
        with contextlib.suppress(Skip):  # of methods that do not run the model
            self.leaves_subject_after_exception(build)


def _update(build: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    after = {name: p.detach() for name, p in build().named_parameters()}
    before = copy.deepcopy(after)
    change(before.values())
    return before, after


class UpdateKit(PrunerKit):
    """The checks of an :class:`UpdatePruner`."""

    interface = UpdatePruner
    other = "another update"
    subjects = {name: functools.partial(_update, build) for name, build in MODELS.items()}  # noqa: RUF012

    def check_masks_fit_the_update(self, build: Callable[[], Any]) -> None:
        self.fit(build)
        self.saved_and_loaded(build)

    check_leaves_the_update_as_it_was = Kit.leaves_subject

    def check_refuses_what_is_no_update(self, build: Callable[[], Any]) -> None:
        before, after = build()
        name, value = before.popitem()
        for what, wrong in (("is missing", {}), ("has NaN", {name: torch.full_like(value, torch.nan)}),
                            ("has another shape", {name: torch.zeros(*value.shape, 2)})):
            assert_refused(functools.partial(self.make().keep, {**before, **wrong}, after),
                           f"an update before which {name!r} {what}", names=name, remedy="raise a ValueError")


def _output(model: nn.Module, inputs: Tensor) -> Tensor:
    out: Any = model(inputs)
    logits: Tensor = getattr(out, "logits", out)
    return logits


def _run(model: Any, plain: nn.Module | None = None) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return _output(model, inputs_for(plain or model)).clone()


__all__ = ["PrunerKit", "inputs_for"]
