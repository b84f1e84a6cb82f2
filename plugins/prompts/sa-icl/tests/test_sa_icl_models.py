"""SA-ICL on servers that speak the OpenAI protocol, and on local models of several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from looseleaf import Budget, EndpointError, Example
from looseleaf_sa_icl import SAICL, SchemaTemplate, multiple_choice
from looseleaf_sa_icl.chat import as_text
from looseleaf_text import ChatEndpoint, EndpointModel, LocalModel, TextTask
from looseleaf_text.testing import ToyLanguageModel
from looseleaf_text.testing.models import letters_model
from looseleaf_text.testing.servers import chat_server, toy_server, transformers_server

COLOURS = ["red", "green", "blue", "white"]
SHORT = SchemaTemplate((("kind", "of problem"), ("goal", "wanted")), "Describe the problem.")


def colour_task(size: int = 4) -> TextTask:
    train = [multiple_choice(f"Which colour has thing {n}?", COLOURS[n % 4], COLOURS[:n % 4] + COLOURS[n % 4 + 1:])
             for n in range(size)]
    return TextTask("colours", train, labels={n: n for n in "1234"})


def encode(texts: list[str]) -> Any:
    return ToyLanguageModel().embed(texts) + 1


def obeying(body: dict[str, Any], number: int) -> tuple[int, str]:
    """What a server does that constrains its output: the first of an enumeration, any text elsewhere."""
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    return 200, json.dumps({k: v["enum"][0] if "enum" in v else f"text of {k}" for k, v in properties.items()})


def test_server_with_json_schemas() -> None:
    with chat_server(obeying) as (url, requests):
        model, budget = ChatEndpoint(url, "m", api_key="secret", backoff=0), Budget()
        prompt = SAICL(encoder=encode).optimize(colour_task(), model, progress=False)
        assert len(requests) == 4 and prompt.info["incomplete"] == 0 and model.calls == 4 and model.tokens == 28
        requests.clear()
        asked = multiple_choice("Which colour has thing 9?", "white", ["red", "black"])
        predictor = prompt.on(budget.meter(model))
        [answer] = predictor.answers([asked])
    assert len(requests) == 3 == budget.used["calls"] and budget.used["tokens"] == 21
    assert {r["key"] for r in requests} == {"Bearer secret"}
    assert [[m["role"] for m in r["messages"]] for r in requests] == [
        ["system", "user"], ["system", "user"], ["system", "user", "assistant", "user"]]
    assert all(r["temperature"] == 0 and r["top_p"] == 1 and r["max_tokens"] <= 4096 for r in requests)
    schema, _, final = (r["response_format"]["json_schema"]["schema"] for r in requests)
    assert schema["required"] == ["broad_category", "refinement", "specific_scope", "goal"]
    assert final["properties"]["final_answer"]["enum"] == asked.inputs["candidates"]  # the candidates' own texts
    assert answer.prediction == "1" and answer.scores is None and type(predictor).__name__ == "SchemaPredictor"


def test_server_that_refuses_json_schemas_is_asked_without() -> None:
    def refusing(body: dict[str, Any], number: int) -> tuple[int, str]:
        if "response_format" in body:
            return 400, "unknown field response_format"
        return 200, "kind: a\ngoal: b" if len(body["messages"]) == 2 else "I would say 3."

    with chat_server(refusing) as (url, requests):
        model = ChatEndpoint(url, "m", concurrency=1)
        prompt = SAICL(template=SHORT, encoder=encode, max_reattempts=1).optimize(colour_task(), model, progress=False)
        assert len(requests) == 5 and not model.json_schema
        assert prompt.memory.items[0].schema == {"kind": "a", "goal": "b"}
        predictor = prompt.on(model)
        assert predictor.predict([multiple_choice("Which?", "x", ["y", "z"])]) == [None]
    assert predictor.counts["unread"] == 1 and predictor.counts["reattempts"] == 1


def test_server_that_is_busy_fails_and_dies(tmp_path: Path) -> None:
    def busy(body: dict[str, Any], number: int) -> tuple[int, str]:
        return (503, "busy") if number in (1, 3) else obeying(body, number)

    with chat_server(busy) as (url, requests):
        prompt = SAICL(encoder=encode).optimize(colour_task(), ChatEndpoint(url, "m", backoff=0, concurrency=1),
                                                progress=False)
    assert len(requests) == 6 and len(prompt.memory) == 4
    locked = lambda body, number: (401, "no key") if number > 2 else obeying(body, number)  # noqa: E731
    with chat_server(locked) as (url, requests), \
            pytest.raises(EndpointError, match=r"refuses: status 401.*api_key"):
        SAICL(encoder=encode).optimize(colour_task(), ChatEndpoint(url, "m", concurrency=1), state_dir=tmp_path,
                                       progress=False)
    with chat_server(obeying) as (url, requests):  # what came back before is on disk
        SAICL(encoder=encode).optimize(colour_task(), ChatEndpoint(url, "m", concurrency=1), state_dir=tmp_path,
                                       progress=False)
        assert len(requests) == 2
    with pytest.raises(EndpointError, match="Is the server running"):
        prompt.on(ChatEndpoint(url, "m", retries=0)).predict([colour_task().train[0]])


def test_plain_endpoint_scores_what_the_server_lists() -> None:
    task = TextTask("films", [Example({"text": t}, label) for t, label in (("warm", "positive"), ("dull", "negative"))],
                    labels={"positive": " positive", "negative": " negative"})
    with toy_server() as url:
        model = EndpointModel(url, "toy")
        prompt = SAICL(template=SHORT, encoder="model", max_reattempts=0, fallback=True).optimize(task, model,
                                                                                                  progress=False)
        rows = prompt.on(model).scores([Example({"text": "grim"})])  # type: ignore[attr-defined]
        local = prompt.on(ToyLanguageModel()).scores([Example({"text": "grim"})])  # type: ignore[attr-defined]
    assert rows[0] == pytest.approx(local[0])


@pytest.mark.slow
def test_transformers_serve(tmp_path: Path) -> None:
    """A real server: it knows nothing of JSON schemas and writes nonsense, and all of that is counted."""
    model, tokenizer = letters_model()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    method = SAICL(template=SHORT, encoder=encode, max_reattempts=1, max_schema_tokens=8)
    try:
        with transformers_server(model, tokenizer, tmp_path) as url:
            server = ChatEndpoint(url, str(tmp_path), retries=1)
            prompt = method.optimize(colour_task(2), server, progress=False)
            predictor = prompt.on(server)
            answers = predictor.answers(list(colour_task(2).train))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert prompt.info["incomplete"] == 2 == prompt.info["reattempts"]
    assert all(len(a.messages) == 4 and a.shown for a in answers) and server.calls == 4 + 2 * (2 + 2) + 2 + (
        predictor.counts["reattempts"] - 4)


FAMILIES = ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "Gemma2ForCausalLM"]


def small(family: str) -> Any:
    """A small model of a family, with the tokenizer of the letters model."""
    import transformers

    _, tokenizer = letters_model()
    sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                             "max_position_embeddings": 4096}
    if family == "GPT2LMHeadModel":
        sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
                 "n_positions": 4096}
    else:
        sizes["num_key_value_heads"] = 2
        if family == "Gemma2ForCausalLM":
            sizes["head_dim"] = 8
    cls = getattr(transformers, family)
    return cls(cls.config_class(**sizes)).eval(), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_local_families_alone_as_in_batches(family: str) -> None:
    model, tokenizer = small(family)
    task = colour_task(3)
    prompts = [SAICL(template=SHORT, encoder="model", max_reattempts=0, max_schema_tokens=4, batch=batch, fallback=True)
               .optimize(task, LocalModel(model, tokenizer), progress=False) for batch in (1, 3)]
    assert [i.schema for i in prompts[0].memory.items] == [i.schema for i in prompts[1].memory.items]
    asked = list(colour_task(5).train)[3:]
    rows = [p.on(LocalModel(model, tokenizer)).scores(asked) for p in prompts]  # type: ignore[attr-defined]
    assert rows[0][0] == pytest.approx(rows[1][0], abs=1e-4) and rows[0][1] == pytest.approx(rows[1][1], abs=1e-4)


def test_adapters_and_frozen_parts_stay_as_they_are() -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = small("LlamaForCausalLM")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    prompt = SAICL(template=SHORT, encoder="model", max_reattempts=0, max_schema_tokens=4).optimize(
        colour_task(2), LocalModel(adapted, tokenizer), progress=False)
    assert prompt.on(LocalModel(adapted, tokenizer)).predict([colour_task(4).train[3]])[0] in "1234"
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trained and not adapted.training


def test_what_is_too_long_shortens_the_example_never_the_question() -> None:
    import transformers

    _, tokenizer = letters_model()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1150)).eval()
    local = LocalModel(model, tokenizer)
    task = TextTask("long", [multiple_choice("long question " * 20 + str(n), "a", ["b"]) for n in range(4)],
                    labels={"1": "1", "2": "2"})
    prompt = SAICL(template=SHORT, encoder="model", max_reattempts=0, max_schema_tokens=16).optimize(task, local,
                                                                                                    progress=False)
    predictor = prompt.on(local)
    asked = multiple_choice("new question " * 12, "a", ["b"])
    [answer] = predictor.answers([asked])
    assert predictor.counts["shortened"] >= 1 and answer.prediction in ("1", "2")
    assert "new question " * 12 in answer.messages[1]["content"] and "long question" in answer.messages[1]["content"]
    assert local.count_tokens(as_text(local, answer.messages)) <= 1150


def test_chat_templates() -> None:
    """The model's own template; one without system turns; the beginning of text only once; none: plain turns."""
    _, tokenizer = letters_model()
    local = LocalModel(small("LlamaForCausalLM")[0], tokenizer)
    messages = [{"role": "system", "content": "S {x}"}, {"role": "user", "content": "U"}]
    assert as_text(local, messages) == "system: S {x}\nuser: U\nassistant:"
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
                               "{{ raise_exception('no system') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}"
                               "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    assert as_text(local, messages) == "<s><user>S {x}\n\nU<assistant>"  # this tokenizer adds no <s> of its own
    with pytest.raises(Exception, match="no system"):
        as_text(local, [messages[1], messages[0]])
