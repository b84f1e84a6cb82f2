"""LocalModel against the plain loop that forwards every prompt and continuation by itself."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf_text import LocalModel
from looseleaf_text.local import plan

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
WORDS = ["good", "bad", "film", "was", "the", "really", "very", "plot", "actor", "I"]


def tokenizer(begin: bool = False) -> Any:
    """One token per character; with ``begin`` a beginning-of-text token is put first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(c): c - 29 for c in range(32, 127)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>",
                                                eos_token="</s>")


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**dict(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3), **more})).eval()


def gpt2() -> Any:
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3)).eval()


def mistral() -> Any:
    torch.manual_seed(2)
    return transformers.MistralForCausalLM(transformers.MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=24, initializer_range=0.3)).eval()


def gemma3() -> Any:
    torch.manual_seed(3)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=16, query_pre_attn_scalar=8, initializer_range=0.3)).eval()


def mpt() -> Any:
    """Positions by ALiBi, counted by the model itself."""
    torch.manual_seed(4)
    return transformers.MptForCausalLM(transformers.MptConfig(
        vocab_size=100, d_model=32, n_heads=4, n_layers=2, max_seq_len=256, initializer_range=0.3)).eval()


def mamba() -> Any:
    """No keys and values at all."""
    torch.manual_seed(5)
    return transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)).eval()


MODELS = {"llama-gqa": llama, "gpt2": gpt2, "mistral-window": mistral, "gemma3": gemma3, "mpt": mpt, "mamba": mamba}


def plain(model: Any, heads: list[list[int]], tails: list[list[list[int]]]) -> list[list[float]]:
    out = []
    with torch.no_grad():
        for head, row in zip(heads, tails, strict=True):
            out.append([])
            for tail in row:
                logits = model(torch.tensor([[*head, *tail]])).logits[0].double()
                log_probs = torch.log_softmax(logits, -1)
                out[-1].append(sum(float(log_probs[len(head) - 1 + k, t]) for k, t in enumerate(tail)))
    return out


def prompts(n: int, seed: int = 0) -> list[str]:
    """Prompts that share beginnings, one that is the beginning of another, and two that are equal."""
    rng = random.Random(seed)
    starts = [" ".join(rng.choices(WORDS, k=6)) for _ in range(3)]
    made = [rng.choice(starts) + " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(n - 3)]
    return [*made, starts[0], starts[0] + " good", made[0]]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 150, 8192])
@pytest.mark.parametrize("begin", [False, True])
def test_scores_equal_the_plain_loop(kind: str, batch_tokens: int, begin: bool) -> None:
    if kind in ("mamba", "mpt") and batch_tokens == 1:
        pytest.skip("slow, and the same as for the others: one row at a time")
    model = MODELS[kind]()
    made = LocalModel(model, tokenizer(begin), batch_tokens=batch_tokens)
    texts = prompts(14)
    continuations = [[" good", " bad", "!"] if n % 3 else [" a", " b"] for n in range(len(texts))]
    heads, tails = made.encode_pairs(texts, continuations)
    got = made.score(texts, continuations)
    for a, b in zip(got, plain(model, heads, tails), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_single_token_labels_equal_the_plain_loop(kind: str) -> None:
    model = MODELS[kind]()
    made = LocalModel(model, tokenizer())
    texts = prompts(20, seed=3)
    continuations = [["+", "-"]] * len(texts)
    heads, tails = made.encode_pairs(texts, continuations)
    for a, b in zip(made.score(texts, continuations), plain(model, heads, tails), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_sharing_forwards_less_and_counts_the_same() -> None:
    model = llama()
    shared, alone = LocalModel(model, tokenizer()), LocalModel(model, tokenizer(), share_prefixes=False)
    texts = ["the film was really very good and " * 3 + w for w in WORDS]
    a, b = (m.score(texts, [["+", "-"]] * 10) for m in (shared, alone))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert (shared.calls, shared.tokens) == (alone.calls, alone.tokens) == (10, sum(map(len, texts)))
    assert shared.forwarded * 4 < alone.forwarded


def test_batches_stay_within_the_bound() -> None:
    model = llama()
    widest = 0

    def watch(_module: Any, _arguments: Any, keywords: Any) -> None:
        nonlocal widest
        widest = max(widest, keywords["attention_mask"].numel())

    model.register_forward_pre_hook(watch, with_kwargs=True)
    made = LocalModel(model, tokenizer(), batch_tokens=300)
    made.score(prompts(40), [[" good", " bad", "!"]] * 40)
    assert 100 < widest <= 300


def test_plan_covers_every_row_once_and_leaves_a_token() -> None:
    rng = random.Random(0)
    for _ in range(50):
        heads = [[rng.randint(0, 1) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 20))]
        groups = plan(heads, sorted(range(len(heads)), key=lambda n: heads[n]))
        assert sorted(n for rows, _ in groups for n in rows) == list(range(len(heads)))
        for rows, shared in groups:
            assert all(len(heads[n]) > shared for n in rows)
            assert len({tuple(heads[n][:shared]) for n in rows}) == 1
        cost = sum(shared + sum(len(heads[n]) - shared for n in rows) for rows, shared in groups)
        assert cost <= sum(map(len, heads))


def test_plan_of_a_long_staircase_does_not_overflow() -> None:
    heads = [[7] * n for n in range(1, 400)]
    assert sum(len(rows) for rows, _ in plan(heads, range(len(heads)))) == 399


def test_trailing_space_belongs_to_the_continuation() -> None:
    made = LocalModel(llama(), tokenizer())
    np.testing.assert_allclose(made.score(["the film "], [["good"]]), made.score(["the film"], [[" good"]]))


@pytest.mark.parametrize("kind", MODELS)
def test_generation_equals_one_at_a_time(kind: str) -> None:
    made = LocalModel(MODELS[kind](), tokenizer())
    texts = ["good film", "the plot was really bad", "I", ""]
    together = made.generate(texts, 12)
    assert together == [made.generate([t], 12)[0] for t in texts]
    assert all(0 < len(t) <= 12 for t in together if t)


def test_generation_stops_and_is_seeded() -> None:
    made = LocalModel(llama(), tokenizer())
    full = made.generate(["good film"], 20)[0]
    assert len(full) > 4
    assert made.generate(["good film"], 20, stop=[full[3]])[0] == full[:full.index(full[3])]
    warm = [made.generate(["good film"] * 3, 10, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]


def test_embeddings_do_not_depend_on_the_batch() -> None:
    made = LocalModel(llama(), tokenizer())
    texts = prompts(8)
    whole = made.embed(texts)
    assert whole.shape == (8, 32) and whole.dtype == np.float32
    np.testing.assert_allclose(whole, np.concatenate([made.embed([t]) for t in texts]), atol=1e-5)


def test_token_texts_join_to_the_text() -> None:
    made = LocalModel(llama(), tokenizer())
    assert made.token_texts("a good film") == list("a good film")


def test_errors_say_what_to_do() -> None:
    model = llama()
    with pytest.raises(ValueError, match="batch_tokens: expected an integer >= 1, got 0"):
        LocalModel(model, tokenizer(), batch_tokens=0)
    with pytest.raises(ValueError, match="expected the model's tokenizer"):
        LocalModel(model, None)
    made = LocalModel(model, tokenizer())
    with pytest.raises(ValueError, match="has no tokens"):
        made.score(["a"], [[""]])
    with pytest.raises(ValueError, match="for each of 2 prefixes, got 1"):
        made.score(["a", "b"], [["c"]])
    with pytest.raises(ValueError, match=r"at most 256 positions .*shorten"):
        made.score(["a" * 300], [["c"]])
    with pytest.raises(ValueError, match="max_tokens=0"):
        made.generate(["a"], 0)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        made.score(["a"], [["b"]])


@pytest.mark.slow
@pytest.mark.smollm2
def test_a_real_model_scores_as_the_plain_loop() -> None:
    models = pytest.importorskip("looseleaf_lab.models")
    torch.set_num_threads(1)
    model, real = models.load("smollm2")
    made = LocalModel(model, real)
    texts = [f"Review: {t}\nSentiment:" for t in (
        "a lovely film", "dull and far too long", "a lovely film about dogs", "I slept through it")]
    continuations = [[" positive", " negative", " somewhat underwhelming"]] * 4
    heads, tails = made.encode_pairs(texts, continuations)
    assert max(len(t) for t in tails[0]) > 1
    for a, b in zip(made.score(texts, continuations), plain(model, heads, tails), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert "Paris" in made.generate(["The capital of France is"], 5)[0]


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_model_with_an_adapter_is_run_as_the_merged_one(build: Any, compiled: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    target = "c_attn" if build is gpt2 else "q_proj"
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(
        r=2, target_modules=[target], init_lora_weights=False, fan_in_fan_out=build is gpt2)).eval()
    ours = LocalModel(torch.compile(wrapped, backend="eager") if compiled else wrapped, tokenizer())
    prompts, answers = ["the film was", "I"], [["good", "bad"], ["really", "very"]]
    scores, vectors, forwarded = ours.score(prompts, answers), ours.embed(prompts), ours.forwarded
    # a batch of mixed lengths: with the wrapper's own signature, places would be counted through the padding
    plain = LocalModel(wrapped.merge_and_unload(), tokenizer())
    np.testing.assert_allclose(scores, plain.score(prompts, answers), atol=1e-3)
    np.testing.assert_allclose(vectors, plain.embed(prompts), atol=1e-4)
    assert forwarded == plain.forwarded, "run in another way"
