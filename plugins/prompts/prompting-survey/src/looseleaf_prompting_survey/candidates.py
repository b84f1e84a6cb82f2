"""What both searches share: prompts scored on the same examples, within a budget, kept on disk."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from looseleaf import Budget, PromptOptimizer
from looseleaf_text import Example, LanguageModel, Prompt, Task, Template
from looseleaf.progress import bar
from looseleaf_text.calibration import CONTENT_FREE, content_free, offsets, subtract
from looseleaf_text.model import MeteredModel
from looseleaf.resume import SearchState
from looseleaf_prompting_survey.ensemble import accuracy, gold_places, log_likelihood
from looseleaf_prompting_survey.pool import default_pool

CHUNK = 32
"""Examples scored together: few enough that limits on time are kept."""


@dataclasses.dataclass
class Scored:
    """A prompt and what it said about the examples.

    Attributes:
        name: the template's text, or ``start`` and a number.
        prompt: calibrated, where that was asked for.
        rows: classification: (examples, labels) log-probabilities, calibrated; None for generation.
        answers: generation: the texts.
        accuracy: share of right answers, or the mean mark.
        log_likelihood: mean log-probability of the right label; for generation the mean mark.
    """

    name: str
    prompt: Prompt
    rows: list[list[float]] | None
    answers: list[str] | None
    accuracy: float
    log_likelihood: float


class Candidates:
    """Prompts of one search, each asked about the same examples once.

    A stopped search is done again from its beginning; what was asked before is read from the state, for nothing.

    Args:
        optimizer, task, model, budget, start, seed, state_dir, progress: see :class:`looseleaf.PromptOptimizer`.
        templates: what the optimiser was given; none: a pool written by hand.
        most: examples used, at most.
        calibrated: take back what each prompt says about inputs without content.
    """

    def __init__(self, optimizer: PromptOptimizer, task: Task, model: LanguageModel, budget: Budget | None,
                 start: Prompt | None, seed: int, state_dir: str | Path | None, progress: bool | None, *,
                 templates: Sequence[str], most: int, calibrated: bool) -> None:
        task.validate(model)
        self.task, self.calibrated = task, calibrated and task.labels is not None
        self.budget = budget or Budget()
        self.model = MeteredModel(model, self.budget)
        self.examples = some(list(task.dev) or list(task.train), most, seed)
        self.golds = gold_places(task, self.examples) if task.labels is not None else []
        self.first: list[tuple[str, Prompt]] = []
        if start is not None:
            self.first += [(f"start {n}", p) for n, p in enumerate(start.members or [start])]
        self.first += [(t.text, self.prompt(t)) for t in map(Template, templates)] if templates else [
            (t.text, self.prompt(t)) for t in default_pool(task)]
        # A start and a template may be worded alike; what is asked is asked once.
        kept = SearchState(state_dir, {**optimizer.identity(task, model, start, seed),
                                       "pool": [[name, p.render(self.examples[0])] for name, p in self.first]})
        self.state = kept
        self.asked: dict[str, dict[str, Any]] = {}
        self.made: dict[str, list[str]] = {}
        saved = kept.load()
        if saved is not None:
            self.asked, self.made = dict(saved["asked"]), dict(saved["made"])
            self.budget.restore(saved["used"])
        self.bar = bar(type(optimizer).__name__, None, progress)

    def prompt(self, template: Template) -> Prompt:
        """The template as a prompt of the task."""
        made = template.to_prompt(self.task.labels)
        unknown = sorted(set(template.inputs) - set(self.examples[0].fields))
        if unknown:
            raise ValueError(f"the template {template.text!r} wants {unknown}; examples of task {self.task.name!r} "
                             f"have {sorted(self.examples[0].fields)}")
        return made

    def score(self, name: str, prompt: Prompt) -> Scored:
        """Ask about all examples.

        Raises:
            BudgetExhausted: the prompt cannot be paid for; nothing of it is kept.
        """
        kept = self.asked.get(name)
        if kept is None:
            kept = self._ask(prompt)
            self.asked[name] = kept
            self.save()
        self.bar.update()
        if self.task.labels is None:
            marks = [self.task.mark(a, e) for a, e in zip(kept["answers"], self.examples, strict=True)]
            mean = sum(marks) / len(marks)
            return Scored(name, prompt, None, kept["answers"], mean, mean)
        if self.calibrated:
            prompt = dataclasses.replace(prompt, info={**prompt.info, "calibration": kept["offsets"]})
        rows = kept["rows"]
        return Scored(name, prompt, rows, None, accuracy(rows, self.golds), log_likelihood(rows, self.golds))

    def _ask(self, prompt: Prompt) -> dict[str, Any]:
        chunks = [self.examples[at:at + CHUNK] for at in range(0, len(self.examples), CHUNK)]
        if self.task.labels is None:
            return {"answers": [a for chunk in chunks for a in self.task.predict(prompt, self.model, chunk)]}
        plain = prompt if not self.calibrated else dataclasses.replace(
            prompt, info={k: v for k, v in prompt.info.items() if k != "calibration"})
        rows = [row for chunk in chunks for row in self.task.log_probs(plain, self.model, chunk)]
        if not self.calibrated:
            return {"rows": rows}
        empty = content_free(self.examples[0].fields, CONTENT_FREE)
        leaning = offsets(self.task.log_probs(plain, self.model, empty))
        return {"rows": subtract(rows, leaning), "offsets": leaning}

    def save(self) -> None:
        """Write what was asked, made and spent."""
        self.state.save({"asked": self.asked, "made": self.made, "used": self.budget.used})

    def info(self, found: Sequence[Scored], stopped: str, fitness: float) -> dict[str, Any]:
        """What every search says about itself."""
        self.save()
        self.bar.close()
        best = list(itertools.accumulate((s.accuracy for s in found), max))
        return {"fitness": fitness, "evaluations": len(found), "stopped": stopped, "examples": len(self.examples),
                "history": [[(n + 1) * len(self.examples), best[n]] for n in range(len(found))],
                "candidates": [[s.name, s.accuracy, s.log_likelihood] for s in found]}


def some(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """Up to ``most`` examples, the classes in turn, so that each has its share."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    turn: dict[str | None, int] = {}
    ranked: list[tuple[int, int, Example]] = []
    for example in order:
        turn[example.label] = turn.get(example.label, 0) + 1
        ranked.append((turn[example.label], len(ranked), example))
    return [e for _, _, e in sorted(ranked, key=lambda r: r[:2])[:most]]
