"""Training by transformers' Trainer, and adapters of PEFT that are in a model only for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from looseleaf import UnsupportedModelError, unwrapped
from looseleaf.modes import evaluating, frozen, own_random_state
from looseleaf_cings.features import IGNORED, Collator
from looseleaf_text import decoder_layers

ADAPTER = "cings"
"""Name of the adapter while it is in a model."""


def response_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the labelled tokens, nats per token; ``compute_loss_func`` of any trainer of transformers.

    Args:
        outputs: with ``logits`` (B, L, V).
        labels: (B, L), -100 where there is no loss; the logits at i predict the label at i + 1.
        num_items_in_batch: labelled tokens of the whole accumulated batch, by which the sum is divided, so that a
            token counts the same in short and long responses; None: those of these labels.

    Raises:
        ValueError: nothing is labelled.
    """
    at = labels[:, 1:] != IGNORED
    if num_items_in_batch is None and not bool(at.any()):
        raise ValueError("expected a batch with labelled tokens, got one where all labels are -100")
    logits = outputs.logits[:, :-1][at]
    total = nn.functional.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits,
                                        labels[:, 1:][at].to(logits.device), reduction="sum")
    return total / (at.sum() if num_items_in_batch is None else num_items_in_batch)


class CInGSTrainer(Trainer):
    """:class:`transformers.Trainer` for rows of :class:`Rows`, packed ones too; PEFT models as any others.

    It pads with :class:`Collator` and normalises the loss over the labelled tokens of the whole accumulated batch
    (:func:`response_loss`), whatever the model's own loss does.

    Args:
        model, args and what else :class:`transformers.Trainer` takes, by name. ``train_dataset``: rows with
            ``input_ids``, ``labels`` and ``attention_mask`` or ``position_ids``.

    Raises:
        UnsupportedModelError: while it trains, a model in which the parts of a packed row see one another.
    """

    def __init__(self, *, model: Any, args: Any = None, **rest: Any) -> None:
        super().__init__(model=model, args=args, **{"data_collator": Collator(), "compute_loss_func": response_loss,
                                                    **rest})
        self.args.remove_unused_columns = False  # labels are not for the model, but for the loss
        self._separates: bool | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """See :class:`transformers.Trainer`; the first packed batch is checked."""
        if "position_ids" in inputs and "attention_mask" not in inputs:
            inputs = {**inputs, "use_cache": False}
            if self._separates is None:
                self._separates = separates(model, inputs["input_ids"][:1], inputs["position_ids"][:1])
            if not self._separates:
                raise UnsupportedModelError(f"{type(unwrapped(model)).__name__}: expected a model that keeps packed "
                                            "rows apart, got one where they see one another: train on rows that are "
                                            "not packed, or choose another attn_implementation")
        return super().compute_loss(model, inputs, *arguments, **options)


@torch.no_grad()
def separates(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> bool:
    """Whether the second part of a packed row (1, L) is read as if it stood alone; True where there is only one."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist() + [input_ids.shape[1]]
    if len(starts) < 3:
        return True
    begin, end = starts[1:3]
    with evaluating(model):
        together = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, begin:end]
        alone = model(input_ids=input_ids[:, begin:end], use_cache=False).logits
    tolerance = 1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max().clamp(min=1.0))


def lora_config(model: Any, rank: int, alpha: float, fraction: float = 1.0) -> dict[str, Any]:
    """Settings of a LoRA on the Linear modules in the upper ``fraction`` of a decoder's layers, as plain data."""
    layers = list(decoder_layers(model))
    chosen = layers[len(layers) - max(1, round(fraction * len(layers))):]
    names = []
    for name, module in unwrapped(model).named_modules():
        own = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(own, (nn.Linear, Conv1D)) and ".lora_" not in name and ".base_layer" not in name and any(
                name.startswith(f"{layer}.") for layer in chosen):
            names.append(name)
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": names}


class _Adapted(peft.PeftModel):
    """A model with an adapter, whose checkpoints are for going on with, not for people."""

    def create_or_update_model_card(self, output_dir: str) -> None:
        """None is written: it takes longer than all the rest."""


@contextlib.contextmanager
def adapter_in(model: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Iterator[Any]:
    """An adapter of PEFT in ``model`` while the block lasts; afterwards every module and mode is the former one.

    Adapters that the model has already stay active beside it.

    Args:
        model: of transformers, wrapped or not.
        config: of :class:`peft.LoraConfig`.
        tensors: weights under PEFT's names; None: as they are at the beginning of a training, where the adapter
            changes nothing.

    Yields:
        The :class:`peft.PeftModel` around the innermost model, of which only the adapter is trainable.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    inner = unwrapped(model)
    former = {name: (module, list(module.active_adapters) if isinstance(module, BaseTunerLayer) else [])
              for name, module in inner.named_modules()}
    attributes = {name: vars(inner)[name] for name in ("peft_config",) if name in vars(inner)}
    configs = dict(attributes.get("peft_config", {}))
    gradients = [(parameter, parameter.grad) for parameter in inner.parameters()]
    with frozen(inner):
        try:
            with own_random_state(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is another adapter already
                wrapped = _Adapted(inner, peft.LoraConfig(**config), ADAPTER)  # type: ignore[arg-type]
                if tensors is not None:
                    load_adapter(wrapped, tensors)
            for name, (module, active) in former.items():
                if active and name in dict(inner.named_modules()):
                    module.set_adapter([*active, *([ADAPTER] if ADAPTER in getattr(module, "lora_A", ()) else [])])
            for name, parameter in inner.named_parameters():
                parameter.requires_grad_(f".{ADAPTER}." in name)
            yield wrapped
        finally:
            _remove(inner, former)
            for parameter, gradient in gradients:  # a trainer clears them
                parameter.grad = gradient
            if "peft_config" in vars(inner):
                if attributes:
                    inner.peft_config = attributes["peft_config"]
                    inner.peft_config.clear()
                    inner.peft_config.update(configs)
                else:
                    del inner.peft_config


def load_adapter(wrapped: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put weights under PEFT's names into the adapter of a model; ValueError where they do not fit."""
    try:
        result: Any = peft.set_peft_model_state_dict(wrapped, dict(tensors), adapter_name=ADAPTER)
        unexpected = list(result.unexpected_keys)
        missing = [name for name in result.missing_keys if f".{ADAPTER}." in name]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"an adapter that does not fit the model: {error}. Use it with the model it was trained on"
                         ) from error
    if unexpected or missing:
        raise ValueError(f"an adapter that does not fit the model: expected weights for {missing[:2] or 'its modules'},"
                         f" got {unexpected[:2] or 'none'}: use it with the model it was trained on")


def _remove(inner: nn.Module, former: Mapping[str, tuple[nn.Module, list[str]]]) -> None:
    """Put every module back that an adapter stands around, and take the adapter out of those that had others."""
    for name, (module, active) in former.items():
        parent, _, child = name.rpartition(".")
        if not name or (parent and parent not in former):
            continue
        owner = former[parent][0] if parent else inner
        if getattr(owner, child, None) is not module:
            setattr(owner, child, module)
        if isinstance(module, BaseTunerLayer) and ADAPTER in getattr(module, "lora_A", ()):
            module.delete_adapter(ADAPTER)
            module.set_adapter(active)
