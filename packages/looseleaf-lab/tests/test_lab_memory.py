"""Bytes of training steps that are known by hand."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from looseleaf_lab.memory import LiveTensors, SavedTensors, in_fresh_process, step_memory

torch.set_num_threads(1)


def network():
    return nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 30, bias=False))


def test_saved_bytes_are_those_of_the_chain_rule():
    model, x = network(), torch.randn(7, 10)
    saved = SavedTensors(model)
    with saved.watched():
        out = model(x)
        loss = out.square().sum()
    # the input, what ReLU gave (its own backward and the second layer share it), and what is squared
    assert saved.bytes() == 4 * 7 * (10 + 20 + 30)
    del loss, out
    assert saved.bytes() == 0, "a graph that is gone keeps nothing"
    everything = SavedTensors()
    with everything.watched():
        loss = model(x).square().sum()
    assert everything.bytes() == 4 * 7 * (10 + 20 + 30) + 4 * 20 * 30, "without a model, its second weight counts"
    loss.backward()


def test_frozen_weights_save_less_and_views_keep_the_whole():
    model, x = network().requires_grad_(False), torch.randn(7, 10, requires_grad=True)
    saved = SavedTensors(model)
    with saved.watched():
        out = model(x)
    assert saved.bytes() == 4 * 7 * 20, "the sign of ReLU is all that matters"
    whole = torch.randn(1000, 4)
    scale = torch.ones(4, requires_grad=True)
    with saved.watched():
        view = whole[:2] * scale
        copy = whole[:2].clone() * scale
    assert saved.bytes() == 4 * 7 * 20 + 4 * 1000 * 4 + 4 * 2 * 4
    del view
    assert saved.bytes() == 4 * 7 * 20 + 4 * 2 * 4
    assert len(out) == 7 and len(copy) == 2


def test_live_bytes():
    old = torch.zeros(100)
    with LiveTensors() as live:
        one = old + 1  # 400
        old.add_(1)  # nothing new
        two = one * 2  # 800
        view = two[:10]
        del one  # 400
        assert live.now == 400
        three = torch.cat([two, two])  # 1,200
        assert live.now == live.peak == 1200
        del two
        assert live.now == 1200, "a view keeps the whole"
        del view, three
        assert live.now == 0 and live.peak == 1200


def test_a_step_by_hand():
    model, x = network(), torch.randn(700, 10)
    found = step_memory(model, lambda: model(x).square().sum())
    assert found.saved == 4 * 700 * (10 + 20 + 30)
    # forward: after the first layer, ReLU and the second layer, squares are the last big tensor; 20 + 20 go on to 20
    assert found.live_forward == 4 * (700 * (20 + 30 + 30) + 1) or found.live_forward == 4 * 700 * (20 + 30 + 30)
    # backward: hidden values and outputs are kept, and of the gradient of squares come 2 x grad and its product
    assert found.live >= found.live_forward and found.live < 4 * 700 * (20 + 4 * 30) + 10000
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_moves_memory_to_the_backward():
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Tanh()) for _ in range(8)]), \
        torch.randn(500, 50, requires_grad=True)

    def lighter():
        hidden = x
        for layer in model:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden.sum()

    plain, light = step_memory(model, lambda: model(x).sum()), step_memory(model, lighter)
    assert light.saved == 8 * 4 * 500 * 50, "the inputs of the parts"
    assert light.saved < plain.saved / 2 and light.live < 0.7 * plain.live


def test_in_fresh_process():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(TypeError):
        in_fresh_process(os.getpid, 3)
