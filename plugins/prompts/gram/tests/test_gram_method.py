"""The inner and outer steps against known numbers, the regulators, episodes, meta-training, adapting, bad input."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf import Budget, Prompt
from looseleaf_gram import Gram, MetaPrompt, Regulator, meta_loss, overlap, regulated
from looseleaf_gram.episodes import Episodes, read_pairs
from looseleaf_gram.regulator import Gated
from looseleaf_vision import CoOp, PromptSpec, Recipe, VisionPrompt, tune
from looseleaf_vision.testing import COLOURS, toy_clip, toy_pictures

SMALL: dict[str, Any] = {"n_ctx": 4, "classes": 4, "domains": 2, "ways": 2, "shots": 1, "episodes_per_step": 2,
                         "meta_steps": 4, "rank": 8}
QUIET: dict[str, Any] = {"progress": False}


def toy_pairs(each: int = 8) -> list[tuple[np.ndarray, str]]:
    """Noisy squares of four colours, dark and light ones of each, with the colours as captions."""
    draw = np.random.default_rng(0)
    out = []
    for name, dark, _ in itertools.product(list(COLOURS)[:4], (0.3, 1.0), range(each)):
        pixels = np.full((16, 16, 3), 0.5 if dark == 1.0 else 0.1) + 0.05 * draw.standard_normal((16, 16, 3))
        pixels[4:12, 4:12] = np.array(COLOURS[name]) * dark
        out.append(((pixels.clip(0, 1) * 255).astype(np.uint8), name))
    return out


def planted(pairs: list[Any], **options: Any) -> Episodes:
    """Episodes from features that are known: a direction for each caption, and for each brightness."""
    known = read_pairs(pairs)
    names = sorted({pair.caption for pair in known})
    texts = torch.eye(4)[[names.index(pair.caption) for pair in known]]
    dark = torch.tensor([float(np.asarray(p.example.inputs["image"]).mean() < 100) for p in known])
    images = nn.functional.normalize(torch.stack([dark, 1 - dark], 1) + 0.01, dim=1)
    return Episodes(known, images, texts, **{"classes": 4, "domains": 2, "ways": 3, "shots": 3, **options})


# -- inner and outer step ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("second_order", "expected"), [(True, -0.75), (False, -1.5)])
def test_scalar_case(second_order: bool, expected: float) -> None:
    """L_S = (t-1)^2/2, L_Q = (t-2)^2/2, t = 0, alpha = 1/2, M(g) = m g, m = 1: t' = 1/2."""
    t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    regulator = Regulator({"t": 1}, 1, "affine").double()
    reached = []

    def query(p: Any) -> torch.Tensor:
        reached.append(p["t"].item())
        return ((p["t"] - 2) ** 2 / 2).sum()

    loss = meta_loss({"t": t}, lambda p: ((p["t"] - 1) ** 2 / 2).sum(), query, regulator, lr=0.5,
                     second_order=second_order)
    loss.backward()  # type: ignore[no-untyped-call]
    part: Any = regulator.parts["t"]
    assert reached == [0.5] and loss.item() == 1.125
    assert t.grad.item() == expected and part.scale.grad.item() == -0.75  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["gated", "affine"])
def test_gradient_of_the_regulator_by_finite_differences(kind: Any) -> None:
    torch.manual_seed(0)
    regulator = Regulator({"p": 5}, 3, kind, rank=2, seed=1).double()
    with torch.no_grad():
        for weight in regulator.parameters():
            weight += 0.1 * torch.randn_like(weight)
    regulator.observe(torch.randn(4, 3, dtype=torch.float64))
    start, a, b = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))

    def loss() -> torch.Tensor:
        theta = {"p": start.clone().requires_grad_()}
        return meta_loss(theta, lambda p: ((p["p"] - a) ** 4).sum(), lambda p: ((p["p"] - b) ** 2).sum(), regulator,
                         lr=0.02)

    regulator.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    for name, weight in regulator.named_parameters():
        flat, grad = weight.detach().view(-1), weight.grad.view(-1)  # type: ignore[union-attr]
        for place in range(0, len(flat), max(1, len(flat) // 4)):
            kept = float(flat[place])
            sides = []
            for step in (1e-6, -1e-6):
                flat[place] = kept + step
                sides.append(loss().item())
            flat[place] = kept
            assert grad[place].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-7), name


def test_gated_keeps_the_length_of_rows_and_passes_where_the_gate_is_open() -> None:
    torch.manual_seed(0)
    gated, rows, feature = Gated(12, 6, 4), torch.randn(7, 12) * 10.0 ** torch.arange(-4, 3)[:, None], torch.randn(6)
    bent = gated.bent(rows)
    torch.testing.assert_close(bent.norm(dim=1), rows.norm(dim=1), rtol=1e-5, atol=1e-7)
    assert (bent < 0).any() and (Gated(12, 6, 4, final_relu=True).bent(rows) >= 0).all()
    last: Any = gated.gate[2]
    nn.init.constant_(last.bias, 1e4)
    assert torch.equal(gated(rows, feature), rows)
    nn.init.constant_(last.bias, -1e4)
    assert torch.equal(gated(rows, feature), bent)


@pytest.mark.parametrize("kind", ["affine", "none"])
def test_untrained_regulators_give_the_step_of_coop_bit_for_bit(kind: Any) -> None:
    clip, task = toy_clip(), toy_pictures(3)
    method = Gram(n_ctx=4, regulator=kind, epochs=3, lr=0.05, batch_size=4)
    learner = PromptSpec(length=4).build(clip, 3, seed=5)
    prompt = VisionPrompt.of(learner, task.classes or ())
    regulator = method.make_regulator(learner, clip)
    start = MetaPrompt(prompt.classes, prompt.spec, prompt.tensors, regulator=dict(regulator.state_dict()),
                       settings={"kind": kind, "dim": clip.dim, "rank": 1, "final_relu": False})
    ours = method.optimize(task, clip, start=start, seed=5, **QUIET)

    @dataclasses.dataclass
    class Same(CoOp):
        def recipe(self, task: Any) -> Recipe:
            return method.recipe()

    coop = Same(n_ctx=4).optimize(task, clip, start=prompt, seed=5, **QUIET)
    assert torch.equal(ours.tensors["context.context"], coop.tensors["context.context"])
    assert not torch.equal(ours.tensors["context.context"], prompt.tensors["context.context"])


def test_planted_start_and_planted_regulator_are_found() -> None:
    """Tasks whose answers are spread around one point: the start ends there. Losses whose gradients are too long by
    known factors: the regulator ends at their inverses, Newton's step."""
    torch.manual_seed(0)
    centre, scales = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 4.0, 0.5])
    theta, regulator = nn.Parameter(torch.zeros(3)), Regulator({"t": 3}, 1, "affine")
    for learned, lr, factor in (([theta], 0.1, 1.0), (list(regulator.parameters()), 1.0, scales)):
        optimizer = torch.optim.Adam(learned, lr=0.03)
        for _ in range(350):
            answer = centre + (0.3 if factor is not scales else 2.0) * torch.randn(3)
            optimizer.zero_grad()
            meta_loss({"t": theta}, lambda p, a=answer, f=factor: (f * (p["t"] - a) ** 2).sum() / 2,  # type: ignore[misc]
                      lambda p, a=answer: ((p["t"] - a) ** 2).sum(), regulator, lr=lr).backward()  # type: ignore[misc]
            optimizer.step()
    part: Any = regulator.parts["t"]
    torch.testing.assert_close(theta.detach(), centre, atol=0.15, rtol=0)
    torch.testing.assert_close(part.scale.detach(), 1 / scales, atol=0.02, rtol=0.02)
    torch.testing.assert_close(part.shift.detach(), torch.zeros(3), atol=0.05, rtol=0)


# -- episodes ------------------------------------------------------------------------------------------------------

def test_support_and_query_are_disjoint_of_the_same_names_and_another_domain() -> None:
    episodes = planted(toy_pairs())
    assert sorted(cluster.name for cluster in episodes.usable) == sorted(list(COLOURS)[:4])
    light = [float(np.asarray(p.example.inputs["image"]).mean() < 100) for p in episodes.pairs]
    for episode in itertools.islice(episodes, 30):
        support, query = episode.support.tolist(), episode.query.tolist()
        assert not set(support) & set(query) and len(set(support)) == len(set(query)) == 9
        for places in (support, query):
            assert [episodes.pairs[n].caption for n in places] == [episode.names[t] for t in episode.targets.tolist()]
        for number in range(3):
            sides = [{light[n] for n in places[3 * number:3 * number + 3]} for places in (support, query)]
            assert len(sides[0]) == len(sides[1]) == 1 and sides[0] != sides[1]
    same = planted(toy_pairs(), shifted=False)
    for episode in itertools.islice(same, 30):
        assert not set(episode.support.tolist()) & set(episode.query.tolist())
        assert [light[n] for n in episode.support.tolist()] == [light[n] for n in episode.query.tolist()]
    assert torch.equal(episodes[7].support, planted(toy_pairs())[7].support)


def test_small_domains_are_merged_and_namesakes_are_one_class() -> None:
    assert {len(d) for c in planted(toy_pairs(), shots=4).clusters for d in c.domains} == {8}
    with pytest.raises(ValueError, match=r"expected 3 classes or more with two domains of 10 pictures, got 0 of 4"):
        planted(toy_pairs(), shots=5)
    named = planted(toy_pairs(), ways=2, namer=lambda captions: "warm" if captions[0] in ("red", "yellow") else "cold")
    assert sorted((c.name, sum(map(len, c.domains))) for c in named.clusters) == [("cold", 32), ("warm", 32)]
    with pytest.raises(ValueError, match="namer: expected a name"):
        planted(toy_pairs(), namer=lambda captions: "")


def test_report_of_episodes_shows_support_and_query() -> None:
    report = Gram(**SMALL).episodes(toy_pairs(), toy_clip(), seed=1).report(count=2)
    assert [images.title for images in report.images] == [
        f"Episode {n}, {part}" for n in (0, 1) for part in ("support", "query")]


def test_overlap_with_a_task() -> None:
    task, pairs = toy_pictures(3), toy_pairs()
    assert overlap(pairs, task) == (["red", "green", "blue"], 0)
    assert overlap([*pairs, (task.test[0].inputs["image"], "something")], task)[1] == 1
    assert overlap([(picture, f"a {name} thing") for picture, name in pairs], task) == ([], 0)


# -- meta-training and adapting ------------------------------------------------------------------------------------

@pytest.mark.parametrize("learner", ["coop", "cocoop", "vpt", "both"])
def test_every_learner_is_meta_trained_and_adapted(learner: Any, tmp_path: Path) -> None:
    clip, task = toy_clip(layers=2), toy_pictures(3)
    before = {name: weight.clone() for name, weight in clip.model.state_dict().items()}
    method = Gram(**{**SMALL, "meta_steps": 2}, learner=learner, epochs=2, batch_size=8)
    meta = method.meta_train(toy_pairs(), clip, seed=3, **QUIET)
    untrained = method.spec().build(clip, 2, seed=3).state_dict()
    assert meta.tensors.keys() == untrained.keys()
    assert all(not torch.equal(meta.tensors[n], untrained[n]) for n in untrained if "network" not in n)
    fresh = method.make_regulator(method.spec().build(clip, 2), clip, seed=3).state_dict()
    assert any(not torch.equal(meta.regulator[n], fresh[n]) for n in fresh)
    assert all(torch.equal(weight, before[name]) for name, weight in clip.model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in clip.model.parameters())
    meta.save(tmp_path / "meta.json")
    again = Prompt.load(tmp_path / "meta.json")
    assert isinstance(again, MetaPrompt) and again.fingerprint() == meta.fingerprint()
    tuned = method.optimize(task, clip, start=again, **QUIET)
    assert tuned.info["start"] == "meta-trained" and tuned.info["regulator"] == "gated"
    assert 0 <= task.evaluate(tuned.on(clip)).score <= 1
    go_on = method.optimize(task, clip, start=tuned, **QUIET)
    assert go_on.fingerprint() != tuned.fingerprint()
    assert 0 <= task.evaluate(meta.for_classes(task.classes or ()).on(clip)).score <= 1  # before any step


def test_second_order_differs_and_runs() -> None:
    clip = toy_clip(layers=2)
    found = [Gram(**{**SMALL, "meta_steps": 1, "inner_lr": 1.0}, second_order=second).meta_train(
        toy_pairs(), clip, **QUIET) for second in (False, True)]
    assert found[0].info["history"] == pytest.approx(found[1].info["history"], rel=1e-4)
    assert found[0].fingerprint() != found[1].fingerprint()


def test_same_prompt_for_every_order_of_the_pairs() -> None:
    clip, pairs = toy_clip(layers=2), toy_pairs()
    found = [Gram(**SMALL).meta_train(order, clip, seed=2, **QUIET) for order in (pairs, pairs[::-1])]
    assert found[0].fingerprint() == found[1].fingerprint() and found[0].info == found[1].info
    method = Gram(**SMALL)
    episodes, budget = method.episodes(pairs, clip, seed=2), Budget()
    ready = method.meta_train(episodes, clip, seed=2, budget=budget, **QUIET)
    assert ready.fingerprint() == found[0].fingerprint() and budget.used["calls"] == 4 * 2 * 2 * 2  # names alone
    for bad, options, message in ((Gram(**{**SMALL, "ways": 3}), {}, "episodes with ways=3"),
                                  (method, {"namer": max}, "expected None with episodes")):
        with pytest.raises(ValueError, match=message):
            bad.meta_train(episodes, clip, **options)
    other = Gram(**SMALL).meta_train(pairs, clip, seed=4, **QUIET)
    assert other.fingerprint() != found[0].fingerprint()


def test_a_killed_run_goes_on_to_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, method = toy_clip(layers=2), Gram(**{**SMALL, "meta_steps": 6})
    whole = method.meta_train(toy_pairs(), clip, **QUIET)
    monkeypatch.setattr("looseleaf_gram.optimizer.BLOCK", 2)
    used = Budget()
    small = method.meta_train(toy_pairs(), clip, budget=Budget(calls=150), state_dir=tmp_path, **QUIET)
    assert small.info["stopped"] == "budget: calls" and 0 < small.info["evaluations"] < 6
    again = method.meta_train(toy_pairs(), clip, budget=used, state_dir=tmp_path, **QUIET)
    assert again.fingerprint() == whole.fingerprint() and again.info["stopped"] == "done"
    calls, kill = itertools.count(), tmp_path / "kill"
    encode = type(clip).texts

    def dying(self: Any, texts: Any, **options: Any) -> Any:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(type(clip), "texts", dying)
    with pytest.raises(KeyboardInterrupt):
        method.meta_train(toy_pairs(), clip, state_dir=kill, **QUIET)
    resumed = method.meta_train(toy_pairs(), clip, state_dir=kill, **QUIET)
    done = method.meta_train(toy_pairs(), clip, state_dir=kill, **QUIET)
    assert resumed.fingerprint() == done.fingerprint() == whole.fingerprint()
    with pytest.raises(ValueError, match="belongs to another search"):
        method.meta_train(toy_pairs()[1:], clip, state_dir=kill, **QUIET)
    nothing = method.meta_train(toy_pairs(), clip, budget=Budget(calls=1), **QUIET)
    assert nothing.info["evaluations"] == 0 and nothing.classes == []


def test_held_out_loss_falls_with_a_step() -> None:
    clip = toy_clip(layers=2)
    method = Gram(**{**SMALL, "ways": 3}, inner_lr=0.3)
    meta = method.meta_train(toy_pairs(), clip, **QUIET)
    losses = method.held_out(meta, method.episodes(toy_pairs(), clip, seed=9), clip, count=6)
    assert losses["after"] < losses["before"]


def test_regulated_serves_any_loop() -> None:
    """Before clipping, whatever the optimiser, once for each backward; afterwards gradients are as ever."""
    regulator = Regulator({"ctx": 3}, 2, "affine")
    part: Any = regulator.parts["ctx"]
    nn.init.constant_(part.scale, 3.0)
    mine = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([mine], lr=1.0)
    with regulated({"ctx": mine}, regulator):
        mine.sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(mine.grad, torch.full((2, 3), 3.0))  # type: ignore[arg-type]
        mine.sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(mine.grad, torch.full((2, 3), 6.0))  # type: ignore[arg-type]
        optimizer.step()
    mine.grad = None
    mine.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(mine.grad, torch.ones(2, 3)) and part.scale.grad is None  # type: ignore[arg-type]
    half = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    with regulated({"ctx": half}, regulator):
        half.sum().backward()  # type: ignore[no-untyped-call]
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_a_start_and_a_regulator_can_be_exchanged() -> None:
    clip, task = toy_clip(layers=2), toy_pictures(3)
    method = Gram(**SMALL, epochs=2, batch_size=8)
    meta = method.meta_train(toy_pairs(), clip, **QUIET)
    coop = VisionPrompt.of(PromptSpec(length=4).build(clip, 3), task.classes or ())
    mixed = method.optimize(task, clip, start=meta.with_vectors(coop), **QUIET)
    plain = dataclasses.replace(method, regulator="none")
    start_only = plain.optimize(task, clip, start=meta, **QUIET)
    bare = plain.optimize(task, clip, start=coop, **QUIET)
    both = method.optimize(task, clip, start=meta, **QUIET)
    assert len({p.fingerprint() for p in (mixed, start_only, bare, both)}) == 4
    with pytest.warns(UserWarning, match="bare learner"):
        alone = method.optimize(task, clip, **QUIET)
    assert alone.info["start"] == "none: the bare learner" and torch.equal(
        alone.tensors["context.context"], bare.tensors["context.context"])


# -- bad input -----------------------------------------------------------------------------------------------------

def test_bad_pairs() -> None:
    clip, pairs = toy_clip(layers=2), toy_pairs()
    method = Gram(**SMALL)
    for bad, message in (([], "pictures with captions, got none"), ([(pairs[0][0], "  ")], "caption with words, got"),
                         ([*pairs, (pairs[3][0], "again")], "every picture once, got 1 again"),
                         ([pairs[0][0]], r"expected \(picture, caption\)"),
                         (pairs[:8], r"expected 2 classes or more with two domains of 2 pictures, got"),
                         ([(np.zeros((4, 4, 9), np.uint8), "x")], "picture: expected")):
        with pytest.raises(ValueError, match=message):
            method.meta_train(bad, clip, **QUIET)
    broken = toy_clip(layers=2)
    with torch.no_grad():
        broken.model.visual_projection.weight[0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="features of pictures: expected finite numbers"):
        method.meta_train(pairs, broken, **QUIET)
    with pytest.raises(ValueError, match="expected a caption in each class that the model reads"):
        planted(pairs, fits=lambda caption: False)
    long = method.meta_train([(picture, f"{name} " * 60) for picture, name in pairs], clip,
                             namer=lambda captions: captions[0].split()[0], **QUIET)
    assert set(long.classes) <= set(COLOURS)


def test_bad_starts_and_regulators() -> None:
    clip, task = toy_clip(layers=2), toy_pictures(3)
    method = Gram(**SMALL, epochs=1)
    meta = method.meta_train(toy_pairs(), clip, budget=Budget(calls=140), **QUIET)
    coop = VisionPrompt.of(PromptSpec(length=4).build(clip, 3), task.classes or ())
    wide = toy_clip(layers=2, width=48)
    for optimizer, start, model, message in (
            (Gram(learner="vpt"), meta, clip, "of another learner"),
            (method, coop, clip, r"with the regulator 'gated', which meta_train makes, got one with 'none'"),
            (Gram(regulator="affine"), meta, clip, "got one with 'gated'"),
            (method, meta, wide, "learned for another model"), (method, "path", clip, "of another learner")):
        with pytest.raises(ValueError, match=message):
            optimizer.optimize(task, model, start=start, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected vectors of the shapes|with_vectors"):
        meta.with_vectors(VisionPrompt.of(PromptSpec(length=5).build(clip, 3), []))
    regulator = meta.make_regulator()
    with pytest.raises(ValueError, match="learned for another width"), \
            regulated({"context.context": nn.Parameter(torch.zeros(4, 7))}, regulator):
        pass
    with pytest.raises(ValueError, match=r"expected tensors named context\.context, got 'ctx'"), \
            regulated({"ctx": nn.Parameter(torch.zeros(4, 24))}, regulator):
        pass
    with pytest.raises(ValueError, match="leaf tensors that ask for a gradient"), \
            regulated({"context.context": torch.zeros(4, 24)}, regulator):
        pass
    mine = nn.Parameter(torch.zeros(4, 24))
    with pytest.raises(ValueError, match="call observe"), regulated({"context.context": mine}, regulator):
        mine.sum().backward()  # type: ignore[no-untyped-call]
    for features, message in ((torch.zeros(3, 5), r"expected \(B, 16\)"),
                              (torch.full((3, 16), float("nan")), "expected finite")):
        with pytest.raises(ValueError, match=message):
            regulator.observe(features)
    with pytest.raises(ValueError, match=r"Gram.ways: expected an integer >= 2, got 1"):
        Gram(ways=1)
    with pytest.raises(ValueError, match="kind: expected 'gated'"):
        Regulator({"t": 2}, 2, "other")  # type: ignore[arg-type]


def test_tune_with_regulated_is_optimize() -> None:
    """What a user's own loop gives with ``regulated`` is what :meth:`Gram.optimize` gives."""
    clip, task = toy_clip(layers=2), toy_pictures(3)
    method = Gram(**SMALL, epochs=2, batch_size=8)
    meta = method.meta_train(toy_pairs(), clip, **QUIET)
    learner, regulator = meta.for_classes(task.classes or ()).learner(clip), meta.make_regulator()

    def loss(batch: Any, model: Any) -> torch.Tensor:
        regulator.observe(batch.features)
        return nn.functional.cross_entropy(learner(model, task.classes or (), features=batch.features), batch.targets)

    with regulated(dict(learner.named_parameters()), regulator):
        tune(learner, loss, task, clip, method.recipe(), seed=0, **QUIET)
    ours = method.optimize(task, clip, start=meta, seed=0, **QUIET)
    assert torch.equal(ours.tensors["context.context"], learner.state_dict()["context.context"])
