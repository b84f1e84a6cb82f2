"""A task with a known confounder: look up a property, while words that go with another value are in the way.

A sample names six things, one of each kind (colour, size, ...), among filler words, and asks for one kind:

``<s> user [round blue w3 w7 wool tiny ... kind?] assistant blue </s>``    (in brackets: the instruction)

Each value has words that go with it. A distractor is two words of one wrong value of the kind asked for, next to each
other. In the student's training the answer to samples with a distractor is the distractor's value: a wrong answer that
the spans predict. The teacher sees the same samples with right answers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf_leaf.batch import IGNORED

KINDS, VALUES, WORDS, FILLERS, SPAN = 6, 6, 3, 8, 2
PAD, START, USER, ASSISTANT, END = range(5)
FILLER = 5
QUESTION = FILLER + FILLERS
VALUE = QUESTION + KINDS
WORD = VALUE + KINDS * VALUES
VOCABULARY = WORD + KINDS * VALUES * WORDS
PADDED_BY = 4
"""Filler words in an instruction."""


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
    """``count`` samples, of which the share ``distracted`` has a distractor (the first ones), padded on the right."""
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
    made = {key: torch.full((count, width), fill) for key, fill in (
        ("input_ids", PAD), ("labels", IGNORED), ("attention_mask", 0), ("instruction_mask", 0))}
    planted_mask = torch.zeros((count, width), dtype=torch.bool)
    for n, (words, marks, right, _) in enumerate(rows):
        length = len(words)
        made["input_ids"][n, :length + 5] = torch.tensor([START, USER, *words, ASSISTANT, right, END])
        made["labels"][n, length + 3:length + 5] = torch.tensor([right, END])
        made["attention_mask"][n, :length + 5] = 1
        made["instruction_mask"][n, 2:length + 2] = 1
        planted_mask[n, 2:length + 2] = torch.tensor(marks)
    made["instruction_mask"] = made["instruction_mask"].bool()
    return Samples(made, planted_mask, torch.tensor([r[2] for r in rows]), torch.tensor([r[3] for r in rows]))


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
        return LlamaForCausalLM(config)


def train(model: Any, samples: Samples, *, steps: int, seed: int, misled: bool = False, batch: int = 128,
          rate: float = 2e-3) -> None:
    """Plain cross-entropy on the responses, with the right answers or, if ``misled``, the distractors'."""
    data = samples.misled() if misled else samples.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(samples.answer), (batch,), generator=generator)
        optimizer.zero_grad()
        model(**{k: data[k][index] for k in ("input_ids", "attention_mask", "labels")}, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, batch: dict[str, Tensor], answer: Tensor) -> float:
    """Share of samples whose answer is the model's most likely token."""
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    first = (batch["labels"] != IGNORED).int().argmax(1)
    guess = logits[torch.arange(len(first)), first - 1].argmax(-1)
    return float((guess == answer).float().mean())


@torch.no_grad()
def attention_on(model: Any, batch: dict[str, Tensor], marked: Tensor) -> float:
    """Attention from the position that gives the answer to the ``marked`` tokens, in [0, 1]: mean over samples, layers
    and heads of the sum over tokens."""
    model.eval()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                output_attentions=True)
    first = (batch["labels"] != IGNORED).int().argmax(1)
    rows = torch.arange(len(first))
    return float(torch.stack([(a[rows, :, first - 1] * marked[:, None]).sum(-1).mean() for a in out.attentions]).mean())
