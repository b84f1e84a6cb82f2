"""A control with a known answer: a model in which two hops happen in two layers, and nowhere else.

The residual stream has a part for the words at hand, one for the bridge and one for the answer. The first layer brings
the words before each place to it, one layer looks up the bridge of entity and relation, a later one looks up the answer
of bridge and second relation, and the layers between do nothing. The tables are drawn at random, so that no linear
probe can tell a bridge that has not been looked up.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf.modes import own_random_state
from looseleaf_implicit_reasoning.data import Problem, TwoHop

BACK = 6
"""How many words before its own a place is told by the first layer."""
R1_BACK, R2_BACK = 2, (6, 3)
"""How far R1 stands before E1, and R2 before "is": in "the R2 of the R1 of E1 is", and in "the R2 of E2 is"."""


class _Words(nn.Module):
    """Brings the ``BACK`` words before each place to it, each into a part of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, stream: Tensor) -> Tensor:
        here = stream[..., :self.size]
        back = [functional.pad(here, (0, 0, n, 0))[:, :here.shape[1]] for n in range(1, BACK + 1)]
        rest = stream.shape[-1] - (BACK + 1) * self.size
        return torch.cat([torch.zeros_like(here), *back, here.new_zeros(*here.shape[:2], rest)], -1)


class _LookUp(nn.Module):
    """Writes what a table gives for two words; nothing where there is no such pair.

    Args:
        table: (V, V, V): first word, second word -> what is written.
        first, second, here: parts of the stream that the first word is read from, the second, and that is written to.
        strength: what is written is this large; can be learned.
        shift: places that the first word is read back from.
    """

    table: Tensor

    def __init__(self, table: Tensor, first: int, second: tuple[int, ...], here: int, strength: float,
                 shift: int = 0) -> None:
        super().__init__()
        self.first, self.second, self.here, self.shift = first, second, here, shift
        self.strength = nn.Parameter(torch.tensor(strength))
        self.register_buffer("table", table)

    def forward(self, stream: Tensor) -> Tensor:
        size = len(self.table)
        parts = stream.split(size, -1)
        one = functional.pad(parts[self.first], (0, 0, self.shift, 0))[:, :stream.shape[1]]
        two = torch.stack([parts[n] for n in self.second]).sum(0)
        found = torch.einsum("bla,blc,acv->blv", one, two, self.table)
        out = [torch.zeros_like(part) for part in parts]
        out[self.here] = self.strength * found
        return torch.cat(out, -1)


class _Layer(nn.Module):
    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.mlp = block if block is not None else nn.Identity()
        self.idle = block is None

    def forward(self, stream: Tensor) -> Tensor:
        return stream if self.idle else stream + self.mlp(stream)


class PlantedTwoHop(nn.Module):
    """The control, with the outside of a decoder of transformers.

    Args:
        bridges: (V, V, V) 0 or 1: E1 and R1 -> E2.
        answers: (V, V, V) 0 or 1: E2 and R2 -> E3.
        recall: the layer that looks up bridges; 1 or more.
        answer: the layer that looks up answers; after ``recall``.
        depth: number of layers.
        strength: logit of what was looked up.
    """

    def __init__(self, bridges: Tensor, answers: Tensor, *, recall: int = 2, answer: int = 4, depth: int = 6,
                 strength: float = 6.0) -> None:
        super().__init__()
        if not 1 <= recall < answer < depth:
            raise ValueError(f"PlantedTwoHop: expected 1 <= recall < answer < depth, got recall={recall}, "
                             f"answer={answer}, depth={depth}")
        size = len(bridges)
        blocks: dict[int, nn.Module] = {
            0: _Words(size), recall: _LookUp(bridges, 0, (R1_BACK,), BACK + 1, strength),
            # the bridge stands one place back, where E1 does, and is as large as the other layer made it
            answer: _LookUp(answers, BACK + 1, R2_BACK, BACK + 2, 1.0, shift=1)}
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(size, (BACK + 3) * size),
                                    "layers": nn.ModuleList([_Layer(blocks.get(n)) for n in range(depth)]),
                                    "norm": nn.Identity()})
        self.lm_head = nn.Linear((BACK + 3) * size, size, bias=False)
        with torch.no_grad():
            words: Any = self.model["embed_tokens"].weight
            words.zero_()
            words[:, :size] = torch.eye(size)
            self.lm_head.weight.zero_()
            for part in (BACK + 1, BACK + 2):
                self.lm_head.weight[:, part * size:(part + 1) * size] = torch.eye(size)
        self.config = SimpleNamespace(num_hidden_layers=depth, vocab_size=size)
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        found: nn.Module = self.model["embed_tokens"]
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        """``logits`` (B, L, V)."""
        stream = self.model["embed_tokens"](input_ids)
        if attention_mask is not None:
            stream = stream * attention_mask[..., None]
        for layer in self.model["layers"]:  # type: ignore[attr-defined]
            stream = layer(stream)
        return SimpleNamespace(logits=self.lm_head(self.model["norm"](stream)), past_key_values=None)


def planted(entities: int = 8, relations: int = 8, bridges: int = 4, *, recall: int = 2, answer: int = 4,
            depth: int = 6, seed: int = 0) -> tuple[PlantedTwoHop, Any, list[TwoHop], list[Problem]]:
    """A model of known bridges, its tokenizer, and all its facts, as facts and as problems.

    Args:
        entities, relations: of E1, and of R1.
        bridges: and as many answers, and second relations.
        recall, answer, depth: see :class:`PlantedTwoHop`.
        seed: of the tables.

    Returns:
        Model, tokenizer, facts, and problems whose one result is the bridge, at the end of the mention and at the end
        of the question.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(seed)
    groups = {"e": entities, "r": relations, "b": bridges, "s": bridges, "a": bridges}
    words = ["<pad>", "The", "the", "of", "is", *(f"{g}{n}" for g, count in groups.items() for n in range(count))]
    ids = {word: n for n, word in enumerate(words)}
    first, second = torch.zeros(2, len(words), len(words), len(words))
    facts = []
    after = {(b, s): draw.randrange(bridges) for b in range(bridges) for s in range(bridges)}
    for (b, s), a in after.items():
        first[ids[f"b{b}"], ids[f"s{s}"], ids[f"b{b}"]] = 1  # a bridge that is named is its own
        second[ids[f"b{b}"], ids[f"s{s}"], ids[f"a{a}"]] = 1
    for e in range(entities):
        for r in range(relations):
            b, s = draw.randrange(bridges), draw.randrange(bridges)
            first[ids[f"e{e}"], ids[f"r{r}"], ids[f"b{b}"]] = 1
            facts.append(TwoHop(f"e{e}", f"r{r}", f"b{b}", f"s{s}", f"a{after[b, s]}"))
    made = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    with own_random_state():  # layers draw first weights, which are then overwritten
        model = PlantedTwoHop(first, second, recall=recall, answer=answer, depth=depth)
    problems = [Problem(f.two_hop, f.e3, results=(f.e2,), premises=(f.split()[0],)) for f in facts]
    return model, tokenizer, facts, problems
