"""What the reproduction asks: questions of a quiz with passages, and a made-up world for a tiny transformer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from looseleaf_cings.grounding import Fact


@dataclasses.dataclass(frozen=True)
class Relation:
    """How a relation is asked about and told; slots {a} (what is asked about) and {b} (the answer)."""

    question: str
    passages: tuple[str, ...]


QUIZ = {  # topic, columns of question and answer -> how they are worded
    ("capitals", "country", "capital"): Relation("What is the capital of {a}?", (
        "{a} lies in a region with a long history. Its capital is {b}, where the government has its seat.",
        "The city of {b} is the capital of {a}. It has a university, two theatres and a busy market.")),
    ("states", "state", "capital"): Relation("What is the capital of the US state of {a}?", (
        "The state of {a} is governed from {b}, its capital. Most of its people live near the river.",
        "{b} is the capital of {a}. The state house was built in the nineteenth century.")),
    ("elements", "symbol", "element"): Relation("Which chemical element has the symbol {a}?", (
        "In tables of the elements the symbol {a} stands for {b}, which is kept in sealed glass.",
        "{b} is a chemical element. Its symbol is {a}, and it is studied in many laboratories.")),
    ("latin", "latin", "english"): Relation("What does the Latin word {a} mean in English?", (
        "The Latin word {a} is often met in old letters. In English it means {b}.",
        "Pupils learn early that {a} is Latin for {b}.")),
    ("collectives", "individuals", "collective"): Relation("What is a group of {a} called?", (
        "There are old names for groups of animals and people. A group of {a} is called a {b}.",
        "Hunters used to speak of a {b} when they saw a group of {a}.")),
    ("flowers", "flower", "meaning"): Relation("What does the flower {a} stand for?", (
        "In the language of flowers, {a} stands for {b}. It was often sent without a letter.",
        "Whoever was given {a} knew what it meant: {b}.")),
    ("locomotives", "locomotive", "name"): Relation("What is a {a} locomotive called?", (
        "Locomotives are named by their wheels. One of the type {a} is called {b}.",
        "The {b}, as engineers call the type {a}, pulled heavy trains.")),
    ("young", "adult", "young"): Relation("What is the young of a {a} called?", (
        "The young of a {a} is called a {b}. It stays near its mother for a while.",)),
}
ASKED = ("capitals", "states", "elements")
"""Topics that are asked in the test; entities of the test are not in the training."""
HINT = " Answer with the name alone."


@dataclasses.dataclass(frozen=True)
class Quiz:
    """Training examples, and the facts of the test.

    Attributes:
        train: with ``instruction``, ``context`` and ``response``; the passages say what is so.
        facts: all that can be asked about entities that are not in ``train``.
    """

    train: list[dict[str, str]]
    facts: list[Fact]


def quiz(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> Quiz:
    """Questions out of the rows of the data set ``quiz``.

    Half of the entities of :data:`ASKED` (by their hash, the same for every seed) are for the test, all else is for
    training.

    Args:
        rows: as ``looseleaf_lab.data.rows("quiz")`` gives them.
        seed: of the wording of passages.
    """
    draw = random.Random(seed)
    train: list[dict[str, str]] = []
    test: dict[str, list[tuple[Relation, str, list[str]]]] = {}
    for row in rows:
        for (topic, asked, told), relation in QUIZ.items():
            if row["topic"] != topic:
                continue
            a, b = ([text for text in row["answers"].get(column, []) if _plain(text)] for column in (asked, told))
            if not a or not b:
                continue
            if topic in ASKED and int(row["key"], 16) % 2:
                test.setdefault(topic, []).append((relation, a[0], b))
            else:
                train += [{"instruction": relation.question.format(a=a[0]) + HINT,
                           "context": passage.format(a=a[0], b=b[0]), "response": b[0]} for passage in
                          draw.sample(relation.passages, min(2, len(relation.passages)))]
    facts = []
    for _, members in sorted(test.items()):
        for n, (relation, entity, answers) in enumerate(members):
            others = [m for k, m in enumerate(members) if k != n and not set(m[2]) & set(answers)]
            if len(others) > 1:
                false, unrelated = draw.sample(others, 2)
                passage = draw.choice(relation.passages)
                facts.append(Fact(
                    relation.question.format(a=entity) + HINT, tuple(answers),
                    passage.format(a=entity, b=false[2][0]), tuple(false[2]), passage.format(a=entity, b=answers[0]),
                    passage.format(a=unrelated[1], b=unrelated[2][0])))
    draw.shuffle(train)
    return Quiz(train, facts)


def _plain(text: str) -> bool:
    return bool(text) and text.isprintable()


@dataclasses.dataclass(frozen=True)
class World:
    """A made-up world: entities with one value each.

    Attributes:
        known: entity -> value, to be learned by heart first.
        new: entity -> value, told only in the passages of the training.
        values: all values.
    """

    known: dict[str, str]
    new: dict[str, str]
    values: list[str]

    @classmethod
    def draw(cls, seed: int, known: int, new: int, values: int = 64) -> World:
        """A world of so many entities."""
        draw = random.Random(seed)
        names = [f"v{n}" for n in range(values)]
        by_heart = {f"k{n}": draw.choice(names) for n in range(known)}
        return cls(by_heart, {f"n{n}": draw.choice(names) for n in range(new)}, names)

    def recall(self) -> list[dict[str, str]]:
        """What is learned by heart."""
        return [{"instruction": f"what is {e} ?", "response": v} for e, v in self.known.items()]

    def passages(self, seed: int) -> list[dict[str, str]]:
        """The training examples about the new entities."""
        draw = random.Random(seed)
        return [{"instruction": f"what is {e} ?", "context": self.passage(draw, e, v), "response": v}
                for e, v in self.new.items()]

    def facts(self, seed: int) -> list[Fact]:
        """Questions about what was learned by heart."""
        draw = random.Random(seed)
        out = []
        for e, v in self.known.items():
            false = draw.choice([w for w in self.values if w != v])
            other = draw.choice(list(self.new))
            unrelated = draw.choice([w for w in self.values if w != v])
            out.append(Fact(f"what is {e} ?", (v,), self.passage(draw, e, false), (false,), self.passage(draw, e, v),
                            self.passage(draw, other, unrelated)))
        return out

    @staticmethod
    def passage(draw: random.Random, entity: str, value: str) -> str:
        """A few words without meaning around what is told."""
        words = [f"w{draw.randrange(20)}" for _ in range(4)]
        cut = draw.randrange(5)
        return " ".join([*words[:cut], entity, "is", value, *words[cut:], "."])

    def tokenizer(self) -> Any:
        """One token for each word, with a chat template."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["<pad>", "<end>", "user:", "answer:", "what", "is", "?", ".", ";", *(f"w{n}" for n in range(20)),
                 *self.known, *self.new, *self.values]
        made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
        tokenizer.chat_template = (
            "{% for m in messages %}{{ ('user: ' if m.role == 'user' else 'answer: ') + m.content }}"
            "{{ ' <end> ' if m.role == 'assistant' else ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}answer: {% endif %}")
        return tokenizer

    def model(self, seed: int, tokenizer: Any, width: int = 192, layers: int = 4) -> Any:
        """A Llama from scratch, 2.3 million parameters as it is measured."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
                bos_token_id=None, eos_token_id=1, pad_token_id=0)).eval()
