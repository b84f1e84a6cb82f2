"""What a model gives answers: sequence likelihoods, priors, and the same under the logit lens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from looseleaf_text import LocalModel, LogitLens
from looseleaf_prior_distribution.tasks import PriorTask


def priors(model: LocalModel, task: PriorTask, careful: bool = False) -> dict[str, float]:
    """Log prior of every answer: its log-likelihood after the prompt without a question, divided by its tokens.

    Args:
        model: the model.
        task: the task.
        careful: with the instruction of the prompting intervention.

    Returns:
        Answer -> nats a token.

    Raises:
        ValueError: two answers that the tokenizer makes the same tokens of.
    """
    prompt, texts = task.uninformative(careful), [task.continuation(a) for a in task.answers]
    heads, tails = model.encode_pairs([prompt], [texts])
    seen: dict[tuple[int, ...], str] = {}
    for answer, ids in zip(task.answers, tails[0], strict=True):
        if tuple(ids) in seen:
            raise ValueError(f"task {task.name!r}: the answers {seen[tuple(ids)]!r} and {answer!r} have the same "
                             "tokens, so the model cannot tell them apart: take one out of the answer space")
        seen[tuple(ids)] = answer
    values = model.score_ids(heads, tails)[0]
    return {answer: value / len(ids) for answer, value, ids in zip(task.answers, values, tails[0], strict=True)}


def answer_scores(model: LocalModel, task: PriorTask, careful: bool = False) -> np.ndarray:
    """(instances, answers) log-likelihood of every answer after every question, summed over its tokens, nats."""
    texts = [task.continuation(a) for a in task.answers]
    rows = model.score([task.prompt(i, careful) for i in task.instances], [texts] * len(task.instances))
    return np.asarray(rows)


def right(task: PriorTask, scores: np.ndarray) -> np.ndarray:
    """(instances,) 1.0 where the likeliest answer is the right one."""
    return (scores.argmax(1) == gold(task)).astype(np.float64)


def gold(task: PriorTask) -> np.ndarray:
    """(instances,) place of each right answer in the answer space."""
    place = {answer: n for n, answer in enumerate(task.answers)}
    return np.asarray([place[i.answer] for i in task.instances])


def favoured(task: PriorTask, prior: dict[str, float]) -> list[str]:
    """For each question the wrong answer with the highest prior."""
    ranked = sorted(task.answers, key=lambda a: -prior[a])
    return [next(a for a in ranked if a != i.answer) for i in task.instances]


def lens_scores(model: LocalModel, lens: LogitLens, task: PriorTask, responses: Sequence[str], *, batch: int = 8,
                share: bool = True) -> np.ndarray:
    """Log-likelihood of a response to each question under the logit lens of every layer, divided by its tokens.

    A response of several tokens is read token by token: each at the place before it, given the tokens before it.

    Args:
        model: the model and tokenizer.
        lens: the model's lens.
        task: the task.
        responses: an answer for each question.
        batch: questions at a time.
        share: run what all prompts begin with, such as the demonstrations, once; False runs every prompt in full, for
            comparison, and is what happens by itself for a model without a cache.

    Returns:
        (layers, instances), nats a token; the last layer's is the model's own.
    """
    heads, tails = model.encode_pairs([task.prompt(i) for i in task.instances],
                                      [[task.continuation(r)] for r in responses])
    shared, cache = _prefix(model, heads) if share else (0, None)
    rows = [[*head, *tail[0][:-1]][shared:] for head, tail in zip(heads, tails, strict=True)]
    starts = [len(head) - 1 - shared for head in heads]
    out: list[np.ndarray] = []
    for begin in range(0, len(rows), batch):
        part = range(begin, min(begin + batch, len(rows)))
        width, most = max(len(rows[n]) for n in part), max(len(tails[n][0]) for n in part)
        ids, mask = torch.zeros(2, len(part), width, dtype=torch.long)
        positions, tokens = torch.zeros(2, len(part), most, dtype=torch.long)
        used = torch.zeros(len(part), most)
        # padded on the right: in a causal model nothing reads what comes later, so any id will do there
        for r, n in enumerate(part):
            tail = torch.tensor(tails[n][0])
            ids[r, :len(rows[n])] = torch.tensor(rows[n])
            mask[r, :len(rows[n])] = 1
            positions[r, :len(tail)] = torch.arange(starts[n], starts[n] + len(tail))
            tokens[r, :len(tail)] = tail
            used[r, :len(tail)] = 1 / len(tail)
        mask = torch.cat([torch.ones(len(part), shared, dtype=torch.long), mask], 1)
        inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        if cache is not None:
            inputs["past_key_values"] = copy.deepcopy(cache)  # a forward pass adds to it
            inputs["past_key_values"].batch_repeat_interleave(len(part))
        values = lens.log_probs(inputs, positions, tokens)
        out.append((values.cpu() * used).sum(-1).numpy())
    return np.concatenate(out, 1)


@torch.no_grad()
def _prefix(model: LocalModel, heads: list[list[int]]) -> tuple[int, Any]:
    """How many tokens all prompts begin with, the last one of each left out, and the cache after them."""
    first, last = min(heads), max(heads)  # what these two share, all share
    length = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    length = min(length, min(map(len, heads)) - 1)
    if length < 1:
        return 0, None
    ids = torch.tensor([list(heads[0][:length])], device=model.device)
    cache = getattr(model.model(input_ids=ids, use_cache=True), "past_key_values", None)
    return (length, cache) if hasattr(cache, "batch_repeat_interleave") else (0, None)


__all__ = ["answer_scores", "favoured", "gold", "lens_scores", "priors", "right"]
