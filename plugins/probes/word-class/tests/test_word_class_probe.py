"""Representations of models of several families, planted answers, the report, and bad input."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf import UnsupportedModelError, capture
from looseleaf.testing.models import seeded, tiny_llama, tiny_tokenizer
from looseleaf_word_class import (
    Grammar,
    PlantedModel,
    WordClassProbe,
    WordModel,
    conditional,
    example_texts,
    gdv,
    labelled,
    representations,
    train_word_model,
    untrained,
    windows,
)
from looseleaf_word_class.probe import bands, numbers

KNOWN = ("last", "next", "frequency", "noise")


def family(name):
    import transformers

    small = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"gpt2": lambda: transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256),
              "gpt_neox": lambda: transformers.GPTNeoXConfig(**small, intermediate_size=64),
              "mamba": lambda: transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2,
                                                        state_size=8),
              "gemma3": lambda: transformers.Gemma3TextConfig(**small, num_key_value_heads=2, head_dim=8,
                                                              intermediate_size=64, sliding_window=16)}[name]()
    return seeded(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()


@pytest.fixture(scope="module")
def sample():
    return windows(example_texts(12)).sample(4)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(vocabulary=128, num_hidden_layers=3), tiny_tokenizer()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mamba", "gemma3"])
def test_families_in_batches_of_mixed_lengths_equal_each_context_alone(name, sample):
    model, tokenizer = family(name), tiny_tokenizer()
    found = representations(model, tokenizer, sample, batch=5)
    assert len(found.states) == 2
    for n in (0, 7, len(sample) - 1):
        alone = representations(model, tokenizer, sample.take([n]))
        for layer, states in found.states.items():
            assert states[n].numpy() == pytest.approx(alone.states[layer][0].numpy(), abs=1e-5)
        assert found.words[n].numpy() == pytest.approx(alone.words[0].numpy(), abs=1e-6)


def test_the_last_position_of_a_left_padded_batch_is_the_same(llama, sample):
    model, tokenizer = llama
    found = representations(model, tokenizer, sample)
    tokenizer.padding_side = "left"
    batch = tokenizer([tokenizer.bos_token + text for text in sample.written], padding=True, return_tensors="pt",
                      add_special_tokens=False)
    assert 0 in batch["attention_mask"]
    places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), capture(model, "layers.*", lambda x: x[:, -1]) as outputs:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=places)
    for layer, states in found.states.items():
        assert (states - outputs[layer][0]).abs().max() < 1e-4


def test_no_later_word_changes_a_vector(llama):
    model, tokenizer = llama
    text = example_texts(1)[0]
    changed = [*text[:9], *reversed(text[9:])]
    first, second = (representations(model, tokenizer, windows([t]).take([0])) for t in (text, changed))
    for layer in first.states:
        assert torch.equal(first.states[layer], second.states[layer])
    # and it is the vector at the end of the ninth word in the whole text
    whole = " ".join(word for word, _ in text[:14])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(whole, add_special_tokens=False)["input_ids"]]])
    end = len(windows([text]).written[0])  # one token for each character, after the first
    with torch.no_grad(), capture(model, "layers.*", lambda x: x[:, end]) as outputs:
        model(ids)
    if "." not in [word for word, _ in text[:14]]:
        for layer, states in first.states.items():
            assert (states - outputs[layer][0]).abs().max() < 1e-4


def test_word_vectors_are_the_mean_over_the_last_words_tokens(llama):
    model, tokenizer = llama
    found = representations(model, tokenizer, labelled(["a dog", "the riverbank"], [0, 1]))
    for n, word in enumerate(("dog", "riverbank")):
        ids = torch.tensor(tokenizer(word, add_special_tokens=False)["input_ids"])
        assert (found.words[n] - model.get_input_embeddings()(ids).mean(0)).abs().max() < 1e-6


def test_a_tokenizer_without_offsets_gives_the_same_word_vectors(llama):
    model, tokenizer = llama

    class Slow:
        is_fast = False
        bos_token_id, all_special_ids, eos_token_id = tokenizer.bos_token_id, tokenizer.all_special_ids, None

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]}

        def decode(self, ids):
            return tokenizer.decode(ids)

    contexts = labelled(["a dog", "the riverbank"], [0, 1])
    fast, slow = (representations(model, t, contexts) for t in (tokenizer, Slow()))
    assert (fast.words - slow.words).abs().max() < 0.2  # " dog" in the place of "dog": a space of ten tokens
    for layer in fast.states:
        assert torch.equal(fast.states[layer], slow.states[layer])


def test_wrapped_and_compiled_models(llama, sample):
    peft = pytest.importorskip("peft")
    model, tokenizer = llama
    expected = representations(model, tokenizer, sample)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for wrapped in (adapted, torch.compile(model)):
        found = representations(wrapped, tokenizer, sample)
        assert list(found.states) == list(expected.states)
        for layer, states in found.states.items():
            assert (states - expected.states[layer]).abs().max() < 1e-5


def test_bfloat16_is_computed_in_float64(llama):
    model, tokenizer = copy.deepcopy(llama[0]).bfloat16(), llama[1]
    data = windows(example_texts(20)).sample(10)
    found = representations(model, tokenizer, data)
    states = found.states["model.layers.2"]
    assert states.dtype == torch.bfloat16
    assert gdv(states, data.labels) == pytest.approx(gdv(states.double(), data.labels), abs=1e-12)


def test_an_untrained_copy_has_other_weights_and_leaves_the_model(llama):
    model = llama[0]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    one, two, three = untrained(model, 1), untrained(model, 1), untrained(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[weight], two.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], three.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], before[weight])
    words = WordModel(["a", "b"], hidden=4)
    assert not torch.equal(untrained(words, 3).embedding.weight, words.embedding.weight)
    with pytest.raises(UnsupportedModelError, match=r"weights without: bias: pass untrained=False"):
        odd = nn.Module()
        odd.bias = nn.Parameter(torch.zeros(2))
        untrained(odd)


# ------------------------------------------------------------------------------------------------ planted answers
@pytest.fixture(scope="module")
def planted():
    """Next classes that follow from the last two alone, and a model whose layers hold what is known."""
    grammar = Grammar(order=2, sharp=1.0, frequent=2)
    probe = WordClassProbe(per_class=100, layers=KNOWN, permutations=50, untrained=False)
    model = PlantedModel(grammar)
    data = probe.windows(grammar.sample(60), 0)
    found = representations(model, model.encode, data, KNOWN)
    return {r.layer: r for r in probe.measure(found, data, 0)}


def test_a_planted_class_is_found_with_its_known_value(planted):
    known = planted["next"]
    assert known.next.value == pytest.approx(-math.sqrt(5 / 8), abs=1e-10)
    assert known.next.p == pytest.approx(1 / 51)
    assert known.given_last.value < -0.75
    assert known.given_frequency.value < -0.6
    assert known.pairs[0, 1] == pytest.approx(-math.sqrt(5 / 8), abs=1e-10)


def test_a_layer_that_copies_the_last_word_does_not_pass(planted):
    copied = planted["last"]
    assert copied.last < -0.75
    assert abs(copied.next.value) < 0.03
    assert (copied.given_last.value, copied.given_last.p) == (0, 1)


def test_a_layer_that_knows_frequency_alone_does_not_pass(planted):
    known = planted["frequency"]
    assert known.next.value < -0.5  # it looks as if classes were known
    assert known.next.p < 0.05
    assert (known.given_frequency.value, known.given_frequency.p) == (0, 1)


def test_noise_and_random_labels_do_not_pass(planted):
    noise = planted["noise"]
    assert abs(noise.next.value) < 0.01
    assert noise.next.p > 0.05
    assert all(abs(r.next.null) < 0.01 for r in planted.values())


def test_in_a_first_order_grammar_the_copy_looks_like_knowledge_until_the_condition():
    grammar = Grammar(order=1, sharp=0.9)
    probe = WordClassProbe(per_class=100, layers=("last",), permutations=20, untrained=False)
    model = PlantedModel(grammar)
    data = probe.windows(grammar.sample(60), 0)
    _, found = probe.measure(representations(model, model.encode, data, ("last",)), data, 0)
    assert found.next.value < -0.4
    assert found.given_last.value == 0


@pytest.mark.parametrize(("order", "sharp"), [(1, 0.9), (2, 0.9)])
def test_a_trained_network_is_told_from_a_copy_by_the_condition(order, sharp):
    grammar = Grammar(order=order, sharp=sharp, words=4)
    model = WordModel(grammar.vocabulary(), hidden=32)
    probe = WordClassProbe(per_class=100, permutations=40)
    data = probe.windows(grammar.sample(60, seed=1), 0)
    before = probe.measure(representations(model, model.encode, data), data)[-1]
    losses = train_word_model(model, grammar.sample(500, seed=2), steps=200, batch=32, lr=1e-2)
    after = probe.measure(representations(model, model.encode, data), data)[-1]
    assert losses[-1] < losses[0] - 0.5
    assert abs(before.next.value) < 0.1
    assert after.next.value < -0.2
    assert abs(after.next.null) < 0.01
    if order == 1:
        assert abs(after.given_last.value) < 0.06  # few windows share a last class and differ in the next
        assert after.given_last.p > 0.05
    else:
        assert after.given_last.value < -0.3
        assert after.given_last.p == pytest.approx(1 / 41)


def test_the_grammar_has_the_probabilities_that_it_says():
    grammar = Grammar(order=2, sharp=0.8, classes=3, frequent=1)
    texts = grammar.sample(400)
    follows = [int(c) == (int(a) + int(b)) % 3 for text in texts for (_, a), (_, b), (_, c) in zip(
        *([[(w, name[1:]) for w, name in text][n:] for n in range(3)]), strict=False)]
    assert np.mean(follows) == pytest.approx(0.8 + 0.2 / 3, abs=0.02)
    assert len({w for text in texts for w, name in text if name == "C0"}) == 5
    with pytest.raises(ValueError, match=r"an odd number where order is 2, got 4"):
        Grammar(order=2, classes=4)


# -------------------------------------------------------------------------------------------------------- report
def test_the_report_has_every_control(llama):
    report = WordClassProbe(per_class=6, permutations=4, maps=("mds", "tsne", "pca")).run(llama, progress=False)
    titles = [t.title for t in report.tables]
    assert titles[:4] == ["GDV of the next word's class", "GDV given the last class",
                          "GDV given the next word's frequency", "Clusters and a linear probe"]
    assert titles[4].startswith("GDV of pairs of classes, model.layers.")
    assert [row[0] for row in report.tables[0].rows] == [
        "word vectors", "model.layers.0", "model.layers.1", "model.layers.2"]
    assert all(cell is not None for row in report.tables[0].rows for cell in row)
    assert [f.title.split(" by ")[1] for f in report.figures[-3:]] == ["mds", "tsne", "pca"]
    assert sum(len(s.x) for s in report.figures[-1].series) == 36
    assert report.facts["left out: punctuation comes next"] > 0
    assert "a window before ADJ" in dict(report.examples)


def test_labels_of_ones_own_leave_out_what_is_not_known(llama):
    contexts = [" ".join(w for w, _ in text[:6]) for text in example_texts(40)]
    labels = [n % 2 for n in range(40)]
    report = WordClassProbe(per_class=10, permutations=4).run(llama, (contexts, labels))
    assert [t.title for t in report.tables][1] == "Clusters and a linear probe"
    assert "left out: the data do not say it" in report.facts["given the last class"]
    by_word = WordClassProbe(per_class=20, permutations=4, condition="last word").run(llama, (contexts, labels))
    assert "GDV given the last word" in [t.title for t in by_word.tables] or "given the last word" in by_word.facts
    none = WordClassProbe(per_class=10, permutations=4, condition=None, untrained=False).run(llama, (contexts, labels))
    assert none.tables[0].rows[0][6] is None
    assert none.facts["given the last word"] == "left out: it was not asked for"


def test_checkpoints_are_measured_on_the_same_windows_and_loaded_one_by_one():
    grammar = Grammar(words=8)
    model = WordModel(grammar.vocabulary(), hidden=16)
    early = copy.deepcopy(model)
    train_word_model(model, grammar.sample(200), steps=60, lr=1e-2)
    probe = WordClassProbe(per_class=30, permutations=4)
    report = probe.run({0: lambda: early, 60: model}, grammar.sample(30, seed=5))
    table = next(t for t in report.tables if t.title == "GDV over checkpoints")
    assert table.columns == ["step", "word vectors", "layers.0", "layers.1"]
    assert [row[0] for row in table.rows] == [0, 60]
    assert table.rows[1][3] < table.rows[0][3] - 0.05
    assert table.rows[1][1:] == [row[1] for row in report.tables[0].rows]
    alone = probe.run(early, grammar.sample(30, seed=5))
    assert table.rows[0][1:] == [row[1] for row in alone.tables[0].rows]


def test_watching_the_training_gives_the_curve():
    grammar = Grammar(words=8)
    model, steps = WordModel(grammar.vocabulary(), hidden=16), []
    train_word_model(model, grammar.sample(50), steps=10, watch=steps.append, at=(0, 5, 10))
    assert steps == [0, 5, 10]
    same = WordModel(grammar.vocabulary(), hidden=16)
    train_word_model(same, grammar.sample(50), steps=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_a_word_model_is_saved_and_loaded(tmp_path):
    model = WordModel.of([[("A", "x"), ("b", "x"), ("a", "x"), ("c", "x")]], words=2, hidden=4, layers=1)
    assert model.vocabulary == ["<unknown>", "a", "b"]
    assert model.encode(["B", "c", "A"]) == [2, 0, 1]
    model.save(tmp_path / "model.safetensors")
    loaded = WordModel.load(tmp_path / "model.safetensors")
    assert loaded.vocabulary == model.vocabulary
    ids = torch.tensor([[1, 2, 0]])
    assert torch.equal(loaded(ids), model(ids))


def test_a_network_of_ones_own_with_a_function_from_words_to_ids(sample):
    net = seeded(lambda: nn.Sequential(nn.Embedding(64, 8), nn.GRU(8, 6, batch_first=True)))
    report = WordClassProbe(per_class=4, permutations=4, layers=("1",)).run(
        (net, lambda words: [hash_of(word) for word in words]), sample)
    assert [row[0] for row in report.tables[0].rows] == ["1"]  # no get_input_embeddings, so no word vectors
    assert report.tables[0].rows[0][6] is not None


def hash_of(word):
    return sum(map(ord, word)) % 64


# ----------------------------------------------------------------------------------------------------- bad input
def test_layers_that_do_not_fit_are_refused(llama, sample):
    model, tokenizer = llama
    with pytest.raises(ValueError, match=r"no module matches 'layers.\*.mpl'"):
        representations(model, tokenizer, sample, ["layers.*.mpl"])
    with pytest.raises(ValueError, match=r"\(batch, length, width\)"):
        representations(model, tokenizer, sample, ["rotary_emb"])
    with pytest.raises(UnsupportedModelError, match=r"name them, such as layers="):
        representations(nn.Sequential(nn.Embedding(64, 8)), lambda words: [0], sample)
    first = seeded(lambda: nn.Sequential(nn.Embedding(64, 8), nn.GRU(8, 6)))
    first[1].register_forward_pre_hook(lambda m, x: (x[0].transpose(0, 1),))
    with pytest.raises(ValueError, match="batch_first"):
        representations(first, lambda words: [hash_of(word) for word in words], sample, ["1"])


def test_contexts_without_tokens_or_with_too_many_are_refused(llama):
    with pytest.raises(ValueError, match=r"expected tokens, got none for 'a'"):
        representations(PlantedModel(Grammar()), lambda words: [], labelled(["a"], [0]), ("last",))
    short = tiny_llama(vocabulary=128, max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"at most 8 tokens, the positions of the model, got 13"):
        representations(short, llama[1], labelled(["a longer one"], [0]))


def test_subjects_without_a_tokenizer_are_refused(llama):
    with pytest.raises(ValueError, match=r"a \(model, tokenizer\) pair, or a model with encode"):
        WordClassProbe().run(llama[0])
    with pytest.raises(ValueError, match="got an empty mapping"):
        WordClassProbe().run({})


@pytest.mark.parametrize(("options", "message"), [
    ({"context": 0}, "context: expected an integer >= 1, got 0"),
    ({"condition": "next word"}, "condition"),
    ({"maps": ("umap",)}, "maps: expected some of mds, tsne, pca"),
    ({"layers": "layers.*"}, "layers: expected None or a tuple of names"),
    ({"per_class": 1}, "per_class"),
])
def test_bad_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WordClassProbe(**options)


def test_activations_that_overflow_are_refused(sample):
    net = nn.Sequential(nn.Embedding(64, 8), nn.LayerNorm(8))
    with torch.no_grad():
        net[1].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity in 24 of 24 points"):
        WordClassProbe(per_class=4, layers=("1",)).run((net, lambda words: [hash_of(w) for w in words]), sample)


def test_training_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="a text of 21 words or more"):
        train_word_model(WordModel(["a"]), [[("a", "N")] * 5])
    with pytest.raises(ValueError, match="a word or more"):
        WordModel([])


def test_bands_have_as_many_windows_as_ties_allow():
    found = bands([1] * 50 + list(range(2, 52)))
    assert np.array_equal(np.bincount(found[:50]), [50])
    assert len(np.unique(found)) == 4 or len(np.unique(found)) == 3
    assert (np.diff(found[50:]) >= 0).all()
    assert numbers(["b", "a", "b"]).tolist() == [1, 0, 1]


def test_a_condition_of_few_windows_is_left_out():
    draw = np.random.default_rng(0)
    assert conditional(draw.normal(size=(6, 2)), np.array([0, 0, 1, 1, 0, 1]), np.arange(6), np.arange(6)) is None
