"""Tasks, statistics, scoring and tuning, and what bad input says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from looseleaf.testing.common import mixed_modes
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_prior_distribution import (
    Instance,
    PriorProbe,
    PriorTask,
    Tuned,
    acronym,
    answer_scores,
    counting,
    layer_prior_correlation,
    lens_scores,
    locate,
    middle_word,
    mitigate,
    priors,
    reversal,
    scaling,
    shift_cipher,
    split_by_answer,
)
from looseleaf_prior_distribution.answers import RIDGE, bins, correlation, logistic, resample, slope
from looseleaf_prior_distribution.tasks import FIRST, NUMBERS, TASKS, WORDS, generate
from looseleaf_prior_distribution.tuning import _packs
from looseleaf_text import LocalModel, LogitLens


def local(model: Any = None, tokenizer: Any = None) -> LocalModel:
    return LocalModel(model or tiny_text_llama(), tokenizer or tiny_tokenizer())


# ---------------------------------------------------------------------------------------------------------- tasks

def test_generators_ask_what_they_say() -> None:
    for seed in range(3):
        for i in counting(30, seed=seed).instances:
            assert NUMBERS[len(i.text.split()) - 1] == i.answer and i.size == len(i.text.split())
        for i in acronym(30, seed=seed).instances:
            assert [w[0] for w in i.text.split()] == i.answer.split()
        for i in shift_cipher(30, seed=seed, shift=3).instances:
            assert [chr((ord(c) - 97 - 3) % 26 + 97) for c in i.text.split()] == i.answer.split()
        for i in reversal(30, seed=seed).instances:
            assert i.text.split()[::-1] == i.answer.split()
        for i in middle_word(30, seed=seed).instances:
            assert i.text.split()[1] == i.answer
    assert all(FIRST.values()) and len(set(WORDS)) == len(WORDS) > 150 and all(len(w) == 3 for w in WORDS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_generators_are_seeded_and_even(name: str) -> None:
    one = generate(name, 50, seed=4)
    assert one == generate(name, 50, seed=4) != generate(name, 50, seed=5)
    counts = [sum(i.answer == a for i in one.instances) for a in one.answers]
    assert max(counts) - min(counts) <= 1 and len(one.instances) == 50
    if name != "counting":  # eight numbers are too few to keep the demonstrations' answers out
        assert not {d.answer for d in one.demonstrations} & set(one.answers)


def test_prompts() -> None:
    task = PriorTask("t", (Instance("a a", "two"),), ("one", "two"), demonstrations=(Instance("b", "one"),),
                     instruction="Think. ")
    assert task.prompt(task.instances[0]) == "b -> one\na a ->"
    assert task.prompt(task.instances[0], instructed=True) == "Think. b -> one\na a ->"
    assert task.uninformative() == "b -> one\n->"
    assert task.continuation("two") == " two"
    asked = dataclasses.replace(task, template="Q: {input}\nA:", end="\n", demonstrations=())
    assert asked.uninformative() == "Q:\nA:" and asked.continuation("two") == " two\n"
    assert asked.line(task.instances[0]) == "Q: a a\nA: two\n"
    assert dataclasses.replace(asked, end=".").line(task.instances[0]) == "Q: a a\nA: two.\n"


def test_tasks_as_text() -> None:
    task = acronym(6, seed=1)
    assert PriorTask.from_json(task.to_json()) == task
    small = PriorTask.from_json('{"name": "x", "instances": [{"text": "a", "answer": "b"}], "answers": ["b", "c"]}')
    assert small.template == "{input} ->"
    for text, words in (("nonsense", "expected a task in JSON"),
                        ('{"name": "x", "instances": [], "anwsers": []}', "Did you mean"),
                        ('{"name": "x", "instances": [{"question": 1}], "answers": ["a", "b"]}',
                         "expected instances with"),
                        ("[1]", "expected a task with the fields")):
        with pytest.raises(ValueError, match=words):
            PriorTask.from_json(text)


def test_bad_tasks() -> None:
    good = acronym(6)
    with pytest.raises(ValueError, match=r"expected each answer once.*'one'"):
        PriorTask("t", (Instance("a", "one"),), ("one", "two", "one"))
    with pytest.raises(ValueError, match=r"in the answer space of 2, got 'tow'.*Did you mean 'two'"):
        PriorTask("t", (Instance("a", "tow"),), ("one", "two"))
    for changes, words in (({"instances": ()}, "expected one instance"), ({"answers": ("x",)}, "expected two answers"),
                           ({"template": "->"}, r"a template with \{input\} once")):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(good, **changes)  # type: ignore[arg-type]
    for call, words in ((lambda: generate("acronyms", 3), "Did you mean 'acronym'"),
                        (lambda: counting(0), "instances=0"),
                        (lambda: counting(most=21), r"most: expected an integer in \[2, 20\], got 21"),
                        (lambda: acronym(answers=3), "answers: expected 4 or more, got 3"),
                        (lambda: acronym(answers=9999), "9999 answers"),
                        (lambda: middle_word(answers=9999), "got 9999"),
                        (lambda: shift_cipher(shift=26), r"expected an integer in \[1, 25\], got 26")):
        with pytest.raises(ValueError, match=words):
            call()


def test_split_has_disjoint_answers_and_like_priors() -> None:
    task = acronym(96, answers=48, seed=2)
    rng = np.random.default_rng(0)
    prior = {a: float(v) for a, v in zip(task.answers, rng.normal(size=48), strict=True)}
    train, test = split_by_answer(task, prior, held_out=0.25, seed=3)
    assert not set(train.answers) & set(test.answers) and len(test.answers) == 12 and len(train.answers) == 36
    assert {i.answer for i in test.instances} == set(test.answers)
    assert not {i.answer for i in train.instances} & set(test.answers)
    assert len(train.instances) + len(test.instances) == 96
    # one test answer from each twelfth of the ranking
    ranked = sorted(task.answers, key=prior.__getitem__)
    assert [sum(a in test.answers for a in ranked[k:k + 4]) for k in range(0, 48, 4)] == [1] * 12
    assert (train, test) == split_by_answer(task, prior, held_out=0.25, seed=3)
    assert test != split_by_answer(task, prior, held_out=0.25, seed=4)[1]
    for arguments, words in (({"held_out": 0.6}, "got 0.6"), ({"held_out": 0.01}, "fewer than two")):
        with pytest.raises(ValueError, match=words):
            split_by_answer(task, prior, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one for each answer"):
        split_by_answer(task, {})


# ----------------------------------------------------------------------------------------------------- statistics

def test_logistic_is_the_minimum() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 2))
    y = (rng.random(40) < 1 / (1 + np.exp(-x[:, 0]))).astype(float)
    weights = rng.integers(0, 3, (3, 40)).astype(float)

    def objective(b: np.ndarray, w: np.ndarray) -> float:
        z = b[0] + x @ b[1:]
        return float((w * (np.logaddexp(0, z) - y * z)).sum() + 0.5 * RIDGE * (b[1:] ** 2).sum() + 5e-7 * b[0] ** 2)

    for w, found in zip(weights, logistic(x, y, weights), strict=True):
        np.testing.assert_allclose(found, minimize(objective, np.zeros(3), (w,), tol=1e-12).x, atol=1e-4)
    separable = logistic(np.linspace(-1, 1, 20)[:, None], (np.arange(20) >= 10).astype(float))
    assert np.isfinite(separable).all() and separable[0, 1] > 5
    assert np.isfinite(logistic(x, np.ones(40))).all()


def test_slope_and_its_interval() -> None:
    rng = np.random.default_rng(2)
    prior = np.repeat(rng.normal(size=40), 5)
    answers = np.repeat(np.arange(40), 5).tolist()
    risen = (rng.random(200) < 1 / (1 + np.exp(-2 * prior))).astype(float)
    found = slope(prior, risen, answers)
    assert found.positive and found.low < 2 < found.high and not found.covers_zero
    flat = slope(prior, (rng.random(200) < 0.5).astype(float), answers)
    assert flat.covers_zero and not flat.positive
    assert slope(prior, np.ones(200), answers).value == pytest.approx(0, abs=1e-6)
    # what difficulty explains is not put down to the prior
    size = -prior + 0.1 * rng.normal(size=200)
    hard = (rng.random(200) < 1 / (1 + np.exp(3 * size))).astype(float)
    assert slope(prior, hard, answers).positive and slope(prior, hard, answers, size).covers_zero
    with pytest.raises(ValueError, match="equally many"):
        slope([1.0], [1.0], ["a"])


def test_resampling_draws_whole_answers() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    drawn = resample(groups, 50, 0)
    for name in "abc":
        rows = drawn[:, [g == name for g in groups]]
        assert (rows == rows[:, :1]).all()
    assert (drawn[:, 0] + drawn[:, 1] + drawn[:, 3] == 3).all()


def test_bins_and_correlation() -> None:
    assert bins([3.0, 1.0, 2.0, 4.0], [[1, 0, 0, 1]], 2) == [(1.5, 2, [0.0]), (3.5, 2, [1.0])]
    assert len(bins([1.0, 2.0], [[1, 0]], 5)) == 2
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and correlation([1, 1, 1], [1, 2, 3]) == 0
    assert correlation([0.1 + 1e-17 * k for k in range(5)], range(5)) == 0
    values = np.array([[1.0, 2, 3], [3, 2, 1], [0, 0, 0]])
    np.testing.assert_allclose(layer_prior_correlation(values, [1.0, 2, 3]), [1, -1, 0])
    with pytest.raises(ValueError, match=r"got \(3, 3\) and 2"):
        layer_prior_correlation(values, [1.0, 2])


def test_located_layers_are_where_the_correlation_rises() -> None:
    assert locate([0.0, 0.1, 0.5, 0.4, 0.7], 2) == [2, 4]
    assert locate([0.6, 0.6, 0.6], 1) == [0]
    assert locate([0.0, 0.2, 0.4], 1) == [1]
    with pytest.raises(ValueError, match=r"count: expected an integer in \[1, 3\].*got 4"):
        locate([0, 0, 0], 4)


# -------------------------------------------------------------------------------------------------------- scoring

def test_the_last_layer_is_the_models_own_likelihood() -> None:
    model = local()
    task = acronym(7, answers=6, demonstrations=2)
    rights = [i.answer for i in task.instances]
    own = model.score([task.prompt(i) for i in task.instances], [[task.continuation(a)] for a in rights])
    tokens = [len(model.tokenize(task.continuation(a))) for a in rights]
    assert min(tokens) > 1  # answers of several tokens
    found = lens_scores(model, LogitLens(model.model), task, rights, batch=3)
    np.testing.assert_allclose(found[-1], [row[0] / n for row, n in zip(own, tokens, strict=True)], atol=1e-4)
    whole = lens_scores(model, LogitLens(model.model), task, rights, batch=4, share=False)
    np.testing.assert_allclose(found, whole, atol=1e-4)


def test_a_tokenizer_without_padding() -> None:
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert bare.pad_token_id is None
    probe = PriorProbe(tasks=("counting",), instances=5, demonstrations=1, scaled=3, layers=1)
    model = tiny_text_llama()
    with_, without = (probe.run((model, t), progress=False).to_json() for t in (tiny_tokenizer(), bare))
    assert with_ == without
    task = acronym(4, answers=6, demonstrations=0)
    one, two = (mitigate(model, t, task, [0], epochs=1).weights for t in (tiny_tokenizer(), bare))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_answers_of_the_same_tokens() -> None:
    task = PriorTask("t", (Instance("a", "x"),), ("x", "é", "ü"))
    with pytest.raises(ValueError, match="'é' and 'ü' have the same tokens"):
        priors(local(), task)


def test_a_model_without_a_final_norm() -> None:
    model = tiny_text_llama()
    model.model.final_normalization, model.model.norm = model.model.norm, None
    with pytest.raises(ValueError, match=r"no final norm.*Near names are model\.final_normalization"):
        PriorProbe(instances=4).run((model, tiny_tokenizer()), progress=False)


# --------------------------------------------------------------------------------------------------------- tuning

def test_packs_train_on_the_answers_alone() -> None:
    import random

    model = local()
    task = acronym(7, answers=6, demonstrations=2)
    packs = _packs(model, task, 3, random.Random(0))
    assert len(packs) == 3
    learned, shown = "", ""
    for ids, targets in packs:
        places = (targets != -100).nonzero()[:, 0]
        assert torch.equal(ids[places[places + 1 < len(ids)] + 1], targets[places[places + 1 < len(ids)]])
        learned += model.detokenize(targets[places].tolist())
        shown += model.detokenize(ids.tolist())
    assert sorted(learned.replace(" ", "")) == sorted("".join(i.answer for i in task.instances).replace(" ", ""))
    assert not any(d.text in shown for d in task.demonstrations)


def test_tuning_learns_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model, tokenizer = mixed_modes(tiny_text_llama()), tiny_tokenizer()
    model.model.embed_tokens.weight.grad = torch.ones_like(model.model.embed_tokens.weight)
    model.lm_head.weight.requires_grad_(False)
    before, modes = {n: p.detach().clone() for n, p in model.state_dict().items()}, {
        n: m.training for n, m in model.named_modules()}
    task = reversal(12, answers=6, demonstrations=1)
    tuned = mitigate(model, tokenizer, task, [-1], epochs=6, lr=3e-3, pack=4)
    assert tuned.info["layers"] == [1] and tuned.info["loss"][-1] < tuned.info["loss"][0]
    assert set(tuned.weights) == {n for n, _ in model.named_parameters() if n.startswith("model.layers.1.")}
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert {n: m.training for n, m in model.named_modules()} == modes and not model.lm_head.weight.requires_grad
    assert torch.equal(model.model.embed_tokens.weight.grad, torch.ones_like(model.model.embed_tokens.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if "embed" not in n)
    again = mitigate(model, tokenizer, task, [1], epochs=6, lr=3e-3, pack=4)
    assert all(torch.equal(tuned.weights[n], again.weights[n]) for n in tuned.weights)
    with pytest.raises(ZeroDivisionError), tuned.apply(model):
        changed = [n for n, p in model.state_dict().items() if not torch.equal(before[n], p)]
        assert changed and all(n in tuned.weights for n in changed)
        raise ZeroDivisionError
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    path = tmp_path / "tuned.safetensors"
    tuned.save(path)
    loaded = Tuned.load(path)
    assert loaded.info == tuned.info and all(torch.equal(loaded.weights[n], tuned.weights[n]) for n in tuned.weights)
    loaded.bake(model)
    assert all(torch.equal(dict(model.named_parameters())[n], w) for n, w in tuned.weights.items())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Tuned.load(path)


def test_bad_tuning() -> None:
    model, tokenizer, task = tiny_text_llama(), tiny_tokenizer(), counting(4, demonstrations=0)
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    for layers, arguments, words in (
            ([], {}, "expected one layer or more"), ([2], {}, "layers: expected -2 to 1, got 2"),
            ([0], {"epochs": 0}, "epochs=0"),
            ([0], {"lr": float("nan")}, "lr=nan"), ([0], {"lr": 1e30, "epochs": 9}, "choose a smaller lr")):
        with pytest.raises(ValueError, match=words):
            mitigate(model, tokenizer, task, layers, pack=1, **arguments)  # type: ignore[arg-type]
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    with pytest.raises(ValueError, match=r"torch\.bfloat16, where small steps are lost"):
        mitigate(tiny_text_llama().bfloat16(), tokenizer, task, [0])
    with pytest.raises(ValueError, match=r"tuned in another model: nothing has shape \(2,\)"), \
            Tuned({"nothing": torch.ones(2)}).apply(model):
        pass


# ---------------------------------------------------------------------------------------------------------- probe

def test_bad_input_of_the_probe() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match="the model's tokenizer"):
        PriorProbe().run(model)
    with pytest.raises(ValueError, match=r"data: expected .*got int"):
        PriorProbe().run((model, tokenizer), 3)
    with pytest.raises(ValueError, match="expected a task in JSON"):
        PriorProbe().run((model, tokenizer), "some text")
    with pytest.raises(ValueError, match=r"PriorProbe\.tasks: expected one or more of counting.*got \('count',\)"):
        PriorProbe(tasks=("count",))
    for name, value in (("alpha", 1.5), ("layers", 0), ("part", "all"), ("bins", 0), ("scaled", 1)):
        with pytest.raises(ValueError, match=rf"PriorProbe\.{name}: expected"):
            PriorProbe(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha=2"):
        scaling(local(), counting(2), dict.fromkeys(NUMBERS[:8], 0.0), 2)


def test_a_task_of_ones_own_as_object_and_as_text() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    task = PriorTask("capitals", (Instance("France", "Paris"), Instance("Peru", "Lima")), ("Paris", "Lima", "Rome"))
    probe = PriorProbe(layers=1)
    one = probe.run((model, tokenizer), task, progress=False)
    assert one.to_json() == probe.run((model, tokenizer), task.to_json(), progress=False).to_json()
    assert one.to_json() == probe.run((model, tokenizer), [task], progress=False).to_json()
    assert answer_scores(LocalModel(model, tokenizer), task).shape == (2, 3)
