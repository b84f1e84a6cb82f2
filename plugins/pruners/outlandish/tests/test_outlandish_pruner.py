"""What IgnoreTopK drops, in a finished training and in each step of an optimiser."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looseleaf
from looseleaf.testing.models import tied_llama as tiny_llama
from looseleaf.testing.models import tied_network
from looseleaf_outlandish import IgnoreTopK, updates
from looseleaf_outlandish.updates import keep_smallest, of_model, reference

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(), b[n].nan_to_num()) for n in a)


def batches(count: int = 3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(4, 16, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, accumulate: int = 1) -> None:
    for number, batch in enumerate(batches(count * accumulate), 1):
        model(batch).square().mean().backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def trained(seed: int = 0, spread: float = 0.01) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and the state it might have been trained from."""
    model = tied_network()
    generator = torch.Generator().manual_seed(seed)
    return model, {n: p + spread * torch.randn(p.shape, generator=generator) for n, p in state(model).items()}


# ------------------------------------------------------------------------------------------- the largest numbers

@pytest.mark.parametrize("kind", ["random", "heavy tail", "ties", "zeros", "constant", "sorted", "periodic"])
@pytest.mark.parametrize("shapes", [[(5,)], [(300, 700)], [(64, 64), (3,), (200, 100)], [(1,)], [(0,), (7, 7)]])
def test_the_fast_threshold_gives_the_masks_of_the_reference(kind: str, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(3)
    total = sum(torch.Size(s).numel() for s in shapes)
    values = torch.rand(total, generator=generator)
    values = {"random": values, "heavy tail": values ** -3, "ties": (values * 5).floor(),
              "zeros": values * (values > 0.99), "constant": torch.ones(total), "sorted": values.sort().values,
              "periodic": torch.arange(total) % 3 * 1.0}[kind]
    parts = values.split([torch.Size(s).numel() for s in shapes])
    tensors = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
    for count in {0, 1, round(0.08 * total), total // 2, total - 1, total}:
        masks = keep_smallest(tensors, count)
        assert sum(int((~m).sum()) for m in masks) == count
        expected = [torch.zeros(t.shape, dtype=torch.bool) for t in tensors] if count == total else \
            reference(tensors, count)
        assert all(torch.equal(m, e) for m, e in zip(masks, expected, strict=True))


def test_a_sample_that_misleads_still_gives_the_exact_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(1 << 17, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(updates, "_some", lambda numbers, count: numbers[:count] * 0 + 0.5)
    for count in (10, 1000, 1 << 16, 70000):
        assert torch.equal(keep_smallest([values], count)[0], reference([values], count)[0])


def test_tensors_of_several_dtypes_are_compared_exactly() -> None:
    tensors = [torch.rand(100, dtype=torch.float64), torch.rand(50)]
    masks = keep_smallest(tensors, 17)
    assert all(torch.equal(m, e) for m, e in zip(masks, reference(tensors, 17), strict=True))


# ------------------------------------------------------------------------------------------- a finished training

@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("k", [0.0, 0.01, 0.08, 0.5, 1.0])
def test_exactly_the_largest_entries_are_put_back(k: float, scope: Any) -> None:
    model, before = trained()
    after = state(model)
    pruner = IgnoreTopK(k, scope)
    expected = pruner.keep(before, after)
    masks = pruner.apply(model, before)
    assert masks == expected
    now = state(model)
    delta = {n: (after[n] - before[n]).abs() for n in after}
    groups = [[n] for n in after] if scope == "tensor" else [list(after)]
    for group in groups:
        n = sum(after[name].numel() for name in group)
        gone = torch.cat([delta[name][~masks[name]] for name in group])
        stay = torch.cat([delta[name][masks[name]] for name in group])
        assert len(gone) == round(k * n)
        assert not len(gone) or not len(stay) or gone.min() >= stay.max()
    for name, mask in masks.items():
        assert torch.equal(now[name][mask], after[name][mask])
        assert torch.equal(now[name][~mask], before[name][~mask])


def test_of_equal_updates_the_first_goes_first() -> None:
    model = nn.Linear(10, 1, bias=False)
    before = {"weight": model.weight.detach() - torch.tensor([[1.0, -1, 1, 2, 1, -1, 1, 1, 1, 1]])}
    with torch.no_grad():
        model.weight.copy_(torch.zeros(1, 10))
        before["weight"].copy_(torch.tensor([[1.0, -1, 1, 2, 1, -1, 1, 1, 1, 1]]))
    assert IgnoreTopK(0.3).apply(model, before)["weight"].tolist() == [[False, False, True, False] + [True] * 6]


def test_a_tied_weight_counts_once() -> None:
    model, before = trained()
    aliased = {**before, "again.weight": before["first.weight"]}
    assert sorted(IgnoreTopK().keep(aliased, model.state_dict())) == [
        "again.bias", "first.bias", "first.weight", "other.bias", "other.weight"]
    assert sorted(IgnoreTopK().apply(copy.deepcopy(model), before)) == [
        "again.bias", "first.bias", "first.weight", "other.bias", "other.weight"]
    llama = tiny_llama()
    everything = {n: p.detach() + 0.1 for n, p in llama.state_dict().items()}
    assert "lm_head.weight" in everything
    masks = IgnoreTopK(0.5, "global").apply(llama, everything)
    assert "lm_head.weight" not in masks
    assert masks.total() == sum(p.numel() for p in llama.parameters())


def test_a_state_with_the_other_name_of_a_tied_weight_is_understood() -> None:
    model, before = trained()
    other = {("again.weight" if n == "first.weight" else n): v for n, v in before.items()}
    twin = copy.deepcopy(model)
    assert IgnoreTopK().apply(twin, other) == IgnoreTopK().apply(model, before)
    assert same(state(twin), state(model))


def test_frozen_parameters_are_no_part_of_the_update() -> None:
    model, before = trained()
    model.other.weight.requires_grad_(False)  # type: ignore[union-attr]
    del before["other.weight"]
    assert "other.weight" not in IgnoreTopK().apply(model, before)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        IgnoreTopK().apply(model, before)


def test_half_precision_is_compared_in_single() -> None:
    model = nn.Linear(64, 64).to(torch.bfloat16)
    before = {n: v + (torch.rand(v.shape) * 0.01).to(v.dtype) for n, v in state(model).items()}
    assert of_model(model, before)[0].magnitude().dtype == torch.float32
    assert IgnoreTopK().apply(model, before).removed("weight") == round(0.08 * 4096)


def test_updates_under_masks_on_the_weights() -> None:
    model, before = trained()
    weights = looseleaf.Unstructured(0.5).select({"other.weight": torch.rand(8, 16)}).apply(model)
    after = {n: v.detach().clone() for n, v in model.state_dict().items()}
    pruner = looseleaf.get("outlandish", "pruners", k=0.5)
    assert pruner.keep({n: v + 1 for n, v in after.items()}, after)["other.weight"].shape == (8, 16)
    assert pruner.apply(model, before)["other.weight"].shape == (8, 16)
    weights.remove(model, restore=False)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_two_states_are_merged_as_a_model_is(scope: Any) -> None:
    model, before = trained()
    after = {**model.state_dict(), "steps": torch.tensor(3)}
    before = {**before, "again.weight": before["first.weight"], "steps": torch.tensor(0)}
    merged = IgnoreTopK(0.2, scope).merge(before, after)
    assert same(after, {**model.state_dict(), "steps": torch.tensor(3)})
    assert int(merged["steps"]) == 3
    IgnoreTopK(0.2, scope).apply(model, before)
    assert same({n: v for n, v in merged.items() if n != "steps"}, model.state_dict())


# ------------------------------------------------------------------------------------------- each step

@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_each_step_drops_exactly_the_largest(name: str, scope: Any) -> None:
    model = tied_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = IgnoreTopK(0.1, scope)
    with pruner.attach(optimizer, model) as ignored:
        for number, batch in enumerate(batches(), 1):
            model(batch).square().mean().backward()
            before = state(model)
            twin, twin_optimizer = copy.deepcopy((model, optimizer))
            for hooks in (twin_optimizer._optimizer_step_pre_hooks, twin_optimizer._optimizer_step_post_hooks):
                hooks.clear()
            for kept, given in zip(twin.parameters(), model.parameters(), strict=True):
                kept.grad = given.grad.clone() if given.grad is not None else None
            twin_optimizer.step()
            pruner.apply(twin, before)
            optimizer.step()
            optimizer.zero_grad()
            assert same(state(model), state(twin))
            assert ignored.steps == number
    per_step = sum(round(0.1 * p.numel()) for p in model.parameters()) if scope == "tensor" else \
        round(0.1 * sum(p.numel() for p in model.parameters()))
    assert ignored.dropped == 3 * per_step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("when", ["step", "end"])
def test_k_0_leaves_training_bit_identical(name: str, when: Any) -> None:
    model, plain = tied_network(), tied_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    with IgnoreTopK(0, when=when).attach(optimizer):
        train(model, optimizer)
    train(plain, OPTIMIZERS[name](plain.parameters()))
    assert same(state(model), state(plain))


@pytest.mark.parametrize("when", ["step", "end"])
def test_k_1_leaves_weights_unchanged(when: Any) -> None:
    model = tied_network()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with IgnoreTopK(1, when=when).attach(optimizer):
        train(model, optimizer)
    assert same(before, state(model))
    train(model, optimizer, 1)
    assert not same(before, state(model)), "the hooks are still there"


def test_at_the_end_is_apply() -> None:
    model, other = tied_network(), tied_network()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with IgnoreTopK(0.1, when="end").attach(optimizer, model) as ignored:
        train(model, optimizer)
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01))
    assert not same(state(model), state(other))
    IgnoreTopK(0.1).apply(other, before)
    assert same(state(model), state(other))
    assert ignored.steps == 1 and ignored.dropped == sum(round(0.1 * p.numel()) for p in model.parameters())


def test_gradient_accumulation_prunes_once_for_each_step() -> None:
    model, other = tied_network(), tied_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with IgnoreTopK(0.1).attach(optimizer) as ignored:
        train(model, optimizer, count=2, accumulate=3)
    assert ignored.steps == 2
    by_hand = torch.optim.AdamW(other.parameters(), lr=0.01)
    for number, batch in enumerate(batches(6), 1):
        other(batch).square().mean().backward()
        if number % 3 == 0:
            before = state(other)
            by_hand.step()
            by_hand.zero_grad()
            IgnoreTopK(0.1).apply(other, before)
    assert same(state(model), state(other))


def test_nothing_leaks_from_step_to_step() -> None:
    """A second block gives what one made afresh gives: nothing is kept but the optimiser's own state."""
    results = []
    for pauses in (0, 1):
        model = tied_network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if pauses:
            for batch in batches(3):
                with IgnoreTopK(0.1).attach(optimizer):
                    model(batch).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            with IgnoreTopK(0.1).attach(optimizer):
                train(model, optimizer)
        results.append(state(model))
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert same(*results)


def test_a_closure_makes_its_gradients_within_the_step() -> None:
    model = tied_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = next(batches())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    with IgnoreTopK(0.1).attach(optimizer) as ignored:
        optimizer.step(closure)
        optimizer.step(closure=closure)
    assert ignored.steps == 2 and ignored.dropped == 2 * sum(round(0.1 * p.numel()) for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_that_skips_a_step(fused: bool) -> None:
    model = tied_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = state(model)
    with IgnoreTopK(0.1).attach(optimizer, model) as ignored:
        for number, batch in enumerate(batches(3)):
            scaler.scale(model(batch).square().mean()).backward()
            if number == 0:
                model.other.weight.grad[0, 0] = torch.inf  # type: ignore[union-attr, index]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if number == 0:
                assert same(before, state(model)) and ignored.steps == 0
    assert ignored.steps == 2 and not same(before, state(model))
    plain = tied_network()
    by_hand = torch.optim.AdamW(plain.parameters(), lr=0.01, fused=fused)
    for batch in list(batches(3))[1:]:
        old = state(plain)
        plain(batch).square().mean().backward()
        by_hand.step()
        by_hand.zero_grad()
        IgnoreTopK(0.1).apply(plain, old)
    now, by = state(model), state(plain)
    assert all(torch.allclose(now[n], by[n], atol=1e-7) for n in now)


def test_hooks_go_after_an_exception() -> None:
    model = tied_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for when in ("step", "end"):
        with pytest.raises(KeyboardInterrupt), IgnoreTopK(1.0, when=when).attach(optimizer):  # type: ignore[arg-type]
            before = state(model)
            train(model, optimizer, 1)
            raise KeyboardInterrupt
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not same(before, state(model)), "after an exception the weights stay as training left them"
    with IgnoreTopK(0.1).attach(optimizer):
        pass


def test_within_the_trainer_of_transformers(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    before = state(model)
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
                                               gradient_accumulation_steps=2, report_to=[], disable_tqdm=True,
                                               save_strategy="no", logging_strategy="no"), train_dataset=rows)
    optimizer = trainer.create_optimizer()
    with IgnoreTopK(0.1).attach(optimizer, model) as ignored:
        trainer.train()
    assert ignored.steps == 2 and not same(before, state(model))
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    with pytest.raises(ValueError, match=r"give its \.optimizer, which is AdamW"), IgnoreTopK().attach(wrapped):
        pass


# ------------------------------------------------------------------------------------------- bad input

def test_a_nan_gradient_names_the_parameter_and_leaves_all_as_it_was() -> None:
    model = tied_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with IgnoreTopK().attach(optimizer, model):
        train(model, optimizer, 1)
        before, inner = state(model), copy.deepcopy(optimizer.state_dict())
        model(next(batches())).square().mean().backward()
        model.other.weight.grad[2, 3] = torch.nan  # type: ignore[union-attr, index]
        with pytest.raises(ValueError, match=r"gradient of 'other\.weight': expected numbers, got 1 NaN"):
            optimizer.step()
        assert same(before, state(model))
        for key, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(v, inner["state"][key][n]) for n, v in values.items())
        optimizer.zero_grad()
        train(model, optimizer, 1)  # and it goes on
    assert not same(before, state(model))


@pytest.mark.parametrize("when", ["step", "end"])
def test_a_nan_update_puts_the_weights_back(when: Any) -> None:
    model = tied_network()
    before = state(model)
    optimizer = torch.optim.SGD([("mine", model.first.weight), ("yours", model.other.weight)],  # type: ignore[list-item]
                                lr=1.0)
    with pytest.raises(ValueError, match="update of 'yours'"), IgnoreTopK(when=when).attach(optimizer):
        optimizer.param_groups[0]["lr"] = 1e38
        (model.first.weight.sum() + 100 * model.other.weight.sum()).backward()  # type: ignore[operator, union-attr]
        optimizer.step()
    assert same(before, state(model))


def test_a_parameter_without_a_name_has_a_place() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2)), weight], lr=1.0)
    weight.grad = torch.full((3,), torch.nan)
    with pytest.raises(ValueError, match="'group 0, parameter 1'"), IgnoreTopK().attach(optimizer):
        optimizer.step()


def test_sparse_gradients() -> None:
    table = nn.Embedding(20, 4, sparse=True)
    before = state(table)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    with IgnoreTopK(0.05).attach(optimizer):
        table(torch.tensor([1, 2])).pow(2).sum().backward()
        optimizer.step()
        assert int((table.weight != before["weight"]).sum()) == 8 - 4


def test_a_broken_update_leaves_the_finished_model_alone() -> None:
    model, before = trained()
    with torch.no_grad():
        model.other.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    after = state(model)
    with pytest.raises(ValueError, match=r"'other\.weight'"):
        IgnoreTopK().apply(model, before)
    for call in (IgnoreTopK().keep, IgnoreTopK().merge):
        with pytest.raises(ValueError, match=r"'other\.weight'"):
            call(before, after)
    assert same(after, state(model))


def test_states_that_do_not_fit() -> None:
    model, before = trained()
    after = state(model)
    for wrong, message in [(None, "NoneType"), ([1, 2], "list"), ({}, "has no"),
                           ({**before, "other.bias": torch.zeros(3)}, r"'other\.bias' was \(3,\)"),
                           ({**before, "other.bias": 3}, "was int"),
                           (model.state_dict(), "shares the memory"),
                           ({n.replace("other", "othr"): v for n, v in before.items()}, "Did you mean 'othr")]:
        with pytest.raises(ValueError, match=message):
            IgnoreTopK().apply(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different names"):
        IgnoreTopK().merge({}, before)
    with pytest.raises(ValueError, match="has shapes"):
        IgnoreTopK().merge({"a": torch.ones(2)}, {"a": torch.ones(3)})
    assert same(after, state(model))


def test_optimisers_that_cannot_be_pruned() -> None:
    model = tied_network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)

    class Wrapper:
        optimizer = plain

    for wrong, message in [(Wrapper(), r"expected the torch\.optim\.Optimizer .*, got Wrapper: give its \.optimizer, "
                                       "which is SGD"), (None, "NoneType"),
                           (torch.optim.LBFGS(model.parameters()), "LBFGS")]:
        with pytest.raises(ValueError, match=message), IgnoreTopK().attach(wrong):  # type: ignore[arg-type]
            pass
    with IgnoreTopK().attach(plain), pytest.raises(ValueError, match="attached already"), IgnoreTopK().attach(plain):
        pass
    with IgnoreTopK(when="end").attach(torch.optim.LBFGS(model.parameters())):
        pass


def test_a_weight_sharded_across_processes_is_rejected() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="sharded across"), IgnoreTopK().attach(torch.optim.SGD([weight], lr=0.1)):
        pass


@pytest.mark.parametrize("fields", [{"k": -0.1}, {"k": 1.1}, {"k": True}, {"k": "8%"}, {"scope": "layer"},
                                    {"when": "now"}])
def test_parameters_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"IgnoreTopK\.{next(iter(fields))}: expected .*, got"):
        IgnoreTopK(**fields)
