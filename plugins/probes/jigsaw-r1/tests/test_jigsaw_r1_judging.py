"""A judge of reasoning and answer: verdicts by right and wrong answers, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from looseleaf_jigsaw_r1 import Jigsaw, consistency, example_pictures, puzzles
from looseleaf_text import ChatModel


class Endpoint(ChatModel):
    """Says yes where the reasoning names the answer, no where it does not, and something else of hats."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def detokenize(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def chat(self, conversations: Any, max_tokens: int, *_: Any, **__: Any) -> list[str]:
        out = []
        for (message,) in conversations:
            self.asked.append(message["content"])
            _, reasoning, answer, _ = message["content"].split("\n\n")
            agrees = "Yes." if reasoning.endswith(answer[-1]) else "No, it is not."
            out.append("Perhaps." if "hat" in reasoning else agrees)
        return out

    def score(self, prefixes: Any, continuations: Any) -> list[list[float]]:
        raise NotImplementedError


def test_verdicts_by_right_and_wrong_answers() -> None:
    asked = list(puzzles(example_pictures(5), Jigsaw(thinking=True), 5))
    wrong = {"A": "B", "B": "A"}
    said = [f"<think> it is {p.solution}</think> <answer>{p.solution}</answer>" for p in asked[:2]]
    said.append(f"<think> it is {asked[2].solution}</think><answer>{wrong[asked[2].solution]}</answer>")
    said.append("<think> a hat</think> <answer>A</answer>")
    said.append(f"It is {asked[4].solution}")
    judge = Endpoint()
    found = consistency(asked, said, judge)
    assert (found.right, found.wrong, found.left_out) == ([True, True], [False], 2)
    assert found.value.value == pytest.approx(2 / 3) and len(judge.asked) == 4
    same = consistency(asked, said, lambda question, reasoning, answer: reasoning.endswith(answer))
    assert same.right == [True, True] and same.wrong[0] is False and same.left_out == 1
    assert consistency(asked[4:], said[4:], judge).left_out == 1
    with pytest.raises(ValueError, match="got none among 1"):
        _ = consistency(asked[4:], said[4:], judge).value


def test_bad_input() -> None:
    asked = list(puzzles(example_pictures(2), Jigsaw(), 2))
    with pytest.raises(ValueError, match="2 puzzles, 2 outputs and 2 without thinking"):
        consistency(asked, ["A", "B"], Endpoint())
    with pytest.raises(TypeError, match="judge: expected a function or a ChatModel, got str"):
        consistency(asked, ["A", "B"], "gpt")  # type: ignore[arg-type]
