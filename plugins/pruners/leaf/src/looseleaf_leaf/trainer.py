"""The Trainer of transformers with the paper's distillation loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from looseleaf_leaf.batch import IGNORED
from looseleaf_leaf.counterfactual import PairCollator
from looseleaf_leaf.loss import response_kl

PREFIX = "counterfactual_"
READ = ("input_ids", "attention_mask", "position_ids")


class LeaFTrainer(Trainer):
    """Distils from a teacher on samples X and on their counterfactuals X \\ A:

    ``lambda_ * KL(p_T(.|X) || p_S(.|X)) + (1 - lambda_) * KL(p_T(.|X \\ A) || p_S(.|X \\ A)) + ce * CE(X)``,

    each the mean over the response tokens of the whole step, gradient accumulation included: a sample and its
    counterfactual have equally many. Everything else is the Trainer's, PEFT models too. [section 3.2 of the paper]

    Args:
        model, args and what else :class:`transformers.Trainer` takes, by name. ``train_dataset`` are the rows of
            :func:`looseleaf_leaf.training_pairs`; ``data_collator`` is :class:`looseleaf_leaf.PairCollator` unless
            given; ``args.remove_unused_columns`` is set to False, or the counterfactuals would not arrive.
        teacher: the model to learn from, with the student's tokenizer; it is put in evaluation mode, on the device of
            the training (unless it is spread over several), and is not trained.
        lambda_: weight of the samples against the counterfactuals, 0 to 1; 1 is plain knowledge distillation, and
            counterfactuals are then not read at all.
        temperature: of both distributions, above 0; see :func:`looseleaf_leaf.response_kl`.
        ce: weight of the plain cross-entropy on the samples' labels, 0 or more.
        vocabulary: compare only the first so many logits, for models that pad their embeddings to different sizes;
            None: all of them.

    The paper's optimisation: learning rate 1e-5, 3 epochs; set them in ``args``.

    Raises:
        ValueError: a weight out of range; teacher and student with vocabularies of different size (when it trains).
    """

    def __init__(self, *, model: Any, teacher: nn.Module, args: Any = None, lambda_: float = 0.5,
                 temperature: float = 1.0, ce: float = 0.0, vocabulary: int | None = None, **rest: Any) -> None:
        for name, value, ok, allowed in (
                ("lambda_", lambda_, 0 <= lambda_ <= 1, "0 <= lambda_ <= 1"),
                ("temperature", temperature, 0 < temperature < float("inf"), "temperature > 0"),
                ("ce", ce, 0 <= ce < float("inf"), "ce >= 0"),
                ("vocabulary", vocabulary, vocabulary is None or vocabulary >= 1, "None, or 1 and more")):
            if not ok:
                raise ValueError(f"LeaFTrainer: {name}={value!r}: allowed is {allowed}")
        if not isinstance(teacher, nn.Module):
            raise ValueError(f"LeaFTrainer: teacher is a {type(teacher).__name__}: allowed is a torch module")
        super().__init__(model=model, args=args, **{"data_collator": PairCollator(), **rest})
        self.args.remove_unused_columns = False
        self.model_accepts_loss_kwargs = True  # the loss below is normalised over the whole step
        self.lambda_, self.temperature, self.ce, self.vocabulary = lambda_, temperature, ce, vocabulary
        spread = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
        self.teacher = (teacher if spread else teacher.to(self.args.device)).eval()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:
        """The loss of a batch of :class:`PairCollator`; without counterfactuals each sample is its own."""
        whole = {key: inputs[key] for key in (*READ, "labels") if key in inputs}
        without = {key: inputs[PREFIX + key] for key in (*READ, "labels") if PREFIX + key in inputs} or whole
        count = num_items_in_batch
        loss: Tensor | float = 0.0
        outputs = None
        if self.lambda_ > 0 or self.ce > 0 or return_outputs or without is whole:
            outputs = self._read(model, whole)
            weight = 1.0 if without is whole else self.lambda_
            if weight > 0:
                loss = weight * self._kl(outputs, whole, count)
            if self.ce > 0:
                loss = loss + self.ce * self._ce(outputs, whole["labels"], count)
        if self.lambda_ < 1 and without is not whole:
            loss = loss + (1 - self.lambda_) * self._kl(self._read(model, without), without, count)
        if count is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return (loss, outputs) if return_outputs else loss

    def _read(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        return model(**{key: inputs[key] for key in READ if key in inputs})

    def _kl(self, outputs: Any, inputs: dict[str, Any], count: Tensor | int | None) -> Tensor:
        with torch.no_grad():
            target = self._read(self.teacher, inputs).logits
        logits = outputs.logits
        if self.vocabulary is not None:
            target, logits = target[..., :self.vocabulary], logits[..., :self.vocabulary]
        return response_kl(target, logits, inputs["labels"], temperature=self.temperature, count=count)

    def _ce(self, outputs: Any, labels: Tensor, count: Tensor | int | None) -> Tensor:
        at = labels[:, 1:] != IGNORED
        total = nn.functional.cross_entropy(outputs.logits[:, :-1][at].float(), labels[:, 1:][at], reduction="sum")
        return total / (at.sum().clamp(min=1) if count is None else count)
