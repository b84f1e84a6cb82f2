"""LaTeX as tokens, with braces and spaces as one way of writing has them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

SPECIAL = ("<pad>", "<s>", "</s>")
NEVER_BRACED = ("left", "right", "big", "Big", "bigl", "bigr", "limits", "displaystyle", "quad", "qquad", "hline")
"""Commands that pylatexenc has no entry for, and that are none of its symbols."""


def latex_tokens(latex: str) -> list[str]:
    """The tokens of a formula: commands, characters, ``{``, ``}``, ``^``, ``_``; normalised.

    Spaces and braces that change nothing are left out, arguments, powers and subscripts always have braces:
    ``x^2``, ``x ^{2}`` and ``{x}^{{2}}`` are the same.

    Raises:
        ValueError: nothing in it, an unknown command, or braces that do not match.
    """
    from pylatexenc.latexwalker import LatexWalker, LatexWalkerParseError

    try:
        nodes = LatexWalker(latex, tolerant_parsing=False).get_latex_nodes()[0]
    except LatexWalkerParseError as error:
        raise ValueError(f"label: expected LaTeX, got {latex!r} ({error})") from error
    tokens = _row(nodes, latex)
    if not tokens:
        raise ValueError(f"label: expected a formula, got {latex!r}")
    return tokens


def normalise(latex: str) -> str:
    """A formula as its :func:`latex_tokens`, with a space between each two."""
    return " ".join(latex_tokens(latex))


def _row(nodes: Sequence[Any], latex: str) -> list[str]:
    """The tokens of nodes side by side."""
    items: list[Any] = []
    for node in nodes:
        kind = type(node).__name__
        if kind == "LatexCharsNode":
            items += [c for c in node.chars if not c.isspace()]
        elif kind != "LatexCommentNode":
            items.append(node)
    out: list[str] = []
    while items:
        item = items.pop(0)
        if isinstance(item, str) and item in ("^", "_"):
            if not items:
                raise ValueError(f"label: expected something behind {item!r}, got the end of {latex!r}")
            out += [item, "{", *_inner(items.pop(0), latex), "}"]
        else:
            out += _inner(item, latex)
    return out


def _inner(item: Any, latex: str) -> list[str]:
    """The tokens of one character or node, without braces around them."""
    if isinstance(item, str):
        return [item]
    kind = type(item).__name__
    if kind == "LatexGroupNode":
        return _row(item.nodelist, latex)
    if kind == "LatexMathNode":
        return _row(item.nodelist, latex)
    if kind == "LatexSpecialsNode":
        return list(item.specials_chars)
    if kind == "LatexCharsNode":
        return _row([item], latex)
    if kind != "LatexMacroNode":
        raise ValueError(f"label: expected a formula without environments, got {latex!r}")
    if item.macroname not in _commands():
        raise ValueError(f"label: expected known commands, got \\{item.macroname} in {latex!r}: pass "
                         "commands that pylatexenc knows, or replace it before")
    out = ["\\" + item.macroname]
    for argument in getattr(item.nodeargd, "argnlist", None) or ():
        if argument is None:
            continue
        square = type(argument).__name__ == "LatexGroupNode" and argument.delimiters[0] == "["
        out += ["[" if square else "{", *_inner(argument, latex), "]" if square else "}"]
    return out


@functools.cache
def _commands() -> frozenset[str]:
    from pylatexenc import latex2text, latexwalker

    found = {spec.macroname for module in (latexwalker, latex2text)
             for spec in module.get_default_latex_context_db().iter_macro_specs()}
    return frozenset(found | set(NEVER_BRACED))


class LatexVocabulary:
    """Tokens and their numbers; 0 is padding, 1 the start, 2 the end.

    Args:
        tokens: those of formulas, in the order of their numbers from 3 on.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = [*SPECIAL, *tokens]
        self.numbers = {token: n for n, token in enumerate(self.tokens)}

    @classmethod
    def of(cls, labels: Iterable[str]) -> LatexVocabulary:
        """The tokens of some formulas."""
        return cls(sorted({token for latex in labels for token in latex_tokens(latex)}))

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, latex: str) -> list[int]:
        """The numbers of a formula's tokens, and the end.

        Raises:
            ValueError: as :func:`latex_tokens`, or a token that is not in the vocabulary.
        """
        tokens = latex_tokens(latex)
        if unknown := sorted(set(tokens) - set(self.numbers)):
            raise ValueError(f"label: expected tokens of this vocabulary, got {', '.join(unknown)} in {latex!r}")
        return [*(self.numbers[t] for t in tokens), SPECIAL.index("</s>")]

    def decode(self, numbers: Iterable[int]) -> str:
        """The tokens up to the end, with a space between each two."""
        out = []
        for n in numbers:
            if n == SPECIAL.index("</s>"):
                break
            if n >= len(SPECIAL):
                out.append(self.tokens[n])
        return " ".join(out)


def token_errors(one: Sequence[str], two: Sequence[str]) -> int:
    """How many tokens must be put in, left out or replaced to make ``two`` of ``one``."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one):
        above, row[0] = row[0], i + 1
        for j, b in enumerate(two):
            above, row[j + 1] = row[j + 1], min(row[j] + 1, row[j + 1] + 1, above + (a != b))
    return row[-1]


__all__ = ["LatexVocabulary", "latex_tokens", "normalise", "token_errors"]
