"""Two optimisers over templates: the best one of a pool and its paraphrases, and a weighted ensemble of all."""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from looseleaf import Budget, Paper, Prompt, Table
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf_prompting_survey.ensemble import (
    accuracy_weights,
    likelihood_weights,
    log_likelihood,
    score_rows,
    target_places,
)
from looseleaf_prompting_survey.templates import default_pool, paraphrase
from looseleaf_prompting_survey.typology import typology
from looseleaf_text import (
    CalibratedPrompt,
    EnsemblePrompt,
    LanguageModel,
    Template,
    TextOptimizer,
    TextPrompt,
    TextTask,
)
from looseleaf_text.calibration import content_free, offsets, subtract
from looseleaf_text.ensemble import combine, most_voted

PAPER = Paper(
    title="Pre-train, Prompt, and Predict: A Systematic Survey of Prompting Methods in Natural Language Processing",
    authors=("Pengfei Liu", "Weizhe Yuan", "Jinlan Fu", "Zhengbao Jiang", "Hiroaki Hayashi", "Graham Neubig"),
    year=2023, arxiv="2107.13586", venue="ACM Computing Surveys",
    summary="Words your question in several ways and weighs the answers; the parts of every prompting method to "
            "build on.")

CHUNK = 32
"""Examples scored together: few enough that limits on time are kept."""
START = "start "
"""What the names of prompts given as ``start`` begin with; those of templates are their texts."""


@dataclasses.dataclass
class Scored:
    """A prompt and what the model said about the examples.

    Attributes:
        name: the template's text, or ``start`` and a number.
        prompt: calibrated, where that was asked for.
        rows: classification: (examples, labels) log-probabilities, calibrated; empty for generation.
        answers: generation: the texts; empty for classification.
        score: by the task's metric.
        log_likelihood: mean log-probability of the right label; for generation the score again.
    """

    name: str
    prompt: Prompt
    rows: list[list[float]]
    answers: list[str]
    score: float
    log_likelihood: float

    @property
    def rank(self) -> tuple[float, float]:
        """What candidates are compared by."""
        return self.score, self.log_likelihood


@dataclasses.dataclass
class TemplateOptimizer(TextOptimizer):
    """What both optimisers share: prompts of a pool, each asked about the same examples once.

    Args:
        templates: with ``[X]`` or ``{field}`` and ``[Z]``; none: the task's own and seven others written by hand.
        calibrate: remove each template's bias, measured on content-free inputs; three calls each.
        num_examples: labelled examples that templates are scored on, at most.
    """

    templates: tuple[str, ...] = ()
    calibrate: bool = False
    num_examples: Annotated[int, In(">= 1")] = 64
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("templates", not isinstance(self.templates, str) and all(
            isinstance(t, str) for t in self.templates), "a sequence of texts")


class Candidates:
    """The prompts of one search. Every answer is kept in the state, so that none is paid for twice.

    Args:
        optimizer, task, model, start, seed, options: see :meth:`looseleaf.PromptOptimizer.optimize`.

    Attributes:
        search: the search.
        queue: (name, prompt), in the order in which they are tried; the first ``search.done`` are.
        examples: those of ``task.dev`` (``task.train`` where there is none) that prompts are scored on.
        targets: places of their labels; empty for generation.
    """

    def __init__(self, optimizer: TemplateOptimizer, task: TextTask, model: LanguageModel, *, start: Prompt | None,
                 seed: int, **options: Any) -> None:
        optimizer.check_model(model)
        task.validate(model)
        self.task, self.calibrated = task, optimizer.calibrate and task.labels is not None
        shuffled = list(task.dev) or list(task.train)
        random.Random(seed).shuffle(shuffled)
        self.examples = task.in_turn(shuffled, optimizer.num_examples)
        self.targets = target_places(task, self.examples) if task.labels is not None else []
        starts: Sequence[Prompt] = start.members if isinstance(start, EnsemblePrompt) else [start] if start else []
        self.queue: list[tuple[str, Prompt]] = [(f"{START}{n}", p) for n, p in enumerate(starts)]
        self.queue += [(t.text, self.prompt(t)) for t in map(Template, optimizer.templates)
                       ] if optimizer.templates else [(t.text, self.prompt(t)) for t in default_pool(task)]
        self.search = Search(optimizer, task, model, start=start, seed=seed, **options, identity={
            "pool": [[name, prompt.fingerprint()] for name, prompt in self.queue]})
        self.asked: dict[str, dict[str, Any]] = self.search.state.setdefault("asked", {})

    def prompt(self, template: Template) -> TextPrompt:
        """The template as a prompt of the task.

        Raises:
            ValueError: the template has not one answer slot, or wants inputs that the examples lack.
        """
        unknown = sorted(set(template.inputs) - set(self.examples[0].inputs))
        if unknown:
            raise ValueError(f"the template {template.text!r}: expected slots for {sorted(self.examples[0].inputs)}, "
                             f"the inputs of task {self.task.name!r}, got {unknown} too")
        return template.to_prompt(self.task.labels, max_tokens=self.task.max_tokens, stop=tuple(self.task.stop))

    def ask(self, name: str, prompt: Prompt) -> None:
        """Ask about all examples, unless that was done.

        Raises:
            BudgetExhausted: the prompt cannot be paid for; nothing of it is kept.
        """
        if name in self.asked:
            return
        plain = self._plain(prompt).on(self.search.model)
        chunks = [self.examples[at:at + CHUNK] for at in range(0, len(self.examples), CHUNK)]
        if self.task.labels is None:
            self.asked[name] = {"answers": [a for chunk in chunks for a in plain.predict(chunk)]}
            return
        rows = [row for chunk in chunks for row in self.task.class_scores(plain, chunk)]
        if not self.calibrated:
            self.asked[name] = {"rows": rows}
            return
        empty = content_free(self.examples[0].inputs)
        own = offsets(self.task.class_scores(plain, empty))
        self.asked[name] = {"rows": subtract(rows, own), "offsets": own}

    def _plain(self, prompt: Prompt) -> Prompt:
        # a calibrated start is calibrated anew
        return prompt.prompt if self.calibrated and isinstance(prompt, CalibratedPrompt) else prompt

    def scored(self) -> list[Scored]:
        """The prompts tried so far."""
        return [self._scored(name, prompt) for name, prompt in self.queue[:self.search.done]]

    def _scored(self, name: str, prompt: Prompt) -> Scored:
        kept = self.asked[name]
        if self.task.labels is None:
            score = self.task.rate(kept["answers"], self.examples).score
            return Scored(name, prompt, [], kept["answers"], score, score)
        if self.calibrated:
            plain = self._plain(prompt)
            # the offsets stand in the order of the task's labels, which is that of its templates
            order = list(plain.on(self.search.model).classes or ())
            places = [list(self.task.labels).index(c) for c in order]
            prompt = CalibratedPrompt(plain, [kept["offsets"][p] for p in places])
        rows = kept["rows"]
        return Scored(name, prompt, rows, [], score_rows(self.task, rows, self.examples),
                      log_likelihood(rows, self.targets))

    def info(self, scored: Sequence[Scored], fitness: float, **more: Any) -> dict[str, Any]:
        """Metadata of the search."""
        best = list(itertools.accumulate((s.score for s in scored), max))
        count = len(self.examples)
        return self.search.info(
            fitness, len(scored), examples=count, history=[[(n + 1) * count, b] for n, b in enumerate(best)],
            candidates=[[s.name, s.score, s.log_likelihood] for s in scored], **more)


@dataclasses.dataclass
class TemplateSearch(TemplateOptimizer):
    """Takes the best template of a pool, and of what the model makes of the best (survey, section 3.3.1).

    Every template is scored by the task's metric on ``task.dev`` (``task.train`` where there is none), ties by the
    mean log-probability of the right label. In each round the ``beam`` best are paraphrased by the model itself and
    the paraphrases join the pool. Mined templates (:func:`mine_templates`) go into ``templates``.

    Args:
        templates: with ``[X]`` or ``{field}`` and ``[Z]``; none: the task's own and seven others written by hand.
        calibrate: remove each template's bias, measured on content-free inputs; three calls each.
        num_examples: labelled examples that templates are scored on, at most.
        rounds: of paraphrasing; 0 takes the best of the pool.
        beam: templates paraphrased in a round.
        paraphrases: of each.
        temperature: of the paraphrasing.
    """

    rounds: Annotated[int, In(">= 0")] = 1
    beam: Annotated[int, In(">= 1")] = 2
    paraphrases: Annotated[int, In(">= 1")] = 4
    temperature: Annotated[float, In("> 0")] = 0.9

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: Prompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            start: is scored first (its members, where it is an ensemble); only templates are paraphrased.

        Returns:
            The best prompt, whose ``info`` also holds ``name`` (its template), ``log_likelihood``, ``examples`` (how
            many prompts were scored on), ``candidates`` ([template, score, log-likelihood] in the order they were
            tried) and ``history`` ([examples scored, best score] after each).
        """
        pool = Candidates(self, task, model, start=start, seed=seed, budget=budget, state_dir=state_dir,
                          progress=progress)
        search, state = pool.search, pool.search.state
        rounds: list[list[str]] = state.setdefault("rounds", [])
        pool.queue += [(text, pool.prompt(Template(text))) for texts in rounds for text in texts]
        with search:
            for n in search.steps():
                while n == len(pool.queue) and len(rounds) < self.rounds:
                    texts = self._paraphrased(pool, len(rounds), seed)
                    rounds.append(texts)
                    pool.queue += [(text, pool.prompt(Template(text))) for text in texts]
                if n == len(pool.queue):
                    break
                pool.ask(*pool.queue[n])
        scored = pool.scored()
        if not scored:
            return TextPrompt.for_task(task, info=pool.info(scored, 0.0))
        best = max(scored, key=lambda s: s.rank)
        return dataclasses.replace(best.prompt, info=pool.info(
            scored, best.score, name=best.name, log_likelihood=best.log_likelihood))

    def _paraphrased(self, pool: Candidates, number: int, seed: int) -> list[str]:
        """New templates made from the best so far, none tried before."""
        kept: dict[str, list[str]] = pool.search.state.setdefault("paraphrases", {})
        scored = pool.scored()
        own = [s for s in scored if not s.name.startswith(START)]
        for best in sorted(own, key=lambda s: s.rank, reverse=True)[:self.beam]:
            key = f"{number} {best.name}"
            if key not in kept:
                drawn = zlib.crc32(f"{seed} {key}".encode()) % 10**6  # servers take seeds of 32 bits
                texts = paraphrase(Template(best.name), pool.search.model, self.paraphrases, seed=drawn,
                                   temperature=self.temperature)
                kept[key] = [t.text for t in texts]
                pool.search.save()
        tried = {s.name for s in scored}
        made = [text for key, texts in kept.items() if key.startswith(f"{number} ") for text in texts]
        return [text for text in dict.fromkeys(made) if text not in tried]


@dataclasses.dataclass
class TemplateEnsemble(TemplateOptimizer):
    """Asks in several wordings and weighs the answers (survey, section 5.1).

    Nobody knows beforehand which wording a model takes best, and an ensemble need not choose. Weights are fitted on
    ``task.dev``, or on ``task.train`` where there is none. One call per member and example is what using the ensemble
    costs.

    Args:
        templates: with ``[X]`` or ``{field}`` and ``[Z]``; none: the task's own and seven others written by hand.
        calibrate: remove each template's bias, measured on content-free inputs; three calls each.
        num_examples: labelled examples the weights are fitted to, at most.
        weights: ``"uniform"``; ``"accuracy"``: in proportion to each template's accuracy (PET); ``"likelihood"``: those
            under which the right labels are likeliest. For generation tasks the latter two are both the mean score.
        combine: ``"average"`` of the probabilities, or majority ``"vote"``; generated texts are always voted on.
    """

    weights: Literal["uniform", "accuracy", "likelihood"] = "likelihood"
    combine: Literal["average", "vote"] = "average"

    @classmethod
    def table(cls) -> Table:
        """The survey's map of prompting methods; see :func:`typology`."""
        return typology()

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: Prompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> Prompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            start: becomes a further member (its members become members, where it is an ensemble).

        Returns:
            A :class:`looseleaf_text.EnsemblePrompt`, whose ``info`` also holds ``log_likelihood``, ``examples`` (how
            many the weights are fitted to), ``candidates`` ([template, score, log-likelihood] of each member) and
            ``history`` ([examples scored, best score] after each); the plain prompt, where the budget allows not one
            template.
        """
        pool = Candidates(self, task, model, start=start, seed=seed, budget=budget, state_dir=state_dir,
                          progress=progress)
        with pool.search:
            for n in pool.search.steps(len(pool.queue)):
                pool.ask(*pool.queue[n])
        scored = pool.scored()
        if not scored:
            return TextPrompt.for_task(task, info=pool.info(scored, 0.0))
        weights = self._weights(scored, pool.targets)
        if task.labels is None:
            texts = [most_voted(row, weights) for row in zip(*(s.answers for s in scored), strict=True)]
            info = pool.info(scored, task.rate(texts, pool.examples).score)
        else:
            rows = combine([s.rows for s in scored], weights, vote=self.combine == "vote")
            info = pool.info(scored, score_rows(task, rows, pool.examples),
                             log_likelihood=log_likelihood(rows, pool.targets))
        return EnsemblePrompt([s.prompt for s in scored], weights, self.combine, info=info)

    def _weights(self, scored: list[Scored], targets: list[int]) -> list[float] | None:
        if self.weights == "uniform":
            return None
        if not targets:
            scores = [s.score for s in scored]
            return scores if any(v > 0 for v in scores) and min(scores) >= 0 else None
        rows = [s.rows for s in scored]
        return accuracy_weights(rows, targets) if self.weights == "accuracy" else likelihood_weights(rows, targets)
