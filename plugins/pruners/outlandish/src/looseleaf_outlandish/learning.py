"""Learning one text by a few gradient steps, and putting the weights back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf_outlandish.pruner import IgnoreTopK


def learn(model: nn.Module, tokenizer: Any, text: str, *, steps: int, lr: float, ordinary: Sequence[str] = (),
          replay: int = 2, seed: int = 0, pruner: IgnoreTopK | None = None, autocast: bool = False) -> Iterator[float]:
    """Full fine-tuning on ``text`` mixed with ordinary texts, one step for each value that is taken.

    Each step is one of AdamW (no weight decay, a constant rate) on a batch of ``text`` and ``replay`` ordinary texts;
    the loss is the mean over all their tokens. The model should be in evaluation mode: dropout would add noise.

    Args:
        model: a causal language model with ``input_ids`` and ``attention_mask``; all that requires a gradient learns.
        tokenizer: its tokenizer.
        text: what is to be learned.
        steps: how many steps.
        lr: learning rate.
        ordinary: texts to draw the replayed ones from; at least ``replay``.
        replay: ordinary texts in each step.
        seed: of the draws.
        pruner: prunes the updates, each or the whole as its ``when`` says.
        autocast: compute in bfloat16; the weights stay as they are.

    Yields:
        The loss of each step, after the step, in nats a token. With ``when="end"`` the update is pruned when the last
        value has been taken and the next is asked for, as a ``for`` loop does.

    Raises:
        ValueError: weights in half precision, in which small updates are lost, too few ordinary texts, or what
            :meth:`IgnoreTopK.attach` raises.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    coarse = next((n for n, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if coarse is not None:
        raise ValueError(f"{coarse!r} is {parameters[coarse].dtype}: most updates of fine-tuning are smaller than its "
                         "spacing and would be lost. Load the model with dtype=torch.float32")
    if not parameters:
        raise ValueError("no parameter requires a gradient: there is nothing to learn with")
    if replay > len(ordinary):
        raise ValueError(f"replay={replay} with {len(ordinary)} ordinary texts: give at least as many")
    draw = random.Random(seed)
    device = next(iter(parameters.values())).device
    # one pass over the weights instead of several; torch has it for these devices
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    pruning: Any = contextlib.nullcontext() if pruner is None else pruner.attach(optimizer, model)
    try:
        with pruning:
            for _ in range(steps):
                batch, labels = _batch(tokenizer, [text, *draw.sample(list(ordinary), replay)], device)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    logits: Tensor = model(**batch, use_cache=False).logits
                loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                yield float(loss.detach())
    finally:
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode within a ``with`` block; afterwards weights, buffers, gradients and modes are what they were.

    Yields:
        A function that puts weights and buffers back at once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [t.detach().clone() for t in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]

    @torch.no_grad()
    def back() -> None:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)

    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.grad = None
        yield back
    finally:
        back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _batch(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded ids and mask, and labels with -100 where there is no token to predict."""
    rows = [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)
