"""PragmaticExamples: the demonstrations of a prompt that tell the task best from what it might be taken for."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np

from looseleaf import Budget, Example, Paper
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf.resume import digest
from looseleaf_pragmatic_examples.choose import Rule
from looseleaf_pragmatic_examples.speech_acts import ExactListener, ExactSpeaker
from looseleaf_text import LanguageModel, TextOptimizer, TextPrompt, TextTask

if TYPE_CHECKING:
    Hypothesis = str | Rule
else:
    Hypothesis = str  # all that the command line, which reads types at run time, can be given

PAPER = Paper(
    title="Generating Pragmatic Examples to Train Neural Program Synthesizers",
    authors=("Saujas Vaduguru", "Daniel Fried", "Yewen Pu"), year=2024, arxiv="2311.05740", venue="ICLR 2024",
    code="https://github.com/saujasv/generating-pragmatic-examples",
    summary="Chooses the examples that show a rule best, as a cooperative speaker would; trains models by self-play to "
            "understand examples chosen so.")


@dataclasses.dataclass
class PragmaticExamples(TextOptimizer):
    """Chooses the ``k`` demonstrations of a prompt, in order, that best tell the task from what it might be taken for.

    The target is the rule that gives ``task.train`` its answers. The alternatives are hypotheses: functions from an
    example's inputs to an answer (:class:`looseleaf_pragmatic_examples.MatchesRegex` is one), or instructions that are
    tried on the model, one call for each training example. A hypothesis agrees with an example where its answer has
    the full score of the task's metric. At each turn the example with the highest S1 is shown: the one with which the
    fewest hypotheses agree, among those that agree with all before; ties go to the first, labels taking turns.
    [section on RSA; that a prompt's demonstrations are chosen so is ours]

    Without hypotheses the model's own readings are the alternatives [ours]: how it answers the training examples after
    ``k`` random ones of them, drawn ``readings`` times.

    Args:
        k: examples shown; >= 1, and at most the number of training examples.
        hypotheses: functions ``inputs -> answer``, and texts that are tried as instructions.
        readings: where there are no hypotheses, how many readings of the model take their place; >= 1.
        pool: at most this many training examples to choose from, labels taking turns; >= 1.
        alpha: rationality of the speaker that ``info["pragmatic"]`` reckons with; >= 0. The choice does not depend
            on it.
        dedupe: "text": every hypothesis counts; "language": those that agree with the same examples are one.
    """

    k: Annotated[int, In(">= 1")] = 4
    hypotheses: tuple[Hypothesis, ...] = ()
    readings: Annotated[int, In(">= 1")] = 8
    pool: Annotated[int, In(">= 1")] = 100
    alpha: Annotated[float, In(">= 0")] = 1.0
    dedupe: Literal["text", "language"] = "language"
    paper: ClassVar[Paper] = PAPER

    def validate(self) -> None:
        """See :meth:`looseleaf.Plugin.validate`."""
        self.check("hypotheses", not isinstance(self.hypotheses, str) and all(
            callable(h) or (isinstance(h, str) and h.strip()) for h in self.hypotheses),
            "a sequence of functions from inputs to an answer, and of instructions")

    def optimize(self, task: TextTask, model: LanguageModel, *, budget: Budget | None = None,  # type: ignore[override]
                 start: TextPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> TextPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`; ``start`` gives everything but the exemplars.

        Returns:
            The prompt; ``info["fitness"]`` is the probability of the target for a literal reader after the examples,
            ``info["pragmatic"]`` for one who knows that they were chosen, and ``info["remaining"]`` how many
            hypotheses are left after each, the target among them. ``info["chosen"]`` has their places in
            ``info["pool"]``, which are places in ``task.train``.

        Raises:
            ValueError: fewer training examples than ``k``, or a start that has no place for demonstrations.
        """
        task.validate()
        pool = task.in_turn(task.train, self.pool)
        if len(pool) < self.k:
            raise ValueError(f"task {task.name!r}: expected {self.k} training examples or more, as k, got {len(pool)}: "
                             "lower k, or raise pool")
        base = TextPrompt.for_task(task) if start is None else start
        if not isinstance(base, TextPrompt):
            raise ValueError(f"start: expected a TextPrompt, got {type(base).__name__}")
        shown = dataclasses.replace(base, exemplars=pool[:1])
        if shown.render(pool[-1]) == dataclasses.replace(base, exemplars=()).render(pool[-1]):
            raise ValueError(f"start: expected a prompt with a place for demonstrations, got {base.text!r:.80}, which "
                             "has slots of its own: give the instruction alone")
        rules = [[self._agrees(task, h(e.inputs), e) for e in pool] for h in self.hypotheses if callable(h)]
        asked = [dataclasses.replace(base, text=h, exemplars=()) for h in self.hypotheses if isinstance(h, str)]
        if not self.hypotheses:
            asked = [dataclasses.replace(base, exemplars=random.Random(f"{seed} {n}").sample(pool, self.k))
                     for n in range(self.readings)]
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress, identity={"rules": digest(rules)})
        with search:
            for n in search.steps(len(asked)):
                answers = asked[n].on(search.model).predict(pool)
                search.state.setdefault("agrees", []).append(
                    [self._agrees(task, a, e) for a, e in zip(answers, pool, strict=True)])
        matrix = np.array([[True] * len(pool), *rules, *search.state.get("agrees", [])], dtype=bool)
        chosen = ExactSpeaker(matrix, dedupe=self.dedupe).choose(0, self.k)
        listener = ExactListener(matrix, alpha=self.alpha, dedupe=self.dedupe)
        literal = [listener.literal(chosen[:n + 1]) for n in range(len(chosen))]
        places = {id(e): n for n, e in enumerate(task.train)}
        info = search.info(float(literal[-1][0]), len(matrix), pragmatic=float(listener.pragmatic(chosen)[0]),
                           remaining=[int((p > 0).sum()) for p in literal], chosen=chosen,
                           pool=[places[id(e)] for e in pool])
        return dataclasses.replace(base, exemplars=[pool[n] for n in chosen], info=info)

    def identity(self, *given: Any) -> dict[str, Any]:
        """See :meth:`looseleaf.PromptOptimizer.identity`: functions are told apart by what they answer, not by name."""
        own = super().identity(*given)
        texts = [h if isinstance(h, str) else "function" for h in self.hypotheses]
        return {**own, "parameters": {**own["parameters"], "hypotheses": texts}}

    @staticmethod
    def _agrees(task: TextTask, answer: Any, example: Example) -> bool:
        return task.score(answer, example) >= 1


__all__ = ["PAPER", "PragmaticExamples"]
