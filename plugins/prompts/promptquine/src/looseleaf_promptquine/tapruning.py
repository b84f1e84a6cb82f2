"""TAPruning: hill climbing with threshold accepting, the simple baseline of PromptQuine from the same paper."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

from looseleaf import Budget, BudgetExhausted, Paper, Prompt
from looseleaf.budget import reason
from looseleaf.plugin import In
from looseleaf_promptquine.optimizer import PAPER
from looseleaf_promptquine.prompt_tokens import length, without
from looseleaf_promptquine.search import Search
from looseleaf_text import LanguageModel, TextOptimizer, TextPrompt, TextTask


@dataclasses.dataclass
class TAPruning(TextOptimizer):
    """Deletes tokens one after the other as long as fitness stays near the best so far.

    Passes over the tokens, trying the prompt without each; it is left out for good when the new fitness is at least
    ``threshold`` times the best fitness so far. Passes are repeated until one changes nothing. Where the best
    fitness is negative (all margins wrong), the same fraction of its size below it is accepted. The best prompts
    seen are then ranked again on held-out examples, as in PromptQuine. [paper: section on TAPruning; memory]

    Args:
        threshold: how far fitness may fall below the best, in (0, 1]; 1 accepts no fall.
        shuffle: go through the tokens in an order drawn anew for each pass, not from first to last.
        max_prompts: the search ends after this many different prompts; >= 1.
        rerank_top: fraction of the prompts seen that is ranked again, in [0, 1]; 0 returns the fittest.
        reward_driven: fitness is the piecewise reward on label margins; False takes plain accuracy.
        num_shots: examples per class; half for fitness and half for re-ranking; >= 2.
        shots: demonstrations of the start made where none is given; >= 1.
    """

    threshold: Annotated[float, In("(0, 1]")] = 0.96
    shuffle: bool = False
    max_prompts: Annotated[int, In(">= 1")] = 10000
    rerank_top: Annotated[float, In("[0, 1]")] = 0.10
    reward_driven: bool = True
    num_shots: Annotated[int, In(">= 2")] = 16
    shots: Annotated[int, In(">= 1")] = 1
    paper: ClassVar[Paper] = PAPER

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: TextPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``info`` is that of PromptQuine, ``passes`` added."""
        search = Search(self, task, model, shots=self.shots, num_shots=self.num_shots,
                        reward_driven=self.reward_driven, rerank_top=self.rerank_top, most=None, budget=budget,
                        start=start, seed=seed, state_dir=state_dir, progress=progress)
        passes: list[list[float]] = []
        stopped = "done"
        try:
            self._climb(search, passes)
        except BudgetExhausted as end:
            stopped = reason(end)
        return search.finish(stopped, {"passes": passes})

    def _climb(self, search: Search, passes: list[list[float]]) -> None:
        current = search.prompt_tokens.full
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
