"""What is learned in front of and behind a frozen graph network, and the loop that learns it."""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from looseleaf import Budget, Example, Predictor, Prompt, PromptOptimizer, Task
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, frozen, own_random_state, with_gradients
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf.prompts.prompt import storable
from looseleaf.resume import StateError
from looseleaf_relief.graphs import GraphNetwork, Targets, counts, graph_of, noise_seed, pooled
from looseleaf_relief.policy import Noise

FORMAT = "looseleaf.relief/1"
TRAIN_BATCH, EVAL_BATCH = 128, 64
"""Graphs in a step of the head, and in a batch of predictions, as in the official code."""


@storable
@dataclasses.dataclass(frozen=True)
class LearnerSpec:
    """What a learner is made of.

    Attributes:
        kind: its name in :data:`LEARNERS`.
        width, d: of the input embeddings and of the node embeddings.
        outputs: of the head.
        head_layers: its linear layers.
        options: what else this kind takes.
    """

    kind: str
    width: int
    d: int
    outputs: int
    head_layers: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, seed: int = 0) -> Learner:
        """A new learner."""
        with own_random_state(seed):
            return LEARNERS[self.kind](self)


class Learner(nn.Module):
    """A head, and what changes the network's input or weights; here nothing does.

    Args:
        spec: what it is made of.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        for _ in range(spec.head_layers - 1):
            layers += [nn.Linear(spec.d, spec.d), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(spec.d, spec.outputs))

    def attach(self, network: GraphNetwork) -> GraphNetwork:
        """The network that :meth:`embed` runs: here the one given."""
        return network

    def prompt(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Tensor | Callable[[Tensor], Tensor] | None:
        """What is added to the input embeddings; None: nothing."""
        return None

    def logits(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Tensor:
        """(graphs, outputs)."""
        add = self.prompt(network, batch, noise)
        return self.head(pooled(network.embed(batch, add), batch).float())  # type: ignore[no-any-return]


LEARNERS: dict[str, type[Learner]] = {"probe": Learner}
"""Kind -> class, for prompts read from files."""


@dataclasses.dataclass
class FeaturePrompt(Prompt):
    """What was learned for a graph network: a policy or vectors, and a head.

    Attributes:
        spec: what it is made of.
        tensors: of the learner, by name.
        classes: in the order of the scores; None: several labels.
        seed: of nodes that are drawn.
        draws: how many prompts a prediction is the mean of, where nodes are drawn.
        deterministic: take the most probable node instead of drawing one.
    """

    spec: LearnerSpec
    tensors: dict[str, Tensor]
    classes: list[Any] | None = None
    seed: int = 0
    draws: int = 1
    deterministic: bool = False

    def on(self, model: GraphNetwork) -> GraphPredictor:
        """See :meth:`looseleaf.Prompt.on`; ``model`` is a :class:`GraphNetwork` of the same widths.

        Raises:
            ValueError: a network of other widths.
        """
        if not isinstance(model, GraphNetwork):
            raise ValueError(f"on: expected a GraphNetwork, got {type(model).__name__}: wrap the model in one")
        learner = self.spec.build(self.seed)
        learner.load_state_dict(self.tensors)
        return GraphPredictor(learner, learner.attach(model), self.classes, self.seed, draws=self.draws,
                              deterministic=self.deterministic)


class GraphPredictor(Predictor):
    """Predicts graphs with a learner in front of a network.

    Args:
        learner, network, classes: what predicts what with which network, :meth:`Learner.attach`-ed.
        seed, draws, deterministic: see :class:`FeaturePrompt`.
    """

    def __init__(self, learner: Learner, network: GraphNetwork, classes: list[Any] | None, seed: int = 0, *,
                 draws: int = 1, deterministic: bool = False) -> None:
        self.learner, self.network, self.classes, self.seed = learner.to(network.device), network, classes, seed
        self.draws, self.deterministic = draws, deterministic

    def scores(self, examples: Sequence[Example]) -> Tensor:
        """(examples, classes) natural-log probabilities, or (examples, labels) probabilities."""
        def run(batch: Batch, noise: Noise) -> Tensor:
            logits = self.learner.logits(self.network, batch, noise)
            return logits.softmax(-1) if self.classes is not None else logits.sigmoid()

        found = torch.zeros(len(examples), self.learner.spec.outputs)
        for draw in range(self.draws):
            for order, out, _ in self._run(examples, run, draw):
                found[order] += out.cpu() / self.draws
        return found.clamp_min(1e-30).log() if self.classes is not None else found

    def predict(self, examples: Sequence[Example]) -> list[Any]:
        """The likeliest class of each; or the probability of each label."""
        return super().predict(examples) if self.classes is not None else [
            tuple(row) for row in self.scores(examples).tolist()]

    def prompts(self, examples: Sequence[Any]) -> list[Tensor]:
        """What is added to the input embeddings of each graph, (its nodes, D).

        Args:
            examples: with a graph each, or graphs.
        """
        def run(batch: Batch, noise: Noise) -> Tensor:
            add = self.learner.prompt(self.network, batch, noise)
            if callable(add):
                found: list[Tensor] = []

                def look(features: Tensor) -> Tensor:
                    found.append(add(features))
                    return found[0]

                self.network.embed(batch, look)
                return found[0]
            return torch.zeros(batch.num_nodes, self.learner.spec.width) if add is None else add

        out: list[Tensor] = [torch.empty(0)] * len(examples)
        for order, found, batch in self._run(examples, run, 0):
            for n, part in zip(order, found.cpu().split(counts(batch).tolist()), strict=True):
                out[n] = part
        return out

    def _run(self, examples: Sequence[Any], run: Callable[[Batch, Noise], Tensor],
             draw: int) -> list[tuple[list[int], Tensor, Batch]]:
        """Numbers of the examples of each batch, and what ``run`` gives; graphs of like size go together."""
        graphs = [graph_of(e, f"example {n}") for n, e in enumerate(examples)]
        order = sorted(range(len(graphs)), key=lambda n: int(graphs[n].num_nodes or 0))
        spec, parts = self.learner.spec, []
        with torch.no_grad(), evaluating(self.network.model), evaluating(self.learner):
            for at in range(0, len(order), EVAL_BATCH):
                rows = order[at:at + EVAL_BATCH]
                batch = self.network.collate([graphs[n] for n in rows])
                noise = Noise([torch.Generator().manual_seed(noise_seed(graphs[n], self.seed + 7919 * draw))
                               for n in rows], len(rows), deterministic=self.deterministic)
                try:
                    out = run(batch, noise)
                except RuntimeError as error:  # shapes that do not fit
                    sizes = self.network.sizes(self.network.collate([graphs[rows[0]]]))
                    if sizes == (spec.width, spec.d):
                        raise
                    raise ValueError(f"expected a network of widths {spec.width} and {spec.d}, for which the prompt "
                                     f"was learned, got {sizes[0]} and {sizes[1]}: learn one for this network"
                                     ) from error
                parts.append((rows, out.detach(), batch))
        return parts


def coverage(prompts: Sequence[Tensor]) -> tuple[float, float]:
    """Fraction of prompted nodes (PCR), and mean size of what they get (APM).

    Args:
        prompts: (nodes, D) of each graph. PCR is the mean over graphs of the fraction of nodes whose prompt is not
            zero, APM the mean over those nodes of the mean absolute element; 0 where there are none.
    """
    hit = [p.ne(0).any(1) for p in prompts]
    sizes = torch.cat([p[h].abs().mean(1) for p, h in zip(prompts, hit, strict=True)])
    return float(torch.stack([h.float().mean() for h in hit]).mean()), float(sizes.mean()) if len(sizes) else 0.0


@dataclasses.dataclass
class GraphOptimizer(PromptOptimizer):
    """Learns a head, and what is in front of a frozen graph network; subclasses say what.

    Args:
        epochs: rounds over the training graphs.
        head_layers: linear layers of the head, with ReLU between.
        head_epochs: passes of the head over the training graphs in each round.
        head_lr: learning rate of Adam for the head.
        head_decay: let it fall linearly to zero.
        skip: rounds before which no validation counts.
    """

    accepts: ClassVar[type] = GraphNetwork
    epochs: Annotated[int, In(">= 1")] = 50
    head_layers: Annotated[int, In(">= 1")] = 3
    head_epochs: Annotated[int, In(">= 0")] = 1
    head_lr: Annotated[float, In("> 0")] = 1e-3
    head_decay: bool = False
    skip: Annotated[int, In(">= 0")] = 20

    @abstractmethod
    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """Kind and options of the learner for these training graphs."""

    def groups(self, learner: Learner) -> list[dict[str, Any]]:
        """Parameter groups that the head's loss trains."""
        return [{"params": list(learner.parameters()), "lr": self.head_lr}]

    def before(self, run: Run, epoch: int) -> dict[str, float]:
        """What is done in each round before the head's turn, and what is noted of it; here nothing."""
        return {}

    def evaluation(self) -> dict[str, Any]:
        """How prompts are drawn in predictions: fields of :class:`FeaturePrompt`."""
        return {}

    def optimizers(self, run: Run) -> list[torch.optim.Optimizer]:
        """The head's optimiser, and further ones for :meth:`before`."""
        return [torch.optim.Adam(self.groups(run.learner))]

    def optimize(self, task: Task, model: GraphNetwork, *, budget: Budget | None = None,
                 start: FeaturePrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> FeaturePrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            task: graphs (``inputs["graph"]``, of torch_geometric) of some classes; or without classes, with targets of
                several labels 0, 1 or None (unknown). The best round on ``dev`` is kept; without ``dev`` the last.
            model: the network; its weights and buffers stay as they are, bit for bit.
            budget: a call is a graph through the network.
            start: a prompt of the same kind and sizes.
        """
        self.check_model(model)
        targets = Targets(task)
        graphs = [graph_of(e) for e in task.train]
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        network: GraphNetwork = search.model
        with ExitStack() as around:
            around.enter_context(evaluating(network.model))
            around.enter_context(frozen(network.model))
            around.enter_context(with_gradients())
            kind, options = self.options(graphs)
            # what is known is not asked again: the budget of a former call may be used up
            width, d = search.state.get("sizes") or network.sizes(network.collate(graphs[:1]))
            spec = LearnerSpec(kind, width, d, targets.outputs, self.head_layers, options)
            run = Run(self, task, targets, network, spec, seed, search, state_dir)
            if start is not None:
                if start.spec != spec:
                    raise ValueError(f"start: expected a prompt of {spec}, got one of {start.spec}")
                run.learner.load_state_dict(start.tensors, strict=False)  # all but the critic
                run.best = run.kept()
            run.resume()
            with search:
                for epoch in search.steps(self.epochs):
                    run.round(epoch)
        info = search.info(run.fitness, evaluations=search.done, epoch=run.best_epoch, history=run.history)
        if run.notes:
            info["notes"] = run.notes
        return FeaturePrompt(spec, {n: t.cpu() for n, t in run.best.items()}, targets.classes, seed,
                             info=info, **self.evaluation())


class Run:
    """One search: what is learned, and the best of it so far.

    Attributes:
        learner, network, targets, examples: what is learned for which network on what.
        optimizers: see :meth:`GraphOptimizer.optimizers`.
        history: of each round: loss, validation score, and what :meth:`GraphOptimizer.before` notes.
        notes: warnings, in words.
    """

    def __init__(self, method: GraphOptimizer, task: Task, targets: Targets, network: GraphNetwork, spec: LearnerSpec,
                 seed: int, search: Search, state_dir: str | Path | None) -> None:
        self.method, self.task, self.targets, self.seed, self.search = method, task, targets, seed, search
        self.examples = list(task.train)
        self.graphs = [graph_of(e) for e in self.examples]
        self.labels = targets.encode(self.examples).to(network.device)
        self.learner = spec.build(seed).to(network.device)
        self.network = self.learner.attach(network)
        self.optimizers = method.optimizers(self)
        self.history: list[dict[str, float]] = []
        self.notes: list[str] = []
        self.best, self.best_epoch = self.kept(), 0
        self.fitness = -float(torch.tensor(float(max(2, targets.outputs))).log())
        self._folder = None if state_dir is None else Path(state_dir)
        self._whole = [(part, network.collate([self.graphs[n] for n in part])) for part in (
            list(range(at, min(at + TRAIN_BATCH, len(self.graphs)))) for at in range(0, len(self.graphs), TRAIN_BATCH))]

    def generator(self, epoch: int, part: int = 0) -> torch.Generator:
        """Of all randomness of a round."""
        return torch.Generator().manual_seed((self.seed * 100_003 + epoch) * 31 + part)

    def loss_of(self, batch: Batch, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Node embeddings -> (graphs,) loss by the head as it is."""
        return lambda nodes: self.targets.loss(self.learner.head(pooled(nodes, batch).float()), labels)

    def round(self, epoch: int) -> None:
        """One round, number ``epoch`` from 0: what comes before, the head, and the validation."""
        noted = self.method.before(self, epoch)
        loss = self.train_head(epoch)
        entry = {"loss": loss, **noted}
        number = epoch + 1
        if number >= min(self.method.skip, self.method.epochs):
            if len(self.task.dev):
                entry["dev"] = self.task.evaluate(self.predictor(), "dev").score
            fitness = entry.get("dev", -loss)
            # without dev examples the last round counts
            if not self.best_epoch or not len(self.task.dev) or fitness > self.fitness:
                self.fitness, self.best, self.best_epoch = fitness, self.kept(), number
        self.history.append({name: float(value) for name, value in entry.items()})
        self._keep(number)

    def predictor(self) -> GraphPredictor:
        """What predicts with the learner as it is."""
        return GraphPredictor(self.learner, self.network, self.targets.classes, self.seed, **self.method.evaluation())

    def train_head(self, epoch: int, passes: int | None = None) -> float:
        """Passes of the head over all graphs; the mean loss of the last."""
        optimizer, generator, mean = self.optimizers[0], self.generator(epoch, 1), 0.0
        if self.method.head_decay:
            for group, first in zip(optimizer.param_groups, self.method.groups(self.learner), strict=True):
                group["lr"] = first["lr"] * (1 - epoch / self.method.epochs)
        self.learner.train()
        for _ in range(self.method.head_epochs if passes is None else passes):
            total = 0.0
            for part, batch in self._whole:
                logits = self.learner.logits(self.network, batch, Noise([generator], len(part)))
                value = self.targets.loss(logits, self.labels[part]).mean()
                if not torch.isfinite(value):
                    raise ValueError(f"epoch {epoch + 1}: expected a finite loss, got {float(value.detach())}: lower "
                                     "head_lr, or see whether the network gives finite embeddings")
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += float(value.detach()) * len(part)
            mean = total / len(self.graphs)
        return mean

    def warn(self, text: str) -> None:
        """Warn once, and note it in the prompt's info."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, UserWarning, stacklevel=5)

    def kept(self) -> dict[str, Tensor]:
        """A copy of what a prompt is made of: all but the critic."""
        return {n: t.detach().clone() for n, t in self.learner.state_dict().items() if not n.startswith("critic.")}

    # --------------------------------------------------------------------------------------- on disk
    def _keep(self, number: int) -> None:
        """Write the tensors after a round; the plain data that name them are written by the search."""
        name = f"tensors-{number}.safetensors"
        self.search.state = {"sizes": [self.learner.spec.width, self.learner.spec.d], "tensors": name,
                             "history": self.history, "notes": self.notes, "fitness": self.fitness,
                             "best_epoch": self.best_epoch}
        if self._folder is None:
            return
        tensors = {f"now/{n}": t for n, t in self.learner.state_dict().items()}
        tensors |= {f"best/{n}": t for n, t in self.best.items()}
        for which, optimizer in enumerate(self.optimizers):
            for place, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{which}/{place}/{n}": v for n, v in values.items() if isinstance(v, Tensor)}
        save_tensors(self._folder / name, {n: t.cpu() for n, t in tensors.items()}, format=FORMAT)
        for former in self._folder.glob("tensors-*.safetensors"):
            if former.name not in (name, f"tensors-{number - 1}.safetensors"):
                former.unlink(missing_ok=True)

    def resume(self) -> None:
        """Go on from what the search has on disk."""
        saved = self.search.state
        if not saved or self._folder is None:
            return
        path = self._folder / saved["tensors"]
        try:
            tensors, _ = load_tensors(path, format=FORMAT)
        except (ValueError, FileNotFoundError) as error:
            raise StateError(f"the state {path} cannot be read ({error}): remove {self._folder} to begin again, or "
                             "give another state_dir") from error
        self.history, self.notes = list(saved["history"]), list(saved["notes"])
        self.fitness, self.best_epoch = saved["fitness"], saved["best_epoch"]
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        self.learner.load_state_dict(parts["now"])
        self.best = parts["best"]
        states: dict[int, dict[int, dict[str, Tensor]]] = {}
        for name, value in parts["optimizer"].items():
            which, place, key = name.split("/")
            states.setdefault(int(which), {}).setdefault(int(place), {})[key] = value
        for index, state in states.items():
            optimizer = self.optimizers[index]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


__all__ = ["LEARNERS", "FeaturePrompt", "GraphOptimizer", "GraphPredictor", "Learner", "LearnerSpec", "Run", "coverage"]
