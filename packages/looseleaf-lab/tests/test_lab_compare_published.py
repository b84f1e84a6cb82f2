"""Wanda and SparseGPT through llm-compressor, in an environment that has it (`nox -s rivals`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import looseleaf
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_lab import models
from looseleaf_lab.benches import compare_pruners, llm_compressor

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: nox -s rivals")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.save(tiny_text_llama(), tiny_tokenizer(), folder)
    return models.load(str(folder))[0]  # llm-compressor reads the configuration again from where the model was


def batches() -> list[dict[str, Any]]:
    ids = torch.arange(256).view(4, 1, 64) * 7 % 61
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


@pytest.mark.parametrize("name", list(llm_compressor.METHODS))
@pytest.mark.parametrize(("sparsity", "structure"), [(0.5, "0:0"), (0.25, "0:0"), (0.5, "2:4"), (0.0, "0:0")])
def test_a_pruned_copy(model: Any, name: str, sparsity: float, structure: str) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    out = llm_compressor.Published(name, tiny_tokenizer(), sparsity, structure).pruned(model, batches())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "the model itself is as it was"
    body = looseleaf.prunable_parameters(out)
    for weight_name, weight in body.items():
        gone = weight == 0
        assert abs(float(gone.float().mean()) - sparsity) < 0.05, weight_name
        if structure == "2:4":
            assert bool((gone.view(-1, 4).sum(1) >= 2).all())
        if name == "(Wanda)":
            assert torch.equal(weight[~gone], before[weight_name][~gone]), "Wanda leaves kept weights alone"
    rest = [n for n, _ in out.named_parameters() if n not in body]
    assert all(torch.equal(dict(out.named_parameters())[n], before[n]) for n in rest)


def test_in_the_comparison(model: Any) -> None:
    report = compare_pruners(model, tiny_tokenizer(), {}, [0.25, 0.5], context=32, windows=2,
                                     batches=batches())
    table = next(t for t in report.tables if t.title == "Pruning without retraining")
    found = [row[:2] for row in table.rows]
    assert all([name, s] in found for name in llm_compressor.METHODS for s in (0.25, 0.5))
    assert "Left out" not in [t.title for t in report.tables]
