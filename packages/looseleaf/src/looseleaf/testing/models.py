"""Small models with random weights, a tokenizer and a model that goes with it; all made in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def seeded(build: Callable[[], T], seed: int = 0) -> T:
    """What ``build`` makes with the global generator of torch seeded; its former state comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@torch.no_grad()
def change(tensors: Iterable[Tensor], seed: int = 1) -> None:
    """Add random numbers to tensors in place, half as large as what is there."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(noise * (0.5 * tensor.abs().mean() + 0.01))


def _tiny(model: str, config: str, seed: int, sizes: dict[str, Any], **options: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.2, **sizes}
    made = getattr(transformers, config)(**sizes)
    return seeded(lambda: getattr(transformers, model)(made, **options), seed).eval()


def tiny_llama(seed: int = 0, vocabulary: int = 64, **config: Any) -> Any:
    """A Llama: 2 layers, width 64, 4 query heads, 2 key heads; ``config`` overrides."""
    return _tiny("LlamaForCausalLM", "LlamaConfig", seed,
                 {"vocab_size": vocabulary, "num_key_value_heads": 2, **config})


def tied_llama() -> Any:
    """A Llama with tied embeddings: 2 layers, width 32, vocabulary 64."""
    return tiny_llama(hidden_size=32, intermediate_size=64, max_position_embeddings=128, tie_word_embeddings=True,
                      initializer_range=0.02)


def tiny_bert(seed: int = 0, **config: Any) -> Any:
    """A BERT without pooler and dropout: 2 layers, width 64, 4 heads, vocabulary 64; ``config`` overrides."""
    return _tiny("BertModel", "BertConfig", seed,
                 {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config}, add_pooling_layer=False)


def tiny_gemma3() -> Any:
    """A Gemma 3, whose layer 0 has a sliding window."""
    return _tiny("Gemma3ForCausalLM", "Gemma3TextConfig", 0, {
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32, "initializer_range": 0.02,
        "layer_types": ["sliding_attention", "full_attention"]})


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


class SmallNetwork(nn.Sequential):
    """Two convolutions, a batch norm and two Linear layers, (B, 8, 8, 8) -> (B, 8); all widths are multiples of 8."""


class TiedNetwork(nn.Sequential):
    """Two Linear layers that share a weight, and a third, (B, 16) -> (B, 8)."""


def small_network() -> nn.Module:
    """A :class:`SmallNetwork`, the same each time."""
    return seeded(lambda: SmallNetwork(OrderedDict(
        first=nn.Conv2d(8, 16, 3, padding=1), norm=nn.BatchNorm2d(16), relu=nn.ReLU(), second=nn.Conv2d(16, 8, 3),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), hidden=nn.Linear(8, 24), bent=nn.ReLU(),
        last=nn.Linear(24, 8))))


def tied_network() -> nn.Module:
    """A :class:`TiedNetwork`, the same each time."""
    model: Any = seeded(lambda: TiedNetwork(OrderedDict(
        first=nn.Linear(16, 16), tanh=nn.Tanh(), again=nn.Linear(16, 16), bent=nn.Tanh(), other=nn.Linear(16, 8))))
    model.again.weight = model.first.weight
    return model  # type: ignore[no-any-return]


__all__ = ["SmallNetwork", "TiedNetwork", "change", "seeded", "small_network", "tied_llama", "tied_network",
           "tiny_bert", "tiny_gemma3", "tiny_llama", "tiny_text_llama", "tiny_tokenizer"]
