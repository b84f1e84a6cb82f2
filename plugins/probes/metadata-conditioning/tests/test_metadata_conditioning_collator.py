"""Prefixes, labels and draws of the collator, alone and inside transformers' Trainer."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_metadata_conditioning import (
    LevelledPCFG,
    MetadataCollator,
    add_metadata_tokens,
    grammar_collator,
    grammar_rows,
    token_name,
    vocabulary_size,
)

GRAMMAR = LevelledPCFG.random(3, seed=0)
ROWS = grammar_rows(GRAMMAR, GRAMMAR.sample(200, seed=1))
END = GRAMMAR.terminals
TEXTS = [{"text": "the cat sat", "genre": "news"}, {"text": "a dog", "genre": "poem"}]


def test_prefixes_of_tokens() -> None:
    mask, first = END + 2, END + 3
    for depth in range(4):
        with_, without = (grammar_collator(GRAMMAR, depth, share)(ROWS) for share in (1.0, 0.0))
        assert with_["input_ids"].shape == without["input_ids"].shape
        assert torch.equal(with_["input_ids"][:, 3:], without["input_ids"][:, 3:])
        assert torch.equal(with_["labels"], without["labels"])
        assert (without["input_ids"][:, :3] == mask).all()
        for own, row in zip(with_["input_ids"], ROWS, strict=True):
            shown = [first + 2 * d + row[f"level {d}"] for d in range(depth)]
            assert own[:3].tolist() == shown + [mask] * (3 - depth)
        for batch in (with_, without):
            for ids, labels, seen, row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], ROWS,
                                              strict=True):
                length = 3 + len(row["input_ids"])
                assert (labels[:3] == -100).all() and (labels[length:] == -100).all()
                assert labels[3:length].tolist() == ids[3:length].tolist() == row["input_ids"]
                assert seen.tolist() == [1] * length + [0] * (len(seen) - length)
    depth0 = grammar_collator(GRAMMAR, 0, 1.0)(ROWS)
    assert (depth0["input_ids"][:, :3] == mask).all()  # nothing is shown, whatever the share
    assert int(with_["input_ids"].max()) < vocabulary_size(GRAMMAR)


def test_the_same_documents_are_drawn_at_every_depth() -> None:
    mask = END + 2
    batches = {depth: grammar_collator(GRAMMAR, depth, 0.5, seed=3) for depth in (1, 3)}
    for part in (ROWS[:100], ROWS[100:]):
        shown = [batches[depth](part)["input_ids"][:, 0] != mask for depth in batches]
        assert torch.equal(*shown) and 30 < int(shown[0].sum()) < 70
    other = grammar_collator(GRAMMAR, 1, 0.5, seed=4)(ROWS[:100])["input_ids"][:, 0] != mask
    again = grammar_collator(GRAMMAR, 1, 0.5, seed=3)(ROWS[:100])["input_ids"][:, 0] != mask
    assert not torch.equal(other, again)
    collator = grammar_collator(GRAMMAR, 1, 0.5, seed=3)
    collator(ROWS[:3])
    copy = pickle.loads(pickle.dumps(collator))  # as workers of a data loader do
    assert torch.equal(copy(ROWS[:100])["input_ids"][:, 0] != mask, again)


def test_prefixes_of_text() -> None:
    tokenizer = tiny_tokenizer()
    collator = MetadataCollator("genre", template="{genre}: ", tokenizer=tokenizer, share=1.0)
    batch = collator(TEXTS)
    for n, row in enumerate(TEXTS):
        whole = tokenizer(f"{row['genre']}: {row['text']}")["input_ids"]
        assert batch["input_ids"][n, :len(whole)].tolist() == whole
        assert batch["labels"][n, :6].tolist() == [-100] * 6
        assert batch["labels"][n, 6:len(whole)].tolist() == whole[6:]
        assert (batch["input_ids"][n, len(whole):] == tokenizer.pad_token_id).all()
    plain = dataclasses.replace(collator, share=0.0)(TEXTS)
    assert plain["input_ids"][0].tolist() == tokenizer(TEXTS[0]["text"])["input_ids"]
    for length, expected in ((8, "~~news: "), (3, "new")):
        fixed = MetadataCollator("genre", template="{genre}: ", tokenizer=tokenizer, length=length, mask_token="~")
        assert tokenizer.decode(fixed.prefix(TEXTS[0])) == expected
        assert len(fixed.prefix(None)) == length == len(fixed.prefix(TEXTS[1]))
    short = dataclasses.replace(collator, max_length=9)(TEXTS)
    assert short["input_ids"].shape == (2, 9)


def test_the_beginning_of_a_sequence_stays_in_front() -> None:
    tokenizer = tiny_tokenizer()
    collator = MetadataCollator("genre", template="{genre}: ", tokenizer=tokenizer)
    row = {"input_ids": [tokenizer.bos_token_id, 50, 51], "genre": "news"}
    ids, start = collator.sequence(row, True)
    assert ids == [tokenizer.bos_token_id, *tokenizer("news: ")["input_ids"], 50, 51] and start == 7
    assert collator.sequence(row, False) == (row["input_ids"], 1)


def test_tokens_of_a_tokenizer() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_text_llama()
    assert add_metadata_tokens(tokenizer, TEXTS, ["genre"], model=model) == 3
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    collator = MetadataCollator(["genre"], mask_token="<metadata>", tokenizer=tokenizer, share=1.0)
    first = collator(TEXTS)["input_ids"][:, 0].tolist()
    assert first == tokenizer.convert_tokens_to_ids([token_name("genre", "news"), token_name("genre", "poem")])
    with pytest.raises(ValueError, match="call add_metadata_tokens"):
        collator([{"text": "a", "genre": "letter"}])


def test_in_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    collator = MetadataCollator("genre", template="{genre}: ", tokenizer=tokenizer, share=0.5)
    options: dict[str, Any] = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2,
                               "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    before = model.lm_head.weight.clone()
    trainer = Trainer(model, TrainingArguments(**options, remove_unused_columns=False), train_dataset=TEXTS * 4,
                      data_collator=collator)
    assert trainer.train().global_step == 2
    assert not torch.equal(before, model.lm_head.weight)
    wrong = Trainer(model, TrainingArguments(**options), train_dataset=TEXTS * 4, data_collator=collator)
    with pytest.raises(ValueError, match="input_ids, or text"):
        wrong.train()


TOKENS = {"genre": {"news": 5, "poem": 6}}


@pytest.mark.parametrize(("options", "message"), [
    ({"fields": ()}, "the name of one field"),
    ({"share": 1.5}, r"share: expected a number in \[0, 1\], got 1.5"),
    ({"depth": 2}, r"depth: expected an integer in \[0, 1\]"),
    ({"mask_token": None}, "mask_token: expected a token"),
    ({"mask_token": 5}, "none of them the mask token 5"),
    ({"tokens": {"genre": {"news": 5, "poem": 5}}}, "a token of its own"),
    ({"tokens": {"style": {}}}, "got none for genre"),
    ({"tokens": None}, "got neither"),
    ({"length": 3}, "length: expected None without a template"),
    ({"template": "{genre}"}, "tokenizer: expected one"),
    ({"template": "{style}", "tokens": None, "tokenizer": tiny_tokenizer()}, r"one or more of \{genre\}"),
    ({"template": "{genre}", "tokenizer": tiny_tokenizer()}, "depth=None and tokens=None"),
    ({"template": "{genre}", "tokens": None, "tokenizer": tiny_tokenizer(), "length": 3, "mask_token": None},
     "together with a mask_token"),
    ({"max_length": 1}, "max_length: expected None or an integer >= 2"),
])
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetadataCollator(**{"fields": ("genre",), "mask_token": 4, "tokens": TOKENS, **options})


@pytest.mark.parametrize(("row", "message"), [
    ({"input_ids": [1, 4], "genre": "news"}, "mask_token: expected a token that is part of no document, got 4"),
    ({"input_ids": [], "genre": "news"}, "one token or more"),
    ({"input_ids": [1], "genre": "letter"}, "expected one of 'news', 'poem', got 'letter'"),
    ({"input_ids": [1]}, "remove_unused_columns=False"),
    ({"text": "a", "genre": "news"}, "input_ids, or text and a collator with a tokenizer"),
])
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    collator = MetadataCollator(("genre",), 1, 1.0, mask_token=4, tokens=TOKENS)
    with pytest.raises(ValueError, match=message):
        collator([row])
    with pytest.raises(ValueError, match="one row or more"):
        collator([])
    with pytest.raises(ValueError, match="max_length: expected more than"):
        MetadataCollator("genre", template="{genre}: ", tokenizer=tiny_tokenizer(), max_length=4, share=1.0)(TEXTS)
