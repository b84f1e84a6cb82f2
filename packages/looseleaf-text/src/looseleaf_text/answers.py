"""Answer search: how likely a model finds each answer in a prompt, and what several prompts say together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from looseleaf_text.calibration import subtract
from looseleaf_text.verbalizer import log_normalised, log_sum

if TYPE_CHECKING:
    from looseleaf_text.model import LanguageModel
    from looseleaf_text.prompt import Prompt
    from looseleaf_text.task import Example


def answer_log_probs(prompt: Prompt, model: LanguageModel, examples: Sequence[Example],
                     answers: Sequence[str]) -> list[list[float]]:
    """Log-probability of each answer in the prompt of each example: one call per example.

    A causal model gives the likelihood of the answer (and of what follows it), a :class:`looseleaf_text.MaskedModel` its
    pseudo-likelihood.

    Returns:
        (examples, answers) natural logarithms, not normalised.
    """
    befores, rows = [prompt.render(e) for e in examples], [list(answers)] * len(examples)
    with _softly(prompt, model):
        if prompt.suffix:
            return model.score_cloze(befores, rows, [prompt.render_suffix(e) for e in examples])
        return model.score(befores, rows)


def generate(prompt: Prompt, model: LanguageModel, examples: Sequence[Example], max_tokens: int,
             stop: list[str] | None = None) -> list[str]:
    """What the model says after the prompt of each example."""
    with _softly(prompt, model):
        return model.generate([prompt.render(e) for e in examples], max_tokens, stop)


def _softly(prompt: Prompt, model: LanguageModel) -> contextlib.AbstractContextManager[None]:
    if prompt.soft is None:
        return contextlib.nullcontext()
    from looseleaf_text.soft import soft_prefix  # torch, which no other prompt needs

    return soft_prefix(model, prompt.soft)


def label_log_probs(prompt: Prompt, model: LanguageModel, labels: Mapping[str, str],
                    examples: Sequence[Example]) -> list[list[float]]:
    """Log-probability of each label: answers mapped by the prompt's verbalizer, calibrated, members combined.

    Args:
        labels: label -> verbalizer, used where the prompt has no :class:`looseleaf_text.Verbalizer` of its own.

    Returns:
        (examples, labels) natural logarithms in the order of ``labels``.

    Raises:
        ValueError: the prompt's verbalizer has other labels.
    """
    if prompt.members:
        return combine([label_log_probs(m, model, labels, examples) for m in prompt.members], prompt.weights,
                       vote=prompt.combine == "vote")
    verbalizer = prompt.verbalizer
    if verbalizer is None:
        rows = answer_log_probs(prompt, model, examples, list(labels.values()))
    else:
        if set(verbalizer.labels) != set(labels):
            raise ValueError(f"the prompt's verbalizer has the labels {verbalizer.labels}, the task {list(labels)}: "
                             "give the prompt answers for exactly the labels of the task")
        places = [verbalizer.labels.index(label) for label in labels]
        found = verbalizer.log_probs(answer_log_probs(prompt, model, examples, verbalizer.space))
        rows = [[row[p] for p in places] for row in found]
    calibration = prompt.info.get("calibration")
    return subtract(rows, calibration) if calibration else rows


def combine(members: Sequence[Sequence[Sequence[float]]], weights: Sequence[float] | None = None, *,
            vote: bool = False) -> list[list[float]]:
    """What several prompts say together: the weighted mean of their normalised probabilities, or of their votes.

    Args:
        members: (prompts, examples, labels) natural-log probabilities; need not be normalised.
        weights: one for each prompt, from 0; None: all the same.
        vote: each prompt gives its weight to its likeliest label; ties are broken by the mean probability.

    Returns:
        (examples, labels) natural-log probabilities; each row's probabilities sum to one.
    """
    shares = shares_of(weights, len(members))
    out = []
    for rows in zip(*members, strict=True):
        normal = [log_normalised(row) for row in rows]
        mixed = [log_sum([math.log(w) + v for w, v in zip(shares, column, strict=True) if w > 0])
                 for column in zip(*normal, strict=True)]
        if vote:
            votes = [0.0] * len(mixed)
            for share, row in zip(shares, normal, strict=True):
                votes[max(range(len(row)), key=row.__getitem__)] += share
            # The mean probability counts so little that it decides nothing but ties.
            mixed = log_normalised([math.log(max(v + 1e-6 * math.exp(m), 1e-30))
                                    for v, m in zip(votes, mixed, strict=True)])
        out.append(mixed)
    return out


def most_voted(texts: Sequence[str], weights: Sequence[float] | None = None) -> str:
    """The text with the most weight; case and outer white space are no difference, and ties go to the first."""
    shares: dict[str, float] = {}
    for text, share in zip(texts, shares_of(weights, len(texts)), strict=True):
        key = text.strip().casefold()
        shares[key] = shares.get(key, 0.0) + share
    best = max(shares, key=lambda key: (round(shares[key], 9), -list(shares).index(key)))
    return next(t for t in texts if t.strip().casefold() == best)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """``weights`` divided by their sum; equal shares for None.

    Raises:
        ValueError: not ``count`` weights, a negative one, or nothing but zeros.
    """
    given = [1.0] * count if weights is None else list(weights)
    total = sum(given)
    if len(given) != count or not all(w >= 0 and math.isfinite(w) for w in given) or not total > 0:
        raise ValueError(f"weights={weights!r} for {count} prompts: allowed is one number from 0 for each, "
                         "not all of them 0")
    return [w / total for w in given]
