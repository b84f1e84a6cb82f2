"""The method: what is prepended where, whatever the batch, the padding and the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import UnsupportedModelError
from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_token_prepending import (
    SentenceEncoder,
    Settings,
    TokenPrepending,
    last_token,
    mean_pooling,
    prompt_eol,
)
from looseleaf_token_prepending.encoder import embed_one
from looseleaf_token_prepending.optimizer import default_ends, default_exit
from looseleaf_token_prepending.templates import (
    NOWHERE,
    TEMPLATES,
    Row,
    batches,
    collate,
    special_start,
    templates_of,
    tidy,
    tokenize,
    with_placeholder,
    without_placeholder,
)

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

TEXTS = ["A cat sleeps.", "Rain is expected in the north tomorrow.", "no", "Is it \"late\"?", "The cat is asleep now."]


def llama(layers: int = 6) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2)).eval()


def unhooked(model: Any) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- the method ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("start", "end", "leave"), [
    (1, 0, 6), (1, 2, 6), (1, 3, 5), (2, 4, 4), (1, 6, 6), (3, 6, 2), (1, 4, 1), (5, 6, -2)])
def test_equals_the_reference(start: int, end: int, leave: int) -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    encoder = TokenPrepending(start_layer=start, end_layer=end, exit_layer=leave, normalize=False).encoder(
        model, tokenizer, seed=3)
    expected = [embed_one(model.model, row.ids, row.at, encoder._placeholder, start, end, encoder.settings.exit_layer)
                for row in encoder.rows(TEXTS)]
    np.testing.assert_allclose(encoder.encode(TEXTS), torch.stack(expected).numpy(), rtol=1e-4, atol=1e-5)


def test_no_prepending_is_the_prompt_with_the_placeholder() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    encoder = TokenPrepending(end_layer=0, exit_layer=4, normalize=False).encoder(model, tokenizer)
    for text, vector in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        row = encoder.rows([text])[0]
        said = "".join(tokenizer.convert_ids_to_tokens(n) for n in row.ids[:row.at] + row.ids[row.at + 1:])
        assert said == f'This sentence : "{tidy(text)}" means in one word:"'
        embedded = model.get_input_embeddings()(torch.tensor([row.ids]))
        embedded[0, row.at] = encoder._placeholder
        with torch.no_grad():
            states = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False).hidden_states
        np.testing.assert_allclose(vector, states[4][0, -1].numpy(), rtol=1e-4, atol=1e-5)


def test_prompt_eol_has_no_placeholder() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    encoder = prompt_eol(model, tokenizer, normalize=False)
    ids = tokenizer('This sentence : "A cat sleeps." means in one word:"', return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state[0, -1]
    np.testing.assert_allclose(encoder.encode([TEXTS[0]])[0], expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_what_is_prepended_is_the_last_tokens_state_of_the_layer_before(left: bool) -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    encoder = TokenPrepending(start_layer=2, end_layer=5, exit_layer=6).encoder(model, tokenizer)
    ids, mask, at = collate(encoder.rows(TEXTS), left)
    rows = torch.arange(len(ids))
    last = torch.full_like(rows, ids.shape[1] - 1) if left else mask.sum(1) - 1
    came_out: list[torch.Tensor] = []
    went_in: list[torch.Tensor] = []
    handles: list[Any] = []
    for layer in model.model.layers:  # registered before the encoder's own hooks, so they see what a layer itself gives
        handles.append(layer.register_forward_hook(lambda m, a, o: came_out.append(o.clone())))
        handles.append(layer.register_forward_pre_hook(lambda m, a: went_in.append(a[0].clone())))
    with torch.no_grad():
        encoder.forward(ids, mask, at, [6])
    for handle in handles:
        handle.remove()
    assert torch.equal(went_in[0][rows, at], encoder._placeholder.expand(len(ids), -1))
    for n in range(1, 6):  # the input of layer n + 1 against the output of layer n, counted from 1
        expected = came_out[n - 1].clone()
        if 2 <= n < 5:
            assert not torch.equal(expected[rows, at], expected[rows, last])
            expected[rows, at] = expected[rows, last]
        assert torch.equal(went_in[n], expected), n


def test_earlier_tokens_see_the_end_of_the_sentence() -> None:
    model, tokenizer = llama(), tiny_tokenizer()

    def first_word(end: int, text: str) -> torch.Tensor:
        encoder = TokenPrepending(end_layer=end, exit_layer=6).encoder(model, tokenizer)
        seen: list[torch.Tensor] = []
        ids, mask, at = collate(encoder.rows([text]))
        handle = model.model.layers[3].register_forward_hook(lambda m, a, o: seen.append(o[0, int(at[0]) + 3]))
        with torch.no_grad():
            encoder.forward(ids, mask, at, [6])
        handle.remove()
        return seen[0]

    assert torch.equal(first_word(0, "Dogs bark."), first_word(0, "Dogs bite."))
    assert not torch.allclose(first_word(4, "Dogs bark."), first_word(4, "Dogs bite."), atol=1e-4)


def test_exits_of_one_run_are_those_of_runs_of_their_own() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    plugin = TokenPrepending(end_layer=3, normalize=False)
    together = plugin.encoder(model, tokenizer).states(TEXTS, [2, 4, 6]).numpy()
    for leave, states in zip([2, 4, 6], together, strict=True):
        alone = dataclasses.replace(plugin, exit_layer=leave).encoder(model, tokenizer).encode(TEXTS)
        np.testing.assert_allclose(states, alone, rtol=1e-4, atol=1e-5)


def test_layers_after_the_exit_are_not_run() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    ran: list[int] = []
    for n, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_hook(lambda m, a, o, n=n: ran.append(n))
    TokenPrepending(end_layer=2, exit_layer=4).encoder(model, tokenizer).encode(TEXTS[:1])
    assert ran == [1, 2, 3, 4]


def test_there_is_no_cache() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    asked: list[Any] = []
    given: list[Any] = []
    model.model.register_forward_pre_hook(lambda m, a, k: asked.append(k["use_cache"]), with_kwargs=True)
    model.model.register_forward_hook(lambda m, a, o: given.append(o.past_key_values))
    TokenPrepending(exit_layer=-1).encoder(model, tokenizer).encode(TEXTS)
    assert asked == [False] and given == [None]


def test_hooks_are_removed_and_the_model_is_left_alone() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    encoder = TokenPrepending().encoder(model, tokenizer)
    encoder.encode(TEXTS)
    assert unhooked(model) and len(tokenizer) == len(tiny_tokenizer())
    handle = model.model.layers[2].register_forward_hook(lambda m, a, o: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(TEXTS)
    handle.remove()
    assert unhooked(model)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


# -- batches, padding, models -------------------------------------------------------------------------------------

def _models() -> dict[str, Any]:
    small: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return {
        "llama": lambda: llama(3), "bare": lambda: llama(3).model,
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=256)),
        "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
            **small, head_dim=8, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]))}


@pytest.mark.parametrize("name", _models())
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batch_and_padding_make_no_difference(name: str, pooling: Any) -> None:
    torch.manual_seed(1)
    model, tokenizer = _models()[name]().eval(), tiny_tokenizer()
    settings = Settings(templates_of("prompteol"), end_layer=3, exit_layer=-1, pooling=pooling)
    encoder = SentenceEncoder(model, tokenizer, settings)
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([t]) for t in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    small = SentenceEncoder(model, tokenizer, settings, batch_tokens=1).encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(together, small, atol=1e-5)
    for left in (False, True):
        with torch.no_grad():
            padded = encoder.embed(*collate(encoder.rows(TEXTS), left))
        np.testing.assert_allclose(together, padded.numpy(), atol=1e-5)
    tokenizer.padding_side = "left"
    np.testing.assert_array_equal(together, encoder.encode(TEXTS))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)


def test_encode() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    encoder = TokenPrepending().encoder(model, tokenizer)
    made = encoder.encode(TEXTS)
    assert made.shape == (5, 32) and made.dtype == np.float32
    np.testing.assert_array_equal(made, TokenPrepending().encoder(model, tokenizer).encode(TEXTS))
    assert not np.allclose(made, TokenPrepending().encoder(model, tokenizer, seed=1).encode(TEXTS), atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)
    half = TokenPrepending().encoder(llama().bfloat16(), tokenizer).encode(TEXTS)
    assert half.dtype == np.float32 and ((half * made).sum(1) > 0.98).all()


def test_several_prompts_give_their_mean() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    several = TokenPrepending("metaeol", normalize=False).encoder(model, tokenizer).encode(TEXTS)
    each = [TokenPrepending(t, normalize=False).encoder(model, tokenizer).encode(TEXTS) for t in TEMPLATES["metaeol"]]
    assert len(each) > 1
    np.testing.assert_allclose(several, np.mean(each, axis=0), rtol=1e-4, atol=1e-5)


def test_baselines() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    with torch.no_grad():
        states = model(tokenizer(TEXTS[1], return_tensors="pt")["input_ids"], output_hidden_states=True).hidden_states
    for leave in (-1, 3):
        state = states[leave][0]
        np.testing.assert_allclose(last_token(model, tokenizer, leave, normalize=False).encode(TEXTS)[1], state[-1],
                                   rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean_pooling(model, tokenizer, leave, normalize=False).encode(TEXTS)[1],
                                   state.mean(0), rtol=1e-4, atol=1e-5)
    knowledge = prompt_eol(model, tokenizer, "knowledge")
    assert knowledge.encode(TEXTS).shape == (5, 32) and knowledge.rows(["x"])[0].at == NOWHERE


# -- prompts and tokens -------------------------------------------------------------------------------------------

def test_templates() -> None:
    assert without_placeholder(TEMPLATES["prompteol"][0]) == 'This sentence : "{text}" means in one word:"'
    assert with_placeholder('"{text}" is') == '"<PST>{text}" is'
    assert without_placeholder('"<PST>{text}" is') == '"{text}" is'
    assert without_placeholder("<PST> {text}") == "{text}"
    assert tidy("Who?") == "Who." and tidy('say "no"') == "say 'no'" and tidy("a cat") == "a cat." and tidy("") == ""
    for templates in TEMPLATES.values():
        assert all(t.count("{text}") == 1 and t.index("<PST>") < t.index("{text}") for t in templates)


def test_a_space_before_the_placeholder_goes_behind_it() -> None:
    tokenizer = tiny_tokenizer()
    for template, head, tail in (('A : <PST> "{text}"', "A :", ' "x"'), ("A: <PST>{text}", "A:", " x"),
                                 ("<PST>{text}", "", "x")):
        row = tokenize(tokenizer, template, ["x"])[0]
        assert tokenizer.decode(row.ids[:row.at]) == head and tokenizer.decode(row.ids[row.at + 1:]) == tail


def test_marks_inside_texts_stay_text() -> None:
    tokenizer = tiny_tokenizer()
    row = tokenize(tokenizer, "<PST>{text}!", ["a <PST> {text}"])[0]
    assert row.at == 0 and tokenizer.decode(row.ids[1:]) == "a <PST> {text}!"


def test_special_tokens_go_in_front_only() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    assert special_start(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert tokenizer("a")["input_ids"][-1] == 2 and special_start(tokenizer) == [1]
    row = tokenize(tokenizer, 'Q <PST> "{text}"', ["a"])[0]
    assert row.ids[0] == 1 and 2 not in row.ids and tokenizer.decode(row.ids[-3:]) == '"a"' and row.at == 2


@pytest.mark.parametrize("limit", [60, 512])
def test_long_texts_lose_their_end_and_keep_the_prompt(limit: int) -> None:
    model, tokenizer = llama(), tiny_tokenizer()  # its context is 512
    encoder = TokenPrepending(max_length=None if limit == 512 else limit).encoder(model, tokenizer)
    texts = ["word " * 200, "A cat sleeps."]
    with pytest.warns(UserWarning, match=f"1 of 2 texts were cut so that they fit into {limit} tokens"):
        rows = encoder.rows(texts)
    assert len(rows[0].ids) == limit
    said = tokenizer.decode(rows[0].ids)
    assert said.startswith("This sentence :") and said.endswith('" means in one word:"') and ' "word word ' in said
    with pytest.warns(UserWarning, match="cut"):
        both = encoder.encode(texts)
    np.testing.assert_allclose(both[1], encoder.encode(texts[1:])[0], atol=1e-5)


def test_a_prompt_without_room_for_a_text() -> None:
    encoder = TokenPrepending("knowledge", max_length=100).encoder(llama(), tiny_tokenizer())
    with pytest.raises(ValueError, match="leaves no room for a text within 100 tokens"):
        encoder.encode(["A cat sleeps on the mat."])


def test_batches_are_of_like_length() -> None:
    rows = [Row([1] * n, NOWHERE) for n in (5, 2, 9, 2, 5, 30)]
    made = list(batches(rows, 12))
    assert made == [[1, 3], [0, 4], [2], [5]] and list(batches([], 12)) == []


# -- bad input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("field", "wrong"), [
    ("start_layer", 0), ("start_layer", True), ("end_layer", 1), ("end_layer", -1), ("end_layer", 2.5),
    ("exit_layer", 0), ("max_length", 3), ("batch_tokens", 0)])
def test_bad_parameters(field: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"TokenPrepending\.{field}: expected .*got"):
        TokenPrepending(**{field: wrong})


def test_bad_prompts() -> None:
    with pytest.raises(ValueError, match="Did you mean 'prompteol'"):
        TokenPrepending("promteol")
    for wrong in ("{text} {text}", "no slot", "{text} <PST>", "<PST><PST>{text}"):
        with pytest.raises(ValueError, match=r"the slot \{text\} once"):
            TokenPrepending(wrong)
        with pytest.raises(ValueError, match=r"the slot \{text\} once"):
            TokenPrepending(alternatives=(wrong,))


@pytest.mark.parametrize(("fields", "match"), [
    ({"end_layer": 7}, "up to 6, the model's layers.*end_layer=7"), ({"exit_layer": 7}, "exit_layer: .*1 to 6.*got 7"),
    ({"exit_layer": -7}, "exit_layer: .*got -7"), ({"start_layer": 6}, "start_layer=6")])
def test_layers_the_model_does_not_have(fields: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TokenPrepending(**fields).encoder(llama(), tiny_tokenizer())


def test_bad_settings() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    for settings, match in ((Settings(()), "templates: expected one template"), (Settings(("x",)), "the slot"),
                            (Settings(("{text}",), pooling="max"), "expected 'last' or 'mean'")):  # type: ignore
        with pytest.raises(ValueError, match=match):
            SentenceEncoder(model, tokenizer, settings)
    with pytest.raises(ValueError, match=r"batch_tokens: .*got 0"):
        SentenceEncoder(model, tokenizer, Settings(("{text}",)), 0)
    with pytest.raises(ValueError, match="a decoder of transformers"):
        SentenceEncoder("smollm2", tokenizer, Settings(("{text}",)))
    with pytest.raises(UnsupportedModelError, match="no module list"):
        SentenceEncoder(torch.nn.Linear(2, 2), tokenizer, Settings(("{text}",)))


def test_bad_texts() -> None:
    model, tokenizer = llama(), tiny_tokenizer()
    encoder = TokenPrepending().encoder(model, tokenizer)
    with pytest.raises(ValueError, match="a single text"):
        encoder.encode("A cat sleeps.")
    with pytest.raises(ValueError, match="a NoneType in it"):
        encoder.encode(["A cat sleeps.", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="has no token"):
        mean_pooling(model, tokenizer).encode(["fine", ""])
    assert encoder.encode([""]).shape == (1, 32)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        TokenPrepending().encoder(model.train(), tokenizer).encode(TEXTS)


def test_defaults_fit_every_depth() -> None:
    assert default_ends(32) == [8, 4, 11, 16, 2] and default_ends(30)[0] == 8 and default_exit(32) == 30
    for count in range(2, 100):
        assert all(2 <= end <= count for end in default_ends(count)) and 1 <= default_exit(count) < count
    model = llama(2)
    assert TokenPrepending().encoder(model, tiny_tokenizer()).settings.end_layer == 2
    assert TokenPrepending().encoder(tiny_text_llama(), tiny_tokenizer()).settings.exit_layer == 1
    with pytest.raises(ValueError, match="up to 1, the model's layers"):
        TokenPrepending().encoder(llama(1), tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.smollm2
def test_real_sentences_lie_near_their_like() -> None:
    models = pytest.importorskip("looseleaf_lab.models")
    model, tokenizer = models.load("smollm2")
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply today.",
             "Share prices dropped a lot this morning."]
    vectors = TokenPrepending(end_layer=2, exit_layer=-1).encoder(model, tokenizer).encode(texts)
    like = vectors @ vectors.T
    assert like[0, 1] > max(like[0, 2], like[0, 3]) and like[2, 3] > max(like[0, 2], like[1, 3])
    row = TokenPrepending().encoder(model, tokenizer).rows(texts[:1])[0]
    assert tokenizer.decode(row.ids[:row.at]) == "This sentence :"
    assert tokenizer.decode(row.ids[row.at + 1:]) == ' "A man is playing a guitar." means in one word:"'
