"""Conversations with pictures: local models of several families, and servers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import Budget, BudgetExhausted
from looseleaf_text import ChatEndpoint, ChatModel, LocalChat
from looseleaf_text.conversations import for_processor, for_server, picture
from looseleaf_text.testing.models import letters_model, picture_tokenizer, toy_llava, toy_qwen
from looseleaf_text.testing.servers import chat_server

PIL = pytest.importorskip("PIL.Image")
RED = PIL.new("RGB", (16, 16), "red")
NOISE = PIL.fromarray(np.random.default_rng(0).integers(0, 255, (40, 24, 3), dtype=np.uint8))


def says(text: str, *pictures: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*({"type": "image", "image": p} for p in pictures),
                                         {"type": "text", "text": text}]}]


def toy_text() -> tuple[Any, Any]:
    model, tokenizer = letters_model()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    return model, tokenizer


FAMILIES = {"llava": toy_llava, "qwen2-vl": toy_qwen, "text": toy_text}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Any, Any, bool]:
    return (*FAMILIES[request.param](), request.param != "text")


def asked(pictures: bool) -> list[list[dict[str, Any]]]:
    if not pictures:
        return [says("a"), says("what is it, at length?"), says("and"), says("more")]
    return [says("a", RED), says("what is it, at length?", NOISE), says("no picture"), says("two", RED, NOISE)]


def test_a_batch_of_mixed_lengths_answers_as_each_alone(family: tuple[Any, Any, bool]) -> None:
    model, processor, pictures = family
    conversations = asked(pictures)
    alone = LocalChat(model, processor, batch=1).chat(conversations, 12)
    together = LocalChat(model, processor, batch=4)
    assert together.chat(conversations, 12) == alone
    assert len(set(alone)) > 2 and together.batch == 4
    assert together.calls == 4 and together.tokens > 4 * 5


def test_the_picture_counts(family: tuple[Any, Any, bool]) -> None:
    model, processor, pictures = family
    if not pictures:
        pytest.skip("reads texts only")
    chat = LocalChat(model, processor)
    red, noise = chat.score([says("is", RED), says("is", NOISE)], [["a", "b"]] * 2)
    assert max(abs(x - y) for x, y in zip(red, noise, strict=True)) > 1e-3


def test_scores_are_those_of_the_whole_text(family: tuple[Any, Any, bool]) -> None:
    model, processor, pictures = family
    chat = LocalChat(model, processor)
    conversation = asked(pictures)[1]
    [row] = chat.score([conversation], [["x", "xy", "zebra"]])
    inputs = chat._inputs([conversation])
    for text, got in zip(["x", "xy", "zebra"], row, strict=True):
        ids, total = dict(inputs), 0.0
        for token in chat.tokenize(text):  # by the chain rule, one token after the other
            with torch.no_grad():
                total += float(torch.log_softmax(model(**ids).logits[0, -1].float(), -1)[token])
            more = torch.tensor([[token]])
            ids = {name: torch.cat([value, more if name == "input_ids" else torch.full_like(
                more, int(name == "attention_mask"))], 1) if value.shape == ids["input_ids"].shape and name not in
                ("pixel_values", "image_grid_thw") else value for name, value in
                   {**ids, "input_ids": ids["input_ids"]}.items() if name != "input_ids"} | {
                       "input_ids": torch.cat([ids["input_ids"], more], 1)}
        assert got == pytest.approx(total, abs=2e-4)


def test_a_family_that_padding_disturbs_is_read_one_by_one() -> None:
    model, processor = toy_llava()
    chat = LocalChat(model, processor)
    usual = type(model).forward

    class Disturbed(type(model)):  # type: ignore[misc]
        @functools.wraps(usual)
        def forward(self, **inputs: Any) -> Any:
            return usual(self, **{**inputs, "attention_mask": None})  # takes padding for text

    model.__class__ = Disturbed
    conversations = asked(True)
    alone = LocalChat(model, processor, batch=1).chat(conversations, 6)
    assert chat.chat(conversations, 6) == alone and chat.batch == 1


def test_seeds_and_generators() -> None:
    model, processor = toy_llava()
    chat = LocalChat(model, processor)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    drawn = [chat.chat([says("a", RED)] * 2, 12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert processor.tokenizer.padding_side == "right" and not model.training


def test_stop_and_going_on_with_the_assistants_words() -> None:
    model, processor = toy_text()
    chat = LocalChat(model, processor)
    [whole] = chat.generate(["hello"], 20)
    assert whole and chat.generate(["hello"], 20, stop=[whole[3]]) == [whole.split(whole[3])[0].strip()]
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes "}]
    assert chat._inputs([begun])["input_ids"][0].tolist()[-4:] == chat.tokenize("yes ")
    assert chat.generate([begun], 3) != chat.generate(["hello"], 3)


def test_a_budget_counts_conversations() -> None:
    chat = LocalChat(*toy_llava())
    budget = Budget(calls=3)
    metered = budget.meter(chat)
    assert isinstance(metered, ChatModel)
    metered.chat([says("a", RED)] * 2, 2)
    assert budget.used["calls"] == 2 and budget.used["tokens"] == chat.tokens
    with pytest.raises(BudgetExhausted):
        metered.chat([says("a", RED)] * 2, 2)


def test_peft_and_bfloat16() -> None:
    peft = pytest.importorskip("peft")
    model, processor = toy_llava()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    expected = LocalChat(wrapped.get_base_model(), processor).chat([says("a", RED)], 6)
    assert LocalChat(wrapped, processor).chat([says("a", RED)], 6) == expected
    LocalChat(model.to(torch.bfloat16), processor).chat(asked(True), 4)


@pytest.mark.parametrize("given", [
    {"role": "user"}, {"role": "robot", "content": "a"}, {"role": "user", "content": [{"type": "sound"}]}, "text"])
def test_what_is_no_conversation_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected messages"):
        for_processor([given], True)
    with pytest.raises(ValueError, match="expected messages"):
        for_server([given])


def test_bad_input(tmp_path: Any) -> None:
    model, processor = toy_llava()
    chat = LocalChat(model, processor)
    with pytest.raises(ValueError, match="expected a picture"):
        chat.chat([says("a", str(tmp_path / "none.png"))], 2)
    with pytest.raises(ValueError, match="max_tokens >= 1"):
        chat.chat([says("a", RED)], 0)
    with pytest.raises(ValueError, match="none of them empty"):
        chat.score([says("a", RED)], [[""]])
    with pytest.raises(ValueError, match="chat template"):
        LocalChat(model, picture_tokenizer())
    with pytest.raises(ValueError, match="got a picture"):
        LocalChat(*toy_text()).chat([says("a", RED)], 2)
    with pytest.raises(ValueError, match=r"model\.eval"):
        LocalChat(model.train(), processor).chat([says("a", RED)], 2)


def test_pictures_in_every_form(tmp_path: Any) -> None:
    RED.save(tmp_path / "red.png")
    address = for_server(says("a", RED))[0]["content"][0]["image_url"]["url"]
    for given in (RED, np.asarray(RED), tmp_path / "red.png", str(tmp_path / "red.png"), address):
        assert np.array_equal(np.asarray(picture(given)), np.asarray(RED))
    assert picture(PIL.new("RGBA", (4, 4))).mode == picture(PIL.new("L", (4, 4))).mode == "RGB"


def test_a_server_gets_pictures_within_the_request() -> None:
    with chat_server(lambda body, number: (200, "a cat. Yes"), tokens=9) as (url, got), \
            ChatEndpoint(url, "m", tokenizer=picture_tokenizer()) as model:
        assert model.chat([says("what?", NOISE, "http://host/p.png")], 5, stop=["."]) == ["a cat"]
        assert model.generate(["plain"], 5) == ["a cat. Yes"]
        assert model.calls == 2 and model.tokens == 18
    first, second, text = got[0]["messages"][0]["content"]
    assert np.array_equal(np.asarray(picture(first["image_url"]["url"])), np.asarray(NOISE))
    assert second["image_url"]["url"] == "http://host/p.png" and text == {"type": "text", "text": "what?"}
    assert got[0]["stop"] == ["."] and got[1]["messages"] == [{"role": "user", "content": "plain"}]
