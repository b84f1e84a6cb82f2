"""2:4 sparse weights in the format that the sparse tensor cores of NVIDIA GPUs compute with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from looseleaf.errors import UnsupportedModelError
from looseleaf.pruning.targets import stored_parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from looseleaf.pruning.masks import Masks

GROUP, KEPT = 4, 2


def compress_semi_structured(model: nn.Module, masks: Masks) -> list[str]:
    """Replace 2:4 pruned weights of Linear layers by torch's semi-structured tensors, in place and for good.

    The forward pass of these layers then runs on sparse tensor cores (compute capability 8.0 and later), with half
    the memory for the weights. Training and ``save_pretrained`` want the plain model: save it first.

    Args:
        model: on a CUDA device, its weights float16, bfloat16 or int8. Masks on it are made permanent.
        masks: of the pattern 2:4 along the inputs, as ``NM(2, 4)`` makes them.

    Returns:
        The names of the weights replaced; those of other modules than Linear stay dense, with their zeros.

    Raises (the model is then as it was):
        ValueError: a mask that keeps more than 2 of 4 inputs somewhere, or masks for another model.
        UnsupportedModelError: weights that torch has no such tensors for: on another device, of another type, or of
            a size that is no multiple of what the hardware takes (torch's message says which).
    """
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    for name, mask in masks.items():
        wrong = fewer_zeros(mask)
        if wrong:
            raise ValueError(f"{name!r}: expected 2 of 4 inputs kept, got more in {wrong} groups: prune with NM(2, 4)")
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, found in masks.places(model).items():
        module, attribute = found[0]
        if not isinstance(module, nn.Linear) or attribute != "weight":
            continue
        weight = stored_parameter(module, attribute).detach()
        try:
            made[name] = module, to_sparse_semi_structured(weight.masked_fill(~masks[name].to(weight.device), 0))
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name!r} ({weight.dtype}, {tuple(weight.shape)}, on {weight.device}) has no semi-structured form: "
                f"{error}. Expected a CUDA device of capability 8.0 or later, and float16, bfloat16 or int8"
            ) from error
    masks.make_permanent(model)
    for module, sparse in made.values():
        module.weight = nn.Parameter(sparse, requires_grad=False)
    return list(made)


def fewer_zeros(mask: Tensor) -> int:
    """How many groups of 4 consecutive inputs keep more than 2; a rest that fills no group counts as one."""
    if mask.shape[-1] % GROUP:
        return 1
    return int((mask.reshape(-1, GROUP).sum(1) > KEPT).sum())
