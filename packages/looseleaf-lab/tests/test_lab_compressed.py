"""The compressed-tensors format: `nox -s rivals` has a version of the library that still knows it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import looseleaf
from looseleaf import NM, Unstructured
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_lab.compressed import MissingFormatError, save_compressed

pytest.importorskip("transformers", reason="transformers is not installed")


def knows_the_format() -> bool:
    try:
        return importlib.util.find_spec("compressed_tensors.compressors.sparse_compressors") is not None
    except ModuleNotFoundError:
        return False


def masks_of(model: Any, rule: Any) -> looseleaf.Masks:
    masks: looseleaf.Masks = rule.select({n: p.detach().abs() for n, p in looseleaf.prunable_parameters(model).items()})
    return masks


@pytest.mark.skipif(knows_the_format(), reason="the format is here")
def test_without_the_format_the_error_says_what_to_do(tmp_path: Path) -> None:
    model = tiny_text_llama()
    with pytest.raises(MissingFormatError, match=r"compressed-tensors.*pip install 'compressed-tensors<0\.15'"):
        save_compressed(model, tiny_tokenizer(), masks_of(model, NM(2, 4)), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not knows_the_format(), reason="needs compressed-tensors below 0.15: nox -s rivals")
def test_what_is_written_is_read_by_the_library(tmp_path: Path) -> None:
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskCompressor
    from compressed_tensors.config.sparse_24_bitmask import Sparse24BitMaskConfig

    model = tiny_text_llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    masks = masks_of(model, NM(2, 4))
    folder = tmp_path / "small"
    assert save_compressed(model, tiny_tokenizer(), masks, folder) == list(masks)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "the model itself is as it was"
    read = dict(Sparse24BitMaskCompressor(config=Sparse24BitMaskConfig()).decompress(str(folder)))
    for name, value in before.items():
        expected = value * masks[name] if name in masks else value
        assert torch.equal(read[name], expected), name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["sparsity_config"]["format"] == "sparse-24-bitmask"
    model.save_pretrained(tmp_path / "dense")
    sizes = [(tmp_path / f / "model.safetensors").stat().st_size for f in ("small", "dense")]
    covered = sum(m.numel() for m in masks.values()) * 4
    assert sizes[1] - sizes[0] > 0.4 * covered, "half of the covered weights, less a bit each"
    with pytest.raises(ValueError, match="there is something already"):
        save_compressed(model, tiny_tokenizer(), masks, folder)
    with pytest.raises(ValueError, match=r"expected 2 of 4 inputs kept, got more"):
        save_compressed(model, tiny_tokenizer(), masks_of(model, Unstructured(0.5)), tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "small"]
