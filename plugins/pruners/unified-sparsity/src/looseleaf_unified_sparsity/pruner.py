"""What a component can do without: neurons, heads, attentions, MLPs or whole layers, found on a few forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from looseleaf import (
    Masks,
    Paper,
    PerRow,
    Report,
    Selection,
    Series,
    Structured,
    Tied,
    UnsupportedModelError,
    WeightPruner,
    unwrapped,
)
from looseleaf.plugin import In
from looseleaf.pruning.targets import check_finite, model_facts
from looseleaf_unified_sparsity.components import (
    NAMES,
    Attention,
    Components,
    Mlp,
    at,
    default_phase,
    linear,
    weight_names,
)
from looseleaf_unified_sparsity.watching import (
    Calibration,
    Call,
    NotSeenError,
    Unit,
    Watch,
    groups,
    heads,
    neurons,
    similarities,
    tasks_of,
)

Data = Calibration | Mapping[str, Sequence[Call]] | Sequence[Call]


@dataclasses.dataclass(frozen=True)
class Units(Selection):
    """Keeps the units of highest score, at least one of each group: neurons of each MLP, heads of each attention, or
    layers of the model. Which weights are a unit is known once :meth:`for_model` has seen the model.

    Args:
        sparsity: fraction of the units to remove, ``round(sparsity * n)`` of n.
        pruner: the method whose units they are.
        ties: slices of weights that are a unit, a group each.
        whole: names of the weights of each layer, where layers are the units.
    """

    sparsity: Annotated[float, In("[0, 1)")]
    pruner: UnifiedSparsity = dataclasses.field(compare=False, repr=False)
    ties: tuple[Tied, ...] = ()
    whole: tuple[tuple[str, ...], ...] = ()

    def for_model(self, model: nn.Module, names: Iterable[str]) -> Selection:
        """See :meth:`looseleaf.Selection.for_model`."""
        ties, whole = self.pruner.units(model)
        return dataclasses.replace(self, ties=ties, whole=whole)

    def select(self, scores: Mapping[str, Tensor]) -> Masks:
        """See :meth:`looseleaf.Selection.select`."""
        if not self.ties and not self.whole:
            raise ValueError("Units: expected the units of a model, got none: call for_model(model, names) first")
        kept = {name: torch.ones(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()}
        for tie in self.ties:
            members = {name: scores[name] for name in tie.members}
            units = tie.units or min(members[name].shape[dim] for name, dim in tie.members.items())
            kept.update(Structured(self._sparsity(units), tied=(tie,)).select(members))
        if self.whole:
            totals = torch.stack([sum((scores[name].sum(dtype=torch.float64).cpu() for name in names),
                                      torch.zeros((), dtype=torch.float64)) for names in self.whole])
            stays = PerRow(self._sparsity(len(totals))).select({"layers": totals})["layers"]
            for names, keep in zip(self.whole, stays.tolist(), strict=True):
                kept.update({name: torch.full_like(kept[name], keep) for name in names})
        return Masks(kept, self.describe())

    def _sparsity(self, units: int) -> float:
        return min(self.sparsity, (units - 1) / units)

    def describe(self) -> dict[str, Any]:
        """See :meth:`looseleaf.Selection.describe`."""
        return {"rule": "Units", "sparsity": self.sparsity, "what": self.pruner.what, "unit": self.pruner.unit}


@dataclasses.dataclass
class UnifiedSparsity(WeightPruner):
    """Keep what one half of a unified multimodal model needs, and remove the rest, without training.

    ``what="depth"``: layers whose tokens hardly change, ``mean cos(h_in, h_out)``, go first, all in one shot.
    ``"width"``: neurons of each MLP are kept by ``mean |a| * ||W_down column||``, a being what the down projection is
    given [official code]. ``"heads"``: heads of each attention by the mean size of what they add. Scores of several
    tasks add. The masks go on and off, and :func:`shrink` makes the model really smaller.

    Counts are ``round((1 - keep) * n)`` removed of n, and at least one stays [ours; the official code takes
    ``int(keep * n)``, which may differ by one]. In an attention with grouped keys a unit is a group of heads [ours].

    Args:
        keep: fraction of the units that stay, in (0, 1].
        what: ``"width"``: neurons of MLPs; ``"heads"``: heads of attentions; ``"depth"``: layers.
        component: whose weights. Where both share a decoder: on whose tokens the decoder is watched.
        unit: of depth: ``"block"``, or the ``"attention"`` or ``"mlp"`` of a layer by itself.
        tasks: on which tasks the component is watched; None: on all that the data have and that it works in.
        criterion: ``"paper"``; or ``"random"``, and for depth ``"last"`` and ``"first"``: which are removed, without
            data.
        layers: name pattern of the layers; None: see :meth:`Components.of`.
        seed: of the random criterion.
    """

    keep: Annotated[float, In("(0, 1]")] = 0.5
    what: Literal["width", "heads", "depth"] = "width"
    component: Literal["understanding", "generation"] = "understanding"
    unit: Unit = "block"
    tasks: tuple[str, ...] | None = None
    criterion: Literal["paper", "random", "last", "first"] = "paper"
    layers: str | None = None
    seed: Annotated[int, In(">= 0")] = 0

    paper: ClassVar[Paper] = Paper(
        title="Understanding and Harnessing Sparsity in Unified Multimodal Models",
        authors=("Shwai He", "Chaorui Deng", "Ang Li", "Shen Yan"), year=2025, arxiv="2512.02351",
        code="https://github.com/Shwai-He/SparseUnifiedModel",
        summary="What a model that reads and draws can drop if you only ask it, or only have it draw.")

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        self.tasks = (self.tasks,) if isinstance(self.tasks, str) else self.tasks
        self.tasks = tuple(self.tasks) if isinstance(self.tasks, list) else self.tasks
        self.check("tasks", self.tasks is None or (isinstance(self.tasks, tuple) and bool(self.tasks) and all(
            task in NAMES for task in self.tasks)), "None or some of ('understanding', 'generation')")
        self.check("criterion", self.what == "depth" or self.criterion in ("paper", "random"),
                   f"'paper' or 'random' with what={self.what!r}")
        self.check("layers", self.layers is None or (isinstance(self.layers, str) and bool(self.layers)),
                   "None or a name pattern such as 'language_model.layers.*'")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: neurons, on the kit's own inputs."""
        def data(model: nn.Module) -> dict[str, Any]:
            from looseleaf.testing.pruners import inputs_for

            return {"understanding": [inputs_for(model)]}

        return {"data": data}

    # -------------------------------------------------------------------------------------------------- the masks
    def score(self, model: Any, data: Data | None = None, *, progress: bool | None = None) -> dict[str, Tensor]:
        """The scores, float32; the entries of a unit share its score, so that they sum to it. See :meth:`prune`."""
        components = Components.of(model, self.layers)
        root, parts = components.modules[self.component], components[self.component]
        known = weight_names(root)
        covered = {known[id(p)]: p for part in parts for path in part.linears()
                   for p in [at(root, path)._parameters.get("weight")] if p is not None}
        ties, whole = self._units(components)
        if self.what == "depth":
            parameters = {known[id(p)]: p for part in parts for path in part.outputs()
                          for p in at(root, path)._parameters.values() if p is not None}
            covered.update(parameters)
        for name, weight in covered.items():
            check_finite(name, weight.detach(), "weights")
        values = self._measure(components, data, progress) if self.criterion == "paper" else self._baseline(components)
        scores = {name: torch.zeros((), device=w.device).expand(w.shape) for name, w in covered.items()}
        for names, value in zip(whole, values, strict=True) if whole else ():
            size = sum(covered[name].numel() for name in names)
            scores.update({name: torch.full((), float(value) / size, device=covered[name].device).expand(
                covered[name].shape) for name in names})
        for tie, value in zip(ties, values, strict=True) if ties else ():
            size = sum(covered[name].numel() for name in tie.members) // len(value)
            for name, dim in tie.members.items():
                weight = covered[name]
                each = (value.float() / size).to(weight.device).repeat_interleave(weight.shape[dim] // len(value))
                scores[name] = (each[:, None] if dim == 0 else each).expand(weight.shape)
        return scores

    def selection(self) -> Selection:
        """The units of highest score are kept."""
        return Units(1 - self.keep, self)

    def prune(self, model: Any, data: Data | None = None, *, progress: bool | None = None) -> Masks:
        """The masks of one component of ``model``, which is not changed.

        They cover all its projections, so that ``sparsity()`` is that of the component and masks of width and heads go
        together with ``&``. With depth the output projections are masked whole, biases too: the layer adds nothing.
        In a model of pairs a masked attention still shows its keys to the other component; :func:`shrink` takes them
        away as well [the paper's way].

        Args:
            model: any torch module with layers, or a pipeline of diffusers, of which ``component`` says the part that
                the masks are for.
            data: a :class:`Calibration`, or its ``tasks``, or a list of batches of understanding; None: only with
                another criterion than ``"paper"``.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: no data, a task or a phase that they do not have, no such component, quantised or not finite
                weights.
            UnsupportedModelError: no layers are found, or they are not built as this method needs.
        """
        scores = self.score(model, data, progress=progress)
        root = Components.of(model, self.layers).modules[self.component]
        masks = self.selection().for_model(model, scores).select(scores)
        masks.metadata.update(model_facts(root, [name for name in masks if masks[name].ndim > 1]),
                              plugin="unified-sparsity", hyperparameters=self.hyperparameters())
        return masks

    def units(self, model: Any) -> tuple[tuple[Tied, ...], tuple[tuple[str, ...], ...]]:
        """What is removed together in ``model``: ties of slices, or names of the weights of each layer; one is empty.

        Raises:
            ValueError, UnsupportedModelError: as :meth:`prune`.
        """
        return self._units(Components.of(model, self.layers))

    def _units(self, components: Components) -> tuple[tuple[Tied, ...], tuple[tuple[str, ...], ...]]:
        root, known = components.modules[self.component], weight_names(components.modules[self.component])

        def name(path: str) -> str:
            return known[id(linear(root, path).weight)]

        if self.what == "width":
            return tuple(Tied({**({} if mlp.packed else {name(path): 0 for path in mlp.inner}), name(mlp.down): 1})
                         for mlp in self._mlps(components)), ()
        if self.what == "heads":
            ties = []
            for attention in self._attentions(components):
                rows = [attention.q] if attention.paired else [attention.q, attention.k, attention.v]
                ties.append(Tied({**{name(path): 0 for path in rows}, name(attention.out[0]): 1},
                                 units=groups(root, attention)))
            return tuple(ties), ()
        parts = [part for part in components[self.component] if part.outputs(self.unit)]
        if not parts or not parts[0].layer:
            raise UnsupportedModelError(f"{type(unwrapped(root)).__name__}: expected layers with "
                                        f"{'attention and MLP' if self.unit == 'block' else self.unit}, got none")
        if self.unit != "block" and any(p.attention is not None and p.attention.q.endswith("to_q") for p in parts):
            raise UnsupportedModelError(f"unit={self.unit!r}: expected layers that are h + attention + MLP, got "
                                        f"{type(at(root, parts[0].layer)).__name__}: take 'block'")
        return (), tuple(tuple(known[id(p)] for path in part.outputs(self.unit)
                               for p in at(root, path)._parameters.values() if p is not None) for part in parts)

    def _mlps(self, components: Components) -> list[Mlp]:
        found = [mlp for part in components[self.component] for mlp in part.mlps]
        if not found:
            raise UnsupportedModelError("expected MLPs in the layers, got none: nothing has a width")
        return found

    def _attentions(self, components: Components) -> list[Attention]:
        found = [part.attention for part in components[self.component] if part.attention is not None]
        if not found or any(len(attention.out) > 1 for attention in found):
            raise UnsupportedModelError("expected attentions with q, k, v and one output projection, got "
                                        f"{'others' if found else 'none'}: heads are not scored here")
        return found

    # -------------------------------------------------------------------------------------------------- the scores
    def _baseline(self, components: Components) -> list[Tensor]:
        """Random scores, drawn once: masks drawn anew for each token, as the official code does, prune nothing."""
        draw = torch.Generator().manual_seed(self.seed)
        _, whole = self._units(components)
        if whole:
            order = torch.arange(1.0, len(whole) + 1)
            return list({"random": torch.rand(len(whole), generator=draw), "last": order.flip(0),
                         "first": order}[self.criterion])
        root = components.modules[self.component]
        if self.what == "heads":
            sizes = [groups(root, attention) for attention in self._attentions(components)]
        else:
            sizes = [linear(root, mlp.down).in_features for mlp in self._mlps(components)]
        return [torch.rand(size, generator=draw) for size in sizes]

    def _measure(self, components: Components, data: Any, progress: bool | None) -> list[Tensor]:
        """A score for each unit: a tensor for each MLP or attention, a number for each layer."""
        data = data if isinstance(data, Calibration) else Calibration(tasks_of(data))
        tasks = self.tasks or tuple(data.tasks)
        if missing := [task for task in tasks if task not in data.tasks]:
            raise ValueError(f"data: expected forwards of the task {missing[0]}, got {', '.join(data.tasks)}")
        found: list[list[Tensor]] = []
        for task in tasks:
            watch = Watch(self.component, components, data.phase or default_phase, task)
            try:
                found.append(self._measured(watch, data.tasks[task], progress))
            except NotSeenError:
                if self.tasks or (task == tasks[-1] and not found):
                    raise
        return [torch.stack([value.cpu() for value in values]).sum(0) for values in zip(*found, strict=True)]

    def _measured(self, watch: Watch, calls: Sequence[Call], progress: bool | None) -> list[Tensor]:
        if self.what == "width":
            return watch.run(calls, neurons(self._mlps(watch.components)), progress)
        if self.what == "heads":
            return watch.run(calls, heads(watch.root, self._attentions(watch.components)), progress)
        rows = similarities(watch, calls, progress)
        rows = [row for row, part in zip(rows, watch.parts, strict=True) if part.outputs(self.unit)]
        if not all(self.unit in row for row in rows):
            raise UnsupportedModelError(f"unit={self.unit!r}: expected layers that are h + attention + MLP, got "
                                        f"{type(at(watch.root, watch.parts[0].layer)).__name__}: take 'block'")
        return [1 - row[self.unit] for row in rows]


def survey(model: Any, data: Data, *, layers: str | None = None, progress: bool | None = None) -> Report:
    """How little each layer changes the tokens of each component, in each task: what could be dropped, at a glance.

    Args:
        model, data, progress: see :meth:`UnifiedSparsity.prune`.
        layers: see :meth:`Components.of`.

    Returns:
        A report with a table of mean cosines and a figure; components that a task does not use are left out.

    Raises:
        ValueError, UnsupportedModelError: as :meth:`UnifiedSparsity.prune`.
    """
    components = Components.of(model, layers)
    data = data if isinstance(data, Calibration) else Calibration(tasks_of(data))
    report = Report("What each layer changes", facts={"model": type(model).__name__, "weights are": components.kind})
    table = report.table("Cosine of the states before and after", ["component", "task", "layer", "block", "attention",
                                                                   "mlp"], note="1: the tokens stay as they are")
    series = []
    for task in data.tasks:
        for component in NAMES:
            watch = Watch(component, components, data.phase or default_phase, task)
            try:
                rows = similarities(watch, data.tasks[task], progress)
            except NotSeenError:
                report.facts[f"{component}, {task}"] = "no such tokens"
                continue
            for part, row in zip(watch.parts, rows, strict=True):
                table.add(component, task, part.layer, *(float(row[u]) if u in row else None for u in
                                                         ("block", "attention", "mlp")))
            series.append(Series(f"{component}, {task}", [float(n) for n in range(len(rows))],
                                 [float(row["block"]) for row in rows]))
    if not series:
        raise ValueError("data: expected tokens of a component, got none; see Calibration(tasks, phase=...)")
    report.figure("Cosine before and after each layer", x_label="layer", y_label="mean cosine", series=series)
    return report
