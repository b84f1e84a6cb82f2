"""Watching the tokens of one component in forwards of the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import UnsupportedModelError, unwrapped
from looseleaf.modes import evaluating
from looseleaf.progress import track
from looseleaf_unified_sparsity.components import (
    NAMES,
    Attention,
    Components,
    Mlp,
    Part,
    Phase,
    at,
    first_tensor,
    head_dim,
    linear,
)

Call = Callable[[Any], Any] | Mapping[str, Any] | Tensor
Unit = Literal["block", "attention", "mlp"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Forwards on which a component is watched.

    Args:
        tasks: ``"understanding"`` and ``"generation"``, or one of them -> what to run: batches for ``model(**batch)``
            (of which only tokens count where ``attention_mask`` is not 0), or functions of the model, such as
            ``lambda model: model.generate(...)``. One sample will do for depth, up to 30 for width [paper].
        phase: of the arguments of a layer, by name and with ``task`` and ``layer_idx``: ``"understanding"`` or
            ``"generation"``, or a boolean tensor (B, N) that is True for tokens of generation; asked wherever names of
            weights do not tell the components apart. None: :func:`default_phase`.

    Raises:
        ValueError: no task, an unknown one, or one without anything to run.
    """

    tasks: Mapping[str, Sequence[Call]]
    phase: Phase | None = None

    def __post_init__(self) -> None:
        odd = [task for task in self.tasks if task not in NAMES] or [t for t, calls in self.tasks.items() if not calls]
        if odd or not self.tasks:
            raise ValueError("data: expected {'understanding': [...], 'generation': [...]}, or one of both, with "
                             f"batches or functions of the model, got {dict(self.tasks)!r:.200}")


class NotSeenError(ValueError):
    """No token of a component was seen in a task."""


class _Mean:
    """A mean over tokens, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        if len(rows):
            total = rows.sum(0, dtype=torch.float64)
            self.total = total if self.total is None else self.total + total.to(self.total.device)
            self.count += len(rows)


class Watch:
    """Runs a model and shows, of what flows through it, the tokens of one component."""

    def __init__(self, component: str, components: Components, phase: Phase, task: str) -> None:
        self.component, self.components, self.phase, self.task = component, components, phase, task
        self.root, self.parts = components.modules[component], components[component]
        self.which: bool | Tensor = True
        self.padding: Tensor | None = None
        self.seen: set[str] = set()

    def inputs(self, module: nn.Module, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer by name, with the task and the number of the layer in a cache."""
        try:
            bound = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        except TypeError:
            bound = {}
        index = getattr(at(self.root, part.attention.path), "layer_idx", None) if part.attention else None
        return {**bound, **kwargs, "task": self.task, "layer_idx": index}

    def begin(self, part: Part, by_phase: bool) -> Callable[..., None]:
        """A hook on a layer that asks whose tokens it is given."""
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.which = True
            if by_phase:
                found = self.phase(self.inputs(module, part, args, kwargs))
                if isinstance(found, Tensor):
                    self.which = found if self.component == "generation" else ~found
                    self.seen.update(NAMES)
                else:
                    self.which = found == self.component
                    self.seen.add(found)
        return hook

    def rows(self, tensor: Tensor) -> Tensor:
        """The tokens (n, width) of the component, without padding."""
        keep = torch.full(tensor.shape[:-1], self.which) if isinstance(self.which, bool) else self.which
        if keep.shape != tensor.shape[:-1]:
            raise ValueError("phase: expected the name of a component or a tensor of shape "
                             f"{tuple(tensor.shape[:-1])}, got {tuple(keep.shape)}")
        if self.padding is not None and self.padding.shape == keep.shape:
            keep = keep & self.padding.to(keep.device)
        return tensor.detach()[keep.to(tensor.device)].float()

    @torch.no_grad()
    def watched(self, calls: Sequence[Call], hooks: Iterable[tuple[nn.Module, str, Callable[..., Any]]],
                progress: bool | None, by_phase: bool) -> None:
        """Run the calls with hooks, which are taken off again."""
        model = self.components.modules[self.component]
        model = getattr(model, "_orig_mod", model)  # a compiled model would be compiled again for the hooks
        with contextlib.ExitStack() as undo, evaluating(model):
            for part in self.parts:
                if part.layer:
                    undo.callback(at(self.root, part.layer).register_forward_pre_hook(
                        self.begin(part, by_phase), with_kwargs=True).remove)
            for module, place, hook in hooks:
                register = module.register_forward_pre_hook if place == "before" else module.register_forward_hook
                undo.callback(register(hook, with_kwargs=True).remove)  # type: ignore[operator]
            for call in track(calls, f"{self.component}, {self.task}", show=progress):
                self.padding, self.which = None, True
                if isinstance(call, Mapping):
                    mask = call.get("attention_mask")
                    self.padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
                    model(**call)
                elif isinstance(call, Tensor):
                    model(call)
                else:
                    call(model)

    def run(self, calls: Sequence[Call], units: Mapping[str, Callable[[nn.Module, Tensor], Tensor]],
            progress: bool | None) -> list[Tensor]:
        """For each layer (by path) what a function of it makes of the tokens that it is given, averaged over them."""
        means = {path: _Mean() for path in units}

        def hook(path: str) -> Callable[..., None]:
            def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = first_tensor(args[0] if args else next(iter(kwargs.values())))
                if given is not None:
                    means[path].add(units[path](at(self.root, path), self.rows(given)))
            return before

        # in a decoder that both share, only the phase says whose tokens these are
        self.watched(calls, [(_outer(self.root, path), "before", hook(path)) for path in units], progress,
                     self.components.kind == "shared" and bool(self.parts[0].layer))
        return [self.mean(mean) for mean in means.values()]

    def mean(self, mean: _Mean) -> Tensor:
        """The mean, or ValueError where no token of the component was seen."""
        if mean.total is None:
            if "unknown" in self.seen:
                raise ValueError(f"data: while the task {self.task} runs it is not known whose the tokens are, with no "
                                 "cache and no `mode`: expected a phase function, got none: give Calibration(tasks, "
                                 "phase=...)")
            seen = " and ".join(sorted(self.seen)) or "nothing"
            raise NotSeenError(f"data: expected tokens of {self.component} while the task {self.task} runs, got those "
                               f"of {seen}: give calls in which this component works, or Calibration(tasks, phase=...)")
        return mean.total / mean.count


def _outer(model: nn.Module, path: str) -> nn.Module:
    """The module at a path with what adapters have put around it: this is what is called."""
    module: Any = unwrapped(model)
    for step in filter(None, path.split(".")):
        module = getattr(getattr(module, "_orig_mod", module), step)
    return module  # type: ignore[no-any-return]


def neurons(mlps: Iterable[Mlp]) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """``|a_j| * ||W_down[:, j]||_2``: the norm does not depend on the token."""
    def score(down: Any, a: Tensor) -> Tensor:
        return a.abs() * down.weight.detach().float().norm(dim=0)

    return {mlp.down: score for mlp in mlps}


def heads(root: nn.Module, attentions: Iterable[Attention]) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """The mean size of what each head adds, over the outputs; heads that share a key are summed."""
    def score_of(attention: Attention) -> Callable[[Any, Tensor], Tensor]:
        size, units = head_dim(root, attention), groups(root, attention)

        def score(out: Any, a: Tensor) -> Tensor:
            weights = out.weight.detach().float().split(size, dim=1)
            each = [F.linear(own, w).abs().mean(1) for own, w in zip(a.split(size, 1), weights, strict=True)]
            return torch.stack(each, 1).view(len(a), units, len(weights) // units).sum(2)

        return score

    return {attention.out[0]: score_of(attention) for attention in attentions}


class _Similarity:
    """Cosines between the states before, between and after the two halves of a layer, averaged over tokens."""

    def __init__(self, watch: Watch, part: Part) -> None:
        self.watch, self.part = watch, part
        self.before: Tensor | None = None
        self.attended: Tensor | None = None
        self.added: Tensor | None = None
        self.means = {unit: _Mean() for unit in ("block", "attention", "mlp")}

    def hooks(self) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        """Those that note the states."""
        layer = at(self.watch.root, self.part.layer)
        yield layer, "before", self._begin
        if self.watch.components.kind != "pipeline" or self.watch.component == "understanding":
            if self.part.attention is not None:
                yield at(self.watch.root, self.part.attention.path), "after", self._attention
            if len(self.part.mlps) == 1:
                yield at(self.watch.root, self.part.mlps[0].path), "after", self._mlp
        yield layer, "after", self._end

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("hidden_states", args[0] if args else next(iter(kwargs.values()), None))
        self.before, self.attended, self.added = first_tensor(given), None, None

    def _attention(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        self.attended = first_tensor(output)

    def _mlp(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        self.added = first_tensor(output)

    def _end(self, layer: nn.Module, _: Any, __: Any, output: Any) -> None:
        after, before = first_tensor(output), self.before
        if before is None or after is None or before.shape != after.shape:
            raise UnsupportedModelError(f"{self.part.layer}: expected a layer that takes a state and gives one of the "
                                        f"same shape, got {type(layer).__name__}")
        one, two = self.watch.rows(before), self.watch.rows(after)
        self.means["block"].add(F.cosine_similarity(one, two, dim=-1)[:, None])
        if self.attended is None or self.attended.shape != before.shape:
            return
        middle = self.watch.rows(before + self.attended)
        if self.added is not None and self.added.shape == before.shape and len(middle) and not torch.allclose(
                middle + self.watch.rows(self.added), two, rtol=1e-2, atol=1e-2 * float(two.abs().max())):
            return  # not a layer that adds its attention and then its MLP
        self.means["attention"].add(F.cosine_similarity(one, middle, dim=-1)[:, None])
        self.means["mlp"].add(F.cosine_similarity(middle, two, dim=-1)[:, None])


def similarities(watch: Watch, calls: Sequence[Call], progress: bool | None = None) -> list[dict[str, Tensor]]:
    """For each layer the mean cosine of the states around it (``"block"``), its attention and its MLP.

    h_in, h_in + attention and h_out, the last with its residual, as the method has it; the official code for BAGEL
    takes the output of the MLP alone. ``"attention"`` and ``"mlp"`` are missing where a layer is not
    h + attention + MLP.
    """
    found = [_Similarity(watch, part) for part in watch.parts]
    watch.watched(calls, [hook for each in found for hook in each.hooks()], progress,
                  watch.components.kind != "pipeline")
    return [{unit: watch.mean(mean)[0] for unit, mean in each.means.items() if unit == "block" or mean.count}
            for each in found]


def groups(model: nn.Module, attention: Attention) -> int:
    """How many units the heads are: those that share a key are one, unless only queries go."""
    rows = attention.q if attention.paired else attention.k
    return linear(model, rows).out_features // head_dim(model, attention)


def tasks_of(data: Any) -> Mapping[str, Sequence[Call]]:
    """What a :class:`Calibration` is made of, a list of batches being the task understanding; ValueError where it is
    something else."""
    if isinstance(data, (list, tuple)):
        data = {"understanding": data}
    if not isinstance(data, Mapping):
        raise ValueError("data: expected {'understanding': [...], 'generation': [...]} with batches or functions of "
                         f"the model, or a Calibration, got {type(data).__name__}")
    return {task: list(calls) for task, calls in data.items()}
