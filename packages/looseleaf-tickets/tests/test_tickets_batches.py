"""Batches of a training: the same at the same step, whatever draws them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def _held(kind: str) -> tuple[Any, Any]:
    """A loader whose order is drawn by a generator of its own, and what reads that generator's state."""
    import random as python_random

    import numpy
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

    data = TensorDataset(torch.randn(32, 4), torch.arange(32) % 2, torch.arange(32))

    class Own(Sampler[int]):
        def __init__(self, rng: Any) -> None:
            self.rng = rng

        def __iter__(self) -> Any:
            order = list(range(32))
            self.rng.shuffle(order)
            return iter(order)

        def __len__(self) -> int:
            return 32

    if kind == "torch":
        rng: Any = torch.Generator().manual_seed(7)
        return DataLoader(data, 8, sampler=RandomSampler(data, generator=rng)), lambda: rng.get_state().tolist()
    if kind == "batch sampler":
        rng = torch.Generator().manual_seed(7)
        return (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=rng), 8, False)),
                lambda: rng.get_state().tolist())
    if kind == "numpy":
        rng = numpy.random.default_rng(7)
        return DataLoader(data, 8, sampler=Own(rng)), lambda: str(rng.bit_generator.state)
    rng = python_random.Random(7)
    return DataLoader(data, 8, sampler=Own(rng)), lambda: str(rng.getstate())


@pytest.mark.parametrize("kind", ["torch", "batch sampler", "numpy", "python"])
def test_a_rewound_training_sees_the_same_batches_whatever_draws_them(kind: str) -> None:
    from looseleaf import Unstructured
    from looseleaf_tickets import find_tickets

    loader, state = _held(kind)
    before = state()
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    orders: list[dict[int, list[int]]] = []

    def train(model: nn.Module, run: Any) -> None:
        optimizer, own = torch.optim.SGD(model.parameters(), lr=0.1), {}
        for x, y, number in run.batches(loader, 12):
            own[run.done] = number.tolist()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        orders.append(own)

    find_tickets(model, train, [Unstructured(0.2)], rewind_to=2, progress=False)
    first, rewound = orders
    assert rewound and all(first[step] == rewound[step] for step in rewound)
    assert len({tuple(v) for v in first.values()}) == 12, "each epoch has an order of its own"
    assert state() == before, "the generator comes back as it was"
