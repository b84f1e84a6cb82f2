"""Masks: which weights of a model are kept."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.errors import did_you_mean
from looseleaf.files import load_tensors, save_tensors
from looseleaf.pruning.applied import WRITTEN, AppliedMask, Place, applied, pack, put_on, take_off, unpack
from looseleaf.pruning.targets import check_finite, computed, holders, plain_name, stored_parameter
from looseleaf.report import Table

FORMAT = "looseleaf.masks/2"
_ONES = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


class Masks(Mapping[str, Tensor]):
    """Parameter name -> boolean tensor of the parameter's shape; True = keep.

    ``apply`` puts the masks on a model: removed weights are 0 and stay 0 in training, with a gradient of exactly zero.
    ``remove`` takes the masks off and gives the dense weights back; ``make_permanent`` leaves the zeros and a plain
    model. Under masks a model is what it was otherwise: the same parameters under the same names (an optimiser made
    before or after keeps working), whose state dict, copies and ``save_pretrained`` are those of the pruned model. What
    else writes to a masked weight, such as an adapter that is merged into it, keeps its effect.

    In memory and on disk a mask takes one bit for each weight; tensors are made when they are asked for.

    Args:
        masks: boolean tensors by name, as in ``model.named_parameters()``: a weight that several layers share has one
            name, the first. What PEFT, ``torch.compile`` and ``DataParallel`` add to names does not matter.
        metadata: plain data that travels with the masks (rule, model, ...); must be JSON.

    Raises:
        ValueError: a mask is not a boolean tensor.
    """

    def __init__(self, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"the mask of {name!r}: expected a tensor of dtype bool (True = keep), got {kind}")
        self._packed = {str(name): pack(mask.detach()) for name, mask in masks.items()}
        self._shapes = {str(name): mask.shape for name, mask in masks.items()}
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def of(cls, model: nn.Module) -> Masks:
        """The masks that are on ``model`` now; without any, no masks."""
        found = {name: mask for name, places in holders(model).items() if (mask := applied(*places[0]))}
        return cls._of({n: m.packed for n, m in found.items()}, {n: m.shape for n, m in found.items()})

    @classmethod
    def _of(cls, packed: dict[str, Tensor], shapes: Mapping[str, Any], metadata: Any = None) -> Masks:
        masks = cls({}, metadata)
        masks._packed, masks._shapes = packed, {name: torch.Size(shape) for name, shape in shapes.items()}
        return masks

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self._packed[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.removed():,} of {self.total():,} weights removed)"

    def __eq__(self, other: object) -> bool:
        """Same names and the same weights kept; order, device and metadata do not matter."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(bits, other._packed[n].to(bits.device)) for n, bits in self._packed.items())

    __hash__ = None  # type: ignore[assignment]

    def total(self, name: str | None = None) -> int:
        """Number of weights that the masks cover, of one parameter or of all."""
        return self._shapes[name].numel() if name is not None else sum(map(self.total, self))

    def removed(self, name: str | None = None) -> int:
        """Number of weights removed, of one parameter or of all."""
        if name is None:
            return sum(map(self.removed, self))
        packed = self._packed[name]
        return self.total(name) - int(_ONES.to(packed.device)[packed.long()].sum())

    def sparsity(self, name: str | None = None) -> float:
        """Fraction of the covered weights that is removed, in [0, 1]; 0.0 when nothing is covered."""
        return self.removed(name) / (self.total(name) or 1)

    def table(self) -> Table:
        """One row per parameter: shape, weights, removed, sparsity; the last row is the sum."""
        table = Table("masks", ["parameter", "shape", "weights", "removed", "sparsity"])
        for name in (*self, None):
            shape = "x".join(map(str, self._shapes[name])) if name is not None else ""
            table.add(name or "all", shape, self.total(name), self.removed(name), self.sparsity(name))
        return table

    def __and__(self, other: Masks) -> Masks:
        """Kept by both. ValueError when names or shapes differ."""
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: Masks) -> Masks:
        """Kept by either. ValueError when names or shapes differ."""
        return self._combine(other, torch.bitwise_or)

    def overlap(self, other: Masks) -> float:
        """Jaccard index of the kept weights, |A and B| / |A or B|, in [0, 1]; two random masks of density d give
        d / (2 - d). ValueError when names or shapes differ."""
        both, ours, others = self._kept(other)
        return both / (ours + others - both) if ours or others else 1.0

    def cosine(self, other: Masks) -> float:
        """Cosine of the masks as 0/1 vectors, |A and B| / sqrt(|A| |B|), in [0, 1]; two random masks of density d give
        d. ValueError when names or shapes differ."""
        both, ours, others = self._kept(other)
        return both / math.sqrt(ours * others) if ours and others else float(ours == others)

    def hamming(self, other: Masks) -> float:
        """Fraction of the weights on which the masks disagree, in [0, 1]. ValueError when names or shapes differ."""
        both, ours, others = self._kept(other)
        return (ours + others - 2 * both) / (self.total() or 1)

    def _kept(self, other: Masks) -> list[int]:
        return [masks.total() - masks.removed() for masks in (self & other, self, other)]

    def _combine(self, other: Masks, function: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if not isinstance(other, Masks):
            raise TypeError(f"expected Masks, got {type(other).__name__}")
        odd = sorted(set(self) ^ set(other))
        if odd:
            raise ValueError(f"the masks cover different parameters, such as {odd[0]!r}: both must be of one model and "
                             "the same targets")
        for name, shape in self._shapes.items():
            if shape != other._shapes[name]:
                raise ValueError(f"the masks of {name!r} have shapes {tuple(shape)} and "
                                 f"{tuple(other._shapes[name])}: both must be of one model")
        return Masks._of({n: function(b, other._packed[n].to(b.device)) for n, b in self._packed.items()}, self._shapes)

    def apply(self, model: nn.Module) -> Masks:
        """Put the masks on ``model``, atomically, and return self; those that are on it already stay.

        The removed weights are kept aside for :meth:`remove`, in their dtype; :meth:`make_permanent` needs no such
        memory.

        Raises:
            ValueError: the masks are for another model (names or shapes), the model carries other masks or a weight has
                a parametrization, or a weight is NaN or infinite (the parameter is named).
        """
        places = self.places(model)
        for name, found in places.items():
            check_finite(name, stored_parameter(*found[0]).detach(), "weights")
        carried = self._carried(places)
        with contextlib.ExitStack() as undo:
            for name in (name for name in self if name not in carried):
                undo.callback(take_off, places[name], restore=True)
                put_on(self._packed[name], self._shapes[name], places[name])
            undo.pop_all()
        return self

    def remove(self, model: nn.Module, restore: bool = True) -> None:
        """Take the masks off ``model``; after :meth:`make_permanent` this does nothing.

        Args:
            model: that carries the masks.
            restore: True: give the removed weights back, bit for bit; False: leave every weight as it is now.

        Raises:
            ValueError: the masks are for another model, are not on this one, or others are; or a weight was written to
                where it was removed, so that it cannot be given back. Nothing is changed then.
        """
        places = self.places(model)
        carried = self._carried(places, unwritten=restore)
        if not carried:
            for name, found in places.items():
                weight = stored_parameter(*found[0]).detach()
                check_finite(name, weight, "weights")
                if weight[~self[name].to(weight.device)].any():
                    raise ValueError("these masks are not on the model: there is nothing to remove (apply them first)")
        for name in carried:
            take_off(places[name], restore)

    def make_permanent(self, model: nn.Module) -> Masks:
        """Write zeros into the removed weights of ``model``, for good, take the masks off, and return self.

        Raises:
            ValueError: as for :meth:`apply`; or a weight was written to where it was removed. Nothing is changed then.
        """
        places = self.places(model)
        self._carried(places, unwritten=True)
        for name, found in places.items():
            take_off(found, restore=False)
            weight = stored_parameter(*found[0]).detach()
            weight.masked_fill_(~self[name].to(weight.device), 0.0)
        return self

    def places(self, model: nn.Module) -> dict[str, list[Place]]:
        """Where each masked parameter is held: name -> (module, attribute), several where it is tied; ValueError where
        the masks are for another model."""
        known = holders(model)
        plain = {plain_name(name): places for name, places in reversed(known.items())}
        found = {n: places for n in self if (places := known.get(n) or plain.get(plain_name(n)))}
        facts = {k: self.metadata[k] for k in ("model", "model_type", "parameters") if k in self.metadata}
        origin = f" The masks say they come from {facts}." if facts else ""
        for name, shape in self._shapes.items():
            if name not in found:
                example = f", such as {next(iter(found))!r}" if found else ""
                raise ValueError(f"these masks are for another model: {name!r} is no parameter of this "
                                 f"{type(model).__name__} ({len(found)} of {len(self)} names are known{example})."
                                 f"{did_you_mean(name, known)}{origin}")
            actual = stored_parameter(*found[name][0]).shape
            if actual != shape:
                raise ValueError(f"these masks are for another model: the mask of {name!r} has shape {tuple(shape)}, "
                                 f"the parameter {tuple(actual)}.{origin}")
        return found

    def _carried(self, places: Mapping[str, list[Place]], unwritten: bool = False) -> dict[str, AppliedMask]:
        """Those of these masks that are on the weights; ValueError where others are, or a weight has a parametrization
        or, with ``unwritten``, was written to."""
        carried = {}
        for name, found in places.items():
            if any(computed(*place) for place in found):
                raise ValueError(f"{name!r} has a parametrization: remove it first "
                                 "(torch.nn.utils.parametrize.remove_parametrizations, or remove() of learned masks)")
            mask = applied(*found[0])
            if mask is not None:
                if not torch.equal(mask.packed, self._packed[name].to(mask.packed.device)):
                    raise ValueError("the model carries other masks: take them off first (their remove(model)), or "
                                     "combine both with `&`")
                if unwritten and mask.written():
                    raise ValueError(f"{name!r} {WRITTEN}")
                carried[name] = mask
        return carried

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The masks as uint8 tensors of 8 weights a byte, and plain data, for files that hold masks among others."""
        return dict(self._packed), {"shapes": {n: list(s) for n, s in self._shapes.items()}, "metadata": self.metadata}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Masks:
        """The masks of which :meth:`pack` gave the parts; ValueError where they do not go together."""
        shapes = info["shapes"]
        if not isinstance(shapes, dict) or set(shapes) != set(tensors):
            raise ValueError("the file is damaged: names and shapes of the masks do not agree")
        for name, shape in shapes.items():
            bits = tensors[name]
            if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-math.prod(shape) // 8),):
                raise ValueError(f"the file is damaged: {name!r} does not have the bits for shape {shape}")
        return cls._of({name: tensors[name] for name in shapes}, shapes, info["metadata"])

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write the masks to one safetensors file, atomically; see :func:`looseleaf.files.save_tensors`. ``metadata``
        is added to that of the masks."""
        tensors, info = self.pack()
        save_tensors(path, tensors, {**info, "metadata": {**self.metadata, **(metadata or {})}}, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what :meth:`save` wrote, to the CPU. FileNotFoundError, or ValueError for a file that is damaged or
        holds no masks."""
        try:
            return cls.unpack(*load_tensors(path, format=FORMAT))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read masks from {path} ({error}). Write it again with Masks.save") from error
