"""The generated suite: counts, truth, uniqueness, determinism, and what a remapping may and may not change."""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter

import pytest

from looseleaf_abstract_reasoning import DATASETS, AbstractReasoningProbe, Item, draw_remapping, problems, render, suite
from looseleaf_abstract_reasoning.datasets import CATEGORIES, REMAPPED
from looseleaf_abstract_reasoning.items import REMAPPINGS, Problem, RandomChoices, check_items, text_of
from looseleaf_abstract_reasoning.reproduction import SUITE_DIGEST, digest
from looseleaf_abstract_reasoning.rules import LIBRARY, explaining, in_base, rounded


@pytest.fixture(scope="module")
def timed() -> tuple[list[Item], float]:
    start = time.process_time()
    items = list(suite(0))
    return items, time.process_time() - start


@pytest.fixture(scope="module")
def made() -> dict[str, list[Problem]]:
    return {name: problems(name, 24, seed=1) for name in DATASETS}


def test_the_suite_has_the_papers_sizes(timed: tuple[list[Item], float]) -> None:
    items, seconds = timed
    assert seconds < 10
    assert len(items) == 9095 == 81 * 96 + 1319
    sizes = Counter(f"{i.dataset}/{i.kind}" for i in items)
    assert len(sizes) == 82 and sorted(sizes.values()) == [96] * 81 + [1319]
    datasets = {c: len({(i.dataset, i.kind) for i in items if i.category == c}) for c in CATEGORIES}
    assert datasets == {"basic-computation": 4, "extended-calculation": 16, "number-base": 12, "math-application": 1,
                        "symbolic-abstraction": 7, "symbolic-reasoning": 42}
    check_items(items)  # no problem and no prompt twice


def test_no_question_is_asked_twice(timed: tuple[list[Item], float]) -> None:
    for name in DATASETS:
        some = problems(name, seed=0) if name in ("add", "sets", "square-wave", "stories") else problems(name, 40)
        assert len({(p.rule, text_of(p.question)) for p in some}) == len(some)
        for p in some:
            texts = [text_of(q) for q in p.questions]
            assert len(set(texts)) == len(texts), "the answer to the question stands among the demonstrations"


def test_the_suite_is_the_same_on_every_machine(timed: tuple[list[Item], float]) -> None:
    assert digest(timed[0]) == SUITE_DIGEST


def test_neither_hash_seed_nor_global_state_matters() -> None:
    code = ("import random; random.seed(1)\n"
            "from looseleaf_abstract_reasoning import AbstractReasoningProbe\n"
            "from looseleaf_abstract_reasoning.reproduction import digest\n"
            "print(digest(AbstractReasoningProbe(per_category=12).items(5)))")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             env={**os.environ, "PYTHONHASHSEED": "1234"}).stdout
    assert printed.strip() == digest(AbstractReasoningProbe(per_category=12).items(5))


def test_draws_do_not_depend_on_the_version_of_python() -> None:
    rng = RandomChoices("looseleaf")
    assert [rng.integer(0, 99) for _ in range(6)] == [68, 43, 73, 22, 65, 63]
    assert RandomChoices("a").some("abcdefgh", 8) == RandomChoices("a").shuffled("abcdefgh")
    assert sorted(RandomChoices("a").shuffled("abcdefgh")) == list("abcdefgh")


def test_seeds_and_counts() -> None:
    assert problems("add", 3, seed=1) == problems("add", 5, seed=1)[:3]
    assert problems("add", 3, seed=1) != problems("add", 3, seed=2)


# -- truth ------------------------------------------------------------------------------------------------------------

def answer_by_hand(p: Problem) -> str:
    """The answer by other means than those of the package, from the text of the question."""
    text = text_of(p.question).removesuffix(" =")
    if p.category == "basic-computation":
        value = eval(text.replace("/", "/ 1.0 /")) if "/" not in text else eval(text)
        return str(value) if "/" not in text else trimmed(value)
    if p.category == "number-base":
        a, operator, b = text.split()
        if operator == "to_base":
            value, base = int(a), int(b)
        else:
            base = int(p.dataset[-1])
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(a, base), int(b, base))
        digits = []
        left = abs(value)
        while left:
            left, digit = divmod(left, base)
            digits.append(str(digit))
        return ("-" if value < 0 else "") + ("".join(reversed(digits)) or "0")
    if p.category == "symbolic-abstraction":
        x = int(text.split()[1])
        return function_by_hand(p.rule, x)
    return extended_by_hand(p.rule, text)


def trimmed(value: float) -> str:
    return f"{round(value, 2):.2f}".rstrip("0").rstrip(".").replace("-0", "0") if abs(value) < 0.005 else \
        f"{round(value, 2):.2f}".rstrip("0").rstrip(".")


def function_by_hand(rule: str, x: int) -> str:
    if "wave" in rule:
        phase = int(re.search(r"(\d) periods", rule)[1]) * x % 10 / 10  # type: ignore[index]
        value = {"square": 1.0 if phase <= 0.5 else -1.0, "triangle": 4 * phase - 1 if phase < 0.5 else 3 - 4 * phase,
                 "sawtooth": 2 * phase - 1}[rule.split()[0]]
        return trimmed(value)
    if "sin" in rule or "cos" in rule:
        a, name, b = re.fullmatch(r"(\d) (sin|cos)\((\d)x\)", rule).groups()  # type: ignore[union-attr]
        return trimmed(int(a) * getattr(math, name)(int(b) * x))
    return str(eval(re.sub(r"(\d)x", r"\1*x", rule).replace("^", "**"), {"x": x}))


def extended_by_hand(rule: str, text: str) -> str:
    words = re.findall(r"\[[^\]]*\]|\{[^}]*\}|\S+", text)
    a, b = (words[0], words[2]) if len(words) == 3 else (words[1], "")
    if rule in ("and", "or", "xor"):
        return "".join(str({"and": int(x) * int(y), "or": max(int(x), int(y)), "xor": int(x != y)}[rule])
                       for x, y in zip(a, b, strict=True))
    if rule == "not":
        return "".join("10"[int(x)] for x in a)
    n, length = int(b) if b.isdigit() else 0, len(a)
    if "shift" in rule or "rotate" in rule:
        filled = a[0] if rule == "arithmetic shift right" else "0"
        out = []
        for k in range(length):
            source = k + n if "left" in rule else k - n
            out.append(a[source % length] if "rotate" in rule else a[source] if 0 <= source < length else filled)
        return "".join(out)
    if rule.endswith("bit"):
        value = int(a, 2)
        if rule == "check bit":
            return str(value >> n & 1)
        mask = 1 << n
        return format({"set": value | mask, "clear": value & ~mask, "toggle": value ^ mask}[rule.split()[0]],
                      f"0{length}b")
    if rule == "contains in order":
        return "T" if re.search(".*".join(b), a) else "F"
    if rule in ("intersection", "union", "difference"):
        one, two = (set(eval(w)) if len(w) > 2 else set() for w in (a, b))
        return "{" + ", ".join(map(str, sorted(getattr(one, rule)(two)))) + "}"
    if rule == "days between":
        return str(abs(datetime.date(*eval(a)).toordinal() - datetime.date(*eval(b)).toordinal()))
    if rule == "square root":
        return trimmed(math.sqrt(int(a)))
    if rule in ("sort", "filter", "deduplicate"):
        values = eval(a)
        return str({"sort": sorted(values), "filter": [v for v in values if b and v > int(b)],
                    "deduplicate": [v for k, v in enumerate(values) if v not in values[:k]]}[rule])
    if rule in ("minimum", "maximum", "median", "majority"):
        values = eval(a)
        most = max(values.count(v) for v in values)
        return str({"minimum": min(values), "maximum": max(values), "median": sorted(values)[len(values) // 2],
                    "majority": next(v for v in values if values.count(v) == most)}[rule])
    return {"count": str(sum(c == b for c in a)), "reverse": "".join(reversed(a)), "concatenate": f"{a}{b}",
            "repeat": 2 * a, "length": str(length)}[rule]


def test_answers_are_right(made: dict[str, list[Problem]]) -> None:
    checked = Counter()  # type: ignore[var-annotated]
    for name, some in made.items():
        for p in some:
            if name != "stories":
                assert p.answer == answer_by_hand(p), (p.rule, text_of(p.question))
                checked[p.rule] += 1
            assert p.answer in p.choices and len(set(p.choices)) == len(p.choices) >= 2
    assert len(checked) > 60


def test_stories_are_right() -> None:
    texts = {text_of(p.question): p for p in problems("stories", 200, seed=0)}
    cows = [(t, p) for t, p in texts.items() if "cows" in t]
    tea = [(t, p) for t, p in texts.items() if "tea" in t]
    assert cows and tea
    for text, p in cows:
        a, b = map(int, re.findall(r"\d+", text))
        assert p.answer == str(4 * a + 2 * b)
    for text, p in tea:
        a, b, c = map(int, re.findall(r"\d+", text))
        assert p.answer == str(a - b * c)
    assert len({p.rule for p in texts.values()}) == 16


def test_rounding_and_bases() -> None:
    from fractions import Fraction

    assert [rounded(Fraction(a, b)) for a, b in ((1, 8), (3, 8), (-1, 8), (1, 3), (-2, 1), (-1, 1000), (5, 2))] == [
        "0.12", "0.38", "-0.12", "0.33", "-2", "0", "2.5"]
    assert [in_base(n, 3) for n in (0, 8, -5)] == ["0", "22", "-12"]


def test_every_problem_can_be_solved(made: dict[str, list[Problem]]) -> None:
    """No symbol of the question or the answer is new, and every rule that explains the demonstrations agrees."""
    for some in made.values():
        for p in some:
            seen = {c for q, a in p.demonstrations for c in text_of(q) + a}
            assert set(p.answer) <= seen and all(set(choice) <= seen for choice in p.choices)
            asked = {c for role, text in p.question if role == "operand" for c in text}
            assert asked <= seen
    for p in made["variable-shifts"]:
        cases = [(tuple(t for r, t in q if r == "operand")[:-1], a) for q, a in p.demonstrations]
        asked = tuple(t for r, t in p.question if r == "operand")[:-1]  # type: ignore[assignment]
        assert {rule.apply(*asked) for rule in explaining(LIBRARY, cases)} == {p.answer}


# -- remapping --------------------------------------------------------------------------------------------------------

def test_remappings_are_bijections_and_leave_nothing_behind(made: dict[str, list[Problem]]) -> None:
    for some in made.values():
        for p in some:
            before = {c for q in p.questions for _, text in q for c in text} | set("".join(p.answers))
            for kind in p.remappings:
                new = draw_remapping(p, kind, seed=3)
                if kind != "operators":
                    assert set(new.operands) == set(p.symbols("operand"))
                    assert len(set(new.operands.values())) == len(new.operands)
                    assert all(re.fullmatch("[A-Za-z]", image) for image in new.operands.values())
                if kind != "operands":
                    assert all(re.fullmatch("[A-Za-z]{1,12}", image) for image in new.operators.values())
                    assert set(new.operators) == {t for q in p.questions for r, t in q if r == "operator"}
                images = set("".join([*new.operands.values(), *new.operators.values()]))
                assert not images & before
                assert not set(new.operands.values()) & set("".join(new.operators.values()))
                if kind == "both":
                    after = {c for q in p.questions for c in text_of(new.question(q))}
                    after |= set("".join(map(new.operand, p.answers)))
                    assert not (after - {" "}) & before, "an original symbol is left"


def test_remapped_items_are_the_originals_read_with_the_key(made: dict[str, list[Problem]]) -> None:
    for some in made.values():
        for p in some[:6]:
            plain = render(p)
            for kind in p.remappings:
                new, item = draw_remapping(p, kind, 3), render(p, kind, 3)
                assert item.gold == plain.gold and item.problem == plain.problem and item.kind == kind
                for q in p.questions:
                    changed = new.question(q)
                    assert [r for r, _ in changed] == [r for r, _ in q]
                    key = new.inverse()
                    for (role, text), (_, old) in zip(changed, q, strict=True):
                        if role == "operand":
                            assert "".join(key.get(c, c) for c in text) == old
                        elif role == "words" or kind == "operands":
                            assert text == old
                        else:
                            assert text != old
                    assert text_of(changed) in item.prompt


def test_what_is_remapped_in_the_paper() -> None:
    assert len(REMAPPED) == 14 and "dates" not in REMAPPED and "square-root" not in REMAPPED
    assert DATASETS["stories"].remappings == ("operands",)
    story = problems("stories", 1)[0]
    with pytest.raises(ValueError, match="expected one of original, operands for the problem 'stories/0', got 'both'"):
        draw_remapping(story, "both")
    with pytest.raises(ValueError, match="Did you mean 'operands'"):
        draw_remapping(story, "operand")
    assert len({render(problems("add", 1)[0], kind, seed).prompt for kind in REMAPPINGS for seed in range(3)}) == 9


def test_bad_sizes() -> None:
    for arguments, message in (
            ({"dataset": "ad"}, "Did you mean 'add'"),
            ({"count": 97}, "count: expected an integer in [1, 96], got 97"),
            ({"shots": 3}, "shots: expected an integer in [4, 50], got 3"),
            ({"digits": 2}, "digits: expected an integer in [3, 9], got 2"),
            ({"choices": 1}, "choices: expected an integer in [2, 10], got 1")):
        with pytest.raises(ValueError, match=re.escape(message)):
            problems(**{"dataset": "add", **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["add", "fixed-bits", "sawtooth-wave", "convert-to-base-3", "stories"])
def test_the_papers_own_sizes(name: str) -> None:
    """50 demonstrations and numbers of up to nine digits, as in the authors' data."""
    some = problems(name, 4, shots=50, digits=9)
    assert all(len(p.demonstrations) == 50 for p in some)
    assert hashlib.sha256(render(some[0]).prompt.encode()).hexdigest() == hashlib.sha256(
        render(problems(name, 1, shots=50, digits=9)[0]).prompt.encode()).hexdigest()
