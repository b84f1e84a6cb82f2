"""ColorMAE: the patches that a masked autoencoder sees, chosen by a threshold on filtered noise."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from looseleaf import Paper, TokenPruner
from looseleaf.errors import UnsupportedModelError, did_you_mean
from looseleaf.plugin import In
from looseleaf.unwrap import unwrapped

COLORS = ("red", "blue", "green", "purple", "white")
"""What a filter lets through: low frequencies, high ones, a band, all but a band, all."""

Grid = Sequence[int]
"""Patches of a picture (rows, columns), or of a video (frames, rows, columns)."""

CHUNK = 256
"""Patterns filtered at the same time: bounds the memory while a bank is made."""


class MaskIds(NamedTuple):
    """A masking in the form that MAE uses.

    Attributes:
        ids_keep: (B, kept) int64, patches that the encoder sees, in the order in which it sees them.
        ids_restore: (B, N) int64, the place of each patch in the order kept-then-masked.
        mask: (B, N) float32, 1 = masked.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


@dataclasses.dataclass
class ColorMAE(TokenPruner):
    """Keep the patches where filtered white noise is largest; no model and no picture is read.

    A bank of periodic noise patterns is made once. Each image takes a pattern, a random crop of the size of its patch
    grid and random flips; the ``int(N * (1 - ratio))`` patches with the largest values are kept. [section 3; the count,
    and that the largest are kept, as in the official code; sigmas, sizes and periodic filtering are our choice: the
    script that made the authors' noise is not published]

    Every call of :meth:`noise` and of the methods built on it takes the next masks of a sequence that depends on
    ``seed``, on the rank within torch.distributed and on the DataLoader worker; ``step`` is the place in it, so that a
    run goes on by setting it. ``epoch`` is read where there is a ``schedule``.

    Args:
        color: "green" (band-pass, the paper's best), "red" (low-pass), "blue" (high-pass), "purple" (band-stop) or
            "white" (MAE's own random masks).
        ratio: fraction of the patches that is masked, in (0, 1) [paper, as MAE].
        sigma: standard deviation in patches of the Gaussian of "red" and "blue" [ours].
        sigma_low: the narrower Gaussian of "green" and "purple", in patches [ours].
        sigma_high: the wider one, > sigma_low [ours].
        bank: patterns of the bank [ours; the authors' files are named 3072].
        size: side of a pattern in patches; no grid may be larger [ours].
        side: keep the "high" values [official code] or the "low" ones; noise is symmetric, so both have one law.
        schedule: color by epoch, such as ``{0: "green", 200: "blue"}``: the entry of the last epoch reached counts,
            ``color`` before the first; None: ``color`` throughout.
        official_batching: one crop and one flip for the whole batch and patterns in order, as in the official code;
            by default each image has its own.
        video: "tube" masks the same patches in all frames; "volume" filters noise in three dimensions, in a bank of
            ``bank / size`` cubes [ours].
        seed: random seed of patterns and crops.

    Attributes:
        step: number of the next masks, from 0.
        epoch: of the training, for ``schedule``.
    """

    color: str = "green"
    ratio: Annotated[float, In("(0, 1)")] = 0.75
    sigma: Annotated[float, In("> 0")] = 1.0
    sigma_low: Annotated[float, In("> 0")] = 1.0
    sigma_high: Annotated[float, In("> 0")] = 2.0
    bank: Annotated[int, In(">= 1")] = 3072
    size: Annotated[int, In(">= 2")] = 64
    side: Literal["high", "low"] = "high"
    schedule: Mapping[int, str] | None = None
    official_batching: bool = False
    video: Literal["tube", "volume"] = "tube"
    seed: Annotated[int, In(">= 0")] = 0
    step: int = dataclasses.field(default=0, init=False, repr=False, compare=False)
    epoch: int = dataclasses.field(default=0, init=False, repr=False, compare=False)

    paper: ClassVar[Paper] = Paper(
        title="ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders",
        authors=("Carlos Hinojosa", "Shuming Liu", "Bernard Ghanem"), year=2024, arxiv="2407.13036", venue="ECCV 2024",
        code="https://github.com/carlosh93/ColorMAE",
        summary="Mask patches by filtered noise: another pre-training task for masked autoencoders at no cost.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`: a small bank, and batches of pictures and of videos."""
        return {"make": lambda: cls(bank=16, size=16),
                "batches": lambda model: [{"patches": torch.zeros(size)} for size in ((3, 8, 6, 2), (2, 3, 8, 6, 2))]}

    def validate(self) -> None:
        """See :class:`looseleaf.Plugin`."""
        for field, color in (("color", self.color), *(("schedule", c) for c in (self.schedule or {}).values())):
            if color not in COLORS:
                raise ValueError(f"ColorMAE.{field}: expected one of {', '.join(COLORS)}, got {color!r}."
                                 f"{did_you_mean(str(color), COLORS)}")
        self.check("sigma_high", self.sigma_low < self.sigma_high,
                   f"a number > sigma_low, which is {self.sigma_low}: the band lies between the two Gaussians")
        epochs = list(self.schedule or ())
        self.check("schedule", all(isinstance(e, int) and not isinstance(e, bool) and e >= 0 for e in epochs),
                   "None or colors by epoch, integers >= 0")

    # ------------------------------------------------------------------ masks
    def noise(self, batch: int, grid: Grid, device: torch.device | str | None = None) -> Tensor:
        """Filtered noise of ``batch`` images: (batch, patches of the grid) float32; the largest values are kept, or
        the smallest where ``side`` is "low".

        ``ViTMAEForPreTraining`` keeps the *smallest*: give it :meth:`mae_noise`.

        Args:
            batch: how many images.
            grid: (rows, columns), or (frames, rows, columns) of a video, in patches.
            device: of the result; None: the CPU.

        Raises:
            ValueError: a grid that is none or is larger than the patterns; a ratio that keeps no patch of it.
        """
        shape, frames = self._grid(grid)
        values = self._crops(batch, shape, torch.device(device or "cpu"))
        return values.repeat(1, frames) if frames > 1 else values

    def ids(self, batch: int, grid: Grid, device: torch.device | str | None = None) -> MaskIds:
        """Masks as MAE uses them: ``ids_keep``, ``ids_restore`` and ``mask``; arguments and errors as :meth:`noise`."""
        shape, frames = self._grid(grid)
        values = self._crops(batch, shape, torch.device(device or "cpu"))
        order = values.argsort(dim=1, descending=self.side == "high", stable=True)  # ties: the lower index first
        if frames > 1:
            order = (order[:, :, None] + torch.arange(frames, device=order.device) * values.shape[1]).flatten(1)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        restore = torch.empty_like(order).scatter_(1, order, places)
        count = self.kept(grid)
        return MaskIds(order[:, :count], restore, (restore >= count).float())

    def keep_mask(self, batch: int, grid: Grid, device: torch.device | str | None = None) -> Tensor:
        """(batch, patches) bool, True = the encoder sees it; arguments and errors as :meth:`noise`."""
        return self.ids(batch, grid, device).mask == 0

    def mae_noise(self, batch: int, grid: Grid, device: torch.device | str | None = None) -> Tensor:
        """The ``noise`` argument of transformers' ViTMAE models: (batch, patches) float32.

        The place of each patch in the order of :meth:`ids` stands for minus its noise: the models keep the smallest
        values, and whole numbers have no ties in any precision that holds them. Arguments and errors as :meth:`noise`.
        """
        return self.ids(batch, grid, device).ids_restore.float()

    def bool_masked_pos(self, batch: int, grid: Grid, device: torch.device | str | None = None, *,
                        block: int = 1) -> Tensor:
        """The argument of that name of ViT, BEiT, DINOv2, Swin and VideoMAE: (batch, patches) bool, True = masked.

        Args:
            batch, grid, device: as of :meth:`noise`.
            block: mask squares of so many patches a side, for models with small patches such as Swin (SimMIM: 8).

        Raises:
            ValueError: as :meth:`noise`; a grid that squares of that side do not fill.
        """
        if block < 1 or any(n % block for n in tuple(grid)[-2:]):
            raise ValueError(f"block: expected a divisor of the rows and columns of {tuple(grid)}, got {block}")
        *frames, rows, columns = grid
        mask = self.ids(batch, (*frames, rows // block, columns // block), device).mask.bool()
        mask = mask.view(batch, -1, rows // block, columns // block)
        return mask.repeat_interleave(block, 2).repeat_interleave(block, 3).flatten(1)

    def index_lists(self, batch: int, grid: Grid, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Patches of context (batch, kept) and of target (batch, masked), int64 and ascending, as I-JEPA's collators
        give them; arguments and errors as :meth:`noise`."""
        masking, count = self.ids(batch, grid, device), self.kept(grid)
        order = masking.ids_restore.argsort(1)
        return order[:, :count].sort(1).values, order[:, count:].sort(1).values

    def keep(self, model: torch.nn.Module | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``{"patches": (B, N) bool}`` or ``{"pixel_values": (B, N) bool}``, True = keep.

        Args:
            model: asked for the size of its patches where the batch has pixels; else it may be None.
            batch: ``patches`` (B, rows, columns, ...) or, with five dimensions, (B, frames, rows, columns, ...); or
                ``pixel_values`` (B, C, H, W) or (B, T, C, H, W).

        Raises:
            ValueError: as :meth:`noise`, or neither of the two is in the batch.
            UnsupportedModelError: the size of the model's patches is not known.
        """
        if "patches" in batch:
            patches = batch["patches"]
            if not isinstance(patches, Tensor) or patches.ndim not in (4, 5):
                raise ValueError("patches: expected (B, rows, columns, d) or (B, frames, rows, columns, d), got "
                                 f"{tuple(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__}")
            return {"patches": self.keep_mask(len(patches), patches.shape[1:-1], patches.device)}
        if "pixel_values" not in batch:
            raise ValueError(f"the batch: expected 'patches' or 'pixel_values', got {', '.join(map(repr, batch))}")
        pixels = batch["pixel_values"]
        return {"pixel_values": self.keep_mask(len(pixels), patch_grid(model, pixels), pixels.device)}

    def kept(self, grid: Grid) -> int:
        """How many patches of a grid are kept: ``int(N * (1 - ratio))``, truncated as in MAE, where the masks of the
        core round; of a tube that of one frame, times frames."""
        shape, frames = self._grid(grid)
        return int(math.prod(shape) * (1 - self.ratio)) * frames

    # ------------------------------------------------------------------ noise
    @property
    def current_color(self) -> str:
        """The color of ``epoch``."""
        reached = [e for e in self.schedule or () if e <= self.epoch]
        return (self.schedule or {})[max(reached)] if reached else self.color

    def patterns(self, color: str | None = None, dims: int = 2, device: torch.device | str = "cpu") -> Tensor:
        """The bank: (patterns, size, size) float32, or (patterns, size, size, size) for ``dims`` 3; not to be changed.

        Banks of one seed filter the same white noise, so that red + blue = green + purple = white. The two used last
        are kept in memory: 8 bytes a value, since mirror images are kept as well, 96 MiB with the defaults.
        """
        return self._lines(dims, device, color).view(-1, *[self.size] * (dims - 1), 2, self.size)[..., 0, :]

    def _lines(self, dims: int, device: torch.device | str, color: str | None = None) -> Tensor:
        """Lines of all patterns and their mirror images."""
        count = self.bank if dims == 2 else max(1, self.bank // self.size)
        return _bank(color or self.current_color, self.sigma, self.sigma_low, self.sigma_high, count, self.size, dims,
                     self.seed, str(device))

    def _grid(self, grid: Grid) -> tuple[tuple[int, ...], int]:
        """Shape of the noise, and how many frames share it."""
        sides = tuple(grid) if isinstance(grid, Sequence) else ()
        if len(sides) not in (2, 3) or any(not isinstance(n, int) or n < 1 for n in sides):
            raise ValueError(f"grid: expected (rows, columns) or (frames, rows, columns) in patches, got {grid!r}")
        shape, frames = (sides[1:], sides[0]) if len(sides) == 3 and self.video == "tube" else (sides, 1)
        if max(shape) > self.size:
            raise ValueError(f"grid: expected at most {self.size} patches a side, got {sides}: raise ColorMAE.size")
        if int(math.prod(shape) * (1 - self.ratio)) < 1:
            raise ValueError(f"ColorMAE.ratio: expected one that keeps a patch of the grid {sides}, got {self.ratio}")
        return shape, frames

    def _crops(self, batch: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The next windows of the bank, (batch, values)."""
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch: expected an integer >= 1, got {batch!r}")
        lines = self._lines(len(shape), device)
        count = len(lines) // (2 * self.size ** (len(shape) - 1))
        sides, first, ways = _addresses(count, self.size, shape)
        draws = torch.rand(1 if self.official_batching else batch, len(sides), dtype=torch.float64,
                           device="cpu", generator=self._generator()).mul_(sides).floor_()
        self.step += 1
        if self.official_batching:
            draws = draws.repeat(batch, 1)
            draws[:, 0] = torch.arange(batch, device="cpu") % count
        # whole lines of a window are copied, each from where it starts: a few numbers are drawn and not one a patch
        starts = torch.addmm(first, draws, ways).long().flatten().to(device)
        return lines.flatten().unfold(0, shape[-1], 1).index_select(0, starts).view(batch, -1)

    def _generator(self) -> torch.Generator:
        """Random numbers of this step, of this process among those that train or load data."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # workers that load data know their rank from the environment alone
        rank = torch.distributed.get_rank() if distributed else int(os.environ.get("RANK", "0"))
        worker = torch.utils.data.get_worker_info()  # its seed is another one for each worker and in each epoch
        parts = [self.seed, self.step, rank, *([] if worker is None else [worker.seed])]
        return torch.Generator("cpu").manual_seed(_mixed(parts))


@functools.lru_cache(maxsize=32)
def _addresses(count: int, size: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the lines of windows start, as a linear map of what is drawn for an image, float64 (exact to 2**53).

    Drawn are pattern, first place along each axis, and flip along each axis, uniform integers below ``sides``; the
    lines start at ``first + draws @ ways``. A window that is flipped is read from its end, but along the last axis,
    where each line of a pattern is followed by its mirror image.
    """
    with torch.device("cpu"):  # whatever the default is
        axes = len(shape)
        strides = [2 * size ** (axes - 1 - axis) for axis in range(axes - 1)]
        walks = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) * stride
                                 for side, stride in zip(shape, strides, strict=False)), indexing="ij")
        places = [walk.flatten() for walk in walks]
        first = torch.stack(places).sum(0)
        lines = torch.ones_like(first)
        flips = [stride * (side - 1) - 2 * place for side, stride, place in zip(shape, strides, places, strict=False)]
        ways = [2 * size ** axes, *strides, 1]
        sides = torch.tensor([count, *(size - side + 1 for side in shape), *[2] * axes], dtype=torch.float64)
        return sides, first, torch.stack([*(way * lines for way in ways), *flips, size * lines])


def _mixed(parts: Sequence[int]) -> int:
    """One seed of several numbers, by the steps of SplitMix64 (numpy's SeedSequence takes as long as the masks)."""
    state, full = 0, 2 ** 64 - 1
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & full
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & full
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & full
        state ^= state >> 31
    return state >> 1


def gaussian_gain(sigma: float, size: int, dims: int = 2) -> Tensor:
    """What a periodic Gaussian lets through of each frequency: the transform of the kernel, in the layout of
    ``torch.fft.rfftn``, float64 in [0, 1]; 1 at frequency zero.

    Args:
        sigma: standard deviation in patches; near 0 everything passes.
        size: period in patches.
        dims: dimensions of the noise.
    """
    around = math.ceil(8 * sigma / size) + 1  # the kernel of one period is the sum of all that reach into it
    places = torch.arange(size, dtype=torch.float64) + size * torch.arange(-around, around + 1)[:, None]
    kernel = torch.exp(-0.5 * (places / sigma) ** 2).sum(0)
    line = torch.fft.fft(kernel / kernel.sum()).real
    line[0] = 1.0
    gain = line[:size // 2 + 1]
    for axis in range(1, dims):
        gain = line.view(-1, *[1] * axis) * gain
    return gain


def color_gain(color: str, size: int, dims: int = 2, *, sigma: float = 1.0, sigma_low: float = 1.0,
               sigma_high: float = 2.0) -> Tensor:
    """What the filter of a color lets through of each frequency, as :func:`gaussian_gain`. [table of filters]"""
    if color == "white":
        return torch.ones_like(gaussian_gain(sigma, size, dims))
    if color in ("red", "blue"):
        low = gaussian_gain(sigma, size, dims)
        return low if color == "red" else 1 - low
    band = gaussian_gain(sigma_low, size, dims) - gaussian_gain(sigma_high, size, dims)
    return band if color == "green" else 1 - band


def filtered(white: Tensor, color: str, **sigmas: float) -> Tensor:
    """Periodic noise of one color from white noise (n, size, size) or (n, size, size, size), in its dtype.

    Computed in float64; ``sigmas`` are those of :func:`color_gain`.
    """
    axes = tuple(range(1, white.ndim))
    gain = color_gain(color, white.shape[-1], len(axes), **sigmas).to(white.device)
    parts = [torch.fft.irfftn(torch.fft.rfftn(part.double(), dim=axes) * gain, s=part.shape[1:], dim=axes)
             for part in white.split(CHUNK)]
    return torch.cat(parts).to(white.dtype)


@functools.lru_cache(maxsize=2)
def _bank(color: str, sigma: float, sigma_low: float, sigma_high: float, count: int, size: int, dims: int, seed: int,
          device: str) -> Tensor:
    with torch.device("cpu"):  # whatever the default is
        white = torch.randn(count, *[size] * dims, generator=torch.Generator("cpu").manual_seed(seed))
        if color != "white":
            white = filtered(white, color, sigma=sigma, sigma_low=sigma_low, sigma_high=sigma_high)
        # numpy asks for memory in huge pages, where torch does not: windows lie all over it, and are read faster so
        lines = torch.from_numpy(np.empty((*white.shape[:-1], 2, size), dtype=np.float32))
        lines[..., 0, :], lines[..., 1, :] = white, white.flip(-1)
        return lines.view(-1, size).to(device)


def patch_grid(model: Any, pixels: Tensor) -> tuple[int, ...]:
    """The patch grid of pictures (B, C, H, W) or videos (B, T, C, H, W) for a model of transformers or timm, which may
    be wrapped: (rows, columns) or (frames, rows, columns).

    Raises:
        ValueError: another shape of ``pixels``, or no whole patch fits.
        UnsupportedModelError: the model does not say how large its patches are.
    """
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    owner = getattr(inner, "patch_embed", None) if getattr(config, "patch_size", None) is None else config
    patch = getattr(owner, "patch_size", None)
    if patch is None:
        raise UnsupportedModelError(f"{type(inner).__name__}: expected a model whose config.patch_size or "
                                    "patch_embed.patch_size says how large a patch is, got none: give the grid "
                                    "yourself (keep_mask(batch, grid), or a batch with 'patches')")
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        raise ValueError("pixel_values: expected (B, C, H, W) or (B, T, C, H, W), got "
                         f"{tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__}")
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    grid: tuple[int, ...] = (pixels.shape[-2] // height, pixels.shape[-1] // width)
    if pixels.ndim == 5:
        grid = (pixels.shape[1] // getattr(config, "tubelet_size", 1), *grid)
    if min(grid) < 1:
        raise ValueError(f"pixel_values: expected pictures of at least one patch ({height} x {width}), got "
                         f"{tuple(pixels.shape)}")
    return grid


__all__ = ["COLORS", "ColorMAE", "Grid", "MaskIds", "color_gain", "filtered", "gaussian_gain", "patch_grid"]
