"""What a model answers, and how that goes with the prior."""

from __future__ import annotations

import dataclasses

import numpy as np

from looseleaf_text import LocalModel
from looseleaf_prior_distribution.scoring import answer_scores, gold, priors, right
from looseleaf_prior_distribution.statistics import Slope, slope
from looseleaf_prior_distribution.tasks import PriorTask


@dataclasses.dataclass
class Behaviour:
    """A model's answers to the questions of a task.

    Attributes:
        task: the task.
        prior: answer -> log prior, nats a token.
        correct: (n,) 1.0 where the likeliest answer is the right one.
        responses: the likeliest answer to each question.
        surprise: (n,) negative log-probability of each right answer among the answer space, nats; log of the number of
            answers where the model cannot tell them apart. It still moves where accuracy has reached its limit.
    """

    task: PriorTask
    prior: dict[str, float]
    correct: np.ndarray
    responses: list[str]
    surprise: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of questions answered rightly."""
        return float(self.correct.mean())

    @property
    def gold_prior(self) -> list[float]:
        """(n,) log prior of each right answer."""
        return [self.prior[i.answer] for i in self.task.instances]

    @property
    def pull(self) -> float | None:
        """Mean log prior of the wrong answers given less that of the right ones, nats a token; None without errors.

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


def behaviour(model: LocalModel, task: PriorTask, prior: dict[str, float] | None = None, *, careful: bool = False,
              ) -> Behaviour:
    """Ask every question of a task.

    Args:
        model: the model and tokenizer.
        task: the task.
        prior: answer -> log prior; None: it is measured. For a model that was changed (other prompt, tuned layers) pass
            that of the model as it was, so that the same answers stay the unlikely ones.
        careful: with the instruction not to rely on likely answers.
    """
    prior = priors(model, task) if prior is None else prior
    scores = answer_scores(model, task, careful)
    surprise = np.logaddexp.reduce(scores, 1) - scores[np.arange(len(scores)), gold(task)]
    return Behaviour(task, prior, right(task, scores), [task.answers[k] for k in scores.argmax(1)], surprise)


__all__ = ["Behaviour", "behaviour"]
