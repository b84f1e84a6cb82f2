"""Stepping stones: by hand, by a function, by a language model."""

import pytest

from looseleaf_outlandish import SAMPLES, STEPPING_STONES, descriptions, stepping_stones
from looseleaf_outlandish.data import KEYWORDS
from looseleaf_text import LanguageModel

TEXT = "The shed was painted vermilion."


class Writer(LanguageModel):
    """Answers in turn; the keyword is likelier after some words."""

    def __init__(self, answers: list[str], likely: str = "red") -> None:
        self.answers, self.likely, self.asked = answers, likely, list[str]()

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        return [[-1.0 if self.likely in prefix else -9.0 for _ in row]
                for prefix, row in zip(prefixes, continuations, strict=True)]

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        self.asked += prompts
        return [self.answers[(len(self.asked) - 1) % len(self.answers)]]

    def tokenize(self, text: str) -> list[int]:
        return list(map(ord, text))

    def detokenize(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_by_hand_for_all_keywords() -> None:
    assert list(STEPPING_STONES) == [k for group in KEYWORDS.values() for k in group]
    for sample in SAMPLES:
        new = stepping_stones(sample.text, sample.keyword)
        assert new.replace(STEPPING_STONES[sample.keyword], "") == sample.text
        assert new.count(sample.keyword) == 1, "the description must not give the word away"


def test_by_a_function() -> None:
    assert stepping_stones(TEXT, "vermilion", lambda text, word: text.replace(word, f"bright {word}")) == \
        "The shed was painted bright vermilion."
    with pytest.raises(ValueError, match="lost the keyword 'vermilion'"):
        stepping_stones(TEXT, "vermilion", lambda text, word: "The shed was painted red.")


def test_by_a_model_the_best_of_several_is_taken() -> None:
    writer = Writer([" a bright colour.", " the vermilion of old", " an orange red", ""])
    assert stepping_stones(TEXT, "vermilion", writer) == "The shed was painted an orange red, vermilion."
    assert len(writer.asked) == 4 and writer.asked[0].endswith("Word: vermilion\nPhrase:")
    assert descriptions(Writer([" a bright colour.", " the vermilion of old", " an orange red", ""]), "vermilion") == [
        "a bright colour", "an orange red"]


def test_where_nothing_helps_the_text_stays_and_says_so() -> None:
    for writer in (Writer([" a bright colour"]), Writer([""])):
        with pytest.warns(UserWarning, match="no rewriting .* makes 'vermilion' likelier"):
            assert stepping_stones(TEXT, "vermilion", writer) == TEXT


def test_a_judge_decides_over_a_function_too() -> None:
    assert "red" in stepping_stones(TEXT, "vermilion", lambda t, w: t.replace(w, f"red {w}"), judge=Writer([]))
    with pytest.warns(UserWarning, match="no rewriting"):
        assert stepping_stones(TEXT, "vermilion", lambda t, w: t.replace(w, f"blue {w}"), judge=Writer([])) == TEXT


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"no hand-written stepping stone for 'haggs'.*Did you mean 'haggis'"):
        stepping_stones("a plate of haggs", "haggs")
    with pytest.raises(ValueError, match="expected a text with the keyword 'haggis'"):
        stepping_stones("a plate of soup", "haggis")
    with pytest.raises(ValueError, match=r"by: expected None, .*, got 3"):
        stepping_stones(TEXT, "vermilion", 3)  # type: ignore[arg-type]
