"""capture, intervene, and what a probe is run on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from looseleaf import capture, intervene, patch
from looseleaf.probes.hooks import CaptureLimitError, first_tensor, matching_modules
from looseleaf.probes.subject import parts
from looseleaf.testing.models import tiny_llama

IDS = torch.arange(12).view(2, 6)


def hooks(model: nn.Module) -> int:
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
    with pytest.raises(CaptureLimitError, match=r"expected at most max_bytes=100 .* Name fewer modules"), \
            capture(model, "*.mlp", max_bytes=100):
        model(IDS)
    assert hooks(model) == 0


def test_patterns_mean_what_they_mean_elsewhere() -> None:
    model = tiny_llama()
    assert list(matching_modules(model, "*.mlp")) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(matching_modules(model, "layers.*")) == ["model.layers.0", "model.layers.1"]
    assert list(matching_modules(model, "layers.1.**"))[:2] == ["model.layers.1.self_attn",
                                                                "model.layers.1.self_attn.q_proj"]
    assert list(matching_modules(model, "model")) == ["model"]
    inside = nn.Sequential(model)
    assert list(matching_modules(inside, "layers.*.mlp")) == ["0.model.layers.0.mlp", "0.model.layers.1.mlp"]
    with pytest.raises(ValueError, match=r"no module matches 'model\.layer\.0\.mlp'\. Near names are model\."), \
            capture(model, "model.layer.0.mlp"):
        pass


def test_bad_arguments_of_capture() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"patterns: expected a name pattern .* got \[\]"), capture(model, []):
        pass
    with pytest.raises(ValueError, match="max_bytes: expected a number of bytes > 0, got 0"), \
            capture(model, "*.mlp", max_bytes=0):
        pass
    with pytest.raises(TypeError, match=r"returns a tensor, got float for model\.layers\.0\.mlp"), \
            capture(model, "*.mlp", reduce=lambda x: float(x.mean())):  # type: ignore[arg-type, return-value]
        model(IDS)
    with pytest.raises(TypeError, match=r"m: expected an output with a tensor in it, got dict"):
        first_tensor({"a": 1}, "m")
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
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(2, 6, 64\), .* got \(2, 3, 64\)"), \
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


# ---------------------------------------------------------------------------------------------- compiled models
def compile_whole(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compile_outside(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compile_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compile_parts_outside(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    return model


def compile_body(model: Any) -> Any:
    model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.mark.parametrize("compile_", [compile_whole, compile_outside, compile_forward, compile_layers,
                                      compile_parts_outside, compile_body])
def test_hooks_work_on_a_model_that_was_compiled_and_run(compile_: Any) -> None:
    ids = IDS[:1]
    with torch.no_grad():
        plain = tiny_llama()
        with intervene(plain, {"model.layers.0.mlp": torch.zeros_like}):
            wanted = plain(ids).logits
        names = ["model.layers.0.mlp", "model.layers.1.mlp.up_proj"]
        with capture(plain, names) as clean:
            before = plain(ids).logits
        model = compile_(tiny_llama())
        torch.testing.assert_close(model(ids).logits, before)
        with intervene(model, {"model.layers.0.mlp": torch.zeros_like}):
            torch.testing.assert_close(model(ids).logits, wanted)
        with capture(model, names) as seen, patch(model, clean, positions=0):
            torch.testing.assert_close(model(ids).logits, before)
        assert list(seen) == names and all(torch.equal(seen[name][0], clean[name][0]) for name in names)
        with patch(model, {names[0]: torch.zeros(1, *clean[names[0]][0].shape[1:])}):
            torch.testing.assert_close(model(ids).logits, wanted)
        torch.testing.assert_close(model(ids).logits, before)
    assert hooks(model) == 0


def test_compiled_code_that_cannot_be_seen_is_named() -> None:
    model = tiny_llama()
    run = torch.compile(lambda ids: model(ids).logits, backend="eager")
    with torch.no_grad():
        run(IDS)
        with pytest.warns(UserWarning, match=r"mlp was never called .* give capture, intervene or patch"), \
                intervene(model, {"layers.0.mlp": torch.zeros_like}):
            run(IDS)


def test_names_are_those_inside_peft() -> None:
    peft = pytest.importorskip("peft")
    plain, model = tiny_llama(), peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        with capture(plain, "model.layers.1") as clean:
            wanted = plain(IDS).logits
        with capture(model, "layers.*.mlp") as seen, patch(model, clean):
            torch.testing.assert_close(model(IDS.flip(1)).logits, wanted)
    assert list(seen) == ["model.layers.0.mlp", "model.layers.1.mlp"] and len(seen["model.layers.0.mlp"]) == 1


# ------------------------------------------------------------------------------------------------------- subject
def test_parts_of_a_subject() -> None:
    model, words, both = nn.Linear(2, 2), object(), object()
    assert parts(model) == (model, None)
    assert parts((model, words)) == (model, words) == parts([model, words])
    assert parts((model, None)) == (model, None)
    local = SimpleNamespace(model=model, tokenizer=words)
    assert parts(local) == (model, words)
    pipeline = SimpleNamespace(model=model, tokenizer=words, image_processor=object(), processor=both)
    assert parts(pipeline) == (model, both), "a processor stands for tokenizer and image processor"
    assert parts(SimpleNamespace(model=model, tokenizer=None, image_processor=words)) == (model, words)
    whole = tiny_llama()
    assert parts(whole) == (whole, None), "a module that has a part called model is itself the model"


def test_subjects_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"subject: expected a model, a \(model, processor\) pair, .* got str"):
        parts("smollm2")
    with pytest.raises(TypeError, match="got a pair of object and Linear"):
        parts((object(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"subject: expected a \(model, tokenizer\) pair, got Linear alone"):
        parts(nn.Linear(2, 2), needs="tokenizer")
