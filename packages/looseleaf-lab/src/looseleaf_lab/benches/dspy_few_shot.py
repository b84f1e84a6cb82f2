"""DSPy's few-shot optimiser as a baseline; nothing of it is needed where it is not installed.

DSPy chooses the exemplars; they are shown in the task's own form and scored by the task's own rule, as for all other
methods here. So the search is compared, not DSPy's way to write prompts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looseleaf import Budget
from looseleaf_text import TextPrompt

if TYPE_CHECKING:
    from looseleaf import Example
    from looseleaf_text import LanguageModel, TextTask

NAME = "(DSPy few-shot)"


def installed() -> bool:
    """Whether DSPy is here."""
    return importlib.util.find_spec("dspy") is not None


class DSPyFewShot:
    """``BootstrapFewShotWithRandomSearch``: random training examples, those first that the model answers rightly.

    Args:
        shots: exemplars of a prompt, at most.
    """

    def __init__(self, shots: int = 4) -> None:
        self.shots = shots

    def hyperparameters(self) -> dict[str, Any]:
        """What decides the result."""
        return {"optimizer": "BootstrapFewShotWithRandomSearch", "shots": self.shots}

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None, seed: int = 0,
                 state_dir: str | Path | None = None, progress: bool | None = None) -> TextPrompt:
        """The best set of exemplars that DSPy finds within the budget; it keeps no state and does not resume."""
        import dspy

        budget = Budget(calls=500) if budget is None else budget
        metered = budget.meter(model)
        train = [_to_dspy(dspy, e, n) for n, e in enumerate(task.train)]
        dev = [_to_dspy(dspy, e, n + len(train)) for n, e in enumerate(task.dev)]
        examples: list[Example] = [*task.train, *task.dev]
        random.Random(seed).shuffle(train)  # DSPy's own candidates are the same whatever the seed
        history: list[list[float]] = []

        class Answer(dspy.Predict):  # type: ignore[misc, name-defined]
            def forward(self, **given: Any) -> Any:
                prompt = TextPrompt.for_task(task, exemplars=[examples[int(d["place"])] for d in self.demos])
                answer = prompt.on(metered).predict([examples[int(given["place"])]])[0]
                prediction = dspy.Prediction(answer=answer)
                if dspy.settings.trace is not None:
                    dspy.settings.trace.append((self, given, prediction))
                return prediction

        def right(example: Any, prediction: Any, trace: Any = None) -> float | bool:
            score = task.score(prediction["answer"], examples[int(example["place"])])
            return score if trace is None else score >= 0.5

        # as many candidates as the budget holds: each is scored on all of dev, after a few tries on train
        most = (budget.calls or 500) // (len(dev) + 2 * self.shots) - 3
        with _quiet():
            search = dspy.BootstrapFewShotWithRandomSearch(
                metric=right, max_bootstrapped_demos=self.shots, max_labeled_demos=self.shots,
                num_candidate_programs=max(1, most), num_threads=1, max_errors=10**9)
            found = search.compile(Answer("place -> answer"), trainset=train, valset=dev)
        tried = sorted(found.candidate_programs, key=lambda c: c["seed"])
        for n in range(1, len(tried) + 1):
            history.append([n / len(tried) * budget.used["calls"], max(float(c["score"]) for c in tried[:n]) / 100])
        spent = budget.calls is not None and budget.used["calls"] >= budget.calls
        return TextPrompt.for_task(task, exemplars=[examples[int(d["place"])] for d in found.demos], info={
            "fitness": history[-1][1], "evaluations": len(tried), "history": history,
            "stopped": "budget: calls" if spent else "done"})


def _to_dspy(dspy: Any, example: Example, place: int) -> Any:
    return dspy.Example(place=str(place), answer=str(example.target)).with_inputs("place")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its messages and bars, which would break ``--json``."""
    level = logging.getLogger("dspy").level
    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        try:
            yield
        finally:
            logging.getLogger("dspy").setLevel(level)
