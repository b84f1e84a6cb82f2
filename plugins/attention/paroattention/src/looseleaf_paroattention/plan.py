"""What calibration finds, and the folder it is kept in: ``plan.json`` for people, ``masks.safetensors`` for blocks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf.files import replacing, write_text
from looseleaf.fingerprint import fingerprint
from looseleaf_paroattention.permutations import PERMUTATIONS

SCHEMA = "looseleaf.paroattention/1"
PLAN, MASKS = "plan.json", "masks.safetensors"


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

    def density(self) -> float:
        """Blocks that are computed over all blocks, over all layers, heads and step groups."""
        kept = sum(int(layer.masks.sum()) for layer in self.layers.values())
        return kept / max(1, sum(layer.masks.numel() for layer in self.layers.values()))

    def save(self, folder: str | Path) -> None:
        """Write the two files to a folder, which is made if need be."""
        from safetensors.torch import save_file

        packed = {f"layer.{n}": torch.from_numpy(np.packbits(layer.masks.cpu().numpy(), axis=-1))
                  for n, layer in self.layers.items()}
        with replacing(Path(folder) / MASKS) as part:
            save_file(packed, part, metadata={"schema": SCHEMA})
        content = {"schema": SCHEMA, **self.settings, "masks": fingerprint(packed), "layers": {
            str(n): {"permutations": list(layer.permutations), "blocks": layer.masks.shape[-1],
                     "density": float(layer.masks.float().mean()), "sparsity": layer.sparsity,
                     "incoherence": layer.incoherence} for n, layer in self.layers.items()}}
        write_text(Path(folder) / PLAN, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no such plan, it cannot be read, or the two files are not of one plan.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        where = Path(folder)
        try:
            content = json.loads((where / PLAN).read_text(encoding="utf-8"))
            packed = load_file(where / MASKS)
        except FileNotFoundError as error:
            raise ValueError(f"{where} has no {Path(str(error.filename or where / MASKS)).name}: allowed is a folder "
                             f"with {PLAN} and {MASKS}. Make one with calibrate() and save()") from None
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, NotADirectoryError) as error:
            raise ValueError(f"{where} cannot be read ({error}): allowed is a folder that save() wrote") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{where / PLAN} is of another kind: allowed is schema {SCHEMA!r}")
        if content.get("masks") != fingerprint(packed):
            raise ValueError(f"{where / MASKS} is not the file that {PLAN} was written with: save() the plan again")
        try:
            settings = {name: content[name] for name in ("grid", "text_tokens", "text_first", "block", "step_groups")}
            settings["grid"] = tuple(settings["grid"])
            layers = {int(n): _layer(layer, packed[f"layer.{n}"]) for n, layer in content["layers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where / PLAN} is not complete ({error}): save() the plan again") from None
        return cls(settings, layers)


def _layer(content: dict[str, Any], packed: Tensor) -> LayerPlan:
    masks = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=content["blocks"])).bool()
    names = tuple(content["permutations"])
    unknown = [name for name in names if name not in PERMUTATIONS]
    if unknown or len(names) != masks.shape[1]:
        raise ValueError(f"permutations {unknown or names} for {masks.shape[1]} heads")
    return LayerPlan(names, masks, content["sparsity"], content["incoherence"])
