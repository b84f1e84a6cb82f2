"""What SA-ICL says to a model, in which order; the memory; what is counted; bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looseleaf import Budget, Example, Prompt
from looseleaf_sa_icl import (
    SAICL,
    TEMPLATES,
    SchemaMemory,
    SchemaPrompt,
    SchemaTemplate,
    SolvedProblem,
    multiple_choice,
)
from looseleaf_sa_icl.problem import choice, options
from looseleaf_text import LanguageModel, TextTask

CAPITALS = {"Peru": "Lima", "Chad": "N'Djamena", "Laos": "Vientiane", "Mali": "Bamako", "Oman": "Muscat"}
SHORT = SchemaTemplate((("kind", "of problem"), ("goal", "wanted")), "Describe.")
LABELS = {"1": "1", "2": "2", "3": "3"}


class Json:
    """A tokenizer whose chat template is the conversation itself, so that a model can read it back."""

    chat_template = "json"
    bos_token = None

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return json.dumps(messages)


class Scripted(LanguageModel):
    """Records conversations; writes a schema that names the question, and prefers the second choice."""

    name = "scripted"

    def __init__(self, write: Any = None) -> None:
        self.tokenizer = Json()
        self.calls = self.tokens = 0
        self.said: list[tuple[str, list[dict[str, str]], Any]] = []
        self._write = write or self.schema

    @staticmethod
    def schema(messages: list[dict[str, str]], temperature: float, seed: int) -> str:
        text = messages[-1]["content"]
        about = [*re.findall(r"capital of (\w+)", text), "nothing"][0]
        kind = "refined" if "Refine" in text else "plain"
        return json.dumps({"broad_category": f"{kind} {about}", "refinement": "r", "specific_scope": "{braces}",
                           "goal": "g", "extra": 1})

    def generate(self, prompts: list[str], max_tokens: int, stop: Any = None, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        self.calls += len(prompts)
        out = []
        for prompt in prompts:
            messages, end = json.JSONDecoder().raw_decode(prompt)
            assert prompt[end:] in ("", *(t.begin for t in (*TEMPLATES.values(), SHORT)))
            self.said.append(("generate", messages, (max_tokens, temperature, seed)))
            out.append(self._write(messages, temperature, seed))
        return out

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        self.calls += len(prefixes)
        self.said += [("score", json.loads(p), c) for p, c in zip(prefixes, continuations, strict=True)]
        return [[-1.0 if n == 1 else -2.0 - n for n in range(len(row))] for row in continuations]

    def tokenize(self, text: str) -> list[int]:
        return list(map(ord, text))

    def detokenize(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def vectors(texts: list[str]) -> np.ndarray:
    """A direction for each text, with positive cosines."""
    return np.stack([np.random.default_rng(zlib.crc32(t.encode())).random(8) for t in texts])


def question(country: str, **inputs: Any) -> Example:
    others = [c for k, c in CAPITALS.items() if k != country][:2]
    return multiple_choice(f"What is the capital of {country}?", CAPITALS[country], others, **inputs)


def task(**changes: Any) -> TextTask:
    plain = TextTask("capitals", [question(c) for c in list(CAPITALS)[:3]], labels=LABELS)
    return dataclasses.replace(plain, **changes)


def made(model: LanguageModel | None = None, **parameters: Any) -> SchemaPrompt:
    return SAICL(encoder=vectors, **parameters).optimize(task(), model or Scripted(), progress=False)


def test_memory_is_written_with_the_answer_in_view() -> None:
    model = Scripted()
    prompt = made(model)
    assert len(model.said) == 3 == model.calls
    for item, (kind, messages, (longest, temperature, _)) in zip(prompt.memory.items, model.said, strict=True):
        assert kind == "generate" and [m["role"] for m in messages] == ["system", "user"]
        assert messages[0]["content"] == TEMPLATES["schema"].system()
        assert messages[1]["content"] == f"{item.question}\nThe answer is: {item.answer}"
        assert re.search(r"^Question: .*\nCandidates:\n1\. .*\n2\. .*\n3\. .*$", item.question)
        assert (longest, temperature) == (4096, 0.0)
    assert prompt.info["fitness"] == 1.0 and prompt.info["incomplete"] == 0 and prompt.info["evaluations"] == 3


def test_messages_of_a_query() -> None:
    prompt, model = made(), Scripted()
    asked = question("Mali")
    [answer] = prompt.on(model).answers([asked])
    shown = prompt.memory.items[answer.shown[0]]
    template = TEMPLATES["schema"]
    preliminary = template.text({"broad_category": "plain Mali", "refinement": "r", "specific_scope": "{braces}",
                                 "goal": "g", "extra": "1"})
    refined = preliminary.replace("plain", "refined")
    assert preliminary.startswith("Schema:\n##### broad_category:\nplain Mali\n")
    assert preliminary.endswith("#### Extra:\n1")
    (one, first, _), (two, second, _), (three, third, replies) = model.said
    assert (one, two, three) == ("generate", "generate", "score") and model.calls == 3

    assert [m["role"] for m in first] == ["system", "user"] and first[0]["content"] == template.system()
    assert first[1]["content"].startswith("Question: What is the capital of Mali?\nCandidates:\n1. ")

    assert [m["role"] for m in second] == ["system", "user"] and second[0]["content"] == template.system()
    example = f"{shown.question}\nThe answer is: {shown.answer}\n\n{template.text(shown.schema)}"
    parts = [first[1]["content"], preliminary, "Refine the preliminary schema", example]
    places = [second[1]["content"].index(p) for p in parts]
    assert places == sorted(places) and second[1]["content"].endswith(example)

    assert [m["role"] for m in third] == ["system", "user", "assistant", "user"]
    assert third[0]["content"].startswith("You are given a solved example with its schema, and then a new question")
    parts = [example, first[1]["content"], preliminary, "Refine the preliminary schema"]
    places = [third[1]["content"].index(p) for p in parts]
    assert places == sorted(places)
    assert third[2]["content"] == refined and third[3]["content"].startswith("Choose the best answer")
    assert replies == [" 1", " 2", " 3"]
    assert answer.prediction == "2" and answer.scores == [-2.0, -1.0, -4.0] and answer.messages == third

    answer_line = re.compile("The answer is: (.*)")
    for _, messages, _ in model.said:  # the answer line of the example alone
        text = "\n".join(m["content"] for m in messages)
        assert set(answer_line.findall(text)) <= {shown.answer}


def test_answer_of_the_query_never_occurs() -> None:
    """Where the answer is free text, it is in no message at all."""
    generation = task(labels=None, metric="exact_match", train=[
        Example({"text": f"What is the capital of {k}?"}, v) for k, v in list(CAPITALS.items())[:3]])
    model = Scripted()
    prompt = SAICL(encoder=vectors).optimize(generation, model, progress=False)
    model.said.clear()
    asked = Example({"text": "What is the capital of Oman?"}, "Muscat")
    prompt.on(model).predict([asked])
    assert len(model.said) == 3 and "Muscat" not in json.dumps([m for _, m, _ in model.said])


@pytest.mark.parametrize(("parameters", "calls"), [({}, 3), ({"activate": False}, 2), ({"use_schema": False}, 1),
                                                   ({"top_k": 3}, 3), ({"self_consistency": 5}, 11)])
def test_calls_per_query(parameters: dict[str, Any], calls: int) -> None:
    prompt, model, budget = made(**parameters), Scripted(), Budget()
    prompt.on(budget.meter(model)).predict([question("Mali"), question("Oman")])
    assert model.calls == 2 * calls == budget.used["calls"] == len(model.said)


def test_schema_only_and_one_shot() -> None:
    for parameters, has_schema in (({"activate": False}, True), ({"use_schema": False}, False)):
        prompt, model = made(**parameters), Scripted()
        prompt.on(model).predict([question("Mali")])
        _, messages, _ = model.said[-1]
        assert [m["role"] for m in messages] == ["system", "user"]
        assert ("Schema:" in messages[1]["content"]) == has_schema
        assert "The answer is" in messages[1]["content"]
    prompt, model = made(include_answer=False), Scripted()
    prompt.on(model).predict([question("Mali")])
    assert all("The answer is" not in m["content"] for _, messages, _ in model.said for m in messages)


def test_texts_are_scored_per_token() -> None:
    prompt, model = made(score="text"), Scripted()
    [answer] = prompt.on(model).answers([question("Mali")])
    _, messages, replies = model.said[-1]
    candidates = question("Mali").inputs["candidates"]
    assert replies == [f" {c}" for c in candidates] and messages[-1]["content"].endswith("Give its text alone.")
    assert answer.scores == pytest.approx([v / len(c) for v, c in zip((-2.0, -1.0, -4.0), candidates, strict=True)])


def test_several_examples_and_explanations() -> None:
    solved = task(train=[question(c, explanation=f"because {c}") for c in list(CAPITALS)[:3]])
    prompt, model = SAICL(encoder=vectors, top_k=2).optimize(solved, Scripted(), progress=False), Scripted()
    [answer] = prompt.on(model).answers([question("Mali")])
    text = model.said[-1][1][1]["content"]
    assert len(answer.shown) == 2 and text.count("\n\n---\n\n") == 1 and text.count("Explanation: because") == 2


def test_search_is_brute_force_cosine() -> None:
    rng = np.random.default_rng(0)
    pool, queries = rng.normal(size=(40, 6)) * rng.random((40, 1)) * 5, rng.normal(size=(9, 6))
    memory = SchemaMemory()
    items = [SolvedProblem("the same question", "a", identity=str(n)) for n in range(40)]
    memory.add(items[:25], pool[:25])
    memory.add(items[25:], pool[25:])
    for low, high, k in ((-1, 1, 40), (0, 1, 3), (0.2, 0.6, 2)):
        for n, found in enumerate(memory.search(queries, k, low, high)):
            cosines = {m: float(pool[m] @ queries[n] / np.linalg.norm(pool[m]) / np.linalg.norm(queries[n]))
                       for m in range(40)}
            expected = sorted((m for m, c in cosines.items() if low <= c <= high), key=lambda m: -cosines[m])[:k]
            assert [m for m, _ in found] == expected
            assert [c for _, c in found] == pytest.approx([cosines[m] for m in expected], abs=1e-6)
    # by identity: all questions read the same
    assert [found[0][0] for found in memory.search(pool[:2], exclude=["0", None])] != [0, 1]
    assert memory.search(pool[1:2], exclude=["0"])[0] == [(1, pytest.approx(1.0))]


def test_the_query_is_excluded_by_what_it_is_not_by_its_text() -> None:
    twins = task(train=[question("Peru", id="a"), question("Peru", id="b"), question("Chad")])
    prompt = SAICL(encoder=vectors).optimize(twins, Scripted(), progress=False)
    for asked, expected in ((question("Peru", id="a"), 1), (question("Peru", id="b"), 0),
                            (Example(question("Peru", id="a").inputs), 1), (question("Peru"), 0)):
        [answer] = prompt.on(Scripted()).answers([asked])
        assert answer.shown == (expected,) and answer.similarities == (1.0,)


def test_saved_and_loaded_resolves_the_same(tmp_path: Path) -> None:
    prompt = made(template=SHORT, model=Scripted(lambda m, t, s: f"kind: {len(m[1]['content'])}\ngoal: find"))
    prompt.save(tmp_path / "prompt.json")
    loaded = Prompt.load(tmp_path / "prompt.json")
    assert isinstance(loaded, SchemaPrompt) and loaded.fingerprint() == prompt.fingerprint()
    with pytest.raises(ValueError, match=r"expected the function .*vectors that embedded the memory"):
        loaded.on(Scripted())
    asked = [question("Mali"), question("Oman")]
    models = Scripted(), Scripted()
    answers = [p.on(m, encoder=vectors).answers(asked) for p, m in zip((prompt, loaded), models, strict=True)]
    assert answers[0] == answers[1] and models[0].said == models[1].said
    prompt.memory.save(tmp_path / "memory.safetensors")
    memory = SchemaMemory.load(tmp_path / "memory.safetensors")
    assert memory.items == prompt.memory.items and memory.vectors.equal(prompt.memory.vectors)


def test_killed_while_building_repeats_no_call(tmp_path: Path) -> None:
    asked: list[str] = []

    def dying(messages: Any, temperature: float, seed: int) -> str:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(messages[1]["content"])
        return Scripted.schema(messages, temperature, seed)

    method = SAICL(encoder=vectors, batch=1)
    with pytest.raises(KeyboardInterrupt):
        method.optimize(task(), Scripted(dying), state_dir=tmp_path, progress=False)
    again = Scripted()
    prompt = method.optimize(task(), again, state_dir=tmp_path, progress=False)
    assert len(again.said) == 1 and again.said[0][1][1]["content"] not in asked
    assert prompt.fingerprint() == made(batch=1).fingerprint()


def test_predictions_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    prompt, asked = made(batch=1), [question("Mali"), question("Oman")]
    model = Scripted()
    prompt.on(model, cache=tmp_path).predict(asked[:1])
    assert len(model.said) == 3
    answers = prompt.on(model, cache=tmp_path).answers(asked)
    assert len(model.said) == 6 and answers == prompt.on(Scripted()).answers(asked)
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.raises(ValueError, match="remove the file"):
        prompt.on(model, cache=tmp_path).answers(asked)


def test_malformed_schemas_are_retried_then_left_empty_and_counted() -> None:
    def late(messages: Any, temperature: float, seed: int) -> str:
        return Scripted.schema(messages, temperature, seed) if seed % 1000 == 2 else "I would rather not."

    model = Scripted(late)
    prompt = made(model)
    assert prompt.info["reattempts"] == 6 and prompt.info["incomplete"] == 0 and model.calls == 9
    assert {t for _, _, (_, t, _) in model.said} == {0.0, 0.7}
    never = Scripted(lambda m, t, s: '{"goal": "g"')
    prompt = made(never, max_reattempts=1)
    assert prompt.info["incomplete"] == 3 and prompt.info["reattempts"] == 3 and prompt.info["fitness"] == 0.0
    assert prompt.memory.items[0].schema == {"broad_category": "", "refinement": "", "specific_scope": "", "goal": "g"}
    predictor = prompt.on(never)
    assert predictor.predict([question("Mali")]) == ["2"] and predictor.counts["incomplete"] == 2


def test_nothing_retrieved() -> None:
    tight = {"min_similarity": 0.999, "max_similarity": 0.9999}
    model = Scripted()
    predictor = made(**tight).on(model)
    [answer] = predictor.answers([question("Mali")])
    assert answer.prediction is None and answer.messages == [] and model.calls == 1
    assert predictor.counts["unanswered"] == 1
    evaluation = task().evaluate(predictor, [Example(question("Mali").inputs, "2")])
    assert evaluation.score == 0.0 and evaluation.predictions == [None]
    model = Scripted()
    predictor = made(**tight, fallback=True).on(model)
    [answer] = predictor.answers([question("Mali")])
    assert answer.prediction == "2" and model.calls == 2
    assert [m["role"] for m in answer.messages] == ["system", "user"] and "example" not in json.dumps(answer.messages)
    rows = predictor.scores([question("Mali"), multiple_choice("capital of Chad", "a", ["b"])])
    assert rows == [[-2.0, -1.0, -4.0], [-2.0, -1.0, -math.inf]]


def test_examples_given_instead_of_retrieved() -> None:
    prompt, model = made(), Scripted()
    answers = prompt.on(model).answers([question("Mali"), question("Oman")], shown=[[2], [0, 1]])
    assert [a.shown for a in answers] == [(2,), (0, 1)] and [a.similarities for a in answers] == [(), ()]
    assert "capital of Laos" in answers[0].messages[1]["content"]


def test_self_consistency_votes() -> None:
    class Undecided(Scripted):
        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            rows = super().score(prefixes, continuations)
            n = sum(kind == "score" for kind, _, _ in self.said)
            return [[0.0, -9.0, -9.0] if n in (1, 3, 4) else row for row in rows]

    model = Undecided()
    [answer] = made(self_consistency=5).on(model).answers([question("Mali")])
    assert answer.prediction == "1" and answer.scores == sorted(answer.scores or [], reverse=True)
    drawn = [(t, s) for kind, _, (_, t, s) in (e for e in model.said if e[0] == "generate")]
    assert drawn == [(0.0, 0), *((0.7, 1000 * n) for n in range(5))]
    assert sum(map(math.exp, answer.scores or [])) == pytest.approx(1.0)


def test_prompt_extended() -> None:
    first = made()
    more = SAICL(encoder=vectors).optimize(task(train=[question("Mali"), question("Oman")]), Scripted(), start=first,
                                           progress=False)
    assert len(more.memory) == 5 and more.memory.items[:3] == first.memory.items and len(first.memory) == 3


@pytest.mark.parametrize("text", [
    '{"broad_category": "a", "refinement": "b", "specific_scope": "c", "goal": "d"}',
    'Sure!\n```json\n{"knowledge_schema": {"Broad Category": "a", "refinement": "b", "specific scope": "c",'
    ' "goal": "d"}}\n```',
    '{"broad_category": "a", "refinement": "b", "specific_scope": "c", "goal": "d',
    "Broad Category: a\nRefinement: b\n- **Specific scope**: c\ngoal: d",
    "Schema:\n##### broad_category:\na\n\n##### refinement:\nb\n##### specific_scope:\nc\n##### goal\nd",
])
def test_schemas_are_read_tolerantly(text: str) -> None:
    assert TEMPLATES["schema"].parse(text) == {"broad_category": "a", "refinement": "b", "specific_scope": "c",
                                               "goal": "d"}


def test_replies_are_mapped_to_candidates() -> None:
    choices = options(multiple_choice("q", "7", ["12", "Lima", "Lima city"]), dict.fromkeys("1234", "") | {
        n: n for n in "1234"})
    assert choices is not None
    texts = [o.text for o in choices]
    for reply, expected in (("7", "7"), ("Lima", "Lima"), ("lima city.", "Lima city"), ("It is 12", "12")):
        assert texts[choice(reply, choices)] == expected  # type: ignore[call-overload]
    assert choice("no idea", choices) is None and choice("12 or 7", choices) is None
    assert choice("2. whatever", choices) == 1


def test_candidates_are_shuffled_by_the_seed() -> None:
    made_ = [multiple_choice("q", "a", ["b", "c", "d"], seed=s) for s in range(40)]
    assert {e.target for e in made_} == {"1", "2", "3", "4"}
    assert all(e.inputs["candidates"][int(e.target) - 1] == "a" for e in made_)
    assert made_[0] == multiple_choice("q", "a", ["b", "c", "d"])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SAICL(top_k=0), r"top_k: expected an integer >= 1, got 0"),
    (lambda: SAICL(min_similarity=0.5, max_similarity=0.4), r"max_similarity: expected a number from min_sim"),
    (lambda: SAICL(template="shema"), r"template: expected schema, physics"),
    (lambda: SAICL(self_consistency=5, activate=False), r"self_consistency: expected 0"),
    (lambda: SchemaTemplate(()), r"fields: expected one or more names"),
    (lambda: SchemaTemplate((("goal", ""), ("Goal ", ""))), r"fields: expected different names"),
    (lambda: SchemaTemplate((("goal", ""),), sample={"aim": "x"}), r"sample: expected a text for each of \['goal'\]"),
    (lambda: multiple_choice("q", "a", ["b", "A"]), r"candidates: expected different ones"),
    (lambda: SAICL(encoder=vectors).optimize(task(train=[]), Scripted()), r"expected training examples, got none"),
    (lambda: SAICL(encoder=vectors).optimize(task(train=[*task().train, Example(
        {"text": "q", "candidates": ["a", "a"]}, "1")]), Scripted()), r"train\[3\]: candidates: expected different"),
    (lambda: SAICL(encoder=vectors).optimize(task(train=[*task().train, Example(
        {"text": "q", "candidates": ["a", "b"]}, "3")]), Scripted()), r"train\[3\]: expected a target among"),
    (lambda: SAICL(encoder=vectors).optimize(task(train=[*task().train, Example(
        {"text": "q", "candidates": "abc"}, "1")]), Scripted()), r"train\[3\]: candidates: expected a list"),
    (lambda: SchemaPrompt(SchemaMemory(), SAICL(encoder=vectors)).on(Scripted()), r"memory: expected solved examples"),
    (lambda: SAICL(encoder=lambda texts: np.zeros(3)).optimize(task(), Scripted()), r"encoder: expected finite values"),
])
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_budget_ends_with_the_memory_so_far() -> None:
    prompt = SAICL(encoder=vectors).optimize(task(), Scripted(), budget=Budget(calls=2), progress=False)
    assert len(prompt.memory) == 2 and prompt.info["stopped"] == "budget: calls"
