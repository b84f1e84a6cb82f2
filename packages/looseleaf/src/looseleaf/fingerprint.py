"""Which weights a result belongs to: what is kept on disk must not be taken for that of another model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE = 1024
"""Elements of each tensor that are hashed one by one; all of them are in the sum of its bits."""


def fingerprint(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that change when any name, shape, dtype or value of a model does.

    Of each tensor the sum of all bit patterns (whole numbers, so neither threads nor device matter) and evenly spaced
    elements are hashed: as fast as reading the weights once, at the price that values which are only exchanged
    between places can go unseen.

    Args:
        model: a module, or tensors by name.
    """
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = model if isinstance(model, Mapping) else model.state_dict()
    digest = hashlib.sha256()
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):  # extra state of a module
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.is_meta or (tensor.numel() and place in seen):  # tied weights are read once
            digest.update(seen.get(place, "meta").encode())
            continue
        seen[place] = name
        flat = tensor.detach().reshape(-1)
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
        bits = flat.view(whole[flat.element_size()])
        digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
        digest.update(bits[::max(1, len(bits) // SAMPLE)].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
