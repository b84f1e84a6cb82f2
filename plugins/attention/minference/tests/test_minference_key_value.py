"""The text to calibrate on: as long as asked for, and with an answer in it."""

from __future__ import annotations

from typing import Any

import pytest

from looseleaf_minference import key_value_ids


class Letters:
    """A tokenizer of one token a character, with a start token that only it adds."""

    bos_token_id: int | None = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        start = [1] if add_special_tokens else []
        return {"input_ids": start + [ord(c) for c in text]}


@pytest.mark.parametrize("length", [256, 1100, 4096])
def test_the_question_has_its_answer_about_a_quarter_in(length: int) -> None:
    ids = key_value_ids(Letters(), length)
    assert ids.shape == (1, length) and int(ids[0, 0]) == 1 and not bool((ids[0, 1:] == 1).any())
    text = "".join(map(chr, ids[0, 1:].tolist()))
    key = text.rsplit('The value of the key "', 1)[1].split('"')[0]
    pairs = [line for line in text.splitlines() if line.startswith(f'"{key}": "')]
    assert len(pairs) == 1 and len(pairs[0]) == 22
    place = text.index(pairs[0])
    assert length // 4 - 30 <= place <= length // 4
    assert text.endswith('" is "')
    assert text.startswith("The keys and their values:\n")


def test_seeds_and_tokenizers_without_a_start() -> None:
    plain = Letters()
    plain.bos_token_id = None
    assert int(key_value_ids(plain, 300)[0, 0]) == ord("T")
    assert key_value_ids(plain, 300, seed=1).equal(key_value_ids(plain, 300, seed=1))
    assert not key_value_ids(plain, 300, seed=1).equal(key_value_ids(plain, 300))


def test_too_short() -> None:
    with pytest.raises(ValueError, match="length: expected an integer >= 256, got 100"):
        key_value_ids(Letters(), 100)
