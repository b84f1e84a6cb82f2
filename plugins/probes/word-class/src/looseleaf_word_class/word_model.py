"""The paper's kind of network, a small recurrent predictor of the next word, and the loop that trains it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import progress as progress_
from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, own_random_state, training, with_gradients

UNKNOWN_WORD = "<unknown>"
FORMAT = "looseleaf-word-class.model/1"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a :class:`WordModel`, under the names that configurations of transformers have."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int


class WordModel(nn.Module):
    """Word vectors, LSTM layers one after the other, and a softmax over the vocabulary.

    The paper's sizes are not known; these are this project's. The state is zero before the first word.

    Args:
        vocabulary: known words, in lower case; any other is one unknown word.
        hidden: width of word vectors and layers.
        layers: number of LSTM layers.
        seed: of the weights.
    """

    def __init__(self, vocabulary: Sequence[str], hidden: int = 128, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        if not vocabulary or hidden < 1 or layers < 1:
            raise ValueError(f"WordModel: expected a word or more, hidden >= 1 and layers >= 1, got {len(vocabulary)} "
                             f"words, hidden={hidden}, layers={layers}")
        self.vocabulary = [UNKNOWN_WORD, *(word for word in dict.fromkeys(vocabulary) if word != UNKNOWN_WORD)]
        self.config = Sizes(len(self.vocabulary), hidden, layers)
        self._ids = {word: n for n, word in enumerate(self.vocabulary)}
        with own_random_state(seed):
            self.embedding = nn.Embedding(len(self.vocabulary), hidden)
            self.layers = nn.ModuleList([nn.LSTM(hidden, hidden, batch_first=True) for _ in range(layers)])
            self.output = nn.Linear(hidden, len(self.vocabulary))

    @classmethod
    def of(cls, texts: Sequence[Sequence[Sequence[str]]], words: int = 10000, **sizes: int) -> WordModel:
        """A model that knows the ``words`` most frequent words of texts of (word, class) pairs."""
        counts = Counter(word[0].lower() for text in texts for word in text)
        return cls([word for word, _ in counts.most_common(words)], **sizes)

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of words; 0 is the unknown word."""
        return [self._ids.get(word.lower(), 0) for word in words]

    def get_input_embeddings(self) -> nn.Module:
        """The word vectors."""
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, V) of the word after each of ``ids``, int64 (B, L)."""
        states = self.embedding(ids)
        for layer in self.layers:
            states = layer(states)[0]
        logits: Tensor = self.output(states)
        return logits

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and vocabulary to a safetensors file."""
        save_tensors(path, self.state_dict(), {"vocabulary": self.vocabulary, **dataclasses.asdict(self.config)},
                     format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WordModel:
        """The model that :meth:`save` wrote."""
        tensors, info = load_tensors(path, format=FORMAT)
        model = cls(info["vocabulary"][1:], info["hidden_size"], info["num_hidden_layers"])
        model.load_state_dict(tensors)
        return model.eval()


def train_word_model(model: WordModel, texts: Sequence[Sequence[Sequence[str]]], *, steps: int = 2000, batch: int = 64,
                     length: int = 20, lr: float = 3e-3, clip: float = 1.0, seed: int = 0,
                     watch: Callable[[int], Any] | None = None, at: Sequence[int] = (),
                     progress: bool | None = None) -> list[float]:
    """Train a model in place to predict the next word; the loss of each step, nats a word.

    No class is looked at. Stretches of ``length`` words of the texts are read in random order, epoch after epoch, each
    from a zero state, with a loss at every word; AdamW, the learning rate falling to zero along half a cosine (ours).

    Args:
        model: goes on from its weights; its mode comes back.
        texts: of (word, class) pairs, or longer rows of which the first entry counts.
        steps, batch, length: stretches of ``length`` + 1 words in each step.
        lr: first learning rate.
        clip: largest norm of the gradients.
        seed: of the order of the stretches.
        watch: called with the number of steps done, at those of ``at``; for checkpoints.
        at: numbers of steps, 0 for the untrained model.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: no text of ``length`` + 1 words, or a loss that is not finite.
    """
    rows = [ids[n:n + length + 1] for text in texts for ids in (model.encode([word[0] for word in text]),)
            for n in range(0, len(ids) - length, length)]
    if not rows or steps < 1 or batch < 1:
        raise ValueError(f"train_word_model: expected a text of {length + 1} words or more, steps >= 1 and batch >= 1, "
                         f"got texts of at most {max(map(len, texts), default=0)} words, steps={steps}, batch={batch}")
    data, draw = torch.tensor(rows), np.random.default_rng(seed)
    order = np.concatenate([draw.permutation(len(rows)) for _ in range(1 + steps * batch // len(rows))])
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    losses: list[float] = []
    device = next(model.parameters()).device

    def look(step: int) -> None:
        if watch is not None and step in at:
            with evaluating(model), torch.no_grad():
                watch(step)

    look(0)
    with with_gradients(), training(model):
        for step in progress_.track(range(steps), "training", show=progress):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            ids = data[order[step * batch:(step + 1) * batch]].to(device)
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {step}: expected a finite loss, got {losses[-1]}: lower lr")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            look(step + 1)
    return losses


__all__ = ["FORMAT", "UNKNOWN_WORD", "Sizes", "WordModel", "train_word_model"]
