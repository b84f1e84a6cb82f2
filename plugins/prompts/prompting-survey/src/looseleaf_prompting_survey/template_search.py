"""Automated template engineering on discrete texts: look for the best of a pool and of its paraphrases."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import ClassVar

from looseleaf import Budget, BudgetExhausted, Paper, PromptOptimizer
from looseleaf_text import LanguageModel, Prompt, Task, Template
from looseleaf.budget import reason
from looseleaf_prompting_survey.candidates import Candidates, Scored
from looseleaf_prompting_survey.paper import PAPER
from looseleaf_prompting_survey.pool import paraphrase


@dataclasses.dataclass
class TemplateSearch(PromptOptimizer):
    """Takes the best template of a pool, and of what the model makes of the best (survey, section 3.3.1).

    Every template is marked by its accuracy on ``task.dev`` (``task.train`` where there is none), ties by the mean
    log-probability of the right label. In each round the ``beam`` best are paraphrased by the model itself and the
    paraphrases join the pool. Mined templates (:func:`mine`) go into ``templates``.

    Args:
        templates: with ``[X]`` or ``{field}`` and ``[Z]``; none: the task's own and seven others written by hand.
        rounds: of paraphrasing; 0 takes the best of the pool.
        beam: templates paraphrased in a round; from 1.
        paraphrases: of each; from 1.
        temperature: of the paraphrasing; above 0.
        calibrate: take back from each template what it says about inputs without content; three calls each.
        num_examples: labelled examples templates are marked on, at most; from 1.
    """

    templates: tuple[str, ...] = ()
    rounds: int = 1
    beam: int = 2
    paraphrases: int = 4
    temperature: float = 0.9
    calibrate: bool = False
    num_examples: int = 64
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """Raise ValueError for a parameter out of range."""
        self.check("templates", not isinstance(self.templates, str), "a tuple of texts")
        self.check("rounds", isinstance(self.rounds, int) and self.rounds >= 0, "a whole number from 0")
        for name in ("beam", "paraphrases", "num_examples"):
            value = getattr(self, name)
            self.check(name, isinstance(value, int) and value >= 1, "a whole number from 1")
        self.check("temperature", 0 < self.temperature < 100, "a number above 0")

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            start: is marked first (its members, where it is an ensemble); only templates are paraphrased.

        Returns:
            The best prompt, whose ``info`` also holds ``name`` (its template) and ``candidates`` ([template, accuracy,
            log-likelihood] in the order they were tried).
        """
        candidates = Candidates(self, task, model, budget, start, seed, state_dir, progress,
                                templates=self.templates, most=self.num_examples, calibrated=self.calibrate)
        found: list[Scored] = []
        stopped = "done"
        try:
            for name, prompt in candidates.first:
                found.append(candidates.score(name, prompt))
            for number in range(self.rounds):
                for template in self._paraphrased(candidates, found, number, seed):
                    found.append(candidates.score(template.text, candidates.prompt(template)))
        except BudgetExhausted as end:
            stopped = reason(end)
        if not found:
            return Prompt.for_task(task, info=candidates.info(found, stopped, 0.0))
        best = max(found, key=rank)
        return dataclasses.replace(best.prompt, info={
            **best.prompt.info, **candidates.info(found, stopped, best.accuracy), "name": best.name,
            "log_likelihood": best.log_likelihood})

    def _paraphrased(self, candidates: Candidates, found: list[Scored], number: int, seed: int) -> list[Template]:
        """New templates made from the best of ``found``, none tried before."""
        tried = {s.name for s in found}
        made: dict[str, Template] = {}
        best = sorted((s for s in found if not s.name.startswith("start ")), key=rank, reverse=True)[:self.beam]
        for scored in best:
            key = f"{number} {scored.name}"
            if key not in candidates.made:
                own = zlib.crc32(f"{seed} {key}".encode()) % 10**6  # servers take seeds of 32 bits
                texts = paraphrase(Template(scored.name), candidates.model, self.paraphrases, seed=own,
                                   temperature=self.temperature)
                candidates.made[key] = [t.text for t in texts]
                candidates.save()
            made.update({text: Template(text) for text in candidates.made[key] if text not in tried})
        return list(made.values())


def rank(scored: Scored) -> tuple[float, float]:
    """What candidates are compared by."""
    return scored.accuracy, scored.log_likelihood
