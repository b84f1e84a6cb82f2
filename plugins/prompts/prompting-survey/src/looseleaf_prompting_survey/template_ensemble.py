"""A weighted ensemble of templates, as an optimiser."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from looseleaf import Budget, BudgetExhausted, Paper, PromptOptimizer, Table
from looseleaf_text import LanguageModel, Prompt, Task
from looseleaf_text.answers import combine, most_voted
from looseleaf.budget import reason
from looseleaf_prompting_survey.candidates import Candidates, Scored
from looseleaf_prompting_survey.ensemble import accuracy, accuracy_weights, likelihood_weights, log_likelihood
from looseleaf_prompting_survey.paper import PAPER
from looseleaf_prompting_survey.typology import typology


@dataclasses.dataclass
class TemplateEnsemble(PromptOptimizer):
    """Asks in several wordings and weighs the answers (survey, section 5.1).

    Nobody knows beforehand which wording a model takes best, and an ensemble need not choose. Weights are fitted on
    ``task.dev``, or on ``task.train`` where there is none. The prompt found has :attr:`looseleaf_text.Prompt.members`;
    one call per member and example is what using it costs.

    Args:
        templates: with ``[X]`` or ``{field}`` and ``[Z]``; none: the task's own and seven others written by hand.
        weights: ``"uniform"``; ``"accuracy"``: in proportion to each template's accuracy (PET); ``"likelihood"``: those
            under which the right labels are likeliest. For generation tasks the latter two are both the mean mark.
        combine: ``"average"`` of the probabilities, or majority ``"vote"``; generated texts are always voted on.
        calibrate: take back from each template what it says about inputs without content; three calls each.
        num_examples: labelled examples the weights are fitted to, at most; from 1.
    """

    templates: tuple[str, ...] = ()
    weights: Literal["uniform", "accuracy", "likelihood"] = "likelihood"
    combine: Literal["average", "vote"] = "average"
    calibrate: bool = False
    num_examples: int = 64
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """Raise ValueError for a parameter out of range."""
        self.check("templates", not isinstance(self.templates, str), "a tuple of texts")
        self.check("weights", self.weights in ("uniform", "accuracy", "likelihood"),
                   "'uniform', 'accuracy' or 'likelihood'")
        self.check("combine", self.combine in ("average", "vote"), "'average' or 'vote'")
        self.check("num_examples", isinstance(self.num_examples, int) and self.num_examples >= 1,
                   "a whole number from 1")

    @classmethod
    def table(cls) -> Table:
        """The survey's map of prompting methods; see :func:`typology`."""
        return typology()

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            start: becomes a further member (its members become members, where it is an ensemble).

        Returns:
            An ensemble, whose ``info`` also holds ``log_likelihood`` and ``candidates`` ([template, accuracy,
            log-likelihood] of each member); the plain prompt, where the budget allows not one template.
        """
        candidates = Candidates(self, task, model, budget, start, seed, state_dir, progress,
                                templates=self.templates, most=self.num_examples, calibrated=self.calibrate)
        found: list[Scored] = []
        stopped = "done"
        try:
            for name, prompt in candidates.first:
                found.append(candidates.score(name, prompt))
        except BudgetExhausted as end:
            stopped = reason(end)
        if not found:
            return Prompt.for_task(task, info=candidates.info(found, stopped, 0.0))
        made = Prompt(members=[s.prompt for s in found], weights=self._weights(found, candidates.golds),
                      combine=self.combine)
        if task.labels is None:
            texts = zip(*(s.answers or [] for s in found), strict=True)
            marks = [task.mark(most_voted(t, made.weights), e) for t, e in zip(texts, candidates.examples, strict=True)]
            made.info = candidates.info(found, stopped, sum(marks) / len(marks))
            return made
        rows = combine([s.rows or [] for s in found], made.weights, vote=self.combine == "vote")
        made.info = {**candidates.info(found, stopped, accuracy(rows, candidates.golds)),
                     "log_likelihood": log_likelihood(rows, candidates.golds)}
        return made

    def _weights(self, found: list[Scored], golds: list[int]) -> list[float] | None:
        if self.weights == "uniform":
            return None
        if not golds:
            marks = [s.accuracy for s in found]
            return marks if any(m > 0 for m in marks) and min(marks) >= 0 else None
        rows = [s.rows or [] for s in found]
        return accuracy_weights(rows, golds) if self.weights == "accuracy" else likelihood_weights(rows, golds)
