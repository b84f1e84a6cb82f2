"""A teacher and a batch for the conformance kit."""

from __future__ import annotations

from typing import Any

import torch

from looseleaf.testing.models import tied_llama as tiny_llama


def teacher() -> Any:
    """Another random Llama than the student of the kit."""
    model = tiny_llama()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)), alpha=0.1)
    return model


def batch(model: Any) -> dict[str, torch.Tensor]:
    """Two samples: template, instruction of 14 tokens, template, response of 3; the second is padded."""
    ids = torch.arange(40).view(2, 20) * 7 % 61
    labels = ids.clone()
    labels[:, :17] = -100
    labels[1, 19:] = -100
    attention = torch.ones_like(ids)
    attention[1, 19:] = 0
    instruction = torch.zeros_like(ids, dtype=torch.bool)
    instruction[:, 2:16] = True
    return {"input_ids": ids, "labels": labels, "attention_mask": attention, "instruction_mask": instruction}
