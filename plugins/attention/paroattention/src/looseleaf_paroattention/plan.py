"""What calibration finds, and the file it is kept in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf.files import load_tensors, save_tensors
from looseleaf_paroattention.grid import PERMUTATIONS

FORMAT = "looseleaf.paroattention/2"
SETTINGS = ("grid", "text_tokens", "text_first", "block", "step_groups")


@dataclass
class LayerPlan:
    """One layer.

    Attributes:
        permutations: of each query head, one of :data:`PERMUTATIONS`.
        masks: (step groups, H, N, N) bool, blocks of the permuted attention map that are computed.
        sparsity, incoherence: permutation -> metric of each head, for those that were tried; only to be read.
    """

    permutations: tuple[str, ...]
    masks: Tensor
    sparsity: dict[str, list[float]] = field(default_factory=dict)
    incoherence: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Plan:
    """All layers, and what they were calibrated for.

    Attributes:
        settings: ``grid``, ``text_tokens``, ``text_first``, ``block`` and ``step_groups``: with others the masks mean
            nothing.
        layers: by index.
    """

    settings: dict[str, Any]
    layers: dict[int, LayerPlan]

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError that names what differs between ``settings`` and those of the plan."""
        wrong = [name for name in SETTINGS if settings[name] != self.settings[name]]
        if wrong:
            ours, theirs = (", ".join(f"{name}={values[name]}" for name in wrong) for values in
                            (settings, self.settings))
            raise ValueError(f"plan: expected one for {ours}, got one for {theirs}. Make PAROAttention with the values "
                             "of the plan, or run calibrate() again")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: masks of 8 blocks a byte, all else as JSON in its metadata."""
        packed = {f"layer.{n}": torch.from_numpy(np.packbits(layer.masks.cpu().numpy(), axis=-1))
                  for n, layer in self.layers.items()}
        layers = {str(n): {"permutations": list(layer.permutations), "blocks": layer.masks.shape[-1],
                           "density": float(layer.masks.float().mean()), "sparsity": layer.sparsity,
                           "incoherence": layer.incoherence} for n, layer in self.layers.items()}
        save_tensors(path, packed, {**self.settings, "layers": layers}, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it cannot be read, or is no whole plan.
        """
        packed, info = load_tensors(path, format=FORMAT)
        try:
            settings = {name: info[name] for name in SETTINGS}
            settings["grid"] = tuple(settings["grid"])
            layers = {int(n): _layer(layer, packed[f"layer.{n}"]) for n, layer in info["layers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: expected a whole plan, got one without {error}. Run calibrate() and save() "
                             "again") from None
        return cls(settings, layers)


def _layer(info: dict[str, Any], packed: Tensor) -> LayerPlan:
    masks = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=info["blocks"])).bool()
    names = tuple(info["permutations"])
    unknown = [name for name in names if name not in PERMUTATIONS]
    if unknown or len(names) != masks.shape[1]:
        raise ValueError(f"known permutations for {masks.shape[1]} heads: {unknown or names}")
    return LayerPlan(names, masks, info["sparsity"], info["incoherence"])
