"""Graphs to learn from: molecules of SMILES, a planted task whose answer is known, and small ones for tests."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINEConv, MessagePassing

from looseleaf import Example, ScoreMetric, Task
from looseleaf.errors import MissingPackageError
from looseleaf.modes import own_random_state, training
from looseleaf.statistics import auroc
from looseleaf_relief.graphs import GraphNetwork, pooled

ATOMS, BONDS = 120, 5
"""Kinds of atoms by number, the last being the mask; kinds of bonds: single, double, triple, aromatic, other."""
MASKED = 0.15
"""Fraction of the atoms that are masked in pre-training."""


# ------------------------------------------------------------------------------------------------------- molecules
def molecule(smiles: str) -> Data | None:
    """The graph of a molecule: atoms (number, chirality) and bonds (kind); None where rdkit cannot read it.

    Raises:
        MissingPackageError: rdkit is not installed.
    """
    try:
        chem = importlib.import_module("rdkit.Chem")
    except ModuleNotFoundError as error:
        raise MissingPackageError("molecules: expected rdkit, which reads SMILES, got no such package: "
                                  "pip install 'looseleaf-relief[molecules]'") from error
    found = chem.MolFromSmiles(smiles)
    if found is None or not found.GetNumAtoms():
        return None
    atoms = [[min(a.GetAtomicNum(), ATOMS - 2), min(int(a.GetChiralTag()), 2)] for a in found.GetAtoms()]
    ends, kinds = [], []
    order = {1.0: 0, 2.0: 1, 3.0: 2, 1.5: 3}
    for bond in found.GetBonds():
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        ends += [(a, b), (b, a)]
        kinds += [order.get(bond.GetBondTypeAsDouble(), 4)] * 2
    edges = torch.tensor(ends, dtype=torch.long).view(-1, 2).t().contiguous()
    return Data(x=torch.tensor(atoms), edge_index=edges, edge_attr=torch.tensor(kinds, dtype=torch.long))


def scaffold(smiles: str) -> str:
    """The Murcko scaffold of a molecule as SMILES, empty for chains; the molecules of one go into one part."""
    murcko = importlib.import_module("rdkit.Chem.Scaffolds.MurckoScaffold")
    out: str = murcko.MurckoScaffoldSmiles(smiles=smiles)
    return out


def shaded(smiles: str, sizes: Sequence[float], size: tuple[int, int] = (260, 190)) -> bytes:
    """A molecule as PNG, its atoms the redder the larger their number is.

    Args:
        smiles: as for :func:`molecule`.
        sizes: one for each atom, >= 0; the largest is the reddest, 0 stays white.
        size: width and height in pixels.
    """
    chem, draw = (importlib.import_module(f"rdkit.Chem{name}") for name in ("", ".Draw.rdMolDraw2D"))
    found, canvas, most = chem.MolFromSmiles(smiles), draw.MolDraw2DCairo(*size), max(*sizes, 1e-9)
    colours = {n: (1.0, 1 - 0.65 * value / most, 1 - 0.75 * value / most) for n, value in enumerate(sizes) if value}
    draw.PrepareAndDrawMolecule(canvas, found, highlightAtoms=list(colours), highlightAtomColors=colours,
                                highlightBonds=[])
    canvas.FinishDrawing()
    out: bytes = canvas.GetDrawingText()
    return out


class AtomEncoder(nn.Module):
    """Atoms (n, 2) to vectors (n, width): the sum of an embedding of the number and one of the chirality."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind, self.chirality = nn.Embedding(ATOMS, width), nn.Embedding(3, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.kind(x[:, 0]) + self.chirality(x[:, 1])
        return out


class MoleculeGIN(nn.Module):
    """A graph isomorphism network with bond embeddings and batch norm: molecules to atom embeddings (n, width).

    Args:
        layers, width: of the network.
        dropout: after each layer, in training mode.
    """

    def __init__(self, layers: int = 3, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.atoms = AtomEncoder(width)
        self.bonds = nn.ModuleList(nn.Embedding(BONDS, width) for _ in range(layers))
        self.convs = nn.ModuleList(GINEConv(nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        for table in (*self.atoms.children(), *self.bonds):
            assert isinstance(table, nn.Embedding)
            nn.init.xavier_uniform_(table.weight)  # small, as in the networks that the paper prompts

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """(n, width)."""
        h = self.atoms(x)
        for n, (bond, conv, norm) in enumerate(zip(self.bonds, self.convs, self.norms, strict=True)):
            h = norm(conv(h, edge_index, bond(edge_attr)))
            h = self.dropout(h if n == len(self.convs) - 1 else F.relu(h))
        return h


def pretrain(graphs: Sequence[Data], kind: str = "masking", *, steps: int = 600, batch_size: int = 64,
             seed: int = 0) -> tuple[GraphNetwork, list[float]]:
    """A small network pre-trained on molecules without labels, and the loss of each step.

    Args:
        graphs: of :func:`molecule`.
        kind: ``"masking"``: masked atoms are told from their surroundings; ``"contrastive"``: two views of a molecule,
            each with a fifth of its atoms masked, are told from those of others.
        steps, batch_size: of Adam at 1e-3.
        seed: of everything.
    """
    with own_random_state(seed):
        model = MoleculeGIN()
        ahead = nn.Linear(64, ATOMS) if kind == "masking" else nn.Sequential(nn.Linear(64, 64), nn.ReLU(),
                                                                             nn.Linear(64, 64))
    draw, losses = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.Adam([*model.parameters(), *ahead.parameters()], lr=1e-3)

    def view(batch: Batch, fraction: float) -> tuple[Tensor, Tensor]:
        hidden = torch.rand(batch.num_nodes, generator=draw) < fraction
        x = batch.x.clone()
        x[hidden, 0] = ATOMS - 1
        return model(x, batch.edge_index, batch.edge_attr), hidden

    with training(model):
        for _ in range(steps):
            rows = torch.randint(0, len(graphs), (batch_size,), generator=draw).tolist()
            batch = Batch.from_data_list([graphs[n] for n in rows])
            if kind == "masking":
                nodes, hidden = view(batch, MASKED)
                loss = F.cross_entropy(ahead(nodes[hidden]), batch.x[hidden, 0])
            else:
                one, two = (F.normalize(ahead(pooled(view(batch, 0.2)[0], batch)), dim=-1) for _ in range(2))
                loss = F.cross_entropy(one @ two.t() / 0.1, torch.arange(batch_size))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
    return GraphNetwork(model.eval(), "atoms"), losses


def _auroc(scores: list[list[float]], examples: list[Example]) -> float:
    by_class: Mapping[Any, list[float]] = defaultdict(list)
    for row, example in zip(scores, examples, strict=True):
        by_class[example.target].append(row[1] - row[0])
    return auroc(by_class[1], by_class[0])


binary_auroc = ScoreMetric(_auroc)
"""AUROC of tasks with the classes 0 and 1."""


def few_shot(name: str, examples: Sequence[Example], test: Sequence[Example], *, shots: int, dev: int,
             seed: int) -> Task:
    """A task with the classes 0 and 1, scored by AUROC.

    Args:
        name: of the task.
        examples: what shots and dev examples are drawn from, equally many of each class.
        test: for the final figure.
        shots, dev: numbers of examples, both classes together.
        seed: of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    train_part: list[Example] = []
    dev_part: list[Example] = []
    for label in (0, 1):
        own = [e for e in examples if e.target == label]
        order = torch.randperm(len(own), generator=draw).tolist()
        if len(own) < shots // 2 + dev // 2:
            raise ValueError(f"few_shot {name!r}: expected {shots // 2 + dev // 2} examples of class {label}, got "
                             f"{len(own)}")
        train_part += [own[n] for n in order[:shots // 2]]
        dev_part += [own[n] for n in order[shots // 2:shots // 2 + dev // 2]]
    return Task(name, train_part, dev_part, list(test), classes=(0, 1), metric=binary_auroc)


def solubility(rows: Sequence[Mapping[str, Any]], atoms: int) -> tuple[list[Example], list[Example]]:
    """High (1) or low (0) solubility by the given split: what shots are drawn from, and test.

    Args:
        rows: of the lab's set ``molecules``.
        atoms: most atoms of a molecule.
    """
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    for row in rows:
        if row["set"] == "solubility" and row["label"] in ("low", "high"):
            graph = molecule(row["smiles"])
            if graph is not None and 2 <= int(graph.num_nodes or 0) <= atoms:
                inputs = {"graph": graph, "smiles": row["smiles"]}
                parts[row["part"]].append(Example(inputs, int(row["label"] == "high")))
    return parts["train"], parts["test"]


def freesolv(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[list[Example], list[Example]]:
    """Free energy of hydration above (1) or below (0) the median: no scaffold of the test is among the shots.

    Args:
        rows: of the lab's set ``molecules``.
        seed: of the order of the scaffolds; half of the rings go to the test, chains to the shots.
    """
    found = [(row["value"], row["smiles"], molecule(row["smiles"])) for row in rows if row["set"] == "freesolv"]
    found = [each for each in found if each[2] is not None and int(each[2].num_nodes or 0) >= 2]
    median = sorted(value for value, _, _ in found)[len(found) // 2]
    groups: dict[str, list[Example]] = defaultdict(list)
    for value, smiles, graph in found:
        groups[scaffold(smiles)].append(Example({"graph": graph, "smiles": smiles}, int(value > median)))
    names = sorted(name for name in groups if name and len(groups[name]) <= 100)  # chains and benzenes are too many
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    test = {names[n] for n in order[:len(names) // 2]}
    return ([e for name, own in groups.items() if name not in test for e in own],
            [e for name, own in groups.items() if name in test for e in own])


# ------------------------------------------------------------------------------------------------- a planted answer
class RootNetwork(MessagePassing):
    """A fixed network in which a node's embedding is mostly its own: tanh(x W) + a tenth of its neighbours' mean.

    Args:
        width: of features and embeddings.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__(aggr="mean")
        with own_random_state(0):
            self.linear = nn.Linear(width, width, bias=False)
            nn.init.orthogonal_(self.linear.weight)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(n, width)."""
        h = torch.tanh(self.linear(x))
        return h + 0.1 * self.propagate(edge_index, x=h)  # type: ignore[no-any-return]


def planted(count: int = 64, nodes: int = 10, seed: int = 0, signal: float = 0.3) -> tuple[Task, GraphNetwork]:
    """Rings of plain nodes with a single one that carries the label; ``key`` is its number.

    The first feature says which node it is, the second, ``+-signal``, the class. Its share in the mean of all nodes is
    small, so that a head alone learns slowly; a prompt at this node makes it large, one elsewhere cannot know the sign.

    Args:
        count: graphs of training; there are as many of validation and of test.
        nodes: of each ring.
        seed: of the graphs.
        signal: size of the feature that carries the label.
    """
    draw = torch.Generator().manual_seed(seed)
    ring = torch.arange(nodes)
    edges = torch.cat([torch.stack([ring, (ring + 1) % nodes]), torch.stack([(ring + 1) % nodes, ring])], 1)

    def example(n: int) -> Example:
        x = 0.05 * torch.randn(nodes, 8, generator=draw)
        x[:, :2] = 0
        key = int(torch.randint(0, nodes, (1,), generator=draw))
        x[key, 0], x[key, 1] = 2.0, signal * (2 * (n % 2) - 1)
        return Example({"graph": Data(x=x, edge_index=edges, key=key)}, n % 2)

    train, dev, test = ([example(n) for n in range(count)] for _ in range(3))
    return Task("planted", train, dev, test, classes=(0, 1)), GraphNetwork(RootNetwork().eval())


# ------------------------------------------------------------------------------------------------------- for tests
def toy_graphs() -> Task:
    """Small graphs of two to four nodes in two classes, which their features tell apart."""
    draw = torch.Generator().manual_seed(0)

    def example(n: int) -> Example:
        nodes = 2 + n % 3
        x = torch.randn(nodes, 4, generator=draw)
        x[:, 0] += 2 * (n % 2) - 1
        one, two = torch.arange(nodes - 1), torch.arange(1, nodes)
        edges = torch.stack([torch.cat([one, two]), torch.cat([two, one])])
        return Example({"graph": Data(x=x, edge_index=edges)}, "odd" if n % 2 else "even")

    train, dev, test = ([example(n) for n in range(8)] for _ in range(3))
    return Task("toy graphs", train, dev, test, classes=("even", "odd"))


class ToyNetwork(nn.Module):
    """Two convolutions with batch norm and dropout, whose statistics must not change: (n, 4) -> (n, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(n, 6)."""
        def spread(h: Tensor) -> Tensor:
            return h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])

        h = self.dropout(torch.relu(self.norm(spread(self.first(x)))))
        return spread(self.second(h))


def toy_network() -> GraphNetwork:
    """A :class:`ToyNetwork` with random weights, the same each time."""
    with own_random_state(0):
        return GraphNetwork(ToyNetwork().eval())


__all__ = ["AtomEncoder", "MoleculeGIN", "RootNetwork", "ToyNetwork", "binary_auroc", "few_shot",
           "molecule", "planted", "pretrain", "scaffold", "shaded", "toy_graphs",
           "toy_network"]
