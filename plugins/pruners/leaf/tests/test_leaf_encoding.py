"""Where instruction and response lie, for any template; tokenizers that differ; responses in parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from looseleaf.testing.models import tiny_tokenizer
from looseleaf_leaf import encode, response_level
from looseleaf_leaf.batch import checked
from looseleaf_leaf.sensitivity import align

pytest.importorskip("transformers")
PLAIN = "{instruction} -> {response}"
CHAT = ("{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}")


def words_tokenizer(vocabulary: str) -> Any:
    """Words with the white space before them, as byte-pair encodings have it; unknown words are <unk>."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *dict.fromkeys(p + w for w in vocabulary.split() for p in ("", " "))]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?[^\s]+"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def text_of(tokenizer: Any, batch: dict[str, Any], row: int, key: str) -> str:
    mask = batch[key][row] != -100 if key == "labels" else batch[key][row].bool()
    if key == "instruction_mask" and "white_space" in batch:
        mask = mask & ~batch["white_space"][row]
    return "".join(tokenizer.convert_ids_to_tokens(batch["input_ids"][row][mask].tolist()))


def chatty(template: str = CHAT) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [None, PLAIN, "<s>Q: {instruction}\nA: {response}</s>"])
def test_the_spans_are_those_of_the_texts(template: str | None) -> None:
    tokenizer = chatty()
    batch = encode(tokenizer, [("What is 2 + 2?", "It is 4"), ("assistant: -> ?", "yes")], template=template)
    full = checked(batch)
    for row, (asked, answer) in enumerate([("What is 2 + 2?", "It is 4"), ("assistant: -> ?", "yes")]):
        assert text_of(tokenizer, batch, row, "instruction_mask") == asked.replace(" ", "")
        end = "</s>" if template != PLAIN else ""
        assert text_of(tokenizer, batch, row, "labels") == answer + end
    assert bool((full["attention_mask"] | (batch["labels"] == -100)).all())


def test_longer_templates_shift_the_span() -> None:
    for extra in ("", "a", "You are a helpful machine. "):
        tokenizer = chatty(extra + CHAT)
        batch = encode(tokenizer, [("count to 3", "1 2 3")])
        assert text_of(tokenizer, batch, 0, "instruction_mask") == "countto3"


def test_white_space_is_of_the_instruction_and_marked() -> None:
    tokenizer = chatty()
    batch = encode(tokenizer, [("a b\n c", "d")])
    texts = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    inside = batch["instruction_mask"][0].tolist()
    assert [t for t, m in zip(texts, inside) if m] == ["a", " ", "b", " ", " ", "c"]
    assert [t for t, m, w in zip(texts, inside, batch["white_space"][0].tolist()) if m and not w] == ["a", "b", "c"]


def test_a_template_that_trims() -> None:
    tokenizer = chatty()
    batch = encode(tokenizer, [("  What?  ", " 4 ")])
    assert text_of(tokenizer, batch, 0, "instruction_mask") == "What?"
    assert text_of(tokenizer, batch, 0, "labels") == "4</s>"
    assert batch["offsets"][0][batch["instruction_mask"][0]].tolist() == [[n, n + 1] for n in range(2, 7)], \
        "offsets are those of the text as it was given"


def test_tokens_with_a_space_before_them() -> None:
    tokenizer = words_tokenizer("ask: which colour blue answer: red")
    batch = encode(tokenizer, [("which colour", "blue")], template="ask: {instruction} answer: {response}")
    assert text_of(tokenizer, batch, 0, "instruction_mask") == " which colour"
    assert text_of(tokenizer, batch, 0, "labels") == " blue"
    assert batch["offsets"][0][batch["instruction_mask"][0]].tolist() == [[0, 5], [6, 12]]


def test_braces_in_the_texts_are_text() -> None:
    tokenizer = tiny_tokenizer()
    batch = encode(tokenizer, [("a{response}b{0}", "c")], template=PLAIN)
    assert text_of(tokenizer, batch, 0, "instruction_mask") == "a{response}b{0}"


def test_the_same_tokens_need_no_second_encoding() -> None:
    assert "teacher" not in encode(chatty(), [("a", "b")], teacher_tokenizer=chatty())


def test_another_tokenizer_is_aligned_by_characters() -> None:
    letters, words = tiny_tokenizer(), words_tokenizer("red blue -> 4")
    batch = encode(words, [("red blue", "4")], template=PLAIN, teacher_tokenizer=letters)
    own = batch["teacher"]
    norms = torch.zeros(own["input_ids"].shape)
    inside = own["instruction_mask"][0].nonzero().flatten()
    norms[0, inside] = torch.tensor([1.0, 5.0, 2.0, 7.0, 4.0, 3.0, 9.0, 0.5])  # r e d, a space, b l u e
    onto = align(norms, own["offsets"], batch["offsets"], batch["instruction_mask"])
    assert onto[0][batch["instruction_mask"][0]].tolist() == [5.0, 9.0] and float(onto.sum()) == 14.0
    with pytest.raises(ValueError, match="cannot be aligned"):
        align(onto, batch["offsets"], own["offsets"], own["instruction_mask"])
    back = align(onto, batch["offsets"], own["offsets"], own["instruction_mask"], own["white_space"])
    assert back[0, inside].tolist() == [5.0] * 3 + [0.0] + [9.0] * 4


def test_what_cannot_be_aligned_is_an_error() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    onto = torch.tensor([[[0, 3], [4, 8]]])
    with pytest.raises(ValueError, match=r"token 1 of row 0 \(characters \[4, 8\]"):
        align(torch.ones(1, 1), torch.tensor([[[0, 3]]]), onto, mask)
    with pytest.raises(ValueError, match="2 rows"):
        align(torch.ones(2, 1), torch.zeros(2, 1, 2, dtype=torch.int64), onto, mask)


# ------------------------------------------------------------------------------------------- response level
def test_every_part_becomes_a_row() -> None:
    tokenizer = chatty()
    batch = encode(tokenizer, [("go", ["ab", "c", "d e"]), ("on", "f")])
    rows = response_level(batch)
    assert len(rows["input_ids"]) == 4
    assert [text_of(tokenizer, rows, r, "labels") for r in range(4)] == ["ab", "c", "d e</s>", "f</s>"]
    assert [text_of(tokenizer, rows, r, "instruction_mask") for r in range(4)] == ["go", "goab", "goabc", "on"]
    full = checked(rows)
    for row, last in enumerate(["b", "c", "</s>", "</s>"]):
        assert tokenizer.convert_ids_to_tokens([int(rows["input_ids"][row][full["attention_mask"][row]][-1])]) == [last]
    covered = (rows["labels"][:3] != -100).sum(0)
    assert torch.equal(covered > 0, batch["labels"][0] != -100) and int(covered.max()) == 1, "each label once"


def test_response_level_needs_parts_and_one_tokenizer() -> None:
    with pytest.raises(ValueError, match="lists of parts"):
        response_level(encode(chatty(), [("a", "b")]))
    made = encode(words_tokenizer("a -> b c"), [("a", ["b", " c"])], template=PLAIN, teacher_tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="one tokenizer"):
        response_level(made)


# ------------------------------------------------------------------------------------------- bad inputs
@pytest.mark.parametrize("samples, fields, word", [
    ([], {}, "at least one"), ([("", "b")], {}, "not empty"), ([("a", " ")], {}, "not empty"),
    ([("a", "b")], {"template": "{instruction}"}, "once"),
    ([("a", "b")], {"template": "{response}{instruction}"}, "before the response"),
    ([("a", "b")], {"template": "{instruction}{instruction}{response}"}, "once"),
    ([("a", ["b", ""])], {"template": PLAIN}, "part"),
    ([("a", [" b", "c "])], {}, "trim")])
def test_bad_samples(samples: Any, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        encode(chatty(), samples, **fields)


def test_tokenizers_that_cannot_do_it() -> None:
    with pytest.raises(ValueError, match="fast"):
        encode(SimpleNamespace(is_fast=False), [("a", "b")], template=PLAIN)
    with pytest.raises(ValueError, match="no chat template"):
        encode(tiny_tokenizer(), [("a", "b")])


@pytest.mark.parametrize("template, word", [
    ("{% for m in messages %}{{ m['content'] | replace('a', '') }};{% endfor %}", "changes the texts"),
    ("{% for m in messages %}{{ m['content'] | upper }};{% endfor %}", "does not show"),
    ("{{ messages[0]['content'] }}", "does not show")])
def test_chat_templates_that_change_the_texts(template: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        encode(chatty(template), [("bad", "b")])


def test_a_span_without_a_token_of_its_own() -> None:
    tokenizer = words_tokenizer("askawhich b")
    with pytest.raises(ValueError, match="lies within its instruction"):
        encode(tokenizer, [("a", "b")], template="ask{instruction}which {response}")


def good() -> dict[str, Any]:
    return encode(tiny_tokenizer(), [("abc", "d")], template=PLAIN)


@pytest.mark.parametrize("change, word", [
    ({"labels": None}, "labels"), ({"input_ids": torch.zeros(3)}, "input_ids"),
    ({"label": torch.zeros(1, 8)}, "labels"),
    ({"labels": torch.full((1, 8), -100)}, "no response"), ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
    ({"instruction_mask": torch.ones(1, 8, dtype=torch.bool)}, "before the response"),
    ({"offsets": torch.zeros(1, 8)}, "offsets")])
def test_bad_batches(change: dict[str, Any], word: str) -> None:
    assert good()["input_ids"].shape == (1, 8)
    with pytest.raises(ValueError, match=word):
        checked({**good(), **change})


def test_batches_that_are_none() -> None:
    for batch in (None, [1, 2], torch.ones(2)):
        with pytest.raises(ValueError, match="mapping"):
            checked(batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no 'labels'"):
        checked({"input_ids": torch.ones(1, 2, dtype=torch.int64)})


def test_without_a_mask_all_before_the_response_may_go() -> None:
    made = good()
    del made["instruction_mask"], made["attention_mask"]
    assert checked(made)["instruction_mask"].tolist() == [[True] * 7 + [False]]
