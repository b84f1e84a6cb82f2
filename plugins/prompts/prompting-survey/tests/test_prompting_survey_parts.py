"""Search, ensembles, demonstrations, composition, decomposition, pools and the map."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from looseleaf import Example
from looseleaf_prompting_survey import (
    STRATEGIES,
    PromptAugmenter,
    PromptComposer,
    PromptDecomposer,
    TemplateEnsemble,
    answer,
    default_pool,
    distil,
    fit_ensemble,
    generate_together,
    mine_templates,
    paraphrase,
    search,
    shared_prompts,
    spans,
    typology,
)
from looseleaf_prompting_survey.augment import label_entropy, orders_of
from looseleaf_prompting_survey.ensemble import (
    accuracy_weights,
    likelihood_weights,
    log_likelihood,
    score_rows,
)
from looseleaf_prompting_survey.typology import COLUMNS
from looseleaf_text import EnsemblePrompt, RetrievedPrompt, Template, TextPrompt, Verbalizer
from looseleaf_text.ensemble import combine
from looseleaf_text.testing import ToyLanguageModel, toy_task

X = Example({"text": "a lovely film"})
PREFIX = Template("Review: [X]\nIt was[Z]")
ANSWERS = Verbalizer.of({"positive": ["positive", "lovely"], "negative": "negative"})


class Fixed(ToyLanguageModel):
    """Gives each answer a fixed probability, whatever the prompt."""

    def __init__(self, table: dict[str, float]) -> None:
        super().__init__()
        self.table = table
        self.seen: list[str] = []

    def score(self, prefixes: list[str], continuations: list[list[str]]) -> list[list[float]]:
        self.seen += prefixes
        self._request(prefixes)
        return [[math.log(self.table[c.strip()]) for c in row] for row in continuations]


# -- formalism ----------------------------------------------------------------------------------------------------

def test_search_finds_the_likeliest_or_draws() -> None:
    model = Fixed({"positive": 0.2, "lovely": 0.25, "negative": 0.3})
    best = search(PREFIX, [X], model, ANSWERS)[0]
    assert (best.answer, best.label) == ("negative", "negative")
    assert sum(map(math.exp, (best.log_probs or {}).values())) == pytest.approx(1.0)
    # together the answers of a label may beat the single likeliest one
    assert answer(PREFIX, X, model, ANSWERS) == "positive"
    drawn = Counter(f.answer for f in search(PREFIX, [X] * 3000, model, ANSWERS, how="sample", seed=1))
    for text, share_ in model.table.items():
        assert drawn[text] / 3000 == pytest.approx(share_ / 0.75, abs=0.03)
    again = Counter(f.answer for f in search(PREFIX, [X] * 3000, model, ANSWERS, how="sample", seed=1))
    assert again == drawn


def test_search_in_lists_and_in_the_open() -> None:
    model = Fixed({"bad": 0.1, "good": 0.4})
    found = search(Template("[X] It was [Z] indeed"), [X], Fixed({"bad indeed": 0.1, "good indeed": 0.4}),
                   ["bad", "good"])[0]
    assert (found.answer, found.label) == ("good", None)
    assert search(PREFIX, [X], model)[0].answer.strip() in ("positive", "negative")
    for space, message in ((["one"], "two labels or more"), ("ab", "space: expected a list of texts"),
                           (["a", " "], "no tokens")):
        with pytest.raises(ValueError, match=message):
            search(PREFIX, [X], model, space)
    with pytest.raises(ValueError, match="expected the slot at the end"):
        search(Template("[X] It was [Z]."), [X], model)
    with pytest.raises(ValueError, match="how: expected 'argmax' or 'sample', got 'best'"):
        search(PREFIX, [X], model, ANSWERS, how="best")  # type: ignore[arg-type]


# -- ensembling ---------------------------------------------------------------------------------------------------

def random_members(seed: int, members: int = 3, examples: int = 12) -> tuple[list[list[list[float]]], list[int]]:
    rng = random.Random(seed)
    rows = [[[math.log(p), math.log(1 - p)] for p in (rng.uniform(0.05, 0.95) for _ in range(examples))]
            for _ in range(members)]
    return rows, [rng.randrange(2) for _ in range(examples)]


@pytest.mark.parametrize("seed", range(5))
def test_likelihood_weights_equal_a_search_of_the_simplex(seed: int) -> None:
    rows, golds = random_members(seed)
    weights = likelihood_weights(rows, golds, steps=20000, tolerance=1e-12)
    right = np.array([[math.exp(row[gold]) for row, gold in zip(member, golds, strict=True)] for member in rows])
    grid = np.array([[a, b, 100 - a - b] for a in range(101) for b in range(101 - a)]) / 100
    best = np.log(grid @ right).mean(1).max()
    assert sum(weights) == pytest.approx(1.0) and min(weights) >= 0
    # nothing on a grid of hundredths is better, and the grid comes near
    mine_ = log_likelihood(combine(rows, weights), golds)
    assert mine_ >= best - 1e-9 and mine_ - best < 2e-3


def test_likelihood_never_falls_from_step_to_step() -> None:
    rows, golds = random_members(7)
    values = [log_likelihood(combine(rows, likelihood_weights(rows, golds, steps=n)), golds) for n in range(1, 12)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


def test_accuracy_weights_by_hand() -> None:
    rows = [[[0.0, -1.0], [0.0, -1.0]], [[-1.0, 0.0], [0.0, -1.0]]]
    assert accuracy_weights(rows, [0, 0]) == pytest.approx([2 / 3, 1 / 3])
    assert accuracy_weights(rows, [1, 1]) == pytest.approx([0.0, 1.0])
    assert accuracy_weights([rows[0], rows[0]], [1, 1]) == [0.5, 0.5]  # nobody is right: nobody is preferred


def test_probabilities_of_zero_do_no_harm() -> None:
    rows = [[[-math.inf, 0.0]], [[-math.inf, 0.0]]]
    assert likelihood_weights(rows, [0]) == [0.5, 0.5]
    assert likelihood_weights([[[0.0, -math.inf]], rows[0]], [0]) == pytest.approx([1.0, 0.0])


def test_ensembles_are_prompts_and_distil() -> None:
    task, model = toy_task(), ToyLanguageModel()
    members = [t.to_prompt(task.labels) for t in default_pool(task)[:4]]
    for by, fit in (("likelihood", likelihood_weights), ("accuracy", accuracy_weights)):
        ensemble = fit_ensemble(members, task, model, task.dev, by)  # type: ignore[arg-type]
        rows = [task.class_scores(p.on(model), task.dev) for p in members]
        targets = [list(task.labels or {}).index(e.target) for e in task.dev]
        assert list(ensemble.weights or []) == fit(rows, targets)
        assert task.evaluate(ensemble.on(model), "dev").score == score_rows(
            task, combine(rows, ensemble.weights), task.dev)
    labelled = distil(ensemble, model, [Example(e.inputs) for e in task.test])
    assert [e.target for e in labelled] == task.evaluate(ensemble.on(model)).predictions
    with pytest.raises(ValueError, match="expected one prompt or more"):
        fit_ensemble([], task, model, task.dev)
    with pytest.raises(ValueError, match="expected a task with labels"):
        fit_ensemble(members, toy_task(generation=True), model, [])
    with pytest.raises(ValueError, match="by: expected 'likelihood' or 'accuracy', got 'mean'"):
        fit_ensemble(members, task, model, task.dev, "mean")  # type: ignore[arg-type]


def test_text_is_generated_from_the_mean_of_next_tokens() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
    from looseleaf_text import LocalModel

    model = LocalModel(tiny_text_llama(), tiny_tokenizer())
    prompts = [TextPrompt("Say {text}:"), TextPrompt("{text} is")]
    alone = model.generate([prompts[0].render(X)], 5)[0]
    assert generate_together(EnsemblePrompt(prompts, [1, 0]), X, model, 5) == alone
    both = generate_together(EnsemblePrompt(prompts, [1, 3]), X, model, 1)
    with torch.no_grad():
        mean = sum(w * model.model(**model.tokenizer(p.render(X), return_tensors="pt", return_token_type_ids=False))
                   .logits[0, -1].softmax(-1) for w, p in zip((0.25, 0.75), prompts, strict=True))
    assert model.tokenizer.decode([int(mean.argmax())], skip_special_tokens=True) == both
    before = snapshot(mixed_modes(model.model))
    assert generate_together(EnsemblePrompt(prompts, [1, 3]), X, model, 1) == both
    assert_unchanged(before, model.model)


# -- augmentation -------------------------------------------------------------------------------------------------

def test_demonstrations_are_drawn_from_train() -> None:
    task = toy_task()
    made = PromptAugmenter(shots=4).augment(TextPrompt.for_task(task), task)
    assert Counter(e.target for e in made.exemplars) == {"positive": 2, "negative": 2}
    assert made == PromptAugmenter(shots=4).augment(TextPrompt.for_task(task), task)
    assert made.exemplars != PromptAugmenter(shots=4).augment(TextPrompt.for_task(task), task, seed=1).exemplars
    assert all(e in task.train for e in PromptAugmenter(shots=5, select="random").augment(made, task).exemplars)
    shown = made.render(task.test[0])
    assert [shown.index(task.demonstration(e)) for e in made.exemplars] == sorted(
        shown.index(task.demonstration(e)) for e in made.exemplars)


def test_the_nearest_come_last_and_never_the_example_itself() -> None:
    task, model = toy_task(), ToyLanguageModel()
    asked = task.train[3]
    made = PromptAugmenter(shots=3, select="nearest").augment(TextPrompt.for_task(task), task)
    assert isinstance(made, RetrievedPrompt)
    exemplars = made.on(model).resolve([asked])[0].exemplars
    vectors = model.embed([task.show(e) for e in [*exemplars, asked]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = (vectors[:-1] @ vectors[-1]).tolist()
    assert len(exemplars) == 3 and likeness == sorted(likeness) and asked not in exemplars
    others = [e for e in task.train if e.inputs != asked.inputs and e not in exemplars]
    rest = model.embed([task.show(e) for e in others])
    assert max((rest / np.linalg.norm(rest, axis=1, keepdims=True)) @ vectors[-1]) <= likeness[0] + 1e-6
    assert len(task.evaluate(made.on(model)).predictions) == len(task.test)


def test_the_order_with_most_entropy() -> None:
    task, model = toy_task(), ToyLanguageModel()
    plain = PromptAugmenter(shots=3, probes=16).augment(TextPrompt.for_task(task), task)
    made = PromptAugmenter(shots=3, order="entropy", permutations=6, probes=13).augment(
        TextPrompt.for_task(task), task, model)
    shown = {id(e) for e in plain.exemplars}
    assert {id(e) for e in made.exemplars} == shown
    rest = [e for e in task.train if id(e) not in shown]
    values = [label_entropy(TextPrompt.for_task(
        task, exemplars=[plain.exemplars[n] for n in order]).on(model).predict(rest))
        for order in itertools.permutations(range(3))]
    assert label_entropy(made.on(model).predict(rest)) == max(values)
    assert label_entropy(["a"] * 3) == 0.0 and label_entropy(["a", "b"]) == pytest.approx(math.log(2))
    assert len(orders_of(3, 100, random.Random(0))) == 6 and len(set(orders_of(9, 10, random.Random(0)))) == 10


@pytest.mark.parametrize(("fields", "message"), [
    ({"shots": 0}, r"PromptAugmenter\.shots: expected an integer >= 1, got 0"),
    ({"select": "best"}, "expected 'random', 'balanced' or 'nearest', got 'best'"),
    ({"order": "up"}, "expected 'given' or 'entropy', got 'up'"),
    ({"select": "nearest", "order": "entropy"}, "expected 'given' with select='nearest'")])
def test_augmenters_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptAugmenter(**fields)


def test_what_augmenting_needs() -> None:
    task = toy_task(size=4)
    for augmenter, message in (
            (PromptAugmenter(shots=9), "shots: expected at most 4, the training examples"),
            (PromptAugmenter(order="entropy", shots=2), "model: expected a LanguageModel for order='entropy'")):
        with pytest.raises(ValueError, match=message):
            augmenter.augment(TextPrompt.for_task(task), task)
    task = toy_task(size=4, generation=True)
    with pytest.raises(ValueError, match="expected labels, whose predictions order='entropy' counts"):
        PromptAugmenter(order="entropy", shots=2).augment(TextPrompt.for_task(task), task, ToyLanguageModel())


# -- composition, sharing, decomposition --------------------------------------------------------------------------

MOOD = (Template("[X] Mood:[Z:mood]"), Verbalizer.of({"up": " high", "down": " low"}))
PLAN = (Template("; plan:[Z:plan]"), Verbalizer.of({"stay": " stay", "go": " leave"}))
TONE = (Template("; tone:[Z:tone]."), Verbalizer.of({"loud": " loud", "soft": " soft"}))


def test_composition_is_associative() -> None:
    a, b, c = (PromptComposer.of([part]) for part in (MOOD, PLAN, TONE))
    left, right, flat = (a + b) + c, a + (b + c), PromptComposer.of([MOOD, PLAN, TONE])
    assert left == right == flat
    model = ToyLanguageModel()
    assert left.outputs(X, model) == right.outputs(X, model) == flat.outputs(X, model)
    with pytest.raises(ValueError, match="several answer slots called 'mood'"):
        _ = a + a


def test_answers_are_scored_given_those_before() -> None:
    model = ToyLanguageModel()
    made = PromptComposer.of([MOOD, PLAN])
    found = made.log_probs(X, model)
    assert len(found) == 4 and sum(math.exp(v) for _, v in found) == pytest.approx(1.0)
    assert [v for _, v in found] == sorted((v for _, v in found), reverse=True)
    first = MOOD[1].log_probs(model.score(["a lovely film Mood:"], [[" high", " low"]]))[0]
    second = PLAN[1].log_probs(model.score(["a lovely film Mood: low; plan:"], [[" stay", " leave"]]))[0]
    assert dict((tuple(k.values()), v) for k, v in found)["down", "go"] == pytest.approx(first[1] + second[1])


def test_rules_add_up_what_they_join() -> None:
    model = ToyLanguageModel()
    plain = PromptComposer.of([MOOD, PLAN]).outputs(X, model)
    joined = PromptComposer.of([MOOD, PLAN], lambda z: z["mood"]).outputs(X, model)
    assert joined["up"] == pytest.approx(plain["up; stay"] + plain["up; go"])
    with pytest.raises(ValueError, match="expected a verbalizer for each of the answer slots"):
        PromptComposer(MOOD[0], {"plan": PLAN[1]})


def test_shared_prompts_begin_alike() -> None:
    made = shared_prompts(Template("You read [X].\n"), {"a": Template("A:[Z]"), "b": Template("B:[Z]")})
    assert {k: t.text for k, t in made.items()} == {"a": "You read [X].\nA:[Z]", "b": "You read [X].\nB:[Z]"}


def test_every_part_is_asked_about() -> None:
    model = Fixed({"person": 0.5, "place": 0.4, "thing": 0.1})
    made = PromptDecomposer(Template("[X] In it, {span} is a [Z] entity"), Verbalizer.of(
        {"PER": "person", "LOC": "place", "O": "thing"}), spans(2))
    model.table = {f"{k} entity": v for k, v in model.table.items()}
    found = made.run(Example({"text": "Mary saw Mary, {span}"}), model)
    assert [p["span"] for p, _, _ in found] == ["Mary", "Mary saw", "saw", "saw Mary", "Mary span", "span"]
    assert model.seen[0] == "Mary saw Mary, {span} In it, Mary is a"  # a slot in the text is text
    assert all(label == "PER" and math.exp(v) == pytest.approx(0.5) for _, label, v in found)
    with pytest.raises(ValueError, match="split: expected one part or more"):
        made.run(Example({"text": "..."}), model)
    with pytest.raises(ValueError, match="which the example has too"):
        PromptDecomposer(made.template, made.verbalizer, lambda e: [{"text": "x"}]).run(X, model)
    with pytest.raises(ValueError, match="longest: expected an integer >= 1, got 0"):
        spans(0)


# -- pools --------------------------------------------------------------------------------------------------------

def test_the_pool_shows_the_example_and_names_the_answers() -> None:
    task = toy_task()
    pool = default_pool(task)
    assert len(pool) >= 6 and len(set(pool)) == len(pool)
    assert pool[0].to_prompt().render(task.dev[0]) == TextPrompt.for_task(task).render(task.dev[0])
    for template in pool:
        assert task.dev[0].inputs["text"] in template.to_prompt().render(task.dev[0]) and template.shape == "prefix"
    assert "positive" in pool[1].text and "negative" in pool[1].text
    assert len(default_pool(toy_task(generation=True))) >= 6


def test_mining_by_hand() -> None:
    corpus = ["Paris is the capital of France.", "Rome is the capital of Italy.", "France, whose capital is Paris",
              "France Paris", "Parish is the capital of France", "France { [X] Paris"]
    found = mine_templates(corpus, [("France", "Paris"), ("Italy", "Rome")])
    assert found[0].text == "[Z] is the capital of [X]"
    assert {t.text for t in found[1:]} == {"[X], whose capital is [Z]", r"[X] { \[X] [Z]"}
    assert mine_templates(corpus, [("France", "Paris")], longest=2) == [Template(r"[X] { \[X] [Z]")]
    with pytest.raises(ValueError, match="expected one pair of two texts or more"):
        mine_templates(corpus, [])


def test_paraphrases_keep_the_slots() -> None:
    template = Template("Say what is felt here.\n[X]\nSo:[Z]")
    made = paraphrase(template, ToyLanguageModel(), 5, seed=2)
    assert len(made) == 5 == len(set(made))
    for one in made:
        assert one.inputs == ("text",) and one.shape == "prefix" and one.text.endswith("\n[X]\nSo:[Z]")
    assert made == paraphrase(template, ToyLanguageModel(), 5, seed=2) != paraphrase(template, ToyLanguageModel(), 5)
    with pytest.raises(ValueError, match="expected words of its own"):
        paraphrase(Template("[X]: [Z]"), ToyLanguageModel(), 1)
    with pytest.raises(ValueError, match="expected count >= 1 and temperature > 0"):
        paraphrase(template, ToyLanguageModel(), 1, temperature=0.0)

    class Silent(ToyLanguageModel):
        def generate(self, prompts: list[str], *options: Any, **more: Any) -> list[str]:
            return [" [X] {text}" for _ in prompts]

    assert paraphrase(template, Silent(), 2)[0].inputs == ("text",)  # slots that the model makes up are text


# -- the map ------------------------------------------------------------------------------------------------------

ALLOWED = {
    "lm": {"left-to-right", "masked", "encoder-decoder", "vision-language"},
    "shape": {"cloze", "prefix"},
    "engineering": {"manual", "mining", "paraphrasing", "gradient search", "edit search", "reinforcement learning",
                    "generation", "scoring", "continuous", "discrete initialisation", "hybrid"},
    "answer_shape": {"token", "span", "sentence"},
    "answers": {"manual", "search", "continuous"},
    "tuning": set(STRATEGIES),
    "multi_prompt": {"ensembling", "augmentation", "composition", "decomposition", "sharing"},
}


def test_the_map_is_sound() -> None:
    table = typology()
    assert table.columns == list(COLUMNS) and len(table.rows) >= 60
    names = [row[0] for row in table.rows]
    assert len(set(names)) == len(names)
    identifiers = [row[3] for row in table.rows if row[3]]
    assert len(set(identifiers)) == len(identifiers)
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        year = cells["year"]
        assert isinstance(year, int) and 2018 <= year <= 2022
        assert cells["arxiv"] is None or str(cells["arxiv"]).startswith(f"{year - 2000:02d}")
        assert cells["cite"] and cells["task"]
        for column, allowed in ALLOWED.items():
            if cells[column]:
                assert set(str(cells[column]).split("; ")) <= allowed, (cells["name"], column, cells[column])
    shown = {part for row in table.rows for part in str(row[-1] or "").split("; ") if part}
    assert shown == ALLOWED["multi_prompt"]  # every way of several prompts has a method


def test_the_map_is_queryable() -> None:
    rows = typology(tuning="fixed-LM prompt tuning", year=2021).rows
    assert "Prefix-Tuning" in [r[0] for r in rows] and "PET-TC" not in [r[0] for r in rows]
    assert len(typology().rows) > len(rows) > 5
    assert TemplateEnsemble.table().rows == typology().rows
    with pytest.raises(ValueError, match="Did you mean 'tuning'"):
        typology(tunning="x")


def test_the_map_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from looseleaf.cli.main import main

    assert main(["info", "prompting-survey", "--table", "--where", "tuning=fixed-LM prompt tuning"]) == 0
    out = capsys.readouterr().out
    assert "Prompt-Tuning" in out and "LAMA" not in out
