"""capture, intervene and the probe kit."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch

from looseleaf import Paper, Probe, Report, SlidingWindow, capture, intervene
from looseleaf.probes.hooks import CaptureLimitError, matching_modules
from looseleaf.testing import check_probe
from looseleaf.testing.models import tiny_llama

IDS = torch.arange(12).view(2, 6)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_capture_keeps_outputs_by_name() -> None:
    model = tiny_llama()
    with torch.no_grad(), capture(model, "model.layers.*.mlp") as seen:
        model(IDS)
        model(IDS[:1])
    assert list(seen) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [tuple(t.shape) for t in seen["model.layers.1.mlp"]] == [(2, 6, 64), (1, 6, 64)]
    assert hooks(model) == 0


def test_capture_of_modules_that_return_tuples_and_outputs() -> None:
    model = tiny_llama()
    with torch.no_grad(), capture(model, ["model.layers.0.self_attn", "model"], reduce=lambda x: x.mean(1)) as seen:
        out = model(IDS)
    assert tuple(seen["model"][0].shape) == (2, 64) and tuple(seen["model.layers.0.self_attn"][0].shape) == (2, 64)
    assert out.logits.shape == (2, 6, 64)


def test_capture_is_bounded() -> None:
    model = tiny_llama()
    with pytest.raises(CaptureLimitError, match=r"allowed is max_bytes=100\. Name fewer modules"), \
            capture(model, "*.mlp", max_bytes=100):
        model(IDS)
    assert hooks(model) == 0


def test_patterns() -> None:
    model = tiny_llama()
    assert list(matching_modules(model, "*.mlp")) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(matching_modules(model, "model.layers.*")) == ["model.layers.0", "model.layers.1"]
    with pytest.raises(ValueError, match=r"no module of Llama.* matches .*: near names are model\.layers\.0\.mlp"), \
            capture(model, "model.layer.0.mlp"):
        pass


def test_bad_arguments_of_capture() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"patterns=\[\]: allowed is"), capture(model, []):
        pass
    with pytest.raises(ValueError, match="max_bytes=0: allowed is"), capture(model, "*.mlp", max_bytes=0):
        pass
    with pytest.raises(TypeError, match=r"reduce returned float for model\.layers\.0\.mlp"), \
            capture(model, "*.mlp", reduce=lambda x: float(x.mean())):  # type: ignore[arg-type, return-value]
        model(IDS)
    assert hooks(model) == 0


def test_intervene_changes_and_restores() -> None:
    model = tiny_llama()
    with torch.no_grad():
        before = model(IDS).logits
        with intervene(model, {"model.layers.0.self_attn": lambda x: x * 0, "*.mlp": lambda x: x + 1}):
            changed = model(IDS).logits
            with intervene(model, {"*.mlp": lambda x: x - 1, "model.layers.0.self_attn": lambda x: x}):
                nested = model(IDS).logits
        assert torch.equal(model(IDS).logits, before)
    assert not torch.allclose(changed, before) and not torch.allclose(nested, changed)
    with intervene(model, {"*.mlp": lambda x: x}):
        assert torch.equal(model(IDS).logits, before)


def test_hooks_go_after_exceptions() -> None:
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError), capture(model, "*.mlp"), intervene(model, {"*.mlp": lambda x: x}):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match=r"returned \(2, 3, 64\): allowed is a tensor of shape \(2, 6, 64\)"), \
            intervene(model, {"*.mlp": lambda x: x[:, :3]}):
        model(IDS)
    with pytest.raises(ValueError, match="no module"), \
            intervene(model, {"*.mlp": lambda x: x, "nothing.*": lambda x: x}):
        pass
    assert hooks(model) == 0


def test_gradients_flow_through_interventions() -> None:
    model = tiny_llama()
    shift = torch.zeros(64, requires_grad=True)
    with intervene(model, {"model.layers.0": lambda x: x + shift}):
        model(IDS).logits.square().mean().backward()
    assert shift.grad is not None and float(shift.grad.abs().max()) > 0


@dataclasses.dataclass
class Norms(Probe):
    """Mean norm of the outputs of some modules.

    Args:
        modules: name pattern.
    """

    modules: str = "*.mlp"
    leave_hook: ClassVar[bool] = False
    paper: ClassVar[Paper] = SlidingWindow.paper

    def validate(self) -> None:
        self.check("modules", bool(self.modules), "a name pattern")

    def run(self, model: Any, data: Any = None, *, tokenizer: Any = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        report = Report("norms")
        table = report.table("norms", ["module", "norm"])
        if self.leave_hook:
            model.register_forward_hook(lambda *a: None)
        with torch.no_grad(), capture(model, self.modules) as seen:
            model(IDS)
            model(IDS)
            for name, values in seen.items():
                table.add(name, float(values[0].norm()))
        return report


def test_kit_passes_a_probe_and_finds_a_bad_one() -> None:
    check_probe(Norms)

    @dataclasses.dataclass
    class Careless(Norms):
        """Mean norms, and a hook that stays.

        Args:
            modules: name pattern.
        """

        leave_hook: ClassVar[bool] = True

    with pytest.raises(AssertionError, match="hooks were left on the model"):
        check_probe(Careless)

    @dataclasses.dataclass
    class Loud(Norms):
        """Mean norms with noise, text and a mode of its own.

        Args:
            modules: name pattern.
        """

        def run(self, model: Any, data: Any = None, **given: Any) -> Report:
            print("hello")
            model.eval()
            report = super().run(model, data, **given)
            report.facts["noise"] = float(torch.rand(()))
            return report

    with pytest.raises(AssertionError) as caught:
        check_probe(Loud)
    for words in ("run printed 'hello'", "two runs with the same seed differ", "was in training mode and was not left"):
        assert words in str(caught.value)
