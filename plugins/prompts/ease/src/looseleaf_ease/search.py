"""One search: arms, instructions, what was tried, what came out, what it cost, and how to go on from there."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from looseleaf import Budget, Example
from looseleaf.progress import bar
from looseleaf.resume import SearchState
from looseleaf_text import LanguageModel, TextPrompt, TextTask
from looseleaf_text.encoders import Choice, Encoders, Vectors, encode
from looseleaf_text.slots import slots

ENCODERS = Encoders("EASE", "looseleaf-ease")
"""MiniLM sees 512 tokens of a prompt; the rest is cut off, as in the authors' code."""
Arm = tuple[int, tuple[int, ...]]
"""Place of the instruction among the candidates, and places of the exemplars in the pool, in their order."""


def generator(*purpose: object) -> np.random.Generator:
    """A generator of its own for each purpose, such as (seed, "round", 7): nothing random depends on what came
    before, so that a search can be resumed anywhere."""
    return np.random.default_rng(random.Random(repr(purpose)).getrandbits(128))


def draw(rng: np.random.Generator, pool: int, k: int, instructions: int, count: int,
         without: Collection[Arm] = ()) -> list[Arm]:
    """Different arms drawn uniformly: ``count`` of them, fewer after those drawn twice or in ``without`` are left
    out, and all there are where there are no more than ``count``.

    Args:
        rng: the source of randomness.
        pool, k: exemplars to choose from, and how many are chosen, in order.
        instructions: how many there are to choose from.
        count: how many arms are drawn.
        without: arms not wanted.
    """
    if math.perm(pool, k) * instructions <= count:
        every = list(itertools.product(range(instructions), itertools.permutations(range(pool), k)))
        arms = [every[n] for n in rng.permutation(len(every))]
    else:
        # The k least of random keys, in the order of their keys, are a uniformly drawn ordered set.
        keys = rng.random((count, pool))
        sets = np.argpartition(keys, k - 1, axis=1)[:, :k]
        sets = np.take_along_axis(sets, np.take_along_axis(keys, sets, 1).argsort(1), 1)
        chosen = rng.integers(instructions, size=count)
        arms = [(int(i), tuple(s)) for i, s in zip(chosen, sets.tolist(), strict=True)]
    return [arm for arm in dict.fromkeys(arms) if arm not in without]


def sets_of(arms: Sequence[Arm]) -> np.ndarray:
    """The exemplars of arms of like size, int64 of shape (arms, k)."""
    return np.array([exemplars for _, exemplars in arms], dtype=np.int64)


DEMONSTRATIONS = 10
"""Shown for each proposal, as in the authors' code."""
QUESTION = "The instruction was to"
LONGEST = 40
"""Tokens of a proposal at most."""


def context(prompt: TextPrompt) -> str:
    """What of a prompt stands before the example: instruction and exemplars."""
    whole = prompt.as_template(())
    asked = TextPrompt(template=prompt.template, answer_prefix=prompt.answer_prefix).as_template(())
    return whole.removesuffix(asked).removesuffix(prompt.separator)


def propose(model: LanguageModel, base: TextPrompt, pool: Sequence[Example], count: int, seed: int) -> list[str]:
    """At most ``count`` instructions, each made from other demonstrations; empty and repeated ones are left out.

    Greedy, so that a server's random numbers play no part; the demonstrations differ instead.

    Args:
        model: writes them; one call each.
        base: how examples are shown.
        pool: examples.
        count: how many are asked for.
        seed: decides which demonstrations are shown.
    """
    rng = generator(seed, "instructions")
    asked = []
    for _ in range(count):
        chosen = rng.permutation(len(pool))[:DEMONSTRATIONS]
        shown = TextPrompt(exemplars=[pool[n] for n in chosen], template=base.template, labels=base.labels,
                       answer_prefix=base.answer_prefix, separator=base.separator)
        asked.append(f"{context(shown)}{base.separator}{QUESTION}")
    answers = [answer.strip() for answer in model.generate(asked, LONGEST, ["\n"])] if asked else []
    return [a[0].upper() + a[1:] for a in dict.fromkeys(answers) if a]


@dataclasses.dataclass(frozen=True)
class Result:
    """What an arm gave.

    Attributes:
        score: mean score on the validation examples.
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
        task, model, budget, seed, state_dir, progress: see :meth:`looseleaf.PromptOptimizer.optimize`.
        identity: what makes two searches the same one; the encoder's name is added.
        k: exemplars in a prompt.
        total_iterations: evaluations after which the search ends.
        pool, validation: at most so many examples are used.
        encoder: what embeds prompts, see :meth:`looseleaf_text.encoders.Encoders.resolve`.
        instructions: candidates beside the start's own, or none.
        propose: how many more the model writes.
        target: a score that ends the search.
        start: instruction, form and first exemplars; None: the task's.
        name: of the progress bar.

    Attributes:
        pool: examples that exemplars are taken from.
        validation: examples that arms are scored on.
        instructions: candidates; the start's own, or none, is the first.
        tried: arm -> result, in order.
        confidence: the bandit's, once it has pulled an arm.

    Raises:
        ValueError: the task cannot be worked with, has no validation examples or fewer examples than ``k``, or the
            start has no place for exemplars.
    """

    def __init__(self, task: TextTask, model: LanguageModel, *, identity: Mapping[str, Any], k: int,
                 total_iterations: int, pool: int, validation: int, encoder: Choice,
                 instructions: Sequence[str] = (), propose: int = 0, target: float = 1.0, budget: Budget | None = None,
                 start: TextPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None, name: str = "EASE") -> None:
        task.validate(model)
        if not len(task.dev):
            raise ValueError(f"task {task.name!r}: expected dev examples, got none: give some (the paper has 20), on "
                             "which sets of exemplars are compared; the exemplars themselves come from train")
        self.task, self.seed, self.k, self.total, self.target = task, seed, k, total_iterations, target
        self.given, self.propose = tuple(instructions), propose
        self.budget = budget or Budget()
        self.model: Any = self.budget.meter(model)
        self.base = _base(task, start)
        self.validation = task.in_turn(task.dev, validation)
        self.pool = _distinct(task.in_turn(task.train, pool), task)
        if k > len(self.pool):
            raise ValueError(f"EASE.k: expected an integer in [1, {len(self.pool)}], the different examples that task "
                             f"{task.name!r} has to choose from, got {k}: give more in train (EASE.pool={pool} at most "
                             "are used)")
        self.first = self._first(start)
        self.warn_of_shared()
        self.encoder_name, self.encoder = ENCODERS.resolve(encoder, self.model)
        self.tried: dict[Arm, Result] = {}
        self.instructions: list[str] = []
        self.vectors: Vectors | None = None
        self.distances: np.ndarray | None = None
        self.confidence: Tensor | None = None
        # A function has no lasting name but its own.
        self.state = SearchState(state_dir, {**identity, "parameters": {
            **identity["parameters"], "encoder": self.encoder_name}})
        self._load()
        self.bar = bar(name, total_iterations, progress)
        self.bar.update(len(self.tried))

    def _first(self, start: TextPrompt | None) -> Arm | None:
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
        found = propose(self.model, self.base, self.pool, self.propose, self.seed) if self.propose else []
        self.instructions = list(dict.fromkeys([self.base.text, *self.given, *found]))
        self.save()

    def prompt(self, arm: Arm) -> TextPrompt:
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
        self.budget.check(calls=len(self.validation), tokens=1)

    def evaluate(self, arm: Arm, vector: np.ndarray | None = None) -> None:
        """Score ``arm`` on the validation examples; one that was tried costs nothing.

        Args:
            arm: what to try.
            vector: its embedding, where known; all arms before it have theirs then.

        Raises:
            BudgetExhausted: it cannot be paid for.
        """
        if arm in self.tried:
            return
        found = self.task.evaluate(self.prompt(arm).on(self.model), self.validation)
        likelihood = None
        if found.class_scores is not None:
            names = list(self.task.labels or ())
            right = [row[names.index(str(e.target))]
                     for row, e in zip(found.class_scores, self.validation, strict=True)]
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
        reached = any(r.score >= self.target for r in self.tried.values())
        return reached or len(self.tried) >= self.total

    # -- on disk --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything, atomically."""
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

    def finish(self, stopped: str, extra: dict[str, Any]) -> TextPrompt:
        """The best prompt, with the metadata of the search."""
        best = self.best()
        result = self.tried[best] if best is not None else None
        made = self.prompt(best if best is not None else (0, tuple(range(self.k))))
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


def _base(task: TextTask, start: TextPrompt | None) -> TextPrompt:
    if start is None:
        return TextPrompt.for_task(task)
    if not isinstance(start, TextPrompt):
        raise ValueError(f"start: expected a TextPrompt, whose exemplars are chosen, got a {type(start).__name__}")
    if set(slots(start.text)) & set(slots(start.template)):
        raise ValueError(f"the start's text {start.text!r:.80} says itself where the example goes and has no place for "
                         "exemplars: give its instruction alone as text, and the rest as template and answer_prefix")
    return start


def _distinct(examples: Sequence[Example], task: TextTask) -> list[Example]:
    """Without examples that look the same: two arms that make one prompt would be evaluated twice."""
    return list({task.demonstration(e): e for e in reversed(examples)}.values())[::-1]
