"""Words for a picture: chains of questions to a vision-language model, and what answers them."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from looseleaf_text import ChatModel

History = Sequence[tuple[str, str]]
"""Questions and answers of one dialogue so far."""
QUOTES = '"\u201c\u201d'


class Namer:
    """Answers questions about a picture. Any function ``f(image, question, history) -> str`` will do as well."""

    def ask(self, image: Any, question: str, history: History, seed: int = 0) -> str:
        """The answer.

        Args:
            image: a PIL image, RGB.
            question: what is asked.
            history: earlier questions and answers of the dialogue.
            seed: of the sampling.
        """
        raise NotImplementedError


@dataclasses.dataclass
class FixedWords(Namer):
    """The same words for every picture.

    Args:
        foreground: what to segment.
        background: what it is in.
        caption: answer to the first question.
    """

    foreground: str
    background: str = "background"
    caption: str = ""

    def __post_init__(self) -> None:
        for name in ("foreground", "background", "caption"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"FixedWords.{name}: expected text, got {getattr(self, name)!r}")

    def ask(self, image: Any, question: str, history: History, seed: int = 0) -> str:
        """See :meth:`Namer.ask`."""
        return (self.caption, self.foreground, self.background)[min(len(history), 2)]


class ChatNamer(Namer):
    """A chat model that sees pictures: one of transformers, or behind an OpenAI-compatible address.

    Args:
        model: ``looseleaf_text.LocalChat(model, processor)`` around any ``AutoModelForImageTextToText`` (LLaVA,
            Qwen-VL, BLIP-2 with a chat template set), or ``looseleaf_text.ChatEndpoint(base_url, name)``.
        temperature: of the sampling (official code: 0.2); 0: the likeliest words.
        max_tokens: longest answer.

    Raises:
        ValueError: no chat model.
    """

    def __init__(self, model: ChatModel, *, temperature: float = 0.2, max_tokens: int = 60) -> None:
        if not isinstance(model, ChatModel):
            raise ValueError(f"ChatNamer: expected a looseleaf_text.ChatModel, got {type(model).__name__}: "
                             "LocalChat(model, processor) or ChatEndpoint(base_url, name)")
        # the module itself, so that whoever looks for torch modules sees it
        self.chat, self.model = model, getattr(model, "model", None)
        self.temperature, self.max_tokens = temperature, max_tokens

    def fingerprint(self) -> str:
        """That of the model, and the settings."""
        return f"{self.chat.fingerprint()} {self.temperature} {self.max_tokens}"

    def ask(self, image: Any, question: str, history: History, seed: int = 0) -> str:
        """See :meth:`Namer.ask`."""
        turns: list[dict[str, Any]] = []
        for asked, answer in (*history, (question, None)):
            picture = [] if turns else [{"type": "image", "image": image}]
            turns.append({"role": "user", "content": [*picture, {"type": "text", "text": asked}]})
            if answer is not None:
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text, = self.chat.chat([turns], self.max_tokens, temperature=self.temperature, seed=seed)
        return text


@dataclasses.dataclass
class Words:
    """What a picture shows, in words.

    Attributes:
        foreground: one word for each synonym.
        background: words for the surroundings, at least one; none were asked for: empty.
        captions: first answers.
    """

    foreground: list[str]
    background: list[str]
    captions: list[str]


def clean(answer: str) -> str:
    """The word in an answer: what stands in quotes, or follows " is a(n) ", without the final dot."""
    text = answer.strip()
    for quote in QUOTES:
        if quote in text:
            text = text.split(quote, 1)[1]
            for end in QUOTES:
                text = text.split(end, 1)[0]
            break
    for words in (" is an ", " is a "):
        if words in text:
            text = text.rsplit(words, 1)[1]
    return text.strip(" \t\n'").rstrip(".").strip(" \t\n'")


def words_of(ask: Callable[[str, History, int], str], synonyms: Sequence[str], seed: int | str = 0, *,
             background: bool = True) -> Words:
    """Words by one dialogue for each synonym: caption, name, and name of the surroundings.

    The wording of the first question is ours; the others are the paper's.

    Args:
        ask: question, history, seed -> answer.
        synonyms: of the task, such as "camouflaged animal".
        seed: of the sampling.
        background: ask for the surroundings, too.
    """
    found = Words([], [], [])
    for synonym in synonyms:
        questions = [f"This picture is for the task of finding the {synonym}. Describe it in one sentence.",
                     f"Name of the {synonym} in one word.",
                     f"Name of the environment of the {synonym} in one word."]
        history: list[tuple[str, str]] = []
        for question in questions if background else questions[:2]:
            own = zlib.crc32(f"{seed} {question}".encode()) & 0x7FFFFFFF
            history.append((question, ask(question, tuple(history), own)))
        found.captions.append(history[0][1])
        name = clean(history[1][1]) or synonym
        found.foreground.append(name)
        place = (clean(history[2][1]) or "environment") if background else name
        if place.lower() != name.lower():
            found.background.append(place)
    if background and not found.background:
        found.background.append("background")
    return found


__all__ = ["ChatNamer", "FixedWords", "History", "Namer", "Words", "clean", "words_of"]
