"""The paper's claims on molecules, in front of a small network pre-trained here, and on a task with a known answer."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from looseleaf import Budget, Claim, Report, Task
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data
from looseleaf_lab.study import Results, Study, above, add_table, below, curve, every
from looseleaf_relief.baselines import GPF, SUPT, FineTuning, GPFPlus, LinearProbe, RandomPrompt
from looseleaf_relief.data import few_shot, freesolv, molecule, planted, pretrain, shaded, solubility, toy_graphs
from looseleaf_relief.graphs import GraphNetwork
from looseleaf_relief.optimizer import RELIEF, PromptingPolicy
from looseleaf_relief.policy import dense
from looseleaf_relief.prompt import FeaturePrompt, GraphOptimizer, coverage

OURS, PROBE, TUNED, RANDOM = "RELIEF", "linear probe", "fine-tuning", "random prompt"
TASKS, MAIN = ("solubility", "freesolv"), "freesolv"
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "one pair of actors": {"members": 1}, "without penalties": {"alpha_d": 0.0, "alpha_c": 0.0},
    "random nodes": {"nodes": "random"}, "random vectors": {"content": "random"}}
SOURCE = "this project's rule"
PAPER = "tables not available to us [abstract]"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured for each seed; ``made_up``: small graphs in the place of molecules, for tests."""

    shots: int = 50
    other_shots: tuple[int, ...] = (10, 30)
    draws: int = 2
    epochs: int = 50
    z_max: tuple[float, ...] = (0.1, 0.5)
    rates: tuple[float, ...] = (1e-3, 5e-3)
    pretraining: int = 600
    planted: int = 32
    atoms: int = 24
    made_up: bool = False


@functools.cache
def rows() -> list[dict[str, Any]]:
    """The lab's molecules."""
    importlib.import_module("rdkit.RDLogger").DisableLog("rdApp.*")  # a few SMILES cannot be read
    return list(data.rows("molecules"))


@functools.cache
def network(kind: str, scale: Scale) -> GraphNetwork:
    """The network that all seeds prompt: pre-trained on ChEMBL molecules, without labels."""
    if scale.made_up:
        from looseleaf_relief.data import toy_network

        return toy_network()
    graphs = [g for row in rows() if row["set"] == "chembl" and (g := molecule(row["smiles"])) is not None
              and 2 <= int(g.num_nodes or 0) <= 50]
    return pretrain(graphs, kind, steps=scale.pretraining)[0]


@functools.cache
def parts(name: str, seed: int, scale: Scale) -> Any:
    """What shots are drawn from, and test, of a task."""
    return solubility(rows(), scale.atoms) if name == "solubility" else freesolv(rows(), seed)


def task_of(name: str, shots: int, seed: int, scale: Scale) -> Task:
    """A draw of the shots, and as many validation examples as shots, 50 at most."""
    if scale.made_up:
        return dataclasses.replace(toy_graphs(), name=name)
    pool, test = parts(name, seed, scale)
    return few_shot(name, pool, test, shots=shots, dev=min(shots, 50), seed=seed)


def best(methods: list[GraphOptimizer], task: Task, net: GraphNetwork, seed: int) -> tuple[float, FeaturePrompt]:
    """Test score of the method that validates best, and its prompt."""
    found = [m.optimize(task, net, seed=seed, progress=False) for m in methods]
    prompt = max(found, key=lambda p: p.info["fitness"])
    return task.evaluate(prompt.on(net)).score, prompt


def methods(name: str, scale: Scale, **more: Any) -> list[GraphOptimizer]:
    """The settings of a method among which validation chooses; all have the same head and see it as often."""
    common: dict[str, Any] = {"epochs": scale.epochs, "head_lr": 5e-3, "skip": min(20, scale.epochs // 2)}
    if scale.made_up:
        common |= {"head_layers": 2}
    if name == OURS:
        # eight of these molecules have fewer than 64 atoms, and would not make an update
        small = {"minibatch_size": 8, "batch_size": 4, "members": 2} if scale.made_up else {"minibatch_size": 32}
        return [RELIEF(z_max=z, **{**common, **small, **more}) for z in scale.z_max]
    kinds: dict[str, Any] = {"GPF": GPF, "GPF-plus": GPFPlus, "SUPT": SUPT}
    if name in kinds:
        return [kinds[name](prompt_lr=rate, **common) for rate in scale.rates]
    if name == TUNED:
        return [FineTuning(network_lr=rate, **common) for rate in scale.rates]
    return [RandomPrompt(**common, **more)] if name == RANDOM else [LinearProbe(**common)]


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One seed, as plain data.

    Returns:
        ``score``: task -> method -> mean test AUROC over draws; ``coverage``: task -> PCR, APM, PCR of even choice,
        mean size of the input embeddings; ``ablation``: name -> AUROC; ``shots``: number -> method -> AUROC;
        ``contrastive``: method -> AUROC; ``returns``: decrease of the loss by round; ``planted``: see
        :func:`found_key`; ``frozen``; ``shown``: molecules, sizes of their atoms' prompts, class.
    """
    out: dict[str, Any] = {"score": {}, "coverage": {}, "ablation": {}, "shots": {}, "contrastive": {}}
    net = network("masking", scale)
    before, first = {n: t.clone() for n, t in net.model.state_dict().items()}, seed * scale.draws
    fixed: dict[str, Scale] = {}  # with the z_max that validated best on a task's first draw
    for name in TASKS:
        scores: dict[str, list[float]] = {}
        for draw in range(scale.draws):
            number = first + draw
            task = task_of(name, scale.shots, number, scale)
            value, prompt = best(methods(OURS, fixed.get(name, scale)), task, net, number)
            scores.setdefault(OURS, []).append(value)
            prompts = prompt.on(net).prompts(task.test)
            pcr, apm = coverage(prompts)
            for label in (PROBE, RANDOM, TUNED, "GPF", "GPF-plus", "SUPT"):
                more = {"pcr": pcr, "apm": apm} if label == RANDOM else {}
                scores.setdefault(label, []).append(best(methods(label, scale, **more), task, net, number)[0])
            if draw == 0:
                fixed[name] = dataclasses.replace(scale, z_max=(float(prompt.spec.options["z_max"]),))
                seen: list[torch.Tensor] = []
                net.embed(net.collate([e.inputs["graph"] for e in task.test]),
                          lambda x, seen=seen: seen.append(x.detach()) or torch.zeros_like(x))  # type: ignore[misc]
                nodes = [len(p) for p in prompts]
                out["coverage"][name] = {"PCR": pcr, "APM": apm, "input": float(seen[0].abs().mean()),
                                         "even": sum(1 - (1 - 1 / n) ** n for n in nodes) / len(nodes)}
                if name == MAIN:
                    out["returns"] = [h.get("return", 0.0) for h in prompt.info["history"]]
                    out["shown"] = [[e.inputs.get("smiles", ""), p.abs().mean(1).tolist(), e.target]
                                    for e, p in list(zip(task.test, prompts, strict=True))[:6]]
        out["score"][name] = {label: sum(values) / len(values) for label, values in scores.items()}
        if name == MAIN:
            known = {label: values[0] for label, values in scores.items()}
    task, same, other = task_of(MAIN, scale.shots, first, scale), fixed[MAIN], network("contrastive", scale)
    out["ablation"] = {OURS: known[OURS], **{label: best(methods(OURS, same, **options), task, net, first)[0]
                                             for label, options in ABLATIONS.items()}}
    for shots in sorted({*scale.other_shots, scale.shots}):
        few = task_of(MAIN, shots, first, scale)
        out["shots"][shots] = {label: known[label] if shots == scale.shots else
                               best(methods(label, same), few, net, first)[0] for label in (OURS, PROBE, TUNED)}
    out["contrastive"] = {label: best(methods(label, same), task, other, first)[0] for label in (OURS, PROBE)}
    out["planted"] = found_key(seed, scale)
    after = net.model.state_dict()
    return {**out, "frozen": all(torch.equal(t, after[n]) for n, t in before.items())}


def found_key(seed: int, scale: Scale) -> dict[str, Any]:
    """The planted task, after the last round: how probable the node that knows the class is, what an episode gains.

    Returns:
        ``probability`` of the node at the first step, ``chance``, ``first`` and ``last``: mean decrease of the loss
        over an episode in the first and last quarter of the rounds; accuracy of RELIEF and of the head alone.
    """
    task, net = planted(scale.planted, 6, seed)
    rounds = 32 if scale.planted >= 32 else 8
    common: dict[str, Any] = {"epochs": rounds, "skip": rounds, "head_layers": 1, "head_lr": 0.01, "head_epochs": 3}
    method = RELIEF(members=1, z_max=1.0, minibatch_size=24, policy_lr=2e-3, log_std=-2.0, warmup=20, **common)
    prompt = method.optimize(task, net, seed=seed, progress=False)
    history = [h["return"] for h in prompt.info["history"]]
    quarter, learner = len(history) // 4, prompt.on(net).learner
    assert isinstance(learner, PromptingPolicy)
    graphs = [e.inputs["graph"] for e in task.test]
    batch = net.collate(graphs)
    with torch.no_grad():
        states = dense(net.embed(batch).float(), batch)
        chances = learner.policy.node_log_probs(states, torch.ones(states.shape[:2], dtype=torch.bool)).exp()
    keys = torch.tensor([g.key for g in graphs])
    probe = LinearProbe(**common).optimize(task, net, seed=seed, progress=False)
    accuracy = {label: task.evaluate(p.on(net)).score for label, p in ((OURS, prompt), (PROBE, probe))}
    return {"probability": float(chances[torch.arange(len(keys)), keys].mean()), "chance": 1 / 6, **accuracy,
            "first": sum(history[:quarter]) / quarter, "last": sum(history[-quarter:]) / quarter}


def once(scale: Scale) -> dict[str, Any]:
    """Graphs through the network that each method asks for, on the same task."""
    task, net = task_of(MAIN, scale.shots, 0, scale), network("masking", scale)
    calls = {}
    for label in (OURS, PROBE, TUNED, "GPF", "GPF-plus", "SUPT"):
        budget = Budget()
        small = dataclasses.replace(scale, epochs=2, z_max=scale.z_max[:1], rates=scale.rates[:1])
        methods(label, small)[0].optimize(task, net, budget=budget, progress=False)
        calls[label] = budget.used["calls"] / 2
    return {"calls": calls}


def show(report: Report, results: Results) -> None:
    """Scores, shots, ablations, coverage, returns, cost, and molecules with the prompted atoms shaded."""
    scale, first = results.scale, results.rows[0]
    report.facts |= {"network": "3-layer GIN, width 64, pre-trained here (self-trained) on ChEMBL samples",
                     "head": "3 linear layers, 50 passes, Adam 5e-3, for all methods"}
    add_table(report, f"Test AUROC, {scale.shots} shots", (
        {"method": label, **{name: results.interval("score", name, label) for name in TASKS}}
        for label in first["score"][MAIN]), f"mean of {scale.draws} draws for each seed; settings chosen on "
        "validation, z_max on that of the first draw")
    report.figure("freesolv: AUROC by shots", x_label="labelled graphs", y_label="AUROC", x_log=True, series=[
        curve(label, [float(s) for s in first["shots"]], [results.interval("shots", s, label) for s in first["shots"]])
        for label in (OURS, PROBE, TUNED)])
    add_table(report, "freesolv: parts taken away", (
        {"method": label, "AUROC": results.interval("ablation", label)} for label in first["ablation"]))
    add_table(report, "freesolv: a network pre-trained by contrast", (
        {"method": label, "AUROC": results.interval("contrastive", label)} for label in first["contrastive"]))
    add_table(report, "How much is prompted", (
        {"task": name, **{key: results.interval("coverage", name, key) for key in ("PCR", "APM")},
         "PCR of even choice": results.mean("coverage", name, "even"),
         "mean size of input embeddings": results.mean("coverage", name, "input")} for name in TASKS),
        "fraction of nodes with a prompt, and mean size of its elements")
    add_table(report, "Planted: one node knows the class", (
        {"": label, "value": results.interval("planted", key)} for label, key in (
            ("probability of that node at the first step", "probability"), ("chance", "chance"),
            ("decrease of the loss, first quarter", "first"), ("last quarter", "last"),
            ("accuracy, RELIEF", OURS), ("accuracy, head alone", PROBE))))
    rounds = range(1, len(first["returns"]) + 1)
    report.figure("freesolv: decrease of the loss over an episode", x_label="round", y_label="nats", series=[
        curve("RELIEF", [float(n) for n in rounds], [results.interval("returns", n - 1) for n in rounds], "line")])
    add_table(report, "Cost", ({"method": label, "graphs through the network in a round": calls}
                               for label, calls in results.once["calls"].items()))
    if not scale.made_up:
        image = importlib.import_module("PIL.Image")
        pictures = [np.asarray(image.open(io.BytesIO(shaded(smiles, sizes))).convert("RGB"))
                    for smiles, sizes, _ in first["shown"]]
        report.image("freesolv: prompted atoms", pictures, "seed 0; the redder, the larger the vector",
                     captions=[("weakly" if target else "strongly") + " hydrated" for _, _, target in first["shown"]])


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, several = functools.partial(results.claim, count="seeds"), len(results.seeds) > 1

    def gain(label: str) -> Interval:
        return bootstrap([100 * sum(row["score"][n][OURS] - row["score"][n][label] for n in TASKS) / len(TASKS)
                          for row in results.rows])

    def points(found: Mapping[str, Interval]) -> str:
        return "against " + ", ".join(f"{label} {value:+.1f} points" for label, value in found.items())

    yield claim("The network stays bit-identical, batch-norm buffers too", SOURCE, "frozen", "all seeds, all methods",
                all(results.values("frozen")), f"{sum(results.values('frozen'))} of {len(results.rows)}",
                any_scale=True)
    probability, chance = results.interval("planted", "probability"), results.mean("planted", "chance")
    growth = results.interval("planted", "last", minus=("planted", "first"))
    yield claim("The policy finds the node that matters, and its return grows", SOURCE, "-", "planted task: "
                "probability of that node above twice chance, decrease of the loss in the last quarter of the rounds "
                "less that in the first above 0, both intervals", every(above(probability, 2 * chance), above(growth))
                if several else None, f"probability {probability:.2f}, chance {chance:.2f}; growth {growth:+.2f}")
    found = {label: gain(label) for label in (PROBE, RANDOM)}
    yield claim("A learned prompt helps: better than the head alone and than random prompts of equal PCR and APM",
                "paper, experiments", PAPER, "AUROC, mean of both tasks, interval over seeds above 0 against both",
                every(*map(above, found.values())) if several else None, points(found))
    found = {label: gain(label) for label in (TUNED, "GPF", "GPF-plus", "SUPT")}
    yield claim("Better than fine-tuning and other prompts", "paper, abstract", PAPER, "the same, against each of four",
                every(*map(above, found.values())) if several else None, points(found))
    shots = [str(s) for s in results.rows[0]["shots"]]
    found = {label: bootstrap([100 * sum(row["shots"][few][OURS] - row["shots"][many][label]
                                         for few, many in pairwise(shots)) / (len(shots) - 1)
                               for row in results.rows]) for label in (PROBE, TUNED)}
    yield claim("Needs fewer data for the same score", "paper, abstract", PAPER, f"freesolv, {', '.join(shots)} shots: "
                "AUROC of RELIEF less that of the others with the next larger number, mean; interval above 0 against "
                "both", every(*map(above, found.values())) if several else None, points(found))
    ratios = {name: results.interval("coverage", name, "PCR") for name in TASKS}
    yield claim("Not every node needs a prompt", "paper, experiments", PAPER, "PCR below 1 on both tasks, intervals",
                every(*(below(v, 1.0) for v in ratios.values())) if several else None,
                ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    fewer = {name: results.interval("coverage", name, "PCR", minus=("coverage", name, "even")) for name in TASKS}
    yield claim("The policy prompts fewer nodes than one that chooses evenly", SOURCE, "-", "PCR less that of as many "
                "even draws as a graph has nodes, 1 - (1 - 1/N)^N: interval below 0 on both tasks",
                every(*(below(v) for v in fewer.values())) if several else None,
                ", ".join(f"{name} {value:+.2f}" for name, value in fewer.items()))
    found = {label: results.interval("ablation", OURS, minus=("ablation", label), times=100) for label in ABLATIONS}
    yield claim("Every part helps", "paper, ablation", PAPER, "freesolv: interval above 0 against each",
                every(*map(above, found.values())) if several else None, points(found))
    other = results.interval("contrastive", OURS, minus=("contrastive", PROBE), times=100)
    yield claim("It helps behind another pre-training", "paper, four pre-trainings", PAPER, "freesolv, contrastive: "
                "interval above 0 against the head alone", above(other) if several else None, f"{other:+.1f} points")
    yield from results.unmeasured("paper, experiments", PAPER, {
        "Better on eight MoleculeNet sets": "those sets and the authors' pre-trained networks",
        "Better on node tasks": "Cora, CiteSeer, PubMed, Computers and Photo"})


study = Study("relief: the paper's claims", measure, claims, show=show, once=once, full=Scale(),
              quick_seeds=1, quick=Scale(other_shots=(10,), draws=1, epochs=3, z_max=(0.5,), rates=(5e-3,),
                                         pretraining=100, planted=16))
