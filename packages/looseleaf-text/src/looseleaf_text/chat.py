"""Chat models behind a server that are given whole conversations, and answers that obey a JSON schema."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from looseleaf import EndpointError
from looseleaf_text.conversations import ChatModel, Conversation, answer_tokens, for_server
from looseleaf_text.endpoint import EndpointModel
from looseleaf_text.local import cut

REFUSED = (400, 422)
"""Status of a server that does not know a field of the request, such as ``response_format``."""
Post = Callable[[dict[str, Any]], dict[str, Any]]


def constrained(post: Post, body: dict[str, Any], json_schema: dict[str, Any], name: str = "answer"
                ) -> tuple[dict[str, Any], bool]:
    """What a server answers under a JSON schema, and whether it can: one that refuses is asked without.

    Args:
        post: body of the request -> the server's answer.
        body: without ``response_format``.
        json_schema: what the answer must obey.
        name: of the schema, which some servers tell the model.

    Raises:
        EndpointError: of ``post``; also where the request without the schema is refused, which may be what is wrong.
    """
    form = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": json_schema}}
    try:
        return post({**body, "response_format": form}), True
    except EndpointError as error:
        if getattr(error, "status", None) not in REFUSED:
            raise
        return post(body), False


class JSONEndpoint(EndpointModel):
    """A model behind a server, whose answers keep to a JSON schema where the server can make them.

    The schema goes along as ``response_format``; a server that refuses it is asked without from then on, and
    :attr:`schema` is None.

    Args:
        base_url, model, options: see :class:`looseleaf_text.EndpointModel`.
        schema: of the answers.
    """

    def __init__(self, base_url: str, model: str, *, schema: dict[str, Any], **options: Any) -> None:
        super().__init__(base_url, model, **options)
        self.schema: dict[str, Any] | None = schema

    def _post(self, path: str, body: dict[str, Any], stop: threading.Event | None = None, *,
              root: bool = False) -> dict[str, Any]:
        def post(body: dict[str, Any]) -> dict[str, Any]:
            return super(JSONEndpoint, self)._post(path, body, stop, root=root)

        if self.schema is None or not path.endswith("completions") or "logprobs" in body:
            return post(body)
        answer, able = constrained(post, body, self.schema)
        if not able:
            self.schema = None
        return answer


class ChatEndpoint(ChatModel, EndpointModel):
    """A chat model behind an OpenAI-compatible server, given whole conversations and, where it can, a JSON schema.

    Pictures go along within the request (PNG, base64), addresses of pictures as they are. All else is as in
    :class:`looseleaf_text.EndpointModel`, of which this is one that speaks to ``/chat/completions``.

    Args:
        base_url, model, api_key, timeout, options: as there.
        json_schema: constrain what is written (``response_format``); a server that refuses is asked without.
    """

    def __init__(self, base_url: str, model: str, api_key: str | None = None, timeout: float = 60, *,
                 json_schema: bool = True, **options: Any) -> None:
        super().__init__(base_url, model, api_key, timeout, api="chat", **options)
        self.json_schema = json_schema

    def chat(self, conversations: Sequence[Conversation], max_tokens: int, temperature: float = 0.0, seed: int = 0,
             json_schemas: Sequence[dict[str, Any] | None] | None = None,
             keep: Callable[[int, str], None] = lambda number, text: None, stop: list[str] | None = None) -> list[str]:
        """See :meth:`ChatModel.chat`; requests go out side by side, top_p is 1.

        Raises:
            EndpointError: the server cannot be reached, or refuses.
        """
        schemas = json_schemas or [None] * len(conversations)
        sent = list(map(for_server, conversations))
        jobs = [(n, json.dumps([messages, schema])) for n, (messages, schema) in enumerate(
            zip(sent, schemas, strict=True))]
        came: set[int] = set()

        def one(job: tuple[int, str], event: threading.Event) -> tuple[str, int]:
            body = {"model": self.model, "messages": sent[job[0]], "max_tokens": max_tokens,
                    "temperature": temperature, "top_p": 1.0, "seed": seed}
            # the protocol takes four; the rest is cut below
            answer = self._ask({**body, "stop": stop[:4]} if stop else body, schemas[job[0]], event)
            try:
                text = cut(answer["choices"][0]["message"]["content"] or "", stop)
            except (KeyError, IndexError, TypeError):
                raise EndpointError(f"{self.base_url}: expected a message, got {answer!r:.200}") from None
            used = (answer.get("usage") or {}).get("total_tokens")
            keep(job[0], text)
            came.add(job[0])
            return text, int(used or answer_tokens(self, [conversations[job[0]]], 0) + self.count_tokens(text))

        results = self._all(f"chat {max_tokens} {temperature} {seed} {stop}", jobs, one)
        for n, (text, tokens) in enumerate(results):
            self._count(1, tokens)
            if n not in came:  # answered in a call that failed
                keep(n, text)
        return [text for text, _ in results]

    def _ask(self, body: dict[str, Any], json_schema: dict[str, Any] | None, stop: threading.Event) -> dict[str, Any]:
        def post(body: dict[str, Any]) -> dict[str, Any]:
            return self._post("chat/completions", body, stop)

        if json_schema is None or not self.json_schema:
            return post(body)
        answer, able = constrained(post, body, json_schema)
        if not able:
            self.json_schema = False
        return answer


__all__ = ["ChatEndpoint", "JSONEndpoint", "constrained"]
