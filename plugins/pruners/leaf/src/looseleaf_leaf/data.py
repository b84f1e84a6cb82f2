"""A task with a known confounder, and models for it: look up a property, while words of another value are in the way.

In tokens of its own a sample names six things, one of each kind (colour, size, ...), among filler words, and asks for
one kind:

``<s> user [round blue w3 w7 wool tiny ... kind?] assistant blue </s>``    (in brackets: the instruction)

Each value has words that go with it. A distractor is two words of one wrong value of the kind asked for, next to each
other. In the student's training the answer to samples with a distractor is the distractor's value: a wrong answer that
the spans predict. The teacher sees the same samples with right answers.

In English, for SmolLM2: ``The metal is tin. The colour is blue. Some people say red. The fruit is plum. ... What is the
colour?`` -> ``blue``; the distractor is the sentence with "Some people say".
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf.modes import evaluating
from looseleaf_leaf.batch import IGNORED, encode

KINDS, VALUES, WORDS, FILLERS, SPAN = 6, 6, 3, 8, 2
PAD, START, USER, ASSISTANT, END = range(5)
FILLER = 5
QUESTION = FILLER + FILLERS
VALUE = QUESTION + KINDS
WORD = VALUE + KINDS * VALUES
VOCABULARY = WORD + KINDS * VALUES * WORDS
PADDED_BY = 4
"""Filler words in an instruction."""

ENGLISH = {"colour": ["red", "blue", "green", "black", "white"], "animal": ["dog", "cat", "horse", "bird", "cow"],
           "fruit": ["apple", "plum", "pear", "lemon", "grape"], "metal": ["iron", "gold", "silver", "tin", "copper"]}
TEMPLATE = "{instruction}\nAnswer: {response}"


@dataclasses.dataclass
class Samples:
    """Samples of the task.

    Attributes:
        batch: as for :class:`looseleaf_leaf.LeaF`; labels are the right answers.
        planted: (B, L) bool, the distractor's tokens.
        answer: (B,) right token.
        lure: (B,) the token that the distractor goes with; the right one where there is no distractor.
    """

    batch: dict[str, Tensor]
    planted: Tensor
    answer: Tensor
    lure: Tensor

    def rows(self, index: Tensor) -> Samples:
        """The samples at ``index``."""
        return Samples({k: v[index] for k, v in self.batch.items()}, self.planted[index], self.answer[index],
                       self.lure[index])

    def misled(self) -> dict[str, Tensor]:
        """The batch with the distractor's answer in the place of the right one."""
        ids, labels = self.batch["input_ids"].clone(), self.batch["labels"].clone()
        at = (labels != IGNORED) & (ids != END)
        ids[at], labels[at] = self.lure, self.lure
        return {**self.batch, "input_ids": ids, "labels": labels}


def draw(count: int, seed: int, distracted: float = 1.0) -> Samples:
    """``count`` samples, padded on the right; the fraction ``distracted`` of them, the first ones, has a distractor."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        values = VALUE + VALUES * np.arange(KINDS) + rng.integers(0, VALUES, KINDS)
        asked = int(rng.integers(KINDS))
        right = lure = int(values[asked])
        words = [*values, *(FILLER + rng.integers(0, FILLERS, PADDED_BY))]
        words = [int(w) for w in rng.permutation(words)]
        planted = [False] * len(words)
        if n < round(distracted * count):
            lure = int(VALUE + VALUES * asked + (right - VALUE + rng.integers(1, VALUES)) % VALUES)
            span = WORD + WORDS * (lure - VALUE) + rng.permutation(WORDS)[:SPAN]
            at = int(rng.integers(len(words) + 1))
            words[at:at] = [int(w) for w in span]
            planted[at:at] = [True] * SPAN
        rows.append(([*words, QUESTION + asked], [*planted, False], right, lure))
    width = max(len(words) for words, *_ in rows) + 5
    batch = {key: torch.full((count, width), fill) for key, fill in (
        ("input_ids", PAD), ("labels", IGNORED), ("attention_mask", 0), ("instruction_mask", 0))}
    planted_mask = torch.zeros((count, width), dtype=torch.bool)
    for n, (words, marks, right, _) in enumerate(rows):
        length = len(words)
        batch["input_ids"][n, :length + 5] = torch.tensor([START, USER, *words, ASSISTANT, right, END])
        batch["labels"][n, length + 3:length + 5] = torch.tensor([right, END])
        batch["attention_mask"][n, :length + 5] = 1
        batch["instruction_mask"][n, 2:length + 2] = 1
        planted_mask[n, 2:length + 2] = torch.tensor(marks)
    batch["instruction_mask"] = batch["instruction_mask"].bool()
    return Samples(batch, planted_mask, torch.tensor([r[2] for r in rows]), torch.tensor([r[3] for r in rows]))


def draw_english(tokenizer: Any, count: int, seed: int, distracted: float = 1.0) -> Samples:
    """As :func:`draw`, in English; every value is one token of the tokenizer."""
    rng = np.random.default_rng(seed)
    texts, spans, lures = [], [], []
    for n in range(count):
        values = {kind: str(rng.choice(names)) for kind, names in ENGLISH.items()}
        asked = str(rng.choice(list(ENGLISH)))
        sentences = [f"The {kind} is {value}." for kind, value in values.items()]
        sentences = [sentences[i] for i in rng.permutation(len(sentences))]
        lure, span = values[asked], (0, 0)
        if n < round(distracted * count):
            lure = str(rng.choice([name for name in ENGLISH[asked] if name != lure]))
            at = int(rng.integers(len(sentences) + 1))
            sentences.insert(at, f"Some people say {lure}.")
            start = sum(len(s) + 1 for s in sentences[:at])
            span = (start, start + len(sentences[at]))
        texts.append((" ".join(sentences) + f" What is the {asked}?", values[asked]))
        spans.append(span)
        lures.append(lure)
    batch = encode(tokenizer, texts, template=TEMPLATE)
    offsets, borders = batch.pop("offsets"), torch.tensor(spans)[:, None]
    planted = batch["instruction_mask"] & (offsets[..., 0] >= borders[..., 0]) & (offsets[..., 1] <= borders[..., 1])
    others = encode(tokenizer, [(asked, lure) for (asked, _), lure in zip(texts, lures)], template=TEMPLATE)
    if not bool(((batch["labels"] >= 0).sum(1) == 1).all() and ((others["labels"] >= 0).sum(1) == 1).all()):
        raise ValueError("an answer is more than one token of this tokenizer: the task is made for SmolLM2's")
    return Samples(batch, planted, batch["labels"].amax(1), others["labels"].amax(1))


class Vocabulary:
    """Decodes the task's tokens for people."""

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' names, with spaces between."""
        return " ".join(_word(int(i)) for i in ids) + " "


def _word(token: int) -> str:
    if token >= WORD:
        value, word = divmod(token - WORD, WORDS)
        return f"lure-{value // VALUES}{'abcdef'[value % VALUES]}{word}"
    if token >= VALUE:
        return f"value-{(token - VALUE) // VALUES}{'abcdef'[(token - VALUE) % VALUES]}"
    if token >= QUESTION:
        return f"kind-{token - QUESTION}?"
    return f"filler-{token - FILLER}" if token >= FILLER else ("", "<s>", "user", "assistant", "</s>")[token]


# ------------------------------------------------------------------------------------ models
def transformer(seed: int, width: int = 64) -> Any:
    """A Llama of two layers with random weights; attention is written out, so that its maps can be read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, pad_token_id=PAD,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=START, eos_token_id=END,
        tie_word_embeddings=False)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def adapted(base: Any, seed: int) -> Any:
    """A copy of ``base`` with LoRA adapters (rank 8, attention projections) that do nothing yet."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), LoraConfig(
            r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")).eval()


@torch.no_grad()
def accuracy(model: Any, batch: dict[str, Tensor], answer: Tensor) -> float:
    """Fraction of samples whose answer is the model's most likely token."""
    with evaluating(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    first = (batch["labels"] != IGNORED).int().argmax(1)
    guess = logits[torch.arange(len(first)), first - 1].argmax(-1)
    return float((guess == answer).float().mean())


@torch.no_grad()
def attention_on(model: Any, batch: dict[str, Tensor], marked: Tensor) -> float:
    """Attention from the position that gives the answer to the ``marked`` tokens, in [0, 1]: mean over samples, layers
    and heads of the sum over tokens."""
    with evaluating(model):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                    output_attentions=True)
    first = (batch["labels"] != IGNORED).int().argmax(1)
    rows = torch.arange(len(first))
    return float(torch.stack([(a[rows, :, first - 1] * marked[:, None]).sum(-1).mean() for a in out.attentions]).mean())
