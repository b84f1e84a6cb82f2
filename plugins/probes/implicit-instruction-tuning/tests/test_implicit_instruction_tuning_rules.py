"""The rule adapter: the card's numbers, its plain reference, batches, caches, beams, tokenizers of several kinds."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import transformers

from looseleaf.testing.models import seeded, tiny_gemma3, tiny_llama, tiny_tokenizer
from looseleaf_implicit_instruction_tuning import RuleAdapter, product_of_experts, respond, rule_scores
from looseleaf_text import LocalModel

WORDS = ["</s>", "I", "\n", "cat", "dog"]
BASE = [0.01, 0.4, 0.09, 0.3, 0.2]
RULES = {"I": -5.0, "\n": 1.0}


class Words:
    """A tokenizer of five words, as far as the adapter asks."""

    eos_token_id, all_special_ids = 0, [0]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": []}

    def __len__(self) -> int:
        return len(WORDS)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(WORDS[i] for i in ids)

    def batch_decode(self, rows: list[list[int]], **options: Any) -> list[str]:
        return [self.decode(row) for row in rows]


def after(response: list[int], prompt: tuple[int, ...] = (), **options: Any) -> torch.Tensor:
    """Probabilities of the next of the five words with the rules, float64."""
    rules = RuleAdapter(Words(), uniform=RULES, **options)
    row = torch.tensor([[*prompt, *response]], dtype=torch.long)
    made: torch.Tensor = rules.after(len(prompt))(row, torch.tensor([BASE], dtype=torch.float64).log())[0].softmax(-1)
    return made


def test_numbers_of_five_words() -> None:
    torch.testing.assert_close(after([]), torch.tensor([.013204, .003559, .323032, .396123, .264082],
                                                       dtype=torch.float64), atol=5e-7, rtol=0)
    # ten tokens so far, of which only the cat has a score
    found = RuleAdapter(Words(), uniform=RULES).after(0)(
        torch.tensor([[3] * 10]), torch.tensor([BASE], dtype=torch.float64).log())[0].softmax(-1)
    torch.testing.assert_close(found, torch.tensor([.034218, .005061, .459427, .125707, .375586],
                                                   dtype=torch.float64), atol=5e-7, rtol=0)


def test_adding_scores_is_the_product_of_experts() -> None:
    draw = random.Random(0)
    for variant in ("paper", "code"):
        for n in (0, 1, 7, 249, 250, 400):
            response = draw.choices(range(1, 5), k=n)
            scores = rule_scores(5, response, eos_ids=[0], uniform={1: -5.0, 2: 1.0}, variant=variant, prompt=[4])
            wanted = torch.tensor(product_of_experts(BASE, scores), dtype=torch.float64)
            torch.testing.assert_close(after(response, (4,), variant=variant), wanted, atol=1e-12, rtol=0)


def test_odds_of_the_end() -> None:
    def odds(n: int, **options: Any) -> float:
        p = after([4] * n, **options)
        base = after([4] * n, eos_weight=0.0)
        return float(p[0] / (1 - p[0]) * (1 - base[0]) / base[0])

    assert odds(25) == pytest.approx(4.4817, abs=5e-5)
    assert odds(100) == pytest.approx(403.43, abs=5e-3)
    assert odds(300) == pytest.approx(math.exp(18), rel=1e-6)  # no cut-off
    assert odds(100, variant="code") == pytest.approx(403.43, abs=5e-3)
    assert odds(250, variant="code") == odds(300, variant="code") == pytest.approx(1.0)


def test_used_twice_is_once_and_the_prompt_does_not_count() -> None:
    torch.testing.assert_close(after([3, 3, 4], eos_weight=0.0), after([3, 4, 4], eos_weight=0.0), atol=0, rtol=0)
    torch.testing.assert_close(after([], prompt=(3, 4)), after([]), atol=0, rtol=0)
    counted = after([], prompt=(0, 3, 4), variant="code")  # the special token does not count
    wanted = product_of_experts(BASE, [0, -5, 1, -1.5, -1.5])
    torch.testing.assert_close(counted, torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def test_all_rules_off_is_the_base_bit_for_bit() -> None:
    off = RuleAdapter(Words(), eos_weight=0.0, uniform={}, repeat=0.0)
    scores = torch.tensor([[-0.0, float("-inf"), 1e-30, 3.0, -7.0]])
    assert off.off and off(torch.tensor([[1, 2]]), scores) is scores
    model, tokenizer = tiny_llama(vocabulary=128), tiny_tokenizer()
    local = LocalModel(model, tokenizer)
    assert respond(local, ["hello"], rules=off, max_new_tokens=8) == respond(local, ["hello"], max_new_tokens=8)


def test_several_ends_get_the_rule() -> None:
    rules = RuleAdapter(Words(), uniform={}, repeat=0.0, eos_token_id=[0, 4]).after(0)
    made = rules(torch.tensor([[1] * 50]), torch.zeros(1, 5))
    assert made.tolist() == [[3.0, 0.0, 0.0, 0.0, 3.0]]


def models_of_several_families() -> list[Any]:
    torch_ids = {"vocab_size": 128, "initializer_range": 0.4}
    gpt2 = seeded(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=256, **torch_ids))).eval()
    neox = seeded(lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **torch_ids))).eval()
    mamba = seeded(lambda: transformers.MambaForCausalLM(transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, **torch_ids))).eval()
    return [tiny_llama(vocabulary=128), tiny_gemma3(), gpt2, neox, mamba]


@pytest.mark.parametrize("number", range(5), ids=["llama", "gemma3", "gpt2", "gpt-neox", "mamba"])
def test_batch_is_single_and_cached_is_uncached(number: int) -> None:
    model, tokenizer = models_of_several_families()[number], tiny_tokenizer()
    prompts = ["A", "Write a poem!", "List three of them, please"]
    if model.config.vocab_size < 128:  # of the kit's Gemma
        model = seeded(lambda: type(model)(transformers.Gemma3TextConfig(**{**model.config.to_dict(),
                                                                            "vocab_size": 128}))).eval()
    rules = RuleAdapter(tokenizer, eos_weight=60.0, uniform={"e": -2.0, " ": 1.0})
    local = LocalModel(model, tokenizer)
    together = respond(local, prompts, rules=rules, max_new_tokens=20)
    assert together == [respond(local, [p], rules=rules, max_new_tokens=20)[0] for p in prompts]
    # without a cache, token by token, with the plain reference
    ids = local.encode_pairs(["<|user|>\nA\n<|assistant|>\n"], [["a"]])[0][0]
    made: list[int] = []
    with torch.no_grad():
        while len(made) < 20:
            base = model(input_ids=torch.tensor([[*ids, *made]]), use_cache=False).logits[0, -1].double()
            scores = rule_scores(128, made, eos_ids=[2], uniform=rules.scores_of, eos_weight=60.0)
            token = int((base.log_softmax(-1) + torch.tensor(scores, dtype=torch.float64)).argmax())
            if token == 2:
                break
            made.append(token)
    assert made == together[0].ids


def test_beams_and_prompts_that_begin_the_response() -> None:
    model, tokenizer = tiny_llama(vocabulary=128), tiny_tokenizer()
    rules = RuleAdapter(tokenizer, uniform={})
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6,
                          do_sample=False, logits_processor=[rules.after(ids)], pad_token_id=0)
    one = [model.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), num_beams=3,
                          max_new_tokens=6, do_sample=False, logits_processor=[rules.after(row[None])],
                          pad_token_id=0)[0] for row in ids]
    for row, alone in zip(made, one, strict=True):
        assert row[:len(alone)].tolist() == alone.tolist()[:len(row)]
    # two prompts of which the second has a token of its response already
    logits = rules.after([3, 2])(ids, torch.zeros(2, 128))
    assert logits[0].eq(0).all() and logits[1, 10] == -1.5 and logits[1, 2] == pytest.approx(0.06)
    beams = rules.after([3, 2])(ids.repeat_interleave(2, 0), torch.zeros(4, 128))
    torch.testing.assert_close(beams, logits.repeat_interleave(2, 0), atol=0, rtol=0)


def test_servers_call_it_row_by_row() -> None:
    rules = RuleAdapter(Words(), uniform=RULES)
    logits = torch.tensor(BASE).log()
    wanted = rules.after(1)(torch.tensor([[4, 3, 3]]), logits[None])[0]
    torch.testing.assert_close(rules.vllm([4], [3, 3], logits), wanted, atol=0, rtol=0)
    torch.testing.assert_close(rules.vllm((3, 3), logits), wanted, atol=0, rtol=0)
    assert rules.vllm([], logits).shape == (5,)


def sentencepiece() -> Any:
    """A tokenizer in the manner of Llama 2: a space is part of a token, and a byte has one of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁I", "I", "▁should", "should", "▁▁", "a", "▁a", "!", "▁!", "▁<", "<"]
    made = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def test_texts_of_the_rules_become_tokens_with_their_space() -> None:
    tokenizer = sentencepiece()
    with pytest.warns(UserWarning, match="no single token"):
        rules = RuleAdapter(tokenizer)
    read = {tokenizer.convert_ids_to_tokens(i): score for i, score in rules.scores_of.items()}
    assert read == {"<0x0A>": 1, "▁I": -5, "I": -5, "▁should": -6, "▁▁": 1, "!": 1, "▁<": -4, "<": -4}
    assert "What" in rules.unmatched and "\n" not in rules.unmatched


@pytest.mark.parametrize("options, message", [
    ({"eos_length": 0}, "expected an integer >= 1, got 0"), ({"variant": "both"}, "expected 'paper' or 'code', got"),
    ({"eos_weight": float("nan")}, "expected a finite number for 'eos_weight'"),
    ({"uniform": {"I": float("inf")}}, "expected a finite number for 'I'")])
def test_refuses_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuleAdapter(Words(), **options)


def test_refuses_tokenizers_and_batches_that_do_not_fit() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.warns(UserWarning, match="expected texts of one token"):
        assert RuleAdapter(tokenizer, uniform={"never one token": -1.0}).unmatched == ["never one token"]
    rules = RuleAdapter(tokenizer, uniform={})
    with pytest.raises(ValueError, match=r"rules.after\(inputs\)"):
        rules(torch.tensor([[1]]), torch.zeros(1, 128))
    with pytest.raises(ValueError, match="expected prompts of 3 rows"):
        rules.after([1, 1])(torch.tensor([[1]] * 3), torch.zeros(3, 128))
    with pytest.raises(ValueError, match="at most 1 positions"):
        rules.after(2)(torch.tensor([[1]]), torch.zeros(1, 128))
    with pytest.raises(ValueError, match="expected logits of more than 2 tokens"):
        rules.after(0)(torch.tensor([[1]]), torch.zeros(1, 2))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-text token"):
        RuleAdapter(tokenizer, uniform={})
    RuleAdapter(tokenizer, eos_weight=0.0, uniform={})
