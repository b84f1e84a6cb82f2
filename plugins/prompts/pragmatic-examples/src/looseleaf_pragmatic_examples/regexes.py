"""Regular expressions as programs: drawn at random, matched with a time limit, compared as languages."""

from __future__ import annotations

import dataclasses
import functools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import regex

Utterance = tuple[str, str]
"""A string and its label, ``"+"`` or ``"-"``."""
OUTSIDE, INSIDE = frozenset("\\[]|().?*+{}"), frozenset("\\[]^-")
"""Characters that greenery wants escaped outside a class and inside one; it refuses other escapes."""
LARGEST = 200
"""Most repeated characters of a pattern that greenery is given: its automata grow with them, without a time limit."""


@functools.lru_cache(maxsize=100_000)
def _compiled(pattern: str) -> Any:
    """The pattern, or None where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of syntax that may come to mean something else
        try:
            return regex.compile(pattern, regex.V0)
        except (regex.error, OverflowError, RecursionError, MemoryError):
            return None


def full_match(pattern: str, text: str, seconds: float = 0.1) -> bool | None:
    """Whether ``pattern`` matches the whole of ``text``; None: it is no pattern, or took longer than ``seconds``."""
    compiled = _compiled(pattern)
    if compiled is None:
        return None
    try:
        return compiled.fullmatch(text, timeout=seconds) is not None
    except TimeoutError:
        return None


@dataclasses.dataclass(frozen=True)
class MatchesRegex:
    """The rule "this pattern matches the whole text", as a function of a text, or of the inputs of an example.

    Attributes:
        pattern: in the syntax of the package ``regex``, which is that of ``re``.
        labels: of texts that match, and of those that do not.
        name: of the input, where it is called with the inputs of an example.
        seconds: time limit of a match.
    """

    pattern: str
    labels: tuple[Any, Any] = ("+", "-")
    name: str = "text"
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or _compiled(self.pattern) is None:
            raise ValueError(f"pattern: expected a regular expression, got {self.pattern!r}: escape the characters "
                             "that mean something with regex.escape")
        if len(self.labels) != 2 or self.labels[0] == self.labels[1]:
            raise ValueError(f"labels: expected two different labels, got {self.labels!r}")

    def __call__(self, text: Any) -> Any:
        """The label of a text, or of the input :attr:`name` of a mapping.

        Raises:
            ValueError: no text, or the match took longer than :attr:`seconds`.
        """
        if not isinstance(text, str):
            try:
                text = text[self.name]
            except (TypeError, KeyError, IndexError):
                raise ValueError(f"{self.pattern!r}: expected a text or inputs with {self.name!r}, got {text!r}"
                                 ) from None
        found = full_match(self.pattern, text, self.seconds)
        if found is None:
            raise ValueError(f"{self.pattern!r}: expected a match within {self.seconds} s, got none on {text!r:.80}: "
                             "nested repetitions such as (a+)+ take exponential time; write the pattern without them")
        return self.labels[not found]


@dataclasses.dataclass(frozen=True)
class Domain:
    """Programs of your own for self-play, by three functions.

    Attributes:
        sample: ``(n, seed) -> [program]``: random programs, as texts.
        examples: ``(program, n, seed) -> [(text, label)]``: at most n random examples of each label that agree with it.
        agrees: ``(program, (text, label)) -> bool``; False for a text that is no program.
        key: program -> what two programs share that mean the same; without it only equal texts do.
    """

    sample: Callable[[int, int], list[str]]
    examples: Callable[[str, int, int], list[Utterance]]
    agrees: Callable[[str, Utterance], bool]
    key: Callable[[str], Any] = str

    def equivalent(self, one: str, two: str) -> bool:
        """Whether two programs mean the same."""
        return bool(self.key(one) == self.key(two))


def _printable() -> str:
    return "".join(chr(n) for n in range(33, 127) if chr(n) not in "\\^$")


@dataclasses.dataclass(frozen=True)
class RegexDomain:
    """The paper's programs: regular expressions of a few parts, with strings that match or do not.

    A part is a character, a class, a negated class or a choice of two characters, followed by a quantifier or none.
    [section on the experiments]

    Args:
        alphabet: characters of the strings; what ``.`` and ``[^..]`` mean depends on it. Default: 91 printable
            characters as in the paper's code; which of the 94 it leaves out is ours (backslash, caret, dollar).
        parts: most parts of a program. [paper: 5]
        max_length: most characters of a program. [paper: 30]
        longest: most characters of a string. [paper: 15]
        atoms: what parts are drawn from instead, such as ``("a", "b", "[ab]")``.
        quantifiers: what follows a part, drawn evenly; ``""`` is none.
        seconds: time limit of one match.
    """

    alphabet: str = _printable()
    parts: int = 5
    max_length: int = 30
    longest: int = 15
    atoms: tuple[str, ...] = ()
    quantifiers: tuple[str, ...] = ("", "", "", "?", "{2}", "{3}", "{2,}", "{1,}", "{1,2}", "{2,4}")
    seconds: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("parts", 1), ("max_length", 1), ("longest", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"RegexDomain.{name}: expected an integer >= {least}, got {value!r}")
        if len(set(self.alphabet)) < 2 or len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError(f"RegexDomain.alphabet: expected two different characters or more, got {self.alphabet!r}")

    def sample(self, n: int, seed: int) -> list[str]:
        """``n`` random programs, each of which matches some string of :attr:`longest` characters or fewer."""
        rng, out = random.Random(f"programs {seed}"), list[str]()
        for _ in range(1000 * n):
            if len(out) == n:
                return out
            pattern = "".join(self._part(rng) for _ in range(rng.randint(1, self.parts)))
            if len(pattern) <= self.max_length and self._positive(pattern, rng, 20):
                out.append(pattern)
        raise ValueError(f"RegexDomain: expected programs of at most {self.max_length} characters that match a string "
                         f"of at most {self.longest}, got {len(out)} of {n}: raise max_length or longest")

    def _part(self, rng: random.Random) -> str:
        return (rng.choice(self.atoms) if self.atoms else self._atom(rng)) + rng.choice(self.quantifiers)

    def _atom(self, rng: random.Random) -> str:
        pair = rng.sample(self.alphabet, 2)
        one, two = (_escaped(c, OUTSIDE) for c in pair)
        first, second = (_escaped(c, INSIDE) for c in pair)
        classes = [f"[{low}-{high}]" for low, high in ("az", "AZ", "09") if {low, high} <= set(self.alphabet)]
        return rng.choice([one, rng.choice(classes) if classes else f"[{first}{second}]", f"({one}|{two})",
                           f"[^{first}]"])

    def examples(self, program: str, n: int, seed: int) -> list[Utterance]:
        """At most ``n`` strings drawn from the program and ``n`` uniform ones that it does not match, in random order.

        Their lengths are 1 to :attr:`longest`; a program may have fewer of either kind.
        """
        rng = random.Random(f"examples {seed} {program}")
        positive = dict.fromkeys(s for _ in range(4 * n) if (s := self._positive(program, rng, 1)))
        drawn = ("".join(rng.choices(self.alphabet, k=rng.randint(1, self.longest))) for _ in range(8 * n))
        negative = dict.fromkeys(s for s in drawn if self.agrees(program, (s, "-")))
        out = [(s, "+") for s in list(positive)[:n]] + [(s, "-") for s in list(negative)[:n]]
        rng.shuffle(out)
        return out

    def agrees(self, program: str, utterance: Utterance) -> bool:
        """Whether the program matches the whole string (``"+"``) or does not (``"-"``); False for no program.

        Raises:
            ValueError: another label.
        """
        text, label = utterance
        if label not in ("+", "-"):
            raise ValueError(f"expected the label '+' or '-', got {label!r} for {text!r}")
        found = full_match(program, text, self.seconds)
        return False if found is None else found == (label == "+")

    def key(self, program: str) -> Any:
        """What two programs share that match the same strings over :attr:`alphabet`: the smallest automaton.

        A program that greenery does not read (anchors, look-around, back-references, escapes such as ``\\$``), or that
        is too large for it, has its text for a key: it then equals only itself.

        Raises:
            ModuleNotFoundError: greenery is not installed.
        """
        return _language(program, self.alphabet)

    def equivalent(self, one: str, two: str) -> bool:
        """Whether two programs match the same strings over :attr:`alphabet`; see :meth:`key`."""
        return bool(self.key(one) == self.key(two))

    def _positive(self, program: str, rng: random.Random, tries: int) -> str:
        """A string that the program matches, 1 to ``longest`` characters; empty where none was drawn."""
        pattern = _parsed(program)
        for _ in range(tries if pattern is not None else 0):
            text = _draw(pattern, rng, self.alphabet)
            if text and len(text) <= self.longest and self.agrees(program, (text, "+")):
                return text
        return ""


def _escaped(character: str, special: frozenset[str]) -> str:
    return "\\" + character if character in special else character


def _draw(pattern: Any, rng: random.Random, alphabet: str) -> str | None:
    """A random string of a pattern of greenery; None where a class has no character of the alphabet."""
    out = ""
    for mult in rng.choice(sorted(pattern.concs, key=str)).mults:
        low, high = mult.multiplier.min.v, mult.multiplier.max.v
        for _ in range(rng.randint(low, low + 3 if high is None else min(high, low + 3))):
            inner = mult.multiplicand
            if hasattr(inner, "concs"):
                piece = _draw(inner, rng, alphabet)
            else:
                characters = [c for c in alphabet if inner.accepts(c)]
                piece = rng.choice(characters) if characters else None
            if piece is None:
                return None
            out += piece
    return out


def _size(pattern: Any) -> int:
    """Characters of a pattern with its repetitions written out."""
    return sum((mult.multiplier.max.v or mult.multiplier.min.v + 1)
               * (_size(mult.multiplicand) if hasattr(mult.multiplicand, "concs") else 1)
               for conc in pattern.concs for mult in conc.mults)


@functools.lru_cache(maxsize=100_000)
def _parsed(program: str) -> Any:
    """The program as greenery reads it; None where it reads it otherwise than ``regex``, or not at all."""
    try:
        from greenery import parse
    except ModuleNotFoundError:
        raise ModuleNotFoundError("comparing and drawing regular expressions needs greenery: "
                                  "pip install 'looseleaf-pragmatic-examples[languages]'") from None
    outside = regex.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", program)
    if (regex.search(r"[\^$]|\(\?|[*+?}][+?]", outside) or regex.search(r"\\[^\W\ddDwWsStnrfv_]|\\\d", program)
            or _compiled(program) is None):
        return None  # anchors are characters to greenery, and it reads lazy quantifiers and some escapes otherwise
    try:
        pattern = parse(program)
    except Exception:  # its parser raises many types
        return None
    return pattern if _size(pattern) <= LARGEST else None


@functools.lru_cache(maxsize=100_000)
def _language(program: str, alphabet: str) -> Any:
    pattern = _parsed(program)
    if pattern is None:
        return program
    automaton = pattern.to_fsm()
    classes = {c: next(k for k in automaton.alphabet if k.accepts(c)) for c in alphabet}
    dead = object()
    table = {state: [row.get(classes[c], dead) for c in alphabet] for state, row in automaton.map.items()}
    table[dead] = [dead] * len(alphabet)
    # Moore: states are split until those of a block go to the same blocks
    block: dict[Any, int] = {state: int(state in automaton.finals) for state in table}
    while True:
        rows = {state: (block[state], *(block[to] for to in table[state])) for state in table}
        numbers = {row: n for n, row in enumerate(dict.fromkeys(rows.values()))}
        if len(numbers) == len(set(block.values())):
            break
        block = {state: numbers[rows[state]] for state in table}
    # blocks are numbered in the order in which they are reached, so that equal languages have equal keys
    order = {block[automaton.initial]: 0}
    reached, out = [automaton.initial], []
    for state in reached:
        for to in table[state]:
            if block[to] not in order:
                order[block[to]] = len(order)
                reached.append(to)
        out.append((state in automaton.finals, tuple(order[block[to]] for to in table[state])))
    return tuple(out)


def strings(alphabet: Sequence[str], longest: int, shortest: int = 1) -> list[str]:
    """All strings over an alphabet of ``shortest`` to ``longest`` characters, the shorter first."""
    out, last = [""] if shortest == 0 else [], [""]
    for length in range(1, longest + 1):
        last = [text + c for text in last for c in alphabet]
        out += last if length >= shortest else []
    return out


__all__ = ["Domain", "MatchesRegex", "RegexDomain", "Utterance", "full_match", "strings"]
