"""Iterative magnitude pruning: the loop, what training functions see, tickets on disk, and kills."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from looseleaf import NM, Masks, Paper, Unstructured, prunable_parameters
from looseleaf.testing import conformance_tests
from looseleaf.testing.models import small_network
from looseleaf_tickets import Grouped, IterativePruner, Ticket, TrainingRun, find_tickets, train_ticket

torch.set_num_threads(1)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4].sum(1, keepdim=True) > 0).float()


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(),
                             nn.Linear(12, 1))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(X[batch]), Y[batch])


def plain(model: nn.Module) -> None:
    """Ordinary code: global random numbers, knows nothing of rounds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss_of(model, torch.randint(0, 64, (16,))).backward()
        optimizer.step()


def stepping(model: nn.Module, run: TrainingRun) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in run.steps(12):
        optimizer.zero_grad()
        loss_of(model, torch.randint(0, 64, (16,))).backward()
        optimizer.step()


def evaluate(model: nn.Module) -> float:
    assert not model.training and not torch.is_grad_enabled()
    return float(loss_of(model, torch.arange(64)))


def levels(rounds: int, fraction: float = 0.2) -> list[float]:
    return [1 - (1 - fraction) ** i for i in range(1, rounds + 1)]


def rules(rounds: int, **given: Any) -> list[Any]:
    return [Unstructured(level, **given) for level in levels(rounds)]


def same(a: list[Ticket], b: list[Ticket]) -> bool:
    return len(a) == len(b) and all(
        x.masks == y.masks and x.metrics == y.metrics and (x.round, x.step) == (y.round, y.step)
        and x.start.keys() == y.start.keys() and all(torch.equal(t, y.start[n]) for n, t in x.start.items())
        for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------------- the loop
def written_out(model: nn.Module, rounds: int, scope: Any, seed: int) -> list[dict[str, Tensor]]:
    """The method in its plainest form: sort, cut, multiply the start by the mask, no gradient where it is 0."""
    names = list(prunable_parameters(model))
    start = {n: t.clone() for n, t in model.state_dict().items()}
    masks = {n: torch.ones_like(start[n], dtype=torch.bool) for n in names}
    out = []
    for level in levels(rounds):
        model.load_state_dict({n: t * masks[n] if n in masks else t for n, t in start.items()})
        weights = dict(model.named_parameters())
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
        for _ in range(12):
            optimizer.zero_grad()
            loss_of(model, torch.randint(0, 64, (16,))).backward()
            for n in names:
                weights[n].grad[~masks[n]] = 0.0  # type: ignore[index]
            optimizer.step()
        groups = [names] if scope == "global" else [[n] for n in names]
        for group in groups:
            flat = torch.cat([torch.where(masks[n], weights[n].detach().abs(), -1.0).flatten() for n in group])
            gone = flat.sort(stable=True).indices[:round(level * len(flat))]
            keep = torch.ones(len(flat), dtype=torch.bool)
            keep[gone] = False
            for n, part in zip(group, keep.split([masks[n].numel() for n in group])):
                masks[n] = part.view(masks[n].shape)
        out.append({n: m.clone() for n, m in masks.items()})
    model.load_state_dict(start)
    return out


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_loop_is_the_method_written_out(scope: Any) -> None:
    tickets = find_tickets(network(), plain, rules(5, scope=scope), seed=7, progress=False)
    assert [t.masks for t in tickets[1:]] == [Masks(m) for m in written_out(network(), 5, scope, 7)]


def test_counts_nesting_and_start() -> None:
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tickets = find_tickets(model, plain, rules(9), evaluate=evaluate, progress=False)
    total = 8 * 24 + 24 * 12 + 12
    assert [t.round for t in tickets] == list(range(10)) and tickets[0].density == 1
    for i, (ticket, after) in enumerate(zip(tickets, tickets[1:] + tickets[-1:])):
        assert ticket.masks.total() - ticket.masks.removed() == total - round((1 - 0.8 ** i) * total)
        assert (ticket.masks & after.masks) == after.masks and "score" in ticket.metrics
        assert not any("bias" in n or n.startswith("1.") for n in ticket.masks), "biases and norms are never pruned"
        made = network(seed=5)
        ticket.apply(made).make_permanent(made)
        for name, tensor in made.state_dict().items():
            assert torch.equal(tensor, before[name] * ticket.masks[name] if name in ticket.masks else before[name])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_seeds_reproduce_and_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    found = find_tickets(network(), plain, rules(2), seed=1, progress=False)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    torch.manual_seed(3)
    assert torch.equal(states[0], torch.get_rng_state())

    def noisy(model: nn.Module) -> None:
        random.random(), np.random.rand()
        plain(model)

    again = find_tickets(network(), noisy, rules(2), seed=1, progress=False)
    assert same(found, again)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]
    assert not same(found, find_tickets(network(), plain, rules(2), seed=2, progress=False))


OPTIMISERS = {
    "momentum and weight decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam with L2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1)}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_removed_weights_stay_exactly_zero(name: str) -> None:
    rule = Unstructured(0.7)
    model = network()
    masks = rule.select({n: p.detach().abs() for n, p in prunable_parameters(model).items()})

    def train(model: nn.Module) -> None:
        optimizer = OPTIMISERS[name](model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model, torch.randint(0, 64, (16,))).backward()
            optimizer.step()
            for n in masks:
                layer: Any = model[int(n[0])]  # type: ignore[index]
                assert not layer.weight[~masks[n]].any(), "what the network computes with and the optimiser holds"

    trained = train_ticket(Ticket(masks, dict(model.state_dict())), model, train)
    weights = dict(trained.model.named_parameters())
    assert all(not weights[n][~m].any() and weights[n][m].all() for n, m in masks.items())
    assert type(trained.model[0]) is nn.Linear  # type: ignore[index]


# --------------------------------------------------------------------------------------------- rewinding and steps
def test_weights_of_a_step_within_the_first_training() -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    starts: list[int] = []

    def train(model: nn.Module, run: TrainingRun) -> None:
        starts.append(run.start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for step in run.steps(12):
            if run.round == 0:
                seen[step] = {n: t.clone() for n, t in model.state_dict().items()}
            elif step == run.start:
                now = model.state_dict()
                assert all(torch.equal(now[n], t) for n, t in seen[5].items() if "running" in n or "bias" in n)
            optimizer.zero_grad()
            loss_of(model, torch.randint(0, 64, (16,))).backward()
            optimizer.step()

    for rewind in (5, 5 / 12):
        starts.clear()
        tickets = find_tickets(network(), train, rules(2), rewind_to=rewind, progress=False)
        assert starts == [0, 5, 5] and [t.step for t in tickets] == [0, 5, 5]
        for ticket in tickets[1:]:
            assert all(torch.equal(t, seen[5][n]) for n, t in ticket.start.items())


@pytest.mark.parametrize("how", ["steps", "step", "batches"])
def test_a_rewound_training_without_pruning_is_the_rest_of_the_first(how: str) -> None:
    """Nothing removed and no state in the optimiser: the trajectory must go on bit for bit."""
    data = torch.utils.data.TensorDataset(torch.arange(64))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    trace: dict[int, list[int]] = {}

    def turn(model: nn.Module, optimizer: Any, batch: Tensor, step: int) -> None:
        trace.setdefault(step, []).append(int(batch[0]))
        for group in optimizer.param_groups:
            group["lr"] = 0.3 / (1 + step)
        optimizer.zero_grad()
        nn.functional.dropout(loss_of(model, batch), 0.3).backward()
        optimizer.step()

    def train(model: nn.Module, run: TrainingRun) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        if how == "batches":
            for (batch,) in run.batches(loader, 14):
                turn(model, optimizer, batch, run.done)
        elif how == "steps":
            for step in run.steps(14):
                turn(model, optimizer, torch.randint(0, 64, (16,)), step)
        else:
            run.total = 14
            for step in range(run.start, 14):
                turn(model, optimizer, torch.randint(0, 64, (16,)), step)
                run.step()

    for rewind in (4, 6, 0.5):  # at the end of a pass over the data, and within one
        trace.clear()
        first = train_ticket(Ticket(whole(network()), dict(network().state_dict())), network(), train, seed=3,
                             rewind_to=rewind)
        assert first.captured is not None and first.steps == 14
        rest = train_ticket(Ticket(whole(network()), first.captured, 1, first.step), network(), train, seed=3)
        assert all(len(v) == 1 + (s >= first.step) and len(set(v)) == 1 for s, v in trace.items())
        if how != "batches":  # dropout draws from the global generator, which passes over the data do not touch
            assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(),
                                                         rest.model.state_dict().values()))


def whole(model: nn.Module) -> Masks:
    return Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in prunable_parameters(model).items()})


def test_passes_over_the_data() -> None:
    """Each pass is a permutation, passes differ, the order depends on the seed, a loader's own generator is heeded."""
    data = list(range(8))
    own = torch.Generator()
    for generator in (None, own):
        loader: Any = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]

        def drawn(seed: int, start: int = 0, total: int = 12, source: Any = loader) -> list[list[int]]:
            run = TrainingRun(network(), seed=seed, start=start)
            return [list(map(int, batch)) for batch in run.batches(source, total)]

        all_ = drawn(0)
        passes = [[x for batch in all_[i:i + 4] for x in batch] for i in (0, 4, 8)]
        assert all(sorted(p) == data for p in passes) and passes[0] != passes[1]
        own.manual_seed(99)
        assert drawn(0) == all_ and drawn(1) != all_ and drawn(0, start=6) == all_[6:]
        assert drawn(0, start=2, total=5, source=[[1], [2], [3]]) == [[3], [1], [2]]


@pytest.mark.parametrize("train, rewind, words", [
    (plain, 3, "a parameter called run"),
    (lambda model, run: plain(model), 3, "reported no step"),
    (stepping, 12, "before the last of 12, got 12"),
    (stepping, 40, "before the last of 12, got 40"),
    (stepping, 0.01, "rounds to step 0"),
    *((stepping, value, "expected a step of the training") for value in (-1, 1.0, True, float("nan"), "early"))])
def test_rewinding_that_cannot_be(train: Any, rewind: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_tickets(network(), train, rules(1), rewind_to=rewind, progress=False)


def own_loop(model: nn.Module, run: TrainingRun, begin: int, end: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(begin, end):
        optimizer.zero_grad()
        loss_of(model, torch.arange(16)).backward()
        optimizer.step()
        run.step()


def test_loops_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"ended after 6 steps, before step 9"):
        find_tickets(network(), lambda model, run: own_loop(model, run, 0, 6), rules(1), rewind_to=9, progress=False)
    with pytest.raises(ValueError, match=r"fraction of an unknown number of steps"):
        find_tickets(network(), lambda model, run: own_loop(model, run, 0, 6), rules(1), rewind_to=0.5, progress=False)
    with pytest.raises(ValueError, match=r"round 1: 6 steps were taken from step 2 on.*begin at run\.start"):
        find_tickets(network(), lambda model, run: own_loop(model, run, 0, 6), rules(1), rewind_to=2, progress=False)
    tickets = find_tickets(network(), lambda model, run: own_loop(model, run, run.start, 6), rules(1), rewind_to=2,
                           progress=False)
    assert tickets[1].step == 2

    def twice(model: nn.Module, run: TrainingRun) -> None:
        for _ in run.steps(3):
            run.step()

    with pytest.raises(ValueError, match="which count by themselves"):
        find_tickets(network(), twice, rules(1), progress=False)
    for total in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="total: expected"):
            list(TrainingRun(network()).steps(total))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than 5 steps, where this training begins"):
        list(TrainingRun(network(), start=5).steps(5))
    for loader in ([], iter([1])):
        with pytest.raises(ValueError, match="known length"):
            list(TrainingRun(network()).batches(loader, 5))


# --------------------------------------------------------------------------------------------------- bad training
@pytest.mark.parametrize("what", ["weight", "gradient", "loss"])
def test_numbers_that_are_none_are_named_and_finished_rounds_stay(what: str, tmp_path: Path) -> None:
    healthy = [True]

    def train(model: nn.Module, run: TrainingRun) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        for step in run.steps(12):
            optimizer.zero_grad()
            loss = loss_of(model, torch.randint(0, 64, (16,)))
            bad = run.round == 2 and step == 3 and not healthy[0]
            (loss * torch.nan if bad and what == "loss" else loss).backward()
            weight = dict(model.named_parameters())["3.bias"]
            if bad and what == "gradient":
                weight.grad[0] = torch.nan  # type: ignore[index]
            optimizer.step()
            if bad and what == "weight":
                weight.data[0] = torch.inf

    expected = find_tickets(network(), train, rules(3), evaluate=evaluate, progress=False)
    healthy[0] = False
    name = r"'0\.bias'|'0\.parametrizations|'0\.weight'" if what == "loss" else r"'3\.bias'"
    words = rf"round 2: after 4 steps the weights of ({name}).*lower the learning rate"
    with pytest.raises(ValueError, match=words) as e:
        find_tickets(network(), train, rules(3), evaluate=evaluate, state=tmp_path, progress=False)
    assert ("as is its gradient" in str(e.value)) == (what != "weight")
    kept = sorted(os.listdir(tmp_path))
    assert "trained-01.json" in kept and "trained-02.json" not in kept and "masks-02.safetensors" in kept
    healthy[0] = True
    assert same(find_tickets(network(), train, rules(3), evaluate=evaluate, state=tmp_path, progress=False), expected)


def test_a_plain_function_that_diverges() -> None:
    def train(model: nn.Module) -> None:
        plain(model)
        list(model.parameters())[-1].data.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"round 0: the weights of '5\.bias' are NaN"):
        find_tickets(network(), train, rules(1), progress=False)


def off(model: nn.Module) -> None:
    plain(model)
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().clone())


def other(model: nn.Module) -> nn.Module:
    plain(model)
    return network()


OUTSIDE = network()


@pytest.mark.parametrize("train, words", [
    (None, "expected a training function, got NoneType"), ([torch.ones(2)], "expected a training function, got list"),
    (nn.Linear(2, 2), "expected a training function, got Linear"), (lambda model: None, "changed no weight"),
    (lambda model: plain(OUTSIDE), "changed no weight"), (off, "took the mask of '0.weight' off"),
    (other, "returned another model"), (lambda model: plain(model) or 3, "train: expected .*, got int"),
    (lambda model: plain(model) or {"x": "much"}, "train: expected .*, got dict"),
    (lambda model: plain(model) or {"x": float("nan")}, "NaN for 'x'"),
    (lambda model: plain(model) or {"score": 1.0}, "both train and evaluate")])
def test_training_functions_that_cannot_be(train: Any, words: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=words):
        find_tickets(model, train, rules(2), evaluate=evaluate, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), network().state_dict().values()))


def test_what_functions_return_becomes_metrics() -> None:
    def train(model: nn.Module) -> dict[str, Any]:
        plain(model)
        return {"early_stop": 4, "loss": torch.tensor(0.5)}

    found = find_tickets(network(), train, rules(1), evaluate=lambda m: {"accuracy": 1}, progress=False)
    assert [t.metrics for t in found] == [{"early_stop": 4.0, "loss": 0.5, "accuracy": 1.0}] * 2
    assert find_tickets(network(), train, rules(1), train_last=False, progress=False)[1].metrics == {}

    def gives_it_back(model: nn.Module) -> nn.Module:
        plain(model)
        return model

    assert find_tickets(network(), gives_it_back, rules(1), progress=False)[0].metrics == {}
    for bad in (lambda m: None, lambda m: "good", lambda m: {"a": None}, lambda m: float("nan")):
        with pytest.raises(ValueError, match="evaluate"):
            find_tickets(network(), plain, rules(1), evaluate=bad, progress=False)  # type: ignore[arg-type]


def test_bad_models_rules_and_names() -> None:
    broken = network()
    with torch.no_grad():
        broken[3].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"'3\.bias' has 1 NaN"):
        find_tickets(broken, plain, rules(1), progress=False)
    masked = network()
    whole(masked).apply(masked)
    with pytest.raises(ValueError, match="carries a mask"):
        find_tickets(masked, plain, rules(1), progress=False)
    with pytest.raises(ValueError, match="rising sparsities"):
        find_tickets(network(), plain, [Unstructured(0.5), Unstructured(0.2)], progress=False)
    with pytest.raises(ValueError, match="expected at least one parameter of this Sequential, got 'nothing'"):
        find_tickets(network(), plain, rules(1), weights=["nothing"], progress=False)
    with pytest.raises(ValueError, match="at least one"):
        find_tickets(network(), plain, rules(1), weights=[], progress=False)
    with pytest.raises(ValueError, match=r"seed: expected an integer, got 0\.5"):
        find_tickets(network(), plain, rules(1), seed=0.5, progress=False)  # type: ignore[arg-type]
    found = find_tickets(network(), plain, [NM(6, 8), NM(4, 8)], weights=["0.weight", "3.weight"], progress=False)
    assert not NM(4, 8).violations(found[-1].masks)


# ---------------------------------------------------------------------------------------------------------- tickets
def test_ticket_file(tmp_path: Path) -> None:
    tickets = find_tickets(network(), stepping, rules(2), evaluate=evaluate, rewind_to=3, progress=False)
    path = tmp_path / "deep" / "ticket.safetensors"
    tickets[2].save(path)
    assert os.listdir(path.parent) == ["ticket.safetensors"]
    loaded = Ticket.load(path)
    assert same([loaded], [tickets[2]]) and loaded.masks.metadata == tickets[2].masks.metadata
    assert "round 2, density 0.64" in repr(loaded) and "from step 3, score" in repr(loaded)
    data = path.read_bytes()
    for size in (0, 7, 20, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="not a whole safetensors"):
            Ticket.load(path)
    tickets[1].masks.save(path)
    with pytest.raises(ValueError, match=r"expected a file of the format 'looseleaf\.ticket"):
        Ticket.load(path)
    with pytest.raises(FileNotFoundError):
        Ticket.load(tmp_path / "nothing")
    tickets[1].masks.metadata["x"] = object()
    with pytest.raises(ValueError, match="JSON"):
        tickets[1].save(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        tickets[0].save(tmp_path / "file" / "t")


def test_a_failed_write_leaves_the_former_ticket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = find_tickets(network(), plain, rules(1), progress=False)
    tickets[0].save(tmp_path / "t")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        tickets[1].save(tmp_path / "t")
    assert same([Ticket.load(tmp_path / "t")], [tickets[0]]) and os.listdir(tmp_path) == ["t"]


def test_tickets_for_another_model() -> None:
    ticket = find_tickets(network(), plain, rules(1), progress=False)[1]
    wide = nn.Sequential(nn.Linear(8, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(),
                         nn.Linear(12, 1))
    bare = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 1))
    for model, words in ((wide, "for another model"), (small_network(), "for another model"), (bare, "1.bias")):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            ticket.apply(model)
        with pytest.raises(ValueError, match=words):
            train_ticket(ticket, model, plain)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    once = network()
    ticket.apply(once)
    with pytest.raises(ValueError, match="carries masks"):
        ticket.apply(once)


def test_half_precision_tied_weights_and_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from looseleaf.testing.models import tied_llama as tiny_llama

    ids = torch.arange(24).view(2, 12) * 7 % 61

    def train(model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    model = tiny_llama().bfloat16()
    tickets = find_tickets(model, train, rules(2), state=tmp_path, progress=False)
    assert same(find_tickets(model, train, rules(2), state=tmp_path, progress=False), tickets)
    assert tickets[1].start["model.norm.weight"].dtype == torch.bfloat16
    tickets[2].apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -------------------------------------------------------------------------------------------------------- the state
def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    find_tickets(network(), stepping, rules(2), seed=1, state=tmp_path, progress=False)
    for changes, words in (({"seed": 2}, "seed was 1, is 2"), ({"rewind_to": 3}, "rewind_to was 0, is 3"),
                           ({"rules": rules(3)}, "rules was"), ({"model": network(1)}, "model was"),
                           ({"weights": ["0.weight"]}, "weights was")):
        given: dict[str, Any] = {"model": network(), "train": stepping, "rules": rules(2), "seed": 1, **changes}
        with pytest.raises(ValueError, match=f"belongs to another search.*{words}"):
            find_tickets(**given, state=tmp_path, progress=False)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(ValueError, match=r"search\.json cannot be read"):
        find_tickets(network(), stepping, rules(2), seed=1, state=tmp_path, progress=False)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    find_tickets(network(), plain, rules(2), state=tmp_path, progress=False)
    for name in ("trained-01.json", "masks-02.safetensors", "start.safetensors"):
        was = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(was[:10])
        with pytest.raises(ValueError):
            find_tickets(network(), plain, rules(2), state=tmp_path, progress=False)
        (tmp_path / name).write_bytes(was)


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    trained: list[int] = []

    def train(model: nn.Module, run: TrainingRun) -> None:
        trained.append(run.round)
        stepping(model, run)

    first = find_tickets(network(), train, rules(2), evaluate=evaluate, state=tmp_path, progress=False)
    assert trained == [0, 1, 2]
    assert same(find_tickets(network(), train, rules(2), evaluate=evaluate, state=tmp_path, progress=False), first)
    assert trained == [0, 1, 2]


KILLED = '''
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_tickets_iterative as this
from looseleaf_tickets import tickets

at, state = sys.argv[1], sys.argv[2]
writes = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

real = tickets.write_text
def write_text(path, text):
    if at == "before " + path.name:
        die()
    real(path, text)
    if at == "after " + path.name:
        die()
tickets.write_text = write_text

def train(model, run):
    optimizer = this.torch.optim.SGD(model.parameters(), lr=0.2)
    for step in run.steps(12):
        if at == f"round {{run.round}} step {{step}}":
            die()
        optimizer.zero_grad()
        this.loss_of(model, this.torch.randint(0, 64, (16,))).backward()
        optimizer.step()

this.find_tickets(this.network(), train, this.rules(4), evaluate=this.evaluate, rewind_to=3, seed=5, state=state,
                  progress=False)
'''


def test_kill_9_between_and_inside_rounds(tmp_path: Path) -> None:
    expected = find_tickets(network(), stepping, rules(4), evaluate=evaluate, rewind_to=3, seed=5,
                            state=tmp_path / "whole", progress=False)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent)))
    for at in ("round 0 step 7", "before trained-00.json", "after trained-01.json", "round 2 step 11"):
        done = subprocess.run([sys.executable, str(script), at, str(tmp_path / "state")], capture_output=True,
                              text=True)
        assert done.returncode == -signal.SIGKILL, (at, done.stderr)
    found = find_tickets(network(), stepping, rules(4), evaluate=evaluate, rewind_to=3, seed=5,
                         state=tmp_path / "state", progress=False)
    assert same(found, expected)
    names = sorted(os.listdir(tmp_path / "whole"))
    assert [n for n in sorted(os.listdir(tmp_path / "state")) if not n.endswith(".part")] == names
    for name in names:  # what is on disk, too; the heads of safetensors files have no order
        one, two = (tmp_path / folder / name for folder in ("state", "whole"))
        assert one.suffix == ".safetensors" or one.read_bytes() == two.read_bytes(), name
        assert not name.startswith("masks") or Masks.load(one) == Masks.load(two)


# ----------------------------------------------------------------------------------------------- rules and the pruner
def test_grouped() -> None:
    scores = {"a.weight": torch.rand(10, 10), "b.weight": torch.rand(30), "out.weight": torch.rand(4, 5)}
    rule = Grouped(Unstructured(0.5), {"out": Unstructured(0.25)})
    masks = rule.select(scores)
    assert list(masks) == list(scores) and masks.removed("out.weight") == 5 and masks.removed() == 65 + 5
    assert not rule.violations(masks) and Grouped(Unstructured(0.5), {"out": Unstructured(0.5)}).violations(masks)
    assert json.loads(json.dumps(rule.describe()))["others"]["out"]["sparsity"] == 0.25
    with pytest.raises(ValueError, match="'nothing' matches none"):
        Grouped(Unstructured(0.5), {"nothing": Unstructured(0.2)}).select(scores)


@dataclasses.dataclass
class Sound(IterativePruner):
    __doc__ = IterativePruner.__doc__
    paper: ClassVar[Paper] = Paper("A title", ("An Author",), 2020, summary="for tests")

    def rewinding(self) -> int | float:
        return 0


test_conformance = conformance_tests(Sound, {
    "rounds": {}, "sparsity": {"make": lambda: Sound(sparsity=0.5, scope="layer", fraction=0.4)}})


def test_schedules() -> None:
    assert [r.sparsity for r in Sound(rounds=3).rules()] == levels(3) and len(Sound().rules()) == 8  # type: ignore[attr-defined]
    assert [r.sparsity for r in Sound(sparsity=0.5).rules()] == [*levels(3), 0.5]  # type: ignore[attr-defined]
    assert [r.sparsity for r in Sound(sparsity=1 - 0.8 ** 3).rules()] == levels(3)  # type: ignore[attr-defined]
    assert Sound(sparsity=0.0).rules() == [] and len(Sound(sparsity=0.5, rounds=9).rules()) == 4
    with pytest.raises(ValueError, match=r"rounds: expected None or at least 11 \(with fraction=0\.2, 3 rounds reach "
                                         r"sparsity 0\.488, not 0\.9\), got 3"):
        Sound(rounds=3, sparsity=0.9)
    rule: Any = Sound(rounds=2, half_rate_layers="5").selection()  # type: ignore[arg-type]
    assert rule.others["5"].sparsity == 1 - 0.9 ** 2
    rule = Sound(sparsity=0.9, half_rate_layers=("5",)).selection()
    assert rule.rule.sparsity == 0.9 and rule.others["5"].sparsity == pytest.approx(1 - 0.9 ** 10.3189, abs=1e-5)


@pytest.mark.parametrize("fields, word", [
    ({"rounds": 0}, "rounds"), ({"rounds": 2.5}, "rounds"), ({"rounds": True}, "rounds"),
    ({"fraction": 0.0}, "fraction"), ({"fraction": 1.0}, "fraction"), ({"fraction": "much"}, "fraction"),
    ({"sparsity": 1.0}, "sparsity"), ({"sparsity": "half"}, "sparsity"),
    ({"scope": "model"}, "scope"), ({"seed": 0.5}, "seed"),
    ({"half_rate_layers": ()}, "half_rate_layers"), ({"targets": 5}, "targets"), ({"exclude": ("",)}, "exclude")])
def test_bad_values(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        Sound(**fields)
    assert f"Sound.{word}: expected " in str(caught.value)


def test_find_prune_and_score_agree(tmp_path: Path) -> None:
    pruner = Sound(rounds=3, scope="layer", half_rate_layers=("5",), seed=4)
    tickets = pruner.find(network(), plain, evaluate, state=tmp_path, progress=False)
    assert pruner.prune(network(), data=plain) == tickets[-1].masks
    assert pruner.selection().select(pruner.score(network(), plain)) == tickets[-1].masks
    assert tickets[-1].masks.removed("5.weight") == round((1 - 0.9 ** 3) * 12)
    assert tickets[-1].masks.removed("3.weight") == round((1 - 0.8 ** 3) * 288)
    assert tickets[-1].masks.metadata["round"] == 3 and tickets[-1].masks.metadata["prunable"] == 492
    assert same(pruner.find(network(), plain, evaluate, state=tmp_path, progress=False), tickets)
    for data in (None, [torch.ones(2, 8)], X):
        with pytest.raises(ValueError, match=r"expected a training function.*prune\(model, data=train\)"):
            pruner.prune(network(), data)
    with pytest.raises(ValueError, match="matches no parameter"):
        Sound(half_rate_layers=("output",)).prune(network(), plain)
    assert Sound(sparsity=0.0).prune(network(), plain).removed() == 0


@pytest.mark.gpu
def test_a_model_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = network().cuda()

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 8, device="cuda")).square().mean().backward()
            optimizer.step()

    tickets = find_tickets(model, train, rules(2), progress=False)
    assert tickets[2].masks["0.weight"].is_cuda and not tickets[2].start["0.weight"].is_cuda
    assert same(tickets, find_tickets(model, train, rules(2), progress=False))
