"""Schemas of problems: which fields they have, how a model is asked for them, and how its text is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from looseleaf.prompts.prompt import storable

Schema = dict[str, str]
"""Name of a field -> text."""

_TEACHER = (
    "You are a teacher who helps students to understand a problem. In the sense of schema theory in cognitive "
    "psychology, write down its schema: what kind of problem it is, described abstractly enough to hold for others of "
    "that kind. Do not solve the problem.")


@storable
@dataclasses.dataclass(frozen=True)
class SchemaTemplate:
    """Which fields a schema has, and what the model is told about it.

    Attributes:
        fields: (name, what it should say) of each field, or a mapping; one or more, names different.
        instruction: what the model is asked to do.
        sample: a worked example of a schema, field -> text; empty: none is shown.

    Raises:
        ValueError: no fields, an empty or repeated name, or a sample of other fields.
    """

    fields: tuple[tuple[str, str], ...]
    instruction: str = _TEACHER
    sample: Schema = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = self.fields.items() if isinstance(self.fields, Mapping) else self.fields
        object.__setattr__(self, "fields", tuple((str(name), str(about)) for name, about in pairs))
        keys = [_key(name) for name in self.names]
        if not keys or not all(keys):
            raise ValueError(f"SchemaTemplate.fields: expected one or more names with letters, got {self.names}")
        if len(set(keys)) < len(keys):
            raise ValueError(f"SchemaTemplate.fields: expected different names (case and spaces do not count), got "
                             f"{self.names}")
        if self.sample and set(self.sample) != set(self.names):
            raise ValueError(f"SchemaTemplate.sample: expected a text for each of {self.names}, got "
                             f"{list(self.sample)}")

    @property
    def names(self) -> list[str]:
        """Names of the fields, in order."""
        return [name for name, _ in self.fields]

    def system(self) -> str:
        """The system message under which schemas are written and refined."""
        lines = [self.instruction, "", "Reply with a JSON object with these fields, each a text of one sentence:"]
        lines += [f"- {name}: {about}" for name, about in self.fields]
        if self.sample:
            lines += ["", "For example:", json.dumps(self.sample, ensure_ascii=False)]
        return "\n".join(lines)

    def json_schema(self) -> dict[str, Any]:
        """What a server that constrains its output is given."""
        return {"type": "object", "additionalProperties": False, "required": self.names,
                "properties": {name: {"type": "string", "description": about} for name, about in self.fields}}

    @property
    def begin(self) -> str:
        """How the reply begins: put into the mouth of a model whose output cannot be constrained."""
        return f"{{{json.dumps(self.names[0], ensure_ascii=False)}: \""

    def parse(self, text: str) -> Schema:
        """The fields found in what a model wrote; those not found are absent.

        Read are a JSON object, whole or cut short, inside other text or not; else lines ``field: text`` or headings.
        Of a whole object other keys are kept, too.
        """
        known = {_key(name): name for name in self.names}
        for values in _objects(text):
            flat = {known.get(_key(k), str(k)): _text(v) for k, v in values.items()}
            if any(flat.get(name) for name in self.names):
                return {k: v for k, v in flat.items() if v}
        found: Schema = {}
        for key, value in re.findall(r'"([^"\n]+)"\s*:\s*"((?:[^"\\]|\\.)*)"?', text):
            if _key(key) in known and value.strip():
                found.setdefault(known[_key(key)], _unescape(value))
        return found or self._lines(text, known)

    def _lines(self, text: str, known: Mapping[str, str]) -> Schema:
        found: dict[str, list[str]] = {}
        current: list[str] | None = None
        for line in text.splitlines():
            heading, colon, rest = line.partition(":")
            name = known.get(_key(heading))
            if name is not None and (colon or line.lstrip().startswith(("#", "*"))):
                current = found.setdefault(name, [])
                line = rest
            if current is not None:
                current.append(line.strip().strip("*").strip())
        joined = {name: " ".join(filter(None, lines)) for name, lines in found.items()}
        return {name: value for name, value in joined.items() if value}

    def missing(self, schema: Mapping[str, str]) -> list[str]:
        """Fields that a schema lacks, or has empty."""
        return [name for name in self.names if not schema.get(name, "").strip()]

    def text(self, schema: Mapping[str, str]) -> str:
        """The schema as it stands in prompts and is embedded: a heading for each field, further keys after it."""
        fields = [f"##### {name}:\n{schema.get(name, '')}\n" for name in self.names]
        further = [f"#### {key.replace('_', ' ').capitalize()}:\n{value}" for key, value in schema.items()
                   if key not in self.names]
        return "\n".join(["Schema:", *fields, *further]).rstrip()


def _key(name: str) -> str:
    """A name without case, white space and marks around it."""
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value).strip()


def _unescape(value: str) -> str:
    try:
        return str(json.loads(f'"{value}"')).strip()
    except ValueError:
        return value.strip()


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, and of each those one level inside it: some models put the fields there."""
    decoder, at = json.JSONDecoder(strict=False), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            end = at + 1
        else:
            yield value
            yield from (inner for inner in value.values() if isinstance(inner, dict))
        at = text.find("{", end)


TEMPLATES = {
    "schema": SchemaTemplate((
        ("broad_category", "the subject and the general area to which the problem belongs"),
        ("refinement", "what narrows that area down"),
        ("specific_scope", "the exact focus of the problem within it"),
        ("goal", "what is to be found"))),
    "physics": SchemaTemplate((
        ("system", "the objects and quantities involved, and what is known of each"),
        ("principle", "the law or relation that connects them"),
        ("conditions", "assumptions and limits under which it holds"),
        ("goal", "the quantity wanted"))),
    "fact": SchemaTemplate((
        ("subject", "what kind of thing is asked about"),
        ("relation", "which property of it, or relation to something else"),
        ("answer_type", "what kind of thing the answer is"))),
    "step-back": SchemaTemplate((
        ("step_back_question", "the more general question behind this one"),
        ("principle", "the concept or principle that answers it"))),
    "least-to-most": SchemaTemplate((
        ("subproblems", "the simpler questions into which the problem divides, the easiest first"),
        ("order", "how the answer of each is used in the next"))),
    "chain-of-thought": SchemaTemplate((
        ("reasoning", "the steps that lead from what is given to what is wanted, in general terms"),)),
}
"""Templates by name. The fields of ``"schema"`` are those of the authors' code; all other words are ours."""

__all__ = ["TEMPLATES", "Schema", "SchemaTemplate"]
