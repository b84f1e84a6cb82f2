"""Prompting in three steps: prompt addition, answer search, answer mapping (survey, section 2.2).

A :class:`looseleaf_text.Template` is the prompting function: ``template.fill(x)`` adds the prompt, and
``template.fill(x, z)`` is a *filled prompt*, or the *answered prompt* where z is the right answer. A
:class:`looseleaf_text.Verbalizer` holds the answer space Z and the mapping of answers to labels. What is left is the search.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Literal

from looseleaf_text import Example, LanguageModel, Template, Verbalizer
from looseleaf_text.answers import answer_log_probs
from looseleaf_text.verbalizer import log_normalised


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a search found for one example.

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
           seed: int = 0, max_tokens: int = 16, stop: Sequence[str] = ("\n",)) -> list[Answered]:
    """Fill the answer slot of a template for each example (survey, section 2.2.2).

    Args:
        template: with one answer slot.
        examples: the inputs x.
        model: causal, masked or behind a server; an open space needs one that generates.
        space: the answer space Z: a verbalizer, texts, or None for whatever the model says (open).
        how: take the likeliest answer, or draw one with the model's probabilities (temperature 1).
        seed: of the drawing.
        max_tokens, stop: of an open answer.

    Raises:
        ValueError: an unknown ``how``, fewer than two answers, an empty one, or an open answer space with text after
            the answer.
    """
    if how not in ("argmax", "sample"):
        raise ValueError(f"how={how!r}: allowed is 'argmax' or 'sample'")
    if space is None:
        if template.shape != "prefix":
            raise ValueError(f"the template {template.text!r} has text after the answer: an open answer space needs "
                             "the slot at the end; give the answers that are allowed")
        prompt = template.to_prompt()
        texts = model.generate([prompt.render(e) for e in examples], max_tokens, list(stop) or None,
                               0.0 if how == "argmax" else 1.0, seed)
        return [Answered(text, None, None) for text in texts]
    if isinstance(space, str):
        raise ValueError(f"the answer space {space!r} is one text: give a list of texts")
    mapping = space if isinstance(space, Verbalizer) else Verbalizer.of({z: z for z in space})
    prompt = template.to_prompt(mapping)
    assert prompt.verbalizer is not None
    rows = answer_log_probs(prompt, model, examples, prompt.verbalizer.space)
    answers = mapping.space
    rng = random.Random(seed)
    out = []
    for row in map(log_normalised, rows):
        place = (max(range(len(row)), key=row.__getitem__) if how == "argmax"
                 else rng.choices(range(len(row)), [math.exp(v) for v in row])[0])
        label = mapping.label_of(answers[place]) if mapping is space else None
        out.append(Answered(answers[place], label, dict(zip(answers, row, strict=True))))
    return out


def answer(template: Template, example: Example, model: LanguageModel, verbalizer: Verbalizer) -> str:
    """The output y for one input: the label of the best answer by the verbalizer's aggregated probabilities.

    Where a label has several answers, its probability is that of all of them together, so the label need not be
    that of the single likeliest answer.
    """
    found = search(template, [example], model, verbalizer)[0].log_probs
    assert found is not None
    row = verbalizer.log_probs([[found[z] for z in verbalizer.space]])[0]
    return verbalizer.labels[max(range(len(row)), key=row.__getitem__)]
