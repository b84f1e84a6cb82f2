"""Wrong answers that look like right ones."""

from __future__ import annotations

from collections.abc import Sequence

from looseleaf_abstract_reasoning.draw import Draw
from looseleaf_abstract_reasoning.rules import Rule, numbers, written


def choices_for(rule: Rule, rivals: Sequence[Rule], operands: Sequence[str], seen: str, draw: Draw,
                count: int) -> tuple[str, ...]:
    """The right answer and wrong ones, in random order.

    First what other rules of the sub-dataset give for the same operands, then small edits of the right answer.

    Args:
        rule: the right one.
        rivals: rules that the demonstrations rule out.
        operands: of the question.
        seen: characters of the demonstrations; a wrong answer has no other, or it would give itself away.
        draw: source of random choices.
        count: how many answers at most; a truth value has but two.
    """
    right = rule.apply(*operands)
    found = [right]
    for other in draw.shuffled(rivals):
        try:
            wrong = other.apply(*operands) if other.arity == len(operands) else right
        except ValueError:
            continue
        if wrong not in found and other.answer == rule.answer and not set(wrong) - set(seen):
            found.append(wrong)
    found = found[:count]
    for _ in range(50 * count):
        if len(found) == count:
            break
        wrong = _edited(right, rule.answer, seen, draw)
        if wrong not in found and not set(wrong) - set(seen):
            found.append(wrong)
    return tuple(draw.shuffled(found))


def _edited(right: str, kind: str, seen: str, draw: Draw) -> str:
    if kind in ("list", "set"):
        return _edited_values(right, "[]" if kind == "list" else "{}", draw)
    if kind == "truth":
        return {"T": "F", "F": "T", "0": "1", "1": "0"}[right]
    if kind == "sign":
        return {"1": "-1", "-1": "1"}[right]
    if kind == "bits":
        alphabet = "01"
    elif kind == "number":
        alphabet = "".join(character for character in "0123456789" if character in seen)
    else:
        alphabet = "".join(character for character in seen if character.isalpha())
    places = [k for k, character in enumerate(right) if character.isalnum()]
    k = draw.pick(places)
    other = draw.pick(places)
    if draw.whole(0, 1) and right[k] != right[other]:  # exchange two characters
        edited = list(right)
        edited[k], edited[other] = edited[other], edited[k]
        text = "".join(edited)
    else:
        text = right[:k] + draw.pick(alphabet) + right[k + 1:]
    return right if kind == "number" and _odd_number(text) else text


def _odd_number(text: str) -> bool:
    """Whether nobody would write a number so: 012, 1.50, -0."""
    bare = text.lstrip("-")
    return (bare[0] == "0" and len(bare) > 1 and bare[1] != ".") or ("." in bare and bare[-1] == "0") or text == "-0"


def _edited_values(right: str, brackets: str, draw: Draw) -> str:
    """A list or set with one value dropped, added or another."""
    values = numbers(right, brackets)
    highest = 9 if brackets == "[]" else 6
    k, value, how = draw.whole(0, len(values)), draw.whole(0, highest), draw.pick(("drop", "add", "other"))
    if k == len(values) or how == "add":
        values.insert(k, value)
    elif how == "drop":
        values.pop(k)
    else:
        values[k] = value
    if brackets == "{}":
        return written(sorted(set(values)), brackets)
    return written(values, brackets)
