"""LaTeX as tokens."""

import pytest

from looseleaf_mask_and_match import LatexVocabulary, latex_tokens, normalise
from looseleaf_mask_and_match.latex import token_errors

SAME = [("x^2", "x ^{2}", "{x}^{{2}}", "x^ 2"), (r"\frac12", r"\frac{1}{2}", r"\frac {1} {{2}}"),
        (r"a\times b", r"a \times{} b", r"{a\times b}"), (r"\sqrt[3]x", r"\sqrt[3]{x}"), ("x_{i^2}", r"x_{i^{2}}")]


@pytest.mark.parametrize("texts", SAME)
def test_what_looks_the_same_is_the_same(texts) -> None:
    assert len({normalise(text) for text in texts}) == 1
    assert normalise(normalise(texts[0])) == normalise(texts[0])


def test_tokens() -> None:
    assert latex_tokens(r"\frac{x^2}{\sqrt{12}}") == [
        "\\frac", "{", "x", "^", "{", "2", "}", "}", "{", "\\sqrt", "{", "1", "2", "}", "}"]
    assert latex_tokens(r"\alpha+\left(n\right)") == ["\\alpha", "+", "\\left", "(", "n", "\\right", ")"]


def test_vocabulary() -> None:
    words = LatexVocabulary.of([r"x^2+1", r"\frac12"])
    assert words.tokens[:3] == ["<pad>", "<s>", "</s>"]
    numbers = words.encode(r"\frac{x}{2}")
    assert numbers[-1] == 2 and words.decode([*numbers, 0, 0]) == normalise(r"\frac x2")
    with pytest.raises(ValueError, match="label: expected tokens of this vocabulary, got y in"):
        words.encode("x+y")


@pytest.mark.parametrize("bad, message", [
    ("", "expected a formula, got ''"), ("  {} ", "expected a formula"), (r"\foo{x}", r"expected known .*, got \\foo"),
    (r"\frac{1", "expected LaTeX, got"), ("x^", r"expected something behind '\^'"),
    (r"\begin{array}{c}1\end{array}", "expected a formula without environments")])
def test_bad_labels(bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latex_tokens(bad)


def test_token_errors() -> None:
    assert [token_errors(a, b) for a, b in (("abc", "abc"), ("abc", "axc"), ("", "ab"), ("abcd", "bc"))] == [0, 1, 2, 2]
