"""Regular expressions: matching, drawing, equivalence, and the expressions nobody should have to wait for."""

from __future__ import annotations

import sys
import time

import pytest

from looseleaf_pragmatic_examples import Domain, MatchesRegex, RegexDomain, strings
from looseleaf_pragmatic_examples.regexes import full_match


def test_the_whole_string_must_match() -> None:
    assert full_match("a", "a") and not full_match("a", "ab") and full_match("", "")
    assert full_match("(a", "a") is None
    domain = RegexDomain()
    assert domain.agrees("a?", ("", "+")) and domain.agrees("a", ("", "-")) and not domain.agrees("(a", ("a", "-"))
    with pytest.raises(ValueError, match="expected the label '\\+' or '-', got 'yes'"):
        domain.agrees("a", ("a", "yes"))


def test_a_catastrophic_expression_ends_by_the_time_limit() -> None:
    began = time.monotonic()
    assert full_match("(a|a|b?)+(a|a)+c", "a" * 60, 0.05) is None
    assert not RegexDomain(seconds=0.05).agrees("(a|a|b?)+(a|a)+c", ("a" * 60, "-"))
    with pytest.raises(ValueError, match=r"expected a match within 0.05 s.*nested repetitions"):
        MatchesRegex("(a|a|b?)+(a|a)+c", seconds=0.05)("a" * 60)
    assert time.monotonic() - began < 5


def test_rules_of_examples() -> None:
    rule = MatchesRegex("[ab]+", labels=("yes", "no"), name="word")
    assert rule("ab") == rule({"word": "a"}) == "yes" and rule({"word": "c"}) == "no"
    with pytest.raises(ValueError, match=r"expected a text or inputs with 'word', got \{'text': 'a'}"):
        rule({"text": "a"})
    with pytest.raises(ValueError, match="labels: expected two different labels"):
        MatchesRegex("a", labels=("+", "+"))


def test_equivalence_is_equality_on_all_strings() -> None:
    pytest.importorskip("greenery")
    domain = RegexDomain(alphabet="ab", atoms=("a", "b", "[ab]", "(a|b)", "[^a]", "."), parts=3,
                         quantifiers=("", "?", "{2}", "+", "{1,2}"))
    programs = [*domain.sample(60, 0), "a|b", "aa*", "a+", "[^b]+"]
    rows = {p: tuple(full_match(p, s) for s in strings("ab", 8, shortest=0)) for p in programs}
    for one in programs:
        for two in programs:
            assert domain.equivalent(one, two) == (rows[one] == rows[two]), (one, two)
    assert domain.equivalent("[^b]+", "a+") and not RegexDomain(alphabet="abc").equivalent("[^b]+", "a+")
    assert RegexDomain(alphabet="ab").equivalent(".", "[ab]")


def test_equivalence_is_that_of_greenery() -> None:
    greenery = pytest.importorskip("greenery")
    domain = RegexDomain()
    programs = ["(x|y){2}", "[xy][x-y]", "(x|y)(x|y)", "x{1,}", "x+", "a?b{2,4}", "a?bb(b?b)?", "a?bbb?b?"]
    automata = {p: greenery.parse(p).to_fsm() for p in programs}
    assert all(domain.equivalent(a, b) == automata[a].equivalent(automata[b]) for a in programs for b in programs)


def test_what_greenery_reads_otherwise_equals_only_itself() -> None:
    pytest.importorskip("greenery")
    domain = RegexDomain()
    for program in ("^a$", "(?=a)a", "(a)\\1", "a+?", "(a{99}){99}", "\\ba", "(a"):
        assert domain.key(program) == program, program
    assert domain.equivalent("[b-z]", "[c-zb]") and domain.equivalent("\\.", "[.]")


def test_samples_are_read_alike_by_both_libraries_and_drawn_from() -> None:
    greenery = pytest.importorskip("greenery")
    domain = RegexDomain()
    programs = domain.sample(30, 1)
    assert programs == domain.sample(30, 1) != domain.sample(30, 2) and len(domain.alphabet) == 91
    for program in programs:
        assert len(program) <= 30
        automaton, shown = greenery.parse(program).to_fsm(), domain.examples(program, 5, 0)
        assert shown and any(label == "+" for _, label in shown) and len(set(shown)) == len(shown)
        for text, label in shown:
            assert automaton.accepts(text) == (label == "+") == full_match(program, text) and 1 <= len(text) <= 15
    kinds = "".join(domain.sample(300, 3))
    assert all(c in kinds for c in domain.alphabet)
    assert all(piece in kinds for piece in ("[^", "(", "[a-z]", "?", "{2,}", "{1,2}"))


def test_bad_domains() -> None:
    with pytest.raises(ValueError, match=r"RegexDomain.parts: expected an integer >= 1, got 0"):
        RegexDomain(parts=0)
    with pytest.raises(ValueError, match="alphabet: expected two different characters or more, got 'aa'"):
        RegexDomain(alphabet="aa")
    with pytest.raises(ValueError, match=r"expected programs of at most 1 characters.*raise max_length"):
        RegexDomain(atoms=("abc",), max_length=1).sample(1, 0)


def test_without_greenery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "greenery", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'looseleaf-pragmatic-examples\[languages\]'"):
        RegexDomain(alphabet="abz").key("az{7}")


def test_a_domain_of_three_functions() -> None:
    multiples = Domain(sample=lambda n, seed: [str(2 + (seed + k) % 5) for k in range(n)],
                       examples=lambda program, n, seed: [(str(k), "+-"[k % int(program) > 0]) for k in range(1, n)],
                       agrees=lambda program, u: program.isdigit() and (int(u[0]) % int(program) == 0) == (u[1] == "+"))
    assert multiples.equivalent("2", "2") and not multiples.equivalent("2", "3")
    assert all(multiples.agrees("3", u) for u in multiples.examples("3", 9, 0))
