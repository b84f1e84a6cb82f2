"""Models that are given conversations, and the forms in which processors and servers take them, pictures included."""

from __future__ import annotations

import base64
import io
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from looseleaf.budget import costs
from looseleaf_text.model import LanguageModel

Conversation = list[dict[str, Any]]
"""Messages ``{"role": "system" | "user" | "assistant", "content": ...}``: a text, or a list of parts, which are
``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}`` with a picture of PIL, an array of uint8
(height, width, 3), a path or a URL. The form of servers, ``{"type": "image_url", ...}``, passes as it is."""
ROLES = ("system", "user", "assistant")


def parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as a list of parts.

    Raises:
        ValueError: what is given is no message, or a part of a kind that is not known.
    """
    content = message.get("content") if isinstance(message, dict) and message.get("role") in ROLES else None
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    for part in content if isinstance(content, list) else [message]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "image_url") or kind not in part:
            raise ValueError('a conversation: expected messages {"role": "system", "user" or "assistant", "content": a '
                             'text or parts {"type": "text", "text": ...} and {"type": "image", "image": ...}}, got '
                             f"{part!r:.200}")
    return list(content)  # type: ignore[arg-type]


def conversation(prompt: str | Conversation) -> Conversation:
    """A prompt as messages: a text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def text_of(messages: Conversation) -> str:
    """All texts of a conversation, a line each."""
    return "\n".join(part["text"] for message in messages for part in parts(message) if part["type"] == "text")


def count_tokens(model: LanguageModel, messages: Conversation) -> int:
    """Tokens of the texts of a conversation; pictures and what a template adds are not known before it is read."""
    return sum(model.count_tokens(part["text"]) for m in messages for part in parts(m) if part["type"] == "text")


def picture(given: Any) -> Any:
    """A picture of PIL, in RGB, from one, an array, a path or an address of the form ``data:image/...``.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    from PIL import Image

    if isinstance(given, str) and given.startswith("data:image/"):
        given = io.BytesIO(base64.b64decode(given.partition(",")[2]))
    try:
        if isinstance(given, (str, Path, io.BytesIO)):
            with Image.open(given) as opened:
                return opened.convert("RGB")
        return (given if isinstance(given, Image.Image) else Image.fromarray(given)).convert("RGB")
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError("expected a picture of PIL, an array of uint8 (height, width, 3) or the path of a picture, "
                         f"got {given!r:.200}: {error}") from error


def for_processor(messages: Conversation, lists: bool) -> tuple[Conversation, list[Any]]:
    """A conversation as chat templates of transformers read it, and its pictures in their order.

    Args:
        messages: the conversation.
        lists: contents are lists of parts, as processors have them; else texts, as tokenizers have them.

    Raises:
        ValueError: a picture where contents are texts, or one that cannot be read.
    """
    pictures: list[Any] = []
    made: Conversation = []
    for message in messages:
        own: list[dict[str, Any]] = []
        for part in parts(message):
            if part["type"] == "text":
                own.append(part)
                continue
            if not lists:
                raise ValueError("expected a conversation of texts, got a picture: this model has a tokenizer and no "
                                 "processor of pictures")
            given = part["image"] if part["type"] == "image" else part["image_url"]["url"]
            pictures.append(picture(given))
            own.append({"type": "image", "image": pictures[-1]})
        made.append({**message, "content": own if lists else "".join(part["text"] for part in own)})
    return made, pictures


def for_server(messages: Conversation) -> Conversation:
    """A conversation as OpenAI-compatible servers take it: pictures as PNG in the request, addresses as they are."""
    made: Conversation = []
    for message in messages:
        own: list[dict[str, Any]] = [part if part["type"] != "image" else
                                     {"type": "image_url", "image_url": {"url": _address(part["image"])}}
                                     for part in parts(message)]
        texts = all(part["type"] == "text" for part in own)
        made.append({**message, "content": "".join(part["text"] for part in own) if texts else own})
    return made


def _address(given: Any) -> str:
    if isinstance(given, str) and given.startswith(("http://", "https://", "data:image/")):
        return given
    file = io.BytesIO()
    picture(given).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def answer_tokens(model: Any, prompts: Sequence[str | Conversation], max_tokens: int, *_: Any, **__: Any) -> int:
    """The most tokens that answers to the prompts can take, pictures aside."""
    return sum(count_tokens(model, conversation(p)) for p in prompts) + max_tokens * len(prompts)


class ChatModel(LanguageModel):
    """A language model that is given whole conversations. A prompt that is a text is what the user says."""

    @costs(calls=lambda model, conversations, *_, **__: len(conversations), tokens=answer_tokens)
    @abstractmethod
    def chat(self, conversations: Sequence[Conversation], max_tokens: int, temperature: float = 0.0, seed: int = 0,
             json_schemas: Sequence[dict[str, Any] | None] | None = None,
             keep: Callable[[int, str], None] = lambda number, text: None, stop: list[str] | None = None) -> list[str]:
        """What the model answers to each conversation.

        Args:
            conversations: n lists of messages.
            max_tokens: of each answer; >= 1.
            temperature: 0 takes the likeliest token, else the whole distribution is drawn from.
            seed: of what is drawn.
            json_schemas: what each answer must obey, where the model can do that; None: nothing.
            keep: given the number and the text of each answer as it comes, so that a failure loses none.
            stop: an answer ends before the first of these.
        """

    def generate(self, prompts: Sequence[str | Conversation], max_tokens: int,  # type: ignore[override]
                 stop: list[str] | None = None, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """See :meth:`LanguageModel.generate`; prompts may be conversations."""
        return self.chat([conversation(p) for p in prompts], max_tokens, temperature, seed, stop=stop)


__all__ = ["ChatModel", "Conversation", "answer_tokens", "conversation", "count_tokens", "for_processor",
           "for_server", "parts", "picture", "text_of"]
