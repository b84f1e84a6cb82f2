"""Conversations with a language model: as text by its chat template, or as messages to a server; answers are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from looseleaf import Example
from looseleaf.files import read_text, write_text
from looseleaf.resume import digest
from looseleaf.unwrap import unwrapped
from looseleaf_text import ChatEndpoint, ChatPrompt, LanguageModel
from looseleaf_text.batching import positions, text_config
from looseleaf_text.conversations import Conversation


def as_text(model: LanguageModel, messages: Conversation) -> str:
    """A conversation as the model's own tokenizer writes it, up to where the assistant speaks.

    A template without system messages gets them at the head of the first turn. A model without a chat template reads
    ``role: content`` lines.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "chat_template", None):
        return ChatPrompt(messages).render(Example({}))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[union-attr]
    except Exception:  # of jinja2, or whatever the template raises
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        text = tokenizer.apply_chat_template([first, *messages[2:]], tokenize=False, add_generation_prompt=True)  # type: ignore[union-attr]
    begin = getattr(tokenizer, "bos_token", None)
    if begin and text.startswith(begin) and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]:  # type: ignore[union-attr, misc]
        text = text[len(begin):]  # the model puts it there
    return str(text)


class Talk:
    """A model asked in conversations, what it said kept on disk.

    Args:
        model: a language model, metered or not.
        folder: each answer is kept there under a hash of model, weights and conversation; None: nothing is kept.
        remember: without a folder, keep the answers in memory, so that the same questions are asked as with one.
    """

    def __init__(self, model: LanguageModel, folder: str | os.PathLike[str] | None = None, *,
                 remember: bool = False) -> None:
        self.model: Any = model
        self.serves = isinstance(model, ChatEndpoint)
        self.folder = None if folder is None else Path(folder)
        self.identity = [model.name, model.fingerprint(), as_text(model, [{"role": "user", "content": "?"}])
                         ] if folder is not None else []
        self._memory: dict[str, Any] | None = {} if remember and folder is None else None

    @property
    def window(self) -> int | None:
        """Most positions of a local model; None: not known."""
        module = getattr(self.model, "model", None)
        return positions(text_config(unwrapped(module))) if hasattr(module, "forward") else None

    def length(self, messages: Conversation) -> int:
        """Tokens of a conversation."""
        return int(self.model.count_tokens(as_text(self.model, messages)))

    def write(self, conversations: Sequence[Conversation], max_tokens: int, *, temperature: float = 0.0, seed: int = 0,
              stop: Sequence[str] = (), json_schemas: Sequence[dict[str, Any] | None] | None = None,
              begin: str = "") -> list[str]:
        """What the model writes after each conversation.

        A server that can obeys ``json_schemas``; any other model goes on after ``begin``, which is not returned, and up
        to ``stop``.
        """
        schemas = list(json_schemas or [None] * len(conversations))
        requests = [[max_tokens, temperature, seed, *([schema] if self.serves else [list(stop), begin])]
                    for schema in schemas]

        def ask(todo: list[int], keep: Callable[[int, str], None]) -> None:
            asked = [conversations[n] for n in todo]
            if self.serves:
                self.model.chat(asked, max_tokens, temperature, seed, [schemas[n] for n in todo], keep)
                return
            texts = self.model.generate([as_text(self.model, c) + begin for c in asked], max_tokens, list(stop) or None,
                                        temperature, seed)
            for n, text in enumerate(texts):
                keep(n, text)

        return self._kept("text", conversations, requests, ask)

    def score(self, conversations: Sequence[Conversation], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-probability of each reply after each conversation."""
        def ask(todo: list[int], keep: Callable[[int, Any], None]) -> None:
            texts = [as_text(self.model, conversations[n]) for n in todo]
            spaced = [[r.lstrip() if t[-1:].isspace() else f" {r.lstrip()}" for r in replies[n]]
                      for n, t in zip(todo, texts, strict=True)]
            for n, row in enumerate(self.model.score(texts, spaced)):
                keep(n, row)

        return self._kept("scores", conversations, [list(row) for row in replies], ask)

    def embed(self, texts: Sequence[str]) -> list[Any]:
        """The model's own embedding of each text."""
        def ask(todo: list[int], keep: Callable[[int, Any], None]) -> None:
            for n, row in enumerate(self.model.embed([texts[n] for n in todo])):
                keep(n, [float(v) for v in row])

        return self._kept("embedding", texts, [[]] * len(texts), ask)

    def _kept(self, kind: str, items: Sequence[Any], requests: Sequence[list[Any]],
              ask: Callable[[list[int], Callable[[int, Any], None]], None]) -> list[Any]:
        """The answer to each item, from disk where it is there."""
        out: list[Any] = [None] * len(items)
        keys = [""] * len(items)
        if self.folder is not None or self._memory is not None:
            keys = [digest([kind, self.identity, item, request]) for item, request in zip(items, requests, strict=True)]
            out = [self._known(key) for key in keys]
        todo = [n for n in range(len(items)) if out[n] is None]

        def keep(number: int, answer: Any) -> None:
            n = todo[number]
            out[n] = answer
            if self._memory is not None:
                self._memory[keys[n]] = answer
            elif self.folder is not None:
                write_text(self.folder / f"{keys[n]}.json", json.dumps({"answer": answer}, ensure_ascii=False))

        if todo:
            ask(todo, keep)
        return out

    def _known(self, key: str) -> Any:
        if self.folder is None:
            return (self._memory or {}).get(key)
        path = self.folder / f"{key}.json"
        if not path.exists():
            return None
        try:
            return json.loads(read_text(path))["answer"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: expected a kept answer, got {error}: remove the file") from None


__all__ = ["Talk", "as_text"]
