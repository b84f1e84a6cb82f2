"""Prompts: what a search starts from and what it finds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from looseleaf.prompts.task import Example, Task, fill, slots, with_prefix

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "looseleaf.prompt/1"


@dataclasses.dataclass
class Prompt:
    """A prompt; :meth:`render` puts an example into it.

    ``text`` with a slot (``{text}`` or ``{field}``) is the whole prompt. Without one it is an instruction, and
    what is rendered is instruction, exemplars, then the example through ``template`` and ``answer_prefix``, joined
    by ``separator``.

    Attributes:
        text: instruction, or whole prompt with slots.
        messages: chat messages ``{"role": ..., "content": ...}``; slots in the contents are filled.
        exemplars: demonstrations, shown with their answers.
        soft: learned vectors of shape (tokens, hidden), floating point; for local models, before everything else.
        info: what the search has to say; plain data. Optimisers fill ``fitness``, ``evaluations``, ``stopped``.
        template: how examples are shown; taken from the task by :meth:`for_task`.
        answer_prefix: what comes between an example and its answer, on a new line unless it brings white space.
        labels: label -> verbalizer, to show the answers of exemplars; None shows label or reference as it is.
        separator: what stands between the parts.
    """

    text: str = ""
    messages: list[dict[str, str]] | None = None
    exemplars: Sequence[Example] = ()
    soft: Tensor | None = None
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    template: str = "{text}"
    answer_prefix: str = ""
    labels: dict[str, str] | None = None
    separator: str = "\n\n"

    @classmethod
    def for_task(cls, task: Task, text: str = "", exemplars: Sequence[Example] = (), **fields: Any) -> Prompt:
        """A prompt with template, answer prefix and labels of ``task``."""
        return cls(text=text, exemplars=list(exemplars), template=task.template,
                   answer_prefix=task.answer_prefix, labels=task.labels, **fields)

    def render(self, example: Example) -> str:
        """The text given to the model for ``example``; messages are joined as ``role: content`` lines.

        Raises:
            ValueError: the example lacks a field of the template.
        """
        if self.messages is not None:
            lines = [f"{m['role']}: {m['content']}" for m in self.render_messages(example)]
            return "\n".join([*lines, "assistant:"])
        fields = example.fields
        if any(name in fields for name in slots(self.text)):
            return fill(self.text, fields)
        parts = [self.text] if self.text else []
        parts += [self._demonstration(e) for e in self.exemplars]
        missing = [name for name in slots(self.template) if name not in fields]
        if missing:
            raise ValueError(f"the template {self.template!r} wants {missing}; the example has {sorted(fields)}")
        return self.separator.join([*parts, with_prefix(fill(self.template, fields), self.answer_prefix)])

    def render_messages(self, example: Example) -> list[dict[str, str]]:
        """The prompt as chat messages; a text prompt is one user message."""
        if self.messages is None:
            return [{"role": "user", "content": self.render(example)}]
        return [{**m, "content": fill(m["content"], example.fields)} for m in self.messages]

    def as_template(self, fields: Iterable[str] | None = None) -> str:
        """The whole prompt as one text with slots: what methods that edit the text of a prompt start from.

        Args:
            fields: names of the examples' fields, so that other braces of ``text`` are not taken for slots; None:
                those of ``template``, or any where that is the plain ``{text}``.

        Raises:
            ValueError: the prompt is made of messages or soft tokens.
        """
        if self.messages is not None or self.soft is not None:
            raise ValueError("a prompt of messages or soft tokens has no single text; start from text and exemplars")
        own = set(slots(self.text))
        anything = fields is None and self.template == "{text}"
        if own & set(slots(self.template) if fields is None else fields) or (own and anything):
            return self.text
        parts = [self.text] if self.text else []
        parts += [self._demonstration(e) for e in self.exemplars]
        return self.separator.join([*parts, with_prefix(self.template, self.answer_prefix)])

    def _demonstration(self, example: Example) -> str:
        if example.label is not None:
            answer = example.label if self.labels is None else self.labels.get(example.label, example.label)
        else:
            answer = example.reference or ""
        joint = self.answer_prefix
        if answer and joint and not joint[-1].isspace() and not answer[0].isspace():
            answer = " " + answer
        return with_prefix(fill(self.template, example.fields), joint) + answer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompt as JSON, whole or not at all; soft tokens go beside it as ``<stem>.safetensors``."""
        from looseleaf.files import replacing, write_text
        from looseleaf.report import _plain

        target = Path(path)
        data: dict[str, Any] = {"schema": SCHEMA}
        for field in dataclasses.fields(self):
            if field.name not in ("soft", "exemplars"):
                data[field.name] = _plain(getattr(self, field.name))
        data["exemplars"] = [e.to_dict() for e in self.exemplars]
        data["soft"] = None
        if self.soft is not None:
            from safetensors.torch import save_file

            beside = target.with_suffix(".safetensors")
            with replacing(beside) as part:
                save_file({"soft": self.soft.detach().contiguous()}, part)
            data["soft"] = beside.name
        write_text(target, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prompt:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no prompt.
        """
        source = Path(path)
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is not a prompt: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{source} is not a prompt: schema is {found!r}, allowed is {SCHEMA!r}")
        data.pop("schema")
        data["exemplars"] = [Example.from_dict(e) for e in data["exemplars"]]
        if data["soft"] is not None:
            from safetensors.torch import load_file

            data["soft"] = load_file(str(source.with_name(data["soft"])))["soft"]
        return cls(**data)
