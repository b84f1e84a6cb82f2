"""Verbalizers, calibration, ensembles, masked models and soft prompts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from looseleaf import Budget
from looseleaf_text import Example, Prompt, Task, Template, Verbalizer, calibrate
from looseleaf.errors import UnsupportedModelError
from looseleaf_text.answers import answer_log_probs, combine, most_voted
from looseleaf_text.calibration import content_free, offsets, subtract
from looseleaf_text.model import MeteredModel
from looseleaf_text.testing import ToyLanguageModel, toy_task

ANSWERS = {"good": [" fine", " lovely"], "bad": [" awful"]}


# -- verbalizer ---------------------------------------------------------------------------------------------------

def test_answers_are_mapped_to_labels() -> None:
    verbalizer = Verbalizer.of(ANSWERS)
    assert verbalizer.space == [" fine", " lovely", " awful"] and verbalizer.label_of(" lovely") == "good"
    with pytest.raises(ValueError, match="not in the answer space"):
        verbalizer.label_of("fine")
    assert Verbalizer.from_dict(verbalizer.to_dict()) == verbalizer


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
    ({"good": [" a"]}, "two labels or more"),
    ({"good": [], "bad": [" b"]}, "'good' has the answers"),
    ({"good": " a", "bad": " b"}, "Verbalizer.of takes single texts"),
    ({"good": ["  "], "bad": [" b"]}, "has no tokens"),
    ({"good": [" a"], "bad": [" b", " a"]}, "stands for 'good' and for 'bad'"),
    ({"good": [" a", " a"], "bad": [" b"]}, "'good' has the answer ' a' twice"),
])
def test_verbalizers_nobody_can_use(answers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Verbalizer(answers)


def test_bad_aggregation_and_scores() -> None:
    with pytest.raises(ValueError, match="allowed is 'sum', 'mean' or 'max'"):
        Verbalizer.of(ANSWERS, "median")  # type: ignore[arg-type]
    for row in ([-1.0] * 2, [-1.0] * 4):
        with pytest.raises(ValueError, match=f"{len(row)} scores for 3 answers"):
            Verbalizer.of(ANSWERS).log_probs([row])


def test_answers_without_tokens_under_this_model() -> None:
    class Mute(ToyLanguageModel):
        def tokenize(self, text: str) -> list[int]:
            return [] if text == " lovely" else super().tokenize(text)

    Verbalizer.of(ANSWERS).validate(ToyLanguageModel())
    with pytest.raises(ValueError, match="'good' has the answer ' lovely', which has no tokens"):
        Verbalizer.of(ANSWERS).validate(Mute())


def test_a_prompts_verbalizer_overrides_the_tasks() -> None:
    task, model = toy_task(), ToyLanguageModel()
    plain = Prompt.for_task(task)
    single = dataclasses.replace(plain, verbalizer=Verbalizer.of({k: (task.labels or {})[k] for k in
                                                                  ("positive", "negative")}))
    assert task.evaluate(single, model, task.dev).predictions == task.evaluate(plain, model, task.dev).predictions
    row = task.log_probs(single, model, task.dev[:1])[0]
    assert sum(map(math.exp, row)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="exactly the labels of the task"):
        task.log_probs(dataclasses.replace(plain, verbalizer=Verbalizer.of(ANSWERS)), model, task.dev)


# -- calibration --------------------------------------------------------------------------------------------------

def test_offsets_by_hand() -> None:
    assert offsets([[math.log(0.2), math.log(0.6)]]) == pytest.approx([math.log(0.25), math.log(0.75)])
    rows = [[math.log(0.2), math.log(0.6)], [math.log(0.9), math.log(0.1)]]
    assert [math.exp(v) for v in offsets(rows)] == pytest.approx([(0.25 + 0.9) / 2, (0.75 + 0.1) / 2])
    assert subtract([[1.0, 2.0]], [0.5, -1.0]) == [[0.5, 3.0]]
    assert [e.fields for e in content_free(["a", "b"], ["N/A", ""])] == [{"a": "N/A", "b": "N/A"}, {"a": "", "b": ""}]
    for bad in ("N/A", []):
        with pytest.raises(ValueError, match="a list of one text or more"):
            content_free(["a"], bad)


def test_calibrated_prompts_are_neutral_without_content() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = calibrate(Prompt.for_task(task), task, model, ["N/A"])
    row = task.log_probs(prompt, model, [Example("N/A")])[0]
    assert row[0] == pytest.approx(row[1])
    assert calibrate(prompt, task, model, ["N/A"]) == prompt  # not on top of itself
    both = Prompt(members=[Prompt.for_task(task), Prompt.for_task(task, "Well.")])
    assert [len(m.info["calibration"]) for m in calibrate(both, task, model).members] == [2, 2]
    with pytest.raises(ValueError, match="no labels"):
        calibrate(prompt, toy_task(generation=True), model)


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
    members = [Prompt.for_task(task, text) for text in ("One.", "Other words.", "Third one here.")]
    said = [task.predict(m, model, task.dev) for m in members]
    whole = task.evaluate(Prompt(members=members), model, task.dev)
    assert whole.predictions == [most_voted(texts) for texts in zip(*said, strict=True)]


def test_an_ensemble_of_one_is_that_one() -> None:
    task, model = toy_task(), ToyLanguageModel()
    prompt = Prompt.for_task(task, "Judge it.")
    one = task.evaluate(prompt, model, task.dev)
    assert task.evaluate(Prompt(members=[prompt]), model, task.dev).predictions == one.predictions
    two = Prompt(members=[Prompt.for_task(task), prompt], weights=[0, 1])
    assert task.evaluate(two, model, task.dev).predictions == one.predictions
    assert two.render(task.dev[0]) == prompt.render(task.dev[0])
    assert two.render_messages(task.dev[0]) == prompt.render_messages(task.dev[0])
    with pytest.raises(ValueError, match="no single text"):
        two.as_template()




@pytest.mark.parametrize(("fields", "message"), [
    ({"combine": "sum"}, "allowed is 'average' or 'vote'"),
    ({"weights": [1.0]}, "without members"),
    ({"members": [Prompt()], "weights": [1.0, 1.0]}, "for 1 prompts"),
    ({"members": [Prompt()], "weights": [-1.0]}, "number from 0"),
    ({"members": [Prompt()], "weights": [0.0]}, "not all of them 0"),
    ({"members": [Prompt()], "weights": [math.nan]}, "number from 0"),
])
def test_ensembles_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(**fields)


# -- cloze --------------------------------------------------------------------------------------------------------

def test_a_causal_model_scores_the_answer_and_what_follows() -> None:
    model = ToyLanguageModel()
    assert model.score_cloze(["a b"], [[" c", " d"]], [" e"]) == model.score(["a b"], [[" c e", " d e"]])
    budget = Budget(calls=2, tokens=6)
    MeteredModel(model, budget).score_cloze(["a b"], [[" c", " d"]], [" e"])
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
    task = Task("films", [Example("i love it", "good"), Example("i hate it", "bad")],
                test=[Example("i love the film", "good"), Example("i hate the movie", "bad")],
                labels={"good": "great", "bad": "bad"})
    model = masked_model()
    task.validate(model)
    prompt = Template("[X] . it was a [Z] film .").to_prompt({"good": ["great", "very lovely"], "bad": "bad"})
    rows = task.log_probs(calibrate(prompt, task, model), model, task.test)
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row)
    plain = task.log_probs(prompt, model, task.test)
    assert sum(map(math.exp, plain[0])) == pytest.approx(1.0)
    # what follows the answer is seen: other words there, other scores
    other = dataclasses.replace(prompt, suffix=" movie , lovely .")
    assert task.log_probs(other, model, task.test) != plain
    assert model.embed(["i love it", "film"]).shape == (2, 16)
    budget = Budget(calls=100, tokens=100)
    task.log_probs(prompt, MeteredModel(model, budget), task.test)
    assert budget.used["calls"] == 2


def test_what_a_masked_model_refuses() -> None:
    from looseleaf_text import MaskedModel
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    model = masked_model()
    with pytest.raises(UnsupportedModelError, match="does not continue"):
        model.generate(["a"], 3)
    with pytest.raises(ValueError, match="has no tokens"):
        model.score(["it was"], [[" "]])
    with pytest.raises(ValueError, match="allowed are 40"):
        model.score(["very " * 50], [["bad"]])
    with pytest.raises(ValueError, match="1 texts before, 2 lists"):
        model.score_cloze(["a"], [["b"], ["c"]], [""])
    with pytest.raises(ValueError, match="has none: a causal"):
        MaskedModel(tiny_text_llama(), tiny_tokenizer())
    with pytest.raises(ValueError, match="batch_tokens=0"):
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
    examples = [Example("a fine day"), Example("no")]
    rows = answer_log_probs(prompt, model, examples, prompt.verbalizer.space)  # type: ignore[union-attr]
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
    from looseleaf_text import LocalModel
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    return LocalModel(tiny_text_llama(), tiny_tokenizer())


def test_soft_prompts_stand_before_everything() -> None:
    """Soft tokens that are embeddings of real ones give what the real ones give, shared parts or not."""
    model = local()
    said = "Be kind. "
    ids = torch.tensor(model.tokenize(said))
    soft = model.model.get_input_embeddings().weight[ids].detach()
    task = Task("t", [Example("fine day", "good"), Example("awful", "bad")], labels={"good": " great", "bad": " no"},
                template="Text: {text}", answer_prefix="Label:")
    examples = [Example("fine day"), Example("x"), Example("a longer text than the others")]
    hard = task.log_probs(Prompt.for_task(task, said.strip(), separator=" "), model, examples)
    for share in (True, False):
        model.share_prefixes = share
        found = task.log_probs(Prompt.for_task(task, soft=soft), model, examples)
        for one, other in zip(found, hard, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    plain = task.log_probs(Prompt.for_task(task), model, examples)
    assert max(abs(a - b) for a, b in zip(plain[0], hard[0], strict=True)) > 1e-3
    assert type(model.model).__name__ == "LlamaForCausalLM"  # taken off again


def test_keys_and_values_are_a_soft_prompt_too() -> None:
    from looseleaf_text.soft import keys_and_values

    model = local()
    soft = torch.randn(3, model.model.config.hidden_size)
    prefix = torch.stack([torch.stack([k[0], v[0]]) for k, v in keys_and_values(model.model, soft)])
    task = toy_task()
    one = task.log_probs(Prompt.for_task(task, soft=soft), model, task.dev[:3])
    other = task.log_probs(Prompt.for_task(task, soft=prefix), model, task.dev[:3])
    assert one[0] == pytest.approx(other[0], abs=1e-4)
    made = dataclasses.replace(toy_task(generation=True), max_tokens=4)
    assert made.predict(Prompt.for_task(made, soft=soft), MeteredModel(model, Budget()), made.dev[:2])


def test_soft_prompts_that_do_not_fit() -> None:
    model, task = local(), toy_task()
    hidden = model.model.config.hidden_size
    for shape in ((3, hidden + 1), (3,), (1, 2, 1, 3, 8)):
        with pytest.raises(ValueError, match="does not fit"):
            task.log_probs(Prompt.for_task(task, soft=torch.zeros(shape)), model, task.dev)
    with pytest.raises(UnsupportedModelError, match="takes text only"):
        task.log_probs(Prompt.for_task(task, soft=torch.zeros(3, hidden)), ToyLanguageModel(), task.dev)
    before = model.model
    with pytest.raises(KeyboardInterrupt):
        from looseleaf_text.soft import soft_prefix

        with soft_prefix(model, torch.zeros(3, hidden)):
            raise KeyboardInterrupt
    assert model.model is before
