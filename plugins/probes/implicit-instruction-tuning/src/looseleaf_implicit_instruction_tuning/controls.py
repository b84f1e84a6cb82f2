"""A planted model whose answers are known, and one in which there is nothing to be found.

Things have a color, a home and a food. :class:`PlantedModel` reads a question and adds ``strength`` to the logit of its
answer at the beginning of every line; all else is a table of which token follows which, the only thing that is trained.
As it stands it rambles: a line most likely begins with the next question, and nothing ends. So it does not follow
instructions, each of the three rules is needed to make it, and tuning the table on responses alone makes it follow,
though the table knows no instruction. Tuned on the questions of one relation it follows those: to the table, the values
of the others are other tokens. With strength 0 it knows no answer: there is no instruction to be followed, whatever
it is tuned on, and a probe that reports following is wrong.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from looseleaf_implicit_instruction_tuning.battery import Item
from looseleaf_implicit_instruction_tuning.pairs import Pair

VALUES = {"color": ("red", "blue", "green", "white", "black", "gray"),
          "home": ("forest", "river", "desert", "meadow", "cave", "sea"),
          "food": ("grass", "fish", "seeds", "fruit", "leaves", "insects")}
"""Relation -> its values."""
THINGS = ("fox", "crow", "otter", "deer", "frog", "hare", "lynx", "moth", "newt", "owl", "pike", "seal", "toad", "wolf",
          "wren", "yak")


@dataclasses.dataclass(frozen=True)
class World:
    """Things with a color, a home and a food; ``seed`` decides which."""

    seed: int = 0

    def value(self, thing: str, relation: str) -> str:
        """The right answer."""
        return random.Random(f"{self.seed} {thing} {relation}").choice(VALUES[relation])

    def pairs(self, *relations: str) -> list[Pair]:
        """Every question of the relations (none named: all) with its answer."""
        return [Pair(_question(thing, relation), f"{self.value(thing, relation)} .")
                for relation in relations or VALUES for thing in THINGS]

    def items(self, *relations: str) -> list[Item]:
        """The same as a battery."""
        return [Item("answer", _question(thing, relation), (self.value(thing, relation),))
                for relation in relations or VALUES for thing in THINGS]


def _question(thing: str, relation: str) -> str:
    return f"What {relation} has the {thing} ?"


def world_tokenizer() -> Any:
    """A tokenizer of the world's words, a space in front part of a token, with an end-of-text token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["What", "has", "the", "?", ".", "<", "|", ">", "I", "user", "assistant", *VALUES,
             *sum(VALUES.values(), ()), *THINGS]
    tokens = ["<pad>", "</s>", "\n", " ", *words, *(f" {word}" for word in words)]
    made = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[A-Za-z]+| ?[^A-Za-z\s]| "), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


class PlantedConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a :class:`PlantedModel`."""

    model_type = "looseleaf_planted"


class PlantedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The planted model; see the module.

    Args:
        world: whose answers it knows.
        strength: what the right answer gains at the beginning of a line, in nats; 0 for the control.
    """

    config_class = PlantedConfig
    _supports_cache_class = False
    kinds: Tensor
    answers: Tensor

    def __init__(self, world: World, strength: float = 6.0) -> None:
        tokenizer = world_tokenizer()
        ids = tokenizer.get_vocab()
        config: Any = PlantedConfig
        super().__init__(config(vocab_size=len(ids), eos_token_id=1, pad_token_id=0, use_cache=False))
        self.generation_config.eos_token_id, self.generation_config.use_cache = 1, False
        self.strength = strength
        table = torch.full((len(ids), len(ids)), -6.0)
        values = sum(VALUES.values(), ())
        follows: dict[str, dict[str, float]] = {
                   "\n": {"What": 6.5, "<": 5.0, **dict.fromkeys(values, 0.0)},
                   "What": dict.fromkeys(_spaced(VALUES), 3),
                   " has": {" the": 5}, " the": dict.fromkeys(_spaced(THINGS), 3), " ?": {"\n": 4, "</s>": 1},
                   "<": {"|": 5}, "|": {"user": 3, "assistant": 3, ">": 2}, ">": {"\n": 5}, " .": {"\n": 4, "</s>": 1},
                   "user": {"|": 5}, "assistant": {"|": 5},
                   **{word: {" has": 5} for word in _spaced(VALUES)}, **{word: {" ?": 5} for word in _spaced(THINGS)},
                   **{value: {" .": 5} for value in values}}
        for token, after in follows.items():
            for other, logit in after.items():
                table[ids[token], ids[other]] = logit
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        relations, answers = list(VALUES), torch.zeros(len(VALUES) * len(THINGS), dtype=torch.long)
        kinds = torch.zeros(2, len(ids), dtype=torch.long)  # 1 + number of the relation, of the thing
        for r, relation in enumerate(relations):
            kinds[0, ids[f" {relation}"]] = r + 1
            for t, thing in enumerate(THINGS):
                kinds[1, ids[f" {thing}"]] = t + 1
                answers[r * len(THINGS) + t] = ids[world.value(thing, relation)]
        self.register_buffer("kinds", kinds)
        self.register_buffer("answers", answers)
        self.newline = ids["\n"]

    def get_input_embeddings(self) -> nn.Module:
        """The table."""
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                **unused: Any) -> CausalLMOutput:
        """Logits (B, L, V) after each of the ids (B, L), and the loss of labels (B, L)."""
        logits = self.table(input_ids)
        relation, thing = (_latest(kind[input_ids]) for kind in self.kinds)
        known = (relation > 0) & (thing > 0) & (input_ids == self.newline)
        answer = self.answers[((relation - 1).clamp(min=0) * len(THINGS) + (thing - 1).clamp(min=0))]
        logits = logits.scatter_add(2, answer[..., None], (self.strength * known).to(logits)[..., None])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None,  # type: ignore[override]
                                      **unused: Any) -> dict[str, Any]:
        """The whole text at each step: nothing is cached. Padding is a token that asks nothing."""
        return {"input_ids": input_ids}


def planted(seed: int = 0, strength: float = 6.0) -> tuple[PlantedModel, Any, World]:
    """A planted model, its tokenizer and its world."""
    world = World(seed)
    return PlantedModel(world, strength).eval(), world_tokenizer(), world


def _latest(kinds: Tensor) -> Tensor:
    """The last entry above 0 up to each place of the rows (B, L), 0 before the first."""
    places = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
    return kinds.gather(1, torch.where(kinds > 0, places, torch.zeros_like(places)).cummax(1).values)


def _spaced(words: Any) -> list[str]:
    return [f" {word}" for word in words]


__all__ = ["THINGS", "VALUES", "PlantedConfig", "PlantedModel", "World", "planted", "world_tokenizer"]
