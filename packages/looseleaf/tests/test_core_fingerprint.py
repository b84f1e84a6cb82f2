"""The fingerprint of weights, and what it guards: a search that resumes with another model or another start."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from looseleaf import Budget, Paper, PromptOptimizer
from looseleaf_text import Example, LanguageModel, LocalModel, Prompt, Task
from looseleaf.fingerprint import fingerprint
from looseleaf.resume import SearchState, StateError


@dataclasses.dataclass
class Nothing(PromptOptimizer):
    """Finds nothing."""

    paper: ClassVar[Paper] = Paper("A paper", ("Some One",), 2020)

    def optimize(self, task: Task, model: LanguageModel, budget: Budget | None = None, **more: Any) -> Prompt:
        return Prompt()


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


def test_a_search_of_another_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer

    task = Task("t", [Example("a", label="x"), Example("b", label="y")], labels={"x": "x", "y": "y"})
    model = tiny_text_llama()
    local = LocalModel(model, tiny_tokenizer())

    def same(local: Any, start: Prompt | None = None) -> SearchState:
        return SearchState(tmp_path, identity(Nothing(), task, local, start, 0))

    same(local).save({"n": 1})
    assert same(LocalModel(tiny_text_llama(), tiny_tokenizer())).load() == {"n": 1}
    starts = [Prompt(), Prompt("a"), Prompt(template="{text}!"), Prompt(members=[Prompt("a"), Prompt("b")]),
              Prompt(members=[Prompt("a"), Prompt("c")]), Prompt(soft=torch.zeros(2, 3)), Prompt(soft=torch.ones(2, 3))]
    for start in starts:
        with pytest.raises(StateError, match="start was"):
            same(local, start).load()
    assert len({str(same(local, s).identity["start"]) for s in starts}) == len(starts)
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    with pytest.raises(StateError, match="weights was"):
        same(local).load()
