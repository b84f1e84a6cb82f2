"""Prompt ensembling (survey, section 5.1): several prompts answer, and their answers become one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from looseleaf_text import Example, LanguageModel, LocalModel, Prompt, Task
from looseleaf_text.answers import shares_of
from looseleaf_text.verbalizer import log_normalised

Rows = Sequence[Sequence[float]]


@dataclasses.dataclass
class PromptEnsemble:
    """Several prompts for one task, and how much each counts.

    Attributes:
        prompts: the members; two or more make sense.
        weights: one for each, from 0; None: all the same (uniform averaging).
        combine: ``"average"``: weighted mean of the probabilities; ``"vote"``: majority vote.
    """

    prompts: Sequence[Prompt]
    weights: list[float] | None = None
    combine: Literal["average", "vote"] = "average"

    def __post_init__(self) -> None:
        self.to_prompt()  # a core prompt checks weights and combine

    def to_prompt(self) -> Prompt:
        """The ensemble as one :class:`looseleaf_text.Prompt`, which ``Task.evaluate`` understands and which can be saved."""
        if not self.prompts:
            raise ValueError("an ensemble needs one prompt or more")
        return Prompt(members=self.prompts, weights=self.weights, combine=self.combine)

    @classmethod
    def fitted(cls, prompts: Sequence[Prompt], task: Task, model: LanguageModel, examples: Sequence[Example],
               by: Literal["likelihood", "accuracy"] = "likelihood") -> PromptEnsemble:
        """Weighted averaging with weights learned from labelled examples.

        Args:
            prompts: the members.
            task: a classification task.
            model: what the prompts are for.
            examples: what the weights are fitted to; not those of the final figure.
            by: see :func:`likelihood_weights` and :func:`accuracy_weights`.
        """
        golds = gold_places(task, examples)
        rows = [task.log_probs(p, model, examples) for p in prompts]
        return cls(prompts, (likelihood_weights if by == "likelihood" else accuracy_weights)(rows, golds))

    def distil(self, task: Task, model: LanguageModel, unlabelled: Sequence[Example]) -> list[Example]:
        """Knowledge distillation: the examples with the ensemble's labels, for one model or prompt to learn from."""
        labels = task.evaluate(self.to_prompt(), model, unlabelled).predictions
        return [dataclasses.replace(e, label=label) for e, label in zip(unlabelled, labels, strict=True)]

    def generate(self, example: Example, model: LocalModel, max_tokens: int = 16) -> str:
        """Text generation: at each step the likeliest token under the weighted mean of next-token probabilities.

        Args:
            example: the input.
            model: a local model; its next-token probabilities are needed in full.
            max_tokens: longest text.
        """
        import torch

        shares = shares_of(self.weights, len(self.prompts))
        heads = [model.tokenizer(p.render(example))["input_ids"] for p in self.prompts]
        ends = {model.tokenizer.eos_token_id}
        made: list[int] = []
        with torch.inference_mode():
            for _ in range(max_tokens):
                mean: Any = sum(
                    share * model.model(input_ids=torch.tensor([[*head, *made]], device=model.device))
                    .logits[0, -1].float().softmax(-1) for share, head in zip(shares, heads, strict=True))
                model.calls += len(heads)
                model.tokens += sum(len(head) + len(made) for head in heads)
                token = int(mean.argmax())
                if token in ends:
                    break
                made.append(token)
        return str(model.tokenizer.decode(made, skip_special_tokens=True))


def gold_places(task: Task, examples: Sequence[Example]) -> list[int]:
    """The place of each example's label among the task's."""
    if task.labels is None:
        raise ValueError(f"task {task.name!r} has no labels: weights are fitted to classification tasks")
    names = list(task.labels)
    return [names.index(str(e.label)) for e in examples]


def accuracy_weights(members: Sequence[Rows], golds: Sequence[int]) -> list[float]:
    """Weights in proportion to accuracy, as PET weighs its patterns (Schick and Schuetze 2021); they sum to one.

    Args:
        members: (prompts, examples, labels) natural-log probabilities.
        golds: place of the right label of each example.
    """
    rates = [sum(max(range(len(row)), key=row.__getitem__) == gold for row, gold in zip(rows, golds, strict=True))
             for rows in members]
    return shares_of([float(r) for r in rates] if any(rates) else None, len(members))


def likelihood_weights(members: Sequence[Rows], golds: Sequence[int], steps: int = 500,
                       tolerance: float = 1e-9) -> list[float]:
    """Weights that make the right labels likeliest under the mean of probabilities, found by EM; they sum to one.

    The likelihood is concave in the weights, so there is one maximum and every step comes nearer to it. Weights
    learned by the likelihood of the right answers are those of Jiang et al. 2020, who average log-probabilities.

    Args:
        members: (prompts, examples, labels) natural-log probabilities; need not be normalised.
        golds: place of the right label of each example.
        steps: most steps.
        tolerance: the largest change of a weight that ends the search.
    """
    right = [[math.exp(log_normalised(row)[gold]) for row, gold in zip(rows, golds, strict=True)] for rows in members]
    weights = shares_of(None, len(right))
    for _ in range(steps):
        mixed = [sum(w * p for w, p in zip(weights, column, strict=True)) for column in zip(*right, strict=True)]
        # An example to which no member gives any probability says nothing about the weights.
        told = [n for n, m in enumerate(mixed) if m > 0]
        if not told:
            break
        new = [w * sum(row[n] / mixed[n] for n in told) / len(told) for w, row in zip(weights, right, strict=True)]
        change = max(abs(a - b) for a, b in zip(new, weights, strict=True))
        weights = new
        if change < tolerance:
            break
    return shares_of(weights, len(weights))


def log_likelihood(rows: Rows, golds: Sequence[int]) -> float:
    """Mean natural-log probability of the right label, rows normalised."""
    return sum(max(log_normalised(row)[gold], -100.0) for row, gold in zip(rows, golds, strict=True)) / len(golds)


def accuracy(rows: Rows, golds: Sequence[int]) -> float:
    """Share of examples whose likeliest label is the right one; ties go to the first, as in ``Task.evaluate``."""
    return sum(max(range(len(row)), key=row.__getitem__) == gold
               for row, gold in zip(rows, golds, strict=True)) / len(golds)
