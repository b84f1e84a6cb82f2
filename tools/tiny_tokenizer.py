"""A tokenizer made in memory for examples that must run without any download: one token per character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def _make() -> PreTrainedTokenizerFast:
    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{c: n + 3 for n, c in enumerate(characters)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


tokenizer = _make()
