"""One-shot magnitude pruning."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from looseleaf import NM, Masks, Paper, Selection, Unstructured, WeightPruner, prunable_parameters
from looseleaf.plugin import In
from looseleaf.pruning.targets import check_finite


@dataclasses.dataclass
class MagnitudePruner(WeightPruner):
    """Remove the weights of smallest magnitude, once, without retraining.

    The number removed is exactly ``round(sparsity * n)`` of the n prunable weights (``scope="global"``) or of each of
    them (``"layer"``); among equal magnitudes the first ones are removed. [section 3 of the paper]

    Args:
        sparsity: fraction of the prunable weights to remove, in [0, 1). With an N:M pattern it must be 1 - N/M.
        pattern: "unstructured", or "N:M" such as "2:4": of every M consecutive inputs keep the N largest.
        scope: "global" compares all prunable weights together, "layer" removes the same fraction of each; an N:M
            pattern is always local.
        targets: patterns of the weights to prune, such as "model.layers.*.mlp"; None: every Linear and convolution of
            the body (no embeddings, norms, biases, output head), and no pooler, as the authors do with BERT.
        exclude: patterns of weights to leave out.
    """

    sparsity: Annotated[float, In("[0, 1)")] = 0.5
    pattern: str = "unstructured"
    scope: Literal["global", "layer"] = "global"
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    paper: ClassVar[Paper] = Paper(
        title="The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter",
        authors=("Ajay Jaiswal", "Shiwei Liu", "Tianlong Chen", "Zhangyang Wang"), year=2023, arxiv="2306.03805",
        venue="NeurIPS 2023", code="https://github.com/VITA-Group/essential_sparsity",
        summary="How much of a model can be zeroed out for free, and where exactly it falls off the cliff.")

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        group = _group(self.pattern) if isinstance(self.pattern, str) else None
        self.check("pattern", self.pattern == "unstructured" or (group is not None and 1 <= group[0] < group[1]),
                   "'unstructured' or 'N:M' with 1 <= N < M, such as '2:4'")
        if group:
            needed = 1 - group[0] / group[1]
            self.check("sparsity", abs(self.sparsity - needed) < 1e-9,
                       f"{needed:g} with pattern {self.pattern!r} (1 - N/M)")
        for field in ("targets", "exclude"):
            value = getattr(self, field)
            if isinstance(value, str):
                value = (value,)
            if isinstance(value, list):
                value = tuple(value)
            setattr(self, field, value)
            self.check(field, value is None or (isinstance(value, tuple) and all(
                isinstance(p, str) and p for p in value)), "None or patterns such as ('model.layers.*.mlp',)")
        self.check("targets", self.targets is None or len(self.targets) > 0, "None or at least one pattern")

    def score(self, model: torch.nn.Module, data: Any = None) -> dict[str, Tensor]:
        """The magnitude of every prunable weight, in the weight's dtype; ``data`` is not used.

        Raises:
            ValueError: a weight is NaN or infinite (the parameter is named), or a pattern matches nothing.
            UnsupportedModelError: the model has nothing to prune.
        """
        scores = {}
        for name, weight in prunable_parameters(model, self.targets, self.exclude).items():
            if self.targets is None and "pooler" in name.split("."):
                continue
            check_finite(name, weight.detach(), "weights")
            scores[name] = weight.detach().abs()
        return scores

    def selection(self) -> Selection:
        """The rule that fits ``pattern``, ``sparsity`` and ``scope``."""
        group = _group(self.pattern)
        return NM(*group) if group else Unstructured(self.sparsity, self.scope)

    def prune(self, model: torch.nn.Module, data: Any = None) -> Masks:
        """The masks for ``model``, which is not changed. ``masks.metadata`` says what was counted.

        Raises:
            ValueError: as :meth:`score`; or an N:M pattern meets a layer whose inputs are no multiple of M.
        """
        masks = super().prune(model, data)
        masks.metadata.update(plugin="essential-sparsity", pattern=self.pattern)
        return masks


def _group(pattern: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)
    return (int(match[1]), int(match[2])) if match else None
