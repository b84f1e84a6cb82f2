"""Instruction, response and single-task tuning of a user's model, by transformers' ``Trainer``."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from looseleaf import progress as progress_
from looseleaf import unwrapped
from looseleaf.fingerprint import fingerprint
from looseleaf.modes import own_random_state, with_gradients
from looseleaf.resume import SearchState, digest
from looseleaf_implicit_instruction_tuning.pairs import IGNORED, Tags, features
from looseleaf_text import LocalModel

SCHEDULES = {"paper": ("cosine", 0.1), "code": ("linear", 0.03), "constant": ("constant", 0.0)}
"""Name -> schedule of the learning rate and fraction of warm-up steps; the paper's text and its code differ."""


def tune(model: Any, tokenizer: Any, data: Any, method: Literal["instruction", "response", "single-task"] =
         "instruction", *, tags: Tags | None = None, epochs: int = 10, batch: int = 64, device_batch: int = 8,
         lr: float = 1e-5, schedule: Literal["paper", "code", "constant"] = "paper", rank: int = 0,
         max_length: int = 2048, seed: int = 0, state_dir: str | os.PathLike[str] | None = None,
         progress: bool | None = None) -> Any:
    """Tune a causal language model on pairs; the loss is that of the response's tokens and the end of text.

    The model is trained where it is. Of a model that is PEFT's already, what is trainable is trained; with ``rank`` a
    LoRA is put into the others, and ``tuned.unload()`` gives the former model back.

    Args:
        model: of transformers, in float32 (or in half precision, where a LoRA in float32 is trained).
        tokenizer: the model's.
        data: pairs, see :func:`as_pairs`; two or more.
        method: ``"response"`` trains with every instruction empty, tags kept. ``"single-task"`` is ``"instruction"`` on
            pairs of one narrow task.
        tags: around the instructions; None: Tulu's.
        epochs: the paper chooses 5, 7, 10, 15 or 20 on validation data.
        batch: pairs for each step of the optimiser.
        device_batch: pairs that are forwarded at a time; divides ``batch`` where that is larger.
        lr: highest learning rate; the paper's 1e-5 is for all weights of 7B parameters (3e-6 for OLMo), a LoRA of a
            small model needs more.
        schedule: ``"paper"``: cosine after a warm-up of 10 %; ``"code"``: linear after 3 %.
        rank: of a LoRA on every linear layer, its alpha twice as much; 0 trains all weights.
        max_length: longest pair in tokens; longer ones are left out, with a warning.
        seed: of the order, and of the LoRA's beginning.
        state_dir: keeps a checkpoint of each epoch, from which the same call goes on after a stop.
        progress: show a progress bar; None: only on a terminal.

    Returns:
        The tuned model: ``model`` itself, or the :class:`peft.PeftModel` around it.

    Raises:
        ModuleNotFoundError: accelerate, or peft where ``rank`` asks for it, is not installed.
        ValueError: a number out of range, pairs that will not do, half precision without LoRA, or a loss not finite.
        StateError: ``state_dir`` holds another training.
    """
    for name, value in (("epochs", epochs), ("batch", batch), ("device_batch", device_batch),
                        ("max_length", max_length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"tune: {name}: expected an integer >= 1, got {value!r}")
    if not isinstance(rank, int) or rank < 0 or not lr > 0 or schedule not in SCHEDULES:
        raise ValueError(f"tune: expected rank >= 0, lr > 0 and schedule one of {', '.join(SCHEDULES)}, got rank="
                         f"{rank!r}, lr={lr!r}, schedule={schedule!r}")
    if batch > device_batch and batch % device_batch:
        raise ValueError(f"tune: device_batch: expected a divisor of batch={batch}, got {device_batch}")
    peft = _training_libraries(rank)
    import transformers

    local = LocalModel(model, tokenizer)
    rows, left_out = features(local, data, method=method, tags=tags, max_length=max_length)
    if len(rows) + left_out < 2:
        raise ValueError("data: expected 2 pairs or more, got 1")
    if left_out:
        warnings.warn(f"tune: {left_out} of {left_out + len(rows)} pairs are longer than {max_length} tokens and are "
                      "left out: raise max_length to train on them", stacklevel=2)
    state = SearchState(state_dir, {"method": method, "data": digest(rows), "epochs": epochs, "batch": batch, "lr": lr,
                                    "schedule": schedule, "rank": rank, "seed": seed, "model": _weights_of(
                                        model, state_dir)})
    going_on = state.load() is not None
    state.save({"pairs": len(rows)})
    inner = unwrapped(model)
    modes = [(module, module.training) for module in inner.modules()]
    config, generation = dict(vars(inner.config)), copy.deepcopy(getattr(inner, "generation_config", None))
    with own_random_state(seed), with_gradients(), tempfile.TemporaryDirectory() as scratch:
        tuned = model
        if peft is not None and not isinstance(model, peft.PeftModel):
            tuned = peft.get_peft_model(model, peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        half = [n for n, p in tuned.named_parameters() if p.requires_grad and p.dtype in (torch.float16,
                                                                                          torch.bfloat16)]
        if half:
            raise ValueError(f"tune: expected trained weights in float32, got half precision in {half[0]}, where small "
                             "steps are lost: load the model with dtype=torch.float32, or give rank=16 for a LoRA")
        if not any(p.requires_grad for p in tuned.parameters()):
            raise ValueError("tune: expected weights that can be trained, got a model whose parameters all have "
                             "requires_grad=False: unfreeze some, or give rank=16 for a LoRA")
        folder = Path(scratch if state_dir is None else state_dir)
        kind, warmup = SCHEDULES[schedule]
        each = min(batch, device_batch)
        steps = -(-len(rows) // batch) * epochs
        with progress_.bar(f"{method} tuning", steps, progress) as progress_bar:
            trainer = transformers.Trainer(
                model=tuned, train_dataset=rows, data_collator=_collate, compute_loss_func=response_loss,
                callbacks=[_callback(progress_bar)], args=transformers.TrainingArguments(
                    output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=each,
                    gradient_accumulation_steps=batch // each, learning_rate=lr, lr_scheduler_type=kind,
                    warmup_steps=round(warmup * steps), weight_decay=0.0, max_grad_norm=1.0, seed=seed, data_seed=seed,
                    remove_unused_columns=False, disable_tqdm=True, report_to="none", logging_steps=1,
                    use_cpu=local.device.type == "cpu", save_total_limit=1,
                    save_strategy="no" if state_dir is None else "epoch"))
            trainer.remove_callback(transformers.PrinterCallback)
            try:
                trainer.train(resume_from_checkpoint=(going_on and any(folder.glob("checkpoint-*"))) or None)
            finally:
                # whatever the trainer aligned
                vars(inner.config).clear()
                vars(inner.config).update(config)
                if generation is not None:
                    inner.generation_config = generation
                _restore(inner, modes)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not all(value == value and abs(value) != float("inf") for value in losses):
        raise ValueError(f"tune: expected finite losses, got {losses[-3:]}: lower lr={lr}")
    tuned.tuning_info = {"method": method, "pairs": len(rows), "left_out": left_out, "loss": losses}
    return tuned


def _weights_of(model: Any, state_dir: Any) -> str | None:
    """What tells the model apart, where that is kept: reading all weights takes time."""
    return None if state_dir is None else fingerprint(model)


def _restore(model: Any, modes: list[tuple[Any, bool]]) -> None:
    """Every module's former mode; those that an adapter brought get that of the whole model."""
    model.train(modes[0][1])
    for module, mode in modes:
        module.training = mode
    for parameter in model.parameters():
        parameter.grad = None


def response_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the labelled tokens, nats a token; ``compute_loss_func`` of any trainer of transformers.

    Args:
        outputs: with ``logits`` (B, L, V).
        labels: (B, L), -100 where there is no loss; the logits at i predict the label at i + 1.
        num_items_in_batch: labelled tokens by which the sum is divided; None: those of these labels.
    """
    at = labels[:, 1:] != IGNORED
    total = nn.functional.cross_entropy(outputs.logits[:, :-1][at].float(), labels[:, 1:][at], reduction="sum")
    return total / (at.sum() if num_items_in_batch is None else num_items_in_batch)


def _collate(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Rows padded on the right to the longest; the padding is masked and has no label."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.long),
             "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
             "labels": torch.full((len(rows), width), IGNORED, dtype=torch.long)}
    for n, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][n, :length] = torch.tensor(row["input_ids"])
        batch["labels"][n, :length] = torch.tensor(row["labels"])
        batch["attention_mask"][n, :length] = 1
    return batch


def _training_libraries(rank: int) -> Any:
    """PEFT where a LoRA is asked for, else None; what training needs must be installed."""
    try:
        import accelerate  # noqa: F401

        if not rank:
            return None
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"tune needs {error.name}, which is not installed: pip install "
                                  "'looseleaf-implicit-instruction-tuning[train]'") from error
    return peft


def _callback(progress_bar: Any) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            progress_bar.update()

    return Progress()


__all__ = ["SCHEDULES", "response_loss", "tune"]
