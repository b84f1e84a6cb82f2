"""Prompt composition and sharing (survey, sections 5.3 and 5.5): sub-prompts joined, and sub-prompts held in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from looseleaf_text import Example, LanguageModel, Template, Verbalizer
from looseleaf_text.template import spaced

Answers = dict[str, str]


@dataclasses.dataclass
class PromptComposer:
    """One prompt of several sub-prompts, each with an answer slot of its own; the answers together give the output.

    As in PTR (Han et al. 2021): "is e1 a person?", "is e2 a place?" and "how do they relate?" are asked in one text,
    and rules say which combination of answers is which class. The model answers from left to right, so an answer is
    scored given those before it: log P(z1, z2 | x) = log P(z1 | x) + log P(z2 | x, z1), each over its own answer space.

    Args:
        template: with named answer slots; sub-prompts are joined by ``+`` or :meth:`of`.
        spaces: name of a slot -> its verbalizer.
        rule: the labels of the slots -> the output; None: the labels joined by ``"; "``.

    Raises:
        ValueError: slots without an answer space, or spaces without a slot.
    """

    template: Template
    spaces: Mapping[str, Verbalizer]
    rule: Callable[[Answers], str] | None = None

    def __post_init__(self) -> None:
        if set(self.template.answers) != set(self.spaces) or not self.spaces:
            raise ValueError(f"the template {self.template.text!r} has the answer slots {list(self.template.answers)}, "
                             f"answers are given for {list(self.spaces)}: give a verbalizer for each slot")

    @classmethod
    def of(cls, parts: Sequence[tuple[Template, Verbalizer]],
           rule: Callable[[Answers], str] | None = None) -> PromptComposer:
        """A composition of sub-prompts with one answer slot each, in order."""
        template = Template("")
        for part, _ in parts:
            template = template + part
        return cls(template, {part.single(): space for part, space in parts}, rule)

    def __add__(self, other: PromptComposer) -> PromptComposer:
        """Both, one after the other; the rule of the first is kept, or else that of the second."""
        return PromptComposer(self.template + other.template, {**self.spaces, **other.spaces}, self.rule or other.rule)

    def log_probs(self, example: Example, model: LanguageModel) -> list[tuple[Answers, float]]:
        """Every combination of labels and its log-probability, likeliest first; probabilities sum to one.

        One call per combination of earlier answers: meant for a few slots of a few answers.
        """
        beams: list[tuple[Answers, Answers, float]] = [({}, {}, 0.0)]  # answers as text, labels, log-probability
        for name in self.template.answers:
            space = self.spaces[name]
            befores = [self.template.around(example, name, said)[0] for said, _, _ in beams]
            split = [spaced(before, space.space) for before in befores]
            rows = model.score([before for before, _ in split], [answers for _, answers in split])
            grown = []
            for (said, labels, total), row in zip(beams, space.log_probs(rows), strict=True):
                for label, value in zip(space.labels, row, strict=True):
                    # What follows is read after the label's first answer.
                    grown.append(({**said, name: space.answers[label][0]}, {**labels, name: label}, total + value))
            beams = grown
        return sorted(((labels, value) for _, labels, value in beams), key=lambda pair: -pair[1])

    def outputs(self, example: Example, model: LanguageModel) -> dict[str, float]:
        """Output -> probability, likeliest first: combinations that the rule gives one output are added up."""
        found: dict[str, float] = {}
        for labels, value in self.log_probs(example, model):
            output = self.rule(labels) if self.rule else "; ".join(labels.values())
            found[output] = found.get(output, 0.0) + math.exp(value)
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def share(common: Template, own: Mapping[str, Template]) -> dict[str, Template]:
    """Prompt sharing: templates of several tasks that begin with the same sub-prompt.

    Args:
        common: what all tasks have in common; usually without an answer slot.
        own: task -> what is its own.
    """
    return {task: common + template for task, template in own.items()}
