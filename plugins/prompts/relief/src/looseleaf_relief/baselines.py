"""What RELIEF is compared with, all with the same head, the same passes over the graphs and the same validation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv
from torch_geometric.nn.inits import glorot

from looseleaf import Paper
from looseleaf.modes import own_random_state, training
from looseleaf.plugin import In
from looseleaf_relief.graphs import GraphNetwork
from looseleaf_relief.policy import Noise, places
from looseleaf_relief.prompt import LEARNERS, GraphOptimizer, Learner, LearnerSpec

_GPF = Paper("Universal Prompt Tuning for Graph Neural Networks",
             ("Taoran Fang", "Yunchao Zhang", "Yang Yang", "Chunping Wang", "Lei Chen"), 2023, "2209.15240", "NeurIPS",
             "https://github.com/zjunet/GPF", "one learned vector, or a mixture of some, added to all nodes")


@dataclasses.dataclass
class LinearProbe(GraphOptimizer):
    """The head alone, behind the frozen network; see :class:`GraphOptimizer` for its arguments."""

    paper = _GPF

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        return "probe", {}


class TunedNetwork(Learner):
    """A copy of the network that is trained with the head; made when it is attached."""

    network: nn.Module

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.loaded: dict[str, Tensor] = {}

    def attach(self, network: GraphNetwork) -> GraphNetwork:
        """The same kind of network around the copy, all of whose parameters are free."""
        own = copy.deepcopy(network)
        self.network = own.model
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        if self.loaded:
            try:
                self.network.load_state_dict(self.loaded)
            except RuntimeError as error:
                raise ValueError("on: expected the network that the prompt was learned for, got one of another shape: "
                                 f"fine-tune that one, too ({error})") from error
        return own

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        """Load the head, and the network as soon as it is attached."""
        if not hasattr(self, "network"):
            self.loaded = {n.removeprefix("network."): t for n, t in state_dict.items() if n.startswith("network.")}
            state_dict = {n: t for n, t in state_dict.items() if not n.startswith("network.")}
        return super().load_state_dict(state_dict, *args, **options)

    def logits(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Tensor:
        """(graphs, outputs); in training mode the copy is in training mode, too."""
        if not self.training:
            return super().logits(network, batch, noise)
        seed = int(torch.randint(2 ** 31, (1,), generator=noise.generators[0]))
        with training(network.model), own_random_state(seed):  # dropout draws from the global generator
            return super().logits(network, batch, noise)


@dataclasses.dataclass
class FineTuning(GraphOptimizer):
    """The head and a copy of the whole network; see :class:`GraphOptimizer` for the other arguments.

    Args:
        network_lr: learning rate of Adam for the network.
    """

    paper = _GPF
    network_lr: Annotated[float, In("> 0")] = 1e-3

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        return "fine-tuning", {}

    def groups(self, learner: Learner) -> list[dict[str, Any]]:
        """See :meth:`GraphOptimizer.groups`."""
        assert isinstance(learner, TunedNetwork)
        return [{"params": list(learner.head.parameters()), "lr": self.head_lr},
                {"params": list(learner.network.parameters()), "lr": self.network_lr}]


class OneVector(Learner):
    """GPF: one vector for all nodes."""

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.vector = nn.Parameter(torch.empty(1, spec.width))
        glorot(self.vector)

    def prompt(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Callable[[Tensor], Tensor]:
        """The vector, for each node."""
        return self.vector.expand_as


class Vectors(Learner):
    """GPF-plus: for each node a mixture of k vectors, weighed by a linear layer of its input embedding."""

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.vectors = nn.Parameter(torch.empty(spec.options["count"], spec.width))
        glorot(self.vectors)
        self.weigh = nn.Linear(spec.width, spec.options["count"])

    def prompt(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Callable[[Tensor], Tensor]:
        """Softmax(linear(X)) times the vectors."""
        return lambda features: self.weigh(features.float()).softmax(-1) @ self.vectors


class Subgraphs(Learner):
    """SUPT, soft: for each node a mixture of k vectors, weighed by a graph convolution."""

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.vectors = nn.Parameter(torch.empty(spec.options["count"], spec.width))
        glorot(self.vectors)
        self.weigh = GCNConv(spec.width, spec.options["count"])

    def prompt(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Callable[[Tensor], Tensor]:
        """Softmax(GCN(X + the sum of the vectors)) times the vectors."""
        return lambda features: self.weigh(features.float() + self.vectors.sum(0),
                                           batch.edge_index).softmax(-1) @ self.vectors


class RandomVectors(Learner):
    """Random vectors of a given size at a given fraction of each graph's nodes; nothing is learned but the head."""

    def prompt(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Tensor:
        """(nodes, D): normal numbers whose mean size is ``apm`` in each prompted node, zeros elsewhere."""
        place, graph = places(batch), batch.batch
        most = int(place.max()) + 1
        drawn = noise.normal(most * (1 + self.spec.width)).to(batch.x.device).view(-1, most, 1 + self.spec.width)
        order, content = drawn[graph, place, 0], drawn[graph, place, 1:]
        numbers = torch.bincount(graph, minlength=batch.num_graphs)
        kept = (self.spec.options["pcr"] * numbers).round().clamp(min=1)
        scores = order.new_full((batch.num_graphs, most), -torch.inf)
        scores[graph, place] = order
        rank = scores.argsort(1, descending=True).argsort(1)[graph, place]
        content = content * (self.spec.options["apm"] / content.abs().mean(1, keepdim=True))
        return torch.where((rank < kept[graph])[:, None], content, 0.0)


LEARNERS |= {"fine-tuning": TunedNetwork, "gpf": OneVector, "gpf-plus": Vectors, "supt": Subgraphs,
             "random": RandomVectors}


@dataclasses.dataclass
class _LearnedVectors(GraphOptimizer):
    prompt_lr: Annotated[float, In("> 0")] = 1e-3

    def groups(self, learner: Learner) -> list[dict[str, Any]]:
        """See :meth:`GraphOptimizer.groups`."""
        own = [p for n, p in learner.named_parameters() if not n.startswith("head.")]
        return [{"params": list(learner.head.parameters()), "lr": self.head_lr}, {"params": own, "lr": self.prompt_lr}]


@dataclasses.dataclass
class GPF(_LearnedVectors):
    """One learned vector, added to the input embedding of every node; see :class:`GraphOptimizer`.

    Args:
        prompt_lr: learning rate of Adam for the vector.
    """

    paper = _GPF

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        return "gpf", {}


@dataclasses.dataclass
class GPFPlus(_LearnedVectors):
    """A mixture of learned vectors for each node, by its input embedding; see :class:`GraphOptimizer`.

    Args:
        prompt_lr: learning rate of Adam for vectors and weights.
        count: how many vectors.
    """

    paper = _GPF
    count: Annotated[int, In(">= 1")] = 10

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        return "gpf-plus", {"count": self.count}


@dataclasses.dataclass
class SUPT(_LearnedVectors):
    """A mixture of learned vectors for each node, by a graph convolution (the soft kind); see :class:`GraphOptimizer`.

    Args:
        prompt_lr: learning rate of Adam for vectors and convolution.
        count: how many vectors.
    """

    paper = Paper("Subgraph-level Universal Prompt Tuning", ("Junhyun Lee", "Wooseong Yang", "Jaewoo Kang"), 2024,
                  "2402.10380", summary="learned vectors, mixed for each node by a graph convolution")
    count: Annotated[int, In(">= 1")] = 5

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        return "supt", {"count": self.count}


@dataclasses.dataclass
class RandomPrompt(GraphOptimizer):
    """Random vectors at random nodes, the same for a graph whenever it is predicted; see :class:`GraphOptimizer`.

    Args:
        pcr: fraction of a graph's nodes that get one; one node at least.
        apm: mean size of an element.
    """

    paper = _GPF
    pcr: Annotated[float, In("[0, 1]")] = 0.5
    apm: Annotated[float, In(">= 0")] = 0.1

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        return "random", {"pcr": self.pcr, "apm": self.apm}


__all__ = ["GPF", "SUPT", "FineTuning", "GPFPlus", "LinearProbe", "OneVector", "RandomPrompt", "RandomVectors",
           "Subgraphs", "TunedNetwork", "Vectors"]
