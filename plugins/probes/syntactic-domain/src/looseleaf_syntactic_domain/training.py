"""Controlled fine-tuning of a model of your own on the questions of ``build``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.modes import own_random_state, with_gradients
from looseleaf_syntactic_domain.facts import Row
from looseleaf_text import LocalModel


def fine_tune(model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, peft_config: Any = None, epochs: float = 3,
              lr: float = 1e-4, batch: int = 8, seed: int = 0, output_dir: str | os.PathLike[str] | None = None,
              progress: bool = False, **arguments: Any) -> tuple[nn.Module, list[float]]:
    """Train on solved questions with the ``Trainer`` of transformers; the loss is that of the answers' tokens alone.

    Needs ``pip install 'looseleaf-syntactic-domain[train]'``.

    Args:
        model: a causal language model in float32 or bfloat16; trained in place unless there is a ``peft_config``.
        tokenizer: the model's.
        rows: see :func:`build`.
        peft_config: such as ``peft.LoraConfig(r=8)``: adapters are trained, the weights stay.
        epochs, lr, batch: number of epochs, highest learning rate, questions of a step.
        seed: of the order and of new adapters.
        output_dir: checkpoints go there after each epoch, and a run that was stopped goes on; None: nothing is kept.
        progress: show the trainer's progress bar.
        arguments: further fields of ``transformers.TrainingArguments``.

    Returns:
        The trained model, with adapters where there are any, in evaluation mode; and the loss of each step.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: expected solved questions as build makes them, got none")
    from transformers import Trainer, TrainingArguments

    local = LocalModel(model, tokenizer)
    prompts, answers = local.encode_pairs([row.prompt for row in rows], [[row.answer] for row in rows])
    end = getattr(tokenizer, "eos_token_id", None)
    examples = []
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        learned = [*answer, *([] if end is None else [end])]
        examples.append({"input_ids": [*prompt, *learned], "labels": [-100] * len(prompt) + learned})
    with own_random_state(seed), with_gradients(), tempfile.TemporaryDirectory() as temporary:
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        folder = Path(output_dir or temporary)
        options = {"num_train_epochs": epochs, "learning_rate": lr, "per_device_train_batch_size": batch, "seed": seed,
                   "output_dir": str(folder), "report_to": "none", "logging_steps": 1, "disable_tqdm": not progress,
                   "save_strategy": "epoch" if output_dir else "no", "remove_unused_columns": False,
                   "use_cpu": next(model.parameters()).device.type == "cpu", "log_level": "error", **arguments}
        trainer = Trainer(model=model, args=TrainingArguments(**options), data_collator=_padded,
                          train_dataset=examples)  # type: ignore[arg-type]
        if not progress:
            from transformers.trainer_callback import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=bool(output_dir) and any(folder.glob("checkpoint-*")))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.eval(), losses


def _padded(examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([[*e[name], *[value] * (width - len(e[name]))] for e in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


__all__ = ["fine_tune"]
