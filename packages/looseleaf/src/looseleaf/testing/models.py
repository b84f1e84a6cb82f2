"""Small models with random weights, a tokenizer and a model that goes with it; all made in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """What ``build`` makes with the global generator of torch seeded; its former state comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def tiny_llama(seed: int = 0, vocabulary: int = 64, **config: Any) -> Any:
    """A Llama: 2 layers, width 64, 4 query heads, 2 key heads; ``config`` overrides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
             "initializer_range": 0.2, **config}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes)), seed).eval()


def tied_llama() -> Any:
    """A Llama with tied embeddings: 2 layers, width 32, vocabulary 64."""
    return tiny_llama(hidden_size=32, intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True,
                      initializer_range=0.02)


def tiny_bert(seed: int = 0, **config: Any) -> Any:
    """A BERT without pooler and dropout: 2 layers, width 64, 4 heads, vocabulary 64; ``config`` overrides."""
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.2,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config}
    return seeded(lambda: BertModel(BertConfig(**sizes), add_pooling_layer=False), seed).eval()


def tiny_gemma3(seed: int = 0) -> Any:
    """A Gemma 3, whose layer 0 has a sliding window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=32, max_position_embeddings=2048,
        layer_types=["sliding_attention", "full_attention"])), seed).eval()


def tiny_text_llama() -> Any:
    """A Llama of two layers for :func:`tiny_tokenizer`."""
    return tiny_llama(vocabulary=128)


def tiny_tokenizer() -> Any:
    """A tokenizer with one token for each printable ASCII character, and three special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(c): c - 29 for c in range(32, 127)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class SmallNetwork(nn.Module):
    """Two convolutions, a batch norm and two Linear layers, for inputs (B, 8, 8, 8); all widths are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 8, 3)
        self.hidden = nn.Linear(8, 24)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8, 8, 8) -> (B, 8)."""
        x = torch.relu(self.norm(self.first(x)))
        out: Tensor = self.last(torch.relu(self.hidden(self.second(x).mean((2, 3)))))
        return out


class TiedNetwork(nn.Module):
    """Two Linear layers that share a weight, and a third, for inputs (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.other = nn.Linear(16, 8)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, 16) -> (B, 8)."""
        out: Tensor = self.other(torch.tanh(self.again(torch.tanh(self.first(x)))))
        return out


def small_network() -> nn.Module:
    """A :class:`SmallNetwork`, the same each time."""
    made: nn.Module = seeded(SmallNetwork)
    return made


def tied_network() -> nn.Module:
    """A :class:`TiedNetwork`, the same each time."""
    made: nn.Module = seeded(TiedNetwork)
    return made


__all__ = ["SmallNetwork", "TiedNetwork", "seeded", "small_network", "tied_llama", "tied_network", "tiny_bert",
           "tiny_gemma3", "tiny_llama", "tiny_text_llama", "tiny_tokenizer"]
