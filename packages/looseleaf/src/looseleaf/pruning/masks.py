"""Masks: which weights of a model are kept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from looseleaf.errors import did_you_mean
from looseleaf.files import replacing
from looseleaf.pruning.targets import check_finite, holders, stored_parameter
from looseleaf.report import Table

FORMAT = "looseleaf.masks/1"


class Masks(Mapping[str, Tensor]):
    """Parameter name -> boolean tensor of the parameter's shape; True = keep.

    ``apply`` puts the masks in front of the weights of a model as torch parametrizations: the forward pass sees zeros,
    the parameters stay the same objects (an optimiser made before or after keeps working), and removed weights get a
    gradient of exactly zero. ``remove`` takes the masks off and gives the dense weights back; ``make_permanent`` writes the
    zeros into the weights and leaves a plain model, ready for ``save_pretrained``.

    Args:
        masks: parameter name -> boolean tensor. Names are those of ``model.named_parameters()``; a weight that several
            layers share has one name, the first.
        metadata: plain data that travels with the masks (rule, model, ...); must be JSON.

    Raises:
        ValueError: a mask is not a boolean tensor.
    """

    def __init__(self, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        self._masks: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"the mask of {name!r} is {kind}: allowed is a tensor of dtype bool (True = keep)")
            self._masks[str(name)] = mask.detach()
        self.metadata: dict[str, Any] = dict(metadata or {})

    # ------------------------------------------------------------------ a mapping
    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, {self.removed():,} of {self.total():,} weights removed)"

    def __eq__(self, other: object) -> bool:
        """Same names and the same weights kept; order, device and metadata do not matter."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self._masks.keys() == other._masks.keys() and all(
            m.shape == other[n].shape and torch.equal(m, other[n].to(m.device)) for n, m in self.items())

    __hash__ = None  # type: ignore[assignment]

    # ------------------------------------------------------------------ what they say
    def total(self, name: str | None = None) -> int:
        """Number of weights the masks cover (of one parameter, or of all)."""
        return self[name].numel() if name is not None else sum(m.numel() for m in self.values())

    def removed(self, name: str | None = None) -> int:
        """Number of weights removed (of one parameter, or of all)."""
        if name is not None:
            return self[name].numel() - int(self[name].sum())
        return sum(self.removed(n) for n in self)

    def sparsity(self, name: str | None = None) -> float:
        """Share of the covered weights that is removed, in [0, 1]; 0.0 when nothing is covered."""
        total = self.total(name)
        return self.removed(name) / total if total else 0.0

    def table(self) -> Table:
        """One row per parameter: shape, weights, removed, sparsity; the last row is the sum."""
        made = Table("masks", ["parameter", "shape", "weights", "removed", "sparsity"])
        for name, mask in self.items():
            made.add(name, "x".join(map(str, mask.shape)), mask.numel(), self.removed(name), self.sparsity(name))
        made.add("all", "", self.total(), self.removed(), self.sparsity())
        return made

    # ------------------------------------------------------------------ with other masks
    def __and__(self, other: Masks) -> Masks:
        """Kept by both. ValueError when names or shapes differ."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        """Kept by either. ValueError when names or shapes differ."""
        return self._combine(other, torch.logical_or)

    def overlap(self, other: Masks) -> float:
        """Jaccard index of the kept weights, |A and B| / |A or B|, in [0, 1]; two random masks of density d give
        d / (2 - d). ValueError when names or shapes differ."""
        both, mine, others, _ = self._counts(other)
        either = mine + others - both
        return both / either if either else 1.0

    def cosine(self, other: Masks) -> float:
        """Cosine of the masks as 0/1 vectors, |A and B| / sqrt(|A| |B|), in [0, 1]; two random masks of density d give
        d. ValueError when names or shapes differ."""
        both, mine, others, _ = self._counts(other)
        if not mine or not others:
            return float(mine == others)
        return both / math.sqrt(mine * others)

    def hamming(self, other: Masks) -> float:
        """Share of the weights on which the masks disagree, in [0, 1]. ValueError when names or shapes differ."""
        both, mine, others, total = self._counts(other)
        return (mine + others - 2 * both) / total if total else 0.0

    def _counts(self, other: Masks) -> tuple[int, int, int, int]:
        self._same_shapes(other)
        both = sum(int((m & other[n].to(m.device)).sum()) for n, m in self.items())
        return both, self.total() - self.removed(), other.total() - other.removed(), self.total()

    def _combine(self, other: Masks, function: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        self._same_shapes(other)
        return Masks({n: function(m, other[n].to(m.device)) for n, m in self.items()})

    def _same_shapes(self, other: Masks) -> None:
        if not isinstance(other, Masks):
            raise TypeError(f"expected Masks, got {type(other).__name__}")
        odd = sorted(set(self) ^ set(other))
        if odd:
            raise ValueError(f"the masks cover different parameters, such as {odd[0]!r}: both must be of one model and "
                             "the same targets")
        for name, mask in self.items():
            if mask.shape != other[name].shape:
                raise ValueError(f"the masks of {name!r} have shapes {tuple(mask.shape)} and "
                                 f"{tuple(other[name].shape)}: both must be of one model")

    # ------------------------------------------------------------------ on a model
    def apply(self, model: nn.Module) -> Masks:
        """Put the masks on ``model`` and return self. Applying the same masks twice changes nothing.

        The model is checked as a whole before anything is changed. The masks are copied to each weight's device.
        Save a masked model only after :meth:`make_permanent` or :meth:`remove`: its ``state_dict`` has other names.

        Raises:
            ValueError: the masks are for another model (names or shapes), the model carries other masks or a weight has
                another parametrization, or a weight that is kept is NaN or infinite (the parameter is named).
        """
        places = self._places(model)
        for name, found in places.items():
            for module, attribute in found:
                if not _has(module, attribute):
                    continue
                mine = _mask_of(module, attribute)
                if mine is None:
                    raise ValueError(f"{name!r} has another parametrization: remove it first "
                                     "(torch.nn.utils.parametrize.remove_parametrizations)")
                if not torch.equal(mine.mask, self[name].to(mine.mask.device)):
                    raise ValueError("the model carries other masks: take them off first (their remove(model)), or "
                                     "combine both with `&`")
            check_finite(name, stored_parameter(*found[0]), "weights")
        missing = [(name, place) for name, found in places.items() for place in found if not _has(*place)]
        done: list[tuple[nn.Module, str]] = []
        try:
            for name, (module, attribute) in missing:
                mask = self[name].to(stored_parameter(module, attribute).device, copy=True)
                order = list(module._parameters)
                # unsafe: torch's own check would run the parametrization twice more; shape and dtype are the same here
                parametrize.register_parametrization(module, attribute, _Mask(mask, order), unsafe=True)
                done.append((module, attribute))
        except BaseException:
            for place in done:
                _take_off(*place)
            raise
        return self

    def remove(self, model: nn.Module) -> None:
        """Take the masks off ``model``: the weights are the dense ones again, bit for bit (or as training left them).

        After :meth:`make_permanent` this does nothing: the zeros stay.

        Raises:
            ValueError: the masks are for another model, are not on this one, or others are.
        """
        places = self._places(model)
        carried = [place for found in places.values() for place in found if _mask_of(*place) is not None]
        if not carried:
            for name, found in places.items():
                weight = stored_parameter(*found[0])
                if bool(weight.detach()[~self[name].to(weight.device)].any()):
                    raise ValueError("these masks are not on the model: there is nothing to remove (apply them first)")
            return
        for name, found in places.items():
            for place in found:
                mine = _mask_of(*place)
                if mine is not None and not torch.equal(mine.mask, self[name].to(mine.mask.device)):
                    raise ValueError("the model carries other masks than these: call remove on those")
        for place in carried:
            _take_off(*place)

    def make_permanent(self, model: nn.Module) -> Masks:
        """Write zeros into the removed weights of ``model``, take the masks off if they are on, and return self.

        The result is a plain model: ``save_pretrained`` writes it and any version of transformers reads it.
        This cannot be undone.

        Raises:
            ValueError: the masks are for another model, or the model carries other masks.
        """
        places = self._places(model)
        if any(_has(*place) for found in places.values() for place in found):
            self.remove(model)
        with torch.no_grad():
            for name, found in places.items():
                weight = stored_parameter(*found[0])
                weight.masked_fill_(~self[name].to(weight.device), 0.0)
        return self

    def _places(self, model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
        """Where each masked parameter is held; raises unless every name and shape is there."""
        known = holders(model)
        for name, mask in self.items():
            if name not in known:
                other = next((n for n, m in self.items() if n in known), None)
                share = sum(n in known for n in self)
                raise ValueError(
                    f"these masks are for another model: {name!r} is no parameter of this {type(model).__name__} "
                    f"({share} of {len(self)} names are known{', such as ' + repr(other) if other else ''})."
                    f"{did_you_mean(name, known)}{self._origin()}")
            shape = tuple(stored_parameter(*known[name][0]).shape)
            if shape != tuple(mask.shape):
                raise ValueError(f"these masks are for another model: the mask of {name!r} has shape "
                                 f"{tuple(mask.shape)}, the parameter {shape}.{self._origin()}")
        return {name: known[name] for name in self}

    def _origin(self) -> str:
        facts = {k: self.metadata[k] for k in ("model", "model_type", "parameters") if k in self.metadata}
        return f" The masks say they come from {facts}." if facts else ""

    # ------------------------------------------------------------------ in a file
    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write the masks to a safetensors file, whole or not at all.

        Each mask is one uint8 tensor of its bits, row-major, eight to a byte (first bit highest); the file's metadata
        hold the format's name, the shapes and ``metadata`` (together with ``self.metadata``) as JSON.

        Raises:
            ValueError: metadata that is not JSON.
            OSError: the file cannot be written (the message names the path).
        """
        import numpy
        from safetensors.numpy import save

        info = {**self.metadata, **(metadata or {})}
        try:
            text = json.dumps(info)
        except TypeError as error:
            raise ValueError(f"metadata must be JSON (text, numbers, lists, dictionaries): {error}") from None
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.items()})
        packed = {name: numpy.packbits(mask.cpu().numpy().reshape(-1)) for name, mask in self.items()}
        data = save(packed, metadata={"format": FORMAT, "shapes": shapes, "info": text})
        try:
            with replacing(path) as part:
                part.write_bytes(data)
        except OSError as error:
            raise OSError(error.errno, f"cannot write the masks ({error.strerror}): choose a path that can be written",
                          str(path)) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what :meth:`save` wrote (to the CPU); what ``metadata`` was given is in ``.metadata``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, a damaged or truncated one, or one that holds no masks.
        """
        import numpy
        from safetensors import SafetensorError, safe_open

        target = Path(path)
        if not target.is_file():
            raise FileNotFoundError(f"no masks file at {target}")
        try:
            with safe_open(target, framework="np") as file:
                head = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise ValueError(f"{target} holds no masks: its format is {head.get('format')!r}, allowed is "
                                     f"{FORMAT!r} (a file written by Masks.save)")
                shapes, info = json.loads(head["shapes"]), json.loads(head.get("info", "{}"))
                if set(shapes) != set(file.keys()):
                    raise ValueError(f"{target} is damaged: its names and shapes do not agree")
                masks = {}
                for name, shape in shapes.items():
                    count, bits = math.prod(shape), file.get_tensor(name)
                    if bits.dtype != numpy.uint8 or bits.shape != (-(-count // 8),):
                        raise ValueError(f"{target} is damaged: {name!r} does not have the bits for shape {shape}")
                    flat = numpy.unpackbits(bits, count=count).astype(bool)
                    masks[name] = torch.from_numpy(flat).reshape(shape)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{target} is not a whole safetensors file with masks ({error}): it was cut short, "
                             "damaged, or is something else. Write it again with Masks.save") from error
        return cls(masks, info)


class _Mask(nn.Module):
    """The parametrization: zero where the mask says so, with a gradient of exactly zero there."""

    mask: Tensor

    def __init__(self, mask: Tensor, order: list[str]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.order = order  # of the module's parameters, to be given back by _take_off

    def forward(self, weight: Tensor) -> Tensor:
        # not a product: 0 * inf is NaN, in the weight as in its gradient
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _has(module: nn.Module, attribute: str) -> bool:
    return bool(parametrize.is_parametrized(module, attribute))


def _mask_of(module: nn.Module, attribute: str) -> _Mask | None:
    """Our parametrization on this weight, if it is the only one there."""
    if not _has(module, attribute):
        return None
    chain = module.parametrizations[attribute]  # type: ignore[union-attr, index]
    return chain[0] if len(chain) == 1 and isinstance(chain[0], _Mask) else None  # type: ignore[arg-type, index]


def _take_off(module: nn.Module, attribute: str) -> None:
    mask = _mask_of(module, attribute)
    assert mask is not None
    stored = stored_parameter(module, attribute)
    # torch keeps the parametrized attribute in a class made for the module, which a deepcopy shares and removal edits
    shared: Any = type(module)
    own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    if module._parameters.get(attribute) is not stored:  # the same object, so that ties and optimisers hold
        module._parameters[attribute] = stored
    # torch puts the weight behind the bias; parameters() must give the former order (optimiser states depend on it)
    rest: dict[str, Parameter | None] = dict(module._parameters)
    module._parameters.clear()
    for name in [*(n for n in mask.order if n in rest), *(n for n in rest if n not in mask.order)]:
        module._parameters[name] = rest[name]
