"""Verbalizers, calibration, ensembles, masked models and soft prompts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from looseleaf import Budget, Example
from looseleaf.errors import UnsupportedModelError
from looseleaf_text import (
    CalibratedPrompt,
    ClozePrompt,
    EnsemblePrompt,
    RetrievedPrompt,
    SoftPrompt,
    Template,
    TextPrompt,
    TextTask,
    Verbalizer,
    calibrate,
)
from looseleaf_text.calibration import content_free, offsets, subtract
from looseleaf_text.ensemble import combine, most_voted
from looseleaf_text.soft import keys_and_values, soft_prefix
from looseleaf_text.testing import ToyLanguageModel, toy_task

ANSWERS = {"good": [" fine", " lovely"], "bad": [" awful"]}


# -- verbalizer ---------------------------------------------------------------------------------------------------

def test_answers_are_mapped_to_labels() -> None:
    verbalizer = Verbalizer.of(ANSWERS)
    assert verbalizer.space == [" fine", " lovely", " awful"] and verbalizer.label_of(" lovely") == "good"
    with pytest.raises(ValueError, match="not in the answer space"):
        verbalizer.label_of("fine")


@pytest.mark.parametrize(("aggregation", "good", "bad"), [
    ("sum", 0.6, 0.4), ("mean", 0.3 / 0.7, 0.4 / 0.7), ("max", 0.5 / 0.9, 0.4 / 0.9)])
def test_aggregation_by_hand(aggregation: Any, good: float, bad: float) -> None:
    # half of the model's probability is on answers that are not in Z: normalising takes that out
    rows = Verbalizer.of(ANSWERS, aggregation).log_probs([[math.log(p / 2) for p in (0.1, 0.5, 0.4)]])
    assert [math.exp(v) for v in rows[0]] == pytest.approx([good, bad])


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max"])
def test_probabilities_sum_to_one(aggregation: Any) -> None:
    for row in ([-1.0, -2.0, -3.0], [-800.0, -900.0, -1000.0], [0.0, -1e4, -1e4], [-math.inf, -math.inf, -1.0]):
        found = Verbalizer.of(ANSWERS, aggregation).log_probs([row])[0]
        assert sum(map(math.exp, found)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("answers", "message"), [
    ({"good": [" a"]}, "expected two labels or more"),
    ({"good": [], "bad": [" b"]}, "'good': expected a list of one answer or more"),
    ({"good": " a", "bad": " b"}, "Verbalizer.of takes single texts"),
    ({"good": ["  "], "bad": [" b"]}, "has no tokens"),
    ({"good": [" a"], "bad": [" b", " a"]}, "stands for 'good' and for 'bad'"),
    ({"good": [" a", " a"], "bad": [" b"]}, "'good' has the answer ' a' twice"),
])
def test_verbalizers_nobody_can_use(answers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Verbalizer(answers)


def test_bad_aggregation_and_scores() -> None:
    with pytest.raises(ValueError, match="expected 'sum', 'mean' or 'max', got 'median'"):
        Verbalizer.of(ANSWERS, "median")  # type: ignore[arg-type]
    for row in ([-1.0] * 2, [-1.0] * 4):
        with pytest.raises(ValueError, match=f"expected one score for each of the answers .*, got {len(row)}"):
            Verbalizer.of(ANSWERS).log_probs([row])


def test_answers_without_tokens_under_this_model() -> None:
    class Mute(ToyLanguageModel):
        def tokenize(self, text: str) -> list[int]:
            return [] if text == " lovely" else super().tokenize(text)

    Verbalizer.of(ANSWERS).validate(ToyLanguageModel())
    with pytest.raises(ValueError, match="'good' has the answer ' lovely', which has no tokens"):
        Verbalizer.of(ANSWERS).validate(Mute())


def test_a_prompt_may_have_a_verbalizer_of_its_own() -> None:
    task, model = toy_task(), ToyLanguageModel()
    plain = TextPrompt.for_task(task)
    single = dataclasses.replace(plain, labels=Verbalizer.of({k: (task.labels or {})[k] for k in
                                                              ("negative", "positive")}))
    assert task.evaluate(single.on(model), "dev").predictions == task.evaluate(plain.on(model), "dev").predictions
    row = task.class_scores(single.on(model), task.dev[:1])[0]
    assert sum(map(math.exp, row)) == pytest.approx(1.0)
    # its labels come in another order, which the task puts right
    assert single.on(model).scores(task.dev[:1])[0] == row[::-1]
    for labels in (Verbalizer.of(ANSWERS), None):
        with pytest.raises(ValueError, match=r"exactly the classes \['positive', 'negative'\]"):
            task.class_scores(dataclasses.replace(plain, labels=labels).on(model), task.dev)
    with pytest.raises(ValueError, match=r"TextPrompt\.labels: expected label -> answer, got None"):
        dataclasses.replace(plain, labels=None).on(model).scores(task.dev)


# -- calibration --------------------------------------------------------------------------------------------------

def test_offsets_by_hand() -> None:
    assert offsets([[math.log(0.2), math.log(0.6)]]) == pytest.approx([math.log(0.25), math.log(0.75)])
    rows = [[math.log(0.2), math.log(0.6)], [math.log(0.9), math.log(0.1)]]
    assert [math.exp(v) for v in offsets(rows)] == pytest.approx([(0.25 + 0.9) / 2, (0.75 + 0.1) / 2])
    assert subtract([[1.0, 2.0]], [0.5, -1.0]) == [[0.5, 3.0]]
    assert [e.inputs for e in content_free(["a", "b"], ["N/A", ""])] == [{"a": "N/A", "b": "N/A"}, {"a": "", "b": ""}]
    for bad in ("N/A", []):
        with pytest.raises(ValueError, match="inputs: expected a list of one text or more, got"):
            content_free(["a"], bad)


def test_calibrated_prompts_are_neutral_without_content() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = calibrate(TextPrompt.for_task(task), task, model, ["N/A"])
    row = task.class_scores(prompt.on(model), [Example({"text": "N/A"})])[0]
    assert row[0] == pytest.approx(row[1])
    assert calibrate(prompt, task, model, ["N/A"]) == prompt  # not on top of itself
    both: Any = calibrate(EnsemblePrompt([TextPrompt.for_task(task), TextPrompt.for_task(task, "Well.")]), task, model)
    assert [len(m.offsets) for m in both.members] == [2, 2]
    assert prompt.render(task.dev[0]) == TextPrompt.for_task(task).render(task.dev[0])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected labels"):
        calibrate(prompt, toy_task(generation=True), model)
    with pytest.raises(ValueError, match="expected one for each of the classes"):
        CalibratedPrompt(TextPrompt.for_task(task), [0.5]).on(model)


def test_offsets_follow_the_labels_of_the_prompt() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = TextPrompt.for_task(task)
    turned = dataclasses.replace(prompt, labels=dict(reversed((task.labels or {}).items())))
    one, other = (task.class_scores(calibrate(p, task, model).on(model), task.dev) for p in (prompt, turned))
    assert one == other


# -- ensembles ----------------------------------------------------------------------------------------------------

def log(*values: float) -> list[float]:
    return [math.log(v) for v in values]


def test_members_are_averaged_or_vote() -> None:
    members = [[log(0.9, 0.1)], [log(0.4, 0.6)], [log(0.3, 0.7)]]
    mixed = combine(members)[0]
    assert [math.exp(v) for v in mixed] == pytest.approx([1.6 / 3, 1.4 / 3])
    assert [math.exp(v) for v in combine(members, [2, 1, 1])[0]] == pytest.approx([2.5 / 4, 1.5 / 4])
    voted = combine(members, vote=True)[0]
    assert voted[1] > voted[0] and math.exp(voted[1]) == pytest.approx(2 / 3, abs=1e-4)
    tie = combine(members[:2], vote=True)[0]
    assert tie[0] > tie[1]  # the mean probability decides
    # unnormalised members count no more than others
    assert combine([[[v + 50 for v in log(0.9, 0.1)]], *members[1:]])[0] == pytest.approx(mixed)
    assert sum(map(math.exp, combine([[[0.0, -2000.0]]] * 2, vote=True)[0])) == pytest.approx(1.0)


def test_generated_texts_are_voted_on() -> None:
    assert most_voted(["Paris", " paris ", "Rome"]) == "Paris"
    assert most_voted(["Rome", "Paris"]) == "Rome"
    assert most_voted(["Rome", "Paris"], [1, 2]) == "Paris"
    task, model = toy_task(generation=True), ToyLanguageModel()
    members = [TextPrompt.for_task(task, text) for text in ("One.", "Other words.", "Third one here.")]
    said = [m.on(model).predict(task.dev) for m in members]
    whole = task.evaluate(EnsemblePrompt(members=members).on(model), "dev")
    assert whole.predictions == [most_voted(texts) for texts in zip(*said, strict=True)]


def test_an_ensemble_of_one_is_that_one() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = TextPrompt.for_task(task, "Judge it.")
    one = task.evaluate(prompt.on(model), "dev")
    assert task.evaluate(EnsemblePrompt(members=[prompt]).on(model), "dev").predictions == one.predictions
    two = EnsemblePrompt(members=[TextPrompt.for_task(task), prompt], weights=[0, 1])
    assert task.evaluate(two.on(model), "dev").predictions == one.predictions
    assert two.render(task.dev[0]) == prompt.render(task.dev[0])
    orders = EnsemblePrompt([prompt, dataclasses.replace(prompt, labels=dict(reversed((task.labels or {}).items())))])
    assert task.evaluate(orders.on(model), "dev").predictions == one.predictions


@pytest.mark.parametrize(("fields", "message"), [
    ({"combine": "sum"}, "expected 'average' or 'vote', got 'sum'"),
    ({"members": []}, "expected one prompt or more, got none"),
    ({"weights": [1.0, 1.0]}, "expected one number >= 0 for each of 1 prompts"),
    ({"weights": [-1.0]}, "expected one number >= 0"),
    ({"weights": [0.0]}, "not all of them 0"),
    ({"weights": [math.nan]}, "expected one number >= 0"),
])
def test_ensembles_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsemblePrompt(**{"members": [TextPrompt()], **fields})
    other = TextPrompt(labels={"x": "x", "y": "y"})
    with pytest.raises(ValueError, match="expected prompts of the same classes"):
        EnsemblePrompt([TextPrompt.for_task(toy_task()), other]).on(ToyLanguageModel())


# -- exemplars for each example -----------------------------------------------------------------------------------

def test_the_nearest_examples_are_shown_the_nearest_last() -> None:
    task, model = toy_task(), ToyLanguageModel()
    pool = [Example({"text": text}, "positive") for text in ("a a", "a b", "b b", "c")]
    shown = TextPrompt.for_task(dataclasses.replace(task, template="{text}", answer_prefix="="))
    budget = Budget()
    predictor = RetrievedPrompt(shown, pool, shots=2).on(budget.meter(model))
    one, other = predictor.resolve([Example({"text": "b b b a"}), Example({"text": "a a"})])
    assert [e.inputs["text"] for e in one.exemplars] == ["a b", "b b"]
    assert [e.inputs["text"] for e in other.exemplars] == ["b b", "a b"]  # never itself
    assert budget.used["calls"] == len(pool) + 2
    predictor.scores(task.dev[:3])
    assert budget.used["calls"] == len(pool) + 2 + 3 + 3  # the pool is embedded once
    assert set(predictor.predict(task.dev)) <= {"positive", "negative"}
    free = dataclasses.replace(shown, labels=None)
    assert len(RetrievedPrompt(free, pool, shots=1).on(model).predict(task.dev)) == len(task.dev)
    for shots in (0, 5, 1.5):
        with pytest.raises(ValueError, match=r"RetrievedPrompt\.shots: expected an integer in \[1, 4\]"):
            RetrievedPrompt(shown, pool, shots)  # type: ignore[arg-type]


# -- cloze --------------------------------------------------------------------------------------------------------

def test_a_causal_model_scores_the_answer_and_what_follows() -> None:
    model = ToyLanguageModel()
    assert model.score_cloze(["a b"], [[" c", " d"]], [" e"]) == model.score(["a b"], [[" c e", " d e"]])
    budget = Budget(calls=2, tokens=6)
    budget.meter(model).score_cloze(["a b"], [[" c", " d"]], [" e"])
    assert budget.used["calls"] == 1 and budget.used["tokens"] == 4


torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
WORDS = ["i", "love", "hate", "it", "film", "was", "a", "great", "bad", "very", "the", ".", ",", "lovely", "movie"]


def masked_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {w: n for n, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2),
                                                                                               ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]")


def masked_model(**options: Any) -> Any:
    from looseleaf_text import MaskedModel

    torch.manual_seed(0)
    network = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, initializer_range=0.5)).eval()
    return MaskedModel(network, masked_tokenizer(), **options)


def test_pseudo_likelihood_is_the_sum_over_masked_tokens() -> None:
    model = masked_model()
    got = model.score_cloze(["i love it ."], [["very great", "bad"]], [" film ."])[0]
    for answer, value in zip(("very great", "bad"), got, strict=True):
        ids = torch.tensor(model.tokenizer(f"i love it . {answer} film .")["input_ids"])
        begin = 1 + len(model.tokenize("i love it ."))
        total = 0.0
        for place in range(begin, begin + len(model.tokenize(answer))):
            masked = ids.clone()
            masked[place] = model.tokenizer.mask_token_id
            with torch.no_grad():
                logits = model.model(masked[None]).logits[0, place].double()
            total += float(logits.log_softmax(-1)[ids[place]])
        assert value == pytest.approx(total, abs=1e-5)
    assert model.calls == 1


def test_batches_and_padding_change_nothing() -> None:
    prompts = ["i love it", "it was a very very bad film . it", ""]
    answers = [["great", "very bad"], ["lovely"], ["i love it ."]]
    whole = masked_model().score(prompts, answers)
    one = masked_model(batch_tokens=1).score(prompts, answers)
    assert [v for row in whole for v in row] == pytest.approx([v for row in one for v in row], abs=1e-5)


def test_a_cloze_task_on_a_masked_model() -> None:
    task = TextTask("films", [Example({"text": "i love it"}, "good"), Example({"text": "i hate it"}, "bad")],
                    test=[Example({"text": "i love the film"}, "good"), Example({"text": "i hate the movie"}, "bad")],
                    labels={"good": "great", "bad": "bad"})
    model = masked_model()
    task.validate(model)
    prompt = Template("[X] . it was a [Z] film .").to_prompt({"good": ["great", "very lovely"], "bad": "bad"})
    rows = task.class_scores(calibrate(prompt, task, model).on(model), task.test)
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row)
    plain = task.class_scores(prompt.on(model), task.test)
    assert sum(map(math.exp, plain[0])) == pytest.approx(1.0)
    # what follows the answer is seen: other words there, other scores
    assert isinstance(prompt, ClozePrompt)
    other = dataclasses.replace(prompt, suffix=" movie , lovely .")
    assert task.class_scores(other.on(model), task.test) != plain
    assert model.embed(["i love it", "film"]).shape == (2, 16)
    budget = Budget(calls=100, tokens=100)
    task.class_scores(prompt.on(budget.meter(model)), task.test)
    assert budget.used["calls"] == 2


def test_what_a_masked_model_refuses() -> None:
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
    from looseleaf_text import MaskedModel

    model = masked_model()
    with pytest.raises(UnsupportedModelError, match="does not continue"):
        model.generate(["a"], 3)
    with pytest.raises(ValueError, match="has no tokens"):
        model.score(["it was"], [[" "]])
    with pytest.raises(ValueError, match="at most 40 positions"):
        model.score(["very " * 50], [["bad"]])
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        model.score_cloze(["a"], [["b"], ["c"]], [""])
    with pytest.raises(ValueError, match="without: a causal"):
        MaskedModel(tiny_text_llama(), tiny_tokenizer())
    with pytest.raises(ValueError, match="batch_tokens: expected an integer >= 1, got 0"):
        MaskedModel(model.model, model.tokenizer, 0)
    with pytest.raises(ValueError, match="training mode"):
        model.model.train()
        model.score(["it was"], [["bad"]])


# -- sequence likelihood ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["Text: [X]\nLabel: [Z]", "[X] It was [Z], they say."])
def test_the_likelihood_of_an_answer_is_the_sum_over_its_tokens(text: str) -> None:
    model = local()
    template, answers = Template(text), ["rather good", "bad"]
    prompt = template.to_prompt({"good": answers[0], "bad": answers[1]})
    examples = [Example({"text": "a fine day"}), Example({"text": "no"})]
    rows = prompt.on(model).answer_scores(examples, prompt.labels.space)  # type: ignore[union-attr]
    for example, row in zip(examples, rows, strict=True):
        before = template.around(example)[0].rstrip(" ")
        for answer, value in zip(answers, row, strict=True):
            ids = model.tokenize(template.fill(example, answer).filled)
            total = 0.0
            for n in range(len(model.tokenize(before)), len(ids)):
                with torch.no_grad():
                    logits = model.model(torch.tensor([ids[:n]])).logits[0, -1].double()
                total += float(logits.log_softmax(-1)[ids[n]])
            assert value == pytest.approx(total, abs=1e-3)


# -- soft prompts -------------------------------------------------------------------------------------------------

def local() -> Any:
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
    from looseleaf_text import LocalModel

    return LocalModel(tiny_text_llama(), tiny_tokenizer())


def test_soft_prompts_stand_before_everything() -> None:
    """Soft tokens that are embeddings of real ones give what the real ones give, shared parts or not."""
    model = local()
    said = "Be kind. "
    ids = torch.tensor(model.tokenize(said))
    soft = model.model.get_input_embeddings().weight[ids].detach()
    task = TextTask("t", [Example({"text": "fine day"}, "good"), Example({"text": "awful"}, "bad")],
                    labels={"good": " great", "bad": " no"}, template="Text: {text}", answer_prefix="Label:")
    examples = [Example({"text": text}) for text in ("fine day", "x", "a longer text than the others")]
    hard = task.class_scores(TextPrompt.for_task(task, said.strip(), separator=" ").on(model), examples)
    for share in (True, False):
        model.share_prefixes = share
        found = task.class_scores(SoftPrompt(TextPrompt.for_task(task), soft).on(model), examples)
        for one, other in zip(found, hard, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    plain = task.class_scores(TextPrompt.for_task(task).on(model), examples)
    assert max(abs(a - b) for a, b in zip(plain[0], hard[0], strict=True)) > 1e-3
    assert type(model.model).__name__ == "LlamaForCausalLM"  # taken off again


def test_keys_and_values_are_a_soft_prompt_too() -> None:
    model = local()
    soft = torch.randn(3, model.model.config.hidden_size)
    prefix = torch.stack([torch.stack([k[0], v[0]]) for k, v in keys_and_values(model.model, soft)])
    task = toy_task()
    one = task.class_scores(SoftPrompt(TextPrompt.for_task(task), soft).on(model), task.dev[:3])
    other = task.class_scores(SoftPrompt(TextPrompt.for_task(task), prefix).on(model), task.dev[:3])
    assert one[0] == pytest.approx(other[0], abs=1e-4)
    made = dataclasses.replace(toy_task(generation=True), max_tokens=4)
    assert SoftPrompt(TextPrompt.for_task(made), soft).on(Budget().meter(model)).predict(made.dev[:2])


def test_soft_prompts_that_do_not_fit() -> None:
    model, task = local(), toy_task()
    hidden = model.model.config.hidden_size
    for shape in ((3, hidden + 1), (3,), (1, 2, 1, 3, 8)):
        with pytest.raises(ValueError, match="does not fit"):
            task.class_scores(SoftPrompt(TextPrompt.for_task(task), torch.zeros(shape)).on(model), task.dev)
    with pytest.raises(UnsupportedModelError, match="takes text only"):
        SoftPrompt(TextPrompt.for_task(task), torch.zeros(3, hidden)).on(ToyLanguageModel()).scores(task.dev)
    before = model.model
    with pytest.raises(KeyboardInterrupt), soft_prefix(model, torch.zeros(3, hidden)):
        raise KeyboardInterrupt
    assert model.model is before


def test_modes_of_a_model_in_parts_come_back() -> None:
    """Embeddings are read in evaluation mode, and every submodule has its own mode again."""
    from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot

    model, task = local(), toy_task()
    mixed_modes(model.model).training = False
    before = snapshot(model.model)
    prompt = SoftPrompt(TextPrompt.for_task(task), torch.zeros(2, model.model.config.hidden_size))
    task.class_scores(prompt.on(model), task.dev[:2])
    assert_unchanged(before, model.model)
    with pytest.raises(ZeroDivisionError), soft_prefix(model, prompt.soft):
        raise ZeroDivisionError
    assert_unchanged(before, model.model)
