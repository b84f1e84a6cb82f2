"""Small decoders with adapters on their attention, and batches of mixed lengths."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def _adapted(model, **options):
    """The model with LoRA on its attention, the adapters not zero; other weights are frozen."""
    peft = pytest.importorskip("peft")
    names = [n for n in ("q_proj", "k_proj", "v_proj", "o_proj", "dense")
             if any(name.endswith(n) for name, _ in model.named_modules())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=names,
                                                          init_lora_weights=False, **options))


def _gradients(model):
    """Name -> gradient of what is trained; they are gone from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _ids(*lengths, total=None, side="right", seed=0):
    """A batch of token ids with its mask and labels; padding at one side."""
    total = total or max(lengths)
    draw = torch.Generator().manual_seed(seed)
    batch = {"input_ids": torch.zeros(len(lengths), total, dtype=torch.long)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(total - length, total)
        batch["input_ids"][row, place] = torch.randint(3, 64, (length,), generator=draw)
        batch["attention_mask"][row, place] = 1
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.fixture
def adapted():
    return _adapted


@pytest.fixture
def gradients():
    return _gradients


@pytest.fixture
def ids():
    return _ids
