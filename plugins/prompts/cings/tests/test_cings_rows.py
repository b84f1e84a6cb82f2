"""Rows: which tokens the loss is on, and that nothing but the loss is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf.testing.models import seeded, tiny_gemma3, tiny_llama, tiny_tokenizer
from looseleaf_cings import Collator, Rows, cings_features, packed, response_loss
from looseleaf_text import LocalModel

torch.set_num_threads(1)
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
EXAMPLE = {"instruction": "Capital of X?", "context": "It is Rome.", "response": "Rome"}
OTHER = {"instruction": "What now?", "context": "", "response": "Nothing much."}


def chat_tokenizer(template: str | None = CHAT) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def model() -> Any:
    return tiny_llama(vocabulary=128).double()


def loss(model: Any, rows: list[dict[str, Any]], **collator: Any) -> torch.Tensor:
    """Summed over the labelled tokens."""
    batch = Collator(**collator)(rows)
    labels = batch.pop("labels")
    return response_loss(model(**batch, use_cache=False), labels, 1)


def text(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids))


def test_labelled_are_the_response_and_the_end_of_the_turn() -> None:
    tokenizer = chat_tokenizer()
    row = cings_features(EXAMPLE, tokenizer)
    assert text(row["input_ids"], tokenizer) == "<user>Capital of X?<assistant>It is Rome. Rome</s>"  # \n is no letter
    labelled = [n for n in row["labels"] if n != -100]
    assert labelled == [*tokenizer("Rome")["input_ids"], tokenizer.eos_token_id] and len(labelled) == len("Rome") + 1
    assert row["labels"][-len(labelled):] == row["input_ids"][-len(labelled):] == labelled
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    assert row["input_ids"][:-len(labelled)] == LocalModel(model(), tokenizer).tokenize(
        Rows(tokenizer).text("Capital of X?", "It is Rome.")), "the prefix is read as a server would read its text"


@pytest.mark.parametrize(("arm", "labelled"), [
    ("context", "Rome</s>"), ("no_mask", "It is Rome.;Rome</s>"), ("no_context", "Rome</s>")])
def test_arms(arm: Any, labelled: str) -> None:
    tokenizer = chat_tokenizer()
    row = cings_features(EXAMPLE, tokenizer, arm=arm, separator=";")
    assert text([n for n in row["labels"] if n != -100], tokenizer) == labelled
    assert ("It is Rome" in text(row["input_ids"], tokenizer)) == (arm != "no_context")


def test_context_in_the_turn_of_the_user() -> None:
    tokenizer = chat_tokenizer()
    row = cings_features(EXAMPLE, tokenizer, placement="user", separator=" ")
    assert text(row["input_ids"], tokenizer) == "<user>It is Rome. Capital of X?<assistant>Rome</s>"


def test_loss_without_mask_is_that_of_the_context_and_that_of_cings() -> None:
    tokenizer, network = chat_tokenizer(), model()
    whole, ours = (cings_features(EXAMPLE, tokenizer, arm=arm, separator=";") for arm in ("no_mask", "context"))
    only = {**whole, "labels": [a if b == -100 else -100 for a, b in zip(whole["labels"], ours["labels"], strict=True)]}
    assert whole["input_ids"] == ours["input_ids"]
    parts = loss(network, [only]) + loss(network, [ours])
    assert loss(network, [whole]).item() == pytest.approx(parts.item(), rel=1e-12)


def test_gradient_is_exactly_zero_where_the_context_is_predicted_but_not_at_its_embeddings() -> None:
    tokenizer, network = chat_tokenizer(), model()
    row = cings_features(EXAMPLE, tokenizer, separator=";")
    begin = row["input_ids"].index(tokenizer("I")["input_ids"][0])
    end = begin + len("It is Rome.;")
    embedded = network.get_input_embeddings()(torch.tensor([row["input_ids"]])).detach().requires_grad_()
    out = network(inputs_embeds=embedded, use_cache=False)
    out.logits.retain_grad()
    response_loss(out, torch.tensor([row["labels"]])).backward()
    assert (out.logits.grad[0, :end - 1] == 0).all(), "the logits at n - 1 predict token n"
    assert (out.logits.grad[0, end - 1] != 0).any(), "the last token of the context predicts the first of the response"
    assert (embedded.grad[0, begin:end] != 0).any(-1).all()


def test_empty_context_is_no_context() -> None:
    tokenizer = chat_tokenizer()
    assert cings_features({**EXAMPLE, "context": ""}, tokenizer) == cings_features(EXAMPLE, tokenizer, arm="no_context")
    assert cings_features({**EXAMPLE, "context": ""}, tokenizer, arm="no_mask") == cings_features(
        EXAMPLE, tokenizer, arm="no_context")


@pytest.mark.parametrize("make", [model, lambda: tiny_gemma3().double()])
def test_batches_paddings_and_packed_rows_have_the_loss_of_single_rows(make: Any) -> None:
    tokenizer = chat_tokenizer()
    network = make()
    rows = Rows(tokenizer).all([EXAMPLE, OTHER, {**EXAMPLE, "response": "R"}])
    rows = [{k: [n % 64 if k == "input_ids" or n != -100 else n for n in v] for k, v in row.items()} for row in rows]
    alone = sum(loss(network, [row]).item() for row in rows)
    assert loss(network, rows).item() == pytest.approx(alone, rel=1e-9)
    batch = Collator(side="left")(rows)
    labels = batch.pop("labels")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        left = response_loss(network(**batch, position_ids=positions, use_cache=False), labels, 1)
    assert float(left) == pytest.approx(alone, rel=1e-9)
    for length in (200, 100):  # all in one row; two rows, one of them padded
        joined = packed(rows, length)
        assert len(joined) == (1 if length == 200 else 2)
        assert loss(network, joined).item() == pytest.approx(alone, rel=1e-9)
        assert loss(network, joined, side="left").item() == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("keep", ["head", "tail"])
def test_context_is_cut_and_never_the_response(keep: Any) -> None:
    tokenizer = chat_tokenizer()
    example = {**EXAMPLE, "context": "0123456789"}
    row = cings_features(example, tokenizer, max_length=40, context_keep=keep, separator=";")
    written = text(row["input_ids"], tokenizer)
    assert len(row["input_ids"]) == 40 and written.endswith(";Rome</s>")
    assert ("012" in written) == (keep == "head") and ("789" in written) == (keep == "tail")


def test_messages_and_templates() -> None:
    tokenizer = chat_tokenizer()
    chat = [{"role": role, "content": said} for role, said in (("user", "A?"), ("assistant", "B."), ("user", "C?"))]
    assert Rows(tokenizer).text(chat, "D.") == "<user>A?<assistant>B.</s><user>C?<assistant>D.\n"
    assert chat[-1]["content"] == "C?"
    bare = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '!' if m.role == 'assistant' }}{% endfor %}"
    rows = Rows(chat_tokenizer(None), chat_template=bare)  # opens no turn by itself, and ends it with plain text
    assert rows.text("A?", "D.") == "[user]A?[assistant]D.\n" and rows.end == tokenizer.eos_token_id
    with_begin = chat_tokenizer("{{ bos_token }}" + CHAT)
    with_begin._tokenizer.post_processor = begin_processor(with_begin)
    ids = cings_features(EXAMPLE, with_begin)["input_ids"]
    assert ids.count(with_begin.bos_token_id) == 1 and ids[0] == with_begin.bos_token_id


def begin_processor(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)])


@pytest.mark.parametrize(("change", "options", "message"), [
    ({"response": ""}, {}, "row 1: response: expected a text"),
    ({"response": None}, {}, "row 1: response"),
    ({"context": None}, {}, "row 1: context: expected a text in arm 'context'"),
    ({"context": None}, {"arm": "no_mask"}, "row 1: context"),
    ({"instruction": ""}, {}, "row 1: instruction"),
    ({"response": "R" * 80}, {"max_length": 64}, "row 1: expected instruction, response and some of the context"),
    ({"response": "R" * 80}, {"max_length": 64, "arm": "no_context"}, "row 1: expected instruction, response"),
])
def test_bad_rows_are_named(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(chat_tokenizer(), **options).all([EXAMPLE, {**EXAMPLE, **change}])


@pytest.mark.parametrize(("options", "message"), [
    ({"arm": "masked"}, "arm: expected 'context', 'no_mask' or 'no_context'"), ({"max_length": 3}, "max_length"),
    ({"arm": "no_mask", "placement": "user"}, "no_mask"), ({"placement": "system"}, "placement")])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(chat_tokenizer(), **options)


def test_tokenizer_without_chat_template_and_batch_without_labels() -> None:
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        Rows(chat_tokenizer(None))
    row = cings_features(EXAMPLE, chat_tokenizer())
    with pytest.raises(ValueError, match="labels are -100"):
        Collator()([{**row, "labels": [-100] * len(row["labels"])}])
    with pytest.raises(ValueError, match="at most length=8"):
        packed([row], 8)


def test_a_token_never_straddles_context_and_response() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    seeded(lambda: made.train_from_iterator(["Rome.\nRome"] * 50, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tokenizer.chat_template = CHAT
    assert len(tokenizer("Rome.\nRome")["input_ids"]) == 1, "this tokenizer merges what it can"
    row = cings_features({**EXAMPLE, "context": "Rome."}, tokenizer)
    assert tokenizer.decode([n for n in row["labels"] if n != -100]) == "Rome</s>"
    assert tokenizer.decode(row["input_ids"]) == "<user>Capital of X?<assistant>Rome.\nRome</s>"
