"""The fingerprint of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from looseleaf.fingerprint import fingerprint


def net() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(40, 60), nn.BatchNorm1d(60), nn.Linear(60, 3))
    made.register_buffer("nothing", torch.empty(0))
    return made


def test_it_changes_with_every_value() -> None:
    model = net()
    first = fingerprint(model)
    assert first == fingerprint(net()) == fingerprint(copy.deepcopy(model)) == fingerprint(model.state_dict())
    assert len(first) == 16 and int(first, 16) >= 0
    seen = {first}
    for name in ("0.weight", "1.running_mean", "2.bias"):
        for place in (0, -1):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.state_dict()[name].view(-1)[place] += 1e-6
            seen.add(fingerprint(other))
    assert len(seen) == 7


def test_it_changes_with_name_shape_and_dtype() -> None:
    ones = torch.ones(4, 2)
    made = [{"a": ones}, {"b": ones}, {"a": ones.T.contiguous()}, {"a": ones.double()}, {"a": ones.bfloat16()},
            {"a": ones.bool()}, {"a": ones.to(torch.complex64)}, {"a": ones, "b": ones}]
    assert len({fingerprint(m) for m in made}) == len(made)


def test_strides_and_threads_do_not_matter() -> None:
    values = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    before, threads = fingerprint({"a": values}), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert fingerprint({"a": values.T.contiguous().T}) == before
    finally:
        torch.set_num_threads(threads)
