"""PromptQuine: genetic search, by mutation only, among the prunings of one prompt."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from looseleaf import Budget, BudgetExhausted, Paper, Prompt
from looseleaf.budget import reason
from looseleaf.plugin import In
from looseleaf_promptquine.prompt_tokens import length, without
from looseleaf_promptquine.search import Search
from looseleaf_text import LanguageModel, TextOptimizer, TextPrompt, TextTask

PAPER = Paper(
    title="Evolving Prompts In-Context: An Open-ended, Self-replicating Perspective",
    authors=("Jianyu Wang", "Zhiqiang Hu", "Lidong Bing"), year=2025, arxiv="2506.17930", venue="ICML 2025",
    code="https://github.com/jianyu-cs/PromptQuine",
    summary="Deletes tokens from a few-shot prompt by evolution; what is left is shorter and often better.")

STALE = 20
"""Generations without a single new prompt after which the neighbourhood counts as used up."""


@dataclasses.dataclass
class PromptQuine(TextOptimizer):
    """Evolves a shorter and better prompt by deleting tokens from an ordinary few-shot prompt.

    An individual says which tokens of the start are kept; slots such as ``{text}`` always are. Parents are chosen by
    tournament, an offspring is its parent with a few more tokens switched off, and since lineages only lose tokens
    the population shrinks by itself. As fitness on few examples is noisy, the best prompts seen are ranked again
    on held-out examples. [paper: section on PromptQuine, and the appendix for the values; memory]

    Without ``start`` the search begins from ``shots`` demonstrations drawn from ``task.train``; these are not used for
    fitness. Fitness is measured on ``task.train`` and the re-ranking on ``task.dev``, or on two halves of
    ``task.train`` where there is no ``dev``; at most ``num_shots // 2`` examples per class each.

    Args:
        population_size: prompts in the population; >= 1.
        reproduction_size: offspring per generation; >= 1.
        max_prompts: the search ends after this many different prompts; >= 1.
        min_prompt_length: the search ends when the population keeps this many tokens on average, slots not
            counted; >= 0.
        mode: "GGA": parents are of the population, and all offspring of a generation are evaluated in one batch;
            "SSGA" (algorithm 4): each offspring may be a parent of the next ones at once. In both the best of the
            offspring alone are the next population, so that parents age out and prompts shrink.
        mutation_sizes: how many tokens an offspring may lose, chosen with equal chances; each from 1.
        tournament: fraction of the population that is drawn, with replacement, to compete to be a parent, in (0, 1]; at
            least one does.
        rerank_top: fraction of the prompts seen that is ranked again, in [0, 1]; 0 returns the fittest.
        initialize_duplicate: begin with copies of the start; False begins with random prunings of 5 to 20 %.
        reward_driven: fitness is the piecewise reward on label margins; False takes plain accuracy, as the
            authors' code does by default. Generation tasks always take the task's metric.
        num_shots: examples per class; half for fitness and half for re-ranking; >= 2.
        shots: demonstrations of the start made where none is given; >= 1.
        calibrate: classification: subtract from the log-probability of each label what it is given after an input
            without content; one more call per prompt. The prompt found is a
            :class:`looseleaf_text.CalibratedPrompt` then.
        halving_stages: generation (GGA): offspring are scored on a part of the fitness examples first, and only
            the better half goes on to twice as many, in this many stages (>= 1); 1 scores all on all.
    """

    population_size: Annotated[int, In(">= 1")] = 30
    reproduction_size: Annotated[int, In(">= 1")] = 50
    max_prompts: Annotated[int, In(">= 1")] = 10000
    min_prompt_length: Annotated[int, In(">= 0")] = 15
    mode: Literal["GGA", "SSGA"] = "GGA"
    mutation_sizes: Annotated[tuple[int, ...], In(">= 1")] = (1, 2, 3, 4)
    tournament: Annotated[float, In("(0, 1]")] = 0.2
    rerank_top: Annotated[float, In("[0, 1]")] = 0.10
    initialize_duplicate: bool = True
    reward_driven: bool = True
    num_shots: Annotated[int, In(">= 2")] = 16
    shots: Annotated[int, In(">= 1")] = 1
    calibrate: bool = False
    halving_stages: Annotated[int, In(">= 1")] = 1
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("mutation_sizes", len(self.mutation_sizes) > 0, "one size or more")

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: TextPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Returns:
            The prompt, whose ``info`` also holds ``heldout_fitness``, ``start_fitness``, ``tokens``,
            ``start_tokens``, ``explored`` ([tokens, fitness, accuracy] of every prompt, in order), ``history``
            ([calls spent on fitness, best fitness so far], wherever it rose) and
            ``generations`` ([prompts explored, mean tokens, best and mean fitness of the population,
            best fitness so far]).
        """
        search = Search(self, task, model, shots=self.shots, num_shots=self.num_shots,
                        reward_driven=self.reward_driven, rerank_top=self.rerank_top, most=self.max_prompts,
                        calibrate=self.calibrate, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        generations: list[list[float]] = []
        stopped = "done"
        try:
            self._evolve(search, generations)
        except BudgetExhausted as end:
            stopped = reason(end)
        return search.finish(stopped, {"generations": generations})

    def _evolve(self, search: Search, generations: list[list[float]]) -> None:
        rng, full = search.rng, search.prompt_tokens.full
        search.evaluate([full])
        population = [full] * self.population_size
        if not self.initialize_duplicate:
            population = [self._random_pruning(rng, full) for _ in population]
            search.evaluate(population[:self.max_prompts - 1])
            population = [m for m in population if search.was_visited(m)]
        stale = 0
        while True:
            self._note(search, population, generations)
            mean = sum(map(length, population)) / len(population)
            if len(search.visited) >= self.max_prompts or mean <= self.min_prompt_length or stale >= STALE:
                return
            offspring = self._generation(search, population)
            stale = 0 if offspring else stale + 1
            fresh = sorted(offspring, key=search.fitness, reverse=True)[:self.population_size]
            # Parents age out; they stay only where there are too few offspring to take their place.
            kept = sorted(population, key=search.fitness, reverse=True)
            population = [*fresh, *kept[:self.population_size - len(fresh)]]

    def _generation(self, search: Search, population: list[str]) -> list[str]:
        """The evaluated offspring of one generation."""
        # A prompt met before costs nothing; only new ones are counted against max_prompts.
        if self.mode == "GGA":
            offspring = self._offspring(search.rng, search, population, self.reproduction_size)
            offspring = search.successive_halving(_first_new(offspring, search, self.max_prompts - len(search.visited)),
                                     self.halving_stages)
            search.evaluate(offspring)
            return offspring
        grown = list(population)
        for _ in range(self.reproduction_size):
            child = self._offspring(search.rng, search, grown, 1)
            child = _first_new(child, search, self.max_prompts - len(search.visited))
            search.evaluate(child)
            grown += child
        return grown[len(population):]

    def _offspring(self, rng: random.Random, search: Search, population: list[str], wanted: int) -> list[str]:
        """Mutants of tournament winners, without those whose text the population has already."""
        texts = {search.prompt_tokens.text(m) for m in population}
        out: list[str] = []
        competitors = max(1, int(self.tournament * len(population)))
        for _ in range(wanted):
            parent = max(rng.choices(population, k=competitors), key=search.fitness)
            size = rng.choice(self.mutation_sizes)
            kept = [n for n, bit in enumerate(parent) if bit == "1"]
            child = without(parent, rng.sample(kept, min(size, len(kept))))
            text = search.prompt_tokens.text(child)
            if text not in texts:
                texts.add(text)
                out.append(child)
        return out

    def _random_pruning(self, rng: random.Random, full: str) -> str:
        rate = rng.choice([1 / 20 + n * (1 / 5 - 1 / 20) / 9 for n in range(10)])
        return without(full, rng.sample(range(len(full)), max(1, round(rate * len(full)))))

    def _note(self, search: Search, population: list[str], generations: list[list[float]]) -> None:
        values = [search.fitness(m) for m in population]
        best = max(search.fitness(m) for m in search.visited)
        generations.append([len(search.visited), sum(map(length, population)) / len(population), max(values),
                            sum(values) / len(values), best])


def _first_new(masks: list[str], search: Search, room: int) -> list[str]:
    """``masks`` up to where the ``room``-th prompt not visited before has been taken."""
    visited = set(search.visited)
    out = []
    for mask in masks:
        new = mask not in visited
        if new and room <= 0:
            continue
        room -= new
        out.append(mask)
    return out
