"""What every search among the prunings of one prompt shares: fitness, memory, budget, re-ranking, resuming."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from looseleaf import Budget, BudgetExhausted, Example, Prompt, PromptOptimizer
from looseleaf.budget import reason
from looseleaf.progress import bar
from looseleaf.prompts.optimizer import Search as StoredSearch
from looseleaf_promptquine.prompt_tokens import PromptTokens, length
from looseleaf_text import CalibratedPrompt, LanguageModel, TextPrompt, TextTask
from looseleaf_text.calibration import content_free, offsets, subtract
from looseleaf_text.slots import fill

WRONG, RIGHT = 180.0, 200.0
"""lambda1 and lambda2 of the piecewise reward [paper, appendix; official code]."""

ROWS = 128
"""Examples scored together: few enough that limits on time are kept and little is lost when a run is stopped."""

CONTENT_FREE = "N/A"
"""What stands in every slot when labels are calibrated."""


def accuracy(log_probs: Sequence[Sequence[float]], golds: Sequence[int]) -> float:
    """Fraction of examples whose gold label is the likeliest.

    Args:
        log_probs: (examples, labels) natural-log probabilities.
        golds: place of the right label of each example.
    """
    hits = [row[gold] >= max(row) and _first_best(row) == gold for row, gold in zip(log_probs, golds, strict=True)]
    return sum(hits) / len(hits)


def reward(log_probs: Sequence[Sequence[float]], golds: Sequence[int], wrong: float = WRONG,
           right: float = RIGHT) -> float:
    """The piecewise reward: mean over classes of the weighted gaps of their examples.

    The gap is the probability of the gold label, among the labels, less that of the best other one; it counts
    ``right`` times where positive, ``wrong`` times where not. Classes weigh the same whatever their number of examples.
    [paper, appendix; official code, which takes a softmax over the labels]

    Args:
        log_probs: (examples, labels) natural-log probabilities, or any scores that a softmax makes probabilities of.
        golds: place of the right label of each example.
        wrong: weight of a gap on the wrong side (lambda1).
        right: weight of a gap on the right side (lambda2).
    """
    by_class: dict[int, list[float]] = {}
    for row, gold in zip(log_probs, golds, strict=True):
        top = max(row)
        shares = [math.exp(v - top) for v in row]
        gap = (shares[gold] - max(v for n, v in enumerate(shares) if n != gold)) / sum(shares)
        by_class.setdefault(gold, []).append(gap * (right if gap > 0 else wrong))
    return sum(sum(v) / len(v) for v in by_class.values()) / len(by_class)


def _first_best(row: Sequence[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


class Search:
    """The prompts seen so far, each evaluated once.

    A stopped search resumes by being done again: everything random comes from the seed, and what was evaluated is
    read from the state instead of asked from the model, so that the second run takes the same way for nothing.

    Args:
        optimizer: whose search this is; part of its identity on disk.
        task, model, budget, start, seed, state_dir, progress: see :meth:`looseleaf.PromptOptimizer.optimize`.
        shots: demonstrations of the start made where none is given.
        num_shots: examples per class used; half for fitness, half for re-ranking.
        reward_driven: piecewise reward instead of accuracy.
        rerank_top: fraction of the prompts seen that is re-ranked.
        most: where the progress bar ends.
        calibrate: subtract what each label is given after an input without content.
    """

    def __init__(self, optimizer: PromptOptimizer, task: TextTask, model: LanguageModel, *, shots: int, num_shots: int,
                 reward_driven: bool, rerank_top: float, most: int | None, calibrate: bool = False,
                 budget: Budget | None = None, start: TextPrompt | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> None:
        optimizer.check_model(model)
        if start is not None and not isinstance(start, TextPrompt):
            raise ValueError(f"start: expected a TextPrompt, whose text is pruned, got a {type(start).__name__}")
        task.validate(model)
        self.task, self.rerank_top, self.reward_driven = task, rerank_top, reward_driven
        self.calibrate = calibrate and task.labels is not None
        self.stored = StoredSearch(optimizer, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir)
        self.budget, self.model = self.stored.budget, self.stored.model
        self.rng = random.Random(seed)
        self.fit, self.held, demonstrations = self._divide(seed, num_shots, shots if start is None else 0)
        self.start = start or TextPrompt.for_task(task, exemplars=demonstrations)
        names = set(self.fit[0].inputs)
        self.prompt_tokens = PromptTokens.of(self.start.as_template(names), names, model.token_texts)
        state = self.stored.state
        self.seen: dict[str, list[float]] = state.setdefault("seen", {})
        self.reranked: dict[str, list[float]] = state.setdefault("reranked", {})
        # generation: scores on the first fitness examples
        self.partial: dict[str, list[float]] = state.setdefault("partial", {})
        self.visited: list[str] = []
        self._visited: set[str] = set()
        self.bar = bar(type(optimizer).__name__, most, progress)

    def _divide(self, seed: int, num_shots: int, shots: int) -> tuple[list[Example], list[Example], list[Example]]:
        """Examples for fitness, for re-ranking, and demonstrations, which are in neither."""
        half = max(1, num_shots // 2)
        if self.task.dev:
            fit, held = list(self.task.train), list(self.task.dev)
            random.Random(f"{seed} order").shuffle(fit)
        else:
            fit, held = self.task.split(seed)
        demonstrations = random.Random(f"{seed} start").sample(fit, min(shots, len(fit) - 1))
        rest = [e for e in fit if not any(e is d for d in demonstrations)]
        return self.task.first_of_each(rest, half), self.task.first_of_each(held, half) or rest, demonstrations

    # -- evaluating -----------------------------------------------------------------------------------------------

    def evaluate(self, masks: Iterable[str]) -> None:
        """Ensure that all ``masks`` are in :attr:`visited`, asking the model for those not seen before.

        Raises:
            BudgetExhausted: no further prompt can be paid for; those before it are done and kept.
        """
        todo: list[str] = []
        for mask in dict.fromkeys(masks):
            if mask in self.seen:
                # Seen in this run or, when resuming, in the one before: either way it costs nothing.
                self._visit(mask)
            else:
                todo.append(mask)
        size = max(1, ROWS // len(self.fit))
        for at in range(0, len(todo), size):
            chunk = todo[at:at + size]
            try:
                self._ask(chunk)
            except BudgetExhausted:
                for mask in chunk:
                    self._ask([mask])

    def was_visited(self, mask: str) -> bool:
        """Whether this run has been at ``mask``."""
        return mask in self._visited

    def _visit(self, mask: str) -> None:
        if mask not in self._visited:
            self._visited.add(mask)
            self.visited.append(mask)
            self.bar.update()

    def _ask(self, masks: list[str]) -> None:
        self._leave_room(self._cost(masks, len(self.fit)), len(masks))
        for mask, values in zip(masks, self._values(masks, self.fit), strict=True):
            self.seen[mask] = values
            self._visit(mask)
        self.save()

    def _cost(self, masks: Sequence[str], examples: int) -> int:
        """Calls needed to score ``masks`` on so many of the fitness examples."""
        if self.task.labels is None:
            return sum(max(0, examples - len(self.partial.get(m, []))) for m in masks)
        return len(masks) * (examples + self.calibrate)

    def successive_halving(self, masks: list[str], stages: int) -> list[str]:
        """Successive halving for generation tasks: the masks worth scoring on all fitness examples.

        In each stage but the last the masks are scored on twice as many examples as in the one before, and the
        better half goes on. What was scored is not scored again.

        Raises:
            BudgetExhausted: as :meth:`evaluate`.
        """
        if self.task.labels is not None:
            return masks
        for stage in range(stages - 1, 0, -1):
            size = max(1, len(self.fit) >> stage)
            chunk = max(1, ROWS // size)
            for at in range(0, len(masks), chunk):
                part = masks[at:at + chunk]
                self._leave_room(self._cost(part, size), 0)
                self._generated(part, size)
                self.save()
            means = {m: sum(self.partial[m][:size]) / size for m in masks}
            masks = sorted(masks, key=lambda m: (-means[m], length(m)))[:(len(masks) + 1) // 2]
        return masks

    def _generated(self, masks: Sequence[str], size: int) -> list[list[float]]:
        """Scores of each mask on the first ``size`` fitness examples, asking only for those not known."""
        jobs = [(m, n) for m in masks for n in range(len(self.partial.get(m, [])), size)]
        scores = self._answers([self.prompt_tokens.text(m) for m, _ in jobs], [self.fit[n] for _, n in jobs])
        for (mask, _), score in zip(jobs, scores, strict=True):
            self.partial.setdefault(mask, []).append(score)
        return [self.partial[m][:size] for m in masks]

    def _answers(self, prompts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        if not prompts:
            return []
        texts = [fill(p, e.inputs) for p, e in zip(prompts, examples, strict=True)]
        answers = self.model.generate(texts, self.task.max_tokens, list(self.task.stop) or None)
        return [self.task.score(a, e) for a, e in zip(answers, examples, strict=True)]

    def _values(self, masks: Sequence[str], examples: list[Example]) -> list[list[float]]:
        """[fitness, mean score, offsets of a calibration ...] of each mask on ``examples``, in one batch."""
        count = len(examples)
        if self.task.labels is None:
            if examples is self.fit:
                rows = self._generated(masks, count)
            else:
                texts = [self.prompt_tokens.text(m) for m in masks for _ in examples]
                flat = self._answers(texts, examples * len(masks))
                rows = [flat[n * count:(n + 1) * count] for n in range(len(masks))]
            means = [sum(row) / count for row in rows]
            return [[m, m] for m in means]
        names = list(self.task.labels)
        golds = [names.index(str(e.target)) for e in examples]
        empty = content_free(examples[0].inputs, [CONTENT_FREE]) if self.calibrate else []
        texts = [fill(self.prompt_tokens.text(m), e.inputs) for m in masks for e in [*examples, *empty]]
        log_probs = self.model.score(texts, [list(self.task.labels.values())] * len(texts))
        out = []
        for n in range(len(masks)):
            rows = log_probs[n * (count + len(empty)):(n + 1) * (count + len(empty))]
            leaning = offsets(rows[count:]) if self.calibrate else []
            if leaning:
                rows = subtract(rows[:count], leaning)
            right = accuracy(rows, golds)
            out.append([reward(rows, golds) if self.reward_driven else right, right, *leaning])
        return out

    def _history(self) -> list[list[float]]:
        """[calls spent on fitness, best fitness so far] wherever it rose, and at the end."""
        each = len(self.fit) + self.calibrate
        points: list[list[float]] = []
        for n, mask in enumerate(self.visited, 1):
            if not points or self.fitness(mask) > points[-1][1]:
                points.append([n * each, self.fitness(mask)])
        return [*points, [len(self.visited) * each, points[-1][1]]] if points else []

    def _leave_room(self, calls: int, prompts: int) -> None:
        """Raise unless ``calls``, for ``prompts`` more, and the re-ranking after them can be paid for."""
        rerank = self._rerank_count(len(self.seen) + prompts) * (len(self.held) + self.calibrate)
        wanted = calls + rerank
        used = self.budget.used
        rate = max(1, used["calls"])
        for name, unit in (("calls", 1.0), ("tokens", used["tokens"] / rate), ("seconds", used["seconds"] / rate)):
            limit = getattr(self.budget, name)
            if limit is not None and used[name] + wanted * unit > limit:
                raise BudgetExhausted(f"budget: {name} (what is left of {limit} is kept for re-ranking)")

    def _rerank_count(self, seen: int) -> int:
        return max(1, math.ceil(self.rerank_top * seen)) if self.rerank_top > 0 else 0

    def fitness(self, mask: str) -> float:
        """Fitness of a mask that was evaluated."""
        return self.seen[mask][0]

    def save(self) -> None:
        """Write what was evaluated and spent."""
        self.stored.save()

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self, stopped: str, extra: dict[str, Any]) -> Prompt:
        """Re-rank the best prompts visited on the held-out examples and return the best of them.

        The best has the highest held-out accuracy [official code]; of equals, the highest held-out fitness.
        """
        ranked = sorted(self.visited, key=lambda m: (-self.fitness(m), length(m), m))
        best = ranked[0] if ranked else self.prompt_tokens.full
        candidates = ranked[:self._rerank_count(len(ranked))]
        if candidates:
            todo = [m for m in candidates if m not in self.reranked]
            size = max(1, ROWS // len(self.held))
            try:
                for at in range(0, len(todo), size):
                    chunk = todo[at:at + size]
                    self.reranked.update(zip(chunk, self._values(chunk, self.held), strict=True))
                    self.save()
            except BudgetExhausted as end:
                stopped = reason(end)
            done = [m for m in candidates if m in self.reranked]
            if done:
                best = min(done, key=lambda m: (-self.reranked[m][1], -self.reranked[m][0], -self.fitness(m), length(m),
                                                m))
        full = self.prompt_tokens.full
        values = self.seen.get(best)
        info: dict[str, Any] = {
            "fitness": values[0] if values else 0.0, "accuracy": values[1] if values else None,
            "evaluations": len(self.visited), "stopped": stopped,
            "heldout_fitness": self.reranked[best][0] if best in self.reranked else None,
            "heldout_accuracy": self.reranked[best][1] if best in self.reranked else None,
            "start_fitness": self.seen[full][0] if full in self.seen else None,
            "start_accuracy": self.seen[full][1] if full in self.seen else None,
            "tokens": length(best), "start_tokens": len(full), "start_text": self.prompt_tokens.text(full),
            "mask": best,
            # What a search is judged by is what its user stores: the text, tokenized anew by whoever reads it.
            "evaluated_on": "text", "examples": {"fitness": len(self.fit), "heldout": len(self.held)},
            "explored": [[length(m), self.seen[m][0], self.seen[m][1]] for m in self.visited],
            "history": self._history(),
            **extra,
        }
        self.save()
        self.bar.close()
        prompt = TextPrompt.for_task(self.task, self.prompt_tokens.text(best), info=info)
        return CalibratedPrompt(prompt, values[2:], info=info) if self.calibrate and values else prompt
