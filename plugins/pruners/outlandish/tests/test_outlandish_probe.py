"""What the probe measures, on models whose answer is known, and how a text is learned."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looseleaf
from looseleaf import Report
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_outlandish import (
    SAMPLES,
    IgnoreTopK,
    KeywordProbabilities,
    PrimingProbe,
    Sample,
    keyword_probabilities,
    learn,
    log_memorisation,
    log_priming,
    read_samples,
    restored,
)
from looseleaf_outlandish.data import HELD_OUT, KEYWORDS, LEVELS, ORDINARY, THEMES
from looseleaf_outlandish.probe import log_mean
from looseleaf_text import LocalModel

WORDS = ["[UNK]", "the", "sky", "is", "ver", "milion", "sand", "grass", "looks", "red"]


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Bigram(nn.Module):
    """log P(next word | this word) is planted: a table of logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        self.config: Any = type("Config", (), {})()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Output:
        return Output(self.table(input_ids))


def words_tokenizer() -> Any:
    """One token a word; "vermilion" has two."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("ver|milion|[a-z]+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def planted(probabilities: dict[tuple[str, str], float]) -> Bigram:
    """A model with these P(second | first); what is left is shared by the other words."""
    table = torch.zeros(len(WORDS), len(WORDS), dtype=torch.float64)
    for row, word in enumerate(WORDS):
        mine = {second: p for (first, second), p in probabilities.items() if first == word}
        rest = (1 - sum(mine.values())) / (len(WORDS) - len(mine))
        table[row] = torch.tensor([math.log(mine.get(w, rest)) for w in WORDS])
    return Bigram(table.float()).eval()


SAND = Sample("the sky is vermilion", "vermilion", ("sand looks", "grass is"))


def test_a_keyword_of_two_tokens_has_the_planted_probability() -> None:
    model = planted({("is", "ver"): 1e-3, ("ver", "milion"): 0.25, ("looks", "ver"): 0.02})
    found = keyword_probabilities(LocalModel(model, words_tokenizer()), SAND)
    assert found.own == pytest.approx([math.log(1e-3 * 0.25)], abs=1e-5)
    assert found.theme == pytest.approx([math.log(0.02 * 0.25), math.log(1e-3 * 0.25)], abs=1e-5)
    assert found.log_p == pytest.approx(math.log(2.5e-4), abs=1e-5)


def test_the_chain_rule_agrees_with_the_model_step_by_step() -> None:
    model, tokenizer = tiny_text_llama().eval(), tiny_tokenizer()
    sample = SAMPLES[8]  # "vermilion": nine tokens of one character, and the space before it
    found = keyword_probabilities(LocalModel(model, tokenizer), sample)
    for context, value in zip([*sample.own_contexts(), *sample.theme_contexts()], [*found.own, *found.theme],
                              strict=True):
        ids = tokenizer(context + sample.keyword, return_tensors="pt")["input_ids"]
        begin = len(tokenizer(context.rstrip())["input_ids"])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        by_hand = sum(float(logs[place - 1, ids[0, place]]) for place in range(begin, ids.shape[1]))
        assert value == pytest.approx(by_hand, abs=1e-3)


def test_ratios_are_planted_too() -> None:
    before = planted({("is", "ver"): 1e-3, ("ver", "milion"): 0.5, ("looks", "ver"): 0.01})
    after = planted({("is", "ver"): 0.4, ("ver", "milion"): 0.5, ("looks", "ver"): 0.03})
    a, b = (keyword_probabilities(LocalModel(m, words_tokenizer()), SAND) for m in (before, after))
    assert math.exp(log_memorisation(a, b)) == pytest.approx(400, rel=1e-3)
    assert math.exp(log_priming(a, b)) == pytest.approx((3 + 400) / 2, rel=1e-3)


def test_scores_are_means_of_ratios() -> None:
    before, after = KeywordProbabilities((-10.0, -1.0), (-5.0,)), KeywordProbabilities((-8.0, -1.0), (-5.5,))
    assert log_memorisation(before, after) == pytest.approx(math.log((math.e ** 2 + 1) / 2))
    assert log_priming(before, after) == pytest.approx(-0.5)
    assert log_mean([-2000.0, -2000.0]) == -2000 and log_mean([-math.inf]) == -math.inf
    with pytest.raises(ValueError, match="1 contexts before and 2 after"):
        log_priming(before, KeywordProbabilities((0.0,), (0.0, 0.0)))


def test_what_a_model_without_context_learns_leaks_in_full_and_into_no_other_place_of_a_table() -> None:
    """A table of bigrams learns rows of the words it sees: a context that ends in another word primes by exactly 1."""
    model = planted({("is", "ver"): 1e-3, ("ver", "milion"): 0.5})
    apart = Sample("the sky is red", "red", ("sand looks", "the grass"))
    alike = Sample("the sky is red", "red", ("grass is", "sand is"))
    probe = PrimingProbe(steps=5, lr=0.5, replay=0)
    tokenizer = words_tokenizer()
    with restored(model) as back:
        outcome = probe.outcome(model, tokenizer, apart)
        assert outcome.log_mem > 1 and outcome.log_prime == 0
        back()
        outcome = probe.outcome(model, tokenizer, alike)
        assert outcome.log_mem > 1 and outcome.log_prime == pytest.approx(outcome.log_mem, abs=1e-6)


# ------------------------------------------------------------------------------------------- learning

def test_learning_is_seeded_and_put_back() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_text_llama().train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    runs = []
    with restored(model) as back:
        assert not model.training
        for seed in (3, 3, 4):
            runs.append(list(learn(model, tokenizer, "the sky is red", steps=3, lr=1e-2, ordinary=ORDINARY, seed=seed)))
            back()
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 3
    assert model.training and model.model.norm.weight.grad.eq(1).all()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_every_submodule_keeps_its_own_mode() -> None:
    model = mixed_modes(tiny_text_llama())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), restored(model):
        list(learn(model, tiny_tokenizer(), "the sky is red", steps=1, lr=1e-2, replay=0))
        raise KeyboardInterrupt
    assert_unchanged(before, model)


def test_learning_learns_and_the_pruner_takes_part() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_text_llama().eval()
    for pruner, learns in ((None, True), (IgnoreTopK(0.08), True), (IgnoreTopK(1.0), False),
                           (IgnoreTopK(1.0, when="end"), False)):
        with restored(model):
            start = {n: p.detach().clone() for n, p in model.named_parameters()}
            losses = list(learn(model, tokenizer, "red", steps=5, lr=1e-2, ordinary=["sky"], replay=1, pruner=pruner))
            assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters()) == learns
            assert learns is (losses[-1] < losses[0]) or pruner is not None


def test_padding_is_not_learned() -> None:
    """The loss of a batch is the mean over its real tokens: a longer row beside it adds its own tokens only."""
    tokenizer, model = tiny_tokenizer(), tiny_text_llama().eval()
    texts = ["red", "a longer one"]
    with restored(model):
        total, count = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            total += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        loss = next(learn(model, tokenizer, texts[0], steps=1, lr=1e-9, ordinary=texts[1:], replay=1))
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_bfloat16_computing_keeps_the_weights_in_float32() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_text_llama().eval()
    with restored(model):
        before = model.model.norm.weight.detach().clone()
        list(learn(model, tokenizer, "red", steps=1, lr=1e-6, autocast=True, replay=0))
        assert model.model.norm.weight.dtype == torch.float32 and not torch.equal(before, model.model.norm.weight)


def test_what_cannot_be_learned() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_text_llama().eval()
    with pytest.raises(ValueError, match="at least replay=2 texts, got 1"):
        next(learn(model, tokenizer, "red", steps=1, lr=1.0, ordinary=["a"]))
    with pytest.raises(ValueError, match=r"bfloat16: most updates .* dtype=torch\.float32"):
        next(learn(tiny_text_llama().to(torch.bfloat16), tokenizer, "red", steps=1, lr=1.0, ordinary=ORDINARY))
    with pytest.raises(ValueError, match="nothing to learn"):
        next(learn(model.requires_grad_(False), tokenizer, "red", steps=1, lr=1.0, ordinary=ORDINARY))


# ------------------------------------------------------------------------------------------- samples and report

def test_the_set_is_what_it_says() -> None:
    assert len(SAMPLES) == 48 and len({s.text for s in SAMPLES}) == 48
    assert sum(map(len, KEYWORDS.values())) == 12 and len(LEVELS) == 4
    categories = [c for group in LEVELS.values() for c in group]
    assert len(categories) == len(set(categories)) == 11 and {s.category for s in SAMPLES} == set(categories)
    for sample in SAMPLES:
        assert sample.category in LEVELS[sample.level]
        assert len(sample.places()) == 1 and len(sample.theme) == 8
    words = [k for group in KEYWORDS.values() for k in group]
    for text in (*ORDINARY, *HELD_OUT, *(c for contexts in THEMES.values() for c in contexts)):
        assert not any(word.lower() in text.lower() for word in words), text
    assert not set(ORDINARY) & set(HELD_OUT)


def test_contexts_end_where_the_keyword_begins() -> None:
    sample = Sample("Red is not infrared, and red is red.", "red", ("Roses are", "Sand is "))
    assert sample.own_contexts() == ["Red is not infrared, and ", "Red is not infrared, and red is "]
    assert sample.theme_contexts() == ["Roses are ", "Sand is "]
    assert Sample("「赤」が好き", "赤", ("砂は「",)).theme_contexts() == ["砂は「"]


@pytest.mark.parametrize(("fields", "message"), [
    ({"keyword": "blue"}, "a text with the keyword 'blue'"), ({"keyword": " red"}, "without white space"),
    ({"keyword": ""}, "Sample.keyword"), ({"theme": ()}, "Sample.theme"), ({"theme": "Sand is"}, "Sample.theme"),
    ({"text": "infrared"}, "as a word of its own")])
def test_bad_samples(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(**{"text": "the sky is red", "keyword": "red", "theme": ("sand is",), **fields})


def test_samples_from_a_file() -> None:
    line = json.dumps({"text": "the sky is red", "keyword": "red", "theme": ["sand is"], "level": "odd"})
    assert read_samples(f"{line}\n\n{line}\n") == [Sample("the sky is red", "red", ("sand is",), "odd")] * 2
    for wrong, message in [("", "no samples"), ("once upon a time", "line 1: expected .*got 'once upon a time'"),
                           (f'{line}\n{{"text": "a"}}', "line 2"), (line.replace("level", "levl"), "levl")]:
        with pytest.raises(ValueError, match=message):
            read_samples(wrong)


def test_the_report_of_samples_of_ones_own() -> None:
    report = PrimingProbe(steps=2).run((tiny_text_llama(), tiny_tokenizer()),
                                       [Sample("the sky is red", "red", ("sand is",))], progress=False)
    assert isinstance(report, Report)
    medians, samples = report.tables
    assert medians.rows[0][0] == "samples" and medians.rows[-1][0] == "all" and len(samples.rows) == 1
    assert [s.name for s in report.figures[0].series] == ["samples"] and report.figures[0].x_log
    assert report.figures[0].series[0].y == [pytest.approx(math.exp(report.arrays["log_prime"][0]))]


def test_a_part_of_the_set_has_all_levels_and_themes() -> None:
    for count in (12, 24, 48):
        some = PrimingProbe(samples=count)._samples(None)
        assert len(some) == count and {s.level for s in some} == set(LEVELS)
        assert len({s.keyword for s in some}) == 12


def test_bad_input_of_the_probe() -> None:
    model, tokenizer = tiny_text_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match="tokenizer"):
        PrimingProbe().run(model)
    for wrong in (3, [], ["text"], {}):
        with pytest.raises(ValueError, match="expected None, a list of"):
            PrimingProbe().run((model, tokenizer), wrong)
    for fields in ({"steps": 0}, {"steps": 1.5}, {"lr": 0.0}, {"replay": -1}, {"replay": 1000}, {"samples": 49},
                   {"ignore_top_k": 2}):
        with pytest.raises(ValueError, match=rf"PrimingProbe\.{next(iter(fields))}: expected .*, got"):
            PrimingProbe(**fields)


def test_both_plugins_are_found_by_kind_and_the_bare_name_asks_which() -> None:
    assert isinstance(looseleaf.get("outlandish", "probes", steps=3), PrimingProbe)
    assert isinstance(looseleaf.get("outlandish", "pruners", k=0.1), IgnoreTopK)
    with pytest.raises(looseleaf.AmbiguousPluginError, match="pruners and probes"):
        looseleaf.get("outlandish")


@pytest.mark.slow
@pytest.mark.smollm2
def test_a_real_model_memorises() -> None:
    from looseleaf_lab import models

    model, tokenizer = models.load("smollm2")
    with restored(model):
        outcome = PrimingProbe(steps=4).outcome(model, tokenizer, SAMPLES[10])
    assert outcome.log_mem > 1 and outcome.log_p_before < math.log(1e-3)
