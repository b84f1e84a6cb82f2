"""A learned steering: one element-wise affine map for each steered module."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import intervene
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating
from looseleaf.probes.hooks import first_tensor, matching_modules, uncompiled

FORMAT = "looseleaf.steering/1"


class Steering:
    """``T(z) = omega * z + bias`` for each module; the identity at omega 1 and bias 0.

    Attributes:
        omega, bias: module name -> (d,) fp32.
        info: how it was made.
    """

    def __init__(self, omega: Mapping[str, Tensor], bias: Mapping[str, Tensor], info: dict[str, Any] | None = None,
                 ) -> None:
        if set(omega) != set(bias):
            raise ValueError(f"expected omega and bias of the same modules, got {sorted(omega)[:3]} and "
                             f"{sorted(bias)[:3]}")
        self.omega = {name: t.detach().float().cpu() for name, t in omega.items()}
        self.bias = {name: t.detach().float().cpu() for name, t in bias.items()}
        self.info = dict(info or {})

    def sparsity(self) -> float:
        """Fraction of coordinates, of omega and bias, that are exactly at the identity."""
        at = sum(int((self.omega[n] == 1).sum() + (self.bias[n] == 0).sum()) for n in self.omega)
        return at / max(1, sum(2 * t.numel() for t in self.omega.values()))

    @contextmanager
    def apply(self, model: nn.Module, strength: float = 1.0) -> Iterator[None]:
        """Steer ``model`` while the ``with`` block runs: ``(1 - strength) z + strength T(z)`` (section 3.4).

        Args:
            strength: 0 changes nothing, 1 is what was learned; beyond them with a warning.

        Raises:
            ValueError: the model has no such modules, or of another width.
        """
        _check_strength(strength)
        if strength == 0:
            yield
            return
        self._check_model(model)
        with intervene(model, {name: self._map(name, strength) for name in self.omega}):
            yield

    def _map(self, name: str, strength: float) -> Callable[[Tensor], Tensor]:
        omega, bias = 1 + strength * (self.omega[name] - 1), strength * self.bias[name]
        maps: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

        def function(z: Tensor) -> Tensor:
            # at least single precision: a map this close to the identity would be lost in bf16
            key = (z.device, torch.promote_types(z.dtype, torch.float32))
            if key not in maps:
                maps[key] = (omega.to(*key), bias.to(*key))
            return (z.to(key[1]) * maps[key][0] + maps[key][1]).to(z.dtype)

        return function

    def _check_model(self, model: nn.Module) -> None:
        modules = matching_modules(model, "**")
        missing = [name for name in self.omega if name not in modules]
        if missing:
            raise ValueError(f"this steering was made for another model: {type(model).__name__} has no module "
                             f"{missing[0]!r} (nor {len(missing) - 1} more of {len(self.omega)})")
        for name, omega in self.omega.items():
            weight = getattr(modules[name], "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() != omega.numel():
                raise ValueError(f"this steering was made for another model: {name} has width {weight.numel()}, the "
                                 f"map {omega.numel()}")

    def scaled(self, strength: float) -> Steering:
        """The maps at a strength, as a steering of its own."""
        _check_strength(strength)
        return Steering({n: 1 + strength * (t - 1) for n, t in self.omega.items()},
                        {n: strength * t for n, t in self.bias.items()}, {**self.info, "strength": strength})

    @staticmethod
    def mean(parts: Sequence[Steering]) -> Steering:
        """Several behaviours at once: the mean of their displacements; a module that a part lacks stays put there."""
        if not parts:
            raise ValueError("parts: expected one steering or more, got none")
        if any(isinstance(part, BoundedSteering) for part in parts):
            raise ValueError(_NOT_AFFINE)
        names = list(dict.fromkeys(n for part in parts for n in part.omega))
        width = {n: part.omega[n].numel() for part in parts for n in part.omega}
        omega = {n: torch.stack([p.omega.get(n, torch.ones(width[n])) for p in parts]).mean(0) for n in names}
        bias = {n: torch.stack([p.bias.get(n, torch.zeros(width[n])) for p in parts]).mean(0) for n in names}
        return Steering(omega, bias, {"mean of": len(parts)})

    def then(self, later: Steering) -> Steering:
        """Two behaviours in sequence: ``later`` after this one, in every module."""
        if isinstance(later, BoundedSteering):
            raise ValueError(_NOT_AFFINE)
        names = list(dict.fromkeys([*self.omega, *later.omega]))
        omega, bias = {}, {}
        for n in names:
            width = (self.omega.get(n) if n in self.omega else later.omega[n]).numel()  # type: ignore[union-attr]
            one, zero = torch.ones(width), torch.zeros(width)
            omega[n] = later.omega.get(n, one) * self.omega.get(n, one)
            bias[n] = later.omega.get(n, one) * self.bias.get(n, zero) + later.bias.get(n, zero)
        return Steering(omega, bias, {"sequence": 2})

    def merge(self, model: nn.Module, example: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Fold the maps into the linear layers that read the steered outputs: steering at no cost, for good.

        ``W (omega z + b) + c = (W diag(omega)) z + (W b + c)``. Layers without a bias get one; a checkpoint of the
        model then has biases that its class, as configured, does not expect.

        Args:
            model: changed in place.
            example: model inputs, to see which layers read a steered output.
            strength: as in :meth:`apply`.

        Raises:
            ValueError: a steered output is read by something else than linear layers; nothing is changed then.
        """
        _check_strength(strength)
        self._check_model(model)
        readers = _readers(model, list(self.omega), example)
        with torch.no_grad(), evaluating(model):
            with self.apply(model, strength):
                wanted = _output(model, example)
            before = [(m, m.weight.detach().clone(), m.bias) for linears in readers.values() for m in linears]
            for name, linears in readers.items():
                for linear in linears:
                    omega = (1 + strength * (self.omega[name] - 1)).to(linear.weight)
                    bias = (strength * self.bias[name]).to(linear.weight)
                    shift = linear.weight @ bias
                    linear.bias = nn.Parameter(shift if linear.bias is None else linear.bias + shift)
                    linear.weight.mul_(omega)
            if not torch.allclose(_output(model, example), wanted, atol=1e-2, rtol=1e-2):
                for module, weight, bias_before in before:
                    module.weight.copy_(weight)
                    module.bias = bias_before
                raise ValueError("the steered outputs are read by more than linear layers, so folding would change the "
                                 "result: use apply()")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, atomically."""
        save_tensors(path, {f"{kind}.{n}": t for kind, maps in self._tensors().items() for n, t in maps.items()},
                     self.info, format=FORMAT)

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        return {"omega": self.omega, "bias": self.bias}

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Steering:
        """Read what :meth:`save` wrote; errors as :func:`looseleaf.files.load_tensors`."""
        tensors, info = load_tensors(path, format=FORMAT)
        maps: dict[str, dict[str, Tensor]] = {"omega": {}, "bias": {}}
        for name, tensor in tensors.items():
            kind, _, module = name.partition(".")
            maps.setdefault(kind, {})[module] = tensor
        if "low" in maps:
            return BoundedSteering(maps["omega"], maps["bias"], maps["low"], maps["high"], info)
        return Steering(maps["omega"], maps["bias"], info)


class BoundedSteering(Steering):
    """A steering that moves an activation only where it lies inside a range, each coordinate by itself.

    Such is the map of Lin-AcT, fitted on activations of some range and not trusted beyond [Rodriguez et al., 2025,
    arXiv 2410.23054; official code: the range of the source activations, ends excluded].

    Attributes:
        low, high: module name -> (d,) fp32.
    """

    def __init__(self, omega: Mapping[str, Tensor], bias: Mapping[str, Tensor], low: Mapping[str, Tensor],
                 high: Mapping[str, Tensor], info: dict[str, Any] | None = None) -> None:
        super().__init__(omega, bias, info)
        if not set(low) == set(high) == set(omega):
            raise ValueError(f"expected ranges of the same modules as omega, got {sorted(low)[:3]} and "
                             f"{sorted(high)[:3]}")
        self.low = {name: t.detach().float().cpu() for name, t in low.items()}
        self.high = {name: t.detach().float().cpu() for name, t in high.items()}

    def _map(self, name: str, strength: float) -> Callable[[Tensor], Tensor]:
        affine = super()._map(name, strength)
        low, high = self.low[name], self.high[name]

        def function(z: Tensor) -> Tensor:
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            return torch.where((wide > low.to(wide)) & (wide < high.to(wide)), affine(z), z)

        return function

    def scaled(self, strength: float) -> BoundedSteering:
        """The maps at a strength, as a steering of its own."""
        plain = super().scaled(strength)
        return BoundedSteering(plain.omega, plain.bias, self.low, self.high, plain.info)

    def then(self, later: Steering) -> Steering:
        """Not to be had: the maps are not affine.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NOT_AFFINE)

    def merge(self, model: nn.Module, example: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Not to be had: the maps are not affine.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NOT_AFFINE)

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super()._tensors(), "low": self.low, "high": self.high}


_NOT_AFFINE = ("expected maps that are affine everywhere, got ones that end at the range of the source activations: "
               "apply them with apply()")


def _check_strength(strength: float) -> None:
    if not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ValueError("strength: expected a number, such as 0 (no effect) or 1 (as learned), got "
                         f"{strength!r}")
    if not 0 <= strength <= 1:
        warnings.warn(f"strength={strength} lies outside [0, 1], beyond what was learned", stacklevel=3)


def _readers(model: nn.Module, names: list[str], example: Mapping[str, Tensor]) -> dict[str, list[nn.Linear]]:
    """Steered module -> the linear layers whose input is its very output."""
    writers: dict[int, str] = {}
    outputs: list[Tensor] = []
    readers: dict[str, list[nn.Linear]] = {name: [] for name in names}
    modules = matching_modules(model, names)

    def wrote(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            writers[id(output)] = name
            outputs.append(output)  # alive, so that no other tensor gets its id

        return hook

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = writers.get(id(args[0])) if args else None
        if name is not None and isinstance(module, nn.Linear):
            readers[name].append(module)

    handles = [modules[name].register_forward_hook(wrote(name)) for name in names]
    handles += [m.register_forward_pre_hook(read) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad(), evaluating(model), uncompiled(model):
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    unread = [name for name, linears in readers.items() if not linears]
    if unread:
        raise ValueError(f"no linear layer reads the output of {unread[0]}, so nothing can be folded: use apply()")
    return readers


def _output(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    return first_tensor(model(**example))
