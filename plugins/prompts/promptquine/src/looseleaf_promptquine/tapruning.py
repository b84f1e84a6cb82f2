"""TAPruning: hill climbing with threshold accepting, the simple rival of PromptQuine from the same paper."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from looseleaf import Budget, BudgetExhausted, Paper, PromptOptimizer
from looseleaf_text import LanguageModel, Prompt, Task
from looseleaf.budget import reason
from looseleaf_promptquine.optimizer import PAPER
from looseleaf_promptquine.pieces import length, without
from looseleaf_promptquine.search import Search


@dataclasses.dataclass
class TAPruning(PromptOptimizer):
    """Deletes tokens one after the other as long as fitness stays near the best so far.

    Passes over the tokens, trying the prompt without each; it is left out for good when the new fitness is at least
    ``threshold`` times the best fitness so far. Passes are repeated until one changes nothing. Where the best
    fitness is negative (all margins wrong), the same share of its size is allowed below it. The best prompts
    seen are then ranked again on held-out examples, as in PromptQuine. [paper: section on TAPruning; memory]

    Args:
        threshold: how far fitness may fall below the best, in (0, 1]; 1 accepts no fall.
        shuffle: go through the tokens in an order drawn anew for each pass, not from first to last.
        max_prompts: the search ends after this many different prompts; from 1.
        rerank_top: share of the prompts seen that is ranked again, in [0, 1]; 0 returns the fittest.
        reward_driven: fitness is the piecewise reward on label margins; False takes plain accuracy.
        num_shots: examples per class; half for fitness and half for re-ranking; from 2.
        shots: demonstrations of the start made where none is given; from 1.
    """

    threshold: float = 0.96
    shuffle: bool = False
    max_prompts: int = 10000
    rerank_top: float = 0.10
    reward_driven: bool = True
    num_shots: int = 16
    shots: int = 1
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """Raise ValueError for a parameter out of range."""
        self.check("threshold", 0 < self.threshold <= 1, "0 < threshold <= 1")
        for name in ("max_prompts", "shots"):
            value = getattr(self, name)
            self.check(name, isinstance(value, int) and value >= 1, "a whole number from 1")
        self.check("num_shots", isinstance(self.num_shots, int) and self.num_shots >= 2, "a whole number from 2")
        self.check("rerank_top", 0 <= self.rerank_top <= 1, "0 <= rerank_top <= 1")

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, *,
                 start: Prompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``info`` is that of PromptQuine, ``passes`` added."""
        search = Search(self, task, model, budget, start, seed, state_dir, progress, shots=self.shots,
                        num_shots=self.num_shots, reward_driven=self.reward_driven, rerank_top=self.rerank_top,
                        most=None)
        passes: list[list[float]] = []
        stopped = "done"
        try:
            self._climb(search, passes)
        except BudgetExhausted as end:
            stopped = reason(end)
        return search.finish(stopped, {"passes": passes})

    def _climb(self, search: Search, passes: list[list[float]]) -> None:
        current = search.pieces.full
        search.evaluate([current])
        best = search.fitness(current)
        while True:
            before = current
            order = list(range(len(current)))
            if self.shuffle:
                search.rng.shuffle(order)
            for place in order:
                if current[place] == "0":
                    continue
                if len(search.visited) >= self.max_prompts:
                    return
                candidate = without(current, [place])
                search.evaluate([candidate])
                fitness = search.fitness(candidate)
                if fitness >= best - (1 - self.threshold) * abs(best):
                    current, best = candidate, max(best, fitness)
            passes.append([len(search.visited), length(current), search.fitness(current), best])
            if current == before:
                return
