"""What can be learned in front of a frozen dual encoder: vectors in texts, beside patches, and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf_vision.encoder import DualEncoder, Piece, Tokens, spaced

Position = Literal["end", "middle", "front"]


class TextContext(nn.Module):
    """Learned vectors around the names of classes: the context of CoOp and of all that follow it.

    The text is ``{vectors before} name {vectors after}.``; called with names it gives the :class:`Tokens` to be
    encoded by :meth:`DualEncoder.texts`.

    Args:
        encoder: whose texts they stand in; only its embeddings are read.
        length: number of vectors, from N(0, 0.02); left out where ``start`` is given.
        start: text whose token embeddings are the first vectors, ``"a photo of a"`` or ``"a {}, a type of pet"``:
            what stands before and after ``{}`` gives vectors before and after the name, of any lengths.
        classes: one set of vectors for each of so many classes; None: one for all. Names must then be as many.
        position: where the *name* stands: ``end``, ``middle`` (half of the vectors before it) or ``front``; without
            effect where ``start`` has ``{}``.
        lead: fixed words between the vectors and the name.
        ending: text after all.
        depth: layers whose input has vectors of its own at these places, the first one included.
        seed: of the vectors that are drawn.

    Attributes:
        context: (length, width) or (classes, length, width).
        deep: (depth - 1, length, width); None at depth 1.
    """

    def __init__(self, encoder: DualEncoder, *, length: int = 16, start: str | None = None, classes: int | None = None,
                 position: Position = "end", lead: str = "", ending: str = ".", depth: int = 1,
                 seed: int = 0) -> None:
        super().__init__()
        if position not in ("end", "middle", "front"):
            raise ValueError(f"position: expected 'end', 'middle' or 'front', got {position!r}")
        if not 1 <= depth <= encoder.depth[0]:
            raise ValueError(f"depth: expected an integer in [1, {encoder.depth[0]}], the layers of the text tower, "
                             f"got {depth}")
        draw = torch.Generator().manual_seed(seed)
        shape = (length, encoder.width) if classes is None else (classes, length, encoder.width)
        if start is not None and start.count("{}") > 1:
            raise ValueError(f"start: expected text with at most one {{}}, got {start!r}")
        if start is None:
            if length < 1:
                raise ValueError(f"length: expected an integer >= 1, got {length}")
            vectors = 0.02 * torch.randn(shape, generator=draw)
            self.before = {"end": length, "middle": length // 2, "front": 0}[position]
        else:
            parts = [part.strip() for part in start.split("{}")]
            rows = [encoder.embed_tokens(part).cpu() for part in parts]
            vectors = torch.cat(rows)
            if not len(vectors):
                raise ValueError(f"start: expected text with a word or more, got {start!r}")
            self.before = len(rows[0]) if len(parts) == 2 else {
                "end": len(vectors), "middle": len(vectors) // 2, "front": 0}[position]
            vectors = vectors if classes is None else vectors.expand(classes, -1, -1).clone()
        self.length, self.lead, self.ending = vectors.shape[-2], lead, ending
        self.context = nn.Parameter(vectors.to(encoder.device))
        self.deep = None if depth == 1 else nn.Parameter(
            (0.02 * torch.randn(depth - 1, self.length, encoder.width, generator=draw)).to(encoder.device))
        self._tokens: dict[tuple[str, ...], Tokens] = {}
        self._encoder = (encoder,)  # in a tuple, so that it is no part of this module

    def tokens(self, names: Sequence[str]) -> Tokens:
        """The texts of some names, without vectors; read once for each list of names.

        Raises:
            ValueError: there are other classes than vectors, or a name is too long.
        """
        key = tuple(map(spaced, names))
        if self.context.dim() == 3 and len(key) != len(self.context):
            raise ValueError(f"names: expected {len(self.context)}, which the context was made for, got {len(key)}: "
                             "a context of each class has nothing for new ones")
        if key not in self._tokens:
            after = self.length - self.before
            pieces: list[list[Piece]] = []
            for name in (f"{self.lead} {name}".strip() for name in key):
                tail: list[Piece] = [name, after, self.ending] if after else [f"{name}{self.ending}"]
                pieces.append([self.before, *tail])
            self._tokens[key] = self._encoder[0].tokens(pieces)
        return self._tokens[key]

    def forward(self, names: Sequence[str], shift: Tensor | None = None) -> Tokens:
        """The texts of the names.

        Args:
            names: of classes; underscores become spaces.
            shift: (B, width), added to all vectors: the texts are then those of picture 1, of picture 2, ...
                (B * names in all).
        """
        tokens, deep = self.tokens(names), [] if self.deep is None else list(self.deep)
        if shift is None:
            return tokens.with_vectors(self.context, deep)
        vectors = self.context if self.context.dim() == 3 else self.context.expand(len(names), -1, -1)
        shifted = vectors[None] + shift[:, None, None]  # (B, C, length, width)
        return tokens.repeated(len(shift)).with_vectors(shifted.flatten(0, 1), deep)


class ConditionalContext(TextContext):
    """A :class:`TextContext` that every picture shifts through a small network, as in CoCoOp.

    Args:
        encoder: see :class:`TextContext`, as are all further options.
        hidden: width of the network; None: a sixteenth of the features'.
        seed: of the vectors and the network.
    """

    def __init__(self, encoder: DualEncoder, *, hidden: int | None = None, seed: int = 0, **options: object) -> None:
        super().__init__(encoder, seed=seed, **options)  # type: ignore[arg-type]
        hidden = hidden or max(1, encoder.dim // 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(encoder.dim, hidden), nn.ReLU(),
                                         nn.Linear(hidden, encoder.width)).to(encoder.device)

    def forward(self, names: Sequence[str], features: Tensor | None = None) -> Tokens:  # type: ignore[override]
        """The texts of all names for each of the pictures with these L2-normalised features (B, d)."""
        return super().forward(names, None if features is None else self.network(features))


class VisionTokens(nn.Module):
    """Learned vectors that the vision tower reads beside the patches, as in visual prompt tuning.

    Called it gives what :meth:`DualEncoder.images` takes as ``tokens``.

    Args:
        encoder: whose vision tower they are for.
        length: number of vectors, from N(0, 0.02).
        depth: layers that have vectors of their own; 1 is the shallow variant.
        seed: of the vectors.

    Attributes:
        vectors: (depth, length, width).
    """

    def __init__(self, encoder: DualEncoder, *, length: int = 4, depth: int = 1, seed: int = 0) -> None:
        super().__init__()
        if length < 1 or not 1 <= depth <= encoder.depth[1]:
            raise ValueError(f"VisionTokens: expected length >= 1 and depth in [1, {encoder.depth[1]}], the layers of "
                             f"the vision tower, got length={length}, depth={depth}")
        draw = torch.Generator().manual_seed(seed)
        self.vectors = nn.Parameter((0.02 * torch.randn(depth, length, encoder.vision_width, generator=draw)).to(
            encoder.device))

    def forward(self, context: TextContext | None = None) -> list[Tensor]:
        """The vectors of each layer; ``context`` is not read."""
        return list(self.vectors)


class CoupledTokens(nn.Module):
    """Vision tokens that are linear functions of the vectors of a text context, layer by layer, as in MaPLe.

    Args:
        encoder: whose vision tower they are for.
        depth: layers that have vectors of their own; as many as the context's.
        seed: of the linear functions.
    """

    def __init__(self, encoder: DualEncoder, *, depth: int = 1, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= depth <= min(encoder.depth):
            raise ValueError(f"CoupledTokens.depth: expected an integer in [1, {min(encoder.depth)}], got {depth}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.maps = nn.ModuleList(nn.Linear(encoder.width, encoder.vision_width) for _ in range(depth)).to(
                encoder.device)

    def forward(self, context: TextContext) -> list[Tensor]:
        """The vectors of each layer, made of those of ``context``."""
        vectors = [context.context, *([] if context.deep is None else context.deep)]
        return [linear(rows) for linear, rows in zip(self.maps, vectors, strict=True)]


class PixelFrame(nn.Module):
    """Learned pixels around a picture, before normalisation.

    Args:
        size: height and width of the model's input.
        inner: height and width that the picture is resized to in the middle of a border (``border``), or None: the
            picture keeps its size and a frame is added to it (``add``).
        pad: width of the frame that is added.
        channels: of the pictures.

    Attributes:
        delta: (channels, height, width), zero at first: the border is grey, what is added is nothing.
        mask: 1 where pixels are learned.
    """

    def __init__(self, size: int | tuple[int, int], *, inner: int | None = None, pad: int = 30,
                 channels: int = 3) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        self.inner, self.pad = inner, pad
        if inner is not None and not 1 <= inner <= min(height, width) - 2:
            raise ValueError(f"inner: expected an integer in [1, {min(height, width) - 2}], two below the model's "
                             f"input, got {inner}")
        if inner is None and not 1 <= pad <= min(height, width) // 2:
            raise ValueError(f"pad: expected an integer in [1, {min(height, width) // 2}], got {pad}")
        mask = torch.ones(1, height, width)
        if inner is None:
            mask[:, pad:height - pad, pad:width - pad] = 0
        else:
            self.left, self.top = (width - inner + 1) // 2, (height - inner + 1) // 2
            mask[:, self.top:self.top + inner, self.left:self.left + inner] = 0
        self.delta = nn.Parameter(torch.zeros(channels, height, width))
        self.register_buffer("mask", mask)
        self.mask: Tensor

    @property
    def trained(self) -> int:
        """How many numbers are learned."""
        return int(self.mask.sum()) * self.delta.shape[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Fractions (B, C, h, w) with the learned pixels: (B, C, height, width)."""
        if self.inner is None:
            return pixels + self.delta * self.mask
        height, width = self.delta.shape[-2:]
        if pixels.shape[-2:] != (self.inner, self.inner):
            pixels = F.interpolate(pixels, (self.inner, self.inner), mode="bilinear", antialias=True,
                                   align_corners=False)
        right, bottom = width - self.inner - self.left, height - self.inner - self.top
        placed = F.pad(pixels, (self.left, right, self.top, bottom))
        return placed + torch.sigmoid(self.delta) * self.mask


__all__ = ["ConditionalContext", "CoupledTokens", "PixelFrame", "Position", "TextContext", "VisionTokens"]
