"""Answers to prompts (survey, section 2.2), and prompts composed, decomposed and shared (sections 5.3 to 5.5).

A :class:`looseleaf_text.Template` is the prompting function: ``template.fill(x)`` adds the prompt, and
``template.fill(x, z)`` is a *filled prompt*, or the *answered prompt* where z is the right answer. A
:class:`looseleaf_text.Verbalizer` holds the answer space Z and the mapping of answers to labels. What is left is the
search, and asking more than one question.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from looseleaf import Example
from looseleaf_text import LanguageModel, Template, Verbalizer
from looseleaf_text.template import spaced
from looseleaf_text.verbalizer import log_normalised

Answers = dict[str, str]
Part = dict[str, str]


@dataclasses.dataclass(frozen=True)
class AnswerPrediction:
    """The answer to one example.

    Attributes:
        answer: the answer z, from the answer space or generated.
        label: the output y that z stands for; None where there is no mapping.
        log_probs: answer -> natural-log probability over the answer space; None where that is open.
    """

    answer: str
    label: str | None
    log_probs: dict[str, float] | None


def search(template: Template, examples: Sequence[Example], model: LanguageModel,
           space: Verbalizer | Sequence[str] | None = None, *, how: Literal["argmax", "sample"] = "argmax",
           seed: int = 0, max_tokens: int = 16, stop: Sequence[str] = ("\n",)) -> list[AnswerPrediction]:
    """Fill the answer slot of a template for each example (survey, section 2.2.2); one call each.

    Args:
        template: with one answer slot.
        examples: the inputs x.
        model: causal, masked or behind a server; an open space needs one that generates.
        space: the answer space Z: a verbalizer, texts, or None for whatever the model generates (open).
        how: take the likeliest answer, or draw one with the model's probabilities (temperature 1).
        seed: of the drawing.
        max_tokens, stop: of an open answer.

    Raises:
        ValueError: an unknown ``how``, fewer than two answers, an empty one, or an open answer space with text after
            the answer.
    """
    if how not in ("argmax", "sample"):
        raise ValueError(f"how: expected 'argmax' or 'sample', got {how!r}")
    if space is None:
        if template.shape != "prefix":
            raise ValueError(f"the template {template.text!r}: expected the slot at the end for an open answer space, "
                             "got text after it: give the possible answers as space")
        prompt = template.to_prompt()
        texts = model.generate([prompt.render(e) for e in examples], max_tokens, list(stop) or None,
                               0.0 if how == "argmax" else 1.0, seed)
        return [AnswerPrediction(text, None, None) for text in texts]
    if isinstance(space, str):
        raise ValueError(f"space: expected a list of texts or a Verbalizer, got the text {space!r}")
    mapping = space if isinstance(space, Verbalizer) else Verbalizer.of({z: z for z in space})
    answers, rng = mapping.space, random.Random(seed)
    out = []
    for row in _answer_rows(template, examples, model, mapping):
        place = (max(range(len(row)), key=row.__getitem__) if how == "argmax"
                 else rng.choices(range(len(row)), [math.exp(v) for v in row])[0])
        label = mapping.label_of(answers[place]) if mapping is space else None
        out.append(AnswerPrediction(answers[place], label, dict(zip(answers, row, strict=True))))
    return out


def answer(template: Template, example: Example, model: LanguageModel, verbalizer: Verbalizer) -> str:
    """The output y for one input: the label of the best answer by the verbalizer's aggregated probabilities.

    Where a label has several answers, its probability is that of all of them together, so the label need not be
    that of the single likeliest answer.
    """
    return _best_labels(template, [example], model, verbalizer)[0][0]


def _answer_rows(template: Template, examples: Sequence[Example], model: LanguageModel,
                 mapping: Verbalizer) -> list[list[float]]:
    """(examples, answers) log-probabilities over the answer space."""
    prompt = template.to_prompt(mapping)
    labels = prompt.labels
    assert isinstance(labels, Verbalizer)  # its answers begin with the space that stood before the slot
    return [log_normalised(row) for row in prompt.on(model).answer_scores(examples, labels.space)]


def _best_labels(template: Template, examples: Sequence[Example], model: LanguageModel,
                 verbalizer: Verbalizer) -> list[tuple[str, float]]:
    """The likeliest label of each example and its log-probability."""
    rows = verbalizer.log_probs(_answer_rows(template, examples, model, verbalizer))
    return [max(zip(verbalizer.labels, row, strict=True), key=lambda pair: pair[1]) for row in rows]


# -- composition and sharing ------------------------------------------------------------------------------------------

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
            raise ValueError(f"PromptComposer.spaces: expected a verbalizer for each of the answer slots "
                             f"{list(self.template.answers)} of {self.template.text!r}, got {list(self.spaces)}")

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
        """Every combination of labels and its natural-log probability, likeliest first; probabilities sum to one.

        One call per combination of earlier answers: meant for a few slots of a few answers.
        """
        beams: list[tuple[Answers, Answers, float]] = [({}, {}, 0.0)]  # answers as text, labels, log-probability
        for name in self.template.answers:
            space = self.spaces[name]
            befores = [self.template.around(example, name, texts)[0] for texts, _, _ in beams]
            split = [spaced(before, space.space) for before in befores]
            rows = model.score([before for before, _ in split], [answers for _, answers in split])
            grown = []
            for (texts, labels, total), row in zip(beams, space.log_probs(rows), strict=True):
                for label, value in zip(space.labels, row, strict=True):
                    # What follows is read after the label's first answer.
                    grown.append(({**texts, name: space.answers[label][0]}, {**labels, name: label}, total + value))
            beams = grown
        return sorted(((labels, value) for _, labels, value in beams), key=lambda pair: -pair[1])

    def outputs(self, example: Example, model: LanguageModel) -> dict[str, float]:
        """Output -> probability, likeliest first: combinations that the rule gives one output are added up."""
        sums: dict[str, float] = {}
        for labels, value in self.log_probs(example, model):
            output = self.rule(labels) if self.rule else "; ".join(labels.values())
            sums[output] = sums.get(output, 0.0) + math.exp(value)
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))


def shared_prompts(common: Template, own: Mapping[str, Template]) -> dict[str, Template]:
    """Prompt sharing: templates of several tasks that begin with the same sub-prompt (survey, section 5.5).

    Args:
        common: what all tasks have in common; usually without an answer slot.
        own: task -> what is its own.
    """
    return {task: common + template for task, template in own.items()}


# -- decomposition ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class PromptDecomposer:
    """Asks about each part of an example, such as every span of a sentence for its entity type.

    As in TemplateNER (Cui et al. 2021): "[X] {span} is a [Z] entity" for every span.

    Args:
        template: with one answer slot; its slots are the example's inputs and those of a part.
        verbalizer: what a part can be.
        split: an example -> the inputs of each of its parts; see :func:`spans`.
    """

    template: Template
    verbalizer: Verbalizer
    split: Callable[[Example], Sequence[Part]]

    def parts(self, example: Example) -> list[Example]:
        """The sub-examples, each with the inputs of the example and of the part.

        Raises:
            ValueError: no parts, or a part with an input that the example has already.
        """
        parts = list(self.split(example))
        if not parts:
            raise ValueError(f"split: expected one part or more of {dict(example.inputs)}, got none")
        for part in parts:
            both = sorted(set(part) & set(example.inputs))
            if both:
                raise ValueError(f"split: expected parts with names of their own, got {both}, which the example has "
                                 "too: give them other names")
        return [Example({**example.inputs, **part}) for part in parts]

    def run(self, example: Example, model: LanguageModel) -> list[tuple[Part, str, float]]:
        """Each part, the likeliest label of it, and that label's natural-log probability; one call per part."""
        asked = self.parts(example)
        return [({k: v for k, v in sub.inputs.items() if k not in example.inputs}, label, value)
                for sub, (label, value) in zip(asked, _best_labels(self.template, asked, model, self.verbalizer),
                                               strict=True)]


def spans(longest: int = 3, field: str = "text", name: str = "span") -> Callable[[Example], list[Part]]:
    """A ``split`` that gives every run of up to ``longest`` words, in order of appearance.

    Args:
        longest: words in a span, at most; an integer >= 1.
        field: the example's input that is cut up.
        name: of the part's input.
    """
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"longest: expected an integer >= 1, got {longest!r}")

    def split(example: Example) -> list[Part]:
        words = re.findall(r"\w[\w'-]*", example.inputs[field])
        runs = [" ".join(words[at:at + n]) for at in range(len(words)) for n in range(1, longest + 1)
                if at + n <= len(words)]
        return [{name: span} for span in dict.fromkeys(runs)]

    return split
