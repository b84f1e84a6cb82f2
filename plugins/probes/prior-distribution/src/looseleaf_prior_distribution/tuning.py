"""Light tuning of a few layers, so that the answer comes from the input and not from the prior."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf import progress as progress_
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, frozen, with_gradients
from looseleaf_prior_distribution.tasks import PriorTask
from looseleaf_text import LocalModel, decoder_layers

FORMAT = "looseleaf.tuned-layers/1"


class Tuned:
    """Weights of some layers after tuning.

    Attributes:
        weights: parameter name -> tensor, on the CPU.
        info: how they were made; ``loss`` has the mean loss of each epoch, nats per token.
    """

    def __init__(self, weights: Mapping[str, Tensor], info: dict[str, Any] | None = None) -> None:
        self.weights = {name: value.detach().cpu() for name, value in weights.items()}
        self.info = dict(info or {})

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """The tuned weights while the ``with`` block runs, the model's own ones afterwards.

        Raises:
            ValueError: the model has no such parameters, or of another shape.
        """
        parameters = self._parameters(model)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self.bake(model)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

    def bake(self, model: nn.Module) -> None:
        """Put the tuned weights into the model for good.

        Raises:
            ValueError: as :meth:`apply`.
        """
        with torch.no_grad():
            for name, parameter in self._parameters(model).items():
                parameter.copy_(self.weights[name])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, atomically."""
        save_tensors(path, self.weights, self.info, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuned:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not such a file.
        """
        return cls(*load_tensors(path, format=FORMAT))

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = dict(model.named_parameters())
        for name, weight in self.weights.items():
            shape = tuple(found[name].shape) if name in found else None
            if shape != tuple(weight.shape):
                raise ValueError(f"these layers were tuned in another model: {name} has shape {tuple(weight.shape)}, "
                                 f"{type(model).__name__} has {'none of that name' if shape is None else shape}")
        return {name: found[name] for name in self.weights}


def mitigate(model: nn.Module, tokenizer: Any, task: PriorTask, layers: Sequence[int], *, epochs: int = 3,
             lr: float = 1e-4, pack: int = 12, seed: int = 0, progress: bool | None = None) -> Tuned:
    """Tune the weights of a few layers on a task's questions, in its basic prompt format.

    Questions are packed, solved, one after the other into one text, so that each is asked after those before it, as it
    is after demonstrations; the loss is that of the answers' tokens alone. AdamW, the learning rate falling linearly to
    zero. The model itself is left as it was: the result holds the tuned weights.

    Args:
        model: a decoder of transformers, in single precision.
        tokenizer: the model's.
        task: what to train on; its demonstrations are not used.
        layers: which layers, from 0; negative ones count from the end.
        epochs: number of epochs.
        lr: learning rate of the first step.
        pack: questions per text.
        seed: of the order.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no such layer, a value out of range, a model in half precision, or a loss that is not finite.
    """
    if epochs < 1 or pack < 1 or not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"mitigate: expected epochs >= 1, pack >= 1 and lr > 0, got epochs={epochs}, pack={pack}, "
                         f"lr={lr}")
    chosen = _layers(model, layers)
    names = [n for n, _ in model.named_parameters() if n.startswith(tuple(f"{layer}." for layer in chosen))]
    parameters = dict(model.named_parameters())
    tuned = [parameters[n] for n in names]
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in tuned):
        raise ValueError(f"expected a model in float32, got {tuned[0].dtype}, where small steps are lost: load it with "
                         "dtype=torch.float32")
    local = LocalModel(model, tokenizer)
    rng = random.Random(seed)
    texts = [_packs(local, task, pack, rng) for _ in range(epochs)]
    total = sum(map(len, texts))
    losses: list[float] = []
    with with_gradients(), _only(model, tuned), progress_.bar("tuning", total, progress) as moving:
        before = [p.detach().clone() for p in tuned]
        try:
            optimiser = torch.optim.AdamW(tuned, lr=lr, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
            for epoch in texts:
                seen: list[float] = []
                for ids, targets in epoch:
                    loss = _loss(model, ids, targets)
                    if not math.isfinite(float(loss.detach())):
                        raise ValueError(f"the loss is {float(loss.detach())}: choose a smaller lr than {lr}")
                    optimiser.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(tuned, 1.0)
                    optimiser.step()
                    schedule.step()
                    seen.append(float(loss.detach()))
                    moving.update(1)
                losses.append(sum(seen) / len(seen))
            return Tuned({n: p.detach().clone() for n, p in zip(names, tuned, strict=True)}, {
                "layers": [int(layer.rpartition(".")[2]) for layer in chosen], "epochs": epochs, "lr": lr,
                "questions": len(task.instances), "seed": seed, "loss": losses})
        finally:
            with torch.no_grad():
                for parameter, value in zip(tuned, before, strict=True):
                    parameter.copy_(value)


def _layers(model: nn.Module, layers: Sequence[int]) -> list[str]:
    found = list(decoder_layers(model))
    if not layers:
        raise ValueError("layers: expected one layer or more, got none")
    for layer in layers:
        if not -len(found) <= layer < len(found):
            raise ValueError(f"layers: expected {-len(found)} to {len(found) - 1}, got {layer}")
    return list(dict.fromkeys(found[layer] for layer in layers))


def _packs(local: LocalModel, task: PriorTask, pack: int, rng: random.Random) -> list[tuple[Tensor, Tensor]]:
    """Texts of ``pack`` solved questions as (ids (L,), targets (L,)); the target is -100 but where an answer is due."""
    order = rng.sample(range(len(task.instances)), len(task.instances))
    out = []
    for start in range(0, len(order), pack):
        chosen = [task.instances[n] for n in order[start:start + pack]]
        before = ["".join(map(task.line, chosen[:i])) for i in range(len(chosen))]
        prompts = [text + task.template.replace("{input}", i.text) for text, i in zip(before, chosen, strict=True)]
        heads, tails = local.encode_pairs(prompts, [[task.continuation(i.answer)] for i in chosen])
        whole = [*heads[-1], *tails[-1][0]]
        targets = [-100] * len(whole)
        for head, (tail,) in zip(heads, tails, strict=True):
            # a tokenizer may join an answer with what follows it: such an answer is read, not learned
            if whole[:len(head) + len(tail)] == [*head, *tail]:
                targets[len(head) - 1:len(head) - 1 + len(tail)] = tail
        out.append((torch.tensor(whole, device=local.device), torch.tensor(targets, device=local.device)))
    return out


def _loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    places = (targets != -100).nonzero()[:, 0]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, places]
    return functional.cross_entropy(logits.float(), targets[places])


@contextmanager
def _only(model: nn.Module, tuned: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``tuned`` alone, evaluation mode; both, and the gradients, as before afterwards."""
    before = [(p, p.grad) for p in model.parameters()]
    try:
        with evaluating(model), frozen(model):
            for p, _ in before:
                p.grad = None
            for p in tuned:
                p.requires_grad_(True)
            yield
    finally:
        for p, gradient in before:
            p.grad = gradient
