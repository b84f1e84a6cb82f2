"""Graph networks as things one can prompt: where a vector is added to each node, and what comes out."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.utils import k_hop_subgraph

from looseleaf import Example, SetMetric, Task, UnsupportedModelError, costs
from looseleaf.fingerprint import content_fingerprint, fingerprint
from looseleaf.statistics import auroc
from looseleaf.unwrap import named_modules, unwrapped

Add = Tensor | Callable[[Tensor], Tensor]
"""What is added to the input embeddings (nodes, D): a tensor of that shape, or a function of them that gives it."""


class GraphNetwork:
    """A network of torch_geometric, or of your own, from graphs to node embeddings, and where its input embedding is.

    Args:
        model: gives embeddings (nodes, d) of a batch of graphs, before any pooling. Its ``forward`` is given what its
            arguments are called in the batch (``x``, ``edge_index``, ``edge_attr``, ``batch``, ...), or the whole
            batch where it has a single argument.
        embedding: name of the module whose output (nodes, D) is the input embedding, such as ``"atom_embedding"``;
            several names where it is their sum. None: the features ``x`` themselves, which must be real numbers.
        call: ``call(model, batch)`` runs the model, where its arguments are called otherwise.

    Raises:
        UnsupportedModelError: no torch module.
        ValueError: no module of this name; near names are given.
    """

    def __init__(self, model: nn.Module, embedding: str | Sequence[str] | None = None, *,
                 call: Callable[[Any, Any], Any] | None = None) -> None:
        inner = unwrapped(model)
        if not isinstance(inner, nn.Module):
            raise UnsupportedModelError(f"GraphNetwork: expected a torch module, got {type(model).__name__}")
        self.embedding = (embedding,) if isinstance(embedding, str) else tuple(embedding or ())
        modules = named_modules(model)
        for name in self.embedding:
            if name not in modules:
                near = [n for n, m in modules.items() if isinstance(m, (nn.Embedding, nn.Linear))][:6]
                raise ValueError(f"embedding: expected the name of a module of {type(inner).__name__}, got {name!r}: "
                                 f"there are {', '.join(near or list(modules)[:6])}, ...")
        # hooks set after compiling are not seen by compiled code
        self.model = inner if self.embedding else model
        self.call = call or _by_names

    @property
    def name(self) -> str:
        """That of the model's class."""
        return type(unwrapped(self.model)).__name__

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in (*self.model.parameters(), *self.model.buffers())), torch.device("cpu"))

    def fingerprint(self) -> str:
        """A short hash of the weights and of where the input embedding is."""
        return content_fingerprint([fingerprint(unwrapped(self.model)), self.embedding])

    def collate(self, graphs: Sequence[Data]) -> Batch:
        """One batch of graphs, where the model is."""
        return Batch.from_data_list(list(graphs)).to(self.device)

    @costs(calls=lambda self, batch, add=None: batch.num_graphs)
    def embed(self, batch: Batch, add: Add | None = None) -> Tensor:
        """(nodes, d): the model's node embeddings, with ``add`` added to the input embeddings.

        Gradients reach ``add``. The model is run in the mode that it is in.

        Args:
            batch: of :meth:`collate`.
            add: (nodes, D), or a function of the input embeddings; None: nothing.

        Raises:
            ValueError: features that cannot be added to, or something else than (nodes, d) comes out.
        """
        if not self.embedding:
            if not torch.is_floating_point(batch.x):
                near = [n for n, m in named_modules(self.model).items() if isinstance(m, nn.Embedding)]
                hint = f", such as {near[0]!r}" if near else ""
                raise ValueError(f"x: expected real features, to which a prompt can be added, got {batch.x.dtype}: "
                                 f"give GraphNetwork(model, embedding=) the name of the module that embeds them{hint}")
            if add is not None:
                batch = batch.clone().update({"x": self._added(batch.x, add)})
            return self._run(batch)
        modules, seen = named_modules(self.model), []
        with contextlib.ExitStack() as hooks:
            def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
                seen.append(output)
                if len(seen) == len(self.embedding) and add is not None:
                    return output + self._added(sum(seen[1:], seen[0]), add, only=True)
                return None

            for name in self.embedding:
                hooks.callback(modules[name].register_forward_hook(hook).remove)
            out = self._run(batch)
        if len(seen) != len(self.embedding):
            raise ValueError(f"embedding: expected {', '.join(self.embedding)} to run once for each batch, got "
                             f"{len(seen)} runs: name the module whose output goes into the first convolution")
        return out

    @costs(calls=lambda self, batch: batch.num_graphs)
    def sizes(self, batch: Batch) -> tuple[int, int]:
        """Widths of the input embeddings and of the node embeddings."""
        widths: list[int] = []

        def look(features: Tensor) -> Tensor:
            widths.append(features.shape[1])
            return torch.zeros_like(features)

        with torch.no_grad():
            out = self.embed(batch, look)
        return widths[0], out.shape[1]

    def _added(self, features: Tensor, add: Add, only: bool = False) -> Tensor:
        if features.dim() != 2:
            raise ValueError(f"embedding: expected (nodes, D), got {tuple(features.shape)} at "
                             f"{', '.join(self.embedding) or 'x'}")
        prompt = (add if isinstance(add, Tensor) else add(features)).to(features)
        if prompt.shape != features.shape:
            raise ValueError(f"add: expected {tuple(features.shape)}, one vector for each node, got "
                             f"{tuple(prompt.shape)}")
        return prompt if only else features + prompt

    def _run(self, batch: Batch) -> Tensor:
        out = self.call(self.model, batch)
        out = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != batch.num_nodes:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name}: expected node embeddings ({batch.num_nodes}, d) of {batch.num_nodes} "
                             f"nodes, got {got}: give the part of the model before pooling, or call=")
        return out


def _by_names(model: Any, batch: Any) -> Any:
    """Call a model with what its arguments are called in the batch."""
    parameters = list(inspect.signature(unwrapped(model).forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(named) == 1 and named[0] not in batch:
        return model(batch)
    needed = [p.name for p in parameters if p.default is p.empty and p.name in named and p.name not in batch]
    if needed:
        raise ValueError(f"{type(unwrapped(model)).__name__}: expected graphs with {', '.join(needed)}, which its "
                         f"forward asks for, got {', '.join(batch.keys())}: give them, or GraphNetwork(..., call=)")
    return model(**{name: batch[name] for name in named if name in batch and batch[name] is not None})


def pooled(nodes: Tensor, batch: Batch) -> Tensor:
    """(graphs, d): the mean of each graph's node embeddings."""
    sums = nodes.new_zeros(batch.num_graphs, nodes.shape[1]).index_add(0, batch.batch, nodes)
    return sums / counts(batch)[:, None].to(nodes.dtype)


def counts(batch: Batch) -> Tensor:
    """(graphs,) int64: how many nodes each has."""
    return torch.bincount(batch.batch, minlength=batch.num_graphs)


def graph_of(example: Any, where: str = "example") -> Data:
    """The graph of an example: its input ``graph``, or the graph itself.

    Raises:
        ValueError: no graph, no nodes, features that are not finite, or edges to nodes that are not there.
    """
    graph = example.inputs.get("graph") if isinstance(example, Example) else example
    if not isinstance(graph, Data):
        raise ValueError(f"{where}: expected a torch_geometric Data as inputs['graph'], got "
                         f"{type(graph).__name__ if graph is not None else list(example.inputs)}")
    x, edges = graph.x, graph.edge_index
    if x is None or x.dim() == 0 or not len(x):
        raise ValueError(f"{where}: expected a graph with features x of one node or more, got "
                         f"{'none' if x is None else tuple(x.shape)}")
    if edges is None or edges.dim() != 2 or len(edges) != 2:
        raise ValueError(f"{where}: expected edge_index (2, edges), torch.empty(2, 0, dtype=torch.long) without "
                         f"edges, got {'none' if edges is None else tuple(edges.shape)}")
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(x):
        raise ValueError(f"{where}: expected edges between the nodes 0 to {len(x) - 1}, got {int(edges.min())} to "
                         f"{int(edges.max())}")
    for name, value in graph.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{where}: expected finite numbers in {name}, got NaN or infinity: remove or fill them")
    return graph


def noise_seed(graph: Data, seed: int) -> int:
    """A seed that depends on the content of a graph alone, so that it is prompted alike alone and in any batch."""
    digest = hashlib.sha256()
    for name in ("x", "edge_index"):
        digest.update(graph[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return (int.from_bytes(digest.digest()[:6], "little") + 1_000_003 * seed) % 2 ** 62


class Targets:
    """What is predicted about graphs: one class, or several labels of which some may be unknown.

    Args:
        task: with classes; or without, its targets being sequences of 0, 1 and None (unknown), all of one length.

    Attributes:
        classes: those of the task; None for labels.
        outputs: numbers that the head gives.

    Raises:
        ValueError: a task that cannot be learned from; the example is named.
    """

    def __init__(self, task: Task) -> None:
        task.validate()
        self.classes = None if task.classes is None else list(task.classes)
        self.outputs = len(self.classes) if self.classes is not None else self._labels(task)
        graphs = [graph_of(e, f"task {task.name!r}, {part}[{n}]")
                  for part in ("train", "dev") for n, e in enumerate(getattr(task, part))]
        names = {tuple(sorted(k for k, v in g.items() if isinstance(v, Tensor) and k != "y")) for g in graphs}
        if len(names) > 1:
            raise ValueError(f"task {task.name!r}: expected graphs with the same attributes, got "
                             f"{' and '.join(str(list(each)) for each in sorted(names))}")

    @staticmethod
    def _labels(task: Task) -> int:
        first = task.train[0].target
        length = len(first) if isinstance(first, (list, tuple)) else 0
        for part in ("train", "dev"):
            for n, example in enumerate(getattr(task, part)):
                target = example.target
                if not isinstance(target, (list, tuple)) or len(target) != length or not set(target) <= {0, 1, None}:
                    raise ValueError(f"task {task.name!r}, {part}[{n}]: expected classes in the task, or targets of "
                                     f"{length or 'several'} labels 0, 1 or None each, got {target!r}")
                if part == "train" and set(target) == {None}:
                    raise ValueError(f"task {task.name!r}, train[{n}]: expected one known label or more, got "
                                     f"{target!r}: leave it out")
        return length

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """(examples,) numbers of classes, or (examples, labels) float with NaN where a label is unknown."""
        if self.classes is not None:
            return torch.tensor([self.classes.index(e.target) for e in examples])
        return torch.tensor([[math.nan if v is None else float(v) for v in e.target] for e in examples])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(graphs,): cross-entropy, or binary cross-entropy averaged over the labels that are known."""
        if self.classes is not None:
            return F.cross_entropy(logits, targets, reduction="none")
        known = ~targets.isnan()
        each = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num().to(logits), reduction="none")
        return (each * known).sum(1) / known.sum(1)


def _mean_auroc(predictions: list[Any], examples: list[Example]) -> float:
    values = []
    for label in range(len(examples[0].target)):
        sides: list[list[float]] = [[], []]
        for prediction, example in zip(predictions, examples, strict=True):
            if example.target[label] is not None:
                sides[example.target[label]].append(prediction[label])
        if sides[0] and sides[1]:
            values.append(auroc(sides[1], sides[0]))
    if not values:
        raise ValueError("mean_auroc: expected a label with examples of both kinds, got none")
    return sum(values) / len(values)


mean_auroc = SetMetric(_mean_auroc)
"""Metric of tasks with several labels: mean AUROC over the labels that have both kinds of example."""


def neighbourhoods(graph: Data, nodes: Sequence[int], hops: int) -> list[Data]:
    """The induced subgraphs around some nodes, which make a task about nodes one about graphs.

    Args:
        graph: a single large graph.
        nodes: their numbers.
        hops: how far a subgraph reaches.

    Returns:
        Graphs with ``x``, ``edge_index`` and ``edge_attr`` where there is one; ``centre`` is the number of the node.
    """
    out = []
    for node in nodes:
        kept, edges, centre, mask = k_hop_subgraph(int(node), hops, graph.edge_index, relabel_nodes=True,
                                                   num_nodes=graph.num_nodes)
        more = {} if graph.edge_attr is None else {"edge_attr": graph.edge_attr[mask]}
        out.append(Data(x=graph.x[kept], edge_index=edges, centre=centre, **more))
    return out


__all__ = ["Add", "GraphNetwork", "Targets", "counts", "graph_of", "mean_auroc", "neighbourhoods", "noise_seed",
           "pooled"]
