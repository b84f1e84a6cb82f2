"""The prompts whose last token becomes the embedding, and where the placeholder stands in them."""

from __future__ import annotations

import re

from looseleaf.errors import did_you_mean
from looseleaf_text.task import slots

PLACEHOLDER = "<PST>"
"""Marks in a template where the placeholder token goes; it is never tokenised as text."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "prompteol": ('This sentence : <PST> "{text}" means in one word:"',),
    "pretended-cot": ('After thinking step by step , this sentence : <PST> "{text}" means in one word:"',),
    "knowledge": (
        "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms provide "
        'additional but less central details. With this in mind , this sentence : <PST> "{text}" means in one word:"',),
    "metaeol": (
        'Text is to be sorted by its topic. The topic of this sentence : <PST> "{text}" is in one word:"',
        'Opinions are to be told apart. The feeling of this sentence : <PST> "{text}" is in one word:"',
        'Sentences are to be compared by what they say. This sentence : <PST> "{text}" means in one word:"',
        'Facts are to be noted down. The main thing in this sentence : <PST> "{text}" is in one word:"'),
}
"""Name -> templates; the embedding is the mean over them.

``prompteol``, ``pretended-cot`` and ``knowledge`` are the prompts of PromptEOL, Pretended CoT and Knowledge
Enhancement, with the placeholder before the opening quote as in the authors' code. ``metaeol`` asks several questions
as MetaEOL does: topic, feeling, meaning, main fact; the wording is this project's, not that paper's.
"""


def templates_of(prompt: str) -> tuple[str, ...]:
    """The templates of a name of :data:`TEMPLATES`, or ``prompt`` itself where it is a template.

    Raises:
        ValueError: neither; near names are given.
    """
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    check_template(prompt)
    return (prompt,)


def check_template(template: str) -> None:
    """Raise ValueError unless ``template`` has the slot ``{text}`` once and the placeholder at most once, before it."""
    where, marks = template.count("{text}"), template.count(PLACEHOLDER)
    if where != 1 or marks > 1 or template.find(PLACEHOLDER) > template.find("{text}"):
        raise ValueError(
            f"prompt {template!r}: allowed are {', '.join(TEMPLATES)}, or a text with the slot {{text}} once and, if "
            f"you like, {PLACEHOLDER} before it.{did_you_mean(template, TEMPLATES)}")


def with_placeholder(template: str) -> str:
    """``template`` with the placeholder: where it is marked, else right before the text."""
    return template if PLACEHOLDER in template else template.replace("{text}", PLACEHOLDER + "{text}")


def without_placeholder(template: str) -> str:
    """``template`` without the placeholder: the prompt of the method below."""
    bare = re.sub(f" ?{PLACEHOLDER}", "", template)
    return bare.lstrip(" ") if template.startswith(PLACEHOLDER) else bare


def around(template: str) -> tuple[str, str]:
    """What stands before and behind the placeholder.

    A space before the placeholder goes behind it: tokenisers keep a space with the word after it, and by itself it
    would be a token of its own.
    """
    head, _, rest = template.partition(PLACEHOLDER)
    bare = head.rstrip(" ")
    return bare, rest if rest[:1].isspace() else head[len(bare):] + rest


def rename_slot(template: str, old: str, new: str) -> str:
    """``template`` with the slot ``{old}`` called ``{new}``."""
    return template.replace("{" + old + "}", "{" + new + "}")


def only_slot(template: str) -> str:
    """The name of the one slot of ``template``.

    Raises:
        ValueError: none, or several.
    """
    found = slots(template)
    if len(found) != 1:
        raise ValueError(f"the prompt {template!r} has the slots {found}: an embedding is of one text, so give a "
                         "prompt with one slot")
    return found[0]


def tidy(text: str) -> str:
    """``text`` as the authors' evaluation quotes it.

    Double quotes become single ones, for the prompt quotes the text itself; a text without an end gets a full stop, and
    a question mark at the end becomes one.
    """
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text
