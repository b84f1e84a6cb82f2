"""Controls, scores, and the probe from end to end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from looseleaf import Report
from looseleaf.statistics import bootstrap
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_llama, tiny_text_llama, tiny_tokenizer
from looseleaf_abstract_reasoning import AbstractReasoningProbe, Item, Memoriser, Oracle, from_json_lines, to_json_lines
from looseleaf_abstract_reasoning.items import ANSWER, REMAPPINGS, prompt_of, render
from looseleaf_abstract_reasoning.scores import delta, extract, gamma, pairs, relative_delta, score_by_likelihood
from looseleaf_text import EndpointModel, LocalModel
from looseleaf_text.testing.servers import json_server

SMALL = {"shots": 4, "per_category": 4}


def item(**changes: Any) -> Item:
    made = {"problem": "mine/1", "dataset": "mine", "category": "mine", "kind": "original", "prompt": f"Q\n{ANSWER}",
            "answer": "7", "choices": ("5", "7")}
    return Item(**{**made, **changes})


# -- controls ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scoring", ["likelihood", "match"])
def test_controls_come_out_exactly(scoring: Any) -> None:
    """Every sub-dataset, category and remapping: the memoriser 1 and 1, the oracle 1 and 0."""
    probe = AbstractReasoningProbe(per_category=16, scoring=scoring)
    made = probe.problems(2)
    items = probe.items(2)
    assert len({p.dataset for p in made}) == 40
    scores = probe.controls(items, made, 2)
    for name, must in (("memoriser", 1.0), ("oracle", 0.0)):
        for category in probe.categories:
            for kind in REMAPPINGS if category != "math-application" else ("operands",):
                rows = pairs(scores[name], kind, category)
                assert len(rows) >= 7 and rows[:, 0].mean() == 1.0, (name, category)
                assert delta(rows) == (must, must, must) and relative_delta(rows)[0] == must, (name, category, kind)


def test_a_wrong_remapping_does_not_pass_the_controls() -> None:
    probe = AbstractReasoningProbe(per_category=4, categories=("basic-computation",))
    made, items = probe.problems(), probe.items()
    broken = [dataclasses.replace(i, prompt=i.prompt.replace("Question: ", "Question: 1", 1))
              if i.kind == "both" else i for i in items]
    oracle = probe.controls(broken, made)["oracle"]
    assert delta(pairs(oracle, "both"))[0] == 1.0, "the oracle has no key to a prompt that is not the one rendered"
    key = Oracle.of(made, ("original", "both"))
    twisted = Oracle({prompt: dict(zip(k, [*list(k.values())[1:], *list(k.values())[:1]], strict=True))
                      for prompt, k in key._keys.items()})
    wrong = score_by_likelihood(twisted, [i for i in items if i.kind == "both"])
    assert sum(s.correct for s in wrong) < len(wrong)


def test_the_memoriser_knows_nothing_remapped() -> None:
    probe = AbstractReasoningProbe(per_category=2, categories=("number-base",))
    items = probe.items()
    memoriser = Memoriser(items)
    assert all((memoriser.answer(i.prompt) is None) == (i.kind != "original") for i in items)
    assert memoriser.generate([items[0].prompt, "?"], 8) == [f" {items[0].answer}.", ""]


# -- scores -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "answer"), [
    (" 12.", "12"), (" 12", "12"), (" 17.14.\nQuestion: 3", "17.14"), (" -0.5. It follows that", "-0.5"),
    ("Answer: The answer is [3, 4].", "[3, 4]"), ("I think the answer is: **QxY**.", "QxY"), ("\n 5.\n", "5"),
    ("the answer is 3. No, the answer is 4.", "4"), (" {}.", "{}"), (" iEs Rs.", "iEs Rs"), ("", ""), ("  \n ", "")])
def test_extraction(text: str, answer: str) -> None:
    assert extract(text) == answer


def test_scores_by_hand() -> None:
    class Model(Memoriser):
        def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
            return [[-2.0, -1.0] if prefix.startswith("a") else [-1.0, -1.0] for prefix in prefixes]

    items = [item(problem=f"p{n}", prompt=f"{'ab'[n % 2]} {n}") for n in range(4)]
    items += [item(problem=f"p{n}", prompt=f"{'ba'[n // 3]} new {n}", kind="both") for n in range(4)]
    scores = score_by_likelihood(Model([]), items)
    assert [s.correct for s in scores] == [1, 0, 1, 0, 0, 0, 0, 1], "two choices alike are no answer"
    rows = pairs(scores, "both")
    assert rows.tolist() == [[1, 0], [0, 0], [1, 0], [0, 1]]
    assert gamma(scores[:4])[0] == 0.5 and delta(rows)[0] == 0.25 and relative_delta(rows)[0] == 0.5
    assert np.isnan(relative_delta(rows[[1, 3]])[0])
    assert pairs(scores, "both", "another").shape == (0, 2)


def test_intervals_keep_the_two_values_of_a_problem_together() -> None:
    rows = np.random.default_rng(0).integers(0, 2, (37, 2)).astype(np.float64)
    assert delta(rows) == pytest.approx(bootstrap(rows[:, 0] - rows[:, 1]))
    drawn = rows[np.random.default_rng(0).integers(0, 37, (2000, 37))].mean(1)
    expected = np.quantile(1 - drawn[:, 1] / drawn[:, 0], [0.025, 0.975])
    assert relative_delta(rows)[1:] == pytest.approx(tuple(expected))
    rare = np.array([[1.0, 0.0]] + 5 * [[0.0, 0.0]])
    assert relative_delta(rare) == (1.0, 1.0, 1.0), "resamples without a right answer have no such fraction"


# -- items ------------------------------------------------------------------------------------------------------------

def test_prompts_have_the_papers_form() -> None:
    prompt = prompt_of([("1 + 1 =", "2"), ("2 + 2 =", "4")], "3 + 3 =")
    assert prompt.endswith("Question: 1 + 1 =\nAnswer: The answer is 2.\n\nQuestion: 2 + 2 =\nAnswer: The answer is 4."
                           "\n\nQuestion: 3 + 3 =\nAnswer: The answer is")


@pytest.mark.parametrize(("changes", "message"), [
    ({"choices": ("5", "7", "5")}, "without duplicates, got '5' twice"),
    ({"choices": ("7", "7 ")}, "without duplicates, got '7' twice"),
    ({"choices": ("7",)}, "expected two answers or more"), ({"choices": ("7", "")}, "none of them empty"),
    ({"choices": ("5", "6")}, "expected the answer '7' among them"),
    ({"kind": "orignal"}, "Did you mean 'original'"), ({"prompt": "Q: "}, "without white space")])
def test_bad_items(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        item(**changes)


def test_json_lines() -> None:
    items = AbstractReasoningProbe(**SMALL).items()
    assert from_json_lines(to_json_lines(items)) == items
    line = json.loads(to_json_lines(items[:1]))
    assert line["continuations"][line["gold"]] == f" {items[0].answer}."
    for text, message in (("{", "line 1: expected an object with problem, .* got no JSON"),
                          ('\n{"prompt": "x"}', "line 2: expected an object with .*, got none of problem, dataset"),
                          (to_json_lines([item()]).replace('["5", "7"]', '"57"', 1),
                           "choices: expected a list of texts, got '57'")):
        with pytest.raises(ValueError, match=message):
            from_json_lines(text)


# -- the probe --------------------------------------------------------------------------------------------------------

def test_the_sample_is_stratified() -> None:
    probe = AbstractReasoningProbe(per_category=24)
    made = probe.problems()
    for category, each in (("basic-computation", {6}), ("extended-calculation", {1, 2}), ("number-base", {2}),
                           ("math-application", {24}), ("symbolic-abstraction", {3, 4})):
        of = [p.dataset for p in made if p.category == category]
        assert len(of) == 24 and {of.count(name) for name in of} == each
    items = probe.items()
    assert len(items) == sum(1 + len(p.remappings) for p in made)


def test_a_run_reports_everything() -> None:
    probe = AbstractReasoningProbe(shots=4, per_category=2)
    report = probe.run((tiny_text_llama(), tiny_tokenizer()), progress=False)
    titles = {t.title: t for t in report.tables}
    scores = titles["Gamma, the abstract reasoning score"]
    assert [row[0] for row in scores.rows] == ["basic-computation", "extended-calculation", "number-base",
                                               "math-application", "symbolic-abstraction", "symbolic-reasoning"]
    assert all(0 <= row[5] <= row[4] <= row[6] <= 1 for row in scores.rows)  # type: ignore[operator]
    losses = titles["Delta, the memory dependence score"]
    assert len(losses.rows) == 4 * 3 + 1
    for row in losses.rows:
        assert row[5] == pytest.approx(row[3] - row[4])  # type: ignore[operator]
    assert all(claim.verdict == "holds" for claim in report.claims) and len(report.claims) == 2
    assert len(report.figures) == 3 and report.figures[2].image is not None and len(report.examples) == 4
    assert Report.from_dict(json.loads(report.to_json())).to_text() == report.to_text()


def test_a_tokenizer_needs_no_token_for_padding() -> None:
    probe = AbstractReasoningProbe(**SMALL, categories=("basic-computation",))
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert bare.pad_token_id is None
    runs = [probe.run((tiny_text_llama(), t), progress=False).to_dict() for t in (tiny_tokenizer(), bare)]
    assert runs[0] == runs[1]


def test_a_model_in_mixed_modes_is_measured_without_dropout_and_left_so() -> None:
    probe = AbstractReasoningProbe(**SMALL, categories=("basic-computation",))
    expected = probe.run((tiny_text_llama(), tiny_tokenizer()), progress=False).to_dict()
    for wrap in (lambda model: (model, tiny_tokenizer()), lambda model: LocalModel(model, tiny_tokenizer())):
        model = mixed_modes(tiny_llama(vocabulary=128, attention_dropout=0.5))
        before = snapshot(model)
        assert probe.run(wrap(model), progress=False).to_dict() == expected
        assert_unchanged(before, model)


def test_items_of_ones_own() -> None:
    probe = AbstractReasoningProbe(**SMALL)
    items = [item(problem=f"p{n}", prompt=f"{n} {kind}\n{ANSWER}", kind=kind) for n in range(3)
             for kind in ("original", "both")]
    one = probe.run((tiny_text_llama(), tiny_tokenizer()), items, progress=False)
    two = probe.run((tiny_text_llama(), tiny_tokenizer()), to_json_lines(items), progress=False)
    assert one.to_dict() == two.to_dict()
    assert [c.statement for c in one.claims] == ["Control: the memoriser has Gamma 1 and Delta 1"]
    assert [row[:2] for row in one.tables[1].rows] == [["mine", "both"]]
    other = [dataclasses.replace(i, category="other" if i.kind == "both" else "mine") for i in items]
    report = probe.run((tiny_text_llama(), tiny_tokenizer()), other, progress=False)
    found = [row[0] for t in report.tables[:2] for row in t.rows]
    assert found == ["mine", "mine"], "Delta is the original's category's"


@pytest.mark.parametrize(("data", "message"), [
    ([], "expected one item or more"), (["x"], "data: .* got one with str"), (3, "data: .* got one with int"),
    ("", "expected one item or more"),
    ([item(), item(prompt="other")], "got two items with problem='mine/1' and kind='original'"),
    ([item(), item(problem="mine/2")], "expected different prompts"),
    ([item(kind="both")], "expected items with kind='original'")])
def test_bad_data(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AbstractReasoningProbe(**SMALL).run((tiny_text_llama(), tiny_tokenizer()), data)


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="this probe needs the model's tokenizer"):
        AbstractReasoningProbe(**SMALL).run(tiny_text_llama())
    for changes, message in (({"shots": 3}, r"shots: expected an integer in \[4, 50\], got 3"),
                             ({"digits": 10}, r"digits: expected an integer in \[3, 9\], got 10"),
                             ({"scoring": "guess"}, "scoring: expected 'likelihood' or 'match', got 'guess'"),
                             ({"categories": ("number-bases",)}, "Did you mean 'number-base'"),
                             ({"categories": ()}, r"categories: expected some of .* got \(\)"),
                             ({"per_category": 0}, r"per_category: expected an integer in \[1, 1000\], got 0")):
        with pytest.raises(ValueError, match=message):
            AbstractReasoningProbe(**changes)


# -- a server ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, str]]]:
    """A completions server that answers what stands beside a prompt."""
    answers: dict[str, str] = {}

    def handle(path: str, body: dict[str, Any], headers: Any) -> tuple[int, Any]:
        return 200, {"choices": [{"text": answers.get(body["prompt"], " I do not know.")}]}

    with json_server(handle) as url:
        yield url, answers


def test_a_model_behind_a_server(server: tuple[str, dict[str, str]]) -> None:
    url, answers = server
    probe = AbstractReasoningProbe(**SMALL, scoring="match", categories=("basic-computation",))
    answers.update({i.prompt: f" {i.answer}.\n\nQuestion: 1" for i in probe.items() if i.kind in ("original", "both")})
    with EndpointModel(url, "served", retries=0) as remote:
        report = probe.run(remote, progress=False)
    rows = next(t for t in report.tables if t.title.startswith("Delta")).rows
    assert [(row[1], row[5]) for row in rows] == [("operators", 1.0), ("operands", 1.0), ("both", 0.0)]
    assert report.facts["model"] == "served"


def test_rendering_is_cheap_to_check() -> None:
    made = AbstractReasoningProbe(**SMALL).problems()
    assert render(made[0]).prompt.count(ANSWER) == 5
