"""2:4 pruned models: tensors for the sparse tensor cores of NVIDIA GPUs, and the compressed-tensors format, where the
installed library still has it."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looseleaf import Masks
from looseleaf.errors import LooseleafError, UnsupportedModelError
from looseleaf.pruning.targets import stored_parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP, KEPT = 4, 2


class MissingFormatError(LooseleafError, ModuleNotFoundError):
    """compressed-tensors is not installed, or is of a version without this format."""


def save_compressed(model: Any, tokenizer: Any, masks: Masks, folder: str | os.PathLike[str]) -> list[str]:
    """Write a pruned model with its 2:4 weights as values and bit masks (``sparse-24-bitmask``), half the size.

    The weights that the masks cover are stored as ``<module>.compressed``, ``.bitmask`` and ``.shape``; the others as
    they are. ``config.json`` says so under ``quantization_config``. What reads it: versions of compressed-tensors up to
    0.14 and what is built on them. transformers 5.23 does not; :func:`looseleaf_lab.models.save` writes for it.

    Args:
        model: a transformers model, not changed.
        tokenizer: its tokenizer.
        masks: of the pattern 2:4 along the inputs, as ``NM(2, 4)`` makes them.
        folder: a new one, written atomically.

    Returns:
        The names of the weights that were compressed.

    Raises:
        MissingFormatError: the library, or the format in it, is missing.
        ValueError: a mask that keeps more than 2 of 4 inputs somewhere, masks for another model, or a folder with
            something in it.
    """
    from looseleaf_lab import models

    compressor, config = _library()
    for name, mask in masks.items():
        wrong = fewer_zeros(mask) if mask.ndim == 2 else 1
        if wrong:
            raise ValueError(f"{name!r}: expected 2 of 4 inputs kept, got more in {wrong} groups: prune Linear layers "
                             "with NM(2, 4)")
    pruned = copy.deepcopy(model)
    masks.make_permanent(pruned)
    target = models.new_folder(folder)
    # first the plain model, then its weights are replaced, and last the configuration; then it takes its place
    beside = target.with_name(f".{target.name}.part")
    models.save(pruned, tokenizer, beside)
    try:
        _compress(beside, masks, compressor, config)
        if target.is_dir():
            target.rmdir()
        os.replace(beside, target)
    finally:
        if beside.exists():
            shutil.rmtree(beside)
    return list(masks)


def _compress(folder: Path, masks: Masks, compressor: Any, config: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            dense = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        modules = {name.removesuffix(".weight") for name in dense if name in masks}
        save_file(compressor.compress(dense, modules), path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        raise ValueError("expected a model that save_pretrained writes to one file, got several: save it with "
                         "looseleaf_lab.models.save")
    whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense", "version": _version(),
                                    "sparsity_config": config.model_dump()}
    (folder / "config.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _library() -> tuple[Any, Any]:
    try:
        from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskCompressor
        from compressed_tensors.config.sparse_24_bitmask import Sparse24BitMaskConfig
    except ModuleNotFoundError as error:
        found = _version()
        what = f"compressed-tensors {found} has no 2:4 format any more" if found else \
            "compressed-tensors is not installed"
        raise MissingFormatError(f"{what}: pip install 'compressed-tensors<0.15', or keep the pruned model as it is "
                                 "(looseleaf_lab.models.save)") from error
    config = Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5)
    return Sparse24BitMaskCompressor(config=config), config


def _version() -> str | None:
    try:
        return importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        return None


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
                f"{name!r}: expected a CUDA device of capability 8.0 or later and float16, bfloat16 or int8, got "
                f"{weight.dtype}, {tuple(weight.shape)}, on {weight.device}, which has no semi-structured form: {error}"
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
