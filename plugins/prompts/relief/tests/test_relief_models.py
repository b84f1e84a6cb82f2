"""Networks of several kinds, tasks about nodes and of several labels, baselines, runs that go on, and bad input."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE

from looseleaf import Budget, Example, Prompt, Task, UnsupportedModelError
from looseleaf_relief import (
    GPF,
    RELIEF,
    SUPT,
    FeaturePrompt,
    FineTuning,
    GPFPlus,
    GraphNetwork,
    LinearProbe,
    RandomPrompt,
    coverage,
    mean_auroc,
    neighbourhoods,
)
from looseleaf_relief.data import MoleculeGIN, ToyNetwork, few_shot, planted, toy_graphs, toy_network

BASELINES = [LinearProbe, FineTuning, GPF, GPFPlus, SUPT, RandomPrompt]


def quick(**options):
    return RELIEF(**{"epochs": 2, "skip": 1, "members": 2, "batch_size": 4, "minibatch_size": 8, "passes": 2,
                     "z_max": 0.5, "policy_lr": 5e-3, "head_lr": 0.02, **options})


def molecules():
    """Small graphs as molecules have them: whole numbers for atoms and bonds."""
    def changed(example):
        graph = example.inputs["graph"]
        x = torch.stack([5 + (graph.x[:, 0] > 0).long(), (graph.x[:, 1] > 0).long()], 1)
        kinds = torch.arange(graph.edge_index.shape[1]) % 4
        return Example({"graph": Data(x=x, edge_index=graph.edge_index, edge_attr=kinds)}, example.target)

    task = toy_graphs()
    # rounded, some test examples are ones of train
    return dataclasses.replace(task, **{n: [changed(e) for e in getattr(task, n)] for n in ("train", "dev")},
                               test=[changed(e) for e in toy_graphs().test if len(e.inputs["graph"].x) == 4])


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


# ------------------------------------------------------------------------------------------ models
def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["first"], r=2, init_lora_weights=False)
    return peft.get_peft_model(seeded(ToyNetwork), config).eval()


@pytest.mark.parametrize("make", [
    lambda: GraphNetwork(seeded(lambda: GIN(4, 8, 2, norm="batch_norm"))),
    lambda: GraphNetwork(seeded(lambda: GCN(4, 8, 2, dropout=0.5))),
    lambda: GraphNetwork(seeded(lambda: GAT(4, 8, 2, heads=2))),
    lambda: GraphNetwork(seeded(lambda: GraphSAGE(4, 8, 2)), "convs.0.lin_l"),
    lambda: GraphNetwork(seeded(ToyNetwork).double()),
    lambda: GraphNetwork(seeded(ToyNetwork).bfloat16(), call=lambda m, b: m(b.x.bfloat16(), b.edge_index)),
    lambda: GraphNetwork(adapted()),
    lambda: GraphNetwork(adapted(), "first"),
    lambda: GraphNetwork(torch.compile(seeded(ToyNetwork), backend="eager")),
    lambda: GraphNetwork(torch.compile(seeded(ToyNetwork), backend="eager"), "first"),
], ids=["gin", "gcn", "gat", "sage, embedded", "float64", "bfloat16", "peft", "peft, embedded", "compiled",
        "compiled, embedded"])
def test_models(make) -> None:
    network, task = make(), toy_graphs()
    if next(network.model.parameters()).dtype == torch.float64:
        for example in (*task.train, *task.dev, *task.test):
            example.inputs["graph"].x = example.inputs["graph"].x.double()
    before = {n: t.clone() for n, t in network.model.state_dict().items()}
    prompt = quick().optimize(task, network)
    scores = prompt.on(network).scores(task.test)
    assert scores.shape == (8, 2) and scores.isfinite().all()
    assert torch.allclose(scores.exp().sum(1), torch.ones(8), atol=1e-5)
    assert 0 < coverage(prompt.on(network).prompts(task.test))[0] <= 1
    assert all(torch.equal(t, before[n]) for n, t in network.model.state_dict().items())


@pytest.mark.parametrize("embedding", ["atoms", "atoms.kind", ("atoms.kind", "atoms.chirality")])
def test_whole_numbers_are_embedded_first(embedding) -> None:
    task, network = molecules(), GraphNetwork(seeded(lambda: MoleculeGIN(2, 8)), embedding)
    batch = network.collate([e.inputs["graph"] for e in task.train])
    with torch.no_grad():
        assert torch.equal(network.embed(batch), network.model(batch.x, batch.edge_index, batch.edge_attr))
        add, seen = torch.randn(batch.num_nodes, 8), []
        # wherever the sum is caught, what is added to it goes into the first convolution
        same = network.embed(batch, add)
        assert torch.allclose(same, GraphNetwork(network.model, "atoms").embed(batch, add), atol=1e-5)
        network.embed(batch, lambda x: seen.append(x) or torch.zeros_like(x))
    whole = network.model.atoms(batch.x) if embedding != "atoms.kind" else network.model.atoms.kind(batch.x[:, 0])
    assert torch.equal(seen[0], whole)
    assert quick().optimize(task, network).on(network).scores(task.test).isfinite().all()


def test_gradients_reach_what_is_added() -> None:
    network, task = toy_network(), toy_graphs()
    batch = network.collate([task.train[2].inputs["graph"]])
    add = torch.zeros(4, 4, requires_grad=True)
    network.embed(batch, add).sum().backward()
    assert add.grad is not None and add.grad.abs().sum() > 0


@pytest.mark.parametrize("method", BASELINES, ids=lambda m: m.__name__)
def test_baselines(method, tmp_path) -> None:
    network, task = toy_network(), toy_graphs()
    budget, short = Budget(), Budget(calls=60)
    prompt = method(epochs=6, skip=1, head_lr=0.02).optimize(task, network, budget=budget)
    assert budget.used["calls"] == 1 + 6 * (8 + 8)  # sizes; each round once for training, once for validation
    evaluation = task.evaluate(prompt.on(network))
    assert prompt.info["history"][-1]["loss"] < prompt.info["history"][0]["loss"]
    prompt.save(tmp_path / "p.json")
    again = Prompt.load(tmp_path / "p.json")
    assert isinstance(again, FeaturePrompt) and task.evaluate(again.on(network)).class_scores == evaluation.class_scores
    assert method(epochs=6, skip=1, head_lr=0.02).optimize(task, network, budget=short).info["stopped"] == \
        "budget: calls"
    pcr, apm = coverage(prompt.on(network).prompts(task.test))
    assert (pcr, apm) == (0, 0) if method in (LinearProbe, FineTuning) else pcr > 0 and apm > 0


def test_fine_tuning_goes_on_from_its_own_prompt() -> None:
    network, task = toy_network(), toy_graphs()
    method = FineTuning(epochs=3, skip=1, head_lr=0.02)
    first, state = method.optimize(task, network), torch.get_rng_state()
    assert method.optimize(task, network).fingerprint() == first.fingerprint()  # with dropout
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="on: expected the network that the prompt was learned for"):
        first.on(GraphNetwork(GIN(4, 6, 2).eval()))
    more = method.optimize(task, network, start=first)
    assert more.info["history"][0]["loss"] < first.info["history"][0]["loss"]
    assert any(n.startswith("network.") for n in first.tensors)


# ------------------------------------------------------------------------------------------ other tasks
def test_several_labels_some_unknown() -> None:
    task = toy_graphs()
    labels = {n: [Example(e.inputs, (int(e.target == "odd"), (None, 0, 1)[i % 3])) for i, e in enumerate(
        getattr(task, n))] for n in ("train", "dev", "test")}
    task, network = Task("labels", **labels, metric=mean_auroc), toy_network()
    prompt = quick(epochs=6, head_epochs=4).optimize(task, network)
    assert prompt.classes is None and 0 <= task.evaluate(prompt.on(network)).score <= 1
    found = prompt.on(network).predict(task.test)
    assert len(found) == 8 and all(len(row) == 2 and 0 < row[0] < 1 for row in found)
    from looseleaf_relief.graphs import Targets

    targets = Targets(task)
    loss = targets.loss(torch.zeros(3, 2), targets.encode(task.train[:3]))
    assert torch.allclose(loss, torch.full((3,), 0.6931), atol=1e-3)  # averaged over the labels that are known
    with pytest.raises(ValueError, match=r"mean_auroc: expected a label with examples of both kinds"):
        mean_auroc.function([(0.1, 0.2)], [Example({}, (1, 0))])


def test_neighbourhoods_of_nodes() -> None:
    torch.manual_seed(0)
    ring = torch.arange(12)
    edges = torch.cat([torch.stack([ring, (ring + 1) % 12]), torch.stack([(ring + 1) % 12, ring])], 1)
    large = Data(x=torch.randn(12, 4), edge_index=edges, edge_attr=torch.arange(24))
    graphs = neighbourhoods(large, range(12), 2)
    assert all(g.num_nodes == 5 and g.edge_index.shape == (2, 8) and len(g.edge_attr) == 8 for g in graphs)
    assert all(torch.equal(g.x[g.centre], large.x[[n]]) for n, g in enumerate(graphs))
    task = Task("nodes", [Example({"graph": g}, n % 2) for n, g in enumerate(graphs[:8])],
                test=[Example({"graph": g}, n % 2) for n, g in enumerate(graphs[8:])], classes=(0, 1))
    method = quick(clip_action=True, warmup=2, critic="pool", policy_decay=True, head_decay=True)
    prompt = method.optimize(task, toy_network())
    assert "dev" not in prompt.info["history"][0] and prompt.info["epoch"] == 2  # without dev the last round counts


def test_graphs_of_one_node_without_edges_and_larger_ones_at_test() -> None:
    task, network = toy_graphs(), toy_network()
    none = torch.empty(2, 0, dtype=torch.long)
    train = [*task.train, *(Example({"graph": Data(x=torch.randn(n, 4), edge_index=none)}, "odd") for n in (1, 3))]
    large = [Example({"graph": Data(x=torch.randn(40, 4), edge_index=none)}, "odd")]
    prompt = quick().optimize(dataclasses.replace(task, train=train), network)
    assert prompt.on(network).scores(large).isfinite().all()
    assert prompt.on(network).prompts(large)[0].shape == (40, 4)


def test_the_policy_finds_the_planted_node() -> None:
    task, network = planted(24, 5, signal=0.5)
    method = RELIEF(epochs=32, skip=1, members=1, z_max=1.0, minibatch_size=24, head_layers=1, head_lr=0.01,
                    head_epochs=2, warmup=20, log_std=-2.0, policy_lr=2e-2, gamma=0.0, kl_discrete=0.02, kl_content=1.0)
    prompt = method.optimize(task, network, budget=Budget(calls=8_000))  # eight rounds
    history = prompt.info["history"]
    assert history[-1]["return"] > history[0]["return"] + 0.2
    first = dataclasses.replace(prompt, deterministic=True).on(network)
    sizes = [p.abs().sum(1) for p in first.prompts(task.test)]
    keys = [e.inputs["graph"].key for e in task.test]
    assert sum(int(s.argmax()) == k for s, k in zip(sizes, keys, strict=True)) > 0.8 * len(keys)
    assert task.evaluate(prompt.on(network)).score > 0.9


@pytest.mark.parametrize("options", [{"nodes": "random"}, {"content": "random"}, {"alpha_d": 0.0}, {"alpha_c": 0.0},
                                     {"nodes": "random", "content": "random"}, {"members": 1}], ids=str)
def test_ablations(options) -> None:
    network, task = toy_network(), toy_graphs()
    prompt = quick(**options).optimize(task, network)
    start = prompt.spec.build(0)
    moved = {n for n, p in start.named_parameters() if not torch.equal(p, prompt.tensors[n])}
    assert any("discrete" in n for n in moved) == (options.get("nodes") != "random")
    assert any("content" in n for n in moved) == (options.get("content") != "random")


# ------------------------------------------------------------------------------------------ runs
def test_goes_on_as_if_it_had_not_been_stopped(tmp_path) -> None:
    network, task = toy_network(), toy_graphs()
    whole = quick(epochs=4).optimize(task, network)
    part = quick(epochs=4).optimize(task, network, state_dir=tmp_path, budget=Budget(calls=400))
    assert part.info["stopped"] == "budget: calls" and 0 < part.info["evaluations"] < 4
    budget = Budget()
    rest = quick(epochs=4).optimize(task, network, state_dir=tmp_path, budget=budget)
    assert rest.fingerprint() == whole.fingerprint() and rest.info == whole.info
    assert len(list(tmp_path.glob("tensors-*.safetensors"))) <= 2


def test_draws_and_the_most_probable_node() -> None:
    network, task = toy_network(), toy_graphs()
    prompt = quick().optimize(task, network)
    assert not any(n.startswith("critic.") for n in prompt.tensors)
    one, five = (dataclasses.replace(prompt, draws=n).on(network).scores(task.test) for n in (1, 5))
    assert not torch.equal(one, five)
    sure = dataclasses.replace(prompt, deterministic=True)
    for given, same in ((prompt, False), (sure, True)):  # the seed is for nodes that are drawn
        found = [dataclasses.replace(given, seed=n).on(network).scores(task.test) for n in (0, 9)]
        assert torch.equal(*found) == same
    again = quick().optimize(task, network, start=prompt)
    assert again.fingerprint() != prompt.fingerprint()


def test_a_policy_that_is_never_updated_says_so() -> None:
    with pytest.warns(UserWarning, match="the policy was not trained: expected batches of more than minibatch_size=64"):
        prompt = quick(minibatch_size=64).optimize(toy_graphs(), toy_network())
    assert prompt.info["notes"] and prompt.info["history"][0]["skipped_batches"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "notes" not in quick().optimize(toy_graphs(), toy_network()).info


# ------------------------------------------------------------------------------------------ bad input
def with_graph(**changes):
    task = toy_graphs()
    graph = task.train[0].inputs["graph"].clone()
    for name, value in changes.items():
        setattr(graph, name, value)
    return dataclasses.replace(task, train=[Example({"graph": graph}, "even"), *task.train[1:]])


@pytest.mark.parametrize(("task", "message"), [
    (lambda: with_graph(x=torch.full((2, 4), torch.nan)), r"train\[0\]: expected finite numbers in x"),
    (lambda: with_graph(x=None), "expected a graph with features x"),
    (lambda: with_graph(x=torch.empty(0, 4)), "of one node or more"),
    (lambda: with_graph(edge_index=None), r"expected edge_index \(2, edges\), torch.empty"),
    (lambda: with_graph(edge_index=torch.tensor([[0], [7]])), "expected edges between the nodes 0 to 1, got 0 to 7"),
    (lambda: with_graph(edge_attr=torch.ones(2)), "expected graphs with the same attributes"),
    (lambda: Task("t", [Example({"text": "a"}, 0), Example({"text": "b"}, 1)], classes=(0, 1)),
     r"expected a torch_geometric Data as inputs\['graph'\], got \['text'\]"),
    (lambda: dataclasses.replace(toy_graphs(), train=toy_graphs().train[::2]), "examples of two classes or more"),
    (lambda: Task("t", [Example(e.inputs, (None, None)) for e in toy_graphs().train], metric=mean_auroc),
     "expected one known label or more"),
    (lambda: Task("t", [Example(e.inputs, 3.0) for e in toy_graphs().train], metric=mean_auroc),
     "expected classes in the task, or targets of several labels 0, 1 or None"),
])
def test_bad_tasks(task, message) -> None:
    with pytest.raises(ValueError, match=message):
        quick().optimize(task(), toy_network())


def test_bad_networks(tmp_path) -> None:
    task = toy_graphs()
    with pytest.raises(ValueError, match=r"embedding: expected the name of a module of ToyNetwork, got 'atom'"):
        GraphNetwork(ToyNetwork(), "atom")
    with pytest.raises(UnsupportedModelError, match="expected a torch module"):
        GraphNetwork("model")
    with pytest.raises(UnsupportedModelError, match="expected a GraphNetwork"):
        quick().optimize(task, ToyNetwork())
    with pytest.raises(ValueError, match=r"expected real features.*got torch.int64.*such as 'atoms.kind'"):
        quick().optimize(molecules(), GraphNetwork(MoleculeGIN(2, 8)))
    with pytest.raises(ValueError, match=r"expected node embeddings \(2, d\) of 2 nodes, got \(1, 6\)"):
        quick().optimize(task, GraphNetwork(ToyNetwork().eval(), call=lambda m, b: m(b.x, b.edge_index)[:1]))
    with pytest.raises(ValueError, match="expected graphs with edge_attr, which its forward asks for"):
        quick().optimize(task, GraphNetwork(MoleculeGIN(2, 8), "atoms"))
    with pytest.raises(ValueError, match="expected norm to run once for each batch, got 2 runs"):
        class Twice(ToyNetwork):
            def forward(self, x, edge_index):
                return self.norm(self.norm(self.first(x)))
        quick().optimize(task, GraphNetwork(Twice().eval(), "norm"))
    network = toy_network()
    batch = network.collate([e.inputs["graph"] for e in task.train])
    with pytest.raises(ValueError, match=r"add: expected \(\d+, 4\), one vector for each node, got \(1, 4\)"):
        network.embed(batch, torch.zeros(1, 4))
    prompt = quick().optimize(task, network)
    with pytest.raises(ValueError, match="expected a GraphNetwork, got ToyNetwork"):
        prompt.on(ToyNetwork())
    wide = GraphNetwork(GIN(4, 12, 2).eval())
    with pytest.raises(ValueError, match=r"expected a network of widths 4 and 6, .*got 4 and 12"):
        prompt.on(wide).scores(task.test)
    with pytest.raises(ValueError, match="start: expected a prompt of"):
        quick().optimize(task, network, start=GPF(epochs=1).optimize(task, network))
    with pytest.raises(ValueError, match="members: expected at most 8, the number of training graphs, got 9"):
        quick(members=9).optimize(task, network)
    with pytest.raises(ValueError, match="expected a finite loss"), torch.no_grad():
        network.model.second.weight.fill_(torch.inf)
        quick().optimize(task, network)


def test_few_shot_tasks_are_balanced_and_disjoint() -> None:
    examples = [Example({"graph": n}, n % 2) for n in range(40)]
    task = few_shot("t", examples, examples[:0], shots=10, dev=8, seed=1)
    assert [sum(e.target for e in part) for part in (task.train, task.dev)] == [5, 4]
    assert not {e.inputs["graph"] for e in task.train} & {e.inputs["graph"] for e in task.dev}
    with pytest.raises(ValueError, match="expected 25 examples of class 0, got 20"):
        few_shot("t", examples, [], shots=40, dev=10, seed=0)
