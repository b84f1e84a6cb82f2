"""Planted faults: the attention kit finds each of them, by name."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from looseleaf import AttentionBackend, AttentionCall, Paper, SlidingWindow
from looseleaf.attention.call import Phase
from looseleaf.testing import checks
from looseleaf.testing.common import Outcome, run


def window(call: AttentionCall, size: int = 60) -> torch.Tensor:
    """A sound sparse method: the last keys of each query."""
    queries, keys = call.lengths()
    place = torch.arange(call.shape[3])[:, None] + (keys - queries)[:, None, None]
    near = torch.arange(call.shape[4]) > place - size
    call.record(density=0.3)
    return dataclasses.replace(call, mask=near[:, None]).dense()


@dataclasses.dataclass
class Sound(AttentionBackend):
    """A window in causal prefill."""

    paper: ClassVar[Paper] = SlidingWindow.paper

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.mask is not None:
            return call.fall_back("a mask")
        return window(call)


def ignores_padding(call: AttentionCall) -> torch.Tensor:
    return window(dataclasses.replace(call, query_lengths=None, key_lengths=None, mask=None))


def drops_the_last_block(call: AttentionCall) -> torch.Tensor:
    rows = call.shape[3] // 64 * 64
    out = torch.zeros_like(call.query[..., :call.value.shape[-1]])
    if call.mask is None and rows and call.query_lengths is None:
        out[:, :, :rows] = window(dataclasses.replace(call, query=call.query[:, :, :rows], key=call.key[:, :, :rows],
                                                      value=call.value[:, :, :rows]))
        return out
    short = call.lengths()[0] // 64 * 64
    full = window(dataclasses.replace(call, mask=None))
    return full.masked_fill(torch.arange(call.shape[3])[:, None] >= short[:, None, None, None], 0.0)


def sees_the_future(call: AttentionCall) -> torch.Tensor:
    return dataclasses.replace(call, is_causal=False).dense()


def forgets_the_mask(call: AttentionCall) -> torch.Tensor:
    return window(dataclasses.replace(call, mask=None))


def seeds_globally(call: AttentionCall) -> torch.Tensor:
    torch.manual_seed(0)
    return Sound().attend(call)


def draws(call: AttentionCall) -> torch.Tensor:
    random.random()
    return Sound().attend(call)


def flips_to_train(call: AttentionCall) -> torch.Tensor:
    if call.module is not None:
        call.module.eval()
    return Sound().attend(call)


def leaves_a_hook(call: AttentionCall) -> torch.Tensor:
    if call.module is not None:
        call.module.register_forward_hook(lambda *given: None)
    return Sound().attend(call)


def writes_into_its_inputs(call: AttentionCall) -> torch.Tensor:
    out = Sound().attend(call)
    call.query *= 1.01
    return out


def mixes_the_batch(call: AttentionCall) -> torch.Tensor:
    return Sound().attend(call) + call.value.nan_to_num().mean()


def depends_on_the_time(call: AttentionCall) -> torch.Tensor:
    return Sound().attend(call) * (1 + random.SystemRandom().random())


def always_exact(call: AttentionCall) -> torch.Tensor:
    return call.dense()


def always_falls_back(call: AttentionCall) -> torch.Tensor:
    return call.fall_back("holiday")


FAULTS: dict[Callable[[AttentionCall], torch.Tensor], str] = {
    ignores_padding: "padding", drops_the_last_block: "own key", sees_the_future: "causality",
    forgets_the_mask: "an extra mask is honoured", seeds_globally: "in a model nothing is left behind",
    draws: "in a model nothing is left behind", flips_to_train: "in a model nothing is left behind",
    leaves_a_hook: "in a model nothing is left behind", writes_into_its_inputs: "inputs are left unchanged",
    mixes_the_batch: "batch items do not see each other", depends_on_the_time: "determinism",
    always_exact: "the method is at work", always_falls_back: "the method is at work"}


def outcomes(cls: Any, *names: str) -> dict[str, Outcome]:
    return {c.name: run([c])[0] for c in checks(cls) if not names or c.name in names}


def test_a_sound_backend_passes() -> None:
    assert not [o for o in outcomes(Sound).values() if o.problem]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.replace("_", "-"))
def test_each_fault_is_found_by_name(fault: Callable[[AttentionCall], torch.Tensor]) -> None:
    @dataclasses.dataclass
    class Faulty(Sound):
        """With a fault."""

        def attend(self, call: AttentionCall) -> torch.Tensor:
            return fault(call)

    found = outcomes(Faulty, FAULTS[fault])[FAULTS[fault]]
    assert found.problem is not None, f"not found by {FAULTS[fault]!r}"
    if fault is always_falls_back:
        assert "every call fell back (holiday): give the kit a make()" in found.problem


def test_faults_of_a_method_for_denoising() -> None:
    @dataclasses.dataclass
    class Blurred(AttentionBackend):
        """Bidirectional: padding and the other items are averaged in from the third step on."""

        phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})
        paper: ClassVar[Paper] = SlidingWindow.paper

        def attend(self, call: AttentionCall) -> torch.Tensor:
            if call.mask is not None or call.step is None:
                return call.fall_back("not for these")
            return call.dense() + call.value.mean() if call.step > 2 else call.dense()

    found = outcomes(Blurred, "padding", "shape and dtype", "causality", "the method is at work",
                     "other phases are exact")
    assert "step 3: the full item differs" in str(found["padding"].problem)
    assert found["causality"].skipped and all(
        found[name].problem is None for name in ("shape and dtype", "the method is at work", "other phases are exact"))


def test_what_is_undeclared_is_found() -> None:
    @dataclasses.dataclass
    class Undeclared(Sound):
        """Accepts any number.

        Args:
            size: of something.
        """

        size: int = 1

        def __post_init__(self) -> None:
            self.modules, self._loaded = {}, {}

    name = "parameters are validated"
    assert "size=nan is accepted" in str(outcomes(Undeclared, name)[name].problem)
