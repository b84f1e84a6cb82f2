"""Pairs and labels, tuning, ranking, adherence, judges, the battery and the probe, on planted models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf.resume import StateError
from looseleaf.testing.models import seeded, tiny_llama, tiny_tokenizer
from looseleaf_implicit_instruction_tuning import (
    PAIRS,
    Adherence,
    HeadToHead,
    ImplicitTuningProbe,
    Item,
    Pair,
    Response,
    ResponseRanking,
    RuleAdapter,
    Tags,
    as_pairs,
    features,
    items,
    judge,
    planted,
    respond,
    strip_instructions,
    tune,
)
from looseleaf_implicit_instruction_tuning.measures import length_controlled
from looseleaf_implicit_instruction_tuning.tuning import response_loss
from looseleaf_text import LanguageModel, LocalModel
from looseleaf_text.testing import ToyLanguageModel

SETTINGS: dict[str, Any] = {"epochs": 20, "batch": 16, "device_batch": 16, "lr": 0.3, "progress": False}


def llama() -> LocalModel:
    return LocalModel(tiny_llama(vocabulary=128), tiny_tokenizer())


# ------------------------------------------------------------------------------------------------- pairs and labels

def test_labels_begin_after_the_newline_of_the_assistants_tag() -> None:
    local = llama()
    (row, other), left_out = features(local, [("What?", "It."), ("", "Yes.")])
    assert left_out == 0
    first = row["labels"].index(next(label for label in row["labels"] if label != -100))
    assert row["labels"][:first] == [-100] * first and -100 not in row["labels"][first:]
    assert local.detokenize(row["input_ids"][:first]) == local.detokenize(
        local.tokenize("<|user|>\nWhat?\n<|assistant|>\n"))
    assert local.detokenize(row["labels"][first:]) == "It.</s>" and row["labels"][first:] == row["input_ids"][first:]
    assert local.detokenize(other["labels"][-5:]) == "Yes.</s>"
    made = features(local, [("What?", "It.")], tags=Tags("<|A|>", "<|B|>"))[0][0]["input_ids"]
    assert "<|A|>" in local.detokenize(made) and "<|user|>" not in local.detokenize(made)


@torch.no_grad()
def test_response_tuning_knows_no_instruction() -> None:
    local = llama()
    shuffled = [Pair(PAIRS[(n + 1) % 6].instruction, PAIRS[n].response) for n in range(6)]
    one, two = (features(local, data, method="response")[0] for data in (PAIRS[:6], shuffled))
    assert one == two
    ids = [torch.tensor([row["input_ids"]]) for row in one]
    losses = [float(response_loss(local.model(input_ids=i), torch.tensor([row["labels"]])))
              for i, row in zip(ids, one, strict=True)]
    assert losses == [float(response_loss(local.model(input_ids=i), torch.tensor([row["labels"]])))
                      for i, row in zip(ids, two, strict=True)]
    assert features(local, PAIRS[:6])[0] != features(local, shuffled)[0]
    assert strip_instructions(PAIRS)[0] == Pair("", PAIRS[0].response)


@torch.no_grad()
def test_response_loss_is_the_mean_over_response_tokens() -> None:
    local = llama()
    row = features(local, PAIRS[:1])[0][0]
    out = local.model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    assert float(response_loss(out, torch.tensor([row["labels"]]))) == pytest.approx(float(out.loss), rel=1e-6)


def test_what_users_have_becomes_pairs() -> None:
    wanted = [Pair("a", "b")]
    chat = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "a "},
                         {"role": "assistant", "content": " b\n"}]}
    for row in (Pair("a", "b"), ("a", "b"), {"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"},
                {"instruction": "a", "response": "b"}, chat):
        assert as_pairs([row], 1) == wanted


@pytest.mark.parametrize("data, message", [
    ([("a", "b")], "expected 2 pairs or more, got 1"),
    ([("a", "b"), ("c", "  ")], "pair 1: expected a response, got an"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "expected a user's turn and an assistant's turn"),
    ([{"question": "a"}], "expected instruction and response"), (["text"], "expected two texts"),
    ("text", "expected a list of"), (3, "expected a list of")])
def test_refuses_data(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResponseRanking()(llama(), data)


# ------------------------------------------------------------------------------------------------- planted models

def followed(model: Any, tokenizer: Any, world: Any, rules: Any = None, max_new_tokens: int = 64) -> Any:
    battery = world.items()
    responses = respond(LocalModel(model, tokenizer), [i.instruction for i in battery], rules=rules,
                        max_new_tokens=max_new_tokens)
    return judge(battery, responses)


@pytest.mark.filterwarnings("ignore:RuleAdapter")
def test_each_rule_is_needed_where_it_was_planted() -> None:
    model, tokenizer, world = planted()
    plain = followed(model, tokenizer, world)
    assert not plain.follows and sum(plain.ended) == sum(plain.content) == 0
    found = followed(model, tokenizer, world, RuleAdapter(tokenizer))
    assert found.follows and found.score.value == 1.0 and found.following.low > 0.9
    for options in ({"eos_weight": 0.0}, {"uniform": {}}, {"repeat": 0.0}):
        assert followed(model, tokenizer, world, RuleAdapter(tokenizer, **options)).score.value == 0.0


@pytest.mark.parametrize("method", ["instruction", "response", "single-task"])
def test_tuning_a_model_with_answers_makes_it_follow_and_one_without_not(method: Any) -> None:
    for strength in (6.0, 0.0):
        model, tokenizer, world = planted(strength=strength)
        data = world.pairs("color") if method == "single-task" else world.pairs()
        epochs = 16 if method == "single-task" else 30
        tuned = tune(model, tokenizer, data, method, **{**SETTINGS, "epochs": epochs})
        assert tuned is model and tuned.tuning_info["loss"][-1] < tuned.tuning_info["loss"][0]
        found = followed(tuned, tokenizer, world)
        if strength or method != "single-task":  # form is learned in both
            assert min(found.ended) == 1.0
        if strength:
            # of one relation the table learns no other's values; items are in the order of the relations
            told = 16 if method == "single-task" else 48
            assert found.follows and found.passed == [1.0] * told + [0.0] * (48 - told)
        else:
            assert not found.follows and found.following.covers_zero if hasattr(found.following, "covers_zero") else \
                found.following.low <= 0


def test_ranking_finds_what_is_there_and_nothing_else() -> None:
    for score in ("sum", "mean"):
        model, tokenizer, world = planted()
        found = ResponseRanking(score)(LocalModel(model, tokenizer), world.pairs(), progress=False)
        assert found.value.low > 0.9 and found.gain.low > 0.4 and found.shuffled_gain.low <= 0
        model, tokenizer, world = planted(strength=0.0)
        found = ResponseRanking(score)(LocalModel(model, tokenizer), world.pairs(), progress=False)
        assert set(found.right) == set(found.empty) and found.gain == found.shuffled_gain == (0, 0, 0)
    # strictly: all responses are equally likely here
    assert found.value.value == 0.0 and np.mean(found.empty) == 0.5


def test_the_probe_as_a_whole() -> None:
    for strength, known in ((6.0, True), (0.0, False)):
        model, tokenizer, world = planted(strength=strength)
        report = ImplicitTuningProbe(max_new_tokens=64).run(
            (model, tokenizer), {"pairs": world.pairs(), "battery": world.items("color")}, progress=False)
        assert report.facts["follows instructions as it is"] is False
        assert report.facts["follows instructions with the rules"] is known
        assert len(report.tables[1].rows) == 5 and report.strips and report.examples
    with pytest.raises(ValueError, match="expected 'pairs', 'battery' or both, got other"):
        ImplicitTuningProbe().run((model, tokenizer), {"other": 1})
    with pytest.raises(ValueError, match="battery: expected a list of Item"):
        ImplicitTuningProbe().run((model, tokenizer), {"battery": ["text"]})
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-text token"):
        ImplicitTuningProbe().run((model, tokenizer))
    with pytest.raises(ValueError, match="another text than user_tag"):
        ImplicitTuningProbe(user_tag="x", assistant_tag="x")


# ------------------------------------------------------------------------------------------------- ranking

class Table(LanguageModel):
    """A model whose continuations have known log-probabilities; as far as the ranking asks."""

    tokenizer = tiny_tokenizer()

    def encode_pairs(self, prefixes: Any, continuations: Any) -> Any:
        return [[1]] * len(prefixes), [[[3] * (3 if text == "short" else 7) for text in row] for row in continuations]

    def score_ids(self, prefixes: Any, rows: Any) -> Any:
        return [[-3.0 if len(ids) in (3, 4) else -3.5 for ids in row] for row in rows]

    def score(self, *_: Any) -> Any: ...
    def generate(self, *_: Any, **__: Any) -> Any: ...
    def tokenize(self, text: str) -> Any: ...
    def detokenize(self, ids: Any) -> Any: ...


def test_sum_and_mean_can_rank_otherwise() -> None:
    pairs, table = [("a", "short"), ("b", "long")], Table()  # type: Any, Any
    for end in (True, False):
        assert ResponseRanking("sum", end=end)(table, pairs, progress=False).strict == [1.0, 0.0]
        assert ResponseRanking("mean", end=end)(table, pairs, progress=False).strict == [0.0, 1.0]


def test_ranking_scores_are_those_of_the_model() -> None:
    local, pairs = llama(), PAIRS[:5]
    found = ResponseRanking(others=4)(local, pairs, progress=False)
    prompts = [Tags().prompt(p.instruction) for p in pairs]
    ids = local.encode_pairs(prompts, [[p.response for p in pairs]] * len(pairs))
    own = np.array(local.score_ids(ids[0], [[[*tail, 2] for tail in row] for row in ids[1]]))
    wanted = [(own[n, n] > np.delete(own[n], n)).mean() for n in range(len(pairs))]
    np.testing.assert_allclose(found.strict, wanted)
    for options in ({"score": "max"}, {"others": 0}):
        with pytest.raises(ValueError, match="expected"):
            ResponseRanking(**options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- battery

def test_checks_of_items() -> None:
    answer = Item("answer", "Capital?", ("Paris",))
    assert answer.check("It is Paris.\nRome") and not answer.check("Rome.\nParis") and not answer.check("Parisian")
    choice = Item("choice", "Hot or cold?", ("cold",), ("hot",))
    assert choice.check("\nCold.") and not choice.check("cold or hot") and not choice.check("")
    listed = Item("list", "List two", count=2)
    assert listed.check("Here:\n- a\n- b") and listed.check("1. a\n2) b\n")
    assert not listed.check("- a\n- a") and not listed.check("- a\n- b\n- c") and not listed.check("a, b")
    for bad in ({"kind": "poem"}, {"kind": "list"}, {"kind": "answer"}):
        with pytest.raises(ValueError, match="expected"):
            Item(instruction="x", **bad)


def test_one_response_to_everything_is_not_following() -> None:
    battery = items()
    for text in ("Paris", "cold", "- a\n- b\n- c", "seven Paris hot", ""):
        found = judge(battery, [Response(text, [3], True)] * len(battery))
        assert found.following.value == pytest.approx(0.0, abs=1e-12) and not found.follows
    right = [Response(i.accepted[0] if i.accepted else "\n".join(f"- {n}" for n in range(i.count)), [3], True)
             for i in battery]
    assert judge(battery, right).score == (1.0, 1.0, 1.0) and judge(battery, right).follows
    # right, but running on, or with the user's next turn in it
    assert not judge(battery, [Response(r.text, r.ids, False) for r in right]).follows
    assert not judge(battery, [Response(r.text + "\n<|user|>\n", r.ids, True) for r in right]).follows
    # the right answers to other instructions
    assert not judge(battery, [*right[5:], *right[:5]]).follows
    # an instruction that repeats its question passes nothing
    assert sum(judge(battery, [Response(i.instruction, [3], True) for i in battery]).content) == 0
    assert judge(battery[:1], right[:1]).following.value == 0.0  # no control, no finding
    assert [i.kind for i in items(4)] == ["answer", "choice", "list", "answer"] and items(4) == items(4)
    with pytest.raises(ValueError, match="expected one response"):
        judge(battery, [])


def test_repetition() -> None:
    said = judge(items(1), [Response("a b c d a b c d e", [3], True)])
    assert said.repeated == [pytest.approx(2 / 6)] and said.words == [9]


# ------------------------------------------------------------------------------------------------- adherence, judges

def test_adherence_of_known_vectors() -> None:
    places = {"task": [1.0, 0.0], "general": [0.0, 1.0]}

    def embed(texts: list[str]) -> Any:
        return [places.get(t) or [math.cos(float(t)), math.sin(float(t))] for t in texts]

    angles = [0.1, 0.5, 0.9, 1.3]
    found = Adherence(embed)([str(a) for a in angles], [str(a) for a in angles], [("task", "task")],
                             [("general", "general")])
    np.testing.assert_allclose(found.x, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(found.y, np.cos(angles) - np.sin(angles), atol=1e-6)
    assert found.slope.value == pytest.approx(np.polyfit(found.x, found.y, 1)[0]) and found.slope.low > 0
    flat = Adherence(embed)([str(a) for a in angles], ["0.3"] * 4, [("task", "task")], [("general", "general")])
    assert flat.slope.value == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(Adherence(embed)(["1"] * 3, ["1"] * 3, [("task", "task")], [("general", "general")]).slope.value)
    assert len(Adherence(ToyLanguageModel())(["a", "b", "c"], ["", "e", "f"], PAIRS[:2], PAIRS[2:4]).x) == 3
    with pytest.raises(ValueError, match="three or more, got 2 and 1"):
        Adherence(embed)(["1", "2"], ["1"], [("task", "task")], [("general", "general")])


def test_both_orders_take_out_the_bias_of_a_judge() -> None:
    asked, short, long = ["i"] * 6, ["a"] * 6, ["b" * 50] * 6
    first = HeadToHead(lambda i, a, b: 1.0)(asked, short, long, progress=False)
    assert first.value.value == 0.5 and first.first_place == 1.0
    longest = HeadToHead(lambda i, a, b: float(len(a) > len(b)))
    assert longest(asked, long, short, progress=False).value.value == 1.0
    mixed = longest(asked, [*long[:3], *short[:3]], [*short[:3], *long[:3]], progress=False)
    assert mixed.value.value == 0.5 and mixed.length_controlled == pytest.approx(0.5, abs=1e-6)
    assert length_controlled([1.0] * 40, [0.0] * 40) > 0.9
    assert HeadToHead(ToyLanguageModel())(["i"], ["a"], ["b"], progress=False).value.value in (0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\], got 2"):
        HeadToHead(lambda i, a, b: 2.0)(asked, short, long, progress=False)
    with pytest.raises(ValueError, match="expected equally many"):
        HeadToHead(lambda i, a, b: 1.0)([], [], [])


# ------------------------------------------------------------------------------------------------- tuning

def test_tuning_leaves_modes_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, tokenizer = tiny_llama(vocabulary=128), tiny_tokenizer()
    model.model.layers[0].train()
    modes = [m.training for m in model.modules()]
    config, state = model.config.to_dict(), torch.get_rng_state()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    tuned = tune(model, tokenizer, PAIRS[:4], rank=2, epochs=2, batch=4, lr=1e-2, schedule="code", progress=False)
    assert [m.training for m in model.modules() if "lora" not in type(m).__name__.lower()][:3] == modes[:3]
    assert model.config.to_dict() == config and torch.equal(state, torch.get_rng_state())
    assert tuned.tuning_info["loss"][-1] < tuned.tuning_info["loss"][0]
    assert respond(LocalModel(tuned, tokenizer), ["a"], max_new_tokens=2)
    base = tuned.unload()
    assert all(torch.equal(before[n], p) for n, p in base.state_dict().items())


def test_tuning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def fresh() -> Any:
        return planted()[0]

    _, tokenizer, world = planted()
    settings: dict[str, Any] = {**SETTINGS, "epochs": 3}
    whole = tune(fresh(), tokenizer, world.pairs(), **settings)
    tune(fresh(), tokenizer, world.pairs(), state_dir=tmp_path, **settings)
    again = tune(fresh(), tokenizer, world.pairs(), state_dir=tmp_path, **settings)
    torch.testing.assert_close(again.table.weight, whole.table.weight)
    with pytest.raises(StateError, match="lr was"):
        tune(fresh(), tokenizer, world.pairs(), state_dir=tmp_path, **{**settings, "lr": 0.1})


def test_tuning_refuses() -> None:
    model, tokenizer = seeded(lambda: tiny_llama(vocabulary=128)), tiny_tokenizer()
    for options, message in (({"epochs": 0}, "epochs: expected an integer >= 1"), ({"lr": 0}, "lr > 0"),
                             ({"batch": 9, "device_batch": 2}, "divisor"), ({"schedule": "x"}, "schedule one of"),
                             ({"method": "chess"}, "'single-task', got 'chess'"),
                             ({"max_length": 5}, "at most 5 tokens")):
        with pytest.raises(ValueError, match=message):
            tune(model, tokenizer, PAIRS, **options)
    with pytest.raises(ValueError, match="2 pairs or more"):
        tune(model, tokenizer, PAIRS[:1])
    with pytest.raises(ValueError, match="half precision"):
        tune(tiny_llama(vocabulary=128).bfloat16(), tokenizer, PAIRS[:2])
    with pytest.warns(UserWarning, match="1 of 3 pairs are longer"):
        tune(model, tokenizer, [*PAIRS[:2], ("a", "b" * 500)], epochs=1, max_length=300, progress=False)
