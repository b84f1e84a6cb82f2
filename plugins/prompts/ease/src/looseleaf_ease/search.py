"""The state of one search: what was tried, what came out, what it cost, and how to go on from there."""

from __future__ import annotations

import base64
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from looseleaf import Budget, BudgetExhausted
from looseleaf_text import Example, LanguageModel, Prompt, Task
from looseleaf.progress import bar
from looseleaf_text.model import MeteredModel
from looseleaf.resume import SearchState
from looseleaf_text.task import slots
from looseleaf_ease.arms import Arm, in_turn
from looseleaf_ease.encoder import Vectors, encode, resolve
from looseleaf_ease.instructions import context, propose

if TYPE_CHECKING:
    from looseleaf_ease.optimizer import EASE


@dataclasses.dataclass(frozen=True)
class Result:
    """What an arm gave.

    Attributes:
        score: mean mark on the validation examples.
        likelihood: mean log-probability of the right labels, which breaks ties; None for generation tasks.
        calls: calls spent on the whole search by then.
    """

    score: float
    likelihood: float | None
    calls: int

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better."""
        return self.score, 0.0 if self.likelihood is None else self.likelihood


class Search:
    """Arms tried so far, each evaluated once and written down at once.

    All that is random comes from the seed and the number of arms tried, so that a stopped search goes on as if it had
    not been stopped.

    Args:
        optimizer: whose search this is.
        task, model, budget, start, seed, state_dir, progress: see :class:`looseleaf.PromptOptimizer`.

    Attributes:
        pool: examples that exemplars are taken from.
        validation: examples that arms are marked on.
        instructions: candidates; the start's own, or none, is the first.
        tried: arm -> result, in order.
        confidence: the bandit's, once it has pulled an arm.

    Raises:
        ValueError: the task cannot be worked with, has no validation examples or fewer examples than ``k``, or the
            start has no place for exemplars.
    """

    def __init__(self, optimizer: EASE, task: Task, model: LanguageModel, budget: Budget | None,
                 start: Prompt | None, seed: int, state_dir: str | Path | None, progress: bool | None) -> None:
        task.validate(model)
        if not len(task.dev):
            raise ValueError(f"task {task.name!r} has no dev examples: give some (the paper has 20), on which sets of "
                             "exemplars are compared; the exemplars themselves come from train")
        self.task, self.optimizer, self.seed = task, optimizer, seed
        self.budget = budget or Budget()
        self.model = MeteredModel(model, self.budget)
        self.base = _base(task, start)
        self.validation = in_turn(task.dev, optimizer.validation)
        self.pool = _distinct(in_turn(task.train, optimizer.pool), task)
        if optimizer.k > len(self.pool):
            raise ValueError(f"EASE.k={optimizer.k}: task {task.name!r} has {len(self.pool)} different examples to "
                             f"choose from; allowed is k up to that, or give more in train (EASE.pool="
                             f"{optimizer.pool} at most are used)")
        self.first = self._first(start)
        self.warn_of_shared()
        self.encoder_name, self.encoder = resolve(optimizer.encoder, self.model)
        self.tried: dict[Arm, Result] = {}
        self.instructions: list[str] = []
        self.vectors: Vectors | None = None
        self.distances: np.ndarray | None = None
        self.confidence: Tensor | None = None
        # A function has no lasting name but its own.
        same = optimizer.identity(task, model, start, seed)
        same["parameters"]["encoder"] = self.encoder_name
        self.state = SearchState(state_dir, same)
        self._load()
        self.bar = bar(type(optimizer).__name__, optimizer.total_iterations, progress)
        self.bar.update(len(self.tried))

    def _first(self, start: Prompt | None) -> Arm | None:
        """The start's own exemplars as an arm; those not in the pool join it."""
        if start is None or not start.exemplars:
            return None
        places = []
        for example in start.exemplars:
            if example not in self.pool:
                self.pool.append(example)
            places.append(self.pool.index(example))
        return 0, tuple(places)

    def warn_of_shared(self) -> None:
        """Warn where a validation example is also to be had as an exemplar, which would tell its answer."""
        shown = {self.task.show(e) for e in self.pool}
        shared = sum(self.task.show(e) in shown for e in self.validation)
        if shared:
            warnings.warn(f"task {self.task.name!r}: {shared} of {len(self.validation)} validation examples are also "
                          "among the exemplars to choose from; their scores will be too high", UserWarning,
                          stacklevel=4)

    # -- prompts and vectors --------------------------------------------------------------------------------------

    def find_instructions(self) -> None:
        """Make the list of candidate instructions, asking the model for some where that is wanted.

        Raises:
            BudgetExhausted: the proposals cannot be paid for.
        """
        if self.instructions:
            return
        wanted = self.optimizer.propose
        found = propose(self.model, self.base, self.pool, wanted, self.seed) if wanted else []
        self.instructions = list(dict.fromkeys([self.base.text, *self.optimizer.instructions, *found]))
        self.save()

    def prompt(self, arm: Arm) -> Prompt:
        """The prompt of an arm."""
        instruction, exemplars = arm
        text = self.instructions[instruction] if self.instructions else self.base.text
        return dataclasses.replace(self.base, text=text, exemplars=[self.pool[n] for n in exemplars], info={})

    def encode(self, arms: Sequence[Arm]) -> Vectors:
        """Vectors of what stands before the example in the prompts of ``arms``, (arms, dimensions)."""
        return encode(self.encoder, [context(self.prompt(arm)) for arm in arms])

    def tried_vectors(self) -> Tensor:
        """Vectors of all arms tried, (arms, dimensions)."""
        known = 0 if self.vectors is None else len(self.vectors)
        missing = list(self.tried)[known:]
        if missing:
            self._add(self.encode(missing))
        assert self.vectors is not None
        return torch.from_numpy(self.vectors)

    def _add(self, vectors: Vectors) -> None:
        self.vectors = vectors if self.vectors is None else np.concatenate([self.vectors, vectors])

    def transport_cost(self) -> np.ndarray:
        """1 - cosine between each example of the pool and each validation example, both with their answers."""
        if self.distances is None:
            single = [dataclasses.replace(self.base, text="", exemplars=[e], info={})
                      for e in (*self.pool, *self.validation)]
            vectors = encode(self.encoder, [context(p) for p in single])
            self.distances = 1.0 - vectors[:len(self.pool)] @ vectors[len(self.pool):].T
        return self.distances.astype(np.float64)

    # -- evaluating -----------------------------------------------------------------------------------------------

    def check_budget(self) -> None:
        """Raise BudgetExhausted where no further evaluation can be paid for, before anything is computed for it."""
        over, left = self.budget.exhausted(), self.budget.remaining_calls()
        if over is None and left is not None and left < len(self.validation):
            over = f"budget: calls ({left} left, an evaluation takes {len(self.validation)})"
        if over is not None:
            raise BudgetExhausted(over)

    def evaluate(self, arm: Arm, vector: np.ndarray | None = None) -> None:
        """Mark ``arm`` on the validation examples; one that was tried costs nothing.

        Args:
            arm: what to try.
            vector: its embedding, where known; all arms before it have theirs then.

        Raises:
            BudgetExhausted: it cannot be paid for.
        """
        if arm in self.tried:
            return
        found = self.task.evaluate(self.prompt(arm), self.model, self.validation)
        likelihood = None
        if found.log_probs is not None:
            names = list(self.task.labels or ())
            right = [row[names.index(str(e.label))] for row, e in zip(found.log_probs, self.validation, strict=True)]
            likelihood = sum(right) / len(right)
        self.tried[arm] = Result(found.score, likelihood, int(self.budget.used["calls"]))
        if vector is not None:
            self._add(vector[None])
        self.bar.update()

    def best(self) -> Arm | None:
        """The arm with the best result, the first of equals; None where nothing was tried."""
        return max(self.tried, key=lambda arm: self.tried[arm].rank, default=None)

    def done(self) -> bool:
        """Whether as many arms as wanted were tried, or one reached the target."""
        reached = any(r.score >= self.optimizer.target for r in self.tried.values())
        return reached or len(self.tried) >= self.optimizer.total_iterations

    # -- on disk --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything, whole or not at all."""
        if self.state.path is None:
            return
        tensors = {name: torch.as_tensor(value).contiguous() for name, value in (
            ("vectors", self.vectors), ("distances", self.distances), ("confidence", self.confidence))
            if value is not None}
        # In one file with the rest, so that a kill between two writes cannot leave parts that do not fit together.
        packed = base64.b64encode(pack(tensors)).decode() if tensors else ""
        tried = [[instruction, list(exemplars), r.score, r.likelihood, r.calls]
                 for (instruction, exemplars), r in self.tried.items()]
        self.state.save({"tried": tried, "instructions": self.instructions, "used": self.budget.used,
                         "safetensors": packed})

    def _load(self) -> None:
        saved = self.state.load()
        if saved is None:
            return
        for instruction, exemplars, score, likelihood, calls in saved["tried"]:
            self.tried[instruction, tuple(exemplars)] = Result(score, likelihood, calls)
        self.instructions = list(saved["instructions"])
        self.budget.restore(saved["used"])
        if saved["safetensors"]:
            tensors = unpack(base64.b64decode(saved["safetensors"]))
            self.vectors, self.distances = (tensors[n].numpy() if n in tensors else None
                                            for n in ("vectors", "distances"))
            self.confidence = tensors.get("confidence")

    def finish(self, stopped: str, extra: dict[str, Any]) -> Prompt:
        """The best prompt, with what the search has to say."""
        best = self.best()
        result = self.tried[best] if best is not None else None
        made = self.prompt(best if best is not None else (0, tuple(range(self.optimizer.k))))
        history: list[list[float]] = []
        for r in self.tried.values():
            history.append([r.calls, max(r.score, history[-1][1] if history else r.score)])
        made.info = {
            "fitness": result.score if result else 0.0, "log_likelihood": result.likelihood if result else None,
            "evaluations": len(self.tried), "stopped": stopped, "encoder": self.encoder_name,
            "instruction": made.text, "instructions": self.instructions, "history": history,
            "tried": [[r.score, r.likelihood, instruction, list(exemplars)]
                      for (instruction, exemplars), r in self.tried.items()],
            "examples": {"pool": len(self.pool), "validation": len(self.validation)}, **extra}
        self.save()
        self.bar.close()
        return made


def _base(task: Task, start: Prompt | None) -> Prompt:
    if start is None:
        return Prompt.for_task(task)
    if start.messages is not None or start.soft is not None:
        raise ValueError("EASE chooses exemplars of a text prompt: give a start without messages and soft tokens")
    if set(slots(start.text)) & set(slots(start.template)):
        raise ValueError(f"the start's text {start.text!r:.80} says itself where the example goes and has no place for "
                         "exemplars: give its instruction alone as text, and the rest as template and answer_prefix")
    return start


def _distinct(examples: Sequence[Example], task: Task) -> list[Example]:
    """Without examples that look the same: two arms that make one prompt would be evaluated twice."""
    return list({task.demonstration(e): e for e in reversed(examples)}.values())[::-1]
