"""Stage 1: an encoder learned by contrast, of whole images and of their places."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.modes import own_random_state, training, with_gradients
from looseleaf.progress import bar
from looseleaf_mask_and_match.masking import ink_in_cells, ink_of, paper_of

PREFIXES = (0, 1, 2, 5)
"""Tokens that encoders put before the patches: none, a class token, two, or one with four registers."""


# ----------------------------------------------------------------------------------------------------------- features
def feature_map(encoder: Any, images: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, int]:
    """The features of each place of images, (B, C, rows, columns), and how many tokens come before them.

    Args:
        encoder: gives (B, C, rows, columns), or (B, L, C); in ``last_hidden_state``, first in a tuple, or alone; or
            (B, L, C) in ``pooler_output``. One with a method ``feature_map`` is asked that instead.
        images: (B, C, H, W).
        grid: rows and columns of (B, L, C); None: those of square patches that fill the image.

    Raises:
        ValueError: other features, no grid that fits, or an image smaller than a patch.
    """
    out = getattr(encoder, "feature_map", encoder)(images)
    pooled = getattr(out, "pooler_output", None)  # PP-FormulaNet's: one vector for each place, for the decoder
    places = isinstance(pooled, Tensor) and pooled.dim() == 3
    out = pooled if places else getattr(out, "last_hidden_state", out)
    out = out[0] if isinstance(out, (tuple, list)) else out
    if not isinstance(out, Tensor) or out.dim() not in (3, 4):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"encoder: expected features (B, C, rows, columns) or (B, L, C), got {got}")
    if out.dim() == 4:
        if not out.numel():
            raise ValueError(f"images: expected at least one cell of the encoder's stride, got {tuple(images.shape)}")
        return out, 0
    length = out.shape[1]
    rows, columns = grid or square_grid(images.shape[-2], images.shape[-1], length)
    if rows * columns > length:
        raise ValueError(f"grid: expected at most {length} places, got {rows} x {columns}")
    prefix = length - rows * columns
    return out[:, prefix:].mT.unflatten(2, (rows, columns)), prefix


def square_grid(height: int, width: int, length: int) -> tuple[int, int]:
    """Rows and columns of square patches that fill an image, where ``length`` tokens are patches and at most 5 others.

    Raises:
        ValueError: there are none.
    """
    for prefix in PREFIXES:
        for side in range(1, min(height, width) + 1):
            rows, columns = height // side, width // side
            if rows * columns == length - prefix and not height % side and not width % side:
                return rows, columns
    raise ValueError(f"grid: expected {length} tokens that square patches of {height} x {width} pixels give: name the "
                     "grid, such as grid=(12, 12)")


# ----------------------------------------------------------------------------------------------------------------- loss
def nt_xent(one: Tensor, two: Tensor, temperature: float = 0.1, same: Tensor | None = None) -> Tensor:
    """NT-Xent over the 2B views of B items, the mean of -log exp(z_i.z_p / T) / sum over j != i of exp(z_i.z_j / T).

    Args:
        one, two: views of the same items, (B, D); they are normalised here.
        temperature: T.
        same: (B, B) bool, items that are no negatives of each other, such as duplicates.

    Raises:
        ValueError: fewer than two items.
    """
    count = len(one)
    if count < 2:
        raise ValueError(f"batch: expected two items or more for a contrastive loss, got {count}: make batches larger, "
                         "drop a last batch of one")
    views = torch.cat([one, two])
    views = F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=1)
    skipped = torch.eye(2 * count, dtype=torch.bool, device=views.device)
    target = torch.arange(2 * count, device=views.device).roll(count)
    if same is not None:
        skipped |= same.to(views.device).repeat(2, 2)
        skipped[torch.arange(2 * count), target] = False
    return F.cross_entropy((views @ views.T / temperature).masked_fill(skipped, -torch.inf), target)


def local_contrast(anchors: Tensor, positives: Tensor, candidates: Tensor, skipped: Tensor,
                   temperature: float = 0.1) -> Tensor:
    """The same loss for places: each anchor against its positive and the candidates that are not skipped.

    Args:
        anchors, positives: (M, D).
        candidates: (K, D).
        skipped: (M, K) bool: no negative of this anchor.
        temperature: T.
    """
    a, p, c = (F.normalize(x.float(), dim=1) for x in (anchors, positives, candidates))
    positive = (a * p).sum(1, keepdim=True) / temperature
    others = (a @ c.T / temperature).masked_fill(skipped, -torch.inf)
    return (torch.cat([positive, others], 1).logsumexp(1) - positive[:, 0]).mean()


def duplicates(images: Tensor) -> Tensor:
    """Which images of a batch are equal, (B, B) bool: the same expression twice is no negative of itself."""
    flat = images.flatten(1)
    return (flat[:, None, ::7] == flat[None, :, ::7]).all(-1) & (torch.cdist(flat.float(), flat.float()) < 1e-3)


# ---------------------------------------------------------------------------------------------------------------- views
@dataclasses.dataclass
class Warp:
    """Where each place of a view comes from: source = A place + shift + bend(place), in pixels from the middle.

    Attributes:
        matrix: A, (B, 2, 2), for (x, y).
        shift: (B, 2).
        bend: displacements on a coarse grid, (B, 2, rows, columns), bilinear between; smooth.
        size: height and width of the images.
    """

    matrix: Tensor
    shift: Tensor
    bend: Tensor
    size: tuple[int, int]

    def scale(self, points: Tensor) -> Tensor:
        """Pixels from the middle as ``grid_sample`` counts."""
        height, width = self.size
        return points * points.new_tensor([2 / width, 2 / height])

    def _bent(self, points: Tensor) -> Tensor:
        at = self.scale(points)[:, None]
        return F.grid_sample(self.bend, at, padding_mode="border", align_corners=False)[:, :, 0].mT

    def to_source(self, points: Tensor) -> Tensor:
        """The source of places (B, n, 2) of the view."""
        return points @ self.matrix.mT + self.shift[:, None] + self._bent(points)

    def from_source(self, points: Tensor, rounds: int = 12) -> Tensor:
        """The place in the view of points (B, n, 2) of the source, by fixed-point iteration."""
        back = torch.linalg.inv(self.matrix).mT
        straight = (points - self.shift[:, None]) @ back
        places = straight
        for _ in range(rounds if bool(self.bend.any()) else 0):
            places = straight - self._bent(places) @ back
        return places

    def apply(self, images: Tensor, outside: Tensor) -> Tensor:
        """The view of images (B, C, H, W); ``outside`` (B, C, 1, 1) is the paper around them."""
        places = self.to_source(centers(self.size, images.device).expand(len(images), -1, -1))
        at = self.scale(places).view(len(images), *self.size, 2)
        return F.grid_sample(images - outside, at, align_corners=False) + outside


def centers(size: tuple[int, int], device: Any = None, spread: tuple[int, int] | None = None) -> Tensor:
    """Middles of the cells of a grid that fills an image of ``spread`` pixels, (cells, 2): x, y from its middle."""
    (rows, columns), (height, width) = size, spread or size
    y = (torch.arange(rows, device=device) + 0.5) * height / rows - height / 2
    x = (torch.arange(columns, device=device) + 0.5) * width / columns - width / 2
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1).float()


class ContrastivePretraining(nn.Module):
    """Stage 1 for any encoder of images: whole images and their places are told apart (arXiv 2508.06107, abstract).

    The paper names a global and a local contrastive loss; equations and constants are ours [choice]. The encoder is
    trained in place; the two heads are of no use afterwards.

    Args:
        encoder: see :func:`feature_map`.
        temperature: T of both losses.
        local_weight: factor of the local loss; 0: none.
        global_weight: factor of the global loss; 0: none.
        distance: cells around a place that are no negatives of it.
        negatives: places of each image that take part.
        size: width of the heads' outputs.
        rotation: degrees; ``zoom``: fraction; ``shift``: fraction of the height; ``elastic``: pixels; ``noise``:
            standard deviation as a fraction of the range of values; of the views, each the largest.
        grid: see :func:`feature_map`.
    """

    def __init__(self, encoder: nn.Module, *, temperature: float = 0.1, local_weight: float = 1.0,
                 global_weight: float = 1.0, distance: float = 2.0, negatives: int = 64, size: int = 128,
                 rotation: float = 5.0, zoom: float = 0.15, shift: float = 0.1, elastic: float = 2.0,
                 noise: float = 0.05, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        for name, value, low in (("temperature", temperature, 1e-6), ("local_weight", local_weight, 0),
                                 ("global_weight", global_weight, 0), ("distance", distance, 0),
                                 ("negatives", negatives, 1), ("size", size, 1)):
            if not value >= low:
                raise ValueError(f"{name}: expected a number >= {low}, got {value}")
        if not local_weight + global_weight:
            raise ValueError("expected local_weight or global_weight above 0, got 0 for both")
        self.encoder, self.grid = encoder, grid
        self.temperature, self.local_weight, self.global_weight = temperature, local_weight, global_weight
        self.distance, self.negatives = distance, negatives
        self.rotation, self.zoom, self.shift, self.elastic, self.noise = rotation, zoom, shift, elastic, noise
        self.global_head = nn.Sequential(nn.LazyLinear(size), nn.ReLU(), nn.Linear(size, size))
        self.local_head = nn.LazyConv2d(size, 1)

    def warp(self, batch: int, size: tuple[int, int], draw: torch.Generator) -> Warp:
        """A random warp of each image; no flips."""
        def spread(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=draw) - 1

        angle = torch.deg2rad(self.rotation * spread(batch))
        zoom, shear = 1 + self.zoom * spread(batch, 2), torch.sin(angle) * spread(batch)
        turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(-1, 2, 2)
        skew = torch.eye(2).repeat(batch, 1, 1)
        skew[:, 0, 1] = shear
        coarse = (3, max(3, round(3 * size[1] / size[0])))
        return Warp(turn @ skew * zoom[:, None], self.shift * size[0] * spread(batch, 2),
                    self.elastic * spread(batch, 2, *coarse), size)

    def view(self, images: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Warp]:
        """A view of images (B, C, H, W): pixels, ink (B, H, W), and where they come from."""
        warp = self.warp(len(images), (images.shape[-2], images.shape[-1]), draw)
        warp = dataclasses.replace(warp, **{name: getattr(warp, name).to(images) for name in (
            "matrix", "shift", "bend")})
        paper = paper_of(images)
        clean = warp.apply(images, paper)
        thicker = (torch.rand(len(images), 1, 1, 1, generator=draw) * 1.5 - 0.75).to(images)
        change = clean - paper
        sign = change.sum((1, 2, 3), keepdim=True).sign()
        wide, thin = (s * F.max_pool2d(s * sign * change, 3, 1, 1) * sign for s in (1, -1))
        drawn = paper + change + thicker.clamp(min=0) * (wide - change) + (-thicker).clamp(min=0) * (thin - change)
        extent = change.abs().amax((1, 2, 3), keepdim=True)
        grain = torch.randn(drawn.shape, generator=draw).to(images)
        return drawn + self.noise * extent * grain, ink_of(clean), warp

    def forward(self, images: Tensor, draw: torch.Generator, groups: Sequence[Any] | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            images: (B, C, H, W).
            draw: draws the views, on the CPU.
            groups: what is known to be the same (one label each); None: images that are equal.
        """
        same = duplicates(images) if groups is None else torch.tensor([[a == b for a in groups] for b in groups])
        (one, ink, first), (two, other_ink, second) = (self.view(images, draw) for _ in range(2))
        features, _ = feature_map(self.encoder, torch.cat([one, two]), self.grid)
        f1, f2 = features.chunk(2)
        loss = images.new_zeros(())
        if self.global_weight:
            grid = (features.shape[2], features.shape[3])
            weights = (ink_in_cells(torch.cat([ink, other_ink]), grid) > 0).to(features)
            mean = (features * weights[:, None]).sum((2, 3)) / weights.sum((1, 2)).clamp(min=1)[:, None]
            z1, z2 = self.global_head(mean).chunk(2)
            loss = loss + self.global_weight * nt_xent(z1, z2, self.temperature, same)
        if self.local_weight:
            loss = loss + self.local_weight * self.local(f1, f2, ink, other_ink, first, second, same, draw)
        return loss

    def local(self, one: Tensor, two: Tensor, ink: Tensor, other_ink: Tensor, first: Warp, second: Warp, same: Tensor,
              draw: torch.Generator) -> Tensor:
        """The local loss of features (B, C, rows, columns) of two views; 0 where no place is in both."""
        size = (one.shape[2], one.shape[3])
        places = centers(size, one.device, first.size)
        there = second.from_source(first.to_source(places.expand(len(one), -1, -1)))
        inside = (second.scale(there).abs() < 1).all(-1)
        anchors = self._some(inside & (ink_in_cells(ink, size) > 0).flatten(1), draw)
        others = self._some((ink_in_cells(other_ink, size) > 0).flatten(1), draw)
        item, cell = anchors.nonzero(as_tuple=True)
        their_item, their_cell = others.nonzero(as_tuple=True)
        if not len(item):
            return one.sum() * 0
        head = self.local_head(torch.cat([one, two]))
        h1, h2 = head.chunk(2)
        moved = F.grid_sample(h2, second.scale(there)[:, None], padding_mode="border", align_corners=False)[:, :, 0]
        cells = there.new_tensor([size[1] / first.size[1], size[0] / first.size[0]])
        apart = torch.cdist(there[item, cell] * cells, places[their_cell] * cells)
        own = item[:, None] == their_item
        skipped = (own & (apart <= self.distance)) | (~own & same.to(item.device)[item][:, their_item])
        return local_contrast(h1.flatten(2).mT[item, cell], moved.mT[item, cell],
                              h2.flatten(2).mT[their_item, their_cell], skipped, self.temperature)

    def _some(self, wanted: Tensor, draw: torch.Generator) -> Tensor:
        """At most ``negatives`` of the wanted places (B, n) of each image."""
        if wanted.shape[1] <= self.negatives:
            return wanted
        order = torch.rand(wanted.shape, generator=draw).to(wanted.device).masked_fill(~wanted, -1)
        return wanted & (order >= order.topk(self.negatives, 1).values[:, -1:])

    def fit(self, images: Tensor, *, steps: int = 500, batch: int = 64, lr: float = 1e-3, seed: int = 0,
            progress: bool | None = None) -> list[float]:
        """Train the encoder in place on images without labels; the loss of each step.

        Args:
            images: (n, C, H, W), all on one device, the encoder's.
            steps, batch, lr: of AdamW [choice].
            seed: of heads, batches and views.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: fewer than two images, or one without ink.
        """
        if images.dim() != 4 or len(images) < 2 or batch < 2:
            raise ValueError(f"expected two images (n, C, H, W) or more, and batches of two or more, got "
                             f"{tuple(images.shape)} and {batch}")
        ink_of(images)
        draw = torch.Generator().manual_seed(seed)
        losses: list[float] = []
        with with_gradients(), training(self), own_random_state(seed), bar("stage 1", steps, progress) as shown:
            self.to(images.device)
            if any(isinstance(p, nn.UninitializedParameter) for p in self.parameters()):
                features, _ = feature_map(self.encoder, images[:2], self.grid)
                self.global_head(features.mean((2, 3)))
                self.local_head(features)
                for layer in (self.global_head[0], self.global_head[2], self.local_head):
                    layer.reset_parameters()  # type: ignore[operator]  # from the seed, not from when they were made
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr)
            for _ in range(steps):
                rows = torch.randperm(len(images), generator=draw)[:batch].to(images.device)
                loss = self(images[rows], draw)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
                shown.update()
        return losses


__all__ = ["ContrastivePretraining", "Warp", "centers", "duplicates", "feature_map", "local_contrast", "nt_xent",
           "square_grid"]
