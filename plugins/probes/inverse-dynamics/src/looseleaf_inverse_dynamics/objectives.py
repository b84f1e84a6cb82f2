"""What an encoder can be pre-trained on: five objectives of the paper, each a small class; add your own beside them.

An objective makes its heads for an encoder of k features, and gives the loss of a batch of pairs n steps apart:

```python
@dataclasses.dataclass
class Reward(Objective):
    def heads(self, k, demonstrations):
        return nn.ModuleDict({"head": mlp(k, 1)})

    def loss(self, encode, heads, batch):
        return functional.mse_loss(heads["head"](encode(batch.first))[:, 0], reward(batch))
```
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf.modes import own_random_state
from looseleaf.plugin import In, check_fields
from looseleaf_inverse_dynamics.networks import PictureDecoder, mlp, random_crop

if TYPE_CHECKING:
    from looseleaf_inverse_dynamics.demonstrations import Demonstrations

Encode = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """Pairs of observations; pictures are in [0, 1] and cropped already.

    Attributes:
        first, later: o_t and o_{t+n}, (B, ...).
        target: o_{t+n} as it is, without the crop.
        actions: a_t to a_{t+n-1}, (B, n, A) or (B, n); of n = 0 the action at t.
    """

    first: Tensor
    later: Tensor
    target: Tensor
    actions: Tensor

    @property
    def action(self) -> Tensor:
        """a_t, (B, A) or (B,)."""
        return self.actions[:, 0]


@dataclasses.dataclass
class Objective:
    """What an encoder is pre-trained on.

    Args:
        n: steps between the observations of a pair; 0: two views of one observation.
        crop: pixels by which pictures are moved at random, 8 in the authors' code.
        same_crop: move both pictures of a pair alike; the authors' code draws the two separately.
        hidden: sizes of hidden layers of the heads; none: linear heads.
    """

    n: Annotated[int, In(">= 0")] = 1
    crop: Annotated[int, In(">= 0")] = 8
    same_crop: bool = False
    hidden: Annotated[tuple[int, ...], In(">= 1")] = (256, 256)

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def heads(self, k: int, demonstrations: Demonstrations) -> nn.ModuleDict:
        """The networks that are trained with the encoder and not kept."""

    @abstractmethod
    def loss(self, encode: Encode, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar; ``encode`` maps observations to features (B, k)."""

    def batch(self, demonstrations: Demonstrations, rows: Tensor, generator: torch.Generator,
              device: torch.device | str = "cpu") -> Batch:
        """The pairs that begin at these rows, see :meth:`Demonstrations.pairs`."""
        first = demonstrations.inputs(rows).to(device)
        target = demonstrations.inputs(rows + self.n).to(device)
        actions = demonstrations.actions_from(rows, max(1, self.n)).to(device)
        if first.dim() == 4 and self.crop:
            if self.same_crop:
                one, two = random_crop(torch.cat([first, target], 1), self.crop, generator).chunk(2, 1)
                return Batch(one, two, target, actions)
            return Batch(random_crop(first, self.crop, generator), random_crop(target, self.crop, generator), target,
                         actions)
        return Batch(first, target, target, actions)


@dataclasses.dataclass
class Inverse(Objective):
    """Inverse dynamics: the action between two observations, ``||h(phi(o_t), phi(o_{t+n})) - a_t||^2``.

    Args:
        n, crop, same_crop, hidden: see :class:`Objective`; n of at least 1.
        stop_gradient: no gradient through the later observation.
        all_actions: predict all n actions; the first alone by default, as the authors do.
    """

    n: Annotated[int, In(">= 1")] = 1
    stop_gradient: bool = False
    all_actions: bool = False

    def heads(self, k: int, demonstrations: Demonstrations) -> nn.ModuleDict:
        count = self.n if self.all_actions else 1
        return nn.ModuleDict({"action": mlp(2 * k, count * demonstrations.action_size, self.hidden)})

    def loss(self, encode: Encode, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        now, later = encode(torch.cat([batch.first, batch.later])).chunk(2)
        if self.stop_gradient:
            later = later.detach()
        predicted = heads["action"](torch.cat([now, later], -1))
        if not self.all_actions:
            return action_loss(predicted, batch.action)
        return action_loss(predicted.unflatten(-1, (self.n, -1)).flatten(0, 1), batch.actions.flatten(0, 1))


@dataclasses.dataclass
class Cloning(Objective):
    """Behaviour cloning of all contexts at once: ``||h(phi(o_t)) - a_t||^2``. ``n`` chooses the observations alone."""

    n: Annotated[int, In(">= 0")] = 0

    def heads(self, k: int, demonstrations: Demonstrations) -> nn.ModuleDict:
        return nn.ModuleDict({"action": mlp(k, demonstrations.action_size, self.hidden)})

    def loss(self, encode: Encode, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        return action_loss(heads["action"](encode(batch.first)), batch.action)


@dataclasses.dataclass
class ForwardExplicit(Objective):
    """Forward dynamics: ``||decode(phi(o_t), e(a_t)) - o_{t+n}||^2``; pictures without a crop, their pixels around 0.

    The decoder, and the embedding of the action into ``embedding`` numbers, are this project's.
    """

    n: Annotated[int, In(">= 1")] = 1
    crop: Annotated[int, In(">= 0")] = 0
    embedding: Annotated[int, In(">= 1")] = 64

    def heads(self, k: int, demonstrations: Demonstrations) -> nn.ModuleDict:
        shape = demonstrations.observation_shape
        decoder = PictureDecoder(k + self.embedding, shape) if len(shape) == 3 else mlp(k + self.embedding, shape[0],
                                                                                      self.hidden)
        return nn.ModuleDict({"embed": action_embedding(demonstrations, self.embedding), "decode": decoder})

    def loss(self, encode: Encode, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        predicted = heads["decode"](torch.cat([encode(batch.first), heads["embed"](batch.action)], -1))
        target = batch.target - 0.5 if batch.target.dim() == 4 else batch.target
        return (predicted - target).square().flatten(1).sum(-1).mean()


@dataclasses.dataclass
class ForwardImplicit(Objective):
    """Forward dynamics by contrast: InfoNCE of ``P1(phi(o_t), e(a_t))`` with ``P2(phi(o_{t+n}))``.

    Args:
        n, crop, same_crop, hidden: see :class:`Objective`.
        embedding: size of e(a_t).
        projection: size of what is compared.
        temperature: 1 in the authors' code.
    """

    n: Annotated[int, In(">= 1")] = 1
    embedding: Annotated[int, In(">= 1")] = 64
    projection: Annotated[int, In(">= 1")] = 64
    temperature: Annotated[float, In("> 0")] = 1.0

    def heads(self, k: int, demonstrations: Demonstrations) -> nn.ModuleDict:
        return nn.ModuleDict({"embed": action_embedding(demonstrations, self.embedding),
                              "now": mlp(k + self.embedding, self.projection, self.hidden),
                              "later": mlp(k, self.projection, self.hidden)})

    def loss(self, encode: Encode, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        now, later = encode(torch.cat([batch.first, batch.later])).chunk(2)
        return info_nce(heads["now"](torch.cat([now, heads["embed"](batch.action)], -1)), heads["later"](later),
                        self.temperature)


@dataclasses.dataclass
class Contrastive(Objective):
    """SimCLR: InfoNCE of two views of one observation, no action.

    Vectors have no crop: their second view has ``noise`` times each dimension's standard deviation added to it, which
    is this project's choice.

    Args:
        n, crop, same_crop, hidden: see :class:`Objective`; n is 0.
        projection, temperature: see :class:`ForwardImplicit`.
        noise: of vectors.
    """

    n: Annotated[int, In("[0, 0]")] = 0
    projection: Annotated[int, In(">= 1")] = 64
    temperature: Annotated[float, In("> 0")] = 1.0
    noise: Annotated[float, In(">= 0")] = 0.1

    def heads(self, k: int, demonstrations: Demonstrations) -> nn.ModuleDict:
        return nn.ModuleDict({name: mlp(k, self.projection, self.hidden) for name in ("now", "later")})

    def batch(self, demonstrations: Demonstrations, rows: Tensor, generator: torch.Generator,
              device: torch.device | str = "cpu") -> Batch:
        batch = super().batch(demonstrations, rows, generator, device)
        if batch.first.dim() == 4:
            return batch
        scale = self.noise * batch.first.std(0)
        one, two = (x + scale * torch.randn(x.shape, generator=generator).to(device) for x in batch[:2])
        return batch._replace(first=one, later=two)

    def loss(self, encode: Encode, heads: nn.ModuleDict, batch: Batch) -> Tensor:
        now, later = encode(torch.cat([batch.first, batch.later])).chunk(2)
        return info_nce(heads["now"](now), heads["later"](later), self.temperature)


OBJECTIVES: dict[str, type[Objective]] = {
    "ID": Inverse, "BC": Cloning, "FD-e": ForwardExplicit, "FD-i": ForwardImplicit, "Cont": Contrastive}
"""Those of the paper by the names it uses."""


def find_objective(objective: str | Objective) -> Objective:
    """An objective by its name in the paper, or the object itself.

    Raises:
        ValueError: no such name; TypeError: neither a name nor an objective.
    """
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective: expected a name or an Objective, got {type(objective).__name__}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, or an Objective, got {objective!r}")
    return OBJECTIVES[objective]()


def action_loss(predicted: Tensor, action: Tensor) -> Tensor:
    """Squared distance, or cross-entropy of choices, mean over the batch."""
    if not action.is_floating_point():
        return functional.cross_entropy(predicted, action)
    return (predicted - action).square().sum(-1).mean()


def info_nce(one: Tensor, two: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of unit vectors (B, D), in-batch negatives, in one direction: which of ``two`` belongs to each of
    ``one``?"""
    similarity = functional.normalize(one, dim=-1) @ functional.normalize(two, dim=-1).T / temperature
    return functional.cross_entropy(similarity, torch.arange(len(one), device=one.device))


def action_embedding(demonstrations: Demonstrations, size: int) -> nn.Module:
    """e(a): a table for choices, a linear map for amounts. This project's."""
    return nn.Embedding(demonstrations.choices, size) if demonstrations.discrete else nn.Linear(
        demonstrations.action_size, size)


def check_objective(objective: Objective, demonstrations: Demonstrations, encoder: nn.Module, k: int) -> None:
    """AssertionError where an objective of your own is not one: a finite scalar whose gradient reaches the encoder, the
    same for the same seed, another for other observations.

    Args:
        demonstrations: some, of 16 pairs or more.
        encoder: gives (B, k).
    """
    rows = demonstrations.pairs(objective.n)[:16]
    values = []
    for chosen in (rows, rows, rows.flip(0).roll(3)[:8]):
        with own_random_state(0):
            heads = objective.heads(k, demonstrations)
            batch = objective.batch(demonstrations, chosen, torch.Generator().manual_seed(0))
            loss = objective.loss(encoder, heads, batch)
        values.append(loss)
    assert values[0].dim() == 0 and bool(values[0].isfinite()), f"expected a finite scalar, got {values[0]}"
    assert values[0].item() == values[1].item(), "expected the same loss for the same seed"
    assert values[0].item() != values[2].item(), "expected a loss that depends on the observations"
    gradients = torch.autograd.grad(values[0], list(encoder.parameters()), allow_unused=True)
    assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients), "expected a gradient of the encoder"


__all__ = ["OBJECTIVES", "Batch", "Cloning", "Contrastive", "Encode", "ForwardExplicit", "ForwardImplicit", "Inverse",
           "Objective", "action_embedding", "action_loss", "check_objective", "find_objective", "info_nce"]
