"""Experts, router and losses as plain modules and functions (Du, Niu and Zhao, 2024, and their code)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import UnsupportedModelError, unwrapped
from looseleaf.plugin import In, check_fields
from looseleaf.prompts.prompt import storable
from looseleaf_mocoop.templates import check_groups, parts
from looseleaf_vision import DualEncoder, TextContext

FEW = 4
"""In a smaller batch only the experts that a picture of it chooses are encoded, as in the official code."""


@storable
@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """What a mixture of soft prompts is made of.

    Attributes:
        templates: hand-written texts with one ``{}``; those of a group follow one another.
        groups: how many templates each group has; every group has an expert, which begins at its first template.
        top_k: experts mixed for each picture.
        router: False: no router, all experts mixed with equal weights.
        correction: learn a vector that is added to all text features.
        layer_norm: learn the LayerNorms in the blocks of the image tower.
    """

    templates: tuple[str, ...]
    groups: Annotated[tuple[int, ...], In(">= 1")]
    top_k: Annotated[int, In(">= 1")] = 2
    router: bool = True
    correction: bool = True
    layer_norm: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_groups(self.templates, self.groups, "MixtureSpec")
        if self.router and self.top_k > len(self.groups):
            raise ValueError(f"MixtureSpec.top_k: expected an integer in [1, {len(self.groups)}], the number of "
                             f"groups, got {self.top_k}: give more groups or mix fewer")

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """The templates of each group."""
        return parts(self.templates, self.groups)

    def build(self, encoder: DualEncoder, classes: int, seed: int = 0) -> MixedText:
        """The module with the vectors at their start, whatever the classes are."""
        return MixedText(self, encoder, seed)


class Router(nn.Linear):
    """A linear layer (B, d) -> (B, experts), whose largest outputs choose and weigh the experts.

    Args:
        dim: width of the picture features.
        experts: how many there are.
        top_k: how many of them are mixed.
        seed: of the weights.
    """

    def __init__(self, dim: int, experts: int, top_k: int = 2, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(dim, experts)
        self.top_k = top_k

    def weights(self, logits: Tensor) -> Tensor:
        """(B, experts): softmax over the ``top_k`` largest of each row, 0 elsewhere; of equals the first is taken."""
        values, experts = logits.sort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(logits).scatter(-1, experts[..., :self.top_k], values[..., :self.top_k].softmax(-1))


class MixedText(nn.Module):
    """The experts of a :class:`MixtureSpec`, their router, and what else is learned.

    Args:
        spec: what there is.
        encoder: whose texts and pictures they are for; only its embeddings and LayerNorms are read.
        seed: of the router.

    Attributes:
        experts: one :class:`looseleaf_vision.TextContext` for each group; its vectors before and after the name are
            the rows of ``experts.g.context``.
        gate: the :class:`Router`; None: all experts with equal weights.
        correction: (d,), zero at first; None: none.
        norms: copies of the image tower's LayerNorms, which take their places; none where they are not learned.
        usage: (experts,) pictures of the epoch that had the expert in their mixture.
    """

    def __init__(self, spec: MixtureSpec, encoder: DualEncoder, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        # a full stop stays a word of the text: only what is before it gives vectors
        first = [group[0].strip() for group in spec.parts]
        self.experts = nn.ModuleList(TextContext(encoder, start=template.removesuffix("."),
                                                 ending="." if template.endswith(".") else "") for template in first)
        self.gate = Router(encoder.dim, len(first), spec.top_k, seed).to(encoder.device) if spec.router else None
        self.correction = nn.Parameter(torch.zeros(encoder.dim, device=encoder.device)) if spec.correction else None
        self.norms = nn.ModuleList(copy.deepcopy(norm).float() for norm in layer_norms(encoder)) \
            if spec.layer_norm else nn.ModuleList()
        for parameter in self.norms.parameters():
            parameter.requires_grad_(True)
        self.usage: Tensor
        self.register_buffer("usage", torch.zeros(len(first), device=encoder.device), persistent=False)

    def images(self, model: DualEncoder, pixels: Tensor) -> Tensor:
        """(B, d) L2-normalised features of fractions (B, 3, H, W), with the learned LayerNorms where there are any."""
        with contextlib.ExitStack() as hooks:
            for theirs, ours in zip(layer_norms(model) if len(self.norms) else [], self.norms, strict=True):
                hooks.callback(theirs.register_forward_hook(
                    lambda _, arguments, output, ours=ours: ours(arguments[0].float()).to(output)).remove)
            return model.images(pixels)

    def route(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """The router's logits and the weights of the experts, both (B, experts), for features (B, d)."""
        if self.gate is None:
            return None, features.new_full((len(features), len(self.experts)), 1 / len(self.experts))
        logits = self.gate(features)
        return logits, self.gate.weights(logits)

    def texts(self, model: DualEncoder, names: Sequence[Any], only: Sequence[int] | None = None) -> Tensor:
        """(experts, C, d) L2-normalised class features; zeros for experts that are not in ``only``."""
        rows: list[Tensor | None] = []
        for number, expert in enumerate(self.experts):
            if only is not None and number not in only:
                rows.append(None)
            elif self.correction is None:
                rows.append(model.texts(expert(names)))
            else:
                rows.append(F.normalize(model.texts(expert(names), normalize=False) + self.correction, dim=-1))
        like = next(row for row in rows if row is not None)
        return torch.stack([torch.zeros_like(like) if row is None else row for row in rows])

    def logits(self, model: DualEncoder, features: Tensor, texts: Tensor, weights: Tensor) -> Tensor:
        """(B, C): those of the mixed class features, which are not normalised again.

        They are linear in the class features, so mixing each expert's own logits gives the same.
        """
        own = torch.stack([model.logits(features, row) for row in texts], dim=1)  # (B, experts, C)
        return (weights[..., None] * own).sum(1)

    def forward(self, model: DualEncoder, names: Sequence[Any], features: Tensor,
                texts: Tensor | None = None) -> Tensor:
        """Logits (B, C) for picture features (B, d).

        Args:
            model: the dual encoder, metered or not.
            names: of the classes.
            features: L2-normalised.
            texts: what :meth:`texts` gives, where it is known.
        """
        return self.logits(model, features, self.texts(model, names) if texts is None else texts,
                           self.route(features)[1])


def text_loss(texts: Tensor, hand: Tensor) -> Tensor:
    """Mean cross-entropy of the cosines of learned with hand-written class features; no temperature.

    Args:
        texts, hand: (experts, C, d) L2-normalised; class c should be nearest to the hand-written class c.
    """
    cosines = torch.einsum("gcd,ged->gce", texts, hand)
    target = torch.arange(texts.shape[1], device=texts.device).expand(texts.shape[:2])
    return F.cross_entropy(cosines.flatten(0, 1), target.flatten())


def gate_target(features: Tensor, hand: Tensor, targets: Tensor, margin: float = 10.0, top_k: int = 2) -> Tensor:
    """(B, experts) probabilities that the router should give: nearly equal ones for the groups nearest to the picture.

    Args:
        features: (B, d) of pictures, L2-normalised.
        hand: (experts, C, d) hand-written class features of each group.
        targets: (B,) numbers of the classes.
        margin: added to the largest cosines before the softmax.
        top_k: how many of them.
    """
    return _raised(torch.einsum("bd,gbd->bg", features, hand[:, targets]), margin, top_k).softmax(-1)


def gate_loss(logits: Tensor, cosines: Tensor, margin: float = 10.0, top_k: int = 2) -> Tensor:
    """Soft cross-entropy of the router's logits against the softmax of raised cosines, both (B, experts)."""
    return F.cross_entropy(logits, _raised(cosines, margin, top_k).softmax(-1))


def _raised(cosines: Tensor, margin: float, top_k: int) -> Tensor:
    order = cosines.argsort(dim=-1, descending=True, stable=True)
    return cosines + torch.zeros_like(cosines).scatter(-1, order[..., :top_k], margin)


def layer_norms(encoder: DualEncoder) -> list[nn.LayerNorm]:
    """The LayerNorms in the blocks of the image tower, in order.

    Raises:
        UnsupportedModelError: there are none.
    """
    tower: Any = getattr(unwrapped(encoder.model), "vision_model")  # noqa: B009  (any torch module)
    depth = encoder.depth[1]
    blocks = next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 0), None)
    found = [] if blocks is None else [m for m in blocks.modules() if isinstance(m, nn.LayerNorm)]
    if not found:
        raise UnsupportedModelError(f"tune_layer_norm: expected an image tower with LayerNorms in its blocks, got "
                                    f"{type(tower).__name__} without: leave tune_layer_norm=False")
    return found


__all__ = ["FEW", "MixedText", "MixtureSpec", "Router", "gate_loss", "gate_target", "layer_norms", "text_loss"]
