"""A control with a known answer: a bigram model with a planted prior and a circuit that copies.

The residual stream has two halves: which token stands here, and what is said next. The first layer's attention copies
the token ``span`` places back into the second half, the last layer's MLP adds the logits of a bigram table, and the
layers between do nothing. So everything the probe measures is known beforehand: the prior is the table's, a question is
answered rightly where copying outweighs the table, and the prior enters at the last layer and nowhere else.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf_prior_distribution.tasks import Instance, PriorTask


class Vocabulary:
    """A tokenizer of words between spaces, without a padding or any other special token."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self._ids = {word: n for n, word in enumerate(words)}
        self.pad_token_id = self.bos_token_id = self.eos_token_id = None

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """``input_ids`` of a text, or of each of several; an unknown word has an id that the model does not know."""
        if isinstance(text, str):
            return {"input_ids": [self._ids.get(word, len(self.words)) for word in text.split()]}
        return {"input_ids": [self(t)["input_ids"] for t in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        """The words of ``ids``."""
        return " ".join(self.words[n] for n in ids)


class _Nothing(nn.Module):
    def forward(self, stream: Tensor) -> Tensor:
        return torch.zeros_like(stream)


class _Copy(nn.Module):
    """Says what stood ``span`` places back."""

    def __init__(self, span: int, strength: float) -> None:
        super().__init__()
        self.span = span
        self.strength = nn.Parameter(torch.tensor(strength))

    def forward(self, stream: Tensor) -> Tensor:
        here = stream[..., :stream.shape[-1] // 2]
        back = functional.pad(here, (0, 0, self.span, 0))[:, :here.shape[1]]
        return torch.cat([torch.zeros_like(here), self.strength * back], -1)


class _Bigram(nn.Module):
    """Says what the table gives after the token that stands here; the table is fixed, its gain can be learned."""

    table: Tensor

    def __init__(self, table: Tensor, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.register_buffer("table", table)

    def forward(self, stream: Tensor) -> Tensor:
        here = stream[..., :stream.shape[-1] // 2]
        return torch.cat([torch.zeros_like(here), self.gain * (here @ self.table)], -1)


class _Layer(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.self_attn(stream)
        out: Tensor = stream + self.mlp(stream)
        return out


class PlantedPrior(nn.Module):
    """The control, with the outside of a decoder of transformers.

    Args:
        table: (V, V) bigram logits: row = token that stands here, column = token said next.
        copy: by how much the copied token's logit is raised.
        gain: factor of the table.
        span: how many places back is copied from; the number of tokens of an answer.
        depth: number of layers, 2 or more.
    """

    def __init__(self, table: Tensor, copy: float, gain: float = 1.0, span: int = 1, depth: int = 4) -> None:
        super().__init__()
        size = len(table)
        first = _Layer(_Copy(span, copy), _Nothing())
        last = _Layer(_Nothing(), _Bigram(table, gain))
        idle = [_Layer(_Nothing(), _Nothing()) for _ in range(depth - 2)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList([first, *idle, last]), "norm": nn.Identity()})
        self.lm_head = nn.Linear(2 * size, size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], 1))
        self.config = SimpleNamespace(num_hidden_layers=depth, vocab_size=size)
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        """``logits`` (B, L, V)."""
        here = functional.one_hot(input_ids, self.config.vocab_size).to(self.lm_head.weight.dtype)
        if attention_mask is not None:
            here = here * attention_mask[..., None]
        stream = torch.cat([here, torch.zeros_like(here)], -1)
        for layer in self.model["layers"]:  # type: ignore[attr-defined]
            stream = layer(stream)
        return SimpleNamespace(logits=self.lm_head(self.model["norm"](stream)), past_key_values=None)


def planted(answers: int = 16, instances: int = 64, *, copy: float = 2.0, spread: float = 1.5, span: int = 1,
            seed: int = 0) -> tuple[PlantedPrior, Vocabulary, PriorTask, dict[str, float]]:
    """A model with a planted prior, its tokenizer, a copying task and the prior that the probe should find.

    Args:
        answers: size of the answer space.
        instances: questions, the answers taking turns.
        copy: as for :class:`PlantedPrior`.
        spread: standard deviation of the table's logits.
        span: tokens of an answer, 1 or 2.
        seed: of the table and the answers.

    Returns:
        Model, tokenizer, task, and answer -> log prior, nats per token.
    """
    if span not in (1, 2) or answers < 2:
        raise ValueError(f"planted: expected span 1 or 2 and answers >= 2, got span={span}, answers={answers}")
    generator = torch.Generator().manual_seed(seed)
    letters = [f"w{n}" for n in range(answers)]
    tokenizer = Vocabulary(["->", *letters])
    table = spread * torch.randn(answers + 1, answers + 1, generator=generator)
    table[:, 0] = -30.0  # the arrow is never said
    model = PlantedPrior(table, copy, span=span)
    order = torch.randperm(answers, generator=generator).tolist()
    space = letters if span == 1 else [f"{letters[n]} {letters[order[n]]}" for n in range(answers)]
    task = PriorTask("copying", tuple(Instance(space[n % answers], space[n % answers]) for n in range(instances)),
                     tuple(space), instruction="")  # this model knows no words an instruction could be in
    table = table.log_softmax(-1).double()
    known: dict[str, float] = {}
    for answer in space:
        ids = [0, *tokenizer(answer)["input_ids"]]
        known[answer] = float(sum(table[a, b] for a, b in itertools.pairwise(ids))) / span
    return model, tokenizer, task, known
