"""Templates with input and answer slots, in the notation of the prompting literature."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from looseleaf.prompts.prompt import storable
from looseleaf.tasks import Example
from looseleaf_text.prompts import ClozePrompt, TextPrompt
from looseleaf_text.slots import slots, with_prefix
from looseleaf_text.verbalizer import Verbalizer

if TYPE_CHECKING:
    from looseleaf_text.task import TextTask

_SLOT = r"\[X\]|\[Z(?::[A-Za-z_]\w*)?\]|\{[A-Za-z_]\w*\}"
_PIECE = re.compile(rf"(\\*)({_SLOT})")
_BRACES = re.compile(r"(\{[A-Za-z_]\w*\})")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place to be filled.

    Attributes:
        name: of an input the field of the example, of an answer its name (``"Z"`` unless it has one of its own).
        answer: whether the model fills it.
    """

    name: str
    answer: bool = False

    def __str__(self) -> str:
        if self.answer:
            return "[Z]" if self.name == "Z" else f"[Z:{self.name}]"
        return "[X]" if self.name == "text" else f"{{{self.name}}}"


@storable
@dataclasses.dataclass(frozen=True)
class Template:
    r"""A text with slots: ``"[X] Overall, it was a [Z] film."``

    ``[X]`` is the example's text and ``{name}`` one of its fields (``{text}`` is ``[X]``); ``[Z]`` is the answer, and
    where there are several each has a name, ``[Z:name]``. A backslash before what would be a slot makes it text:
    ``\[X]``; see :meth:`escape`. What is filled in is never read for slots again, so ``[X]`` in a user's text stays.

    Templates are joined by ``+``, which is associative.

    Attributes:
        text: the template.
        chat: it holds a chat template already (see :meth:`with_chat`).

    Raises:
        ValueError: two answer slots of one name.
    """

    text: str
    chat: bool = False

    def __post_init__(self) -> None:
        for name in self.answers:
            if self.answers.count(name) > 1:
                raise ValueError(f"the template {self.text!r} has several answer slots called {name!r}: "
                                 "give each a name of its own, such as [Z:first] and [Z:second]")

    @classmethod
    def of(cls, parts: Sequence[str | Slot], chat: bool = False) -> Template:
        """The template of ``parts``; the inverse of :attr:`parts`."""
        text, literal = "", ""
        for part in parts:
            if isinstance(part, str):
                literal += part
                continue
            bars = len(literal) - len(literal.rstrip("\\"))  # those before a slot would escape it
            text += cls.escape(literal) + "\\" * bars + str(part)
            literal = ""
        return cls(text + cls.escape(literal), chat)

    @classmethod
    def of_task(cls, task: TextTask) -> Template:
        """How ``task`` shows an example, followed by the answer."""
        joint = with_prefix(task.template, task.answer_prefix)[len(task.template):]
        names = set(slots(task.template))
        shown = [Slot(p[1:-1]) if p[1:-1] in names and p[:1] == "{" else p for p in _BRACES.split(task.template)]
        return cls.of([*shown, joint, Slot("Z", True)])

    @staticmethod
    def escape(text: str) -> str:
        """``text`` so that it stays text in a template, whatever it holds."""
        return _PIECE.sub(lambda m: m.group(1) * 2 + "\\" + m.group(2), text)

    @functools.cached_property
    def parts(self) -> tuple[str | Slot, ...]:
        """Texts (escapes undone, none empty) and slots, in order."""
        out: list[str | Slot] = []
        literal, at = "", 0
        for match in _PIECE.finditer(self.text):
            bars, piece = len(match.group(1)), match.group(2)
            literal += self.text[at:match.start()] + "\\" * (bars // 2)
            at = match.end()
            if bars % 2:
                literal += piece
                continue
            out += [literal] if literal else []
            literal = ""
            name = piece[1:-1]
            out.append(Slot(name.partition(":")[2] or "Z", True) if piece.startswith("[Z")
                       else Slot("text" if piece == "[X]" else name))
        literal += self.text[at:]
        return (*out, literal) if literal else tuple(out)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Fields of the example that are wanted, each once."""
        return tuple(dict.fromkeys(p.name for p in self.parts if isinstance(p, Slot) and not p.answer))

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the answer slots, in order."""
        return tuple(p.name for p in self.parts if isinstance(p, Slot) and p.answer)

    @property
    def shape(self) -> Literal["prefix", "cloze"]:
        """``"prefix"`` where one answer slot ends the template, ``"cloze"`` where one stands inside or are several.

        Raises:
            ValueError: there is no answer slot.
        """
        if not self.answers:
            raise ValueError(f"the template {self.text!r} has no answer slot: write [Z] where the answer goes")
        return "prefix" if len(self.answers) == 1 and isinstance(self.parts[-1], Slot) else "cloze"

    def __add__(self, other: Template) -> Template:
        if not isinstance(other, Template):
            return NotImplemented
        return Template.of([*self.parts, *other.parts], self.chat or other.chat)

    def fill(self, inputs: Example | Mapping[str, str] | None = None,
             answers: str | Mapping[str, str] | None = None) -> Template:
        """The template with some slots filled: the prompt x' where the inputs are, a filled prompt with the answers.

        White space before an answer slot stands for that at the beginning of the answer.

        Args:
            inputs: an example or field -> text; None fills no input.
            answers: the answer, or answer name -> text; names may be missing.

        Raises:
            ValueError: the example lacks a field of the template, or there is no answer slot of a name.
        """
        fields = None if inputs is None else dict(inputs.inputs if isinstance(inputs, Example) else inputs)
        missing = [] if fields is None else [name for name in self.inputs if name not in fields]
        if missing:
            raise ValueError(f"the template {self.text!r}: expected the inputs {list(self.inputs)}, got "
                             f"{sorted(fields or {})}")
        texts = {"Z": answers} if isinstance(answers, str) else dict(answers or {})
        unknown = sorted(set(texts) - set(self.answers))
        if unknown:
            raise ValueError(f"the template {self.text!r}: expected answers for {list(self.answers)}, got {unknown} "
                             "too")
        out: list[str | Slot] = []
        for part in self.parts:
            if isinstance(part, Slot) and part.answer and part.name in texts:
                before = out[-1] if out else ""
                spaced_before = isinstance(before, str) and before[-1:].isspace()
                text = texts[part.name]
                out.append(text.lstrip() if spaced_before else text)
            elif isinstance(part, Slot) and not part.answer and fields is not None:
                out.append(fields[part.name])
            else:
                out.append(part)
        return Template.of(out, self.chat)

    @property
    def filled(self) -> str:
        """The plain text of a template without open slots.

        Raises:
            ValueError: a slot is still open.
        """
        still = [str(p) for p in self.parts if isinstance(p, Slot)]
        if still:
            raise ValueError(f"the template {self.text!r} still has unfilled slots {', '.join(still)}: fill them first")
        return "".join(str(p) for p in self.parts)

    def around(self, inputs: Example | Mapping[str, str], name: str | None = None,
               answers: Mapping[str, str] | None = None) -> tuple[str, str]:
        """The texts before and after an answer slot, inputs filled in.

        Args:
            inputs: the example.
            name: of the slot; None: the only one.
            answers: what the other answer slots hold. One before ``name`` must be given; where one after it is
                not, the text after ends there.
        """
        name = self.single() if name is None else name
        parts = self.fill(inputs, {k: v for k, v in (answers or {}).items() if k != name}).parts
        place = next((n for n, p in enumerate(parts) if isinstance(p, Slot) and p.name == name), None)
        if place is None:
            raise ValueError(f"the template {self.text!r} has no answer slot {name!r}; it has {list(self.answers)}")
        after = ""
        for part in parts[place + 1:]:
            if isinstance(part, Slot):
                break
            after += part
        return Template.of(parts[:place]).filled, after

    def single(self) -> str:
        """The name of the only answer slot; ValueError where there is none or there are several."""
        if len(self.answers) != 1:
            raise ValueError(f"the template {self.text!r}: expected one answer slot here, got {len(self.answers)}: "
                             "write [Z] once")
        return self.answers[0]

    def to_prompt(self, labels: Mapping[str, str] | Verbalizer | None = None, **fields: Any) -> TextPrompt:
        """A prompt that shows an example through this template.

        Args:
            labels: label -> answer, or a verbalizer. Spaces before ``[Z]`` go to the beginning of the answers. None:
                answers are generated.
            fields: further fields of the prompt, such as ``text`` (an instruction), ``exemplars`` and ``max_tokens``.

        Returns:
            A :class:`looseleaf_text.ClozePrompt` where there is text after the answer.

        Raises:
            ValueError: not one answer slot, or escaped braces, which a prompt cannot hold.
        """
        name = self.single()
        place = next(n for n, p in enumerate(self.parts) if isinstance(p, Slot) and p.answer and p.name == name)
        before, after = (_braced(part, self.text) for part in (self.parts[:place], self.parts[place + 1:]))
        if labels is not None:
            verbalizer = labels if isinstance(labels, Verbalizer) else Verbalizer.of(labels)
            fields = {"labels": verbalizer.map(lambda answers: spaced(before, answers)[1]), **fields}
        shown = spaced(before, ())[0]
        return ClozePrompt(template=shown, suffix=after, **fields) if after else TextPrompt(template=shown, **fields)

    def with_chat(self, tokenizer: Any, system: str = "") -> Template:
        """The template inside the chat template of ``tokenizer``: the user says it, the assistant answers.

        The chat template is applied once, to the template and not to each example, so what comes out is a
        template like any other. A beginning-of-text token that the tokenizer itself puts first is left out.

        Args:
            tokenizer: of transformers, with a chat template.
            system: system message; empty: none given (some chat templates have one of their own).

        Raises:
            ValueError: applied twice, no chat template, or text after the answer.
        """
        if self.chat:
            raise ValueError("the chat template is applied already: applying it twice would nest one chat in another")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{type(tokenizer).__name__} has no chat template: use the template as it is")
        if self.shape != "prefix":
            raise ValueError(f"the template {self.text!r} has text after the answer; in a chat the answer comes last")
        answer = self.parts[-1]
        open_slots = [p for p in self.parts[:-1] if isinstance(p, Slot)]
        # Marks in place of slots, so that the chat template sees ordinary text and may do with it what it likes.
        marks = [f"<<looseleaf slot {n}>>" for n in range(len(open_slots))]
        left = iter(marks)
        content = "".join(p if isinstance(p, str) else next(left) for p in self.parts[:-1]).rstrip()
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        first = getattr(tokenizer, "bos_token", None)
        if first and text.startswith(first) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            text = text[len(first):]
        parts: list[str | Slot] = []
        for mark, slot in zip(marks, open_slots, strict=True):
            literal, kept, text = text.partition(mark)
            if not kept:
                raise ValueError(f"the chat template of {type(tokenizer).__name__} does not keep the user's text")
            parts += [literal, slot]
        return Template.of([*parts, text, answer], chat=True)

    def __str__(self) -> str:
        return self.text


def spaced(before: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    """``before`` without spaces at its end, and ``answers`` with them at their beginning.

    Tokenizers put a space with the word after it, so a prompt that ends with one is read wrongly. Where ``before``
    ends with other white space, answers lose theirs; where with none, both stay as they are.
    """
    if not before[-1:].isspace():
        return before, list(answers)
    bare = before.rstrip(" ")
    return bare, [before[len(bare):] + a.lstrip() for a in answers]


def _braced(parts: Sequence[str | Slot], template: str) -> str:
    """``parts`` as the text of a prompt, whose only slots are names in braces."""
    for part in parts:
        if isinstance(part, str) and slots(part):
            raise ValueError(f"the template {template!r} has the escaped text {{{slots(part)[0]}}}, which a prompt "
                             "would fill: fill the template yourself, or word it otherwise")
    return "".join(f"{{{p.name}}}" if isinstance(p, Slot) else p for p in parts)
