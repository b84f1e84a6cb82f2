"""The training of a search: charged to its budget, stopped and gone on with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from looseleaf.prompts.optimizer import Search
from looseleaf.resume import StateError
from looseleaf_cings.trainer import ADAPTER, CInGSTrainer, load_adapter


def draw(wrapped: Any, seed: int) -> None:
    """First weights of a LoRA from a generator of its own: A as PEFT draws them, B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if f".lora_A.{ADAPTER}." in name:
            bound = 1 / math.sqrt(parameter.shape[-1])
            drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(drawn.to(parameter))


class Training(CInGSTrainer):
    """The trainer of a search: what it does is charged to the budget first, and a stopped search goes on."""

    def __init__(self, search: Search, model: Any, rows: list[dict[str, list[int]]], folder: Path | None, scratch: str,
                 *, steps: int | None, epochs: int, batch_size: int, micro_batch_size: int,
                 learning_rate: float) -> None:
        micro = min(micro_batch_size, batch_size)
        accumulation = batch_size // micro
        self.total = steps or epochs * math.ceil(math.ceil(len(rows) / micro) / accumulation)
        device = next(model.parameters()).device
        super().__init__(model=model, train_dataset=rows, callbacks=[Steps(self)], args=TrainingArguments(
            output_dir=str(folder or scratch), per_device_train_batch_size=micro, max_steps=self.total,
            gradient_accumulation_steps=accumulation, learning_rate=learning_rate, seed=search.seed,
            save_strategy="no" if folder is None else "steps", save_steps=max(1, self.total // 20), save_total_limit=2,
            logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu"))
        self.remove_callback(PrinterCallback)
        self.args._n_gpu = min(1, self.args.n_gpu)  # no DataParallel
        self.search, self.folder, self.trained = search, folder, False
        self.progress_bar: Any = None
        self.losses: list[float] = search.state["losses"]
        self._sum = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro batch."""
        self.search.budget.spend(calls=len(inputs["input_ids"]), tokens=int(inputs["attention_mask"].sum()))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._sum += float(loss)
        return loss

    def run(self) -> None:
        """Train from where the search is."""
        checkpoint = self.search.state.get("checkpoint")
        del self.losses[checkpoint or 0:]
        self.search.done = checkpoint or 0
        self.trained = True
        self.train(resume_from_checkpoint=str(self._saved()) if checkpoint else None)

    def load(self) -> None:
        """The adapter of the last checkpoint."""
        load_adapter(self.model, load_file(self._saved() / ADAPTER / WEIGHTS))

    def _saved(self) -> Path:
        path = Path(str(self.args.output_dir)) / f"checkpoint-{self.search.state['checkpoint']}"
        if not (path / ADAPTER / WEIGHTS).is_file():
            raise StateError(f"{path}: expected the checkpoint of a search that was stopped, got nothing: remove the "
                             "state_dir to begin again")
        return path


class Steps(TrainerCallback):
    """Counts the steps, and keeps the state of the search in line with the trainer's checkpoints."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The loss of the step, and whether it ends the training."""
        trainer = self.trainer
        trainer.losses.append(trainer._sum)
        trainer._sum = 0.0
        trainer.search.done = state.global_step
        trainer.progress_bar.update()
        if trainer.folder is not None and state.global_step == trainer.total:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The checkpoint is complete: the search may go on from it."""
        self.trainer.search.state["checkpoint"] = state.global_step
        self.trainer.search.save()


__all__ = ["Training", "draw"]
