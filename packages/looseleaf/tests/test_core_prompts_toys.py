"""Three optimisers, none of them about text, that show what the interface of prompts holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from looseleaf import Budget, Example, Paper, Predictor, Prompt, PromptOptimizer, Task, costs
from looseleaf.modes import evaluating, frozen
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf.testing import conformance_tests
from looseleaf.testing.models import seeded
from looseleaf.testing.prompts import PictureClassifier, picture_task

PAPER = Paper(title="A toy", authors=("A B",), year=2026, summary="Shows what the interface holds.")


# -- 1. a border of pixels for an image classifier: any nn.Module, gradients ---------------------------------------

@dataclasses.dataclass
class Border(Prompt):
    """A border of one pixel around every picture."""

    pixels: Tensor
    classes: tuple[str, ...]

    def on(self, model: nn.Module) -> Predictor:
        return BorderedClassifier(self, model)


class BorderedClassifier(Predictor):
    def __init__(self, border: Border, model: nn.Module) -> None:
        self.border, self.model, self.classes = border, model, border.classes

    def scores(self, examples: Any) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            return self.model(framed(examples, self.border.pixels)).log_softmax(-1)


def framed(examples: Any, pixels: Tensor) -> Tensor:
    inside = nn.functional.pad(torch.ones(6, 6), (1, 1, 1, 1))
    return torch.stack([e.inputs["picture"] for e in examples]) * inside + pixels * (1 - inside)


@dataclasses.dataclass
class PixelBorder(PromptOptimizer):
    """Learns the pixels of a border by gradient descent.

    Args:
        steps: gradient steps.
        lr: learning rate.
    """

    steps: Annotated[int, In(">= 1")] = 12
    lr: Annotated[float, In("> 0")] = 1.0
    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = nn.Module

    def optimize(self, task: Task, model: nn.Module, **options: Any) -> Border:
        task.validate()
        search = Search(self, task, model, **options)
        targets = torch.tensor([list(task.classes or ()).index(e.target) for e in task.train])
        pixels = torch.tensor(search.state.get("pixels", [[0.0] * 8] * 8))
        with search, evaluating(model), frozen(model):
            for _ in search.steps(self.steps):
                pixels.requires_grad_()
                loss = cross_entropy(search.model(framed(task.train, pixels)), targets)
                pixels = (pixels - self.lr * torch.autograd.grad(loss, pixels)[0]).detach()
                search.state = {"pixels": pixels.tolist(), "loss": loss.item()}
        return Border(pixels.detach(), tuple(task.classes or ()),
                      info=search.info(-search.state.get("loss", np.log(2)), search.done))


# -- 2. a vector added to the nodes of a graph: a model with methods of its own, no gradients ----------------------

class DenseGNN(nn.Module):
    """Two rounds of messages over a dense adjacency, then a mean over nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    @costs(calls=lambda self, graphs, added: len(graphs))
    def logits(self, graphs: Any, added: Tensor) -> Tensor:
        out = []
        for graph in graphs:
            x = torch.relu(self.norm(self.first(graph["adjacency"] @ (graph["nodes"] + added))))
            out.append(self.last((graph["adjacency"] @ x).mean(0)))
        return torch.stack(out)


def graph_task() -> Task:
    """Graphs with 3 to 6 nodes; dense ones against sparse ones."""
    draw = torch.Generator().manual_seed(0)

    def graph(n: int) -> Example:
        size, dense = 3 + n % 4, n % 2
        edges = (torch.rand(size, size, generator=draw) < (0.8 if dense else 0.3)).float()
        return Example({"nodes": torch.randn(size, 4, generator=draw), "adjacency": (edges + edges.T).clamp(max=1)},
                       "dense" if dense else "sparse")

    parts = [[graph(n) for n in range(12)] for _ in range(3)]
    return Task("graphs", *parts, classes=("sparse", "dense"))


@dataclasses.dataclass
class NodePrompt(Prompt):
    """A vector that is added to every node."""

    vector: Tensor
    classes: tuple[str, ...]

    def on(self, model: DenseGNN) -> Predictor:
        return PromptedGraphs(self, model)


class PromptedGraphs(Predictor):
    def __init__(self, prompt: NodePrompt, model: DenseGNN) -> None:
        self.prompt, self.model, self.classes = prompt, model, prompt.classes

    def scores(self, examples: Any) -> Tensor:
        with torch.no_grad():
            return self.model.logits([e.inputs for e in examples], self.prompt.vector)


@dataclasses.dataclass
class NodeVector(PromptOptimizer):
    """Climbs: a random change of the vector is kept where more graphs are classified rightly.

    Args:
        trials: changes tried.
    """

    trials: Annotated[int, In(">= 1")] = 20
    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = DenseGNN

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        return {"task": graph_task, "model": lambda: seeded(DenseGNN), "calls": 400}

    def optimize(self, task: Task, model: DenseGNN, **options: Any) -> NodePrompt:
        task.validate()
        search, classes = Search(self, task, model, **options), tuple(task.classes or ())
        with search:
            for n in search.steps(self.trials):
                step = torch.randn(4, generator=torch.Generator().manual_seed(1000 * search.seed + n))
                tried = torch.tensor(search.state.get("best", [0.0] * 4)) + (step if n else 0)
                score = task.evaluate(NodePrompt(tried, classes).on(search.model), "train").score
                if score > search.state.get("score", -1):
                    search.state = {"best": tried.tolist(), "score": score}
        return NodePrompt(torch.tensor(search.state.get("best", [0.0] * 4)), classes,
                          info=search.info(search.state.get("score", 0.0), search.done))


# -- 3. exemplars chosen for each query: a model that is no module, a prompt made anew in predict ------------------

class Comparer:
    """Guesses a number from solved examples in its view: the mean of theirs, drawn to the ones that look alike."""

    name = "comparer"

    @costs(calls=lambda self, points: len(points))
    def embed(self, points: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.sin(p) for p in points])

    @costs(calls=lambda self, queries, shown: len(queries))
    def guess(self, queries: list[np.ndarray], shown: list[list[Example]]) -> list[float]:
        return [float(np.mean([e.target + 0.1 * np.abs(q - e.inputs["point"]).sum() for e in shots]))
                for q, shots in zip(queries, shown, strict=True)]


def point_task() -> Task:
    rng = np.random.default_rng(0)
    points = [[Example({"point": p}, float(p.sum())) for p in rng.uniform(-1, 1, (10, 3))] for _ in range(3)]
    return Task("sums", *points, metric=lambda prediction, example: -abs(prediction - example.target))


@dataclasses.dataclass
class NearestExemplars(Prompt):
    """Solved examples, of which each query is shown the nearest."""

    pool: list[Example]
    shots: int

    def on(self, model: Comparer) -> Predictor:
        return WithExemplars(self, model)


class WithExemplars(Predictor):
    def __init__(self, prompt: NearestExemplars, model: Comparer) -> None:
        self.prompt, self.model = prompt, model

    def predict(self, examples: Any) -> list[float]:
        pool, points = self.prompt.pool, [e.inputs["point"] for e in examples]
        seen, asked = np.split(self.model.embed([e.inputs["point"] for e in pool] + points), [len(pool)])
        order = np.argsort(((asked[:, None] - seen) ** 2).sum(-1), axis=1, kind="stable")[:, :self.prompt.shots]
        return self.model.guess(points, [[pool[n] for n in row] for row in order])


@dataclasses.dataclass
class ExemplarCount(PromptOptimizer):
    """Finds how many exemplars each query is shown best.

    Args:
        most: the largest number tried.
    """

    most: Annotated[int, In(">= 1")] = 6
    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = Comparer

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        return {"task": point_task, "model": Comparer}

    def optimize(self, task: Task, model: Comparer, **options: Any) -> NearestExemplars:
        task.validate()
        search = Search(self, task, model, **options)
        scores = search.state.setdefault("scores", [])
        with search:
            for n in search.steps(min(self.most, len(task.train))):
                scores.append(task.evaluate(NearestExemplars(list(task.train), n + 1).on(search.model), "dev").score)
        best = int(np.argmax(scores or [0.0]))
        return NearestExemplars(list(task.train), best + 1, info=search.info(max(scores, default=0.0), len(scores)))


test_pixel_border = conformance_tests(PixelBorder)
test_node_vector = conformance_tests(NodeVector)
test_exemplar_count = conformance_tests(ExemplarCount)


# -- and they are good for something ------------------------------------------------------------------------------

def test_a_border_and_a_vector_help() -> None:
    task, model = picture_task(), PictureClassifier()
    start = Border(torch.zeros(8, 8), tuple(task.classes or ()))
    found = PixelBorder(steps=40, lr=20.0).optimize(task, model, progress=False)
    assert task.evaluate(found.on(model)).score > task.evaluate(start.on(model)).score
    graphs, gnn = graph_task(), seeded(DenseGNN)
    plain = graphs.evaluate(NodePrompt(torch.zeros(4), ("sparse", "dense")).on(gnn), "train").score
    assert NodeVector().optimize(graphs, gnn, progress=False).info["fitness"] > plain


def test_exemplars_per_query_are_paid_for() -> None:
    task, model = point_task(), Comparer()
    budget = Budget(calls=100)
    found = ExemplarCount().optimize(task, model, budget=budget, progress=False)
    # each try embeds the pool and the queries, and guesses once for each query
    assert found.info["stopped"] == "budget: calls" and budget.used["calls"] == found.info["evaluations"] * 30


def test_toys_are_saved_with_what_they_hold(tmp_path: Path) -> None:
    task, model = point_task(), Comparer()
    found = ExemplarCount().optimize(task, model, progress=False)
    found.save(tmp_path / "found.json")
    again = Prompt.load(tmp_path / "found.json")
    assert again == found and again.on(model).predict(task.test) == found.on(model).predict(task.test)
