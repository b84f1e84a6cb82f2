"""Prompt ensembling (survey, section 5.1): several prompts answer, and their answers become one.

The ensemble itself is :class:`looseleaf_text.EnsemblePrompt`; here are its weights, and what it is good for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from looseleaf import Example, Prompt, Task
from looseleaf.modes import evaluating
from looseleaf_text import EnsemblePrompt, LanguageModel, LocalModel
from looseleaf_text.ensemble import normalised_weights
from looseleaf_text.verbalizer import log_normalised

Rows = Sequence[Sequence[float]]


def fit_ensemble(prompts: Sequence[Prompt], task: Task, model: LanguageModel, examples: Sequence[Example],
                 by: Literal["likelihood", "accuracy"] = "likelihood") -> EnsemblePrompt:
    """An ensemble of ``prompts`` with weights learned from labelled examples.

    Args:
        prompts: the members, for the task's classes.
        task: a classification task.
        model: what the prompts are for; one call for each member and example.
        examples: what the weights are fitted to; not those of the final figure.
        by: see :func:`likelihood_weights` and :func:`accuracy_weights`.

    Raises:
        ValueError: another ``by``, no prompts, or a task without classes.
    """
    if by not in ("likelihood", "accuracy"):
        raise ValueError(f"by: expected 'likelihood' or 'accuracy', got {by!r}")
    targets = target_places(task, examples)
    rows = [task.class_scores(p.on(model), examples) for p in prompts]
    fit = likelihood_weights if by == "likelihood" else accuracy_weights
    return EnsemblePrompt(prompts, fit(rows, targets) if rows else None)


def distil(prompt: Prompt, model: LanguageModel, unlabelled: Sequence[Example]) -> list[Example]:
    """Knowledge distillation: the examples with what ``prompt`` predicts, for one model or prompt to learn from."""
    return [Example(e.inputs, label) for e, label in zip(unlabelled, prompt.on(model).predict(unlabelled), strict=True)]


def generate_together(ensemble: EnsemblePrompt, example: Example, model: LocalModel, max_tokens: int = 16) -> str:
    """Text generation: at each step the likeliest token under the weighted mean of next-token probabilities.

    Args:
        ensemble: of prompts of text.
        example: the input.
        model: a local model; its next-token probabilities are needed in full.
        max_tokens: longest text.
    """
    import torch

    weights = normalised_weights(ensemble.weights, len(ensemble.members))
    members: Sequence[Any] = ensemble.members
    heads = [model.tokenizer(p.render(example))["input_ids"] for p in members]
    ends = {model.tokenizer.eos_token_id}
    ids: list[int] = []
    with evaluating(model.model), torch.inference_mode():
        for _ in range(max_tokens):
            mean: Any = sum(
                weight * model.model(input_ids=torch.tensor([[*head, *ids]], device=model.device))
                .logits[0, -1].float().softmax(-1) for weight, head in zip(weights, heads, strict=True))
            model.calls += len(heads)
            model.tokens += sum(len(head) + len(ids) for head in heads)
            token = int(mean.argmax())
            if token in ends:
                break
            ids.append(token)
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


def target_places(task: Task, examples: Sequence[Example]) -> list[int]:
    """The place of each example's target among the task's classes.

    Raises:
        ValueError: the task has no classes.
    """
    if task.classes is None:
        raise ValueError(f"task {task.name!r}: expected a task with labels, to which weights are fitted, got one "
                         "without")
    classes = list(task.classes)
    return [classes.index(e.target) for e in examples]


def likeliest(row: Sequence[float]) -> int:
    """The place of the highest number, the first of equals."""
    return max(range(len(row)), key=row.__getitem__)


def accuracy_weights(members: Sequence[Rows], targets: Sequence[int]) -> list[float]:
    """Weights in proportion to accuracy, as PET weighs its patterns (Schick and Schuetze 2021); they sum to one.

    Args:
        members: (prompts, examples, labels) natural-log probabilities.
        targets: place of the right label of each example.
    """
    rates = [float(sum(likeliest(row) == target for row, target in zip(rows, targets, strict=True)))
             for rows in members]
    return normalised_weights(rates if any(rates) else None, len(members))


def likelihood_weights(members: Sequence[Rows], targets: Sequence[int], steps: int = 500,
                       tolerance: float = 1e-9) -> list[float]:
    """Weights that make the right labels likeliest under the mean of probabilities, by EM; they sum to one.

    The likelihood is concave in the weights, so there is one maximum and every step comes nearer to it. Weights
    learned by the likelihood of the right answers are those of Jiang et al. 2020, who average log-probabilities.

    Args:
        members: (prompts, examples, labels) natural-log probabilities; need not be normalised.
        targets: place of the right label of each example.
        steps: most steps.
        tolerance: the largest change of a weight that ends the search.
    """
    right = [[math.exp(log_normalised(row)[target]) for row, target in zip(rows, targets, strict=True)]
             for rows in members]
    weights = normalised_weights(None, len(right))
    for _ in range(steps):
        mixed = [sum(w * p for w, p in zip(weights, column, strict=True)) for column in zip(*right, strict=True)]
        # An example to which no member gives any probability says nothing about the weights.
        informative = [n for n, m in enumerate(mixed) if m > 0]
        if not informative:
            break
        new = [w * sum(row[n] / mixed[n] for n in informative) / len(informative)
               for w, row in zip(weights, right, strict=True)]
        change = max(abs(a - b) for a, b in zip(new, weights, strict=True))
        weights = new
        if change < tolerance:
            break
    return normalised_weights(weights, len(weights))


def log_likelihood(rows: Rows, targets: Sequence[int]) -> float:
    """Mean natural-log probability of the right label, rows normalised, none below -100."""
    return sum(max(log_normalised(row)[target], -100.0)
               for row, target in zip(rows, targets, strict=True)) / len(targets)


def score_rows(task: Task, rows: list[list[float]], examples: Sequence[Example]) -> float:
    """The score by the task's metric of class scores that are there already, as ``task.evaluate`` gives it."""
    classes = list(task.classes or ())
    return task.rate([classes[likeliest(row)] for row in rows], examples, rows).score
