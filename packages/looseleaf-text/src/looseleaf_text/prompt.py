"""Prompts: what a search starts from and what it finds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from looseleaf_text.task import Example, Task, fill, slots, with_prefix

if TYPE_CHECKING:
    from torch import Tensor

    from looseleaf_text.verbalizer import Verbalizer

SCHEMA = "looseleaf.prompt/1"


@dataclasses.dataclass
class Prompt:
    """A prompt; :meth:`render` puts an example into it.

    ``text`` with a slot (``{text}`` or ``{field}``) is the whole prompt. Without one it is an instruction, and
    what is rendered is instruction, exemplars, then the example through ``template`` and ``answer_prefix``, joined
    by ``separator``.

    A prompt with ``members`` is an ensemble: :class:`looseleaf_text.Task` asks each of them and combines what they say.
    Its own text says nothing then, and what it renders is what its member of the most weight does.

    Attributes:
        text: instruction, or whole prompt with slots.
        messages: chat messages ``{"role": ..., "content": ...}``; slots in the contents are filled.
        exemplars: demonstrations, shown with their answers.
        soft: learned vectors of shape (tokens, hidden), or keys and values of shape (layers, 2, heads, tokens, head
            size); floating point; for local models, before everything else.
        info: what the search has to say; plain data. Optimisers fill ``fitness``, ``evaluations``, ``stopped``.
        template: how examples are shown; taken from the task by :meth:`for_task`.
        answer_prefix: what comes between an example and its answer, on a new line unless it brings white space.
        labels: label -> verbalizer, to show the answers of exemplars; None shows label or reference as it is.
        separator: what stands between the parts.
        suffix: what follows the answer (cloze shape); slots are filled.
        verbalizer: answers of each label, where they are not those of the task.
        members: prompts of an ensemble.
        weights: of the members, from 0; None: all the same.
        combine: classification: ``"average"`` takes the weighted mean of the members' normalised probabilities,
            ``"vote"`` their weighted votes. Generated texts are always voted on.

    Raises:
        ValueError: an unknown ``combine``, or weights that are not one number from 0 for each member.
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
    suffix: str = ""
    verbalizer: Verbalizer | None = None
    members: Sequence[Prompt] = ()
    weights: list[float] | None = None
    combine: Literal["average", "vote"] = "average"

    def __post_init__(self) -> None:
        if self.combine not in ("average", "vote"):
            raise ValueError(f"Prompt.combine={self.combine!r}: allowed is 'average' or 'vote'")
        self.members = tuple(self.members)
        if self.members:
            from looseleaf_text.answers import shares_of

            shares_of(self.weights, len(self.members))
        elif self.weights is not None:
            raise ValueError(f"Prompt.weights={self.weights!r} without members: allowed is None")

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
        if self.members:
            return self._heaviest().render(example)
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

    def _heaviest(self) -> Prompt:
        weights = self.weights or [1.0] * len(self.members)
        return self.members[max(range(len(weights)), key=weights.__getitem__)]

    def render_suffix(self, example: Example) -> str:
        """The text that follows the answer."""
        return fill(self.suffix, example.fields)

    def render_messages(self, example: Example) -> list[dict[str, str]]:
        """The prompt as chat messages; a text prompt is one user message."""
        if self.members:
            return self._heaviest().render_messages(example)
        if self.messages is None:
            return [{"role": "user", "content": self.render(example)}]
        return [{**m, "content": fill(m["content"], example.fields)} for m in self.messages]

    def as_template(self, fields: Iterable[str] | None = None) -> str:
        """The whole prompt as one text with slots: what methods that edit the text of a prompt start from.

        Args:
            fields: names of the examples' fields, so that other braces of ``text`` are not taken for slots; None:
                those of ``template``, or any where that is the plain ``{text}``.

        Raises:
            ValueError: the prompt is made of messages, soft tokens or members, or has text after the answer.
        """
        if self.messages is not None or self.soft is not None or self.members or self.suffix:
            raise ValueError("a prompt of messages, soft tokens or members, or with text after the answer, has no "
                             "single text; start from text and exemplars")
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
        return with_prefix(fill(self.template, example.fields), joint) + answer + self.render_suffix(example)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompt as JSON, whole or not at all; soft tokens go beside it as ``<stem>.safetensors``."""
        from looseleaf.files import replacing, write_text

        target = Path(path)
        tensors: dict[str, Tensor] = {}
        data: dict[str, Any] = {"schema": SCHEMA, **self.to_dict(tensors, "soft")}
        if tensors:
            from safetensors.torch import save_file

            beside = target.with_suffix(".safetensors")
            with replacing(beside) as part:
                save_file(tensors, part)
            data["tensors"] = beside.name
        write_text(target, json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    def to_dict(self, tensors: dict[str, Tensor], key: str = "soft") -> dict[str, Any]:
        """Plain data; soft tokens go into ``tensors``, those of members under ``<key>.<number of the member>``."""
        from looseleaf.report import plain

        data: dict[str, Any] = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)
                                if f.name not in ("soft", "exemplars", "verbalizer", "members")}
        data["exemplars"] = [e.to_dict() for e in self.exemplars]
        data["verbalizer"] = self.verbalizer and self.verbalizer.to_dict()
        data["members"] = [m.to_dict(tensors, f"{key}.{n}") for n, m in enumerate(self.members)]
        data["soft"] = None
        if self.soft is not None:
            tensors[key] = self.soft.detach().contiguous()
            data["soft"] = key
        return data

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
        tensors: dict[str, Tensor] = {}
        if data.get("tensors"):
            from safetensors.torch import load_file

            tensors = load_file(str(source.with_name(data["tensors"])))
        return cls._from_dict(data, tensors)

    @classmethod
    def _from_dict(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> Prompt:
        from looseleaf_text.verbalizer import Verbalizer

        fields = {k: v for k, v in data.items() if k not in ("schema", "tensors")}
        fields["exemplars"] = [Example.from_dict(e) for e in fields["exemplars"]]
        fields["verbalizer"] = Verbalizer.from_dict(fields["verbalizer"]) if fields.get("verbalizer") else None
        fields["members"] = [cls._from_dict(m, tensors) for m in fields.get("members", ())]
        fields["soft"] = tensors[fields["soft"]] if fields["soft"] else None
        return cls(**fields)
