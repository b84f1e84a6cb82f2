"""Tasks with one right answer each, whose answers differ in how likely they are beforehand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from looseleaf.errors import did_you_mean

CAREFUL = ("The right answer may be an unlikely one. Do not rely on how common an answer is or on what you expect: "
           "work it out from the input alone.\n\n")
"""The prompting intervention: what stands before the prompt."""


@dataclasses.dataclass(frozen=True)
class Instance:
    """One question.

    Attributes:
        text: what goes into the template.
        answer: the right answer.
        size: how hard it is by itself, such as how many things are to be counted; the slope on the prior is also given
            at equal size.
    """

    text: str
    answer: str
    size: float = 0.0


@dataclasses.dataclass(frozen=True)
class PriorTask:
    """Questions of one kind, and the answers among which a model chooses by likelihood.

    A prompt is the demonstrations, each a line of template, answer and ``end``, and the template with the question.

    Attributes:
        name: short name.
        instances: the questions.
        answers: the answer space, two or more, all different.
        template: how a question is shown, with ``{input}``; the answer follows after a space.
        demonstrations: solved questions that come first.
        end: what closes an answer and is scored with it. Needed where an answer is the beginning of another one
            ("1" and "12"), which would otherwise count the other's probability as its own.
        careful: the instruction of the prompting intervention.

    Raises:
        ValueError: no questions, fewer than two answers, an answer that occurs twice, a right answer that is not in
            the answer space, or a template without its slot.
    """

    name: str
    instances: tuple[Instance, ...]
    answers: tuple[str, ...]
    template: str = "{input} ->"
    demonstrations: tuple[Instance, ...] = ()
    end: str = ""
    careful: str = CAREFUL

    def __post_init__(self) -> None:
        if self.template.count("{input}") != 1:
            raise ValueError(f"task {self.name!r} has template={self.template!r}: allowed is a text with {{input}} "
                             "once")
        if not self.instances:
            raise ValueError(f"task {self.name!r} has no instances: give at least one")
        if len(self.answers) < 2 or not all(a.strip() for a in self.answers):
            raise ValueError(f"task {self.name!r} has the answers {list(self.answers)[:3]}: allowed are two or more "
                             "texts, none empty")
        twice = [a for a, n in Counter(a.strip() for a in self.answers).items() if n > 1]
        if twice:
            raise ValueError(f"task {self.name!r}: {twice[0]!r} is in the answer space more than once (of {len(twice)} "
                             "such answers): allowed is each answer once, or the model cannot tell them apart")
        known = set(self.answers)
        for instance in self.instances:
            if instance.answer not in known:
                raise ValueError(f"task {self.name!r}: the right answer {instance.answer!r} is not in the answer space "
                                 f"of {len(known)}: add it.{did_you_mean(instance.answer, known)}")

    def prompt(self, instance: Instance, careful: bool = False) -> str:
        """What the model is shown; ``careful``: with the instruction in front."""
        return self._head(careful) + self.template.replace("{input}", instance.text)

    def uninformative(self, careful: bool = False) -> str:
        """The prompt with the question taken out: what it gives an answer is that answer's prior."""
        before, after = self.template.split("{input}")
        # the space that stood between the question and what follows goes with the question
        return self._head(careful) + (before.rstrip(" ") + after if before else after.lstrip(" "))

    def continuation(self, answer: str) -> str:
        """An answer as it is scored."""
        return f" {answer}{self.end}"

    def line(self, instance: Instance) -> str:
        """A solved question, as it stands among the demonstrations."""
        text = self.template.replace("{input}", instance.text) + self.continuation(instance.answer)
        return text if text.endswith("\n") else text + "\n"

    def _head(self, careful: bool) -> str:
        return (self.careful if careful else "") + "".join(self.line(d) for d in self.demonstrations)

    def part(self, instances: Sequence[Instance], answers: Sequence[str] | None = None) -> PriorTask:
        """The same task with other questions, and perhaps other answers."""
        return dataclasses.replace(self, instances=tuple(instances), answers=tuple(answers or self.answers))

    def to_json(self) -> str:
        """The task as text, such as a file for ``looseleaf run prior-distribution --text``."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PriorTask:
        """The inverse of :meth:`to_json`; every field but name, instances and answers may be left out.

        Raises:
            ValueError: not such a text.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a task in JSON is wanted ({error}): PriorTask.to_json writes one") from error
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = [key for key in data if key not in fields] if isinstance(data, dict) else []
        if not isinstance(data, dict) or unknown or not {"name", "instances", "answers"} <= set(data):
            raise ValueError(f"a task has the fields {', '.join(sorted(fields))}; got "
                             f"{', '.join(data) or 'none' if isinstance(data, dict) else type(data).__name__}."
                             + (did_you_mean(unknown[0], fields) if unknown else ""))
        made = {**data, "answers": tuple(data["answers"]), "instances": _instances(data["instances"]),
                "demonstrations": _instances(data.get("demonstrations", ()))}
        return cls(**made)


def _instances(rows: Sequence[Mapping[str, Any]]) -> tuple[Instance, ...]:
    try:
        return tuple(Instance(**row) for row in rows)
    except TypeError as error:
        raise ValueError(f"an instance has text, answer and, if you like, size ({error})") from error


def split_by_answer(task: PriorTask, priors: Mapping[str, float], *, held_out: float = 0.25, seed: int = 0,
                    ) -> tuple[PriorTask, PriorTask]:
    """Training and test part whose answers are disjoint and whose priors are spread alike.

    The answers, sorted by prior, are cut into runs of ``1 / held_out``, and from each run one is drawn for the test. An
    answer of the demonstrations may be on either side; it is not trained on there.

    Args:
        task: the task.
        priors: answer -> log prior.
        held_out: share of the answers that goes to the test, above 0 and at most 0.5.
        seed: of the draw.

    Raises:
        ValueError: a share out of range, an answer without a prior, or too few answers for two on each side.
    """
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out={held_out}: allowed is above 0 and at most 0.5")
    missing = [a for a in task.answers if a not in priors]
    if missing:
        raise ValueError(f"no prior for the answer {missing[0]!r} (and {len(missing) - 1} more): give one for each")
    rng = random.Random(seed)
    ranked = sorted(task.answers, key=lambda a: (priors[a], a))
    count = round(len(ranked) * held_out)
    if count < 2 or len(ranked) - count < 2:
        raise ValueError(f"task {task.name!r} has {len(ranked)} answers: held_out={held_out} leaves fewer than two on "
                         "one side; give more answers")
    edges = [round(i * len(ranked) / count) for i in range(count + 1)]
    test = {rng.choice(ranked[a:b]) for a, b in itertools.pairwise(edges)}
    sides = []
    for chosen in ([a for a in task.answers if a not in test], [a for a in task.answers if a in test]):
        sides.append(task.part([i for i in task.instances if i.answer in set(chosen)], chosen))
    return sides[0], sides[1]


__all__ = ["CAREFUL", "Instance", "PriorTask", "split_by_answer"]
