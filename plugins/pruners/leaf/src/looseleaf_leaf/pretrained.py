"""The task of :mod:`looseleaf_leaf.confounded` in English, for SmolLM2-135M with LoRA adapters.

``The metal is tin. The colour is blue. Some people say red. The fruit is plum. ... What is the colour?`` -> ``blue``;
the distractor is the sentence with "Some people say". Teacher and student are two adapters of one model.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from looseleaf_leaf.confounded import Samples
from looseleaf_leaf.encoding import encode

KINDS = {"colour": ["red", "blue", "green", "black", "white"], "animal": ["dog", "cat", "horse", "bird", "cow"],
         "fruit": ["apple", "plum", "pear", "lemon", "grape"], "metal": ["iron", "gold", "silver", "tin", "copper"]}
TEMPLATE = "{instruction}\nAnswer: {response}"


def draw(tokenizer: Any, count: int, seed: int, distracted: float = 1.0) -> Samples:
    """As :func:`looseleaf_leaf.confounded.draw`; every value is one token."""
    rng = np.random.default_rng(seed)
    texts, spans, lures = [], [], []
    for n in range(count):
        values = {kind: str(rng.choice(names)) for kind, names in KINDS.items()}
        asked = str(rng.choice(list(KINDS)))
        sentences = [f"The {kind} is {value}." for kind, value in values.items()]
        sentences = [sentences[i] for i in rng.permutation(len(sentences))]
        lure, span = values[asked], (0, 0)
        if n < round(distracted * count):
            lure = str(rng.choice([name for name in KINDS[asked] if name != lure]))
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


def adapted(base: Any, seed: int) -> Any:
    """A copy of ``base`` with LoRA adapters (rank 8, attention projections) that do nothing yet."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), LoraConfig(
            r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))
