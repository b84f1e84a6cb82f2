"""Distillation on samples and on their counterfactuals: pairs, loss, and the Trainer of transformers with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from looseleaf_leaf.batch import IGNORED, checked
from looseleaf_leaf.pruner import Counterfactuals
from looseleaf_leaf.sensitivity import at_least_float32

PREFIX = "counterfactual_"
READ = ("input_ids", "attention_mask", "position_ids")


def training_pairs(batch: Mapping[str, Any], changed: Counterfactuals) -> list[dict[str, list[int]]]:
    """The training set of :class:`looseleaf_leaf.LeaFTrainer`: each counterfactual beside the sample it comes from.

    A sample in which nothing was removed is its own counterfactual: both terms of the loss are then the same.

    Returns:
        Rows without padding: ``input_ids``, ``labels``, ``counterfactual_input_ids``, ``counterfactual_labels``; in the
        order of the samples.
    """
    full = checked(batch)

    def plain(source: Mapping[str, Tensor], row: int) -> tuple[list[int], list[int]]:
        real = source["attention_mask"][row].bool()
        return source["input_ids"][row][real].tolist(), source["labels"][row][real].tolist()

    out = []
    for row in range(len(full["input_ids"])):
        ids, labels = plain(full, row)
        own = (changed.source == row).nonzero().flatten().tolist()
        for other_ids, other_labels in [plain(changed.batch, at) for at in own] or [(ids, labels)]:
            out.append({"input_ids": ids, "labels": labels, "counterfactual_input_ids": other_ids,
                        "counterfactual_labels": other_labels})
    return out


@dataclass
class PairCollator:
    """Pads rows of :func:`training_pairs` on the right and stacks them, with the attention masks.

    Args:
        pad_token_id: fills ``input_ids``; any id will do, for padding is not attended to.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors (B, L) for the samples and (B, L') under names with ``counterfactual_`` before them."""
        out = {}
        for prefix in ("", "counterfactual_"):
            if prefix + "input_ids" not in rows[0]:
                continue
            ids = [torch.as_tensor(row[prefix + "input_ids"]) for row in rows]
            labels = [torch.as_tensor(row[prefix + "labels"]) for row in rows]
            pad = torch.nn.utils.rnn.pad_sequence
            out[prefix + "input_ids"] = pad(ids, batch_first=True, padding_value=self.pad_token_id)
            out[prefix + "labels"] = pad(labels, batch_first=True, padding_value=IGNORED)
            out[prefix + "attention_mask"] = pad([torch.ones_like(i) for i in ids], batch_first=True)
        return out


def response_kl(teacher: Tensor, student: Tensor, labels: Tensor, *, temperature: float = 1.0,
                count: Tensor | int | None = None) -> Tensor:
    """KL(teacher || student) over the positions that predict the response, nats per token.

    Args:
        teacher, student: logits (B, L, V); no gradient goes to the teacher's.
        labels: (B, L), -100 outside the response; the logits at i predict the label at i + 1.
        temperature: both distributions are softened by it, and the loss is multiplied by its square, so that gradients
            keep their size.
        count: divide the sum over positions by this; None: by the number of positions (their mean).

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: vocabularies of different size.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"the teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}"
                         ": distillation compares distributions over one vocabulary. Where only the padding of the "
                         "embeddings differs, give vocabulary=len(tokenizer)")
    at = labels[:, 1:] != IGNORED
    log_teacher = torch.log_softmax(at_least_float32(teacher[:, :-1][at].detach()) / temperature, -1)
    log_student = torch.log_softmax(at_least_float32(student[:, :-1][at]) / temperature, -1)
    # a probability of zero times a log of minus infinity is zero: nothing of that token is to be learned
    terms = torch.where(log_teacher.isneginf(), 0.0, log_teacher.exp() * (log_teacher - log_student))
    total = terms.sum() * temperature ** 2
    return total / (at.sum().clamp(min=1) if count is None else count)


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
        for name, value, ok, expected in (
                ("lambda_", lambda_, 0 <= lambda_ <= 1, "a number in [0, 1]"),
                ("temperature", temperature, 0 < temperature < float("inf"), "a number > 0"),
                ("ce", ce, 0 <= ce < float("inf"), "a number >= 0"),
                ("vocabulary", vocabulary, vocabulary is None or vocabulary >= 1, "None or an integer >= 1")):
            if not ok:
                raise ValueError(f"LeaFTrainer.{name}: expected {expected}, got {value!r}")
        if not isinstance(teacher, nn.Module):
            raise ValueError(f"LeaFTrainer.teacher: expected a torch module, got {type(teacher).__name__}")
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
