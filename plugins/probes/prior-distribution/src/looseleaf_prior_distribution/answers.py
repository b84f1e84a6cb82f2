"""What a model gives answers: sequence likelihoods and priors, also under the logit lens, and how being right
depends on the prior."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from looseleaf.statistics import Interval
from looseleaf_prior_distribution.tasks import PriorTask
from looseleaf_text import LocalModel, LogitLens

RIDGE = 1e-2
"""Weight of the squared coefficients in a logistic fit: where every answer is right, or priors separate right from
wrong, the plain fit has no finite slope."""



def priors(model: LocalModel, task: PriorTask, instructed: bool = False) -> dict[str, float]:
    """Log prior of every answer: its log-likelihood after the prompt without a question, divided by its tokens.

    Args:
        model: the model.
        task: the task.
        instructed: with the instruction of the prompting intervention.

    Returns:
        Answer -> nats per token.

    Raises:
        ValueError: two answers that the tokenizer makes the same tokens of.
    """
    prompt, texts = task.uninformative(instructed), [task.continuation(a) for a in task.answers]
    heads, tails = model.encode_pairs([prompt], [texts])
    seen: dict[tuple[int, ...], str] = {}
    for answer, ids in zip(task.answers, tails[0], strict=True):
        if tuple(ids) in seen:
            raise ValueError(f"task {task.name!r}: the answers {seen[tuple(ids)]!r} and {answer!r} have the same "
                             "tokens, so the model cannot tell them apart: take one out of the answer space")
        seen[tuple(ids)] = answer
    values = model.score_ids(heads, tails)[0]
    return {answer: value / len(ids) for answer, value, ids in zip(task.answers, values, tails[0], strict=True)}


def answer_scores(model: LocalModel, task: PriorTask, instructed: bool = False) -> np.ndarray:
    """(instances, answers) log-likelihood of every answer after every question, summed over its tokens, nats."""
    texts = [task.continuation(a) for a in task.answers]
    rows = model.score([task.prompt(i, instructed) for i in task.instances], [texts] * len(task.instances))
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
        (layers, instances), nats per token; the last layer's is the model's own.
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


class Slope(Interval):
    """Logistic slope of being right on the prior, per nat, with a 95 % bootstrap interval over answers."""

    @property
    def positive(self) -> bool:
        """The interval lies above 0."""
        return self.low > 0

    @property
    def covers_zero(self) -> bool:
        """The interval has 0 in it."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self:+.3f}"


def logistic(features: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None, steps: int = 25,
             ) -> np.ndarray:
    """Ridge-regularised logistic regression by Newton's method, many weightings of the same data at once.

    Args:
        features: (n, k); a constant is added.
        correct: (n,), 0 or 1.
        weights: (m, n) not negative; None: one fit with weight 1 everywhere.
        steps: of Newton's method.

    Returns:
        (m, k + 1) coefficients, that of the constant first; it is not regularised.
    """
    x = np.concatenate([np.ones((len(features), 1)), features], 1)
    w = np.ones((1, len(x))) if weights is None else np.asarray(weights, dtype=np.float64)
    beta = np.zeros((len(w), x.shape[1]))
    # the constant gets next to nothing: it must be finite where all answers are right
    penalty = np.diag([1e-6, *[RIDGE] * (x.shape[1] - 1)])
    y = np.asarray(correct, dtype=np.float64)

    def objective(b: np.ndarray) -> np.ndarray:
        z = b @ x.T
        loss: np.ndarray = (w * (np.logaddexp(0, z) - y * z)).sum(1) + 0.5 * ((b @ penalty) * b).sum(1)
        return loss

    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(beta @ x.T, -500, 500)))
        gradient = (w * (y - p)) @ x - beta @ penalty
        curvature = np.einsum("mn,nk,nj->mkj", w * p * (1 - p), x, x, optimize=True) + penalty
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # a full Newton step can overshoot where the data are nearly separable
        size = np.ones(len(w))
        before = objective(beta)
        for _ in range(20):
            worse = objective(beta + size[:, None] * step) > before + 1e-12
            if not worse.any():
                break
            size[worse] /= 2
        beta = beta + size[:, None] * step
        if np.abs(size[:, None] * step).max() < 1e-8:
            break
    return beta


def resample(groups: Sequence[object], samples: int, seed: int) -> np.ndarray:
    """(samples, n) how often each row is drawn when whole groups are drawn with replacement."""
    _, index = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    count = int(index.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, count, (samples, count))
    times = np.zeros((samples, count))
    np.add.at(times, (np.arange(samples)[:, None], drawn), 1)
    taken: np.ndarray = times[:, index]
    return taken


def slope(prior: Sequence[float], correct: Sequence[float], answers: Sequence[object],
          size: Sequence[float] | None = None, *, samples: int = 1000, seed: int = 0) -> Slope:
    """How the chance of being right rises with the prior of the right answer.

    Whole answers are resampled: questions with the same answer share its prior, so that they are one observation of
    it, not many.

    Args:
        prior: (n,) log prior of each question's right answer, nats.
        correct: (n,) 1 where the model was right.
        answers: (n,) the right answers.
        size: (n,) how hard each question is by itself; the slope is then that at equal size.
        samples: resamples.
        seed: random seed of the resampling.

    Raises:
        ValueError: not equally many values, or fewer than two.
    """
    if not len(prior) == len(correct) == len(answers) or len(prior) < 2:
        raise ValueError("slope: expected equally many priors, scores and answers, two or more, got "
                         f"{len(prior)}, {len(correct)} and {len(answers)}")
    columns = [np.asarray(prior, dtype=np.float64)]
    if size is not None and np.ptp(np.asarray(size)) > 0:
        columns.append(np.asarray(size, dtype=np.float64))
    features = np.stack(columns, 1)
    spread = np.where(features.std(0) > 0, features.std(0), 1.0)
    features = (features - features.mean(0)) / spread
    y = np.asarray(correct, dtype=np.float64)
    value = logistic(features, y)[0, 1] / spread[0]
    low, high = np.quantile(logistic(features, y, resample(answers, samples, seed))[:, 1], [0.025, 0.975]) / spread[0]
    return Slope(float(value), float(low), float(high))


def bins(prior: Sequence[float], marks: Sequence[Sequence[float]], count: int) -> list[tuple[float, int, list[float]]]:
    """Questions in ``count`` groups of like prior: (mean prior, number, mean of each row of ``marks``)."""
    order = np.argsort(np.asarray(prior), kind="stable")
    out = []
    for rows in np.array_split(order, min(count, len(order))):
        out.append((float(np.mean([prior[i] for i in rows])), len(rows),
                    [float(np.mean([row[i] for i in rows])) for row in marks]))
    return out


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant, as nothing then goes with anything."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if any(np.ptp(v) <= 1e-5 * max(1.0, float(np.abs(v).max())) for v in (a, b)):
        return 0.0  # what is left of a constant is the rounding of single precision
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt(float((a * a).sum() * (b * b).sum())))


@dataclasses.dataclass
class Behaviour:
    """A model's answers to the questions of a task.

    Attributes:
        task: the task.
        prior: answer -> log prior, nats per token.
        correct: (n,) 1.0 where the likeliest answer is the right one.
        responses: the likeliest answer to each question.
        surprisal: (n,) negative log-probability of each right answer among the answer space, nats; log of the number of
            answers where the model cannot tell them apart. It still moves where accuracy has reached its limit.
    """

    task: PriorTask
    prior: dict[str, float]
    correct: np.ndarray
    responses: list[str]
    surprisal: np.ndarray

    @property
    def accuracy(self) -> float:
        """Fraction of questions answered rightly."""
        return float(self.correct.mean())

    @property
    def gold_prior(self) -> list[float]:
        """(n,) log prior of each right answer."""
        return [self.prior[i.answer] for i in self.task.instances]

    @property
    def prior_gap(self) -> float | None:
        """Mean log prior of the wrong answers given less that of the right ones, nats per token; None without errors.

        Above 0 the model errs towards likely answers.
        """
        gaps = [self.prior[r] - self.prior[i.answer] for r, i in zip(self.responses, self.task.instances, strict=True)
                if r != i.answer]
        return float(np.mean(gaps)) if gaps else None

    def slope(self, equal_size: bool = False, samples: int = 1000, seed: int = 0) -> Slope:
        """Logistic slope of being right on the prior of the right answer; see :func:`statistics.slope`.

        Args:
            equal_size: at equal size of the questions.
            samples, seed: of the bootstrap.
        """
        return slope(self.gold_prior, self.correct.tolist(), [i.answer for i in self.task.instances],
                     [i.size for i in self.task.instances] if equal_size else None, samples=samples, seed=seed)


def behaviour(model: LocalModel, task: PriorTask, prior: dict[str, float] | None = None, *, instructed: bool = False,
              ) -> Behaviour:
    """Ask every question of a task.

    Args:
        model: the model and tokenizer.
        task: the task.
        prior: answer -> log prior; None: it is measured. For a model that was changed (other prompt, tuned layers) pass
            that of the model as it was, so that the same answers stay the unlikely ones.
        instructed: with the instruction not to rely on likely answers.
    """
    prior = priors(model, task) if prior is None else prior
    scores = answer_scores(model, task, instructed)
    surprisal = np.logaddexp.reduce(scores, 1) - scores[np.arange(len(scores)), gold(task)]
    return Behaviour(task, prior, right(task, scores), [task.answers[k] for k in scores.argmax(1)], surprisal)
