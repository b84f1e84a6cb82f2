"""NeuralUCB: a small network predicts the score of an arm, its gradients say how certain it is."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from looseleaf.modes import with_gradients

HIDDEN_LAYERS = 3
LEARNING_RATE = 1e-3
CHUNK = 128
"""Gradients computed together; each has as many entries as the network has parameters."""

Parameters = tuple[Tensor, ...]


class NeuralUCB:
    """Predicts scores from embeddings, with an upper confidence bound for each. [paper, section on the method]

    The network has three hidden layers of ReLU. In each round it is trained from the same initial weights on
    everything seen (Adam, learning rate 1e-3, mean squared error, weight decay ``lam`` over the number of arms
    seen), its inputs being standardised. The bound of an arm with gradient g of the prediction is

        prediction + sqrt(nu * lam * sum(g * g / U))

    where U begins as ``lam`` for each parameter and grows by g * g of each arm that is pulled. The paper writes the
    weight of the exploration before the root; here, as in the authors' code where its value comes from, ``nu`` is
    inside, and 0 is greedy.

    Args:
        dimensions: of the embeddings.
        hidden: width of the hidden layers.
        lam: regularisation.
        nu: weight of the exploration.
        train_steps: steps of training in each round.
        seed: of the initial weights.

    Attributes:
        confidence: U, float32 of shape (parameters,).
        parameters: weights and biases after the last training, first layer first.
    """

    def __init__(self, dimensions: int, hidden: int = 100, lam: float = 0.1, nu: float = 0.01,
                 train_steps: int = 1000, seed: int = 0) -> None:
        self.lam, self.nu, self.train_steps = lam, nu, train_steps
        self._initial = _initial(dimensions, hidden, seed)
        self.parameters: Parameters = tuple(p.clone() for p in self._initial)
        self.confidence = torch.full((sum(p.numel() for p in self._initial),), lam)
        self._mean = torch.zeros(dimensions)
        self._deviation = torch.ones(dimensions)

    def fit(self, embeddings: Tensor, scores: Tensor) -> float:
        """Train on all arms seen.

        Args:
            embeddings: (arms, dimensions).
            scores: (arms,).

        Returns:
            The loss of the last step.
        """
        embeddings, scores = embeddings.float(), scores.float()
        self._mean = embeddings.mean(0)
        deviation = embeddings.std(0) if len(embeddings) > 1 else torch.zeros_like(self._mean)
        # What never varied says nothing yet; dividing by it would make all of a new arm's difference endless.
        self._deviation = torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation))
        loss = torch.zeros(())
        with with_gradients():
            inputs = self._standardise(embeddings)
            made = [p.clone().requires_grad_() for p in self._initial]
            adam = torch.optim.Adam(made, lr=LEARNING_RATE, weight_decay=self.lam / len(embeddings))
            for _ in range(self.train_steps):
                adam.zero_grad()
                loss = functional.mse_loss(_forward(tuple(made), inputs), scores)
                loss.backward()
                adam.step()
        self.parameters = tuple(p.detach() for p in made)
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> Tensor:
        """Predicted scores, (arms,)."""
        return _forward(self.parameters, self._standardise(embeddings.float()))

    def gradients(self, embeddings: Tensor) -> Tensor:
        """Gradient of each arm's prediction by the parameters, (arms, parameters)."""
        one = torch.func.grad(lambda p, x: _forward(p, x[None])[0])
        found = torch.func.vmap(one, in_dims=(None, 0), chunk_size=CHUNK)(
            self.parameters, self._standardise(embeddings.float()))
        return torch.cat([g.flatten(1) for g in found], 1)

    @with_gradients()
    def gradients_one_by_one(self, embeddings: Tensor) -> Tensor:
        """The plain way to :meth:`gradients`: one backward pass for each arm."""
        rows = []
        for row in self._standardise(embeddings.float()):
            leaves = tuple(p.clone().requires_grad_() for p in self.parameters)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(_forward(leaves, row[None])[0], leaves)]))
        return torch.stack(rows)

    def bounds(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Upper confidence bounds (arms,), and the gradients (arms, parameters) they are made with."""
        gradients = self.gradients(embeddings)
        variance = self.lam * (gradients * gradients / self.confidence).sum(1)
        return self.predict(embeddings) + math.sqrt(self.nu) * variance.sqrt(), gradients

    def select(self, embeddings: Tensor) -> tuple[int, Tensor]:
        """The arm with the highest bound (the first of equals), and its gradient (parameters,)."""
        bounds, gradients = self.bounds(embeddings)
        best = int(bounds.argmax())
        return best, gradients[best]

    def update(self, gradient: Tensor) -> None:
        """Note that an arm was chosen: its gradient's directions are less uncertain from now on."""
        self.confidence = self.confidence + gradient * gradient

    def _standardise(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self._mean) / self._deviation


def _initial(dimensions: int, hidden: int, seed: int) -> Parameters:
    """Weights and biases drawn as ``torch.nn.Linear`` does, without touching the global generator."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [dimensions, *[hidden] * HIDDEN_LAYERS, 1]
    made = []
    for inputs, outputs in itertools.pairwise(sizes):
        for shape in ((outputs, inputs), (outputs,)):
            made.append((torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(inputs))
    return tuple(made)


def _forward(parameters: Parameters, inputs: Tensor) -> Tensor:
    """Predictions (arms,) of standardised embeddings (arms, dimensions)."""
    hidden = inputs
    for layer in range(HIDDEN_LAYERS):
        hidden = torch.relu(functional.linear(hidden, parameters[2 * layer], parameters[2 * layer + 1]))
    return functional.linear(hidden, parameters[-2], parameters[-1])[:, 0]
