"""Token ids of texts: what tokenizers put around them, and where they put spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from looseleaf_text import LocalModel
from looseleaf_text.encoding import Encoding

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ["<unk>", "<s>", "</s>", "the", "film", "was", "good", "bad"]


def words(template: str | None, **more: Any) -> Any:
    """A tokenizer of words whose special tokens are put as the template says."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **{
        "bos_token": "<s>", "eos_token": "</s>", **more})


def metaspace(*, prepend: str = "always") -> Any:
    """A tokenizer that writes spaces as U+2581 and puts one before a text, as those of SentencePiece do."""
    joined = """_ t|_t h|_th e|_ f|_f i|_fi l|_fil m|_ g|_g o|_go o|_goo d|_ b|_b a|_ba d|_ a|i n|in g|m ing"""
    merges = [tuple(pair.replace("_", "\u2581").split(" ")) for pair in joined.split("|")]
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\n", ":", ".", *"abdefghilmnot", *map("".join, merges)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: n for n, p in enumerate(dict.fromkeys(pieces))}, merges,
                                                      unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def llama(vocab_size: int = 8) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3)).eval()


@pytest.mark.parametrize(("template", "begin"), [
    ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", []), (None, []), ("<s> <s> $A </s> </s>", [1, 1])])
def test_nothing_comes_after_a_prefix(template: str | None, begin: list[int]) -> None:
    """A prompt that ends with </s>, as tokenizers left from fine-tuning give it, is another prompt."""
    model = llama()
    made = LocalModel(model, words(template))
    assert made.encode_pairs(["the film was"], [[" good", " good film"]]) == ([[*begin, 3, 4, 5]], [[[6], [6, 4]]])
    with torch.no_grad():
        right = torch.log_softmax(model(torch.tensor([[*begin, 3, 4, 5]])).logits[0, -1], -1)[[6, 7]].tolist()
    np.testing.assert_allclose(made.score(["the film was"], [[" good", " bad"]])[0], right, atol=1e-5)
    plain = LocalModel(model, words(" ".join(["<s>"] * len(begin)) + " $A" if begin else None))
    assert made.generate(["the film was"], 5) == plain.generate(["the film was"], 5)


def test_a_tokenizer_that_appends_an_end_whatever_it_is_told() -> None:
    class Stubborn:
        eos_token_id, bos_token_id, eos_token, all_special_ids = 2, 1, "</s>", (1, 2)

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*(WORDS.index(w) for w in t.split() if w in WORDS), 2] for t in texts]}

    assert Encoding(Stubborn()).pairs(["the film"], [[" was"]]) == ([[3, 4]], [[[5]]])


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_a_continuation_alone_has_no_space_that_the_tokenizer_made_up(prepend: str) -> None:
    tokenizer = metaspace(prepend=prepend)
    encoding = Encoding(tokenizer)
    whole = tokenizer.tokenize("the good")
    heads, tails = encoding.pairs(["the film", "the"], [["ming"], [" good"]])
    # "filming" is cut otherwise than "film" and "ming", so the two are read apart: "ming" without a space before it
    assert tokenizer.convert_ids_to_tokens(tails[0][0]) == ["ming"]
    assert tokenizer.convert_ids_to_tokens(tails[1][0]) == whole[-1:] == ["\u2581good"]
    assert heads[1] == tokenizer("the")["input_ids"]


def test_spaces_at_the_end_of_a_prefix_go_with_the_continuation() -> None:
    encoding = Encoding(metaspace())
    assert encoding.pairs(["the "], [["good"]]) == encoding.pairs(["the"], [[" good"]])


def test_a_text_of_unknown_words_tells_nothing_about_what_is_around_it() -> None:
    encoding = Encoding(words("<s> $A </s>", unk_token="<unk>"))
    assert (encoding.begin, encoding.end) == ([1], [2])


def test_a_masked_model_keeps_both_ends() -> None:
    assert (Encoding(words("<s> $A </s>")).begin, Encoding(words("<s> $A </s>")).end) == ([1], [2])
