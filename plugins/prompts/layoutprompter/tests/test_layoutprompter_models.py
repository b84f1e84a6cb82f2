"""LayoutPrompter on models: made up, local, behind servers; answers that are kept; bad input."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from looseleaf import Budget, BudgetExhausted, EndpointError, Example, Prompt, Task, UnsupportedModelError
from looseleaf_layoutprompter import (
    Canvas,
    Layout,
    LayoutPrompter,
    LayoutSerializer,
    layout_example,
    layout_schema,
    layout_task,
)
from looseleaf_layoutprompter.optimizer import EchoModel, LayoutPrompt, LayoutTask, likeness_to_target, toy_layout_task
from looseleaf_text import EndpointModel, JSONEndpoint, LocalModel
from looseleaf_text.testing import ToyLanguageModel
from looseleaf_text.testing.models import letters_model
from looseleaf_text.testing.servers import json_server, transformers_server

TASK = toy_layout_task()
SMALL = LayoutPrompter(k=2, samples=3, trials=2, output="seq")
QUERY = Example({"labels": ["figure", "text", "title"]})


class Scripted(ToyLanguageModel):
    """Gives the same answers in turn, and keeps the prompts."""

    name = "scripted"

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.answers, self.prompts = answers, []

    def generate(self, prompts: list[str], max_tokens: int, stop: list[str] | None = None, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        super().generate(prompts, max_tokens, stop)
        assert stop == ["\n\n"] and temperature == 0.7
        self.prompts += prompts
        return [self.answers[(self.requests - 1) % len(self.answers)] for _ in prompts]


# ------------------------------------------------------------------------------------------------------ prediction
def test_the_best_of_the_valid_answers_is_chosen() -> None:
    target = TASK.dev[0].target
    good = LayoutSerializer(output="seq").layout(target)
    model = Scripted(["title 0 1 2 3", "text 0 0 0 120 160 | title 1 3 7 100 90 | figure 2 1 1 99 99", good])
    generated, = SMALL.prompt(TASK).on(model).predict([QUERY])
    assert generated.order == [2, 1] and generated.layout == generated.layouts[2]
    assert [bool(problem) for problem in generated.problems] == [True, False, False]
    assert generated.quality[0] < generated.quality[1] and generated.texts[2] == good
    assert model.calls == 3 and len(set(model.prompts)) == 1
    assert generated.svg().count("<svg x=") == 2


def test_no_valid_answer_is_a_result_too() -> None:
    generated, = SMALL.prompt(TASK).on(Scripted(["I cannot draw.", "", "|"])).predict([QUERY])
    assert generated.layout is None and generated.order == [] and all(generated.problems)
    assert likeness_to_target(generated, TASK.test[0]) == 0
    with pytest.raises(ValueError, match="expected a valid answer to draw, got none"):
        generated.svg()


def test_a_prompt_has_preamble_exemplars_and_query() -> None:
    prompt = dataclasses.replace(SMALL.prompt(TASK), k=5)
    text, = prompt.on(EchoModel()).render([QUERY])
    parts = text.split("\n\n")
    assert len(parts) == 1 + 5 + 1 and parts[0] == prompt.serializer.preamble()
    assert parts[-1] == "Element Type Constraint: figure 0 | text 1 | title 2\n"
    shown = {prompt.serializer.exemplar(e) for e in TASK.train}
    assert all(part in shown for part in parts[1:-1])
    assert text.count("px") == 2 and prompt.on(EchoModel()).render([QUERY]) == [text]


def test_results_depend_on_the_seed_alone_not_on_what_else_is_asked() -> None:
    prompt = SMALL.prompt(TASK, seed=1)
    queries = [layout_example(e.target, "gents", seed=n) for n, e in enumerate(TASK.test)]
    prompt = dataclasses.replace(LayoutPrompter("gents", k=2, samples=3, output="seq").prompt(
        layout_task("sizes", [e.target for e in TASK.train], task="gents")), seed=1)
    together = prompt.on(EchoModel()).predict(queries)
    alone = [prompt.on(EchoModel()).predict([q])[0] for q in reversed(queries)][::-1]
    assert together == alone
    assert dataclasses.replace(prompt, seed=2).on(EchoModel()).predict(queries) != together
    # the target of a query is never read
    other = [Example(q.inputs, None) for q in queries]
    assert [g.texts for g in prompt.on(EchoModel()).predict(other)] == [g.texts for g in together]


def test_answers_are_kept_for_each_example(tmp_path: Path) -> None:
    prompt = SMALL.prompt(TASK)
    queries = [Example({"labels": labels}) for labels in (["text"], ["title"], ["figure", "text"])]
    whole = prompt.on(EchoModel()).predict(queries)

    def fail(request: int) -> None:
        if request == 3:  # the third answer to each of the three
            raise EndpointError("gone")

    with pytest.raises(EndpointError):
        prompt.on(_failing(fail), state_dir=tmp_path).predict(queries)
    model = EchoModel()
    assert prompt.on(model, state_dir=tmp_path).predict(queries) == whole
    assert model.calls == 3
    again = EchoModel()
    assert prompt.on(again, state_dir=tmp_path).predict([*reversed(queries)]) == whole[::-1] and again.calls == 0
    more = dataclasses.replace(prompt, samples=4)
    assert more.on(again, state_dir=tmp_path).predict(queries)[0].texts[:3] == whole[0].texts


def _failing(on_request: Any) -> EchoModel:
    model = EchoModel()
    model.on_request = on_request
    return model


def test_samples_are_metered() -> None:
    budget = Budget(calls=7)
    predictor = SMALL.prompt(TASK).on(budget.meter(EchoModel()))
    assert len(predictor.predict([QUERY, QUERY])) == 2 and budget.used["calls"] == 6
    with pytest.raises(BudgetExhausted):
        predictor.predict([QUERY])


@pytest.mark.parametrize("task", ["gent", "gents", "genr", "completion", "refinement", "content", "text"])
@pytest.mark.parametrize("output", ["html", "seq", "json"])
def test_every_task_and_output(task: str, output: str, tmp_path: Path) -> None:
    rng = random.Random(0)

    def example(n: int) -> Example:
        more = {"content": {"saliency": [(0.1, 0.1, rng.uniform(0.1, 0.9), 0.3)]},
                "text": {"text": f"page {n} of a book"}}.get(task, {})
        return layout_example(TASK.train[n % 8].target, task, seed=n, **more)

    own = LayoutTask("own", [example(n) for n in range(8)], [example(9)], [Example(example(10).inputs)])
    method = LayoutPrompter(task, k=3, samples=2, output=output, trials=2, width=64, height=64, domain="card")
    prompt = method.optimize(own, EchoModel())
    assert prompt.info["fitness"] > 0.3 and prompt.info["valid"] == 1 and prompt.info["evaluations"] == 2
    prompt.save(tmp_path / "prompt.json")
    generated, = Prompt.load(tmp_path / "prompt.json").on(EchoModel()).predict(own.test)
    assert generated.layout is not None and generated == prompt.on(EchoModel()).predict(own.test)[0]


def test_texts_are_compared_by_their_own_embeddings_or_the_models() -> None:
    texts = ("a red page", "a blue page", "many words in two columns")
    pool = [layout_example(TASK.train[n].target, "text", text=text) for n, text in enumerate(texts)]
    query = Example({"text": "two columns with words"})
    model = EchoModel()
    predictor = LayoutPrompter("text", k=1).prompt(LayoutTask("texts", pool)).on(model)
    assert predictor.exemplars(query)[0].inputs["text"] == texts[2] and model.calls == 4
    own = [Example({**e.inputs, "embedding": [n == 0, n == 1, n == 2]}, e.target) for n, e in enumerate(pool)]
    predictor = LayoutPrompter("text", k=1).prompt(LayoutTask("texts", own)).on(EchoModel())
    assert predictor.exemplars(Example({"text": "x", "embedding": [0, 1, 0]}))[0].inputs["text"] == texts[1]
    assert predictor.model.calls == 0
    assert predictor.prompt.max_tokens == 1200


# ----------------------------------------------------------------------------------------------------- local models
def test_on_a_local_model_bare_metered_and_with_an_adapter() -> None:
    pytest.importorskip("transformers")
    network, tokenizer = letters_model()
    prompt = LayoutPrompter(k=1, samples=2, output="seq", max_tokens=4).prompt(TASK)
    queries = [QUERY, Example({"labels": ["text"]})]
    first = prompt.on(LocalModel(network, tokenizer)).predict(queries)
    assert len({*first[0].texts}) == 2  # one batch, but each sample is drawn by itself
    assert prompt.on(LocalModel(network, tokenizer)).predict(queries[::-1])[::-1] == first
    metered = Budget().meter(LocalModel(network, tokenizer))
    assert prompt.on(metered).predict(queries) == first and metered.calls == 4
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(network, peft.LoraConfig(target_modules=["q_proj"])).eval()  # starts as the model
    assert prompt.on(LocalModel(adapted, tokenizer)).predict(queries) == first


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Qwen2", "Mamba"])
def test_on_other_families(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    _, tokenizer = letters_model()
    small = {"GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2}, "Mamba": {"hidden_size": 16, "num_hidden_layers": 1}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
             "intermediate_size": 16}
    config = getattr(transformers, f"{family}Config")(vocab_size=100, bos_token_id=1, eos_token_id=2,
                                                      **small.get(family, sizes))
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(transformers, name)(config).eval()
    prompt = LayoutPrompter(k=1, samples=2, output="seq", max_tokens=3).prompt(TASK)
    generated, = prompt.on(LocalModel(network, tokenizer)).predict([QUERY])
    assert generated.layout is None and len(generated.texts) == 2


def test_a_local_chat_model_is_asked_by_its_chat_template() -> None:
    pytest.importorskip("transformers")
    network, tokenizer = letters_model()
    method = LayoutPrompter(k=1, samples=1, output="seq", max_tokens=2, chat=True)
    with pytest.raises(ValueError, match="has no chat template"):
        method.prompt(TASK).on(LocalModel(network, tokenizer))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    tokenizer.chat_template += "{{ '\n[assistant]\n' }}"
    text, = method.prompt(TASK).on(LocalModel(network, tokenizer)).render([QUERY])
    assert text.startswith("[user] Please generate") and text.endswith("title 2\n\n[assistant]\n")
    with pytest.raises(ValueError, match="chat: expected a LocalModel"):
        method.prompt(TASK).on(EchoModel())


# ---------------------------------------------------------------------------------------------------------- servers
@dataclasses.dataclass
class Server:
    """An OpenAI-compatible server that answers with exemplars of the prompt, and by a schema where it has one."""

    schemas: bool
    url: str = ""
    bodies: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def handle(self, path: str, body: dict[str, Any], headers: Any) -> tuple[int, Any]:
        self.bodies.append(body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        text = EchoModel().generate([prompt], 9, None, 0.7, body["seed"])[0]
        if schema is not None:
            kinds = schema["properties"]["elements"]["items"]["properties"]["type"]["enum"]
            text = json.dumps({"elements": [{"type": kind, "left": 1, "top": 2, "width": 3, "height": 4}
                                            for kind in kinds]})
        if schema is not None and not self.schemas:
            return 400, {"error": {"message": "response_format is not supported"}}
        return 200, {"choices": [{"text": text, "message": {"content": text}}]}


@pytest.fixture(params=[True, False], ids=["schemas", "no schemas"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    served = Server(request.param)
    with json_server(served.handle) as served.url:
        yield served


def test_on_a_server_as_in_this_process(server: Server) -> None:
    prompt = SMALL.prompt(TASK)
    queries = [Example({"labels": labels}) for labels in (["text"], ["title"], ["figure", "text"])]
    remote = EndpointModel(server.url, "echo")
    assert prompt.on(remote).predict(queries) == prompt.on(EchoModel()).predict(queries)
    assert remote.calls == 9 and sorted(body["seed"] for body in server.bodies) == sorted([0, 1, 2] * 3)
    found = SMALL.optimize(TASK, EndpointModel(server.url, "echo", api="chat"))
    assert found.info["scores"] == SMALL.optimize(TASK, EchoModel()).info["scores"]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_json_by_a_schema_where_the_server_has_it(server: Server, api: Any) -> None:
    labels = ("figure", "text", "title")
    model = JSONEndpoint(server.url, "echo", schema=layout_schema(Canvas(), labels), api=api, concurrency=1)
    prompt = dataclasses.replace(SMALL, output="json").prompt(TASK)
    budget = Budget()
    generated, = prompt.on(budget.meter(model)).predict([QUERY])
    assert generated.problems == ["", "", ""] and model.calls == budget.used["calls"] == 3
    if server.schemas:
        assert generated.layout.pixels(Canvas()).tolist() == [[1, 2, 3, 4]] * 3
        assert all("response_format" in body for body in server.bodies)
    else:
        assert model.schema is None and generated.layout in [e.target for e in TASK.train] + generated.layouts
        assert ["response_format" in body for body in server.bodies] == [True, False, False, False]


@pytest.mark.slow
def test_on_transformers_serve(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    network, tokenizer = letters_model()
    prompt = LayoutPrompter(k=1, samples=2, output="seq", max_tokens=4).prompt(TASK)
    try:
        with transformers_server(network, tokenizer, tmp_path) as url:
            generated, = prompt.on(EndpointModel(url, str(tmp_path), concurrency=2)).predict([QUERY])
            greedy = dataclasses.replace(prompt, temperature=0.0)
            answer, = greedy.on(EndpointModel(url, str(tmp_path))).predict([QUERY])
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert len(generated.texts) == 2 and all(generated.texts)
    local, = greedy.on(LocalModel(network, tokenizer)).predict([QUERY])
    assert answer.texts == local.texts


# --------------------------------------------------------------------------------------------------------- bad input
def test_bad_tasks_and_options() -> None:
    for options, message in (({"k": 0}, "k: expected an integer >= 1"),
                             ({"weights": (1, 2)}, "weights: expected three"),
                             ({"task": "gen"}, "task: expected 'gent'"), ({"output": "xml"}, "output: expected 'html'"),
                             ({"weights": (0, 0, -1)}, "weights: expected")):
        with pytest.raises(ValueError, match=message):
            LayoutPrompter(**options)
    bad = {"expected training examples, got none": [],
           "train.0.: expected a Layout as the target, got str": [Example({"labels": ["a"]}, "a")],
           "expected the input labels of the task": [Example({"text": "a"}, TASK.train[0].target)],
           "expected the target's elements to be those of": [Example({"labels": ["text"]}, TASK.train[0].target)]}
    for message, train in bad.items():
        with pytest.raises(ValueError, match=message):
            SMALL.optimize(Task("bad", train, metric=likeness_to_target), EchoModel())
    with pytest.raises(ValueError, match="max_chars: expected room for one exemplar"):
        LayoutPrompter(max_chars=300).optimize(TASK, EchoModel())
    with pytest.raises(UnsupportedModelError):
        SMALL.optimize(TASK, object())
    with pytest.raises(ValueError, match="start: expected a LayoutPrompt, got str"):
        SMALL.optimize(TASK, EchoModel(), start="text")
    prompt = SMALL.prompt(TASK)
    with pytest.raises(ValueError, match="example 0: expected the input labels"):
        prompt.on(EchoModel()).predict([Example({"text": "x"})])
    with pytest.raises(ValueError, match="expected labels among figure, text, title, got 'map'"):
        prompt.on(EchoModel()).predict([Example({"labels": ["map"]})])


def test_a_wording_of_ones_own() -> None:
    own = dataclasses.replace(SMALL.prompt(TASK).serializer, description="pages of a newspaper")
    start = LayoutPrompt(own, [])
    found = SMALL.optimize(TASK, EchoModel(), start=start)
    assert found.serializer == own and found.pool == list(TASK.train)
    assert "Task Description: pages of a newspaper\n" in found.on(EchoModel()).render([QUERY])[0]


def test_pages_of_the_lab_in_miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = pytest.importorskip("looseleaf_lab", reason="looseleaf-lab is not installed")
    from looseleaf_layoutprompter import reproduction

    pages = lab.data.stand_in("pages", 60)
    monkeypatch.setattr(lab.data, "rows", lambda name: [{**p, "journal": f"j{n}"} for n, p in enumerate(pages)])
    monkeypatch.setattr(reproduction, "_model", EchoModel)
    report = dataclasses.replace(reproduction.study, quick=reproduction.Scale(queries=3, k=2, samples=2))(
        quick=True, progress=False)
    assert len(report.claims) == 8 and Layout is not None
    json.loads(report.to_json())
